"""What the mock engine answers. Pure: each token follows from the prompt, the seeds and the token's position.

So a wrong, lost or repeated token shows, and an answer that another worker continues goes on as if undisturbed. A token
is a byte of ASCII text: words of five letters.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from array import array

import msgspec

from triton_distributed.llm.contract.output import Candidate, FinishReason, TokenLogprob
from triton_distributed.llm.contract.request import Guide, Request

EOS = 0  # The end token. The byte 0 is in no answer's text.
MAX_LOGPROBS = 20  # As in the OpenAI API.
_STARTS = ("ba", "be", "bi", "bo", "da", "de", "di", "do", "ka", "ke", "ki", "ko", "la", "le", "li", "lo")
_ENDS = ("man", "men", "min", "mon", "nar", "ner", "nir", "nor", "ras", "res", "ris", "ros", "tal", "tel", "til", "tol")
_WORDS = [f"{start}{end} ".encode() for start in _STARTS for end in _ENDS]  # One for each value of a byte.
_BLOCK_TOKENS = 64 * len(_WORDS[0])  # A BLAKE2b of 64 bytes chooses 64 words.


class Answer(msgspec.Struct, frozen=True):
    """The whole answer to a request.

    Attributes:
        tokens: the new tokens, one byte each. The end token may be the last.
        finish_reason, stop_reason: as in `Output`.
    """

    tokens: bytes
    finish_reason: FinishReason
    stop_reason: int | None = None


def answer(request: Request, *, seed: int, answer_tokens: int, max_tokens: int) -> Answer:
    """Answer a request.

    Args:
        request: its prompt is token ids.
        seed: the engine's seed. The request's own counts too, unless it is greedy.
        answer_tokens: the end token follows after this many tokens of the answer, continued ones included; 0 for never.
        max_tokens: the most new tokens, at least 1.
    """
    done = request.continued
    key = _key(request, seed)
    if request.guide is not None:
        text = _guided(request.guide, key)[done:] + bytes([EOS])
        if len(text) > max_tokens:
            return Answer(text[:max_tokens], "length")
        return Answer(text, "stop")
    ends = max_tokens
    finish: FinishReason = "length"
    if answer_tokens and not request.ignore_eos:
        end = max(answer_tokens - done, request.min_tokens, 0)
        if end < max_tokens:
            ends, finish = end + 1, "stop"
    found = _text(key, done, ends - 1 if finish == "stop" else ends)
    if finish == "stop":
        found += bytes([EOS])
    stop = None
    for token in request.stop_token_ids:
        if 0 <= token <= 255 and (at := found.find(token, request.min_tokens)) >= 0:
            found, finish, stop = found[: at + 1], "stop", token
    return Answer(found, finish, stop)


def logprobs(answer_: Answer, first: int, last: int, alternatives: int) -> list[TokenLogprob]:
    """Make up log-probabilities of the tokens from `first` to before `last`. Each is the most probable one."""
    found = []
    for token in answer_.tokens[first:last]:
        chosen = 0.5 + token / 512  # At least 0.5, below 1.
        top = []
        if alternatives:
            top.append(Candidate(token, math.log(chosen)))
            top += [
                Candidate((token + rank) % 256, math.log((1 - chosen) / 2**rank)) for rank in range(1, alternatives)
            ]
        found.append(TokenLogprob(token, math.log(chosen), None, top))
    return found


def embedding(content: bytes, dimensions: int, most: int) -> bytes:
    """A vector of length 1 that follows from `content`: little-endian 32-bit floats.

    A shorter vector is the beginning of the one with `most` dimensions, scaled to length 1.
    """
    digest = hashlib.shake_256(content).digest(most)
    values = [each - 127.5 for each in digest[:dimensions]]
    length = math.sqrt(sum(each * each for each in values))
    found = array("f", [each / length for each in values])
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def _key(request: Request, seed: int) -> bytes:
    sampling = request.sampling
    chance = 0 if sampling.greedy else sampling.seed or 0
    prompt = request.prompt if not request.continued else request.prompt[: -4 * request.continued]
    return hashlib.blake2b(prompt, digest_size=32, key=f"{seed}/{chance}".encode()[:64]).digest()


def _text(key: bytes, first: int, count: int) -> bytes:
    """`count` tokens of an endless text from position `first` on."""
    block, skipped = divmod(first, _BLOCK_TOKENS)
    parts: list[bytes] = []
    for index in range(block, block + (skipped + count - 1) // _BLOCK_TOKENS + 1):
        digest = hashlib.blake2b(index.to_bytes(8, "little"), key=key).digest()
        parts += map(_WORDS.__getitem__, digest)
    return b"".join(parts)[skipped : skipped + count]


def _guided(guide: Guide, key: bytes) -> bytes:
    if guide.choice:
        return guide.choice[int.from_bytes(key[:8], "little") % len(guide.choice)].encode()
    return json.dumps({"answer": _text(key, 0, 17).decode()}).encode()

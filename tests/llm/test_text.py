"""The text of an answer: whole characters, the same however tokens are divided into steps, and ended at a stop text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Builder

from triton_distributed.llm import LLMError, ModelCard, Output, Request, Usage, unpacked
from triton_distributed.llm.contract.output import FinishReason
from triton_distributed.llm.models.delta import Delta
from triton_distributed.llm.models.text import AnswerText
from triton_distributed.llm.tokens import tokenizer as backends
from triton_distributed.llm.tokens.detokenizer import Detokenizer
from triton_distributed.llm.tokens.reader import TextReader
from triton_distributed.llm.tokens.stops import StopTexts
from triton_distributed.llm.tokens.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> bytes:
    """A tokenizer as GPT-2's, with a token for each byte and a few words, that begins a text with `<s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["he", "ll", "hell", "hello", "Ġw", "Ã©"]
    vocabulary = {token: at for at, token in enumerate([*SPECIAL, *alphabet, *words])}
    made = Builder(
        models.BPE(vocabulary, [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ã", "©")])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.enable_truncation(4)  # Files on the web have such a limit; it is not the model's.
    return made.to_str().encode()


def byte_fallback() -> bytes:
    """A tokenizer as Llama 2's: a word begins with its space, and unknown characters are bytes."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "▁hi"]
    made = Builder(
        models.BPE(
            {token: at for at, token in enumerate(tokens)},
            [("▁", "h"), ("▁h", "i")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL])
    return made.to_str().encode()


def with_tokenizers(content: bytes) -> Tokenizer:
    """As where fastokens is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_Fastokens", backends._Tokenizers)
        return load_tokenizer(content)


LOADED = {
    "byte level": load_tokenizer(byte_level()),
    "byte level, tokenizers": with_tokenizers(byte_level()),
    "byte fallback": load_tokenizer(byte_fallback()),
    "byte fallback, tokenizers": with_tokenizers(byte_fallback()),
    "bytes": load_tokenizer("bytes"),
}
TEXTS = st.text(st.sampled_from("hi hello wé你🙂\n"), max_size=12)


def steps(token_ids: list[Any], cuts: list[int]) -> list[list[Any]]:
    """Divide tokens or characters into steps of these sizes, and the rest into steps of one."""
    found, at = [], 0
    for cut in [*cuts, *([1] * len(token_ids))]:
        found.append(token_ids[at : at + cut])
        at += cut
    return found


def test_both_libraries_are_tried():
    assert type(LOADED["byte level"]) is backends._Fastokens
    assert type(LOADED["byte level, tokenizers"]) is backends._Tokenizers


@pytest.mark.parametrize("name", LOADED)
def test_a_text_becomes_tokens_and_the_same_text_again(name):
    tokenizer = LOADED[name]
    text = "hello wé 你好 🙂 hi"
    ids = list(unpacked(tokenizer.encode(text, add_special_tokens=False)))
    assert len(ids) > 4  # A limit in the file does not cut texts.
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)).lstrip() == text.encode()
    assert not tokenizer.vocabulary or max(ids) < tokenizer.vocabulary
    assert tokenizer.encode("", add_special_tokens=False) == b""
    assert tokenizer.token_bytes(1_000_000) == b""
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a\ud800", add_special_tokens=False)


@pytest.mark.parametrize("name", ["byte level", "byte level, tokenizers"])
def test_special_tokens_are_added_only_if_asked_for(name):
    tokenizer = LOADED[name]
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello", add_special_tokens=True) == b"\1\0\0\0" + plain
    assert tokenizer.token_text(2) == "</s>"
    assert tokenizer.decode([2]) == ""


def test_the_two_libraries_agree():
    for text in ("hello wé 你好", "<s>hi</s>", " ", "\n\n"):
        for kind in ("byte level", "byte fallback"):
            one, other = LOADED[kind], LOADED[f"{kind}, tokenizers"]
            assert one.encode(text, add_special_tokens=True) == other.encode(text, add_special_tokens=True)


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b'{"model": {"type": "X"}}', b"[1]"])
def test_a_file_that_is_not_a_tokenizer_is_refused_with_words(content):
    with pytest.raises(LLMError, match="the model's tokenizer"):
        load_tokenizer(content)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(LOADED)), TEXTS, st.lists(st.integers(1, 5), max_size=6))
def test_steps_give_the_text_of_the_whole(name, text, cuts):
    tokenizer = LOADED[name]
    ids = list(unpacked(tokenizer.encode(text, add_special_tokens=False)))
    reader = Detokenizer(tokenizer)
    pieces = [reader.push(each) for each in steps(ids, cuts)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + reader.finish() == tokenizer.decode(ids)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 264), max_size=12), st.lists(st.integers(1, 5), max_size=6))
def test_steps_give_the_text_of_tokens_that_are_no_utf_8(ids, cuts):
    for name in ("bytes", "byte level"):
        reader = Detokenizer(LOADED[name])
        pieces = [reader.push(each) for each in steps(ids, cuts)]
        assert "".join(pieces) + reader.finish() == LOADED[name].decode(ids)


def test_an_incomplete_character_is_held_back_and_given_out_at_the_end():
    for name in ("bytes", "byte level"):
        ids = list(unpacked(LOADED[name].encode("é你", add_special_tokens=False)))
        reader = Detokenizer(LOADED[name])
        assert [reader.push([each]) for each in ids[:-1]][-2:] == ["", ""]
        assert reader.finish() == "\ufffd"


def test_many_special_tokens_do_not_make_the_next_token_slow():
    reader = Detokenizer(LOADED["byte fallback"])
    hi = list(unpacked(LOADED["byte fallback"].encode("hi", add_special_tokens=False)))
    assert reader.push(hi) == "hi"
    for _ in range(500):
        assert reader.push([1]) == ""
    assert len(reader._ids) < 100
    assert reader.push(hi) == " hi"


def test_tokens_that_end_the_answer_are_not_part_of_its_text():
    reader = Detokenizer(LOADED["bytes"], skip=[10])
    assert reader.push(list(b"a\nb")) + reader.push([10, 256]) + reader.finish() == "ab"
    shown = Detokenizer(LOADED["byte level"], skip_special_tokens=False)
    assert shown.push([1]) + shown.push([2]) == "<s></s>"


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), max_size=6),
)
def test_stop_texts_do_not_depend_on_the_pieces(text, stop, cuts):
    def read(pieces):
        found = StopTexts(stop)
        out = "".join(map(found.push, pieces))
        return (out if found.found else out + found.finish()), found.found

    ends = [(text.find(each) + len(each), -len(each), each) for each in stop if each in text]
    expected = (text[: min(ends)[0] + min(ends)[1]], min(ends)[2]) if ends else (text, None)
    assert read([text]) == expected
    pieces = ["".join(each) for each in steps(list(text), cuts)]
    assert read(pieces) == expected


def test_only_what_may_begin_a_stop_text_is_held_back():
    found = StopTexts(["###", "END"])
    assert [found.push(each) for each in ("ab#", "#", "c", "E", "N", "x")] == ["ab", "", "##c", "", "", "ENx"]
    assert found.push("y##") + found.finish() == "y##"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), max_size=6), st.integers(0, 12))
def test_an_answer_ends_at_the_same_token_in_any_steps(cuts, min_tokens):
    text = "ab.cd.ef.gh"
    reader = TextReader(LOADED["bytes"], stop=["."], min_tokens=min_tokens)
    out = "".join(reader.push(each) for each in steps(list(text.encode()), cuts)) + reader.finish()
    at = text.find(".", min_tokens)
    assert (out, reader.tokens, reader.stopped_by) == ((text, 11, None) if at < 0 else (text[:at], at + 1, "."))


def test_an_engine_that_makes_text_is_read_alike():
    reader = TextReader(None, stop=["stop"], include_stop=True)
    assert [reader.push_text(each, 1) for each in ("a st", "op b", "c")] == ["a ", "stop", ""]
    assert (reader.stopped_by, reader.tokens, reader.finish()) == ("stop", 2, "")


def test_a_token_that_is_a_part_of_a_character_has_its_bytes():
    tokenizer = LOADED["byte level"]
    first, *_ = unpacked(tokenizer.encode("你", add_special_tokens=False))
    assert (tokenizer.token_bytes(first), tokenizer.token_text(first)) == ("你".encode()[:1], "\ufffd")
    assert LOADED["byte fallback"].token_bytes(3 + 0xE4) == b"\xe4"


@pytest.mark.parametrize("steps", [[b"a", b"b", b"c"], [b"ab", b"c"], [b"abc"]])
def test_tokens_after_a_stop_text_do_not_count_however_they_are_divided_into_steps(steps):
    text = AnswerText(ModelCard(name="m"), Request(stop=["b"]), 5, load_tokenizer("bytes"))
    deltas: list[Delta] = []
    for number, step in enumerate(steps, 1):
        end = {"finish_reason": "length", "usage": Usage(5, 3)} if number == len(steps) else {}
        if (delta := text.taken(Output(token_ids=list(step), **end))) is not None:  # type: ignore[arg-type]
            deltas.append(delta)
        if deltas and deltas[-1].finish_reason is not None:
            break
    assert [each for delta in deltas for each in delta.token_ids] == list(b"ab")
    assert (deltas[-1].finish_reason, deltas[-1].usage) == ("stop", Usage(5, 2))


@given(st.sampled_from(sorted(LOADED)), st.lists(st.integers(0, 300), min_size=1, max_size=8), st.booleans())
def test_an_answer_in_one_output_reads_as_one_in_steps(name, ids, ended):
    """Parts of characters, special tokens and unknown ones among them, with a stop token at the end or without."""
    card = ModelCard(name="m", eos_token_ids=(2,))
    request, end = Request(stop_token_ids=[9], max_tokens=99), Usage(5, len(ids), 3)
    ids += [9] if ended and ids[0] % 2 else [2] if ended else []
    finish: FinishReason = "stop" if ended else "length"
    whole = AnswerText(card, request, 5, LOADED[name]).taken(Output(token_ids=ids, finish_reason=finish, usage=end))
    parts = AnswerText(card, request, 5, LOADED[name])
    first = parts.taken(Output(token_ids=ids[:1])) or Delta()
    last = parts.taken(Output(token_ids=ids[1:], finish_reason=finish, usage=end))
    assert whole is not None
    assert last is not None
    reader = TextReader(LOADED[name])
    text = reader.push(ids[:-1] if ended else ids) + reader.finish()
    assert (whole.text, whole.token_ids) == (text, first.token_ids + last.token_ids)
    assert (whole.finish_reason, whole.stop_reason, whole.usage) == (last.finish_reason, last.stop_reason, last.usage)

"""Long prompts: how many a front end makes in a second, and how long its loop waits meanwhile."""

from __future__ import annotations

import argparse
import asyncio
import random
import time

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from harness.processes import ROOT
from triton_distributed.llm import ModelCard
from triton_distributed.llm.models.prompts import Prompts, TokenizerThreads

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lines() -> list[str]:
    """The lines of this project's own code and pages."""
    paths = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.py")])
    return [line for path in paths for line in path.read_text().splitlines() if line.strip()]


def tokenizer(texts: list[str], vocabulary: int) -> bytes:
    """A byte-level tokenizer that is trained on the texts: no file of a model is needed."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = [AddedToken(each, special=True) for each in ("<|im_start|>", "<|im_end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made.to_str().encode()


def body(texts: list[str], count: int, chance: random.Random) -> str:
    """So many lines, each with a word that the tokenizer has not seen: it has a cache of words."""
    return "\n".join(f"{line} {chance.randbytes(4).hex()}" for line in chance.choices(texts, k=count))


async def waits(found: list[float]) -> None:
    """Note how much later than asked for the loop goes on, each millisecond."""
    last = time.perf_counter()
    while True:
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        found.append(now - last - 0.001)
        last = now


async def measured(options: argparse.Namespace) -> None:
    texts = lines()
    threads = TokenizerThreads()
    prompts = await Prompts.load(ModelCard(name="bench"), tokenizer(texts, options.vocabulary), CHAT, threads)
    chance = random.Random(options.seed)
    sample = body(texts, 2_000, chance)
    long = int(options.tokens * 2_000 / (await prompts.text(sample)).tokens)  # The lines of a prompt.
    try:
        for together in (0, 1, options.together):
            bodies = [body(texts, long, chance) for _ in range(options.prompts if together else 0)]
            late: list[float] = []
            watch = asyncio.create_task(waits(late))
            begin, tokens = time.perf_counter(), 0
            if not together:
                await asyncio.sleep(1)
            queue = iter(bodies)

            async def caller() -> int:
                made = [await prompts.chat([{"role": "user", "content": each}]) for each in queue]  # noqa: B023
                return sum(each.tokens for each in made)

            tokens = sum(await asyncio.gather(*(caller() for _ in range(together))))
            wall = time.perf_counter() - begin
            watch.cancel()
            late.sort()
            rate = f"{len(bodies) / wall:6.1f} prompts/s of {tokens // max(len(bodies), 1):,} tokens"
            print(
                f"{together} at once: {rate}; the loop was late by p99 {late[int(len(late) * 0.99)] * 1e3:.1f} ms, "
                f"at most {late[-1] * 1e3:.1f} ms"
            )
    finally:
        threads.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=60_000, help="of each prompt, about")
    parser.add_argument("--prompts", type=int, default=100, help="how many, for each line of the result")
    parser.add_argument("--together", type=int, default=8, help="callers at once, in the last line")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="tokens of the tokenizer that is trained first")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts' lines")
    asyncio.run(measured(parser.parse_args()))


if __name__ == "__main__":
    main()

"""`python -m benchmarks.llm.prompts`: long prompts over HTTP, and how long the loop of `trd http` waits meanwhile.

Each measurement starts `trd http` anew; in each round once for each tree of sources. The worker has a mock engine with
a real tokenizer. Callers send chats of about 60,000 tokens, each with a text that was in none before. Another
connection asks for `/live` each 5 ms: what it waits is what any other request waits. The watchdog of the front end
(`TRD_WATCHDOG_S=0.02`) counts the stalls of its loop from 20 ms on, without the time in which the machine gave it no
processor; `late_20_ms` counts all marks of the loop that were more than 20 ms late, with that time. It writes
results/prompts.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.rounds import RESULTS, Figures, Measure, Run
from harness.processes import ROOT, Child, answer_questions, environment_without_settings
from triton_distributed.api.connection import connect
from triton_distributed.config import Config
from triton_distributed.llm import Model, serve_model
from triton_distributed.llm.engines.mock.engine import MockEngine

NAME = "long"
WATCHDOG_S = 0.02
BEAT_S = 0.005
CALLERS = (1, 4, 16)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lines() -> list[str]:
    """The lines of this project's own code and pages."""
    paths = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.py")])
    return [line for path in paths for line in path.read_text().splitlines() if line.strip()]


def tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level tokenizer that is trained on the texts: no file of a model is needed.

    It takes each digit by itself, as SmolLM2's does. fastokens needs 18 ms for 60,000 tokens of it. It has a faster way
    for the patterns of GPT and Llama 3: 1.3 ms.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = [AddedToken(each, special=True) for each in ("<|im_start|>", "<|im_end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made


def prepared(options: argparse.Namespace, made: Tokenizer) -> list[bytes]:
    """The requests: pieces of Python's own library, since a tokenizer has a cache of the texts that it has seen."""
    chance = random.Random(options.seed)
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    chance.shuffle(paths)
    texts = (each.read_text(errors="replace") for each in paths if "site-packages" not in each.parts)
    found: list[bytes] = []
    piece: list[str] = []
    characters = 0
    wanted = options.tokens * 4  # Of the first one; the others are cut by what it had for a token.
    for text in texts:
        piece.append(text)
        characters += len(text)
        while characters >= wanted and len(found) < options.prompts:
            whole = "".join(piece)
            if not found:
                wanted = options.tokens * wanted // len(made.encode(whole[:wanted]).ids)
            asked = {"model": NAME, "messages": [{"role": "user", "content": whole[:wanted]}], "max_tokens": 1}
            found.append(post(msgspec.json.encode(asked)))
            piece, characters = [whole[wanted:]], len(whole) - wanted
    if len(found) < options.prompts:
        raise ValueError(f"Python's library has text for {len(found)} prompts only: lower --prompts")
    return found


def post(content: bytes) -> bytes:
    """A request to the OpenAI API."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(content)}\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + content


async def work(place: str) -> None:
    """The program of the worker."""
    engine = MockEngine(name=NAME, speed="instant", context_tokens=1_000_000)
    content = Path(place).read_bytes()
    engine.model = Model(card=engine.model.card, tokenizer=content, template=CHAT)
    config = Config.from_env()
    async with connect(config) as here:
        await serve_model(here, engine)

        async def answer(question: str) -> Any:
            stats = here.runtime.loop_stats
            return {"stalls": stats.stalls, "late": sum(stats.lag[5:])}

        await answer_questions(answer)


class Http:
    """A connection to the front end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, port: int) -> AsyncIterator[Http]:
        """Connect."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()

    async def ask(self, request: bytes) -> bytes:
        """Send a request, and return the body of its answer."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        content = await self._reader.readexactly(int(length[1]) if length else 0)
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{head.splitlines()[0]!r}: {content[:500]!r}")
        return content

    async def get(self, path: str) -> bytes:
        """Read a page."""
        return await self.ask(f"GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n".encode())


class Front:
    """`trd http` of a tree of sources."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process, self.port = process, port

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, tree: Path, settings: dict[str, str]) -> AsyncIterator[Front]:
        """Start it, and wait until it answers for the model."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "triton_distributed.cli.main", "http", "--port", "0", "--no-access-log"),
            stdout=asyncio.subprocess.PIPE,
            cwd=tree,
            env={**environment_without_settings(), **settings, "PYTHONPATH": str(tree / "src")},
        )
        try:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), 30)
            port = int(line.decode().rsplit(":", 1)[1].split("/")[0])
            async with asyncio.timeout(30), Http.to(port) as http:
                while NAME.encode() not in await http.get("/v1/models"):
                    await asyncio.sleep(0.05)
            yield cls(process, port)
        finally:
            process.terminate()
            await process.wait()

    def cpu_s(self) -> float:
        """The processor time that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def watched(self) -> tuple[int, int]:
        """What its watchdog has counted: stalls, and beats that were more than 20 ms late."""
        async with Http.to(self.port) as http:
            page = (await http.get("/metrics")).decode()

        def value(pattern: str) -> int:
            found = re.search(rf"^{pattern} (\S+)", page, re.MULTILINE)
            return int(float(found[1])) if found else 0

        late = value("triton_loop_lag_seconds_count") - value(r'triton_loop_lag_seconds_bucket\{le="0.02"\}')
        return value("triton_loop_stalls_total"), late


async def probe(port: int, waits: list[float]) -> None:
    """Ask for a small page each 5 ms, and note what it takes."""
    async with Http.to(port) as http:
        while True:
            begin = time.perf_counter()
            await http.get("/live")
            waits.append(time.perf_counter() - begin)
            await asyncio.sleep(BEAT_S)


async def loaded(front: Front, requests: list[bytes], callers: int) -> Figures:
    """Send requests, so many at a time."""
    waits: list[float] = []
    probing = asyncio.create_task(probe(front.port, waits))
    queue = iter(requests)

    async def caller() -> None:
        async with Http.to(front.port) as http:
            for each in queue:
                await http.ask(each)

    before, cpu = await front.watched(), front.cpu_s()
    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    wall, used = time.perf_counter() - begin, front.cpu_s() - cpu
    probing.cancel()
    await asyncio.wait([probing])
    after = await front.watched()
    waits.sort()
    return {
        "per_s": len(requests) / wall,
        "cpu_ms": used / len(requests) * 1e3,
        "stalls": after[0] - before[0],
        "late_20_ms": after[1] - before[1],
        "other_p50_ms": waits[len(waits) // 2] * 1e3,
        "other_p99_ms": waits[int(len(waits) * 0.99)] * 1e3,
        "other_max_ms": waits[-1] * 1e3,
    }


async def measured(options: argparse.Namespace) -> Run:
    """Take all rounds."""
    made = tokenizer(lines(), options.vocabulary)
    requests = prepared(options, made)
    trees = {"ours": ROOT} | ({"base": options.base.resolve()} if options.base else {})
    run = Run()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "tokenizer.json"
        file.write_text(made.to_str())
        settings = {"TRD_DIR": place, "TRD_WATCHDOG_S": str(WATCHDOG_S)}
        worker = await Child.start("benchmarks.llm.prompts", "--serve", str(file), environ=settings)
        try:

            def measure(tree: Path, callers: int) -> Measure:
                async def once() -> Figures:
                    async with Front.start(tree, settings) as front:
                        return await loaded(front, requests, callers)

                return once

            await run.interleave(
                options.rounds,
                {(f"{n} at once", name): measure(tree, n) for n in options.callers for name, tree in trees.items()},
            )
            watched = await worker.ask("watched")
            print(f"the worker's loop: {watched['stalls']} stalls, {watched['late']} beats more than 20 ms late")
        finally:
            await worker.stop()
    return run


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llm.prompts", description="Long prompts over HTTP")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all of it (5)")
    parser.add_argument("--tokens", type=int, default=60_000, help="of each prompt, about (60000)")
    parser.add_argument("--prompts", type=int, default=100, help="requests of each measurement (100)")
    parser.add_argument("--callers", type=int, nargs="+", default=CALLERS, help="callers at once (1 4 16)")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="tokens of the tokenizer (32000)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the texts (1)")
    parser.add_argument("--base", type=Path, help="another checkout, whose front end is measured in turn")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(work(options.serve))
        return 0
    run = uvloop.run(measured(options))
    whole = options.tokens == 60_000 and options.rounds >= 3
    path = RESULTS / ("prompts.json" if whole else "partial-prompts.json")
    result = run.write(path, rounds=options.rounds, quick=not whole, tokens=options.tokens, prompts=options.prompts)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())

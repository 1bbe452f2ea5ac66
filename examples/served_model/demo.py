"""An answer that survives its worker: the real `openai` client reads it while the worker is killed with SIGKILL.

    make demo-llm                                  (or: python examples/served_model/demo.py)

Two worker processes serve SmolLM2 (135 million parameters, on the CPU), and a front end answers the OpenAI API. The
program asks the same question twice. The second time it kills the worker that gives the answer, in the middle. Both
texts must be equal. Everything runs in a temporary folder and on a free port of this machine.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import openai

TRD = str(Path(sys.executable).with_name("trd"))
QUESTION = "Write a story about a lighthouse."
MAX_TOKENS, KILLED_AFTER = 60, 20  # tokens
PATIENCE_S = 300.0  # a demo that takes longer has failed


class Command:
    """A `trd` command that runs until it is stopped."""

    def __init__(self, process: Process, ready: str) -> None:
        self.process, self.ready = process, ready

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.communicate()


async def start(environment: dict[str, str], *arguments: str) -> Command:
    """Start a command and wait for its line that begins with `ready:`."""
    process = await asyncio.create_subprocess_exec(TRD, *arguments, env=environment, stdout=PIPE)
    assert process.stdout is not None
    while line := (await process.stdout.readline()).decode():
        if line.startswith("ready:"):
            print(" ", line.strip())
            return Command(process, line)
    raise SystemExit(f"trd {' '.join(arguments)} ended with status {await process.wait()}")


async def busy(environment: dict[str, str], workers: list[Command]) -> Command:
    """The worker that serves a request now."""
    process = await asyncio.create_subprocess_exec(TRD, "requests", "--json", "models.*", env=environment, stdout=PIPE)
    output, _ = await process.communicate()
    serving = {str(json.loads(line)["instance_id"]) for line in output.splitlines()}
    return next(worker for worker in workers if any(number in worker.ready for number in serving))


async def ask(client: openai.AsyncOpenAI, killing: tuple[dict[str, str], list[Command]] | None) -> str:
    """Ask the question and return the answer; kill its worker in the middle if that is wanted."""
    stream = await client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
    )
    pieces: list[str] = []
    latest = asyncio.Event()
    killed = asyncio.create_task(kill(latest, *killing)) if killing else None
    longest, before = 0.0, time.perf_counter()
    async for chunk in stream:
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
        pieces.append(chunk.choices[0].delta.content or "")
        if len(pieces) == KILLED_AFTER:
            latest.set()
    if killed is not None:
        print(f"  killed process {await killed}")
    print(f"  {len(pieces)} chunks, the longest wait for one {longest:.2f} s")
    return "".join(pieces)


async def kill(latest: asyncio.Event, environment: dict[str, str], workers: list[Command]) -> int:
    await latest.wait()
    worker = await busy(environment, workers)
    worker.process.kill()
    return worker.process.pid


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trd-demo-") as folder:
        environment = {**os.environ, "TRD_DIR": folder}
        running: list[Command] = []
        try:
            print("two workers and a front end:")
            for _ in range(2):
                running.append(await start(environment, "model", "serve", "smollm2"))
            workers = list(running)
            running.append(await start(environment, "http", "--port", "0", "--no-access-log"))
            url = running[-1].ready.split()[1]
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                while not [model async for model in client.models.list()]:
                    await asyncio.sleep(0.1)
                print("undisturbed:")
                undisturbed = await ask(client, None)
                print("its worker is killed in the middle:")
                killed = await ask(client, (environment, workers))
            print(f"\n{killed}\n")
            if killed != undisturbed:
                raise SystemExit("the texts differ")
            print("the text is the same as undisturbed")
        finally:
            for command in reversed(running):
                await command.stop()


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))

"""Sends typed requests, and some that do not fit: their error names the field.

    pip install pydantic
    python examples/typed/client.py

Start server.py in another shell.
"""

import asyncio

import msgspec
from models import Numbers, Summary, Text, Word

from triton_distributed.runtime import Client, DistributedRuntime, triton_worker


async def show(client: Client, request) -> None:
    """Print the answer. It arrives as plain data; the client converts it to its own classes."""
    try:
        words = [Word.model_validate(item) async for item in client.generate(request, annotated=False)]
        print(f"{request!r}: {', '.join(f'{each.place} {each.word}' for each in words)}")
    except ValueError as error:
        print(f"{request!r}: {error}")


@triton_worker()
async def worker(runtime: DistributedRuntime):
    component = runtime.namespace("examples").component("typed")
    words = await component.endpoint("words").client()
    summary = await component.endpoint("summary").client()
    await asyncio.gather(words.wait_for_instances(), summary.wait_for_instances())

    await show(words, Text(text="the quick brown fox jumps", max_words=4))
    await show(words, {"text": "the lazy dog sleeps"})
    await show(words, '{"text": "as JSON", "max_words": 1}')
    await show(words, {"text": "no room", "max_words": 0})
    await show(words, {"max_words": 2})

    answer = msgspec.convert(await summary.call(Numbers([1.0, 2.5, 4.0])), Summary)
    print(f"{answer.count} numbers, mean {answer.mean}")
    try:
        await summary.call({"values": [1, "two"]})
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    asyncio.run(worker())

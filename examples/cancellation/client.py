"""Three ways to end an endless call. Each reaches the innermost of three handlers at once.

    python examples/cancellation/client.py

Start the three hops of server.py in other shells and watch what they print.
"""

import asyncio

from triton_distributed.runtime import Client, Context, DistributedRuntime, triton_worker


async def leave(client: Client) -> None:
    """Leave the loop: the handlers are cancelled where they are, and their `finally` blocks run."""
    async for number in client.generate("leaving", annotated=False):
        if number == 3:
            break
    print(f"leaving: had enough after {number}")


async def time_out(client: Client) -> None:
    """Give the call a deadline: it travels with the request, and every hop keeps it."""
    numbers = []
    try:
        async for number in client.generate("timeout", annotated=False, timeout=0.25):
            numbers.append(number)
    except TimeoutError as error:
        print(f"timeout: {len(numbers)} numbers, then {error}")


async def ask_to_stop(client: Client) -> None:
    """Ask the handlers to finish by themselves: their last items still arrive."""
    context = Context()
    async for answer in client.generate("stopping", annotated=False, context=context):
        if answer == 3:
            context.stop_generating()
    print(f"stopping: the last word was {answer!r}")


@triton_worker()
async def worker(runtime: DistributedRuntime):
    client = await runtime.endpoint("examples.cancellation.outer").client()
    await client.wait_for_instances()
    await leave(client)
    await time_out(client)
    await ask_to_stop(client)


if __name__ == "__main__":
    asyncio.run(worker())

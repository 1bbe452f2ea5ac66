"""Catches what the kitchen raises, and what happens when there is no kitchen, no room, or no way to send an order.

    python examples/error_handling/client.py

Start server.py in another shell.
"""

import asyncio
from textwrap import indent

from menu import SoldOut

from triton_distributed.errors import NoInstances, Overloaded, RemoteError
from triton_distributed.runtime import Client, DistributedRuntime, triton_worker


async def order(client: Client, dish: str) -> None:
    """Order one dish; the steps that came before an error are kept."""
    steps = []
    try:
        async for step in client.generate(dish, annotated=False):
            steps.append(step)
        print(f"{dish}: {', '.join(steps)}")
    except SoldOut as error:  # a type of our own, with its fields: this program has imported it too
        print(f"{dish}: {', '.join(steps)}, then sold out; {error.tomorrow} tomorrow")
    except KeyError as error:  # a built-in type as itself, with the traceback of the other process
        print(f"{dish}: {', '.join(steps)}, then {error}")
        print(indent(error.remote_traceback, "    | "), end="")
    except RemoteError as error:  # whatever else a handler raises
        print(f"{dish}: {', '.join(steps)}, then {error.type_name}: {error.message}")


@triton_worker()
async def worker(runtime: DistributedRuntime):
    client = await runtime.endpoint("examples.kitchen.cook").client()
    await client.wait_for_instances()

    for dish in ("soup", "cake", "unicorn", "water"):
        await order(client, dish)

    stew = client.generate("stew", annotated=False)  # calls start at once, and this one takes its time
    try:
        await anext(client.generate("soup"))
    except Overloaded as error:
        print(f"soup, meanwhile: {error}")
    print(f"stew: {', '.join([step async for step in stew])}")

    try:
        client.generate({"dish": "soup", "for": [object()]})
    except TypeError as error:  # raised by the call itself: nothing was sent
        print(f"not an order: {error}")

    bar = await runtime.endpoint("examples.bar.pour").client()
    try:
        await bar.call("tea")
    except NoInstances as error:
        print(f"no bar: {error}")


if __name__ == "__main__":
    asyncio.run(worker())

"""Catches the kitchen's errors, and those for a full kitchen, an order that cannot be sent, and a missing bar.

    python examples/error_handling/client.py

Start server.py in another shell.
"""

import asyncio
from textwrap import indent

from menu import SoldOut

from triton_distributed.errors import NoInstances, Overloaded, RemoteError
from triton_distributed.runtime import Client, DistributedRuntime, triton_worker


async def order(client: Client, dish: str) -> None:
    """Order one dish; the steps that arrived before an error are kept."""
    steps = []
    try:
        async for step in client.generate(dish, annotated=False):
            steps.append(step)
        print(f"{dish}: {', '.join(steps)}")
    except SoldOut as error:  # our own type with its fields, since this program has imported it too
        print(f"{dish}: {', '.join(steps)}, then sold out; {error.tomorrow} tomorrow")
    except KeyError as error:  # a built-in type, with the traceback from the other process
        print(f"{dish}: {', '.join(steps)}, then {error}")
        if isinstance(error, RemoteError):
            print(indent(error.remote_traceback, "    | "), end="")
    except RemoteError as error:  # any other error of a handler
        print(f"{dish}: {', '.join(steps)}, then {error.type_name}: {error.message}")


@triton_worker()
async def worker(runtime: DistributedRuntime):
    client = await runtime.endpoint("examples.kitchen.cook").client()
    await client.wait_for_instances()

    for dish in ("soup", "cake", "unicorn", "water"):
        await order(client, dish)

    stew = client.generate("stew", annotated=False)  # the call starts at once and takes some time
    try:
        await anext(client.generate("soup"))
    except Overloaded as error:
        print(f"soup, meanwhile: {error}")
    print(f"stew: {', '.join([step async for step in stew])}")

    try:
        client.generate({"dish": "soup", "for": [object()]})
    except TypeError as error:  # raised by the call itself, before anything was sent
        print(f"not an order: {error}")

    bar = await runtime.endpoint("examples.bar.pour").client()
    try:
        await bar.call("tea")
    except NoInstances as error:
        print(f"no bar: {error}")


if __name__ == "__main__":
    asyncio.run(worker())

"""Prints the events of a component as they come.

    python examples/events/subscriber.py             # until Ctrl-C
    python examples/events/subscriber.py 5           # five of them

Start any number of these, before or after the publisher: each gets what is published from then on. Nothing else has to
run; with NATS_SERVER set the same program hears publishers on other hosts.
"""

import asyncio
import sys

from triton_distributed.runtime import DistributedRuntime, triton_worker


@triton_worker()
async def worker(runtime: DistributedRuntime, count: int):
    component = runtime.namespace("examples").component("cache")
    # Awaited, the subscription is live: whatever anybody publishes after this line arrives.
    subscription = await component.subscribe("stored")
    print("Listening", flush=True)

    async for event in subscription:
        print(f"{event.name}: block {event.data['block']}, {len(event.data['hashes'])} hashes", flush=True)
        count -= 1
        if count == 0:
            break  # leaving the loop ends the subscription

    if subscription.dropped:
        print(f"{subscription.dropped} were lost: this program was too slow for them")


if __name__ == "__main__":
    asyncio.run(worker(int(sys.argv[1]) if len(sys.argv) > 1 else -1))

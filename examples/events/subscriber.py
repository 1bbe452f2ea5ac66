"""Prints the events of a component as they come.

    python examples/events/subscriber.py             # until Ctrl-C
    python examples/events/subscriber.py 5           # five of them

Start any number of subscribers, before or after the publisher. Each gets the events from its start on. Nothing else has to
run; with NATS_SERVER set the same program gets events from other hosts.
"""

import asyncio
import sys

from triton_distributed.runtime import DistributedRuntime, triton_worker


@triton_worker()
async def worker(runtime: DistributedRuntime, count: int):
    component = runtime.namespace("examples").component("cache")
    # The awaited subscription is live: every event published after this line arrives.
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

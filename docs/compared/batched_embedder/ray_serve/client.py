import asyncio

import ray
from ray import serve
from worker import EmbedRequest


async def main() -> None:
    ray.init(address="auto")
    embedder = serve.get_app_handle("default")
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*(embedder.embed.remote(EmbedRequest(f"text {n}")) for n in range(64)))
    print(f"{len(answers)} vectors, batches of up to {max(each.batch_size for each in answers)}")


asyncio.run(main())

import asyncio
import sys

import ray
from pipeline import Question
from ray import serve


async def main(text: str) -> None:
    ray.init(address="auto")
    frontend = serve.get_app_handle("default").options(stream=True)
    async with asyncio.timeout(10):
        async for piece in frontend.ask.remote(Question(text)):
            print(piece.text, end="", flush=True)
    print()


asyncio.run(main(" ".join(sys.argv[1:]) or "HAL"))

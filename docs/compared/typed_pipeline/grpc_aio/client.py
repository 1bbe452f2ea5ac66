import asyncio
import sys

import grpc
import pipeline_pb2
import pipeline_pb2_grpc
from serving import FRONTEND


async def main(text):
    async with grpc.aio.insecure_channel(FRONTEND) as channel:
        stub = pipeline_pb2_grpc.FrontendStub(channel)
        metadata = (("request-id", "question-1"),)
        async for piece in stub.Ask(pipeline_pb2.Question(text=text), timeout=10, metadata=metadata):
            print(piece.text, end="", flush=True)
        print()


asyncio.run(main(" ".join(sys.argv[1:]) or "HAL"))

import asyncio

import grpc
import hello_pb2
import hello_pb2_grpc


async def main():
    async with grpc.aio.insecure_channel("localhost:50051") as channel:
        stub = hello_pb2_grpc.HelloStub(channel)
        async for word in stub.Generate(hello_pb2.Text(text="remote feels local")):
            print(word.text)


asyncio.run(main())

import asyncio

import embedder_pb2
import embedder_pb2_grpc
import grpc


async def main():
    async with grpc.aio.insecure_channel("localhost:50051") as channel:
        stub = embedder_pb2_grpc.EmbedderStub(channel)
        calls = [stub.Embed(embedder_pb2.EmbedRequest(text=f"text {n}"), timeout=10) for n in range(64)]
        answers = await asyncio.gather(*calls)
        print(f"{len(answers)} vectors, batches of up to {max(each.batch_size for each in answers)}")


asyncio.run(main())

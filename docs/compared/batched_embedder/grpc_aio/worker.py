import asyncio
import time

import embedder_pb2
import embedder_pb2_grpc
import grpc


def embed(requests):
    time.sleep(0.01)
    return [
        embedder_pb2.EmbedResponse(vector=[ord(letter) for letter in each.text[:4]], batch_size=len(requests))
        for each in requests
    ]


class Embedder(embedder_pb2_grpc.EmbedderServicer):
    def __init__(self):
        self.waiting = asyncio.Queue()
        self.batches = asyncio.create_task(self.run_batches())

    async def Embed(self, request, context):
        answer = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((request, answer))
        return await answer

    async def run_batches(self):
        while True:
            batch = [await self.waiting.get()]
            try:
                async with asyncio.timeout(0.005):
                    while len(batch) < 32:
                        batch.append(await self.waiting.get())
            except TimeoutError:
                pass
            batch = [each for each in batch if not each[1].cancelled()]
            try:
                answers = await asyncio.to_thread(embed, [request for request, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)


async def main():
    server = grpc.aio.server(maximum_concurrent_rpcs=64)
    embedder_pb2_grpc.add_EmbedderServicer_to_server(Embedder(), server)
    server.add_insecure_port("localhost:50051")
    await server.start()
    await server.wait_for_termination()


asyncio.run(main())

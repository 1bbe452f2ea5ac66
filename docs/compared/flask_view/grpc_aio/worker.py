import asyncio
import os

import embedder_pb2
import embedder_pb2_grpc
import grpc


class Embedder(embedder_pb2_grpc.EmbedderServicer):
    async def Embed(self, request, context):
        vectors = [embedder_pb2.Vector(values=[len(text), len(text.split())]) for text in request.texts]
        return embedder_pb2.Vectors(vectors=vectors, worker=os.getpid())


async def main():
    server = grpc.aio.server(maximum_concurrent_rpcs=64)
    embedder_pb2_grpc.add_EmbedderServicer_to_server(Embedder(), server)
    server.add_insecure_port("localhost:50051")
    await server.start()
    await server.wait_for_termination()


asyncio.run(main())

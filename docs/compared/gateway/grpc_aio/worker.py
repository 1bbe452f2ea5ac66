import asyncio

import gateway_pb2
import gateway_pb2_grpc
import grpc


class Model(gateway_pb2_grpc.ModelServicer):
    async def Count(self, request, context):
        return gateway_pb2.Counted(words=len(request.text.split()))

    async def Generate(self, request, context):
        for number in range(request.words):
            await asyncio.sleep(0.02)
            yield gateway_pb2.Token(text=f"{request.text}-{number}")


async def main():
    server = grpc.aio.server(maximum_concurrent_rpcs=32)
    gateway_pb2_grpc.add_ModelServicer_to_server(Model(), server)
    server.add_insecure_port("localhost:50051")
    await server.start()
    await server.wait_for_termination()


asyncio.run(main())

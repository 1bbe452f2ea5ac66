# Before it: python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. hello.proto
import asyncio

import grpc
import hello_pb2
import hello_pb2_grpc


class Hello(hello_pb2_grpc.HelloServicer):
    async def Generate(self, request, context):
        for word in request.text.split():
            yield hello_pb2.Text(text=word)


async def main():
    server = grpc.aio.server()
    hello_pb2_grpc.add_HelloServicer_to_server(Hello(), server)
    server.add_insecure_port("localhost:50051")
    await server.start()
    await server.wait_for_termination()


asyncio.run(main())

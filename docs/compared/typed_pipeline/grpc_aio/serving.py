# What the three workers share.
import asyncio

import grpc

TOKENIZER, MODEL, FRONTEND = (f"localhost:{port}" for port in (50051, 50052, 50053))


def request_id(context):
    return dict(context.invocation_metadata()).get("request-id", "-")


def travelling(context):
    return {"timeout": context.time_remaining(), "metadata": (("request-id", request_id(context)),)}


def run(add, servicer, address, maximum=None):
    async def main():
        server = grpc.aio.server(maximum_concurrent_rpcs=maximum)
        add(servicer, server)
        server.add_insecure_port(address)
        await server.start()
        await server.wait_for_termination()

    asyncio.run(main())

import asyncio

import pipeline_pb2
import pipeline_pb2_grpc
from serving import MODEL, request_id, run


class Model(pipeline_pb2_grpc.ModelServicer):
    async def Generate(self, request, context):
        print(f"{request_id(context)} generate", flush=True)
        for token_id in request.token_ids:
            await asyncio.sleep(0.01)
            yield pipeline_pb2.Token(id=token_id + 1)


run(pipeline_pb2_grpc.add_ModelServicer_to_server, Model(), MODEL, maximum=64)

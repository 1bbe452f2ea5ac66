import grpc
import pipeline_pb2
import pipeline_pb2_grpc
from serving import FRONTEND, MODEL, TOKENIZER, request_id, run, travelling


class Frontend(pipeline_pb2_grpc.FrontendServicer):
    async def Ask(self, request, context):
        print(f"{request_id(context)} ask", flush=True)
        async with grpc.aio.insecure_channel(TOKENIZER) as tokenizer, grpc.aio.insecure_channel(MODEL) as model:
            stub = pipeline_pb2_grpc.TokenizerStub(tokenizer)
            prompt = await stub.Tokenize(request, **travelling(context))
            tokens = pipeline_pb2_grpc.ModelStub(model).Generate(prompt, **travelling(context))
            async for token in tokens:
                yield pipeline_pb2.Piece(text=chr(token.id))


run(pipeline_pb2_grpc.add_FrontendServicer_to_server, Frontend(), FRONTEND)

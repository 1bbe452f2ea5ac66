import pipeline_pb2
import pipeline_pb2_grpc
from serving import TOKENIZER, request_id, run


class Tokenizer(pipeline_pb2_grpc.TokenizerServicer):
    async def Tokenize(self, request, context):
        print(f"{request_id(context)} tokenize", flush=True)
        return pipeline_pb2.Prompt(token_ids=[ord(letter) for letter in request.text])


run(pipeline_pb2_grpc.add_TokenizerServicer_to_server, Tokenizer(), TOKENIZER)

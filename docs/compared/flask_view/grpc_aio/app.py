import functools

import embedder_pb2
import embedder_pb2_grpc
import grpc
from flask import Flask, request

app = Flask(__name__)


@functools.cache
def embedder():
    return embedder_pb2_grpc.EmbedderStub(grpc.insecure_channel("localhost:50051"))  # in each process, after its fork


@app.post("/embed")
def embed():
    answer = embedder().Embed(embedder_pb2.Texts(texts=request.json["texts"]), timeout=10)
    return {"vectors": [list(each.values) for each in answer.vectors], "worker": answer.worker}


@app.errorhandler(grpc.RpcError)
def failed(error):
    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        raise error
    return {"error": error.details()}, 503, {"Retry-After": "1"}

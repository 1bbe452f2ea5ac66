import functools

import ray
from flask import Flask, request
from ray import serve
from ray.serve.exceptions import BackPressureError
from worker import Texts

app = Flask(__name__)


@functools.cache
def embedder():
    ray.init(address="auto")  # in each process of the server, after its fork
    return serve.get_app_handle("default")


@app.post("/embed")
def embed():
    answer = embedder().embed.remote(Texts(request.json["texts"])).result(timeout_s=10)
    return {"vectors": answer.vectors, "worker": answer.worker}


@app.errorhandler(BackPressureError)
def overloaded(error):
    return {"error": str(error)}, 503, {"Retry-After": "1"}

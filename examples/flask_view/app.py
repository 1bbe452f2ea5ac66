"""A Flask view that calls the workers. Each process of the server has a connection of its own:

pip install flask gunicorn
gunicorn --chdir examples/flask_view --workers 2 --threads 8 app:app
curl localhost:8000/embed --json '{"texts": ["some words"]}'
"""

from contracts import EMBED, Texts
from flask import Flask, request

import triton_distributed as trd

app = Flask(__name__)
here = trd.connect_sync()


@app.post("/embed")
def embed() -> dict[str, object]:
    """Answer with the vectors, from any worker."""
    answer = here.call(EMBED, Texts(request.json["texts"]), timeout=10, idempotent=True)
    return {"vectors": answer.vectors, "worker": answer.worker}


@app.errorhandler(trd.Overloaded)
def overloaded(error: trd.Overloaded) -> tuple[dict[str, str], int, dict[str, str]]:
    """Let the client try again when all workers are at capacity."""
    return {"error": str(error)}, 503, {"Retry-After": "1"}

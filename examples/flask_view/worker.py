"""Embeds texts. Start as many as you like, each in a shell of its own:

python examples/flask_view/worker.py
"""

import os

from contracts import EMBED, Texts, Vectors

import triton_distributed as trd


@trd.serve(EMBED, max_inflight=64)
def embed(request: Texts) -> Vectors:
    """Stands for a model: a vector of the number of letters and of words."""
    return Vectors([[len(text), len(text.split())] for text in request.texts], os.getpid())


if __name__ == "__main__":
    trd.run(embed)

"""An embedder whose cost is mostly for each batch: callers send one text, and the model gets up to 32 at once.

trd serve worker                                  (in this folder)
"""

import time

from contracts import EMBED, EmbedRequest, EmbedResponse

import triton_distributed as trd


@trd.serve(EMBED, max_inflight=64)
@trd.batched(max_size=32, max_wait_s=0.005)
def embed(requests: list[EmbedRequest]) -> list[EmbedResponse]:
    time.sleep(0.01)  # The model. It runs in a thread, and the next batch gathers meanwhile.
    return [EmbedResponse([float(ord(letter)) for letter in each.text[:4]], len(requests)) for each in requests]

# Run it: serve run worker:app
import asyncio
import time
from dataclasses import dataclass

from ray import serve


@dataclass
class EmbedRequest:
    text: str


@dataclass
class EmbedResponse:
    vector: list[float]
    batch_size: int


@serve.deployment(max_ongoing_requests=64)
class Embedder:
    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def embed(self, requests: list[EmbedRequest]) -> list[EmbedResponse]:
        return await asyncio.to_thread(self.model, requests)

    def model(self, requests: list[EmbedRequest]) -> list[EmbedResponse]:
        time.sleep(0.01)
        return [EmbedResponse([float(ord(letter)) for letter in each.text[:4]], len(requests)) for each in requests]


app = Embedder.bind()

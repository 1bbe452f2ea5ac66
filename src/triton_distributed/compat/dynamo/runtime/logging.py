"""`configure_dynamo_logging` under Dynamo's module `runtime.logging`."""

from __future__ import annotations

import logging
import sys


def construct_formatter_prefix(service_name: str | None, worker_id: int | None) -> str:
    """The prefix of each line, `service:worker`; empty without both."""
    text = service_name or ""
    return text if worker_id is None else f"{text}:{worker_id}"


def configure_logger(service_name: str | None, worker_id: int | None, level: int = logging.INFO) -> None:
    """Add a handler to the root logger that writes to standard error."""
    prefix = construct_formatter_prefix(service_name, worker_id)
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)5s %(name)s: {f'[{prefix}] ' if prefix else ''}%(message)s")
    )
    root = logging.getLogger()
    root.setLevel(level)
    root.addHandler(handler)


def configure_dynamo_logging(service_name: str | None = None, worker_id: int | None = None) -> None:
    """Log INFO and above to standard error, in place of the root logger's present handlers.

    Args:
        service_name: begins each message, if given.
        worker_id: follows the name, if given.
    """
    root = logging.getLogger()
    for each in root.handlers[:]:
        root.removeHandler(each)
    configure_logger(service_name, worker_id)

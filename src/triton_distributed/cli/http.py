"""`trd http`: a front end over HTTP for models and for other endpoints."""

from __future__ import annotations

import argparse
import asyncio
import errno
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton_distributed.api.connection import Connection, connect
from triton_distributed.cli.arguments import at_least, seconds
from triton_distributed.cli.failure import USAGE, Failure
from triton_distributed.cli.policies import KNOWN, policy_of
from triton_distributed.cli.settings import worker_settings
from triton_distributed.config import Config
from triton_distributed.errors import InvalidName
from triton_distributed.system.event_loop import new_event_loop

LOAD_S = 10.0
"""Seconds that the models which are served already have to load, before requests are answered."""

_ORIGIN = re.compile(r"\*|https?://[^\s/?#]+")

NEEDED = ("starlette", "uvicorn", "httptools", "jinja2")

EPILOG = """\
The models that `trd model serve` serves are under /v1, as in the OpenAI API.
When requests are answered, one line is printed on standard output:
    ready: URL/v1

A route puts an endpoint on a path: JSON in; JSON out, or server-sent events if
the endpoint's contract is a stream or the caller accepts them:
    trd http --route POST /embed=ns.comp.ep
The method may be left out; it is then POST.

With keys, requests need the header Authorization: Bearer KEY. /health, /live,
/ping, /version, /metrics, /openapi.json and / are answered without one. FILE has
a key a line, or its hash as sha256:HEX. Other users of the machine can read the
command line, so a file is better than --api-key.

SIGTERM and SIGINT drain: requests are taken as long as they come, for at most
5 s, running ones finish within TRD_DRAIN_TIMEOUT_S, and the exit status is 0. A
second signal ends it at once.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    front_options(parser)


def front_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a front end, which `trd model run` has too."""
    parser.add_argument("--host", metavar="HOST", default="127.0.0.1", help="the address (default: 127.0.0.1)")
    parser.add_argument("--port", metavar="N", type=port_number, default=8000, help="the port; 0: any (default: 8000)")
    parser.add_argument("--namespace", metavar="NAME", help="the namespace of the models (default: models)")
    parser.add_argument(
        "--route",
        metavar="WORD",
        nargs="+",
        action="append",
        default=[],
        help="[METHOD] /PATH=NS.COMP.EP: answer a path with an endpoint; repeatable",
    )
    parser.add_argument(
        "--routing",
        metavar="POLICY",
        default="kv",
        help=f"what chooses the workers of models: {KNOWN} (default: kv)",
    )
    parser.add_argument(
        "--stall-timeout",
        metavar="S",
        type=seconds,
        default=30.0,
        help="seconds without a token after which an answer leaves its worker; four times as long before the first "
        "token. Also how long an answer whose worker was lost waits for another one (default: 30)",
    )
    parser.add_argument(
        "--api-key", metavar="KEY", action="append", default=[], help="a key that requests may have; repeatable"
    )
    parser.add_argument("--api-key-file", metavar="FILE", type=Path, help="a file of keys or their hashes")
    parser.add_argument(
        "--cors", metavar="ORIGIN", action="append", default=[], help="web pages that may call; repeatable, * for all"
    )
    parser.add_argument(
        "--max-body-mib", metavar="N", type=at_least(1), default=32, help="largest body, in MiB (default: 32)"
    )
    parser.add_argument(
        "--max-held-mib", metavar="N", type=at_least(1), default=512, help="memory of requests, in MiB (default: 512)"
    )
    parser.add_argument(
        "--max-requests", metavar="N", type=at_least(1), help="requests that may run at once (default: no limit)"
    )
    parser.add_argument("--no-access-log", action="store_true", help="no line in the log for each request")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal."""
    check_installed()
    config = worker_settings(handle_signals=False)
    options = options_of(arguments)
    with (
        listening_at(arguments.host, arguments.port) as listening,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        runner.run(_run(listening, config, options, models_options_of(arguments)))
    return 0


def check_installed() -> None:
    """Check that the packages of the front end are there.

    Raises:
        Failure: one is not.
    """
    absent = [each for each in NEEDED if importlib.util.find_spec(each) is None]
    if absent:
        raise Failure(f"{absent[0]} is not installed: pip install 'triton-distributed[llm]'")


def models_options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `Models`.

    Raises:
        Failure: there is no policy that `--routing` names.
    """
    namespace = {"namespace": arguments.namespace} if arguments.namespace else {}
    return {
        "routing": policy_of("--routing", arguments.routing),
        "stall_timeout_s": arguments.stall_timeout,
        **namespace,
    }


def listening_at(host: str, port: int) -> Any:
    """Open the socket of a front end.

    Raises:
        Failure: the address cannot be bound.
    """
    serving = importlib.import_module("triton_distributed.llm.http.serve")
    try:
        return serving.listen(host, port)
    except OSError as error:
        words = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            words += "; another program listens there: give another --port, or 0 for any"
        raise Failure(f"cannot listen on {host}:{port}: {words}") from error


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `front_end`, checked.

    Raises:
        Failure: a key or a route is invalid, or the file of keys cannot be read.
    """
    routes = importlib.import_module("triton_distributed.llm.http.routes")
    keys = importlib.import_module("triton_distributed.llm.http.keys")
    given = list(arguments.api_key)
    try:
        if arguments.api_key_file is not None:
            found = keys.keys_in(arguments.api_key_file.read_text())
            if not found:
                raise Failure(f"{arguments.api_key_file} has no key", USAGE)
            given += found
        keys.Keys(given)
        read = [routes.read_route(" ".join(each)) for each in arguments.route]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Failure(f"cannot read {arguments.api_key_file}: {reason}", USAGE) from error
    except InvalidName:
        raise
    except ValueError as error:
        raise Failure(str(error), USAGE) from error
    for each in arguments.cors:
        if not _ORIGIN.fullmatch(each):
            text = f"--cors {each!r} is not an origin: write https://chat.example.com, without a path, or * for all"
            raise Failure(text, USAGE)
    return {
        "routes": read,
        "keys": given,
        "origins": arguments.cors,
        "max_body_bytes": arguments.max_body_mib * 1024 * 1024,
        "max_held_bytes": arguments.max_held_mib * 1024 * 1024,
        "max_requests": arguments.max_requests,
        "access_log": not arguments.no_access_log,
    }


async def _run(listening: Any, config: Config, options: dict[str, Any], models_options: dict[str, Any]) -> None:
    models_of = importlib.import_module("triton_distributed.llm.models.models")
    async with connect(config) as here, models_of.Models(here, **models_options) as models:
        await serve_front(here, models, listening, options)


async def serve_front(
    here: Connection,
    models: Any,
    listening: Any,
    options: dict[str, Any],
    before_forced_exit: Callable[[], None] = lambda: None,
) -> None:
    """Serve a front end until a signal.

    Args:
        here: calls the workers.
        models: the models that are served, a `Models`.
        listening: the socket.
        options: those of `options_of`.
        before_forced_exit: called before a second signal ends the process.

    Raises:
        Failure: two routes have one path.
    """
    package = "triton_distributed.llm.http"
    front, app_of, serving = (importlib.import_module(f"{package}.{each}") for each in ("front", "app", "serve"))
    if options["access_log"]:
        logging.getLogger("triton_distributed.llm.http.access").setLevel(logging.INFO)
    held = options.pop("max_held_bytes")
    openai = app_of.openai_app(models, max_body_bytes=options["max_body_bytes"], max_held_bytes=held)
    try:
        app = await front.front_end(here, openai=openai, models=models, held=openai.held, **options)
    except ValueError as error:
        raise Failure(str(error), USAGE) from error
    await models.until_loaded(LOAD_S)
    timeout_s = here.runtime.config.drain_timeout_s
    await serving.serve(
        app, listening, drain_timeout_s=timeout_s, ready=_say_ready, before_forced_exit=before_forced_exit
    )


def _say_ready(url: str) -> None:
    print(f"ready: {url}/v1")
    sys.stdout.flush()


def port_number(text: str) -> int:
    """Parse a port."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a number from 0 to 65535")
    return int(text)

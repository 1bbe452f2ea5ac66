"""`trd route explain MODEL`: which worker a request would get, and why, as a front end's router sees it now."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import msgspec

from triton_distributed.cli.failure import USAGE, Failure, one_line
from triton_distributed.cli.rendering import json_option, table, write_json

EPILOG = """\
The front end's router is asked; no worker gets a request. The prompt is that of
/v1/completions, or with --chat the one message of a user. The line that begins
with * is the chosen worker. CACHED are the tokens of the prompt that it holds;
PROMISED counts also those that requests before this one will have computed there.
RANK is its data-parallel rank. MODE is how its cache is known. WAIT and PREFILL
are in seconds: what it has to do before, and the rest of this prompt. WAITING and
RUNNING are its requests without and with a first token. The policy chooses the
least COST, if it compares one; with kv it is below 0 where the cache saves much.
If the model has prefill workers, a second table has them; a * there computes the
prompt, and without one the chosen worker does.
"""

HEADER = ("", "INSTANCE", "RANK", "MODE", "CACHED", "PROMISED", "WAIT", "PREFILL", "WAITING", "RUNNING", "COST")

TIMEOUT_S = 30.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb with its arguments."""
    text = "show which worker a request would get now, and why"
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verb = verbs.add_parser("explain", help=text, description=text)
    verb.epilog = EPILOG
    verb.add_argument("model", metavar="MODEL", help="the model")
    prompt = verb.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--file", metavar="FILE", type=Path, help="a file with the prompt")
    verb.add_argument("--chat", action="store_true", help="the prompt is the message of a user")
    verb.add_argument("--session", metavar="NAME", default="", help="the request's session")
    verb.add_argument(
        "--url",
        metavar="URL",
        default="http://127.0.0.1:8000/v1",
        help="the API's base URL (default: http://127.0.0.1:8000/v1)",
    )
    verb.add_argument("--api-key", metavar="KEY", default="", help="the key, if the front end needs one")
    json_option(verb, "the decision; there is one line")


def run(arguments: argparse.Namespace) -> int:
    """Ask the front end, and print its decision."""
    arguments.command = f"route {arguments.verb}"
    if importlib.util.find_spec("httpx") is None:
        raise Failure("httpx is not installed: pip install 'triton-distributed[llm]'")
    if not arguments.url.startswith(("http://", "https://")):
        raise Failure(f"--url {arguments.url!r} does not begin with http:// or https://", USAGE)
    found = _asked(arguments, _prompt(arguments))
    if arguments.json:
        write_json({"model": arguments.model, **found})
    else:
        for line in shown(found):
            print(line)
    sys.stdout.flush()
    return 0


def shown(decision: dict[str, Any]) -> list[str]:
    """The lines of a decision."""
    lines = [f"policy {decision['policy']}, {decision['tokens']} tokens"]
    lines += _table(decision["candidates"], (decision["chosen"], decision["rank"]))
    if prefills := decision.get("prefill_candidates"):
        lines += ["", "prefill workers", *_table(prefills, (decision["prefill"], decision["prefill_rank"]))]
    return lines


def _table(candidates: list[dict[str, Any]], chosen: tuple[str | None, int]) -> list[str]:
    rows = [
        (
            "*" if (each["instance"], each["rank"]) == chosen else "",
            each["instance"],
            str(each["rank"]),
            each["mode"],
            str(each["cached_tokens"]),
            str(each["promised_tokens"]),
            f"{each['wait_s']:.3f}",
            f"{each['prefill_s']:.3f}",
            str(each["waiting"]),
            str(each["running"]),
            "-" if each["cost"] is None else f"{each['cost']:.3f}",
        )
        for each in candidates
    ]
    return table(HEADER, rows)


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.file is None:
        return str(arguments.prompt)
    try:
        return str(arguments.file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"cannot read {arguments.file}: {getattr(error, 'strerror', None) or error}", USAGE) from error


def _asked(arguments: argparse.Namespace, prompt: str) -> dict[str, Any]:
    httpx = importlib.import_module("httpx")
    headers = {"x-trd-explain": "only"}
    if arguments.api_key:
        headers["authorization"] = f"Bearer {arguments.api_key}"
    if arguments.session:
        headers["x-session-id"] = arguments.session
    body: dict[str, Any] = {"model": arguments.model, "prompt": prompt, "max_tokens": 1}
    path = "completions"
    if arguments.chat:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        path = "chat/completions"
    url = f"{arguments.url.rstrip('/')}/{path}"
    try:
        answer = httpx.post(url, json=body, headers=headers, timeout=TIMEOUT_S)
        found = msgspec.json.decode(answer.content)
    except httpx.HTTPError as error:
        raise Failure(
            f"{url}: {one_line(str(error) or type(error).__name__)}; `trd http` and `trd model run` answer there"
        ) from error
    except msgspec.DecodeError as error:
        hint = "" if arguments.url.rstrip("/").endswith("/v1") else "; the base URL of a front end ends with /v1"
        raise Failure(f"{url} answered with status {answer.status_code}, and not in JSON{hint}") from error
    if answer.status_code != 200:
        told = found.get("error") if isinstance(found, dict) else None
        said = told.get("message") if isinstance(told, dict) else None
        raise Failure(str(said or f"{url} answered with status {answer.status_code}"))
    if not isinstance(found, dict) or "candidates" not in found:
        raise Failure(f"{url} has answered the prompt: it is not a front end that explains")
    return found

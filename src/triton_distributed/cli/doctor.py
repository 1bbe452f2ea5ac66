"""`trd doctor`: check the settings, the machine and the services, and say what to do about each problem."""

from __future__ import annotations

import argparse
import asyncio
import difflib
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from triton_distributed.cli.checks import certificates, host, network, services, traces
from triton_distributed.cli.checks.finding import Finding, error, warning
from triton_distributed.cli.failure import one_line
from triton_distributed.cli.rendering import json_option, write_json
from triton_distributed.cli.settings import log_level_problem
from triton_distributed.config import Config, environment_reference, unknown_settings
from triton_distributed.errors import ConfigError
from triton_distributed.names import Instance

EPILOG = """\
The settings are those of the environment. An ok line says what works, a warning
what may fail or be slow, an error what cannot work; the line below each says
what to do. The exit status is 1 if there is an error.

Nothing is changed, except that the private folder is made if it is missing.
"""

MARKS = {"ok": "ok     ", "warning": "warning", "error": "error  "}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    json_option(parser, "one finding")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings."""
    logging.getLogger("triton_distributed").setLevel(logging.CRITICAL)  # The findings say it all.
    worst = 0
    for each in asyncio.run(diagnose()):
        if arguments.json:
            write_json(msgspec.to_builtins(each))
        else:
            print(f"{MARKS[each.level]}  {each.part}: {one_line(each.text)}")
            if each.advice:
                print(f"         → {each.advice}")
        sys.stdout.flush()
        worst = max(worst, each.level == "error")
    return worst


async def diagnose(environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Make all checks.

    Args:
        environ: the variables to check instead of those of the process.
    """
    found = [*host.versions(), *unknown(environ)]
    try:
        config = Config.from_env(environ)
    except ConfigError as failed:
        return [*found, error("settings", str(failed), "docs/settings.md describes the setting")]
    found += settings(config)
    found += host.limits(host.read_limits(), config)
    found += host.shared_memory(config)
    folder = host.folder(config)
    found += folder
    listed: list[Instance] = []
    discovery: list[Finding] = []
    if config.discovery != "file" or not any(each.level == "error" for each in folder):  # It would say the same again.
        discovery, listed = await services.discovery(config)
    found += await network.addresses(config, listed)
    found += await network.status_port(config)
    found += traces.traces(config, environ)
    found += certificates.sessions(config)
    found += certificates.servers(config)
    found += await services.clock(config)
    found += await services.nats(config)
    return found + discovery


def unknown(environ: Mapping[str, str] | None) -> Iterator[Finding]:
    """Check for variables that look like settings and are not."""
    known = [variable for variable, _, _ in environment_reference()]
    for name in unknown_settings(environ):
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {close[0]}?" if close else "docs/settings.md lists all settings"
        yield warning("settings", f"{name} is set, but there is no such setting", advice)


def settings(config: Config) -> Iterable[Finding]:
    """Check settings that contradict each other, or that commands refuse."""
    if (refused := log_level_problem(config)) is not None:
        yield error("settings", str(refused), "`trd` and `trd serve` refuse to start with it")
    if config.max_held_bytes < config.max_message_bytes:
        words = (
            f"TRD_MAX_HELD_BYTES is {config.max_held_bytes:,}, below TRD_MAX_MESSAGE_BYTES: a worker refuses requests "
            f"of more than {config.max_held_bytes:,} bytes"
        )
        yield warning("settings", words, f"TRD_MAX_HELD_BYTES={config.max_message_bytes} or more")
    if config.discovery == "memory":
        advice = "unset TRD_DISCOVERY: processes of one machine then find each other"
        yield warning("settings", "TRD_DISCOVERY=memory: other processes see no instance of this one", advice)
    if config.backend.fixed and not config.static:
        yield error("settings", "TRD_DISCOVERY=static lists no instance", "TRD_STATIC=ns.comp.ep=tcp://host:port[;…]")

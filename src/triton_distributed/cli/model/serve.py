"""`trd model serve NAME`: serve a model by an engine, until a signal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib

from triton_distributed.api.connection import connect
from triton_distributed.api.running import until_ended
from triton_distributed.cli.arguments import at_least, pair, pairs
from triton_distributed.cli.failure import USAGE, Failure
from triton_distributed.cli.model.engines import ENGINES, make_engine
from triton_distributed.cli.settings import worker_settings
from triton_distributed.config import Config
from triton_distributed.errors import RuntimeClosed, TritonError
from triton_distributed.llm.contract.errors import InvalidParameter, ModelConflict
from triton_distributed.llm.contract.model import ROLES
from triton_distributed.llm.contract.records import NAMESPACE
from triton_distributed.llm.worker.serve import serve_model
from triton_distributed.supervisor import replica
from triton_distributed.supervisor.replicas import Replicas
from triton_distributed.supervisor.supervisor import StartFailed, supervise
from triton_distributed.system.event_loop import new_event_loop

EPILOG = f"""\
MODEL is a name or the path of a file, as the engine takes it. The class of the
engine gets it as its argument path, model or name, whichever it has first, and
each --option as a further one. A wrong option shows those that the engine has.
Engines: {", ".join(ENGINES)};
or module:Class, for a class of your own.

When the model can be called, one line is printed on standard output:
    ready: serving the model NAME as instance ID at ADDRESS

Workers that serve the same model share its requests. Another card under the same
name is refused: give it another --name, or a higher --generation, which then gets
all new requests.

SIGTERM and SIGINT drain: no new request begins, running ones finish within
TRD_DRAIN_TIMEOUT_S, and the exit status is 0. A second signal ends it at once.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = EPILOG
    model_options(parser)
    parser.add_argument("--namespace", default=NAMESPACE, help=f"of the endpoints (default: {NAMESPACE})")
    parser.add_argument(
        "--role",
        choices=ROLES,
        default="",
        help="prefill computes prompts for workers with the role decode (default: the engine's, which is both)",
    )
    parser.add_argument(
        "--replicas", metavar="N", type=at_least(1), help="processes that serve; one that ends is started again"
    )


def model_options(parser: argparse.ArgumentParser) -> None:
    """Add the model and its options, which `trd model run` has too."""
    parser.add_argument("model", metavar="MODEL", help="the model: a name or a path, as the engine takes it")
    parser.add_argument("--engine", metavar="ENGINE", default="llamacpp", help="what computes it (default: llamacpp)")
    parser.add_argument(
        "--option", metavar="KEY=VALUE", type=pair, action="append", help="an option of the engine; repeatable"
    )
    parser.add_argument("--name", default="", help="the name that callers use (default: the engine's)")
    parser.add_argument("--alias", metavar="NAME", action="append", default=[], help="a further name; repeatable")
    parser.add_argument(
        "--generation", metavar="N", type=at_least(0), help="the version of this name (default: 0); the highest is used"
    )
    parser.add_argument(
        "--queue",
        metavar="N",
        type=at_least(0),
        help="requests that may wait for the engine (default: 4 for each slot)",
    )
    parser.add_argument(
        "--env",
        metavar="NAME=VALUE",
        type=pair,
        action="append",
        help="set this in each process; {replica} in VALUE is its number, e.g. CUDA_VISIBLE_DEVICES={replica}",
    )


def as_given(arguments: argparse.Namespace) -> list[str]:
    """Return the model and its options as words of a command line."""
    words = [f"--engine={arguments.engine}", f"--name={arguments.name}"]
    words += [f"--option={key}={value}" for key, value in arguments.option or ()]
    words += [f"--env={name}={value}" for name, value in arguments.env or ()]
    words += [f"--alias={each}" for each in arguments.alias]
    optional = {"generation": arguments.generation, "queue": arguments.queue}
    words += [f"--{name}={value}" for name, value in optional.items() if value is not None]
    return [*words, "--", arguments.model]


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal."""
    config = worker_settings(handle_signals=True)
    role = pairs(arguments.option).get("role", arguments.role)
    if arguments.role not in ("", role):
        raise Failure(f"--role {arguments.role} contradicts --option role={role}", USAGE)
    if (arguments.replicas or arguments.env) and not replica.is_replica():
        try:
            return supervise(Replicas(arguments.replicas or 1, env=pairs(arguments.env)), config)
        except StartFailed as error:
            raise Failure(str(error), error.status) from error
        except ValueError as error:
            raise Failure(str(error), USAGE) from error
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(arguments, config))
    return 0


async def _serve(arguments: argparse.Namespace, config: Config) -> None:
    processes = arguments.replicas or 1
    options = pairs(arguments.option) | ({"role": arguments.role} if arguments.role else {})
    engine, named = make_engine(arguments.engine, arguments.model, options, processes)
    async with connect(config) as here:
        here.runtime.worker.replica = replica.number()
        try:
            serving = await serve_model(
                here,
                engine,
                name=arguments.name or ("" if named else arguments.model),
                aliases=tuple(arguments.alias),
                generation=arguments.generation,
                namespace=arguments.namespace,
                max_queue=arguments.queue,
            )
        except RuntimeClosed:
            if not here.runtime.worker.draining:
                raise
            return
        except ModelConflict as error:
            raise Failure(str(error), lines=True) from error
        except InvalidParameter as error:
            option = "--option " if error.param in options else ""
            raise Failure(f"the engine {arguments.engine} cannot serve {arguments.model!r}: {option}{error}") from error
        except TritonError:
            raise
        except (ValueError, OSError, ImportError) as error:
            raise Failure(
                f"the engine {arguments.engine} cannot serve {arguments.model!r}: {error}", lines=True
            ) from error
        instance = serving.instance
        with contextlib.suppress(OSError):  # The reader of the output may be gone.
            place = f"as instance {instance.id} at {','.join(instance.addresses)}"
            print(f"ready: serving the model {serving.card.name} {place}", flush=True)
        if url := here.runtime.status_port.url:
            replica.report(replica.STATUS + url)
        replica.report(replica.READY)
        await until_ended(here, [asyncio.ensure_future(serving.until_drained())])

"""Hello world over etcd and NATS: the same programs with two settings.

    make demo-cluster                            (or: python examples/hello_world/demo_cluster.py)

This program starts a real etcd and a real NATS server on free ports, two unchanged servers and a client, and ends all of
them. It is a client itself, and shows which instance answered which request. At the end an event goes from one runtime
to another through NATS.
"""

import asyncio
import os
import sys
import tempfile
from asyncio.subprocess import PIPE
from pathlib import Path

from demo import PATIENCE_S, Server, ask_all, environment, known, server

from triton_distributed.config import Config
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing import EtcdServer, NatsServer, ServerMissing

CLIENT = Path(__file__).with_name("client.py")
CALLS = 10


async def run_client(settings: dict[str, str]) -> bool:
    """Run client.py, and summarise its output."""
    command = (sys.executable, CLIENT, str(CALLS))
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, env=environment(settings))
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    characters = output.decode().split("\n")[:-1]
    print(f"client.py: {CALLS} calls, {len(characters)} characters, exit status {process.returncode}")
    return characters == list("hello world") * CALLS and process.returncode == 0


async def send_event(config: Config) -> bool:
    """Publish one event in one runtime, and receive it in another."""
    async with DistributedRuntime(config=config) as here, DistributedRuntime(config=config) as there:
        events = await there.namespace("triton-init").component("backend").subscribe("greetings")
        await here.namespace("triton-init").component("backend").publish("greetings", {"hello": "cluster"})
        event = await anext(aiter(events))
        print(f"event {event.name}: {event.data} went from runtime {event.publisher} to {there.instance_id}\n")
        return event.publisher == here.instance_id


async def demo(folder: str, etcd: EtcdServer, nats: NatsServer) -> bool:
    async with asyncio.timeout(PATIENCE_S), etcd, nats:
        print(f"etcd at {etcd.url}, NATS at {nats.url}")
        settings = {"ETCD_ENDPOINTS": etcd.url, "NATS_SERVER": nats.url, "TRD_DIR": folder}
        async with server("server 1", settings) as one, server("server 2", settings) as two:
            return await show(settings, one, two)


async def show(settings: dict[str, str], one: Server, two: Server) -> bool:
    config = Config.from_env(settings)
    async with DistributedRuntime(config=config) as runtime:
        client = await runtime.endpoint("triton-init.backend.generate").client()
        await known(client, 2)
        done = [await run_client(settings)]
        await ask_all(client, one, two)
    done.append(await send_event(config))
    return all([*done, await one.stop(), await two.stop()])


if __name__ == "__main__":
    try:
        servers = EtcdServer(environ=os.environ), NatsServer(environ=os.environ)
    except ServerMissing as error:
        sys.exit(f"{error}\n`make demo-cluster` brings it into .venv where this machine can have it")
    with tempfile.TemporaryDirectory(prefix="trd-demo-") as folder:
        sys.exit(0 if asyncio.run(demo(folder, *servers)) else 1)

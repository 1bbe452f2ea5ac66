"""Programs as they were written for the original: its names, its ways, nothing of ours."""

SERVER = """
import asyncio
import uvloop
from triton_distributed.runtime import DistributedRuntime, triton_worker

class RequestHandler:
    async def generate(self, request):
        print(f"Received request: {request}", flush=True)
        for char in request:
            yield char

@triton_worker()
async def worker(runtime: DistributedRuntime):
    await init(runtime, "triton-init")

async def init(runtime: DistributedRuntime, ns: str):
    component = runtime.namespace(ns).component("backend")
    await component.create_service()
    endpoint = component.endpoint("generate")
    print("Started server instance", endpoint.lease_id(), flush=True)
    await endpoint.serve_endpoint(RequestHandler().generate)

if __name__ == "__main__":
    uvloop.install()
    asyncio.run(worker())
"""

CLIENT = """
import asyncio
import uvloop
from triton_distributed.runtime import DistributedRuntime, triton_worker

@triton_worker()
async def worker(runtime: DistributedRuntime):
    await init(runtime, "triton-init")

async def init(runtime: DistributedRuntime, ns: str):
    endpoint = runtime.namespace(ns).component("backend").endpoint("generate")
    client = await endpoint.client()
    await client.wait_for_endpoints()
    print("endpoints", len(client.endpoint_ids()))

    stream = await client.generate("hello world")
    async for char in stream:
        print(char.data(), end="")
    print()
    for id in client.endpoint_ids():
        tokens = []
        async for char in await client.direct("hi", int(str(id))):
            tokens.append(char.get("data"))
        print("direct", "".join(tokens))
    for method in (client.round_robin, client.random):
        print("".join([each.data() async for each in await method("abc")]))

if __name__ == "__main__":
    uvloop.install()
    asyncio.run(worker())
"""

ERRORS = """
import asyncio
import uvloop
from triton_distributed.runtime import DistributedRuntime, triton_worker

class RequestHandler:
    async def generate(self, request):
        for char in request:
            if char == "w":
                raise ValueError("w is not allowed")
            yield char

@triton_worker()
async def worker(runtime: DistributedRuntime, role: str, *, words: str = "hello world"):
    component = runtime.namespace("triton-init").component("backend")
    endpoint = component.endpoint("generate")
    if role == "server":
        await component.create_service()
        await endpoint.serve_endpoint(RequestHandler().generate)
        return "served"
    client = await endpoint.client()
    await client.wait_for_endpoints()
    stream = await client.generate(words)
    try:
        async for char in stream:
            print(char)
    except ValueError as error:
        print("caught", error)
    else:
        print("no error")
    return "called"

if __name__ == "__main__":
    import sys
    uvloop.install()
    print(asyncio.run(worker(sys.argv[1], words="hello world")))
"""

TYPED = """
import asyncio
import sys
import uvloop
from pydantic import BaseModel
from triton_distributed.runtime import DistributedRuntime, triton_endpoint, triton_worker

class Request(BaseModel):
    data: str

class RequestHandler:
    @triton_endpoint(Request, str)
    async def generate(self, request):
        for char in request.data:
            yield char

@triton_worker()
async def worker(runtime: DistributedRuntime):
    component = runtime.namespace("triton-init").component("backend")
    await component.create_service()
    endpoint = component.endpoint("generate")
    if sys.argv[1] == "server":
        await endpoint.serve_endpoint(RequestHandler().generate)
        return
    client = await endpoint.client()
    await client.wait_for_endpoints()
    async for char in await client.generate(Request(data="typed").model_dump_json()):
        print(char.data(), end="")
    print()
    try:
        async for char in await client.generate('{"wrong": 1}'):
            print(char)
    except ValueError as error:
        print("Invalid request" in str(error), "data" in str(error))

if __name__ == "__main__":
    uvloop.install()
    asyncio.run(worker())
"""

PIPELINE = """
import asyncio
import sys
import uvloop
from triton_distributed.runtime import DistributedRuntime, triton_worker

STAGES = {"frontend": "middle", "middle": "backend", "backend": None}

class Stage:
    def __init__(self, name, next):
        self.name, self.next = name, next

    async def generate(self, request):
        request = f"{request}|{self.name}"
        if self.next is None:
            for word in request.split("|"):
                yield word
        else:
            async for output in await self.next.round_robin(request):
                yield output.get("data")

@triton_worker()
async def worker(runtime: DistributedRuntime, name: str):
    namespace = runtime.namespace("examples/pipeline")
    if name == "client":
        client = await namespace.component("frontend").endpoint("generate").client()
        await client.wait_for_endpoints()
        async for word in await client.generate("hello from"):
            print(word.data())
        return
    next = None
    if STAGES[name]:
        next = await namespace.component(STAGES[name]).endpoint("generate").client()
        await next.wait_for_endpoints()
    component = namespace.component(name)
    await component.create_service()
    await component.endpoint("generate").serve_endpoint(Stage(name, next).generate)

if __name__ == "__main__":
    uvloop.install()
    asyncio.run(worker(sys.argv[1]))
"""

BLS = """
import asyncio
import sys
import uvloop
from triton_distributed.runtime import DistributedRuntime, triton_worker

BACKENDS = ("color", "animal", "city")

class Backend:
    def __init__(self, name):
        self.name = name

    async def generate(self, request):
        for n in range(request["count"]):
            yield {"backend": self.name, "n": n, "ids": [n] * 3}

class Frontend:
    def __init__(self, clients):
        self.clients = clients

    async def generate(self, request):
        streams = await asyncio.gather(
            *[client.generate({"count": request["count"]}, annotated=False) for client in self.clients.values()]
        )
        answers = {}
        for name, stream in zip(self.clients, streams):
            answers[name] = [item["n"] async for item in stream]
            yield {"done": name}
        yield answers

@triton_worker()
async def worker(runtime: DistributedRuntime, name: str):
    namespace = runtime.namespace("bls")
    component = namespace.component(name)
    if name == "client":
        client = await namespace.component("frontend").endpoint("chat/completions").client()
        await client.wait_for_endpoints()
        async for item in await client.generate({"count": 3}, annotated=None):
            print(item)
        return
    await component.create_service()
    if name == "frontend":
        clients = {}
        for each in BACKENDS:
            clients[each] = await namespace.component(each).endpoint("generate").client()
            await clients[each].wait_for_endpoints()
        await component.endpoint("chat/completions").serve_endpoint(Frontend(clients).generate)
    else:
        await component.endpoint("generate").serve_endpoint(Backend(name).generate)

if __name__ == "__main__":
    uvloop.install()
    asyncio.run(worker(sys.argv[1]))
"""

SOAK = """
import asyncio
import uvloop
from triton_distributed.runtime import DistributedRuntime, triton_worker

class RequestHandler:
    async def generate(self, request):
        for char in request:
            await asyncio.sleep(0.01)
            yield char

@triton_worker()
async def worker(runtime: DistributedRuntime):
    ns = "soak"
    task = asyncio.create_task(server_init(runtime, ns))
    await client_init(runtime, ns)
    runtime.shutdown()
    await task

async def client_init(runtime, ns):
    client = await runtime.namespace(ns).component("backend").endpoint("generate").client()
    await client.wait_for_endpoints()
    tasks = [asyncio.create_task(do_one(client)) for _ in range(200)]
    await asyncio.gather(*tasks)
    errors = sum(1 for task in tasks if task.result() != "hello world")
    print("errors", errors, "of", len(tasks))

async def do_one(client):
    stream = await client.generate("hello world")
    text = ""
    async for char in stream:
        text += char.data()
    return text

async def server_init(runtime, ns):
    component = runtime.namespace(ns).component("backend")
    await component.create_service()
    await component.endpoint("generate").serve_endpoint(RequestHandler().generate)
    print("served")

if __name__ == "__main__":
    uvloop.install()
    asyncio.run(worker())
"""

KV_WORKER = """
import asyncio
import ctypes
import multiprocessing
import os
import sys
import uvloop
from triton_distributed.llm import KvMetricsPublisher
from triton_distributed.runtime import DistributedRuntime, triton_worker

class EventManager:
    def __init__(self):
        self.lib = ctypes.CDLL(os.environ["VLLM_KV_CAPI_PATH"])
        self.lib.triton_llm_init.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64]
        self.lib.triton_llm_init.restype = ctypes.c_uint32
        u32s, sizes, u64s = map(ctypes.POINTER, (ctypes.c_uint32, ctypes.c_size_t, ctypes.c_uint64))
        self.lib.triton_kv_event_publish_stored.argtypes = [
            ctypes.c_uint64, u32s, sizes, u64s, ctypes.c_size_t, u64s, ctypes.c_uint64,
        ]
        self.lib.triton_kv_event_publish_stored.restype = ctypes.c_uint32
        namespace, component = os.environ["VLLM_KV_NAMESPACE"], os.environ["VLLM_KV_COMPONENT"]
        assert self.lib.triton_llm_init(namespace.encode(), component.encode(), int(os.environ["VLLM_WORKER_ID"])) == 0

    def stored(self, event_id, parent, tokens):
        result = self.lib.triton_kv_event_publish_stored(
            event_id,
            (ctypes.c_uint32 * len(tokens))(*tokens),
            (ctypes.c_size_t * 1)(len(tokens)),
            (ctypes.c_uint64 * 1)(event_id),
            1,
            (ctypes.c_uint64 * 1)(parent) if parent is not None else None,
            0,
        )
        assert result == 0

def engine():
    manager = EventManager()
    manager.stored(1, None, [3] * 64)
    manager.stored(2, 1, [3] * 64)
    manager.stored(3, 99, [3] * 64)
    manager.lib.triton_llm_shutdown()

class Handler:
    def __init__(self, publisher):
        self.publisher, self.active = publisher, 0

    async def generate(self, request):
        self.active += 1
        self.publisher.publish(self.active, 4, self.active, 4)
        if request == "load":
            process = multiprocessing.get_context("fork").Process(target=engine)
            process.start()
            await asyncio.to_thread(process.join)
            assert process.exitcode == 0
        yield sys.argv[1]

    async def cooldown(self):
        while True:
            await asyncio.sleep(0.05)
            self.active = max(0, self.active - 1)
            self.publisher.publish(self.active, 4, self.active, 4)

@triton_worker()
async def worker(runtime: DistributedRuntime):
    component = runtime.namespace("triton-init").component("vllm")
    await component.create_service()
    endpoint = component.endpoint("generate")
    os.environ["VLLM_WORKER_ID"] = str(endpoint.lease_id())
    publisher = KvMetricsPublisher()
    publisher.publish(0, 4, 0, 4)
    handler = Handler(publisher)
    await asyncio.gather(
        endpoint.serve_endpoint(handler.generate),
        publisher.create_endpoint(component),
        handler.cooldown(),
    )

if __name__ == "__main__":
    uvloop.install()
    asyncio.run(worker())
"""

KV_ROUTER = """
import asyncio
import uvloop
from triton_distributed.llm import KvRouter
from triton_distributed.runtime import DistributedRuntime, triton_worker

class Router:
    def __init__(self, router):
        self.router = router

    async def generate(self, request):
        try:
            worker_id = await self.router.schedule(request["tokens"], 0)
        except Exception as e:
            print("error", e, flush=True)
            worker_id = ""
        yield str(worker_id)

@triton_worker()
async def worker(runtime: DistributedRuntime):
    workers = await runtime.namespace("triton-init").component("vllm").endpoint("generate").client()
    waiting = workers.wait_for_endpoints()
    listener = runtime.namespace("triton-init").component("vllm")
    await listener.create_service()
    component = runtime.namespace("triton-init").component("router")
    await component.create_service()
    router = KvRouter(runtime, listener)
    await waiting
    await component.endpoint("generate").serve_endpoint(Router(router).generate)

if __name__ == "__main__":
    uvloop.install()
    asyncio.run(worker())
"""

"""What a worker says that is not what it should be: the caller gets an error of ours, and nobody else notices."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runtime.cluster import drained, patiently
from tests.transport.sessions import HELLO, answering
from triton_distributed.config import Config
from triton_distributed.errors import DecodeError, RemoteError, StreamIncomplete
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.wire import frames as f

LIES = [
    pytest.param(f.BATCH, b"\x05", f.END, DecodeError, id="a batch that is a number"),
    pytest.param(f.BATCH, b"\x81\x01\x02", f.END, DecodeError, id="a batch that is a map"),
    pytest.param(f.BATCH, b"\xdd\xff\xff\xff\xff", f.END, DecodeError, id="a batch of 4 G items"),
    pytest.param(f.DATA, b"\xdf\xff\xff\xff\xff", f.END, DecodeError, id="a map of 4 G items"),
    pytest.param(f.DATA, b"\x91" * 200_000, f.END, DecodeError, id="deep nesting"),
    pytest.param(f.DATA, b"\x05", f.END | f.ANNOTATED, DecodeError, id="an annotated number"),
    pytest.param(f.DATA, b"\x05", f.END | f.CHECKPOINT, DecodeError, id="a pair that is a number"),
    pytest.param(f.ERROR, b"\0\xdf\xff\xff\xff\xff", 0, RemoteError, id="an error of 4 G fields"),
    pytest.param(f.DATA, f.UINT64.pack(2**63), f.MORE, StreamIncomplete, id="a message of 8 EiB"),
    pytest.param(f.DATA, b"", f.END | f.BUFFERS, StreamIncomplete, id="a last message without its head"),
]


@pytest.mark.any_loop
@pytest.mark.parametrize("annotated", [True, False])
@pytest.mark.parametrize(("kind", "payload", "flags", "error"), LIES)
async def test_a_lie_is_an_error_of_ours(kind, payload, flags, error, annotated):
    async def lies(worker: Any) -> None:
        await worker.say(HELLO)
        while (frame := await worker.frame())[0] != f.REQUEST:
            pass
        await worker.say(f.frame(kind, frame[2], payload, flags), f.frame(99, 0) if error is StreamIncomplete else b"")
        await worker.hear()

    async with answering(lies) as address:
        config = Config(discovery="static", static=f"t.c.e={address}", handle_signals=False, retries=0)
        async with DistributedRuntime(config=config) as runtime:
            client = await runtime.endpoint("t.c.e").client()
            with pytest.raises(error):
                await patiently(drained(await client.generate(1, annotated=annotated)))

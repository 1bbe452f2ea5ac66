"""Two connections joined in memory, driven at random: whatever is done in whatever order and cut into whatever pieces,

- an item arrives once, in order, as it was sent, unless its stream was aborted; then what arrived is a beginning;
- no end has more unread than its window and the slack;
- what is given back of the credit is what was charged;
- when all is over both ends have forgotten every stream, and their budgets are whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from tests.wire.joined import FOREVER, End, Noted
from triton_distributed.wire import frames as f
from triton_distributed.wire.assembly import fragments
from triton_distributed.wire.authentication import Authentication
from triton_distributed.wire.hello import Hello
from triton_distributed.wire.states import State
from triton_distributed.wire.window import FRAME_COST, SLACK

WINDOW = 8192
BUDGET = 1 << 20
LARGE = [f.SMALL + 1, 70_000, 200_000, f.MAX_FRAME, 600_000, 3 * f.LARGE_FRAME]


@dataclass
class Side:
    """One end of a stream, as its program sees it."""

    core: Noted
    granted: int
    sent: list[bytes] = field(default_factory=list)
    got: list[bytes] = field(default_factory=list)
    cut: Iterator[tuple[int, bytes, memoryview]] | None = None  # the message that is being sent
    kind: int = f.DATA  # of its next frame
    ended: bool = False

    @property
    def may_send(self) -> bool:
        return not self.ended and self.cut is None and self.core.state in (State.OPEN, State.RECEIVED)


@dataclass
class Pair:
    """A stream: the client's side, and the server's once the request is there."""

    client: Side
    server: Side | None = None
    aborted: bool = False

    def sides(self) -> list[Side]:
        return [self.client] if self.server is None else [self.client, self.server]


class TwoConnections(RuleBasedStateMachine):
    streams = Bundle("streams")

    @initialize(small=st.booleans(), token=st.booleans(), max_frame=st.sampled_from([f.MAX_FRAME, f.LARGE_FRAME]))
    def greet(self, small: bool, token: bool, max_frame: int) -> None:
        budget = 4096 * 20 if small else BUDGET
        self.client, self.server = (
            End(
                Hello(window=WINDOW, max_frame=max_frame),
                window=WINDOW,
                session_window=budget,
                authentication=Authentication(b"a token", challenge * 32, dialer) if token else None,
            )
            for challenge, dialer in ((b"c", True), (b"s", False))
        )
        self.up, self.down = bytearray(), bytearray()
        self.pairs: list[Pair] = []
        self.numbers = 0
        for end in (self.client, self.server):
            end.greet()
        for _ in range(3 if token else 1):  # hellos, the client's proof, the server's
            self.flush(True)
            self.flush(False)
            self.deliver(True, 10_000)
            self.deliver(False, 10_000)
        assert [len(each.hellos) for each in (self.client, self.server)] == [1, 1]

    def item(self, size: int) -> bytes:
        self.numbers += 1
        return msgspec.msgpack.encode((self.numbers, bytes(size)))

    def pipe(self, end: End) -> bytearray:
        return self.up if end is self.client else self.down

    # what programs do

    @rule(target=streams, two_way=st.booleans(), size=st.sampled_from([0, 100, 5000, *LARGE]), metadata=st.booleans())
    @precondition(lambda self: len(self.pairs) < 6)
    def open(self, two_way: bool, size: int, metadata: bool) -> Pair:
        core = self.client.open_stream(not two_way)
        side = Side(core, core.credit, ended=not two_way)
        extra = bytes(3000) if metadata else b""
        prefix = f.REQUEST_PREFIX.pack(1, 2, FOREVER, core.window, len(extra)) + extra
        body = self.item(size)
        core.state = State.OPEN  # as the shell's `send` has it until the last fragment is written
        side.sent.append(body)
        side.cut = self.fragments(core, prefix + body, [], 0 if two_way else f.END)
        side.kind = f.REQUEST
        pair = Pair(side)
        self.pairs.append(pair)
        self.step(pair.client)  # a request's first frame leaves when its id is taken
        return pair

    @rule(pair=streams, from_client=st.booleans(), size=st.one_of(st.integers(0, 300), st.sampled_from([5000, 60_000])))
    def push(self, pair: Pair, from_client: bool, size: int) -> None:
        side = pair.client if from_client else pair.server
        if side is not None and side.may_send and side.core.may_push:
            side.sent.append(self.item(size))
            side.core.push(side.sent[-1])

    @rule(pair=streams, from_client=st.booleans(), size=st.sampled_from(LARGE), buffers=st.integers(0, 3))
    def send_large(self, pair: Pair, from_client: bool, size: int, buffers: int) -> None:
        side = pair.client if from_client else pair.server
        if side is not None and side.may_send:
            item = self.item(size)
            side.sent.append(item)
            step = len(item) // (buffers + 1)
            parts = [item[at * step : (at + 1) * step] for at in range(buffers)] + [item[buffers * step :]]
            side.cut = self.fragments(side.core, parts[0], parts[1:], 0)
            self.step(side)

    @rule(pair=streams, from_client=st.booleans())
    def send_fragment(self, pair: Pair, from_client: bool) -> None:
        side = pair.client if from_client else pair.server
        if side is not None:
            self.step(side)

    def step(self, side: Side) -> None:
        """As `Stream.send`: a fragment when there is credit, behind everything that waits."""
        core = side.core
        if core.state == State.CLOSED:
            side.cut = None
        if side.cut is None or core.credit <= 0:
            return
        flags, start, rest = next(side.cut)
        end = core.connection
        assert isinstance(end, End)
        pipe = self.pipe(end)
        pipe += end.take_output()
        pipe += f.frame(side.kind, core.id, start + rest, flags)
        core.charge(len(start) + rest.nbytes, flags)
        side.kind = f.DATA
        if not flags & f.MORE:
            side.cut = None

    @staticmethod
    def fragments(
        core: Noted, body: bytes, buffers: list[bytes], flags: int
    ) -> Iterator[tuple[int, bytes, memoryview]]:
        end = core.connection
        assert isinstance(end, End)
        views = [memoryview(each) for each in buffers]
        return fragments(body, views, flags, lambda: end.fragment_bytes(core.credit))

    @rule(pair=streams, from_client=st.booleans())
    def end(self, pair: Pair, from_client: bool) -> None:
        side = pair.client if from_client else pair.server
        if side is not None and side.may_send:
            side.ended = True
            side.core.end()

    @rule(pair=streams, from_client=st.booleans(), most=st.integers(1, 20))
    def read(self, pair: Pair, from_client: bool, most: int) -> None:
        side = pair.client if from_client else pair.server
        if side is None:
            return
        while side.core.inbox and most:
            most -= 1
            cost, kind, _, body, buffers = side.core.inbox.popleft()
            side.core.read(cost)
            if kind == f.BATCH:
                side.got += map(bytes, msgspec.msgpack.decode(body, type=list[msgspec.Raw]))
            else:
                side.got.append(b"".join([bytes(body), *map(bytes, buffers or ())]))

    @rule(pair=consumes(streams), by_client=st.booleans(), kind=st.sampled_from([f.CANCEL, f.ERROR, f.REJECT]))
    def abort(self, pair: Pair, by_client: bool, kind: int) -> None:
        side = pair.client if by_client else pair.server
        if side is not None:
            pair.aborted = True
            side.core.abort(f.CANCEL if by_client else kind, 1, b"why")
            side.cut = None

    # what the network does

    @rule(up=st.booleans())
    def flush(self, up: bool) -> None:
        end = self.client if up else self.server
        self.pipe(end).extend(end.take_output())

    @rule(up=st.booleans(), most=st.one_of(st.integers(1, 40), st.integers(1, 2_000_000)), in_place=st.booleans())
    def deliver(self, up: bool, most: int, in_place: bool = False) -> None:
        pipe, end = (self.up, self.server) if up else (self.down, self.client)
        data = bytes(pipe[:most])
        del pipe[:most]
        end.take(data, in_place)
        while end.requests:
            self.serve(*end.requests.pop(0))

    def serve(self, core: Any, instance: int, key: int, timeout: float, metadata: Any, body: Any, buffers: Any) -> None:
        assert (instance, key, timeout, buffers or None) == (1, 2, FOREVER, None)
        assert len(metadata) in (0, 3000)
        (pair,) = [each for each in self.pairs if each.client.core.id == core.id]
        pair.server = Side(core, core.credit, got=[bytes(body)])

    # what must hold

    @invariant()
    def nobody_has_more_unread_than_the_window_allows(self) -> None:
        for pair in getattr(self, "pairs", ()):
            for side in pair.sides():
                frames = sum(each[0] for each in side.core.inbox)
                assert frames <= max(WINDOW, side.core.window) + SLACK

    @invariant()
    def what_arrived_is_a_beginning_of_what_was_sent(self) -> None:
        for pair in getattr(self, "pairs", ()):
            if pair.server is not None:
                assert pair.server.got == pair.client.sent[: len(pair.server.got)]
                assert pair.client.got == pair.server.sent[: len(pair.client.got)]

    def teardown(self) -> None:
        if not hasattr(self, "pairs"):
            return
        self.settle()
        for pair in self.pairs:
            if pair.aborted or pair.server is None:
                continue
            for sender, receiver in ((pair.client, pair.server), (pair.server, pair.client)):
                if sender.core.state in (State.OPEN, State.RECEIVED):
                    assert sender.core.may_push, "the stream stands still though everything was read"
                    assert sender.core.credit + receiver.core._credit_due == sender.granted
                    assert sender.core.credit > sender.granted // 2 - FRAME_COST
        for pair in self.pairs:
            for side in pair.sides():
                if side.may_send:
                    side.ended = True
                    side.core.end()
        self.settle()
        for pair in self.pairs:
            if not pair.aborted:
                assert pair.server is not None
                assert pair.server.got == pair.client.sent
                assert pair.client.got == pair.server.sent
        for end in (self.client, self.server):
            assert end.streams == {}
            assert end._budget._left == end.session_window
            assert not end.direct

    def settle(self) -> None:
        """Until nothing moves any more: everything is written, carried and read."""
        for _ in range(10_000):
            for pair in self.pairs:
                for side in pair.sides():
                    self.step(side)
                self.read(pair, True, 1000)
                self.read(pair, False, 1000)
            self.flush(True)
            self.flush(False)
            if not self.up and not self.down:
                return
            self.deliver(True, 1 << 20)
            self.deliver(False, 1 << 20)
        raise AssertionError("the two ends never come to rest")


TwoConnections.TestCase.settings = settings(stateful_step_count=40)
TestTwoConnections = TwoConnections.TestCase

"""The payload codec: what goes in comes out, and what cannot travel says where it is."""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import datetime
import decimal
import enum
import math
import mmap
import threading
import uuid
from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.errors import DecodeError
from triton_distributed.payload import codec
from triton_distributed.payload.codec import Message, decode, encode
from triton_distributed.payload.outofband import BYTEARRAY, BYTES, OUT_OF_BAND, encode_header

BIG = OUT_OF_BAND + 5


def received(message: bytes | Message) -> tuple[bytes, list[bytearray]]:
    if isinstance(message, Message):
        for each in message.buffers:
            assert each.c_contiguous
            assert (each.format, each.ndim) == ("B", 1)
        return message.body, [bytearray(each) for each in message.buffers]
    return message, []


def travel(value: Any) -> Any:
    return decode(*received(encode(value)))


@pytest.fixture(autouse=True, params=[0, 16], ids=["plain", "memory expected"])
def both_ways_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_expected", request.param)


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Any
    y: Any = 0


class Record(msgspec.Struct, frozen=True, rename="camel", tag=True):
    my_data: Any
    my_name: str = "n"


class Positional(msgspec.Struct, array_like=True):
    a: Any
    b: Any


Two = collections.namedtuple("Two", "a b")


class Colour(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    __slots__ = ()


class Whole(int):
    pass


class Real(float):
    pass


class Octets(bytes):
    pass


class Buffered(bytearray):
    pass


UTC = datetime.UTC


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -1,
        2**64 - 1,
        -(2**63),
        1.5,
        math.inf,
        "",
        "tok",
        "čeština Ā 漢字 🙂",
        b"",
        b"\xc4\xc5\xc6",
        [],
        [1, [2, [3]]],
        {},
        {"i": 1, "t": "tok"},
        {1: "int", b"b": "bytes", None: "none", 1.5: "float", (1, (2,)): "tuple"},
        datetime.datetime(2025, 3, 1, 12, tzinfo=UTC),
        {"nested": [{"deep": [b"x" * 100]}]},
    ],
    ids=repr,
)
def test_plain_values_arrive_equal(value: Any) -> None:
    message = encode(value)
    assert type(message) is bytes
    again = travel(value)
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        ((1, 2), [1, 2]),
        ({3}, [3]),
        (frozenset({3}), [3]),
        (Point(1, "a"), {"x": 1, "y": "a"}),
        (Frozen(1), {"x": 1, "y": 0}),
        (Record(1), {"type": "Record", "myData": 1, "myName": "n"}),
        (Positional(1, 2), [1, 2]),
        (Colour.RED, "red"),
        (Number.ONE, 1),
        (uuid.UUID(int=1), str(uuid.UUID(int=1))),
        (decimal.Decimal("1.50"), "1.50"),
        (datetime.date(2025, 3, 1), "2025-03-01"),
        (datetime.datetime(2025, 3, 1), "2025-03-01T00:00:00"),
        (datetime.timedelta(days=1), "P1D"),
        (collections.OrderedDict(a=1), {"a": 1}),
        (Two(1, 2), [1, 2]),
        (Text("t"), "t"),
        (Whole(5), 5),
        (Real(5), 5.0),
        (Octets(b"o"), b"o"),
        (Buffered(b"o"), bytearray(b"o")),
    ],
    ids=repr,
)
def test_other_values_arrive_as_the_nearest_plain_one(value: Any, arrives: Any) -> None:
    for wrapped, expected in ((value, arrives), ([value], [arrives]), ({"k": value}, {"k": arrives})):
        again = travel(wrapped)
        assert again == expected
    again = travel(value)
    assert type(again) is type(arrives)


SIZES = [0, 1, 200, OUT_OF_BAND - 1, OUT_OF_BAND, 70_000]


def containers(value: Any) -> list[tuple[Any, Any]]:
    """The value in each kind of place, and how to find it on the other side."""
    return [
        (value, lambda got: got),
        ([value], lambda got: got[0]),
        ((1, value), lambda got: got[1]),
        ({"k": value}, lambda got: got["k"]),
        ({"a": {"b": [0, (value,)]}}, lambda got: got["a"]["b"][1][0]),
        (collections.defaultdict(int, k=value), lambda got: got["k"]),
        (Point("x", value), lambda got: got["y"]),
        (Frozen("x", value), lambda got: got["y"]),
        (Record(value), lambda got: got["myData"]),
        ([Positional(1, value)], lambda got: got[0][1]),
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_arrive_as_what_they_were(kind: Any, size: int) -> None:
    content = bytes(index % 251 for index in range(size))
    for value, find in containers(kind(content)):
        message = encode(value)
        assert isinstance(message, Message) == (size >= OUT_OF_BAND)
        got = find(decode(*received(message)))
        assert type(got) is kind
        assert got == content


def test_one_value_in_two_places() -> None:
    shared = bytearray(BIG)
    message = encode({"a": shared, "b": [shared]})
    assert isinstance(message, Message)
    assert len(message.buffers) == 2
    got = decode(*received(message))
    assert got == {"a": shared, "b": [shared]}


def test_a_value_is_not_changed_by_being_sent() -> None:
    value = {"a": [bytearray(b"x"), {"b": bytes(BIG)}], "p": Point(bytearray(b"x"))}
    before = {"a": [bytearray(b"x"), {"b": bytes(BIG)}], "p": Point(bytearray(b"x"))}
    encode(value)
    assert value == before


def test_default_fields_that_are_memory_are_sent_too() -> None:
    class WithDefault(msgspec.Struct, omit_defaults=True):
        data: bytearray = msgspec.field(default_factory=lambda: bytearray(b"default"))
        text: str = "omitted"

    assert travel(WithDefault()) == {"data": bytearray(b"default")}


@pytest.mark.parametrize("typecode", "bBhHiIlLqQfd")
@pytest.mark.parametrize("count", [0, 3, 20_000])
def test_array_array(typecode: str, count: int) -> None:
    value = array(typecode, [1, 2, 3] * (count // 3))
    got = travel({"v": value})["v"]
    assert type(got) is array
    assert got.typecode == typecode
    assert got == value
    got.append(1)


def test_memoryview_keeps_format_and_shape() -> None:
    grid = memoryview(bytes(range(24))).cast("i", (2, 3))
    for value in (grid, grid[1:], memoryview(array("d", [1.5, 2.5, 3.5]))[::2], memoryview(b"abcdef")[::-2]):
        got = travel([value])[0]
        assert (got.format, got.shape, got.tolist()) == (value.format, value.shape, value.tolist())
    scalar = travel(memoryview(b"abcd").cast("i", ()))
    assert scalar.shape == ()


def test_other_objects_with_the_buffer_protocol_arrive_as_memoryview() -> None:
    with mmap.mmap(-1, 4096) as mapped:
        mapped[:3] = b"abc"
        got = travel([mapped])[0]
        assert type(got) is memoryview
        assert bytes(got) == mapped[:]
    numbers = (ctypes.c_int * 3)(1, 2, 3)
    assert travel([numbers])[0].tolist() == [1, 2, 3]


def test_large_buffers_are_not_copied() -> None:
    value = bytearray(BIG)
    message = encode([value])
    assert isinstance(message, Message)
    value[0] = 77
    assert message.buffers[0][0] == 77
    assert len(message.body) < 32
    arrived = bytearray(message.buffers[0])
    assert decode(message.body, [arrived])[0] is arrived
    assert message.nbytes == len(message.body) + BIG
    assert repr(message) == f"<Message of {len(message.body)} bytes and 1 buffer(s), {message.nbytes} bytes in all>"


def test_buffers_may_arrive_in_any_memory() -> None:
    message = encode({"b": bytes(BIG), "a": bytearray(BIG), "m": memoryview(bytes(BIG))})
    assert isinstance(message, Message)
    with mmap.mmap(-1, BIG) as mapped:
        got = decode(message.body, [mapped, memoryview(bytearray(BIG)), memoryview(bytearray(BIG + 1))[1:]])
        assert [type(each) for each in got.values()] == [bytes, bytearray, memoryview]


def test_body_may_be_any_bytes_like() -> None:
    body = encode({"a": [1, bytearray(b"x")]})
    assert isinstance(body, bytes)
    for kind in (bytes, bytearray, memoryview):
        assert decode(kind(body)) == {"a": [1, bytearray(b"x")]}


def test_unknown_extensions_of_a_user_arrive_as_they_are() -> None:
    assert travel([msgspec.msgpack.Ext(5, b"abc")]) == [msgspec.msgpack.Ext(5, b"abc")]


class Unsendable:
    pass


def generator() -> Any:
    yield 1


cyclic_list: list[Any] = [1]
cyclic_list.append({"again": cyclic_list})
deep: list[Any] = []
for _ in range(100_000):
    deep = [deep]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (Unsendable(), TypeError, r"request: <class '.*Unsendable'> cannot travel: use plain values"),
        (
            {"images": [1, 2, 3, Point(Unsendable())]},
            TypeError,
            r'request\["images"\]\[3\]\.x: <class .*Unsendable\'> cannot',
        ),
        ({"a": Record(({"b": Unsendable()},))}, TypeError, r'request\["a"\]\.my_data\[0\]\["b"\]: '),
        ({"a": {Unsendable()}}, TypeError, r'request\["a"\]\{…\}: '),
        ({Unsendable(): 1}, TypeError, r"request key <.*Unsendable object.*: "),
        ({7: generator()}, TypeError, r"request\[7\]: <class 'generator'> cannot travel: send list"),
        ([len], TypeError, r"request\[0\]: .* only values travel"),
        ([1j], TypeError, r"request\[0\]: <class 'complex'> cannot travel: send its two parts"),
        ([2**64], ValueError, r"request\[0\]: an int beyond 64 bits cannot travel"),
        ({"a": -(2**63) - 1}, ValueError, r'request\["a"\]: an int beyond 64 bits'),
        ({2**70: 1}, ValueError, r"request key 11805\d+: an int beyond 64 bits"),
        ([Whole(2**70)], ValueError, r"request\[0\]: a Whole \(an int beyond 64 bits\) cannot travel"),
        ({"t": ["ok", "\ud800"]}, ValueError, r'request\["t"\]\[1\]: text with a lone surrogate'),
        ({"\udcff": 1}, ValueError, r"request key '\\udcff': text with a lone surrogate"),
        (cyclic_list, ValueError, r'request\[1\]\["again"\]: it contains itself'),
        (deep, ValueError, r"request(\[0\])+: it nests too deeply"),
        ([memoryview((ctypes.c_int * 2 * 2)()).cast("B"), object()], TypeError, r"request\[1\]: "),
        ([(ctypes.c_char_p * 2)()], TypeError, r"request\[0\]: a memoryview of format .* cast it to 'B'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_travel_is_named(value: Any, error: type[Exception], text: str) -> None:
    for extra in (value, value if not isinstance(value, dict) else {**value, "bytes": bytearray(b"x")}):
        with pytest.raises(error, match=f"^{text}"):
            encode(extra, "request")


@pytest.mark.filterwarnings("ignore:The 'u' type code:DeprecationWarning")
def test_array_array_of_text_is_named() -> None:
    with pytest.raises(TypeError, match=r"^value\[0\]: an array.array of typecode 'u' cannot travel"):
        encode([array("u", "abc")])


def test_memoryview_of_an_odd_format_is_named() -> None:
    class Pair(ctypes.Structure):
        _fields_ = (("a", ctypes.c_int), ("b", ctypes.c_double))

    view = memoryview(Pair(1, 2.0))
    for value in ({"a": [view]}, {"a": [view], "b": bytes(BIG)}, {"a": [Pair(1, 2.0)]}):
        with pytest.raises(TypeError, match=r'^value\["a"\]\[0\]: a memoryview of format .* cannot travel'):
            encode(value)


def test_released_memoryview_is_named() -> None:
    view = memoryview(bytearray(3))
    view.release()
    for value in ([view], {"a": view}):
        with pytest.raises(ValueError, match=r'^value(\[0\]|\["a"\]): .'):
            encode(value)


def test_property_that_raises_while_the_fault_is_looked_for() -> None:
    class Angry(Point):
        def __getattribute__(self, name: str) -> Any:
            if name == "x":
                raise RuntimeError("no")
            return super().__getattribute__(name)

    with pytest.raises(TypeError, match=r"^value\[0\]: an? .*Angry cannot travel: no"):
        encode([Angry(1), object()])


def test_a_dict_whose_own_items_is_not_asked() -> None:
    class Angry(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            raise RuntimeError("no")

    with pytest.raises(TypeError, match=r'^value\[0\]\["a"\]: <class \'object\'> cannot travel'):
        encode([Angry(a=object()), object()])


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xc1", id="a byte that begins no value"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="an array without its items"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="a map without its items"),
        pytest.param(b"\xc6\xff\xff\xff\xff", id="bytes that end too early"),
        pytest.param(b"\xa1\xff", id="text that is not UTF-8"),
        pytest.param(b"\xc0\xc0", id="two values"),
        pytest.param(b"\x81\x81\xc0\xc0\xc0", id="a map as the key of a map"),
    ],
)
def test_malformed_bodies(body: bytes) -> None:
    with pytest.raises(DecodeError, match=r"^a payload that arrived cannot be read: .") as caught:
        decode(body, None)
    assert caught.value.__cause__ is not None  # which knows why


def test_a_body_that_nests_too_deeply() -> None:
    with pytest.raises(DecodeError, match="it nests too deeply"):
        decode(b"\x91" * 100_000, None)


def extension(code: int, header: Any) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(code, encode_header(header)))


def test_references_to_buffers_that_did_not_come() -> None:
    for index, buffers in ((0, None), (0, []), (1, [bytearray(1)]), (-1, [bytearray(1)]), (2**63, [bytearray(1)])):
        with pytest.raises(DecodeError, match="refers to buffer"):
            decode(extension(BYTES, index), buffers)


def test_a_buffer_is_taken_once() -> None:
    body = msgspec.msgpack.encode([msgspec.msgpack.Ext(BYTES, encode_header(0))] * 2)
    with pytest.raises(DecodeError, match="twice"):
        decode(body, [bytearray(10)])


@pytest.mark.parametrize("code", range(16, 22))
@pytest.mark.parametrize("header", [None, "x", [], [0], [0, "x"], [b"", "O", [0], "C"], {"a": 1}, 2**64 - 1, [[[]]]])
def test_malformed_extensions(code: int, header: Any) -> None:
    for buffers in (None, [bytearray(8)]):
        with pytest.raises(DecodeError):
            decode(extension(code, header), buffers)
    with pytest.raises(DecodeError):
        decode(msgspec.msgpack.encode(msgspec.msgpack.Ext(code, b"")))


def test_extension_as_a_key() -> None:
    body = b"\x81" + extension(BYTEARRAY, b"x") + b"\xc0"
    with pytest.raises(DecodeError):
        decode(body)


def test_adaptation_to_values_with_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_expected", 0)
    encode({"a": bytes(BIG)})
    assert codec._expected > 0
    for _ in range(100):
        assert type(encode({"i": 1})) is bytes
    assert codec._expected == 0


def test_threads_do_not_share_buffers() -> None:
    wrong: list[Any] = []

    def work(mark: int) -> None:
        content = bytes([mark]) * BIG
        for _ in range(50):
            got = travel({"a": content, "b": [bytearray(content)], "c": mark})
            if got != {"a": content, "b": [bytearray(content)], "c": mark}:
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
    | st.binary().map(bytearray)
    | st.sampled_from([bytes(BIG), bytearray(BIG)])
)
keys = st.text(st.characters(exclude_categories=["Cs"])) | st.integers(-(2**63), 2**64 - 1) | st.binary() | st.none()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=20)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(one == other)


@given(value=values)
def test_any_value_survives_the_trip(value: Any) -> None:
    for expected in (0, 16):
        codec._expected = expected
        assert same(travel(value), value)


@given(body=st.binary(max_size=64), buffers=st.lists(st.binary(max_size=16).map(bytearray), max_size=2))
def test_any_bytes_decode_or_say_why_not(body: bytes, buffers: list[bytearray]) -> None:
    try:
        decode(body, buffers)
    except DecodeError:
        pass


header_parts = st.recursive(
    st.none() | st.integers(-2, 9) | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=4) | st.binary(max_size=16)
    | st.sampled_from(["B", "d", "i", "<f4", "|b1", "|O", "O", "bfloat16", "float32", "C", "F", "0", "i4,O"]),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@given(code=st.integers(0, 127), header=header_parts, raw=st.booleans(), size=st.sampled_from([0, 4, 8, 16]))
def test_any_extension_decodes_or_says_why_not(code: int, header: Any, raw: bool, size: int) -> None:
    data = header if raw and isinstance(header, bytes) else encode_header(header)
    body = msgspec.msgpack.encode([msgspec.msgpack.Ext(code, data)])
    try:
        decode(body, [bytearray(size)])
    except DecodeError:
        pass


@given(value=values, data=st.data())
def test_a_changed_byte_decodes_or_says_why_not(value: Any, data: st.DataObject) -> None:
    body, buffers = received(encode(value))
    changed = bytearray(body)
    changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(changed, buffers)
    except DecodeError:
        pass

"""NumPy arrays, torch tensors and DLPack through the codec."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tests.payload.test_codec import BIG, containers, extension, received, travel
from tests.timing import PATIENCE_S
from triton_distributed.errors import DecodeError
from triton_distributed.payload import arrays
from triton_distributed.payload.codec import Message, decode, encode
from triton_distributed.payload.outofband import NDARRAY, TENSOR


def check(value: Any, got: Any) -> None:
    assert type(got) is np.ndarray
    assert got.dtype == value.dtype
    assert got.shape == value.shape
    assert got.flags.writeable
    assert got.flags.aligned
    assert got.tobytes() == np.ascontiguousarray(value).tobytes()


RECORD = np.dtype([("a", "i1"), ("b", ">f8", (2, 3)), ("c", [("d", "S3"), ("e", "M8[ns]")])], align=True)

ARRAYS = [
    np.arange(6, dtype="i4").reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    np.arange(12)[::-2],
    np.array(3.5),
    np.zeros((0, 3)),
    np.zeros((3, 0, 2), order="F"),
    np.broadcast_to(np.arange(3), (4, 3)),
    np.arange(3, dtype=">f8"),
    np.array([1, 2], dtype="f2"),
    np.array([True, False]),
    np.array([1 + 2j]),
    np.array([1.5], dtype=np.longdouble),
    np.array(["2025-03-01", "NaT"], dtype="M8[D]"),
    np.array([1, 2], dtype="m8[25s]"),
    np.array(["ab", "č"]),
    np.array([b"ab", b"c"]),
    np.array([b"ab"], dtype="V5"),
    np.zeros(3, RECORD),
    np.zeros((2, 2), RECORD)[:, 1],
    np.rec.array([(1, 2.0)], dtype=[("x", "i4"), ("y", "f8")]),
    np.arange(20_000).reshape(100, 200),
    np.asfortranarray(np.arange(20_000).reshape(100, 200)),
    np.arange(40_000)[::2],
    np.zeros(2_000, RECORD),
    np.zeros(5_000, "M8[us]"),
]


@pytest.mark.parametrize("value", ARRAYS, ids=lambda value: f"{value.dtype.str}-{value.shape}")
def test_arrays_arrive_as_they_were(value: Any) -> None:
    for wrapped, find in containers(value):
        got = find(travel(wrapped))
        check(np.asarray(value), got)


def test_layout_is_kept_where_it_is_contiguous() -> None:
    assert travel(np.asfortranarray(np.zeros((200, 300)))).flags.f_contiguous
    assert travel(np.zeros((200, 300))).flags.c_contiguous


def test_large_arrays_are_not_copied() -> None:
    value = np.arange(BIG)
    message = encode({"a": value})
    assert isinstance(message, Message)
    assert np.shares_memory(np.frombuffer(message.buffers[0], "u1"), value)
    buffer = bytearray(message.buffers[0])
    got = decode(message.body, [buffer])["a"]
    assert np.shares_memory(got, np.frombuffer(buffer, "u1"))


def test_arrays_in_memory_that_is_read_only_or_misaligned_are_copied() -> None:
    message = encode(np.arange(BIG))
    assert isinstance(message, Message)
    raw = bytes(message.buffers[0])
    check(np.arange(BIG), decode(message.body, [memoryview(raw)]))
    check(np.arange(BIG), decode(message.body, [memoryview(bytearray(b"x" + raw))[1:]]))


def test_read_only_array_can_be_sent() -> None:
    value = np.arange(BIG)
    value.flags.writeable = False
    check(value, travel(value))


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (np.int64(3), 3),
        (np.uint8(200), 200),
        (np.bool_(True), True),
        (np.float64(1.5), 1.5),
        (np.float32(1.5), 1.5),
        (np.float16(1.5), 1.5),
        (np.str_("č"), "č"),
        (np.bytes_(b"x"), b"x"),
    ],
)
def test_numpy_numbers_arrive_as_pythons(value: Any, arrives: Any) -> None:
    got = travel({"v": [value]})["v"][0]
    assert type(got) is type(arrives)
    assert got == arrives
    assert travel({value: 1}) == {arrives: 1}


@pytest.mark.parametrize(
    "value",
    [np.complex64(1 + 2j), np.datetime64("2025-03-01"), np.timedelta64(3, "s"), np.longdouble(1) / 3, np.void(b"abc")],
    ids=repr,
)
def test_scalars_that_python_has_no_type_for_arrive_as_they_were(value: Any) -> None:
    got = travel([value])[0]
    assert type(got) is type(value)
    assert got.dtype == value.dtype
    assert got == value


class Foreign:
    """An array of another library, seen through DLPack."""

    def __init__(self, values: Any, device: tuple[int, int] = (1, 0)) -> None:
        self.values, self.device = values, device

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


def test_dlpack_arrives_as_an_array() -> None:
    check(np.arange(6.0), travel({"a": Foreign(np.arange(6.0))})["a"])
    with pytest.raises(TypeError, match=r'^value\["a"\]: a Foreign outside the CPU\'s memory cannot travel'):
        encode({"a": Foreign(np.arange(6.0), (2, 0))})
    with pytest.raises(TypeError, match="NumPy cannot read this Foreign"):
        encode(Foreign(np.array(["text"])))


class MakesArrays(Foreign):
    """One that makes an array of itself where DLPack has no name for its dtype, as JAX does."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.values


def test_what_dlpack_cannot_name_is_made_an_array_by_its_own_library() -> None:
    value = np.array(["2025-03-01"], "M8[D]")
    check(value, travel([MakesArrays(value)])[0])
    with pytest.raises(TypeError, match=r"cannot read this MakesArrays .* send numpy.asarray"):
        encode([MakesArrays(np.array([object()]))])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.array([object()]), "holds Python objects"),
        (np.array([(1, None)], dtype=[("a", "i4"), ("b", "O")]), "holds Python objects"),
        (np.array(["a"], dtype=np.dtypes.StringDType()), "holds Python objects"),
        (np.zeros(3, "V0"), "without a size"),
        (np.ma.masked_array([1, 2], [True, False]), "masked array"),
    ],
)
def test_arrays_that_cannot_travel_are_named(value: Any, text: str) -> None:
    with pytest.raises(TypeError, match=rf'^request\["a"\]\[0\]: an? .*{text}|^request\["a"\]\[0\]: {text}'):
        encode({"a": [value]}, "request")


def test_every_dtype_that_ml_dtypes_adds_arrives_bit_for_bit() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kinds = [each for each in vars(ml_dtypes).values() if isinstance(each, type) and issubclass(each, np.generic)]
    assert len(kinds) > 10
    for kind in kinds:
        size = np.dtype(kind).itemsize
        for count in (0, 3, 20_000):
            check(value := np.resize(np.arange(256, dtype="u1"), count * size).view(kind), travel(value))
        check(value[::2], travel(value[::2]))
        got = travel([value[1]])[0]
        assert type(got) in (kind, float)
        assert got == value[1]
    record = np.dtype([("a", "i1"), ("b", ml_dtypes.bfloat16, (2,))])
    check(np.zeros(3, record), travel(np.zeros(3, record)))


def test_a_dtype_of_a_library_that_is_not_here_arrives_as_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    monkeypatch.setattr(arrays, "_added_dtypes", {})
    for name, size in (("ml_dtypes.bfloat16", 2), ("ml_dtypes.float8_of_next_year", 1), ("quaternion.quaternion", 32)):
        got = decode(array_body(bytes(range(size)), f"{name}:{size}", [1]))
        check(np.frombuffer(bytes(range(size)), f"V{size}"), got)
        check(got, travel(got))
    assert "quaternion" not in sys.modules


@pytest.mark.parametrize(
    "name", ["ml_dtypes.finfo", "numpy.object_", "numpy.generic", "numpy.void", "builtins.object", "sys.modules", "a.b"]
)
def test_no_other_object_is_taken_for_a_dtype_because_a_peer_named_it(name: str) -> None:
    assert decode(array_body(bytes(16), f"{name}:8", [2])).dtype == "V8"


def array_body(payload: Any, dtype: Any, shape: Any, layout: Any = "C") -> bytes:
    return extension(NDARRAY, [payload, dtype, shape, layout])


def test_the_forged_headers_below_differ_from_a_good_one_only_in_what_they_say() -> None:
    check(np.zeros(2, "f4"), decode(array_body(bytes(8), "<f4", [2])))
    check(np.zeros(2, "f4"), decode(array_body(0, "<f4", [2]), [bytearray(8)]))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("|O", [1]),
        ("O", [1]),
        ("<f4,O", [2]),
        ("object", [1]),
        ("f4", [2]),
        ("<f4\n", [2]),
        ("__import__('os')", [2]),
        ("|V0", [2**62]),
        ("|S0", [2**62]),
        ("|S999999999999", [0]),
        ("<f4", [3]),
        ("<f4", [-2]),
        ("<f4", [-1, -2]),
        ("<f4", [2**40]),
        ("<f4", [2**62, 2**62]),
        ("<f4", [0, 2**62, 2**62]),
        ("<f4", [1] * 100 + [2]),
        ("<f3", [2]),
        ("<M8[parsec]", [1]),
        ([8, ["a", 0, "|O"]], [1]),
        ([8, ["a", 0, "<f8"], ["a", 0, "<f8"]], [1]),
        ([8, ["a", 4, "<f8"]], [1]),
        ([8, ["a", -4, "<f8"]], [1]),
        ([2**60, ["a", 0, "<f8"]], [1]),
        ([8, ["a", 0]], [1]),
        ([8, [1, 0, "<f8"]], [1]),
        (["<f8", [2**40, 2**40]], [1]),
        (["<f8", [0]], [1]),
        (["<f8", [True]], [1]),
        ([["<f8", [1]], "x"], [1]),
        ({"a": 1}, [1]),
        (None, [1]),
        (5, [1]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_forged_headers_are_refused(dtype: Any, shape: Any) -> None:
    with pytest.raises(DecodeError):
        decode(array_body(bytes(8), dtype, shape))
    with pytest.raises(DecodeError):
        decode(array_body(0, dtype, shape), [bytearray(8)])


@pytest.mark.parametrize("depth", [400, 100_000])
def test_dtype_of_many_levels(depth: int) -> None:
    dtype = b"\x92\x01\x93\xa1a\x00" * depth + b"\xa3|u1"
    header = b"\x94\xc4\x01x" + dtype + b"\x91\x01\xa1C"
    with pytest.raises(DecodeError):
        decode(msgspec.msgpack.encode(msgspec.msgpack.Ext(NDARRAY, header)))


def test_dtype_of_many_fields() -> None:
    wide = np.dtype([(f"f{index}", "u1") for index in range(500)])
    check(np.zeros(2, wide), travel(np.zeros(2, wide)))
    with pytest.raises(TypeError, match="more than 1024 fields"):
        encode(np.zeros(2, [(f"f{index}", "u1") for index in range(1024)]))
    too_wide = [5000, *([f"f{index}", index, "|u1"] for index in range(5000))]
    with pytest.raises(DecodeError, match="more than 1024 fields"):
        decode(array_body(bytes(5000), too_wide, [1]))


def test_numpy_is_imported_only_for_an_array_that_arrives() -> None:
    body, _ = received(encode({"a": np.arange(3)}))
    code = (
        "import sys\n"
        "from triton_distributed.payload.codec import decode, encode\n"
        "encode({'a': bytearray(b'x'), 'b': memoryview(b'y')})\n"
        "assert 'numpy' not in sys.modules\n"
        "print(decode(bytes.fromhex(sys.argv[1]))['a'].tolist())\n"
        "sys.modules['numpy'] = None\n"
        "try: decode(bytes.fromhex(sys.argv[1]))\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
    )
    path = "import sys; sys.path[:0] = " + repr([each for each in sys.path if each]) + "\n"
    done = subprocess.run(
        [sys.executable, "-c", path + code, body.hex()], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first == "[0, 1, 2]"
    assert second.startswith("DecodeError")
    assert "NumPy is not installed" in second


TENSORS_WITHOUT_TORCH = [
    ("float32", 4, "<f4"),
    ("bfloat16", 2, "V2"),
    ("float8_e8m0fnu", 1, "V1"),
    ("float4_e2m1fn_x2", 1, "V1"),
    ("uint3", 1, "V1"),
    ("complex32", 4, "V4"),
    ("float512_of_next_year", 64, "V64"),
]


class OldTorch(types.ModuleType):
    """A torch that has none of these dtypes, and something else under one of their names."""

    dtype = type("dtype", (), {})
    float32 = "no dtype"


@pytest.mark.parametrize("torch", [None, OldTorch("torch")], ids=["no torch", "old torch"])
@pytest.mark.parametrize(("name", "size", "dtype"), TENSORS_WITHOUT_TORCH)
def test_tensor_arrives_as_an_array_without_its_dtype(
    torch: Any, name: str, size: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    monkeypatch.setattr(arrays, "_added_dtypes", {})
    data = bytes(range(6 * size % 256)) + bytes(6 * size - 6 * size % 256)
    for payload, buffers in ((data, None), (0, [bytearray(data)])):
        got = decode(extension(TENSOR, [payload, name, [2, 3], size]), buffers)
        check(np.frombuffer(data, dtype).reshape(2, 3), got)


def test_a_dtype_that_ml_dtypes_has_too_arrives_as_its(monkeypatch: pytest.MonkeyPatch) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    monkeypatch.setitem(sys.modules, "torch", None)
    got = decode(extension(TENSOR, [b"\x80\x3f", "bfloat16", [1], 2]))
    assert got.dtype == ml_dtypes.bfloat16
    assert got[0] == 1
    for name in ("uint4", "int2"):  # torch does not say what their bits mean
        assert decode(extension(TENSOR, [b"\x80", name, [1], 1])).dtype == "V1"


@pytest.mark.parametrize(
    "header",
    [
        [b"\0\0", "object", [1]],
        [b"\0\0", "float32", [1], 4],
        [b"\0\0", "float32", [1]],
        [b"", "qint8", [0], 1],
        [b"", "float32", [-1], 4],
        [b"\0", "new", [1], 2],
        [b"\0", "new", [1], -1],
        [b"", "new", [0], 2**40],
        [b"\0", "new name", [1], 1],
        [b"\0", "__doc__", [1], 1],
    ],
)
def test_forged_tensors_are_refused(header: Any) -> None:
    with pytest.raises(DecodeError):
        decode(extension(TENSOR, header))


def torch_dtypes(torch: Any) -> list[Any]:
    found = {each for each in vars(torch).values() if isinstance(each, torch.dtype)}
    return [each for each in sorted(found, key=str) if not str(each).startswith("torch.q")]


@pytest.mark.filterwarnings(
    "ignore:.*(experimental|in beta state|in prototype stage|deprecated):UserWarning"
)  # torch says so
def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    dtypes = torch_dtypes(torch)
    assert len(dtypes) > 15
    for dtype in dtypes:
        for shape in ((), (3,), (0, 2), (200, 300)):
            count = math.prod(shape)
            bits = torch.arange(count * dtype.itemsize).to(torch.uint8)
            bits = bits % 2 if dtype == torch.bool else bits
            value = bits.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
            for wrapped, find in containers(value):
                got = find(travel(wrapped))
                assert isinstance(got, torch.Tensor)
                assert (got.dtype, got.shape) == (dtype, value.shape)
                assert not count or torch.equal(got.reshape(-1).view(torch.uint8), bits)
        turned = travel(value.T)
        assert turned.shape == (300, 200)
        size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[dtype.itemsize]
        assert torch.equal(turned.view(size).T.contiguous().view(torch.uint8).reshape(-1), bits), dtype
    assert torch.equal(travel(torch.ones(3, requires_grad=True)), torch.ones(3))
    assert torch.equal(travel(torch.nn.Parameter(torch.ones(3))), torch.ones(3))
    for odd in (torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).conj().imag, torch.tensor([1 + 2j]).imag):
        assert torch.equal(travel(odd), odd)
    travel(torch.ones(3))[0] = 5


@pytest.mark.filterwarnings(
    "ignore:.*(experimental|in beta state|in prototype stage|deprecated):UserWarning"
)  # torch says so
def test_the_words_for_tensors_that_cannot_travel_say_what_to_send() -> None:
    torch = pytest.importorskip("torch")
    parts = [torch.ones(2), torch.ones(3)]
    square = torch.ones(2, 2)
    for value, helps in (
        (square.to_sparse(), "to_dense"),
        (square.to_sparse(), "indices"),
        (square.to_sparse_csr(), "crow_indices"),
        (square.to_sparse_csc(), "ccol_indices"),
        (torch.ones(2, device="meta"), "shape and dtype"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "int_repr"),
        (torch.quantize_per_channel(square, torch.ones(2), torch.zeros(2), 0, torch.quint8), "dequantize"),
        (torch.nested.nested_tensor(parts, layout=torch.strided), "unbind"),
        (torch.nested.nested_tensor(parts, layout=torch.jagged), "to_padded_tensor"),
    ):
        with pytest.raises(TypeError, match=rf"^value\[0\]: a .*cannot travel.*send .*{helps}"):
            encode([value])


def test_a_tensor_of_a_dtype_that_this_torch_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    body, _ = received(encode(torch.ones(3, dtype=torch.bfloat16)))
    monkeypatch.delattr(torch, "bfloat16")
    got = decode(body)
    assert isinstance(got, np.ndarray)
    assert got.tobytes() == b"\x80\x3f" * 3


@given(
    npst.arrays(
        dtype=npst.scalar_dtypes() | npst.array_dtypes(allow_subarrays=True),
        shape=npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    st.sampled_from(["C", "F", "T", "step"]),
)
def test_any_array_survives_the_trip(value: Any, layout: str) -> None:
    if layout == "T":
        value = value.T
    elif layout == "step" and value.ndim:
        value = value[::-2]
    elif layout == "F":
        value = np.asfortranarray(value) if value.ndim else value
    check(value, travel(value))

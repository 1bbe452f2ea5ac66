"""Memory files that other processes map: what is opened, what is not, and that nothing stays."""

from __future__ import annotations

import gc
import mmap
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from triton_distributed.system import fork, placed
from triton_distributed.system.shared_memory import SUPPORTED, Refused, Segment, available_bytes, peer_process

if not SUPPORTED:
    pytest.skip("this system has no sealed memory files", allow_module_level=True)

from triton_distributed.system.mapping import Mapping, address_of

SIZE = 3 * 1024 * 1024 + 5


def memory_files() -> int:
    """Memory files of ours that this process has open or mapped."""
    opened = sum("memfd:trd-" in target for target in map(_target, Path("/proc/self/fd").iterdir()))
    return opened + Path("/proc/self/maps").read_text().count("memfd:trd-")


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = memory_files()
    yield
    gc.collect()
    assert memory_files() == before


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = a_segment()
    yield made
    made.close()


def a_segment(size: int = SIZE) -> Segment:
    made = Segment(size)
    for _ in made.make():
        pass
    return made


def mapped(segment: Segment) -> Mapping:
    return Mapping(os.getpid(), segment.fileno(), segment.size, segment.cookie)


def writable(view: memoryview) -> memoryview:
    lease: Any = view.obj
    made: memoryview = lease.writable()
    return made


def test_another_process_reads_what_was_written_and_cannot_write_it(segment):
    segment.memory[10:15] = b"hello"
    view, _ = mapped(segment).lend(10, 5, lambda reference: None)
    assert (view.tobytes(), view.readonly, view.format) == (b"hello", True, "B")
    writable(view)[:] = b"WORLD"
    assert view.tobytes() == b"WORLD"
    assert segment.memory[10:15].tobytes() == b"hello"


def test_what_was_written_here_is_forgotten_before_the_memory_is_lent_again(segment):
    mapping = mapped(segment)
    view, _ = mapping.lend(0, 4, lambda reference: None)
    writable(view)[:] = b"mine"
    again = mapping.fresh()
    assert again is not mapping  # the first buffer is still used
    assert again.lend(0, 4, lambda reference: None)[0].tobytes() == bytes(4)
    assert view.tobytes() == b"mine"
    mapping.uses -= 1
    del view
    assert mapping.fresh() is mapping
    assert mapping.lend(0, 4, lambda reference: None)[0].tobytes() == bytes(4)


def test_memory_of_two_buffers_is_copied_before_one_is_written(segment):
    mapping = mapped(segment)
    one, _ = mapping.lend(0, 4, lambda reference: None)
    two, _ = mapping.lend(0, 4, lambda reference: None)
    writable(one)[:] = b"mine"
    assert two.tobytes() == bytes(4)


def test_a_lease_ends_with_the_last_view_of_its_bytes_in_any_thread(segment):
    ended: list[Any] = []
    view, reference = mapped(segment).lend(0, 100, ended.append)
    part = view[10:20].cast("H")
    del view
    assert not ended
    holder: list[Any] = [part]
    holder.append(holder)  # only the garbage collector finds it
    del part, holder
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()
    assert ended == [reference]


def test_the_references_to_leases_at_one_address_do_not_collide(segment):
    """They are keys: among thousands that collide, each look-up would take milliseconds."""
    mapping = mapped(segment)
    references = []
    for _ in range(100):
        view, reference = mapping.lend(0, 4, lambda reference: None)
        references.append((reference, hash(reference)))
        del view  # The next lease gets its address.
    assert len({number for _, number in references}) == 100


def test_the_memory_outlives_its_maker_while_it_is_used(segment):
    segment.memory[:4] = b"kept"
    view, _ = mapped(segment).lend(0, 4, lambda reference: None)
    segment.close()
    assert view.tobytes() == b"kept"


def test_no_process_can_take_pages_away(segment):
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fileno(), size)


def file_of(tmp_path: Path, segment: Segment) -> int:
    path = tmp_path / f"memfd:trd-{segment.cookie.hex()} (deleted)"
    path.write_bytes(bytes(SIZE))
    return os.open(path, os.O_RDWR)


def unsealed(tmp_path: Path, segment: Segment) -> int:
    made = os.memfd_create(f"trd-{segment.cookie.hex()}", os.MFD_ALLOW_SEALING)
    os.ftruncate(made, SIZE)
    return made


def shorter(tmp_path: Path, segment: Segment) -> int:
    other = Segment(SIZE - 1)
    other.cookie = segment.cookie
    for _ in other.make():
        pass
    try:
        return os.dup(other.fileno())
    finally:
        other.close()


def pipe(tmp_path: Path, segment: Segment) -> int:
    os.mkfifo(tmp_path / "pipe")
    return os.open(tmp_path / "pipe", os.O_RDWR)


def listening(tmp_path: Path, segment: Segment) -> int:
    return socket.socket(socket.AF_UNIX).detach()


@pytest.mark.parametrize("make", [file_of, unsealed, shorter, pipe, listening])
def test_another_file_is_refused(make: Callable[[Path, Segment], int], tmp_path: Path, segment: Segment) -> None:
    descriptor = make(tmp_path, segment)
    try:
        with pytest.raises(Refused):
            Mapping(os.getpid(), descriptor, SIZE, segment.cookie)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "wrong",
    [
        {"process": 1 << 30},
        {"process": os.getppid()},
        {"descriptor": 1 << 62},
        {"size": 0},
        {"size": SIZE + 1},
        {"size": (1 << 64) - 1},
        {"cookie": bytes(16)},
    ],
    ids=range(7),
)
def test_a_wrong_description_is_refused(wrong: dict[str, Any], segment: Segment) -> None:
    right: dict[str, Any] = {
        "process": os.getpid(),
        "descriptor": segment.fileno(),
        "size": SIZE,
        "cookie": segment.cookie,
    }
    Mapping(**right)
    with pytest.raises(Refused):
        Mapping(**{**right, **wrong})


def test_a_child_keeps_nothing_of_what_its_parent_sends(segment):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(memory_files()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    found = os.read(reader, 10)
    os.close(reader)
    os.close(writer)
    assert found == b"0"


FORKING = """
import mmap, os
made = []

def more():
    for _ in range(64):
        made.append(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        made[-1][:4] = b"mine"

os.register_at_fork(after_in_child=more)  # before the hook of the package
from triton_distributed.system.shared_memory import Segment
segment = Segment(1 << 20)
for _ in segment.make():
    pass
child = os.fork()
if child == 0:
    assert all(each[:4] == b"mine" for each in made)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_keeps_its_own_memory():
    """What it has mapped before the segment is given up there, perhaps at the same address."""
    subprocess.run([sys.executable, "-c", FORKING], check=True)


def test_forks_are_counted():
    before = fork.count()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert fork.count() == before + 1
    subprocess.run([sys.executable, "-c", ""], check=True)  # a new program, which has none of our objects
    assert fork.count() == before + 1


def test_no_memory_is_an_error_and_leaves_nothing(monkeypatch):
    def full(*_: int) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    made = Segment(SIZE)
    with pytest.raises(OSError, match="no space"):
        next(made.make())
    del made


def test_the_memory_that_is_left_is_known():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_bytes() <= total


@pytest.mark.parametrize(
    ("own", "folder", "names"),
    [
        ("0::/pod/one\n", "pod/one", ("memory.max", "memory.current", "inactive_file")),
        ("0::/pod/one\n", "pod", ("memory.max", "memory.current", "inactive_file")),
        ("0::/pod/one\n", ".", ("memory.max", "memory.current", "inactive_file")),
        ("0::/../other\n", ".", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:cpu,cpuacct:/x\n4:hugetlb,memory:/docker/id\n0::/\n",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["own", "parent", "root", "outside", "version 1"],
)
def test_limits_of_control_groups_hold(own, folder, names, tmp_path, monkeypatch):
    """And pages of files, which the kernel frees on demand, are not counted."""
    limit, used, cache = names
    for inner in ("pod/one", "memory"):
        (tmp_path / inner).mkdir(parents=True)
    (tmp_path / "pod/one/memory.max").write_text("max\n")
    there = tmp_path / folder
    (there / limit).write_text("1000000\n")
    (there / used).write_text("900000\n")
    (there / "memory.stat").write_text(f"anon 5\n{cache} 700000\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr("triton_distributed.system.shared_memory._OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr("triton_distributed.system.shared_memory._GROUPS", tmp_path)
    assert available_bytes() == 800_000
    (there / used).write_text("9000000\n")
    assert available_bytes() == 0


def test_only_a_process_of_this_user_is_a_peer(monkeypatch):
    here, there = socket.socketpair()
    with here, there, socket.socket(socket.AF_INET) as tcp:
        assert peer_process(here) == os.getpid()
        assert peer_process(tcp) == peer_process(None) == 0
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        assert peer_process(here) == 0


def test_placed_memory_is_found_by_its_bytes_and_gone_with_its_last_use():
    data = secrets.token_bytes(SIZE)
    view = placed.place(memoryview(data))
    assert view is not None
    assert view.readonly
    assert view == data
    known, offset = placed.find(view[100:200]) or (None, 0)
    assert known is not None
    assert offset == 100
    assert placed.find(memoryview(data)) is None
    there, _ = Mapping(os.getpid(), known.segment.fileno(), SIZE, known.segment.cookie).lend(0, SIZE, lambda gone: None)
    with pytest.raises(PermissionError):  # sealed: no process can write it
        os.pwrite(known.segment.fileno(), b"x", 0)
    part = view[5:6]
    del view, known
    assert placed.find(part) is not None
    del part
    assert not placed._placed
    assert there == data


def test_a_child_does_not_offer_what_its_parent_has_placed():
    view = placed.place(memoryview(secrets.token_bytes(SIZE)))
    assert view is not None
    known, _ = placed.find(view) or (None, 0)
    assert known is not None
    told: list[int] = []
    user = Mock(withdraw_soon=told.append)
    known.users.add(user)
    child = os.fork()
    if child == 0:
        found = placed.find(view)
        del view, known
        os._exit(0 if found is None and not told and not placed._placed else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert placed.find(view) is not None
    number = known.segment.id
    del view, known
    assert told == [number]


def test_placed_memory_may_go_while_other_memory_is_looked_for(monkeypatch):
    """The garbage collector may run while the memory that is placed is listed."""

    class Collected(dict[Any, Any]):
        def values(self) -> Any:
            for each in super().values():
                yield each
                gc.collect()

    monkeypatch.setattr(placed, "_placed", Collected())
    view = placed.place(memoryview(bytes(SIZE)))
    assert view is not None
    cycle: list[Any] = [placed.place(memoryview(bytes(SIZE)))]
    cycle.append(cycle)
    del cycle
    assert placed.find(memoryview(bytes(10))) is None
    assert len(placed._placed) == 1
    assert placed.find(view) is not None
    del view


def test_the_address_of_a_view():
    memory = mmap.mmap(-1, 8192)
    view = memoryview(memory)
    assert address_of(view[4096:]) - address_of(view) == 4096

"""Static discovery knows what its text says, and nothing else."""

from __future__ import annotations

import pytest

from triton_distributed.discovery.static import StaticDiscovery, parse_static, static_id
from triton_distributed.errors import ConfigError
from triton_distributed.names import EndpointName
from triton_distributed.testing import ChangeLog

NAME = EndpointName("ns", "comp", "ep")


def test_its_form():
    found = parse_static(" ns.comp.ep=tcp://h:1 , unix:///a/b; ns.comp.ep=tcp://[::1]:2;;a.b.c=memory://x ;")
    assert [(str(each.endpoint), each.addresses, each.host) for each in found] == [
        ("ns.comp.ep", ("tcp://h:1", "unix:///a/b"), ""),
        ("ns.comp.ep", ("tcp://[::1]:2",), ""),
        ("a.b.c", ("memory://x",), ""),
    ]
    assert parse_static("") == parse_static(" ; ") == []


def test_ids_depend_on_the_entry_alone():
    one, other = parse_static("ns.comp.ep=tcp://h:1;ns.comp.ep=tcp://h:2")
    (alone,) = parse_static("ns.comp.ep=tcp://h:2")
    assert other.id == alone.id == static_id(NAME, ("tcp://h:2",)) != one.id
    assert one.id == 9012675795298463374  # written down: other versions and machines must agree


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ns.comp.ep", "no `=`"),
        ("ns.comp=tcp://h:1", "three parts"),
        ("=tcp://h:1", "three parts"),
        ("ns..ep=tcp://h:1", "must not be empty"),
        ("ns.comp.ep=", "'' is not an address"),
        ("ns.comp.ep=tcp://h:1,", "'' is not an address"),
        ("ns.comp.ep=h:1", "is not an address"),
        ("ns.comp.ep=tcp://h", "is not an address"),
        ("ns.comp.ep=tcp://:1", "is not an address"),
        ("ns.comp.ep=tcp://h:0", "is not an address"),
        ("ns.comp.ep=tcp://h:65536", "is not an address"),
        ("ns.comp.ep=tcp://h:²", "is not an address"),
        ("ns.comp.ep=tcp://h h:1", "is not an address"),
        ("ns.comp.ep=unix://a", "is not an address"),
        ("ns.comp.ep=http://h:1", "is not an address"),
        ("ns.comp.ep=tcp://h:1;ns.comp.ep=tcp://h:1", "twice"),
    ],
)
def test_a_slip_is_named(text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        StaticDiscovery(text)
    assert caught.value.setting == "TRD_STATIC"
    assert caught.value.value in text


async def test_a_watch_gets_its_endpoints_snapshot():
    discovery = StaticDiscovery("ns.comp.ep=tcp://h:1;ns.comp.ep2=tcp://h:1;ns.comp.ep=tcp://h:2")
    log, every = ChangeLog(), ChangeLog()
    await discovery.watch(NAME, log)
    await discovery.watch(None, every)
    assert [each.addresses for each in log.present.values()] == [("tcp://h:1",), ("tcp://h:2",)]
    assert len(every.present) == 3
    assert discovery.where == "static:TRD_STATIC"
    await discovery.close()

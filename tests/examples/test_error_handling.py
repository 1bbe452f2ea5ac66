"""Error handling: what the kitchen raises is what the guest catches, with what came before it."""

from __future__ import annotations

from tests.examples.programs import run, serving


def test_error_handling():
    with serving("error_handling/server.py", handlers_raise=True):
        lines = run("error_handling/client.py")

    assert lines[:3] == [
        "soup: light the stove, chop, simmer, serve",
        "cake: light the stove, then sold out; 12 tomorrow",
        "unicorn: light the stove, then KeyError: 'unicorn'",
    ]
    remote = [line for line in lines if line.startswith("    | ")]
    assert remote[0] == "    | Traceback (most recent call last):"
    assert any("error_handling/server.py" in line and line.endswith("in cook") for line in remote)
    assert remote[-1] == "    | KeyError: 'unicorn'"

    rest = lines[3 + len(remote) :]
    assert rest[0] == "water: light the stove, then ZeroDivisionError: cannot cook zero ingredients"
    assert rest[1].startswith("soup, meanwhile: ")
    assert "max_inflight=1" in rest[1]
    assert rest[2] == "stew: light the stove, brown, braise, serve"
    assert rest[3].startswith('not an order: request["for"][0]: ')
    assert rest[4].startswith('no bar: no endpoints found for endpoint "examples/components/bar/pour"')
    assert len(rest) == 5

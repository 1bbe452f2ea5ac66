"""`trd replay TRACE --policy …`: the table, the lines of JSON, the figure, a policy of one's own, and what is refused."""

import json
import re

import pytest

from tests.guards.tree import ROOT
from tests.llm.replay.traces import chats
from triton_distributed.cli.arguments import Parser
from triton_distributed.cli.failure import Failure
from triton_distributed.cli.replay import configure, run
from triton_distributed.errors import ConfigError
from triton_distributed.llm import InvalidParameter


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in chats(60)))
    return path


def replay(*words):
    parser = Parser(prog="trd replay")
    configure(parser)
    return run(parser.parse_args([*map(str, words)]))


def test_policies_are_compared_in_a_table(trace, capsys):
    assert replay(trace, "--policy", "kv, round_robin", "--workers", "3", "--speed", "4") == 0
    head, header, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("60 requests, 3 workers; ")
    assert header.split()[:3] == ["policy", "first", "token"]
    assert [each.split()[0] for each in rows] == ["kv", "round_robin"]
    assert rows[1].endswith("20–20"), "in turn, each of three gets a third"


def test_a_line_of_json_has_the_documented_fields_and_a_figure_is_drawn(trd, trace, tmp_path):
    figure, pools = tmp_path / "chats.svg", ("--prefill", "3", "--decode", "5", "--ttft", "1.5")
    # In a process of its own, since matplotlib keeps the files of its fonts open.
    said = trd.run("replay", str(trace), "--policy", "kv,p2c", "--json", "--seed", "3", "--plot", str(figure), *pools)
    found = [json.loads(each) for each in said.out.splitlines()]
    assert [each["policy"] for each in found] == ["kv", "p2c"]
    (row,) = re.findall(r"^\| `replay --policy` \| [^|]* \| ([^;]*);", (ROOT / "docs/cli-json.md").read_text(), re.M)
    assert found[0].keys() == set(re.findall("`([a-z0-9_]+)`", row))
    assert (found[0]["requests"], len(found[0]["workers"])) == (60, 8)
    drawn = figure.read_text()
    for text in ("chats × 1, 3 prefill + 5 decode workers", "kv", "p2c", "limit: 1.5 s"):
        assert f"<!-- {text} -->" in drawn


def test_a_policy_of_ones_own_is_imported(trace, tmp_path, capsys, monkeypatch):
    (tmp_path / "own_policy.py").write_text("def last(question, candidates):\n    return candidates[-1]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert replay(trace, "--policy", "own_policy:last", "--workers", "2") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("0–60")
    with pytest.raises(Failure, match="own_policy has no 'first'"):
        replay(trace, "--policy", "own_policy:first")


def test_what_cannot_be_replayed_is_refused(trace, tmp_path):
    with pytest.raises(ConfigError, match="kv_linear"):
        replay(trace, "--policy", "kv,best")
    with pytest.raises(Failure, match="cannot read"):
        replay(tmp_path / "none", "--policy", "kv")
    with pytest.raises(Failure, match="at least one policy"):
        replay(trace, "--policy", "kv,,p2c")
    with pytest.raises(Failure, match="no handler"):
        replay(trace, "worker:echo", "--policy", "kv")
    with pytest.raises(InvalidParameter, match="blocks: .* do not fit"):
        replay(trace, "--policy", "kv", "--blocks", "5")
    with pytest.raises(Failure, match="or --policy NAME for a trace"):
        replay(trace)
    with pytest.raises(Failure, match=r"cannot draw .*\.xyz"):
        replay(trace, "--policy", "kv", "--plot", tmp_path / "figure.xyz")
    for option, value in (("--speed", "0"), ("--workers", "0"), ("--ttft", "x")):
        with pytest.raises(SystemExit):
            replay(trace, "--policy", "kv", option, value)

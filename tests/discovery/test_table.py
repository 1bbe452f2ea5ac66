"""The table is what its changes say, and tells its listeners of nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from triton_distributed.discovery import Added, Change, Removed, Snapshot
from triton_distributed.discovery.table import EndpointTable
from triton_distributed.names import EndpointName, Instance

NAME = EndpointName("ns", "comp", "generate")
OTHER = EndpointName("ns", "comp", "generate2")


def instance(id: int, endpoint: EndpointName = NAME, **metadata: object) -> Instance:
    return Instance(endpoint, id, ("tcp://127.0.0.1:1",), "", metadata)


def table(*changes: Change) -> EndpointTable:
    made = EndpointTable(NAME)
    for change in changes:
        made.apply(change)
    return made


def test_it_begins_empty():
    assert (table().instances, dict(table().by_id)) == ((), {})


def test_instances_are_sorted_by_id():
    made = table(Added(instance(5)), Snapshot((instance(9), instance(2), instance(5))), Added(instance(3)))
    assert [each.id for each in made.instances] == [2, 3, 5, 9]
    assert list(made.by_id) == [2, 3, 5, 9]


def test_whoever_holds_the_tuple_may_go_on_reading_it():
    made = table(Added(instance(1)))
    instances, by_id = made.instances, made.by_id
    made.apply(Removed(NAME, 1))
    assert [each.id for each in instances] == [1]
    assert list(by_id) == [1]
    assert made.instances == ()


def test_other_endpoints_do_not_count():
    made = table(Added(instance(1)))
    for change in (Added(instance(2, OTHER)), Removed(OTHER, 1), Snapshot((instance(1), instance(2, OTHER)))):
        made.apply(change)
    assert [each.id for each in made.instances] == [1]


def test_new_metadata_replaces():
    made = table(Added(instance(1, v=1)), Added(instance(1, v=2)))
    assert made.by_id[1].metadata == {"v": 2}
    assert len(made.instances) == 1


def test_what_is_known_already_is_no_change():
    made = table(Added(instance(1, v=1)))
    called = []
    made.listeners.append(lambda: called.append(len(made.instances)))
    for change in (Added(instance(1, v=1)), Removed(NAME, 2), Snapshot((instance(1, v=1),))):
        made.apply(change)
    assert called == []
    made.apply(Snapshot((instance(1, v=2),)))
    made.apply(Snapshot(()))
    assert called == [1, 0]


def test_a_listener_may_remove_itself_and_add_others():
    made = table()
    called = []

    def once() -> None:
        called.append("once")
        made.listeners.remove(once)
        made.listeners.append(lambda: called.append("late"))

    made.listeners += [once, lambda: called.append("always")]
    made.apply(Added(instance(1)))
    assert called == ["once", "always"]
    made.apply(Added(instance(2)))
    assert called == ["once", "always", "always", "late"]


def test_its_repr_says_what_it_holds():
    assert repr(table(Added(instance(4)))) == "<EndpointTable ns.comp.generate ids=[4]>"


instances = st.builds(
    lambda id, endpoint, v: instance(id, endpoint, v=v),
    st.integers(1, 6),
    st.sampled_from([NAME, OTHER]),
    st.integers(0, 2),
)
changes = st.one_of(
    st.builds(Added, instances),
    st.builds(Removed, st.sampled_from([NAME, OTHER]), st.integers(1, 6)),
    st.builds(lambda found: Snapshot(tuple(found)), st.lists(instances, max_size=6)),
)


@given(st.lists(changes, max_size=30))
def test_it_holds_what_its_changes_amount_to(history: list[Change]):
    made = EndpointTable(NAME)
    called: list[int] = []
    made.listeners.append(lambda: called.append(len(made.instances)))
    model: dict[int, object] = {}
    for change in history:
        before, calls = dict(model), len(called)
        if isinstance(change, Snapshot):
            model = {each.id: each.metadata["v"] for each in change.instances if each.endpoint == NAME}
        elif isinstance(change, Added):
            if change.instance.endpoint == NAME:
                model[change.instance.id] = change.instance.metadata["v"]
        elif change.endpoint == NAME:
            model.pop(change.instance_id, None)
        made.apply(change)
        assert {each.id: each.metadata["v"] for each in made.instances} == model
        assert [each.id for each in made.instances] == sorted(model)
        assert dict(made.by_id) == {each.id: each for each in made.instances}
        assert len(called) - calls == (model != before)

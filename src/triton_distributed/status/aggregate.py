"""One metrics page for several replicas: their pages merged, with a label that names the replica. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

LABEL = "replica"
"""The label that names the replica. A label of this name on a replica's own page becomes `exported_replica`."""

DRAINING = "draining"
"""The label that tells a process that another one has replaced from its successor: the process id. Its counters are
series of their own, so that none goes back when it ends."""

UP = "triton_replica_up"


def merged(
    pages: Mapping[str, str | None],
    accept: str = "",
    more: Iterable[Metric] = (),
    draining: Mapping[str, tuple[str, str]] | None = None,
) -> tuple[bytes, str]:
    """Merge the metrics pages of replicas.

    A page that is missing or malformed does not spoil the others: `triton_replica_up` says of each replica whether its
    metrics are here. If two replicas of different versions disagree about the type of a metric, the first one counts.

    Args:
        pages: each replica's page in Prometheus' text format; None for a replica that has not answered.
        accept: the `Accept` header of the request; it chooses between Prometheus' text format and OpenMetrics.
        more: metrics of the program that asks the replicas.
        draining: the pages of replaced processes that still drain, each with its replica, by their process ids.

    Returns:
        the page, and its content type.
    """
    encode, content_type = choose_encoder(accept)
    return encode(_Merged(pages, more, draining or {})), content_type


class _Merged:
    """A collector over pages, in the form that the encoders of prometheus-client read."""

    def __init__(
        self, pages: Mapping[str, str | None], more: Iterable[Metric], draining: Mapping[str, tuple[str, str]]
    ) -> None:
        self._pages, self._more, self._draining = pages, more, draining

    def collect(self) -> Iterator[Metric]:
        """The families of all pages, each once."""
        up = GaugeMetricFamily(UP, "Whether the replica's metrics are on this page.", labels=[LABEL])
        families: dict[str, Metric] = {}
        for replica, page in self._pages.items():
            up.add_metric([replica], 1 if _add(families, page or "", {LABEL: replica}) else 0)
        for pid, (replica, page) in self._draining.items():
            _add(families, page, {LABEL: replica, DRAINING: pid})
        own = {each.name: each for each in (up, *self._more)}
        for name in own:
            families.pop(name, None)
        yield from own.values()
        yield from families.values()


def _add(families: dict[str, Metric], page: str, own: Mapping[str, str]) -> bool:
    """Add the samples of one page, with labels; return whether it has any."""
    try:
        found = list(text_string_to_metric_families(page))
    except ValueError:  # An error page, or the metrics of a program that breaks the format.
        return False
    for family in found:
        known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        if known.type == family.type:
            known.samples += [each._replace(labels=_labelled(each.labels, own)) for each in family.samples]
    return bool(found)


def _labelled(labels: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    return {**{f"exported_{name}" if name in own else name: value for name, value in labels.items()}, **own}

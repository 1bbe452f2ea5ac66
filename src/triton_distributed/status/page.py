"""The metrics page: the runtime's own metrics and those of the program, for Prometheus.

A request costs additions only; the page does the work when it is asked for. It is made in any thread but the loop's. As
both need the interpreter's lock, the page gives it back after each piece of work. A metric of the program that clashes
with another one, or that cannot be read, is left out, and the log says so once.
"""

from __future__ import annotations

import copy
import gzip
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from triton_distributed.quiet import Quiet
from triton_distributed.status.families import BY_NAME, LEFT_OUT, Family
from triton_distributed.status.metrics import Collects, Sources
from triton_distributed.status.readings import Buckets, Row, readings

logger = logging.getLogger("triton_distributed.status")

WORK_S = 0.001
"""Seconds that the page works before it gives the interpreter's lock to the loop. It must not do so too often: from a
busy loop it gets the lock back only after Python's switch interval of 5 ms."""

BREATH_S = 0.0001
"""Seconds for which it gives the lock away. With 0 it would often take it back before the loop wakes."""

SOME_LINES = 16
"""Lines that are made between two looks at the clock: about 100 microseconds."""

COMPRESSION = 5
"""Level of gzip: higher levels take twice the time and save some per cent."""

SUFFIXES = {
    "counter": ("_total", "_created"),
    "summary": ("_sum", "_count", "_created"),
    "histogram": ("_bucket", "_sum", "_count", "_created"),
    "gaugehistogram": ("_bucket", "_gsum", "_gcount"),
    "info": ("_info",),
}
"""What the lines of a metric add to its name, by its type."""

OFTEN_TWICE = ("process_", "python_")
"""Metrics of prometheus-client itself, which a program may register again: they are on the page once."""

END = b"# EOF\n"


class Rendering:
    """Makes the pages of one runtime.

    Args:
        sources: the runtime's counters.
        added: registries of the program; more may be added.
    """

    def __init__(self, sources: Sources, added: Sequence[Collects]) -> None:
        self._sources, self._added = sources, added
        self._reported = Quiet()

    def page(self, accept: str, accept_encoding: str, paced: bool) -> tuple[bytes, str, str]:
        """Make a page; see `Metrics.page`.

        Args:
            paced: give the interpreter's lock to the loop again and again.

        Returns:
            the body, its type and its encoding.
        """
        encode, content_type = choose_encoder(accept)
        body = b"".join(self._parts(encode, _Pace().pause if paced else _do_nothing))
        if content_type.startswith("application/openmetrics-text"):
            body += END
        if gzip_accepted(accept_encoding):
            return gzip.compress(body, COMPRESSION), content_type, "gzip"
        return body, content_type, ""

    def _parts(self, encode: Callable[[Any], bytes], pause: Callable[[], None]) -> Iterator[bytes]:
        for family, rows in readings(self._sources, pause):
            yield _encoded(encode, _metric(family), _samples(family.name, rows), pause)
        left_out = 0
        names = {name for family in BY_NAME.values() for name in _exposed(_metric(family))}
        for metric in self._of_program():
            clashing = _exposed(metric) & names
            names |= _exposed(metric)
            if clashing and metric.name.startswith(OFTEN_TWICE):
                continue
            try:
                if clashing:
                    raise ValueError(f"{', '.join(sorted(clashing))} is on the page already: rename one of them")
                part = _encoded(encode, metric, metric.samples, pause)
            except Exception as error:  # A collector may hold anything.
                left_out += 1
                self._report(f"{metric.name} is left out of the metrics page", error)
            else:
                yield part
        yield _encoded(encode, _metric(LEFT_OUT), _samples(LEFT_OUT.name, [({}, left_out)]), pause)

    def _of_program(self) -> Iterator[Metric]:
        for registry in (REGISTRY, *self._added):
            try:
                yield from registry.collect()
            except Exception as error:  # A collector may raise anything.
                self._report(f"the metrics page lacks the rest of {registry!r}", error)

    def _report(self, words: str, error: Exception) -> None:
        if self._reported.due(words) is not None:
            # prometheus-client adds the whole metric to the error's arguments.
            logger.warning("%s: %s: %s", words, type(error).__name__, error.args[0] if error.args else "")


class _One:
    """A collector of one metric, as the encoders of prometheus-client read it."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> tuple[Metric]:
        return (self._metric,)


class _Paced:
    """Samples whose reader makes pauses."""

    def __init__(self, samples: Iterable[Sample], pause: Callable[[], None]) -> None:
        self._samples, self._pause = samples, pause

    def __iter__(self) -> Iterator[Sample]:
        for number, sample in enumerate(self._samples, 1):
            yield sample
            if number % SOME_LINES == 0:
                self._pause()


def _encoded(
    encode: Callable[[Any], bytes], metric: Metric, samples: Iterable[Sample], pause: Callable[[], None]
) -> bytes:
    paced: Any = copy.copy(metric)  # It may be the program's own object.
    paced.samples = _Paced(samples, pause)
    part = encode(_One(paced))
    pause()
    return part.removesuffix(END)


def _exposed(metric: Metric) -> set[str]:
    """All names that the lines of a metric may have."""
    return {metric.name, *(metric.name + suffix for suffix in SUFFIXES.get(metric.type, ()))}


def _metric(family: Family) -> Metric:
    if family.kind == "counter":
        return Metric(family.name.removesuffix("_total"), family.text, "counter")
    return Metric(family.name, family.text, family.kind)


def _samples(name: str, rows: Iterable[Row]) -> Iterator[Sample]:
    for given, value in rows:
        labels = dict(given)
        if not isinstance(value, Buckets):
            yield Sample(name, labels, value)
            continue
        below = 0
        for bound, count in zip((*map(str, value.bounds), "+Inf"), value.counts, strict=True):
            below += count
            yield Sample(f"{name}_bucket", {**labels, "le": bound}, below)
        yield Sample(f"{name}_count", labels, below)
        yield Sample(f"{name}_sum", labels, value.total)


class _Pace:
    """Gives the interpreter's lock away after each `WORK_S` of work."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Called between two pieces of work."""
        if time.perf_counter() - self._since > WORK_S:
            time.sleep(BREATH_S)
            self._since = time.perf_counter()


def _do_nothing() -> None:
    pass

"""The table of `trd top`, as plain text with styles: which rows and columns, in which order. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from triton_distributed.cli.load import duration
from triton_distributed.cli.top_workers import Row
from triton_distributed.runtime.rates import EndpointRates, total

LATE_S = 0.1
"""Lag of an event loop that is shown as a problem, in seconds: callers of every request notice it."""

NARROWEST = 6
"""The width of the narrowest column, so that columns seldom move when figures change."""

REASONS = 6
"""The most lines that say why a worker does not answer."""


class Figures(NamedTuple):
    """The figures of one line: those of an endpoint, and of its worker or its workers."""

    rates: EndpointRates
    lag_s: float | None
    bytes_per_s: float


class Entry(NamedTuple):
    """One line of the table: an endpoint, or, below it, one of its instances.

    Attributes:
        name: the endpoint's name, or the instance's id.
        state: of an instance its state, of an endpoint how many of its instances answer.
        well: nothing is wrong.
        figures: None without an answer.
        rows: the instances.
        instance: it is an instance.
    """

    name: str
    state: str
    well: bool
    figures: Figures | None
    rows: tuple[Row, ...]
    instance: bool


class Cell(NamedTuple):
    """Text and its style: empty, `dim`, `bold` or `red`; several with spaces between."""

    text: str
    style: str = ""


class Column(NamedTuple):
    """One column.

    Attributes:
        key: its name for `--sort`.
        title: its header.
        keep: how long it stays when the terminal is narrow: the lowest leaves first.
        cell: the text of its figures.
        order: by what it is sorted, largest first.
    """

    key: str
    title: str
    keep: int
    cell: Callable[[Figures], Cell]
    order: Callable[[Figures], float]


def number(value: float) -> str:
    """A number with about three digits, e.g. `0`, `2.5`, `1,234`, `56.7k`, `8.9M`."""
    if value < 9.95:
        return f"{value:.1f}".removesuffix(".0")
    if value < 9_999.5:
        return f"{value:,.0f}"
    for unit in "kMGTP":
        value /= 1000
        if value < 99.95 or unit == "P":
            return f"{value:.1f}{unit}"
        if value < 999.5:
            return f"{value:.0f}{unit}"
    raise AssertionError


def _trouble(value: float) -> Cell:
    return Cell(number(value), "red bold" if value else "dim")


def _of(taken: int, limit: int | None, full: bool) -> Cell:
    return Cell(f"{taken}" if limit is None else f"{taken}/{limit}", "red bold" if full else "" if taken else "dim")


def _running(figures: Figures) -> Cell:
    each = figures.rates
    return _of(each.running, each.max_inflight, False)


def _waiting(figures: Figures) -> Cell:
    each = figures.rates
    limit = each.max_queue if each.max_inflight is not None else None
    return _of(each.waiting, limit, bool(limit) and each.waiting >= each.max_queue)


def _seconds(value: float | None, late_s: float = float("inf")) -> Cell:
    if value is None:
        return Cell("-", "dim")
    # A bucket of the histogram spans a factor of two or more, so more digits would mean nothing.
    return Cell(duration(float(f"{value:.2g}")), "red bold" if value > late_s else "")


COLUMNS = (
    Column("requests", "REQ/S", 9, lambda f: Cell(number(f.rates.requests_per_s)), lambda f: f.rates.requests_per_s),
    Column("errors", "ERR/S", 8, lambda f: _trouble(f.rates.errors_per_s), lambda f: f.rates.errors_per_s),
    Column("refused", "REFUSED/S", 6, lambda f: _trouble(f.rates.refused_per_s), lambda f: f.rates.refused_per_s),
    Column("running", "RUNNING", 5, _running, lambda f: f.rates.running),
    Column("queue", "QUEUE", 7, _waiting, lambda f: f.rates.waiting),
    Column("p50", "P50", 2, lambda f: _seconds(f.rates.duration_s(0.5)), lambda f: f.rates.duration_s(0.5) or 0.0),
    Column("p99", "P99", 4, lambda f: _seconds(f.rates.duration_s(0.99)), lambda f: f.rates.duration_s(0.99) or 0.0),
    Column(
        "first",
        "FIRST P99",
        0,
        lambda f: _seconds(f.rates.first_item_s(0.99)),
        lambda f: f.rates.first_item_s(0.99) or 0,
    ),
    Column("lag", "LAG", 3, lambda f: _seconds(f.lag_s, LATE_S), lambda f: f.lag_s or 0.0),
    Column("items", "ITEMS/S", 0, lambda f: Cell(number(f.rates.items_per_s)), lambda f: f.rates.items_per_s),
    Column("bytes", "BYTES/S", 1, lambda f: Cell(number(f.bytes_per_s)), lambda f: f.bytes_per_s),
)

ENDPOINT = "endpoint"
SORTS = (ENDPOINT, *(each.key for each in COLUMNS))
"""What the table can be sorted by."""


class View(NamedTuple):
    """What of the table is shown.

    Attributes:
        sort: one of `SORTS`.
        reverse: the smallest first; of names the last.
        folded: only endpoints, without their instances.
        first: the number of lines that are scrolled away above.
    """

    sort: str = ENDPOINT
    reverse: bool = False
    folded: bool = False
    first: int = 0

    def pressed(self, key: str) -> View:
        """The view after a key was pressed. An unknown key changes nothing."""
        at = SORTS.index(self.sort)
        if key in ("right", "left"):
            return self._replace(sort=SORTS[(at + (1 if key == "right" else -1)) % len(SORTS)], first=0)
        if key == "r":
            return self._replace(reverse=not self.reverse, first=0)
        if key == "e":
            return self._replace(folded=not self.folded, first=0)
        steps = {"down": 1, "up": -1, "page down": 10, "page up": -10}
        return self._replace(first=max(0, self.first + steps.get(key, 0)))


def _place(row: Row) -> tuple[str, int]:
    return row.endpoint, row.instance_id


def _figures(rows: Sequence[Row]) -> Figures | None:
    found = [(each.rates, each.worker) for each in rows if each.rates is not None and each.worker is not None]
    if not found:
        return None
    return Figures(
        total(rates for rates, _ in found),
        max((worker.lag_s for _, worker in found if worker.lag_s is not None), default=None),
        sum(worker.received_per_s + worker.sent_per_s for _, worker in found),
    )


def entries(rows: Sequence[Row], view: View) -> list[Entry]:
    """The lines of the table in their order: each endpoint, with its instances below it."""
    by_endpoint: dict[str, list[Row]] = {}
    for row in sorted(rows, key=_place):
        by_endpoint.setdefault(row.endpoint, []).append(row)
    found: list[Entry] = []
    for endpoint in _sorted([_of_endpoint(name, each) for name, each in by_endpoint.items()], view):
        found.append(endpoint)
        if not view.folded:
            found += _sorted([_of_instance(each) for each in endpoint.rows], view)
    return found


def _of_endpoint(name: str, rows: Sequence[Row]) -> Entry:
    listed = [each for each in rows if each.state != "gone"]
    answering = sum(not each.reason for each in listed)
    state = f"{answering} of {len(listed)}" if answering < len(listed) else f"{len(listed)} up"
    return Entry(name, state, all(each.well for each in rows), _figures(rows), tuple(rows), False)


def _of_instance(row: Row) -> Entry:
    return Entry(str(row.instance_id), row.state, row.well, _figures([row]), (row,), True)


def _sorted(found: list[Entry], view: View) -> list[Entry]:
    if view.sort == ENDPOINT:
        return found[::-1] if view.reverse else found
    order = COLUMNS[SORTS.index(view.sort) - 1].order
    sign = 1 if view.reverse else -1
    return sorted(found, key=lambda each: sign * (-1.0 if each.figures is None else order(each.figures)))


def lines(found: Sequence[Entry], view: View, width: int) -> list[list[Cell]]:
    """The table as lines of cells, each of which has its column's width. The first line is the header.

    Args:
        width: columns of the terminal. Columns of the table that do not fit are left out; names may be cut.
    """
    shown = [_cells(each) for each in found]
    header = [Cell("ENDPOINT"), Cell("STATE"), *(Cell(each.title) for each in COLUMNS)]
    header = [
        each._replace(style="reverse" if key == view.sort else "bold")
        for key, each in zip((ENDPOINT, "", *SORTS[1:]), header, strict=True)
    ]
    table = [header, *shown]
    widths = [max(NARROWEST, *(len(line[at].text) for line in table)) for at in range(len(header))]
    kept = list(range(len(header)))
    for at in sorted(range(2, len(header)), key=lambda each: COLUMNS[each - 2].keep):
        if sum(widths[each] + 2 for each in kept) - 2 <= width:
            break
        kept.remove(at)
    rest = sum(widths[each] + 2 for each in kept[1:])
    widths[0] = max(min(widths[0], width - rest), min(widths[0], 12))
    return [[_padded(line[at], widths[at], at >= 2) for at in kept] for line in table]


def _padded(cell: Cell, width: int, right: bool) -> Cell:
    text = cell.text if len(cell.text) <= width else cell.text[: width - 1] + "…"
    return cell._replace(text=text.rjust(width) if right else text.ljust(width))


def _cells(entry: Entry) -> list[Cell]:
    style = "" if entry.instance else "bold"
    name = Cell(("  " if entry.instance else "") + entry.name, style)
    state = Cell(entry.state, "red bold" if not entry.well else style)
    if entry.figures is None:
        return [name, state, *(Cell("-", "dim") for _ in COLUMNS)]
    return [name, state, *(each.cell(entry.figures) for each in COLUMNS)]


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why workers do not answer or are not healthy: one line for each."""
    words = [(each.instance_id, each.reason or each.problems) for each in sorted(rows, key=_place)]
    found = [each for each in dict.fromkeys(words) if each[1]]
    more = [f"{len(found) - REASONS} more instances have a reason"] if len(found) > REASONS else []
    return [f"instance {id}: {reason}" for id, reason in found[:REASONS]] + more


def summary(rows: Sequence[Row], where: str, interval_s: float) -> str:
    """The line above the table."""
    figures = _figures(rows)
    workers = {each.instance_id for each in rows if each.state != "gone"}
    silent = {each.instance_id for each in rows if each.reason and each.state != "gone"}
    words = f"{len(workers)} worker{'' if len(workers) == 1 else 's'}"
    if silent:
        words += f", {len(silent)} without an answer"
    if figures is not None:
        words += f"  {number(figures.rates.requests_per_s)} requests/s"
    return f"trd top  {words}  every {interval_s:g} s  {where}"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values for JSON. Rates are per second and times in seconds; ids are text."""
    return [_plain(each) for each in sorted(rows, key=_place)]


def _plain(row: Row) -> dict[str, Any]:
    plain: dict[str, Any] = {"endpoint": row.endpoint, "instance": str(row.instance_id), "state": row.state}
    if words := row.reason or row.problems:
        plain["reason"] = words
    if row.rates is None or row.worker is None:
        return plain
    rates, worker = row.rates, row.worker
    return plain | {
        "requests_per_s": rates.requests_per_s,
        "errors_per_s": rates.errors_per_s,
        "refused_per_s": rates.refused_per_s,
        "items_per_s": rates.items_per_s,
        "running": rates.running,
        "max_inflight": rates.max_inflight,
        "waiting": rates.waiting,
        "max_queue": rates.max_queue,
        "p50_s": rates.duration_s(0.5),
        "p99_s": rates.duration_s(0.99),
        "first_item_p50_s": rates.first_item_s(0.5),
        "first_item_p99_s": rates.first_item_s(0.99),
        "lag_s": worker.lag_s,
        "received_bytes_per_s": worker.received_per_s,
        "sent_bytes_per_s": worker.sent_per_s,
    }

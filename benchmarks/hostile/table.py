"""The rows of `benchmarks.hostile`, for a person."""

from __future__ import annotations

from typing import Any

from benchmarks.hostile.bounds import MIB, p99_ratio

HEAD = (
    f"{'attack':18}  {'RSS MiB before/peak/after':>25}  {'CPU':>4}  {'fds':>11}  {'tasks':>11}  {'p50 ms':>11}  "
    f"{'p99 ms':>13}  {'×':>5}  {'dial ms':>7}  {'failed':>6}  rate"
)


def _rates(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number / row['seconds']:,.0f}/s" for name, number in row["attacker"].items())


def _line(row: dict[str, Any]) -> str:
    quiet, load = row["quiet"], row["load"]
    rss = "/".join(f"{row[name] / MIB:,.0f}" for name in ("rss_before", "rss_peak", "rss_after"))
    middle = {name: sum(each[name] for each in quiet) / len(quiet) for name in ("p50_ms", "p99_ms")}
    return (
        f"{row['attack']:18}  {rss:>25}  {row['cpu']:4.0%}  {row['fds'][0]:>5}→{row['fds'][1]:<5}  "
        f"{row['tasks'][0]:>5}→{row['tasks'][1]:<5}  {middle['p50_ms']:5.2f}→{load['p50_ms']:5.2f}  "
        f"{middle['p99_ms']:6.2f}→{load['p99_ms']:6.2f}  {p99_ratio(row):5.1f}  {load['dial_max_ms']:7.0f}  "
        f"{sum(load['failed'].values()):>6}  {_rates(row)}"
    )


def render(rows: list[dict[str, Any]], heading: bool = True) -> str:
    """Lines of a table, the broken bounds under each."""
    lines = [HEAD] if heading else []
    for row in rows:
        lines.append(_line(row))
        lines += [f"    BROKEN: {each}" for each in row["broken"]]
    return "\n".join(lines)

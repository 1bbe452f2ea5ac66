"""The status port of a program with replicas: one address for all of them.

Each replica has a status port of its own on any free port, and reports its address to the supervisor. The supervisor
asks the replicas in threads, so a replica that stands still delays no other, and no request passes through its loop.
"""

from __future__ import annotations

import html
import http.client
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
from prometheus_client.metrics_core import CounterMetricFamily, Metric

from triton_distributed.status.aggregate import LABEL, merged
from triton_distributed.status.http import JSON, Request, Response, error_response, json_response
from triton_distributed.status.port import RESERVED
from triton_distributed.status.routes import AT_ONCE, LIMIT_S
from triton_distributed.status.server import HttpServer
from triton_distributed.supervisor.place import Place
from triton_distributed.supervisor.process import Process

PROBE_S = 0.9
"""Seconds for which a replica is asked whether it is ready: Kubernetes waits one second for a probe by default."""

ASK_S = 5.0
"""Seconds for which a replica is asked for its other pages. Prometheus waits ten seconds for a page by default."""

STYLE = "body{font:16px system-ui;margin:2em}td,th{text-align:left;padding:.3em 1.5em .3em 0}"

PASSED_BACK = ("Allow", "Content-Security-Policy", "Referrer-Policy", "Retry-After", "Vary")
"""The headers of a replica's response that are passed on, besides the type of its content."""

_ONE = re.compile(r"/replicas/([0-9]{1,6})(/.*)?", re.DOTALL)


class StatusPage:
    """Answers requests to the status port of a supervisor.

    Args:
        host, port: where it listens; port 0 for any free one.
        places: the replicas. Their plain attributes are read in the threads of requests.
        starting: returns whether the replicas have not all been ready yet.
        stopping: returns whether all replicas are to end.

    Attributes:
        url: where it listens.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(
        self, host: str, port: int, places: Sequence[Place], starting: Callable[[], bool], stopping: Callable[[], bool]
    ) -> None:
        self._places, self._starting, self._stopping = places, starting, stopping
        self._pages: dict[str, Callable[[Request], Response]] = {
            "/": self._index,
            "/live": lambda _: json_response({"live": True}),
            "/ready": self._ready,
            "/health": self._health,
            "/metrics": self._metrics,
            "/statistics": self._statistics,
        }
        self._routes = threading.BoundedSemaphore(AT_ONCE)
        self._server = HttpServer(host, port, self._answer, lambda: True)
        self.url = self._server.url

    async def close(self) -> None:
        """Close the port; the rest as for `HttpServer.close`."""
        await self._server.close()

    def _answer(self, request: Request) -> Response:
        if (found := _ONE.fullmatch(request.path)) is not None:
            if found[2] is None:  # The paths in the replica's dashboard are relative.
                return json_response({}, 308, {"Location": f"{request.path}/"})
            return self._forward(int(found[1]), found[2], request)
        page = self._pages.get(request.path.rstrip("/") or "/")
        if page is None:
            words = f"there is no page {request.path!r}: / lists all pages"
            return error_response(404, f"{words}; a replica's pages and routes are at /replicas/N{request.path}")
        if request.method != "GET":
            return error_response(405, f"{request.path} takes GET requests", {"Allow": "GET, HEAD"})
        return page(request)

    def _index(self, request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return _overview([(_described(place), problems) for place, _, problems in self._examined()])
        pages = [*self._pages, *(f"/replicas/{each.index}/" for each in self._places)]
        lists = (_object(each) for each in self._ask_all("/", PROBE_S) if each is not None and each.status == 200)
        found = next(lists, {})  # All replicas run the same program.
        of_each = {name: list(map(_of_each, found.get(name, ()))) for name in ("pages", "routes")}
        return json_response({"pages": pages, "of_each_replica": of_each}, headers={"Vary": "Accept"})

    def _forward(self, index: int, path: str, request: Request) -> Response:
        """Let one replica answer, for example the dashboard or a route of the program."""
        if index >= len(self._places):
            return error_response(404, f"there is no replica {index}: they are 0 to {len(self._places) - 1}")
        url = self._places[index].status_url
        if not url:
            return error_response(503, f"replica {index} has no status port now")
        asked = request._replace(headers=_passed_on(request))
        try:
            if path.split("/", 2)[1] in RESERVED:
                return _asked(url, path, asked, ASK_S)
            if not self._routes.acquire(blocking=False):
                return error_response(503, f"{AT_ONCE} requests to routes run already", {"Retry-After": "1"})
            try:
                return _asked(url, path, asked, LIMIT_S + ASK_S)
            finally:
                self._routes.release()
        except (OSError, http.client.HTTPException) as error:
            return error_response(502, f"replica {index} does not answer: {str(error) or type(error).__name__}")

    def _ask_all(self, path: str, timeout_s: float) -> list[Response | None]:
        """Ask the processes that have the places; the rest as for `_ask_each`."""
        return _ask_each([each.status_url for each in self._places], path, timeout_s)

    def _ask_with_draining(self, path: str) -> tuple[list[Response | None], list[tuple[Place, Process, Response]]]:
        """Ask all replicas, and the replaced processes that still drain: their requests count, too."""
        draining = [(place, each) for place in self._places for each in place.replaced if not each.is_over]
        urls = [each.status_url for each in self._places] + [each.status_url for _, each in draining]
        answers = _ask_each(urls, path, ASK_S)
        late = zip(draining, answers[len(self._places) :], strict=True)
        found = [(*each, answer) for each, answer in late if answer is not None and answer.status == 200]
        return answers[: len(self._places)], found

    def stuck(self) -> dict[int, str]:
        """The replicas whose event loops have been stuck for `TRD_LIVE_TIMEOUT_S`, each with the place in its code.

        It waits up to `PROBE_S`, so it is called in a thread.
        """
        answers = zip(self._places, self._ask_all("/live", PROBE_S), strict=True)
        found = {each.index: _object(answer) for each, answer in answers}
        # A status port whose connections are all in use answers 503, too.
        return {index: str(live.get("place")) for index, live in found.items() if live.get("live") is False}

    def _ready(self, _: Request) -> Response:
        answers = self._ask_all("/ready", PROBE_S)
        problems = [_problems(*each) for each in zip(self._places, answers, strict=True)]
        good, found = self._judged(problems, sum(not each for each in problems))
        return json_response(found, 200 if good else 503)

    def _examined(self) -> list[tuple[Place, Response | None, list[str]]]:
        """The health of each replica, and its problems."""
        answers = self._ask_all("/health", ASK_S)
        return [(place, answer, _problems(place, answer)) for place, answer in zip(self._places, answers, strict=True)]

    def _health(self, _: Request) -> Response:
        examined = self._examined()
        problems = [each for _, _, each in examined]
        # A replica can be unhealthy and ready.
        ready = sum(
            not each or (place.is_ready and _object(answer).get("ready") is True) for place, answer, each in examined
        )
        good, found = self._judged(problems, ready)
        found["healthy"] = good and not any(problems)
        found["replicas"] = [
            {**_described(place), "problems": problem, "health": _json_of(answer)}
            for place, answer, problem in examined
        ]
        return json_response(found, 200 if found["healthy"] else 503)

    def _judged(self, problems: Sequence[list[str]], ready: int) -> tuple[bool, dict[str, Any]]:
        """Whether clients should call this program: all replicas have been ready, and at least one is so now."""
        reasons = [f"replica {index}: {each}" for index, found in enumerate(problems) for each in found]
        if self._stopping():
            reasons.insert(0, "the program drains")
        elif self._starting():
            reasons.insert(0, "not all replicas have been ready yet")
        good = ready > 0 and not self._stopping() and not self._starting()
        return good, {"ready": good, "ready_replicas": ready, "all_replicas": len(problems), "reasons": reasons}

    def _metrics(self, request: Request) -> Response:
        answers, late = self._ask_with_draining("/metrics")
        pages = {
            str(place.index): answer.body.decode(errors="replace") if answer and answer.status == 200 else None
            for place, answer in zip(self._places, answers, strict=True)
        }
        draining = {
            str(process.pid): (str(place.index), answer.body.decode(errors="replace"))
            for place, process, answer in late
        }
        body, content_type = merged(pages, request.headers.get("accept", ""), [self._restarts()], draining)
        return Response(200, body, content_type)

    def _restarts(self) -> Metric:
        family = CounterMetricFamily(
            "triton_replica_restarts", "Processes of the replica that ended without being asked to.", labels=[LABEL]
        )
        for each in self._places:
            family.add_metric([str(each.index)], each.ends)
        return family

    def _statistics(self, _: Request) -> Response:
        answers, late = self._ask_with_draining("/statistics")
        draining = [
            {"replica": place.index, "pid": process.pid, "statistics": _json_of(answer)}
            for place, process, answer in late
        ]
        return json_response({"replicas": [_json_of(each) for each in answers], "draining": draining})


def _described(place: Place) -> dict[str, Any]:
    process = place.process
    return {
        "replica": place.index,
        "state": place.state,
        "pid": None if process is None else process.pid,
        "restarts": place.ends,
        "last_end": place.last_end,
        "status_url": place.status_url,
    }


def _overview(replicas: Sequence[tuple[Mapping[str, Any], list[str]]]) -> Response:
    """The page for a browser: the replicas, each with a link to its dashboard, and with its problems."""
    rows = [
        f"<tr><td><a href='replicas/{each['replica']}/'>replica {each['replica']}</a>"
        + "".join(
            f"<td>{html.escape('' if text is None else str(text))}"
            for text in (_health_of(each, problems), each["pid"], each["restarts"], each["last_end"])
        )
        for each, problems in replicas
    ]
    text = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=color-scheme content='light dark'>"
        "<meta name=viewport content='width=device-width'><meta http-equiv=refresh content=5><title>Replicas</title>"
        f"<style>{STYLE}</style><h1>{len(rows)} replica(s)</h1>"
        f"<table><tr><th>dashboard<th>state<th>process<th>restarts<th>last end{''.join(rows)}</table>"
    )
    headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'", "Vary": "Accept"}
    return Response(200, text.encode(), "text/html; charset=utf-8", headers)


def _health_of(described: Mapping[str, Any], problems: list[str]) -> str:
    state: str = described["state"]
    return f"unhealthy: {'; '.join(problems)}" if state == "ready" and problems else state


def _problems(place: Place, answer: Response | None) -> list[str]:
    """Why a replica cannot be called; empty if it can."""
    process = place.process
    if process is not None and process.stuck_at is not None:
        return [f"its event loop is stuck at {process.stuck_at}, so it is ended and starts again"]
    if (state := place.state) != "ready":
        return [f"{state}; {place.last_end}" if place.last_end else state]
    if answer is None:
        return ["its status port does not answer"] if place.status_url else []
    if answer.status < 400:
        return []
    reasons = _object(answer).get("reasons")
    return [str(each) for each in reasons or [f"its status port answers with {answer.status}"]]


def _json_of(answer: Response | None) -> Any:
    if answer is None:
        return None
    try:
        return msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _object(answer: Response | None) -> dict[str, Any]:
    """The JSON object in a response; empty if the response has no object."""
    found = _json_of(answer)
    return found if isinstance(found, dict) else {}


def _of_each(page: str) -> str:
    """A page or route of a replica, for example `POST /sleep`, as it is reached here."""
    return "/replicas/N/".join(page.split("/", 1))


def _passed_on(request: Request) -> dict[str, str]:
    return {name: request.headers[name] for name in ("accept", "content-type") if name in request.headers}


def _ask_each(urls: Sequence[str], path: str, timeout_s: float) -> list[Response | None]:
    """Ask all at once, so that silent ones delay no other; None for one that has no status port or does not answer."""

    def ask(url: str) -> Response | None:
        try:
            return _asked(url, path, Request("GET", path, {}, {}), timeout_s) if url else None
        except (OSError, http.client.HTTPException):
            return None

    with ThreadPoolExecutor(len(urls), "trd-status-ask") as pool:
        return list(pool.map(ask, urls))


def _asked(url: str, path: str, request: Request, timeout_s: float) -> Response:
    """Ask one replica.

    Raises:
        OSError, http.client.HTTPException: it does not answer in time, or not with HTTP.
    """
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout_s)
    try:
        target = quote(path, safe="/~") + (f"?{urlencode(request.query)}" if request.query else "")
        connection.request(request.method, target, request.body or None, dict(request.headers))
        answer = connection.getresponse()
        headers = {name: value for name in PASSED_BACK if (value := answer.getheader(name)) is not None}
        return Response(answer.status, answer.read(), answer.getheader("Content-Type", JSON), headers)
    finally:
        connection.close()

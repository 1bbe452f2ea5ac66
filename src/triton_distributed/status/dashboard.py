"""The dashboard: one page of HTML, CSS and JavaScript from the files beside this one.

It fetches `/statistics` and `/statistics/history` once a second. Its policy forbids the browser everything else.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

from triton_distributed.status.http import Response
from triton_distributed.system.fork import no_fork

HTML = "text/html; charset=utf-8"


@functools.cache
def dashboard() -> Response:
    """The page. Reading the files takes about a millisecond, the first time."""
    with no_fork:  # `files` imports modules.
        folder = files(__package__)
    page, style, script = ((folder / f"dashboard.{each}").read_text("utf-8") for each in ("html", "css", "js"))
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    page = page.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Vary": "Accept"}
    return Response(200, page.encode(), HTML, headers)


def _source(text: str) -> str:
    """What a policy calls an inline style or script: the hash of its text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

"""Serves a page that is brought up to date to one person on this machine (decision 032).

It listens on 127.0.0.1 alone. Other accounts of the machine, and pages of the web that are open in the same browser,
reach that address too; so the address holds a secret token, and the name by which the server is called must be this
machine's own (a name that an attacker has turned to 127.0.0.1 is refused). Whoever has no token learns nothing.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import secrets
import signal
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from common.errors import ConfigError, FedSpanError
from common.system.command import number
from common.web.template import SCRIPT, Page, fill

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp, Receive, Scope, Send

_HOSTS = ("127.0.0.1", "localhost")  # names of this machine; of an SSH tunnel's other end, too
_FRESH = 1.0  # seconds for which a page is not made again
_SCRIPT = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{_SCRIPT}'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
Look = Callable[[], Page]


def add_page_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that serves a page."""
    port = number(int, 1, 65535)
    parser.add_argument("--port", type=port, metavar="PORT", help="port of the page on 127.0.0.1 (default: any free)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser as well")


def application(look: Look, token: str) -> "ASGIApp":
    """The server of a page.

    Args:
        look: makes the page as it is now; called at most once a second, by one thread at a time.
        token: secret part of the address.
    """
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

    fresh = _Fresh(look)

    async def answer(request: Request) -> Response:
        _, _, rest = request.url.path.partition("/")
        given, slash, what = rest.partition("/")
        right = secrets.compare_digest(given.encode(), token.encode())
        if not right or _host(request.headers.get("host", "")) not in _HOSTS:
            return PlainTextResponse("forbidden\n", 403)
        if what not in ("", "parts") or request.method not in ("GET", "HEAD"):
            return PlainTextResponse("not found\n", 404)
        if not slash:  # its parts would be asked for elsewhere
            return RedirectResponse(f"/{token}/")
        try:
            page = await run_in_threadpool(fresh.page)
        except FedSpanError as error:  # a file that is damaged or gone; it may come back
            page = _sorry(str(error))
        if what == "":
            return HTMLResponse(page.html(live=True))
        return Response(_changed(page, request.query_params.get("known", "")), media_type="application/json")

    async def app(scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "http":
            response = await answer(Request(scope, receive))
            response.headers.update(_HEADERS)
            await response(scope, receive, send)

    return app


def server(look: Look, token: str) -> "uvicorn.Server":
    """The HTTP server of ``application``."""
    import uvicorn

    config = uvicorn.Config(
        application(look, token),
        log_config=None,
        access_log=False,  # it would write the token down
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def serve(look: Look, port: int | None, *, browser: bool) -> None:
    """Serve a page until the process is asked to end; prints the address.

    Args:
        look: see ``application``.
        port: None: any that is free.
        browser: open the page in this account's browser.

    Raises:
        ConfigError: the port is in use.
    """
    look()  # whatever is wrong is said now, by the command
    token = secrets.token_urlsafe(24)
    with contextlib.closing(socket.socket()) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port or 0))
            listening.listen()  # before anybody has the address
        except OSError as error:
            raise ConfigError(f"--port {port} cannot be had ({error.strerror}); give another, or none") from None
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/{token}/"
        print(address, flush=True)  # noqa: T201
        print("for this machine alone, until Ctrl-C", file=sys.stderr)  # noqa: T201
        if browser:
            webbrowser.open(address)
        signal.signal(signal.SIGTERM, _stop)
        with contextlib.suppress(KeyboardInterrupt):
            server(look, token).run([listening])


class _Fresh:
    """The page as it is now, made at most once a second."""

    def __init__(self, look: Look) -> None:
        self._look, self._lock = look, threading.Lock()
        self._page: Page | None = None
        self._made = 0.0

    def page(self) -> Page:
        with self._lock:
            if self._page is None or time.monotonic() - self._made > _FRESH:
                self._page = self._look()
                self._made = time.monotonic()
            return self._page


def _changed(page: Page, known: str) -> str:
    """The parts of a page that the browser does not have, as JSON."""
    has = set(known.split(","))
    parts = {
        name: {"digest": page.digests[name], "html": html}
        for name, html in page.parts.items()
        if page.digests[name] not in has
    }
    return json.dumps({"title": page.title, "order": list(page.parts), "parts": parts})


def _sorry(reason: str) -> Page:
    head = fill(Path(__file__).with_name("sorry.html"), reason=reason)
    return Page("cannot be read", head, [])


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    return header.rpartition(":")[0] if ":" in header else header


def _stop(signal_: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt

"""A real Chromium, and pages served to it."""

import contextlib
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from common.web.serve import Look, server

NAMES = ("chromium", "chromium-browser", "google-chrome")
PICTURES = Path(__file__).parents[2] / "build" / "pages"
TOKEN = "token-of-a-test"  # noqa: S105 - of a page in a test
Serve = Callable[[Look], str]
Open = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.fail(f"no browser: {', '.join(NAMES)} is not on the PATH; apt-get install chromium")
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=program, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves a page until the test is over; returns its address."""
    with contextlib.ExitStack() as stack:

        def start(look: Look) -> str:
            listening = stack.enter_context(contextlib.closing(socket.socket()))
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            program = server(look, TOKEN)
            thread = threading.Thread(target=program.run, args=([listening],))
            thread.start()
            stack.callback(thread.join)
            stack.callback(lambda: setattr(program, "should_exit", True))
            return f"http://127.0.0.1:{listening.getsockname()[1]}/{TOKEN}/"

        yield start


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens an address in a window of its own; whatever goes wrong there fails the test."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def open_(
        address: str, *, width: int = 1280, scheme: Any = "light", script: bool = True, answer: Any = None
    ) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda told: wrong.append(told.text) if told.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"a dialog: {dialog.message}"), dialog.dismiss())[1])
        origin = "/".join(address.split("/")[:3])
        page.on("request", lambda asked: None if asked.url.startswith((origin, "data:")) else wrong.append(asked.url))
        if answer is not None:
            page.on("response", answer)
        page.goto(address)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def picture(request: pytest.FixtureRequest) -> Callable[[Page, str], None]:
    """Keeps a picture of a whole page, for people to look at."""

    def keep(page: Page, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=PICTURES / f"{name}.png", full_page=True)

    return keep

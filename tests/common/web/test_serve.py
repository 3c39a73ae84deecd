"""A page is served to whoever has its address, and to nobody else."""

import asyncio
import base64
import hashlib
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from markupsafe import Markup

from common.errors import ConfigError, RunFolderError
from common.web import serve
from common.web.serve import application
from common.web.template import Page, Section
from deploy.cli import main
from tests.harness.sample_run import begin, completed

TOKEN = "right-token"  # noqa: S105 - of a page in a test


class Told:
    """A page whose text can be changed."""

    def __init__(self) -> None:
        self.text, self.error, self.calls = "first", "", 0

    def __call__(self) -> Page:
        self.calls += 1
        if self.error:
            raise RunFolderError(self.error)
        sections = [Section(name, name, name, Markup("<p>{}</p>").format(text)) for name, text in self.all()]
        return Page("a page", Markup("<h1>a page</h1>"), sections)

    def all(self) -> list[tuple[str, str]]:
        return [("now", self.text), ("then", "as it was")]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(serve, "_FRESH", -1.0)
    return Told()


class Client:
    """Asks the application, without a socket."""

    def __init__(self, look: Told) -> None:
        self._app = application(look, TOKEN)

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self._app)) as client:
                return await client.request(method, f"http://127.0.0.1:8000{path}", **more)

        return asyncio.run(ask())

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.request("GET", path, **more)


@pytest.fixture
def client(told: Told) -> Client:
    return Client(told)


@pytest.mark.parametrize("path", ["/", "/wrong-token/", "/wrong-token/parts", "/right-tokenx/", "/rightñ/", "//", "/x"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_the_token_nothing_is_told(client: Client, told: Told, path: str, method: str) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.text) == (403, "forbidden\n")
    assert told.calls == 0


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "192.168.0.7:8000"]
)
def test_name_that_leads_to_this_machine_is_refused(client: Client, told: Told, host: str) -> None:
    answer = client.get(f"/{TOKEN}/", headers={"Host": host})
    assert (answer.status_code, answer.text) == (403, "forbidden\n")
    assert told.calls == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9000", "127.0.0.1:8000"])
def test_own_names_are_answered_also_through_a_tunnel(client: Client, host: str) -> None:
    assert client.get(f"/{TOKEN}/", headers={"Host": host}).status_code == 200


def test_nothing_but_the_page_is_there_and_it_can_only_be_read(client: Client) -> None:
    assert client.get(f"/{TOKEN}/other").status_code == 404
    without = client.get(f"/{TOKEN}")
    assert (without.status_code, without.headers["Location"]) == (307, f"/{TOKEN}/")
    assert client.get(f"/{TOKEN}/../etc/passwd").status_code == 403
    assert client.request("POST", f"/{TOKEN}/").status_code == 404


def test_every_answer_forbids_what_it_does_not_need(client: Client) -> None:
    for path in (f"/{TOKEN}/", f"/{TOKEN}/parts", "/wrong/"):
        headers = client.get(path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
    (script,) = re.findall(r"<script>(.*?)</script>", client.get(f"/{TOKEN}/").text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["script-src"] == f"'sha256-{digest}'"


def test_only_what_has_changed_is_sent_again(client: Client, told: Told) -> None:
    page = client.get(f"/{TOKEN}/").text
    known = re.findall(r'data-digest="(\w+)"', page)
    assert len(known) == 3
    assert "first" in page

    def ask() -> dict[str, Any]:
        return dict(client.get(f"/{TOKEN}/parts", params={"known": ",".join(known)}).json())

    assert ask() == {"title": "a page", "order": ["head", "now", "then"], "parts": {}}
    told.text = "<script>second</script>"
    parts = ask()["parts"]
    assert parts.keys() == {"now"}
    assert "&lt;script&gt;second" in parts["now"]["html"]
    known.append(parts["now"]["digest"])
    assert ask()["parts"] == {}


def test_page_that_cannot_be_made_says_why_and_comes_back(client: Client, told: Told) -> None:
    told.error = "events.jsonl, line 3: not valid JSON <b>"
    answer = client.get(f"/{TOKEN}/")
    assert "events.jsonl, line 3: not valid JSON &lt;b&gt;" in answer.text
    assert client.get(f"/{TOKEN}/parts").json()["order"] == ["head"]
    told.error = ""
    assert "first" in client.get(f"/{TOKEN}/").text


def test_page_is_made_once_a_second_however_often_it_is_asked_for(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_FRESH", 3600.0)
    client = Client(told)
    for _ in range(5):
        client.get(f"/{TOKEN}/")
    assert told.calls == 1


def test_port_in_use_and_run_that_is_not_there_are_one_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", "gone", "--web", "--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'gone'} holds no run\n"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port} cannot be had .Address already in use.; give another"):
            serve.serve(Told(), port, browser=False)
    assert main(["watch", "gone", "--port", "8000"]) == 2
    assert "give --web as well" in capsys.readouterr().err


def test_command_prints_an_address_that_this_machine_alone_reaches(tmp_path: Path) -> None:
    begin(tmp_path / "run").close()
    command = [sys.executable, "fedspan.py", "watch", "run", "--web", "--runs", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        answer = httpx.get(address)
        assert answer.status_code == 200
        assert "This run has died" in answer.text
        assert httpx.get(address.rsplit("/", 2)[0] + "/").status_code == 403
        process.terminate()
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", address)
    assert address.split("/")[3] not in told


def test_finished_run_is_served_without_a_section_about_now(tmp_path: Path) -> None:
    from server.report.live import LivePage

    run = completed(tmp_path / "run")
    page = LivePage(run)()
    assert [section.id for section in page.sections][:2] == ["result", "curves"]
    assert json.dumps("completed")[1:-1] in page.head

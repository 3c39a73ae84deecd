"""A standing server: sites come before there is a run, stay for two of them, and a SuperLink that dies comes back."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from common.system.processes import ProcessGroup, Started, free_ports
from deploy.cli import main
from deploy.sandbox.flower import kill, wait_for
from deploy.sandbox.tiny import make_federation
from server.run.folder import read_lines, read_run
from tests.harness.processes import FEDSPAN, SECONDS, environment

pytestmark = pytest.mark.timeout(1200)
SITES = ("site-a", "site-b")


class Place:
    """A standing server with TLS and a register, and two sites that have joined it."""

    def __init__(self, folder: Path, group: ProcessGroup) -> None:
        self.folder, self.group = folder, group
        self.federation = make_federation(folder, dict.fromkeys(SITES, 9), local=None, rounds=1)
        (self.port,) = free_ports(1)
        pki, register = folder / "pki", folder / "sites.json"
        for command in (
            ["keys", "ca", pki],
            ["keys", "server", pki],
            *(["keys", "site", folder / site] for site in SITES),
            *(["sites", "add", register, site, folder / f"{site}.pub"] for site in SITES),
            *(["site", "agree", self.federation, "--site", folder / f"{site}.yaml", "--yes"] for site in SITES),
        ):
            assert main([str(part) for part in command]) == 0
        tls = ["--ssl-ca-certfile", f"{pki}/ca.crt", "--ssl-certfile", f"{pki}/server.pem"]
        tls += ["--ssl-keyfile", f"{pki}/server.key", "--registry", str(register)]
        self.start = ["server", "start", "--home", str(folder / "server"), "--fleet-api-address"]
        self.start += [f"127.0.0.1:{self.port}", *tls]
        self.server = group.start("server", [*FEDSPAN, *self.start], environment())
        link = ["--superlink", f"127.0.0.1:{self.port}", "--root-certificates", f"{pki}/ca.crt", "--poll", "0.5"]
        self.sites = [self._join(site, link) for site in SITES]

    def _join(self, site: str, link: list[str]) -> Started:
        own = [str(self.folder / f"{site}.yaml"), "--auth-supernode-private-key", str(self.folder / f"{site}.key")]
        status = ["--status", str(self.folder / f"{site}.status")]
        return self.group.start(site, [*FEDSPAN, "site", "join", *own, *link, *status], environment())

    def superlink(self) -> psutil.Process:
        """The process of the SuperLink itself."""
        children = psutil.Process(self.server.process.pid).children()
        return next(one for one in children if "superlink" in " ".join(one.cmdline()))

    def linked(self) -> bool:
        files = [self.folder / f"{site}.status" for site in SITES]
        return all(file.exists() and '"link": "up"' in file.read_text() for file in files)

    def serve(self, name: str) -> Path:
        """Hand a federation to the server, and wait for its end."""
        command = [*FEDSPAN, "serve", str(self.federation), "--server", str(self.folder / "server")]
        run = self.group.start(name, [*command, "--runs", str(self.folder / "runs"), "--name", name], environment())
        assert run.process.wait(SECONDS) == 0, (self.folder / "logs" / f"{name}.log").read_text()
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("standing")
    with ProcessGroup(folder / "logs") as group:
        place = Place(folder, group)
        wait_for(place.linked, SECONDS)
        yield place


def trained(run: Path) -> list[str]:
    assert read_run(run)["status"] == "completed"
    return sorted(one["client"] for one in read_lines(run / "metrics.jsonl") if one["phase"] == "train")


def test_one_run_after_the_other_with_the_same_sites(place: Place) -> None:
    assert trained(place.serve("first")) == list(SITES)
    kill(place.superlink())
    assert trained(place.serve("second")) == list(SITES)
    assert place.server.process.poll() is None
    assert [site.process.poll() for site in place.sites] == [None, None]
    assert "the SuperLink died and is started again (1 of 10)" in (place.folder / "logs" / "server.log").read_text()


def test_place_and_port_are_taken(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    wait_for(place.linked, SECONDS)
    assert main(place.start) == 2
    assert f"port {place.port} is in use; give another with --fleet-api-address" in capsys.readouterr().err
    (free,) = free_ports(1)
    again = [part.replace(f":{place.port}", f":{free}") for part in place.start]
    assert main(again) == 2
    assert "a server stands there already; end it, or give another folder" in capsys.readouterr().err


def test_where_no_server_stands_nothing_is_handed_over(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(place.federation), "--server", str(tmp_path)]) == 2
    assert f"no server stands there; fedspan server start --home {tmp_path}" in capsys.readouterr().err
    assert main(["serve", str(place.federation), "--server", str(tmp_path), "--insecure"]) == 2
    assert "leave its own options out" in capsys.readouterr().err


def test_signal_ends_it_and_all_that_it_started(place: Place) -> None:
    started = psutil.Process(place.server.process.pid).children(recursive=True)
    place.server.process.terminate()
    assert place.server.process.wait(60) == 0
    assert psutil.wait_procs(started, 10)[1] == []
    assert not (place.folder / "server" / "server.json").exists()

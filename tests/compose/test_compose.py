"""The containers on a real engine: the federation of docker-compose.yml from its images to nothing left, and intruders.

The tests build on each other, in this order. `make compose-test` runs them; COMPOSE_DEADLINE=SECONDS sets how long any
one thing may take.
"""

import json
import shutil
import time
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from common.system.keys import make_site
from deploy.keys.certs import make_ca, make_server
from server.run.folder import read_lines
from tests.compose.conftest import DEADLINE, ours
from tests.compose.engine import ROOT, Engine

pytestmark = [pytest.mark.long, pytest.mark.timeout(3 * DEADLINE)]

SITES = ["site-a", "site-b", "site-c"]
# Everything in the container but the one who reaps and the one who kills.
KILL_ALL = (
    "import os, signal; [os.kill(int(p), signal.SIGKILL) for p in os.listdir('/proc')"
    " if p.isdecimal() and int(p) not in (1, os.getpid())]"
)
LISTENING = (
    "import glob; [print(*(c.split()[1] for c in open(f).readlines()[1:] if c.split()[3] == '0A'))"
    " for f in glob.glob('/proc/net/tcp*')]"
)


def health(engine: Engine, service: str) -> str:
    return str(engine.inspect(engine.container(service))["State"]["Health"]["Status"])


def events(runs: Path, run: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(runs / run / "events.jsonl") if event["event"] == kind]


@pytest.mark.parametrize("name", ["server", "client"])
def test_image_is_for_nobody_in_particular_and_installs_nothing(engine: Engine, name: str) -> None:
    image = json.loads(engine.docker("image", "inspect", f"fedspan-{name}"))[0]
    assert image["Config"]["User"] == "10001:0"
    assert image["Config"]["Healthcheck"]["Test"][:5] == ["CMD", "python", "-m", "deploy", "health"]
    assert image["Config"]["Labels"]["org.opencontainers.image.title"] == f"FedSpan {name}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = "import importlib.metadata as m; print(m.version('fedspan'))"
    assert (
        engine.docker("run", "--rm", "--entrypoint", "python", f"fedspan-{name}", "-c", version) == project["version"]
    )
    told = engine.docker("run", "--rm", f"fedspan-{name}", "pip", "--version", check=False)
    assert "No module named pip" in told
    print(f"fedspan-{name}: {image['Size'] / 1e6:.0f} MB")  # noqa: T201


def test_container_killed_in_a_round_comes_back_and_the_run_ends_well(engine: Engine, runs: Path, uid: int) -> None:
    server, site = engine.container("server"), engine.container("site-b")
    engine.wait("the server is healthy", lambda: health(engine, "server") == "healthy", server)
    engine.wait("round 1 has begun", lambda: bool(events(runs, "compose", "round_started")), server)
    for name in SITES:  # as Docker asks, but now
        check = engine.inspect(engine.container(name))["Config"]["Healthcheck"]["Test"][1:]
        engine.docker("exec", engine.container(name), *check)
    engine.python(site, KILL_ALL, check=False)  # it ends with the container
    engine.wait("the container is there again", lambda: engine.inspect(site)["RestartCount"] == 1, site)
    assert engine.docker("wait", server) == "0", engine.docker("logs", server)
    outcome = json.loads((runs / "compose" / "run.json").read_text())
    assert outcome["status"] == "completed"
    records = read_lines(runs / "compose" / "metrics.jsonl")
    trained = {(record["round"], record["client"]) for record in records if record["phase"] == "train"}
    assert trained == {(number, name) for number in (1, 2) for name in SITES}
    assert (runs / "compose" / "report.html").stat().st_uid == uid
    assert engine.inspect(site)["State"]["Running"]
    print(f"run: {outcome['seconds']:.0f} s")  # noqa: T201


def test_site_is_confined_to_its_own_files_and_opens_no_port(engine: Engine, uid: int) -> None:
    for name in SITES:
        container = engine.container(name)
        facts = engine.inspect(container)
        assert facts["HostConfig"]["ReadonlyRootfs"]
        assert facts["HostConfig"]["CapDrop"] == ["ALL"]
        assert not any(facts["NetworkSettings"]["Ports"].values())
        assert engine.python(container, "import os; print(os.getuid(), os.getgid())") == f"{uid} {uid}"
        assert engine.python(container, "import os; print(os.listdir('/data'))") == f"['{name}.jsonl']"
        assert "ca.key" not in engine.python(container, "import os; print(os.listdir('/certs'))")
        hosts = {address.split(":")[0] for address in engine.python(container, LISTENING).split()}
        assert hosts <= {"0100007F", "0B00007F"}  # 127.0.0.1, and Docker's own resolver at 127.0.0.11
        for place in ("/app/x", "/data/x", "/model/x", "/certs/x"):
            refused = f"try: open('{place}', 'w')\nexcept OSError as e: print(e.strerror)"
            assert engine.python(container, refused) == "Read-only file system"


class Intruders:
    """A server that waits for one site more than there are and ships unsigned code, and who tries to get in.

    Args:
        folder: files for the intruders, and a federation file for the server.
    """

    def __init__(self, engine: Engine, folder: Path, uid: int) -> None:
        self._engine, self.folder, self._uid = engine, folder, uid
        self._mount = ["-v", f"{folder}:/intruder:ro"]
        volumes = {"/ca": f"{engine.project}_ca", "/registry": f"{engine.project}_registry"}
        self._volumes = [part for place, volume in volumes.items() for part in ("-v", f"{volume}:{place}")]
        federation = yaml.safe_load((ROOT / "deploy" / "compose" / "federation.yaml").read_text())
        federation["cohort"] = {"min_clients": 4, "join_deadline": DEADLINE}
        (folder / "federation.yaml").write_text(yaml.safe_dump(federation))
        site = {"name": "site-d", "data": {"path": "rows.jsonl", "prompt": "q", "answer": "a"}, "model": "/model"}
        site["agreements"] = "/var/lib/fedspan/agreements.json"
        (folder / "site.yaml").write_text(yaml.safe_dump(site))
        (folder / "rows.jsonl").write_text('{"q": "1", "a": "2"}\n')
        for name in ("known", "unknown"):
            make_site(folder / name)
        make_ca(folder / "other", 10)
        shutil.copytree(folder / "other", folder / "expired")
        make_server(folder / "expired", ["expired"], 10)
        expire(folder / "expired")
        self.register("add", "site-d", "/intruder/known.pub")
        command = "serve /intruder/federation.yaml --runs=/runs --name=intruders"
        command += " --fleet-api-address=0.0.0.0:9092 --ssl-ca-certfile=/certs/ca.crt --ssl-certfile=/certs/server.pem"
        command += " --ssl-keyfile=/certs/server.key --registry=/registry/sites.json"
        engine.docker("rm", "-f", engine.container("server"))
        engine.compose("restart", *SITES)  # what a worker runs already was signed
        engine.compose("run", "-d", "--no-deps", "--use-aliases", *self._mount, "server", *command.split())
        self.server = engine.container("server")

    def register(self, *command: str) -> None:
        """Edit the register of sites, which the server follows."""
        self._give()
        options = ["--rm", "--user", self._engine.user, *self._mount, *self._volumes]
        self._engine.docker(
            "run", *options, "fedspan-server", "sites", command[0], "/registry/sites.json", *command[1:]
        )

    def _give(self) -> None:
        ours(self.folder, self._uid)

    def ca(self) -> Path:
        """The federation's true CA certificate."""
        text = self._engine.docker("run", "--rm", *self._volumes, "--entrypoint", "cat", "fedspan-server", "/ca/ca.crt")
        (self.folder / "ca.crt").write_text(text + "\n")
        return self.folder / "ca.crt"

    def join(self, *options: str, server: str = "server", docker: tuple[str, ...] = ()) -> str:
        """Start a client; its container."""
        command = [
            "site",
            "join",
            "/intruder/site.yaml",
            f"--superlink={server}:9092",
            "--home=/var/lib/fedspan",
            "--agree=/intruder/federation.yaml",
        ]
        command += ["--status=/var/lib/fedspan/status.json", *options]
        return self._engine.start("fedspan-client", *command, options=[*self._mount, *docker])

    def refused(self, container: str, says: str) -> None:
        """A client says why it may not take part; it is taken away."""
        self._engine.wait(says, lambda: says in self._engine.docker("logs", container), container)
        self._engine.docker("rm", "-f", container)


def expire(folder: Path) -> None:
    """Let the server's certificate in a folder have ended yesterday."""
    key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    old = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), old.serial_number)
    builder = builder.not_valid_before(datetime.now(UTC) - timedelta(days=9))
    builder = builder.not_valid_after(datetime.now(UTC) - timedelta(days=1))
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    (folder / "server.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def intruders(engine: Engine, tmp_path_factory: pytest.TempPathFactory, uid: int) -> Intruders:
    found = Intruders(engine, tmp_path_factory.mktemp("intruders"), uid)
    found.ca()
    ours(found.folder, uid)
    engine.wait("the server listens", lambda: health(engine, "server") == "healthy", found.server)
    return found


OURS = "--root-certificates=/intruder/ca.crt"
KNOWN, UNKNOWN = (f"--auth-supernode-private-key=/intruder/{name}.key" for name in ("known", "unknown"))


def test_client_with_another_authority_does_not_talk_to_the_server(intruders: Intruders) -> None:
    container = intruders.join("--root-certificates=/intruder/other/ca.crt", KNOWN)
    intruders.refused(container, "ask the operator for the right ca.crt")


def test_client_does_not_talk_to_a_server_under_a_name_that_is_not_its_own(
    engine: Engine, intruders: Intruders
) -> None:
    (network,) = engine.inspect(intruders.server)["NetworkSettings"]["Networks"].values()
    host = ("--add-host", f"elsewhere:{network['IPAddress']}")
    container = intruders.join(OURS, KNOWN, server="elsewhere", docker=host)
    intruders.refused(container, "the server's certificate is not for elsewhere but for server")


def test_client_does_not_talk_to_a_server_whose_certificate_has_expired(engine: Engine, intruders: Intruders) -> None:
    files = "/intruder/expired"
    tls = [
        f"--ssl-ca-certfile={files}/ca.crt",
        f"--ssl-certfile={files}/server.pem",
        f"--ssl-keyfile={files}/server.key",
    ]
    options = [
        "--entrypoint",
        "flower-superlink",
        "--network-alias",
        "expired",
        "-v",
        f"{intruders.folder}:/intruder:ro",
    ]
    server = engine.start("fedspan-server", *tls, options=options)
    container = intruders.join(f"--root-certificates={files}/ca.crt", KNOWN, server="expired")
    intruders.refused(container, "the server's certificate expired on")
    engine.docker("rm", "-f", server)


def test_client_without_tls_is_turned_away(intruders: Intruders) -> None:
    intruders.refused(intruders.join("--insecure"), "speaks TLS; leave out --insecure")


def test_client_with_a_key_that_is_not_registered_is_turned_away(intruders: Intruders) -> None:
    intruders.refused(intruders.join(OURS, UNKNOWN), "not in its register")


def test_client_whose_key_is_revoked_is_turned_away(engine: Engine, intruders: Intruders) -> None:
    container = intruders.join(OURS, KNOWN)
    engine.wait("it is let in", lambda: "SuperNode ID" in engine.docker("logs", container), container)
    intruders.register("revoke", "site-d")
    intruders.refused(container, "it was revoked")


def test_site_runs_no_code_that_nobody_signed(engine: Engine, intruders: Intruders, runs: Path) -> None:
    def told() -> set[str]:
        refusals = events(runs, "intruders", "client_refused")
        return {name for name in SITES for e in refusals if f"{name}: the app bundle" in e["reason"]}

    engine.wait("every site refuses the unsigned code", lambda: told() == set(SITES), intruders.server)
    assert not events(runs, "intruders", "client_joined")
    for name in SITES:
        engine.wait(f"{name} is healthy", lambda s=name: health(engine, s) == "healthy", engine.container(name))


@pytest.mark.parametrize(("service", "code"), [("site-a", 0), ("server", 130)])
def test_container_ends_within_seconds_on_sigterm(
    engine: Engine, intruders: Intruders, service: str, code: int
) -> None:
    container = engine.container(service)
    began = time.monotonic()
    engine.docker("stop", "-t", "60", container)
    assert time.monotonic() - began < 30
    assert engine.inspect(container)["State"]["ExitCode"] == code


def test_down_leaves_nothing(engine: Engine) -> None:
    engine.compose("down", "-v")
    assert engine.docker("ps", "-aq", *engine.mine()) == ""
    assert engine.docker("volume", "ls", "-q", *engine.mine()) == ""
    assert engine.docker("network", "ls", "-q", *engine.mine()) == ""

"""Who may connect: what the user of a site sees when a real SuperLink refuses it, over TLS."""

import json
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.x509 import load_pem_x509_certificate
from flwr.proto.control_pb2 import ListNodesRequest

from client.superlink import link
from common.system import flower
from common.system.keys import fingerprint, read_public
from common.system.processes import ProcessGroup, Started, free_ports
from deploy.keys import certs
from deploy.sandbox.flower import wait_for
from server.run.from_supervisor import site_of
from server.superlink import registry
from server.superlink.control import control
from server.superlink.nodes import Nodes
from server.superlink.process import OwnSuperLink, Tls, sockets
from tests.harness.command import fedspan
from tests.harness.processes import ROOT, SECONDS, environment

SITES = ("site-a", "site-b", "site-c", "late", "stranger", "expired", "open")

pytestmark = pytest.mark.timeout(1200)


@dataclass
class Gate:
    """A SuperLink that lets only registered sites in."""

    folder: Path
    superlink: OwnSuperLink
    nodes: Nodes
    group: ProcessGroup
    told: list[str]

    @property
    def register(self) -> Path:
        return self.folder / "register.json"

    @property
    def port(self) -> str:
        return self.superlink.fleet.rpartition(":")[2]

    def key(self, site: str) -> list[str]:
        return ["--auth-supernode-private-key", str(self.folder / f"{site}.key")]

    @property
    def ca(self) -> list[str]:
        return ["--root-certificates", str(self.folder / "pki" / "ca.crt")]

    def supernode(self, superlink: str, *options: str, deadline: float = 4.0) -> Started:
        """A SuperNode as a site starts it."""
        command = [
            sys.executable,
            "-P",
            str(ROOT / "client" / "connect" / "supernode.py"),
            "--superlink",
            superlink,
            "--poll",
            "0.2",
        ]
        socket = self.superlink.socket.with_name(f"node-{len(self.group.started)}")
        command += ["--connect-deadline", str(deadline), "--socket", str(socket), "--isolation", "process"]
        env = {**environment(), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        return self.group.start(f"node-{len(self.group.started)}", [*command, *options], env)

    def follow(self) -> None:
        """As the supervisor does, but at once."""
        self.nodes._looked = 0.0
        self.nodes.look()

    def online(self) -> set[str | None]:
        """Which sites are, as the SuperLink says."""
        with control(self.superlink) as client:
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
        return {site_of(self.folder, node.node_id) for node in nodes if node.status == "online"}


def last_words(node: Started, code: int = 1) -> str:
    """The one line with which a SuperNode ends."""
    assert node.process.wait(SECONDS) == code, node.log.read_text()
    said = node.log.read_text()
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    folder = tmp_path_factory.mktemp("gate")
    pki, register = folder / "pki", folder / "register.json"
    for kind in ("ca", "server"):
        assert fedspan("keys", kind, pki)[0] == 0
    for site in SITES:
        assert fedspan("keys", "site", folder / site)[0] == 0
        if site not in ("late", "stranger"):
            registry.add(register, site, folder / f"{site}.pub", None)
    expire(register, "expired")
    (fleet,) = free_ports(1)
    tls = Tls(pki / "ca.crt", pki / "server.pem", pki / "server.key")
    told: list[str] = []
    home = folder / "flwr"
    home.mkdir()
    env = {**flower.environment(home, hub=True), "PYTHONPATH": environment()["PYTHONPATH"]}
    with sockets(home) as at, ProcessGroup(folder / "logs") as group:
        superlink = OwnSuperLink(at / "superlink", f"0.0.0.0:{fleet}", tls, register)  # also 127.0.0.2, not its name
        gate = Gate(folder, superlink, Nodes(register, superlink, folder, told.append), group, told)
        group.start("superlink", superlink.command(home), env)
        wait_for(superlink.listens, SECONDS)
        gate.nodes.begin()
        yield gate


def expire(register: Path, site: str) -> None:
    """Let a site's last day have been yesterday."""
    data = json.loads(register.read_text())
    for entry in data["sites"]:
        if entry["name"] == site:
            entry["expires"] = str(datetime.now(UTC).date() - timedelta(days=1))
    register.write_text(json.dumps(data))


@contextmanager
def server_with(folder: Path, begins: timedelta, ends: timedelta) -> Iterator[str]:
    """A TLS server whose certificate has these dates, counted from now; its address."""
    pki = folder / "pki"
    with pytest.MonkeyPatch.context() as patch:
        now = datetime.now(UTC)

        class Then(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
                return now + begins + certs._EARLIER

        patch.setattr(certs, "datetime", Then)
        certificate = folder / f"{begins.days}"
        certificate.mkdir()
        for name in ("ca.key", "ca.crt"):
            (certificate / name).write_bytes((pki / name).read_bytes())
            (certificate / name).chmod(0o600)
        certs.make_server(certificate, [], 1)
    made = load_pem_x509_certificate((certificate / "server.pem").read_bytes())
    assert (made.not_valid_after_utc < now) == (ends < timedelta(0))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "server.pem", certificate / "server.key")
    context.set_alpn_protocols(["h2"])
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        threading.Thread(target=_serve, args=(listener, context), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def _serve(listener: socket.socket, context: ssl.SSLContext) -> None:
    while True:
        try:
            raw, _ = listener.accept()
        except OSError:
            return
        try:
            context.wrap_socket(raw, server_side=True).close()
        except OSError:
            raw.close()


def test_link_that_is_wrong_is_told_before_flower_begins(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "flower_supernode", lambda: pytest.fail("Flower begins"))
    assert fedspan("keys", "ca", tmp_path / "other")[0] == 0
    (gate.folder / "open.key").chmod(0o644)
    here, day, other = f"127.0.0.1:{gate.port}", timedelta(days=1), tmp_path / "other" / "ca.crt"
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    known, foreign = [*gate.ca, *gate.key("site-a")], ["--root-certificates", str(other), *gate.key("site-a")]
    with server_with(gate.folder, -3 * day, -2 * day) as old, server_with(gate.folder, 2 * day, 3 * day) as young:
        for superlink, options, code, parts in (
            (here, foreign, 1, [here, "is signed by CN=FedSpan CA", f"{other} is CN=FedSpan CA", "ask the operator"]),
            (
                f"127.0.0.2:{gate.port}",
                known,
                1,
                ["not for 127.0.0.2 but for localhost, 127.0.0.1", "--host 127.0.0.2"],
            ),
            (old, known, 1, [old, "the server's certificate expired on", "ask the operator to renew it"]),
            (young, known, 1, [young, "is valid from", "this machine's clock says", "set the clock right"]),
            (here, ["--insecure"], 1, [f"{here} speaks TLS", "leave out --insecure"]),
            (nobody, known, 1, [nobody, "nobody answers (Connection refused)", "tried for 1 seconds"]),
            (here, [*gate.ca, *gate.key("open")], 2, ["open.key: this private key can be read by others (mode 0644)"]),
            (here, [*gate.ca, *gate.key("none")], 2, ["none.key: cannot be read (No such file or directory)"]),
        ):
            node = ["site", "supernode", "--superlink", superlink, "--connect-deadline", "1", "--isolation", "process"]
            found, said = fedspan(*node, "--socket", tmp_path / "socket", *options)
            assert found == code, said
            assert "error: " in said
            assert all(part in said for part in parts), said


def test_stranger_is_told_why_the_superlink_does_not_let_it_in(gate: Gate) -> None:
    here = f"127.0.0.1:{gate.port}"
    stranger = fingerprint(read_public(gate.folder / "stranger.pub"))
    unknown = [f"{here} does not let the key {stranger} in", "not in its register", "give the operator the .pub"]
    attempts = [
        (gate.supernode(here, *gate.ca, *gate.key("stranger")), unknown),
        (gate.supernode(here, *gate.ca), ["wants a registered key", "--auth-supernode-private-key"]),
        (gate.supernode(here, *gate.ca, *gate.key("expired")), ["not in its register, revoked or expired there"]),
    ]
    for node, parts in attempts:
        said = last_words(node)
        assert said.startswith("error: "), said
        assert all(part in said for part in parts), said


def test_revoked_and_expired_sites_are_shut_out_while_connected_and_late_ones_let_in(
    gate: Gate, tmp_path: Path
) -> None:
    here = f"127.0.0.1:{gate.port}"
    status, flowers = tmp_path / "link.json", tmp_path / "flower.log"
    more = {"late": ["--status", str(status), "--log", str(flowers)]}
    nodes = {
        site: gate.supernode(here, *gate.ca, *gate.key(site), *more.get(site, []), deadline=SECONDS)
        for site in ("site-b", "site-c", "late")
    }
    wait_for(lambda: {"site-b", "site-c"} <= gate.online(), SECONDS, every=1.0)
    wait_for(status.exists, SECONDS)
    assert json.loads(status.read_text())["state"] == "refused"  # though its connection is open
    registry.revoke(gate.register, "site-b")
    expire(gate.register, "site-c")
    registry.add(gate.register, "late", gate.folder / "late.pub", None)  # it has been trying since
    gate.follow()
    for site in ("site-b", "site-c"):
        mark = fingerprint(read_public(gate.folder / f"{site}.pub"))
        assert f"has shut the key {mark} out: it was revoked, or has expired" in last_words(nodes[site])
    assert sorted(text.partition(" ")[0] for text in gate.told) == ["site-b", "site-c"]
    wait_for(lambda: "late" in gate.online(), SECONDS, every=1.0)
    wait_for(lambda: json.loads(status.read_text())["state"] == "up", SECONDS)
    said = nodes["late"].log.read_text().splitlines()[1:]
    assert [line.partition(" link: ")[2][:34] for line in said] == [
        f"{here} does not let the key SHA256"[:34],
        f"connected to {here}; waiting to be asked"[:34],
    ]
    assert "Starting Flower SuperNode" in flowers.read_text()
    again = gate.supernode(here, *gate.ca, *gate.key("site-b"))
    assert "does not let the key" in last_words(again)

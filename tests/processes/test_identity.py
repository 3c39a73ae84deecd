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

from common.system import flower
from common.system.keys import fingerprint, read_public
from common.system.processes import ProcessGroup, Started, free_ports
from deploy.cli import main
from deploy.keys import certs
from deploy.sandbox.flower import wait_for
from server.run.from_supervisor import site_of
from server.superlink import registry
from server.superlink.control import control
from server.superlink.nodes import Nodes
from server.superlink.process import OwnSuperLink, Tls, sockets
from tests.harness.processes import ROOT, environment

SITES = ("site-a", "site-b", "site-c", "late", "stranger", "expired", "open")


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
    assert node.process.wait(200) == code, node.log.read_text()
    said = node.log.read_text()
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    folder = tmp_path_factory.mktemp("gate")
    pki, register = folder / "pki", folder / "register.json"
    assert main(["keys", "ca", str(pki)]) == 0
    assert main(["keys", "server", str(pki)]) == 0
    for site in SITES:
        assert main(["keys", "site", str(folder / site)]) == 0
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
        wait_for(superlink.listens, 120)
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


@pytest.mark.timeout(400)
def test_every_intruder_is_told_why_in_one_line(gate: Gate, tmp_path: Path) -> None:
    assert main(["keys", "ca", str(tmp_path / "other")]) == 0
    (gate.folder / "open.key").chmod(0o644)
    here, day = f"127.0.0.1:{gate.port}", timedelta(days=1)
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    a_key = gate.key("site-a")
    with server_with(gate.folder, -3 * day, -2 * day) as old, server_with(gate.folder, 2 * day, 3 * day) as young:
        attempts = {
            "wrong CA": gate.supernode(here, "--root-certificates", str(tmp_path / "other" / "ca.crt"), *a_key),
            "another name": gate.supernode(f"127.0.0.2:{gate.port}", *gate.ca, *a_key),
            "expired": gate.supernode(old, *gate.ca, *a_key),
            "not yet valid": gate.supernode(young, *gate.ca, *a_key),
            "plain text": gate.supernode(here, "--insecure"),
            "nobody": gate.supernode(nobody, *gate.ca, *a_key, deadline=1.0),
            "unregistered": gate.supernode(here, *gate.ca, *gate.key("stranger")),
            "no key": gate.supernode(here, *gate.ca),
            "registration expired": gate.supernode(here, *gate.ca, *gate.key("expired")),
            "open key": gate.supernode(here, *gate.ca, *gate.key("open")),
            "no such key": gate.supernode(here, *gate.ca, *gate.key("none")),
        }
        codes = {"open key": 2, "no such key": 2}
        said = {name: last_words(process, codes.get(name, 1)) for name, process in attempts.items()}
    stranger = fingerprint(read_public(gate.folder / "stranger.pub"))
    for name, parts in {
        "wrong CA": [here, "is signed by CN=FedSpan CA", "other/ca.crt is CN=FedSpan CA", "ask the operator"],
        "another name": ["is not for 127.0.0.2 but for localhost, 127.0.0.1", "--host 127.0.0.2"],
        "expired": [old, "the server's certificate expired on", "ask the operator to renew it"],
        "not yet valid": [young, "is valid from", "this machine's clock says", "set the clock right"],
        "plain text": [f"{here} speaks TLS", "leave out --insecure"],
        "nobody": [nobody, "nobody answers (Connection refused)", "tried for 1 seconds"],
        "unregistered": [
            here,
            f"does not let the key {stranger} in",
            "not in its register",
            "give the operator the .pub",
        ],
        "no key": ["wants a registered key", "--auth-supernode-private-key"],
        "registration expired": ["not in its register, revoked or expired there"],
        "open key": ["open.key: this private key can be read by others (mode 0644); run: chmod 600 "],
        "no such key": ["none.key: cannot be read (No such file or directory)"],
    }.items():
        assert said[name].startswith("error: "), said[name]
        assert all(part in said[name] for part in parts), said[name]


@pytest.mark.timeout(300)
def test_revoked_and_expired_sites_are_shut_out_while_connected_and_late_ones_let_in(gate: Gate) -> None:
    here = f"127.0.0.1:{gate.port}"
    nodes = {
        site: gate.supernode(here, *gate.ca, *gate.key(site), deadline=90.0) for site in ("site-b", "site-c", "late")
    }
    wait_for(lambda: {"site-b", "site-c"} <= gate.online(), 120, every=1.0)
    registry.revoke(gate.register, "site-b")
    expire(gate.register, "site-c")
    registry.add(gate.register, "late", gate.folder / "late.pub", None)  # it has been trying since
    gate.follow()
    for site in ("site-b", "site-c"):
        mark = fingerprint(read_public(gate.folder / f"{site}.pub"))
        assert f"has shut the key {mark} out: it was revoked, or has expired" in last_words(nodes[site])
    assert sorted(text.partition(" ")[0] for text in gate.told) == ["site-b", "site-c"]
    wait_for(lambda: "late" in gate.online(), 120, every=1.0)
    again = gate.supernode(here, *gate.ca, *gate.key("site-b"))
    assert "does not let the key" in last_words(again)

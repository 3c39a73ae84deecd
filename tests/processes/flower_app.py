"""Runs a plain Flower app on real SuperLink and SuperNode processes, without FedSpan's launcher."""

import json
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.processes import Supervisor, free_ports, listens
from tests.processes.launcher import environment

BIN = Path(sysconfig.get_path("scripts"))


def run_app(app: Path, folder: Path, nodes: Sequence[str], config: str, seconds: float = 180.0) -> str:
    """Run ``app`` with one SuperNode per node config and return the run's log once it has ended."""
    control, fleet, *ports = free_ports(2 + len(nodes))
    home = folder / "flwr"
    home.mkdir(parents=True)
    address = f'[superlink]\ndefault = "local"\n[superlink.local]\naddress = "127.0.0.1:{control}"\ninsecure = true\n'
    (home / "config.toml").write_text(address)
    env = environment() | {"FLWR_HOME": str(home), "PATH": f"{BIN}:{environment()['PATH']}", "HF_HUB_OFFLINE": "1"}

    def flwr(*arguments: str) -> dict[str, object]:
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments, "--format", "json"], env=env, capture_output=True, text=True, check=True
        )
        return dict(json.loads(done.stdout[done.stdout.index("{") :]))

    with Supervisor(folder / "logs") as supervisor:
        superlink = [
            "flower-superlink",
            "--insecure",
            "--port",
            str(control),
            "--fleet-api-address",
            f"127.0.0.1:{fleet}",
        ]
        superlink.append("--disable-runtime-dependency-installation")
        supervisor.start("superlink", [str(BIN / superlink[0]), *superlink[1:]], env)
        deadline = time.monotonic() + seconds
        while not (listens(control) and listens(fleet)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for number, (node, port) in enumerate(zip(nodes, ports, strict=True)):
            supernode = ["--insecure", "--grpc-rere", "--superlink", f"127.0.0.1:{fleet}", "--port", str(port)]
            supervisor.start(f"node-{number}", [str(BIN / "flower-supernode"), *supernode, "--node-config", node], env)
        assert flwr("run", str(app), "local", "--run-config", config)["success"]
        while True:
            (run,) = flwr("list", "local")["runs"]  # type: ignore[misc]
            if str(run["status"]).startswith("finished"):
                break
            assert time.monotonic() < deadline, "the run did not end in time"
            time.sleep(1)
        log = (folder / "logs" / "superlink.log").read_text()
        assert run["status"] == "finished:completed", log[-3000:]
    return log

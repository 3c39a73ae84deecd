"""Run a federation on this machine: ``python -m deploy.local FEDERATION.yaml``.

Starts a SuperLink, one SuperNode for every site file and the run, as separate processes that talk gRPC over loopback,
just as on many machines. Stops all of them at the end, on Ctrl-C and on failure.

Exit codes: 0 the run ended well, 1 it failed, 2 a file or an argument is wrong, 130 interrupted.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from common.config import FederationConfig, SiteConfig, resolve, resolved
from common.errors import ConfigError, DataError, FedSpanError, LaunchError, ModelError
from common.yaml_file import load
from server.processes import Supervisor, free_ports, last_lines, listens, port_in_use
from deploy.progress import Display
from server.run_folder import check_resumable, read_lines, refuse_existing

ROOT = Path(__file__).resolve().parents[1]  # holds pyproject.toml, from which Flower bundles the app
POLL_SECONDS = 0.5
START_SECONDS = 90.0  # a SuperLink that does not listen by then is given up
_ATTEMPTS = 3


class Interrupted(Exception):  # noqa: N818 - not an error
    """The user, or the machine, asked the launcher to stop."""


@dataclass(frozen=True)
class Plan:
    """What is to be started, all files read and checked."""

    federation: FederationConfig
    source: Path
    sites: dict[str, Path]
    run_dir: Path
    resume: bool = False
    events: int = 0  # lines of events.jsonl from before
    outcome: dict[str, Any] = field(default_factory=dict)  # run.json from before


def make_plan(source: Path, runs: Path, name: str | None, *, resume: bool = False) -> Plan:
    """Read and check every file before anything is started.

    Raises:
        FedSpanError: names the file and what is wrong with it.
    """
    source = source.resolve()
    federation = resolved(load(source, FederationConfig), source)
    if federation.local is None:
        raise ConfigError(f"{source}: missing key `local.sites`; the launcher needs the site files")
    run_dir = (runs / (name or federation.name)).resolve()
    if resume:
        check_resumable(run_dir, federation)
    else:
        refuse_existing(run_dir)
    for key, port in (("local.port", federation.local.port), ("local.fleet_port", federation.local.fleet_port)):
        if port is not None and port_in_use(port):
            raise LaunchError(f"{source}: `{key}` {port} is in use; give another, or leave it out for any free one")
    sites: dict[str, Path] = {}
    for path in map(Path, federation.local.sites):
        site = load(path, SiteConfig)
        if site.name in sites:
            raise ConfigError(f"{path}: `name` {site.name!r} is also the name of {sites[site.name]}")
        shard = resolve(site.data.path, path)
        if not shard.exists():
            raise DataError(f"{path}: shard {shard} does not exist")
        model = federation.model.path if site.model is None else str(resolve(site.model, path))
        _check_model(model, path if site.model is not None else source)
        sites[site.name] = path
    if federation.cohort.min_clients > len(sites):
        needed = federation.cohort.min_clients
        raise ConfigError(f"{source}: `cohort.min_clients` is {needed}, but `local.sites` lists {len(sites)}")
    if not resume:
        return Plan(federation, source, sites, run_dir)
    return Plan(
        federation, source, sites, run_dir, resume, len(read_lines(run_dir / "events.jsonl")), _outcome(run_dir)
    )


def _check_model(path: str | None, file: Path) -> None:
    if path is not None and not (Path(path) / "config.json").is_file():
        raise ModelError(f"{file}: model folder {path} does not exist or holds no config.json")


def run(plan: Plan, console: Console) -> None:
    """Start everything, follow the run to its end, stop everything.

    Raises:
        FedSpanError: with the reason of the site or the server that failed.
    """
    logs = plan.run_dir / "logs"
    local = plan.federation.local
    assert local is not None  # noqa: S101 - make_plan has checked it
    for attempt in range(1, _ATTEMPTS + 1):
        with Supervisor(logs) as supervisor:
            control, fleet, *runtime = free_ports(2 + len(plan.sites))
            control, fleet = local.port or control, local.fleet_port or fleet
            env = _environment(plan, control)
            if not _start_superlink(supervisor, env, control, fleet, plan):
                if attempt < _ATTEMPTS and None in (local.port, local.fleet_port):
                    continue  # somebody took a port between our choice and the SuperLink's start
                log = logs / "superlink.log"
                raise LaunchError(f"the SuperLink did not start; {log} ends with: {last_lines(log)}")
            for (name, file), port in zip(plan.sites.items(), runtime, strict=True):
                supervisor.start(name, _supernode(file, fleet, port, warm=local.warm), env)
                if local.warm:
                    supervisor.start(f"{name}-worker", _worker(port, logs / f"{name}-worker.json"), env)
            _submit(plan, env)
            _follow(plan, supervisor, env, console)
            return


def _environment(plan: Plan, control: int) -> dict[str, str]:
    """Environment of all processes: Flower's files in the run folder, no telemetry, no hub for a local model."""
    home = plan.run_dir / "flwr"
    home.mkdir(parents=True, exist_ok=True)
    config = f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{control}"\ninsecure = true\n'
    (home / "config.toml").write_text(config, encoding="utf-8")
    threads = max(1, (os.cpu_count() or 1) // len(plan.sites))  # sites share this machine's cores
    defaults = {"OMP_NUM_THREADS": str(threads), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
    fixed = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if plan.federation.model.path is not None:
        fixed["HF_HUB_OFFLINE"] = "1"
    path = os.pathsep.join(
        [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    )  # Flower's programs find each other
    return {**defaults, **os.environ, **fixed, "PATH": path}


def _start_superlink(supervisor: Supervisor, env: dict[str, str], control: int, fleet: int, plan: Plan) -> bool:
    """Start the SuperLink and wait until it listens; False when it ended, as it does when a port is taken."""
    command = [
        *_program("flower-superlink"),
        "--insecure",
        *("--host", "127.0.0.1", "--port", str(control)),
        *("--fleet-api-address", f"127.0.0.1:{fleet}"),
        "--disable-runtime-dependency-installation",
    ]
    started = supervisor.start("superlink", command, env)
    deadline = time.monotonic() + START_SECONDS
    while not (listens(control) and listens(fleet)):
        if started.process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise LaunchError(f"the SuperLink did not listen within {START_SECONDS:g} seconds; see {started.log}")
        time.sleep(0.1)
    return True


def _supernode(file: Path, fleet: int, port: int, *, warm: bool) -> list[str]:
    return [
        *(sys.executable, "-P", str(ROOT / "client" / "supernode.py"), "--poll", str(POLL_SECONDS)),
        *("--isolation", "process" if warm else "subprocess"),
        *("--insecure", "--grpc-rere", "--superlink", f"127.0.0.1:{fleet}"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--node-config", f"site={json.dumps(str(file))}"),
    ]


def _worker(port: int, status: Path) -> list[str]:
    program = [sys.executable, "-P", str(ROOT / "client" / "worker.py")]
    return [*program, "--runtime-api", f"127.0.0.1:{port}", "--status", str(status)]


def _submit(plan: Plan, env: dict[str, str]) -> None:
    """Hand the app to the SuperLink."""
    config = f"federation={json.dumps(str(plan.source))} run-dir={json.dumps(str(plan.run_dir))}"
    config += f" resume={json.dumps(plan.resume)}"
    answer = _flwr(["run", str(ROOT), "local", "--run-config", config], env)
    if not answer.get("success"):
        raise LaunchError(f"the run was not accepted: {answer.get('error-message', answer)}")


def _follow(plan: Plan, supervisor: Supervisor, env: dict[str, str], console: Console) -> None:
    """Show the run until run.json says how it ended.

    Raises:
        LaunchError: a process died, or the run failed.
    """
    display, seen, asked = Display(console), plan.events, time.monotonic()
    try:
        while True:
            events = read_lines(plan.run_dir / "events.jsonl")
            display.show(events[seen:])
            seen = len(events)
            outcome = _outcome(plan.run_dir)
            if outcome == plan.outcome:  # how the run ended last time
                outcome = {}
            if outcome.get("status") == "completed" and (plan.run_dir / "report.html").exists():
                return
            if outcome.get("status") == "failed":
                raise LaunchError(str(outcome["reason"]))
            dead = supervisor.dead()
            if dead is not None:
                raise LaunchError(f"{dead.name} ended by itself; {dead.log} ends with: {last_lines(dead.log)}")
            if time.monotonic() > asked + 15.0:  # a ServerApp that died could not write its reason down
                asked = time.monotonic()
                _check_status(plan, env, outcome)
            time.sleep(POLL_SECONDS)
    finally:
        display.close()


def _outcome(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "run.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _check_status(plan: Plan, env: dict[str, str], outcome: dict[str, Any]) -> None:
    runs = _flwr(["list", "local"], env).get("runs") or [{}]
    status = str(runs[0].get("status", ""))
    if status.startswith("finished") and outcome.get("status") not in ("completed", "failed"):
        log = plan.run_dir / "logs" / "superlink.log"
        raise LaunchError(f"the server ended without a result ({status}); {log} ends with: {last_lines(log)}")


def _flwr(arguments: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Run Flower's own command line and read its JSON answer."""
    command = [*_program("flwr"), *arguments, "--format", "json"]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise LaunchError(f"`flwr {arguments[0]}` did not answer within 120 seconds") from None
    start = done.stdout.find("{")
    try:
        return dict(json.loads(done.stdout[start:]))
    except ValueError:
        text = " ".join((done.stdout + done.stderr).split())[-500:]
        raise LaunchError(f"`flwr {arguments[0]}` failed: {text}") from None


def _program(name: str) -> list[str]:
    """A console script of the environment that this runs in."""
    return [str(Path(sysconfig.get_path("scripts")) / name)]


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(signal.Signals(number).name)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description="Run a federation on this machine.")
    parser.add_argument("federation", type=Path, metavar="FEDERATION.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--name", help="name of this run's folder (default: the federation's name)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run of this name, after its last checkpoint"
    )
    options = parser.parse_args(arguments)
    console = Console()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        plan = make_plan(options.federation, options.runs, options.name, resume=options.resume)
    except FedSpanError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    try:
        run(plan, console)
    except Interrupted as interruption:
        print(f"stopped by {interruption}; logs are in {plan.run_dir / 'logs'}", file=sys.stderr)  # noqa: T201
        return 130
    except FedSpanError as error:
        print(f"run failed: {error}", file=sys.stderr)  # noqa: T201
        return 1
    console.print(f"report: {plan.run_dir / 'report.html'}", soft_wrap=True)
    console.print(f"model:  {plan.run_dir / 'model'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

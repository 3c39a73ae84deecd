"""The Dockerfiles and the compose file, as far as they can be checked without an engine (see tests/compose)."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

from common.config.federation import FederationConfig
from common.config.load import load
from common.config.site import SiteConfig
from tests.harness.manifests import ROOT, paths, read, understood, within

DOCKERFILES = [ROOT / "deploy" / f"{name}.Dockerfile" for name in ("server", "client")]
COMPOSE = read(ROOT / "docker-compose.yml")[0]
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SITES = {name: service for name, service in SERVICES.items() if name.startswith("site-")}
LONG_RUNNING = {"server": SERVICES["server"], **SITES}
# What docker-compose 1.29 knows as well, of https://github.com/compose-spec/compose-spec
KEYS = set(
    "build cap_drop command depends_on deploy image logging mem_limit memswap_limit network_mode networks pids_limit "
    "profiles read_only restart security_opt stop_grace_period tmpfs user volumes".split()
)


def instructions(file: Path) -> list[tuple[str, str]]:
    """Instruction and argument, with continued lines joined and comments left out."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines()]


def stages(file: Path) -> list[list[tuple[str, str]]]:
    """Instructions of every stage, the last one last."""
    found: list[list[tuple[str, str]]] = []
    for instruction in instructions(file):
        if instruction[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfile_keeps_the_rules(file: Path) -> None:
    said = instructions(file)
    assert "# syntax=" not in file.read_text()
    assert not [a for i, a in said if i == "ADD"]
    assert not [a for _, a in said if "<<" in a or re.search(r"\b(curl|wget|sudo)\b", a)]
    for argument in (a for i, a in said if i == "RUN"):
        if "pip install" in argument:
            assert "--no-deps" in argument, argument
            assert "--require-hashes" in argument or argument.rstrip().endswith(" ."), argument  # our own metadata
            assert "--no-cache-dir" in argument
        if "apt-get install" in argument:
            packages = re.search(r"--no-install-recommends (.*?)&&", argument)
            assert packages is not None
            assert all("=" in package for package in packages[1].split()), argument
            assert "rm -rf /var/lib/apt/lists" in argument
    (base,) = [a for i, a in said if i == "ARG" and a.startswith("BASE=")]
    assert re.fullmatch(r"BASE=python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}", base)
    bases = {a.split(" AS ")[0] for i, a in said if i == "FROM"}
    assert bases <= {"${BASE}", "build"}


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_image_runs_as_nobody_in_particular_and_stops_on_sigterm(file: Path) -> None:
    last = stages(file)[-1]
    said = dict(last)
    assert said["USER"] == "10001:0"
    assert [i for i, _ in last].index("USER") > max(n for n, (i, _) in enumerate(last) if i in ("RUN", "COPY"))
    assert json.loads(said["ENTRYPOINT"])[0] == "tini"  # exec form, and somebody who reaps
    understood_health = json.loads(said["HEALTHCHECK"].partition("CMD ")[2])
    understood(understood_health[3:])
    labels = [a for i, a in last if i == "LABEL"]
    assert all(f"org.opencontainers.image.{key}=" in labels[0] for key in ("title", "description", "licenses"))
    assert "COPY --from=lean /opt/venv /opt/venv" in [f"{i} {a}" for i, a in last]


def test_both_images_share_the_stage_with_the_packages() -> None:
    server, client = (stages(file) for file in DOCKERFILES)
    assert server[0] == client[0]
    assert server[-1][:3] == client[-1][:3]  # FROM, tini, packages


def test_client_image_holds_nothing_of_the_server() -> None:
    copied = [a for i, a in stages(DOCKERFILES[1])[-1] if i == "COPY"]
    assert not [a for a in copied if a.startswith(("server", "deploy ", "."))]


def fedspan(image: Path, copied: list[tuple[str, str]], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in an image that holds what was copied and no installed FedSpan."""
    for argument in (a for i, a in copied if i == "COPY" and "--from" not in a):
        *sources, target = argument.split()
        for source in sources:
            place = image / (target if (ROOT / source).is_dir() else target + Path(source).name)
            place.parent.mkdir(exist_ok=True)
            if not place.exists():
                place.symlink_to(ROOT / source)
    path = os.pathsep.join([str(image), sysconfig.get_path("purelib")])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-m", "deploy", *arguments]  # no .pth file, which would find this checkout
    return subprocess.run(command, cwd=image, env=env, capture_output=True, text=True, check=False)


def test_client_image_has_the_verbs_of_a_site_and_says_so_of_others(tmp_path: Path) -> None:
    copied = stages(DOCKERFILES[1])[-1]
    for verb in (
        "site accept",
        "site check",
        "site join",
        "site worker",
        "site supernode",
        "ledger verify",
        "health site",
    ):
        told = fedspan(tmp_path, copied, *verb.split(), "--help")
        assert told.stdout.startswith(f"usage: fedspan {verb} "), told.stderr
    assert fedspan(tmp_path, copied, "keys", "site", str(tmp_path / "site-a")).returncode == 0
    assert (tmp_path / "site-a.key").stat().st_mode & 0o777 == 0o600
    for verb, lacks in (
        ("serve", "server"),
        ("server start", "server"),
        ("code sign", "server"),
        ("run", "deploy.run"),
    ):
        told = fedspan(tmp_path, copied, *verb.split(), "--help")
        assert told.returncode == 2
        assert told.stderr == f"error: fedspan {verb} is not part of this image, which has no {lacks}\n"
    offered = fedspan(tmp_path, copied, "completion", "bash").stdout
    assert '"site join"' in offered
    assert '"serve"' not in offered


def test_demo_is_prepared_by_what_was_copied_until_then(tmp_path: Path) -> None:
    demo = stages(DOCKERFILES[0])[1]
    (run,) = [n for n, (i, a) in enumerate(demo) if i == "RUN" and "python -m deploy demo --cache" in a]
    told = fedspan(tmp_path, demo[:run], "demo", "--help")
    assert told.stdout.startswith("usage: fedspan demo "), told.stderr


def test_client_image_checks_the_folder_that_it_works_in() -> None:
    settings = " ".join(a for i, a in stages(DOCKERFILES[1])[-1] if i == "ENV").split()
    homes = {understood(site["command"]).home for site in SITES.values()}
    assert [f"FLWR_HOME={home}" for home in homes] == [s for s in settings if s.startswith("FLWR_HOME=")]


def test_server_image_holds_what_the_bundle_for_the_sites_is_made_of() -> None:
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    parts = {pattern.lstrip("/").split("/")[0] for pattern in app["fab-include"]} | {"pyproject.toml"}
    for stage in (stages(DOCKERFILES[0])[1], stages(DOCKERFILES[0])[-1]):  # where it is signed, where it is shipped
        assert parts <= {source for i, a in stage if i == "COPY" for source in a.split()[:-1]}


def test_build_context_is_a_list_of_what_may_go_in() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in allowed)
    copied = {
        source.split("/")[0]
        for file in DOCKERFILES
        for i, a in instructions(file)
        if i == "COPY" and "--from" not in a
        for source in a.split()[:-1]
    }
    assert copied == allowed


def test_compose_file_is_consistent() -> None:
    for name, service in SERVICES.items():
        assert set(service) <= KEYS, name
        assert set(service.get("depends_on", {})) <= set(SERVICES)
        named = [v.split(":")[0] for v in service["volumes"] if isinstance(v, str)]
        assert {v for v in named if not v.startswith(".")} <= set(COMPOSE["volumes"])
        assert all((ROOT / v).exists() for v in named if v.startswith("."))
        dockerfile = ROOT / service["build"]["dockerfile"]
        target = service["build"].get("target")
        assert target is None or f" AS {target}" in dockerfile.read_text()
    assert COMPOSE["networks"] == {"federation": {"internal": True}}


@pytest.mark.parametrize("name", SERVICES)
def test_container_is_read_only_without_capabilities_and_publishes_nothing(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == "${FEDSPAN_USER:-1000:1000}"
    assert not {"ports", "expose", "privileged"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_container_has_limits_of_memory_processes_and_what_it_may_write(name: str) -> None:
    service = SERVICES[name]
    assert service["mem_limit"] == service["memswap_limit"] == "${FEDSPAN_MEMORY:-8g}"  # the same: no swap besides
    assert service["pids_limit"] == 1024
    assert service["tmpfs"] == ["/tmp:size=2g"]  # noqa: S108
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_command_is_understood_and_what_it_names_is_mounted(name: str) -> None:
    service = LONG_RUNNING[name]
    mounts = [v["target"] if isinstance(v, dict) else v.split(":")[1] for v in service["volumes"]]
    mounts += [place.split(":")[0] for place in service["tmpfs"]]
    understood(service["command"])
    assert all(within(path, mounts) for path in paths(service["command"]))


def test_site_sees_its_own_rows_and_key_alone() -> None:
    for name, service in SITES.items():
        own = name.removesuffix("-gpu")
        volumes = {volume.split(":")[0] for volume in service["volumes"]}
        files = {f"./deploy/compose/{own}.yaml", "./deploy/compose/federation.yaml"}
        assert volumes == files | {f"{own}-certs", f"{own}-data", f"{own}-state", "model"}
        assert [v for v in service["volumes"] if not v.endswith(":ro")] == [f"{own}-state:/var/lib/fedspan"]


def test_gpu_profile_has_the_same_sites_with_a_device() -> None:
    for letter in "abc":
        plain, gpu = dict(SITES[f"site-{letter}"]), dict(SITES[f"site-{letter}-gpu"])
        assert (plain.pop("profiles"), gpu.pop("profiles")) == (["cpu"], ["gpu"])
        (device,) = gpu.pop("deploy")["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "${SITE_GPUS:-1}", "capabilities": ["gpu"]}
        assert plain == gpu
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text().splitlines()


def test_federation_and_site_files_are_read() -> None:
    federation = load(ROOT / "deploy" / "compose" / "federation.yaml", FederationConfig)
    sites = [load(ROOT / "deploy" / "compose" / f"site-{letter}.yaml", SiteConfig) for letter in "abc"]
    assert [site.name for site in sites] == ["site-a", "site-b", "site-c"]
    assert federation.cohort.min_clients == len(sites)
    assert all(site.policy.federations == [federation.name] for site in sites)

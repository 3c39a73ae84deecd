"""The images install the versions of constraints.txt, each file by its hash, and use none of the functions at fault."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import flwr
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.lock import CUDA, FOLDER, digest_of
from tests.harness.manifests import ROOT

ENTRY = re.compile(r"([a-z0-9.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})")
FILES = ("build", "packages", "torch-cuda", "torch-cpu")


def locked(*files: str) -> dict[str, str]:
    """Versions by name; fails on a line without a hash."""
    lines = [line for name in files for line in (FOLDER / f"{name}.txt").read_text().splitlines() if line[0] != "#"]
    entries = [ENTRY.fullmatch(line) for line in lines]
    assert all(entries), lines
    return {entry[1]: entry[2] for entry in entries if entry is not None}


def pinned() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    return {str(canonicalize_name(name)): version for name, _, version in (line.partition("==") for line in lines)}


def test_locked_versions_are_those_of_the_constraints_but_for_the_libraries_of_cuda() -> None:
    constraints = pinned()
    assert {file.stem for file in FOLDER.glob("*.txt")} == set(FILES)
    for name, version in locked("build", "packages").items():
        assert constraints.get(name) == version, f"{name} is locked at {version}; run `make lock`"
    (cpu, cuda) = (locked(name)["torch"] for name in ("torch-cpu", "torch-cuda"))
    assert (cuda, cpu) == (constraints["torch"], f"{cuda}+cpu")
    assert all(CUDA.fullmatch(name) for name in locked("torch-cuda"))


@pytest.mark.parametrize("torch", ["torch-cpu", "torch-cuda"])
def test_everything_that_the_project_needs_is_locked(torch: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for extra in ("8bit", "demo") for line in project["optional-dependencies"][extra]]
    versions = locked("build", "packages", torch)
    for line in [*project["dependencies"], *optional]:
        needed = Requirement(line)
        assert needed.specifier.contains(versions[canonicalize_name(needed.name)]), line


@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_the_list_for_others_holds_every_package_with_the_hash_of_its_file(torch: str, tmp_path: Path) -> None:
    (command,) = re.findall(r"\$\(BIN\)/(cyclonedx-py .*?) -o ", (ROOT / "Makefile").read_text())
    files = [(FOLDER / f"{name}.txt").read_text() for name in ("build", "packages", f"torch-{torch}")]
    out = tmp_path / "bom.json"
    program = [str(Path(sys.executable).parent / "cyclonedx-py"), *command.split()[1:], "-o", str(out), "-"]
    subprocess.run(program, cwd=ROOT, input="".join(files), text=True, check=True, capture_output=True)
    listed = json.loads(out.read_text())
    hashes = {c["name"]: c["externalReferences"][0]["hashes"][0]["content"] for c in listed["components"]}
    assert listed["bomFormat"] == "CycloneDX"
    assert hashes == {m[1]: m[3] for text in files for m in ENTRY.finditer(text)}


def wheel(tags: str, digest: str) -> dict[str, Any]:
    return {"url": f"https://index/a-1.0-{tags}.whl", "hashes": {"sha256": digest}}


def test_the_wheel_is_locked_that_the_image_can_run_best() -> None:
    old, new = wheel("cp311-cp311-manylinux2014_x86_64", "old"), wheel("cp311-cp311-manylinux_2_28_x86_64", "new")
    beyond, other = wheel("cp311-cp311-manylinux_2_39_x86_64", "beyond"), wheel("cp311-cp311-macosx_11_0_arm64", "mac")
    pure, source = wheel("py3-none-any", "pure"), {"hashes": {"sha256": "source"}}
    assert digest_of({"wheels": [pure, old, beyond, new, other], "sdist": source}) == "new"
    assert digest_of({"wheels": [pure, other], "sdist": source}) == "pure"
    assert digest_of({"wheels": [beyond, other], "sdist": source}) == "source"


def test_nothing_here_or_in_flower_uses_the_functions_that_the_known_faults_of_cryptography_are_in() -> None:
    faulty = re.compile(r"\bpkcs7\b|\bx509\.verification\b|from cryptography\.x509 import .*\bverification\b")
    ours = [
        file for room in ("client", "common", "deploy", "server", "strategies") for file in (ROOT / room).rglob("*.py")
    ]
    flowers = list(Path(flwr.__file__).parent.rglob("*.py"))
    assert len(ours) > 100
    assert len(flowers) > 100
    assert [file for file in (*ours, *flowers) if faulty.search(file.read_text(encoding="utf-8"))] == []

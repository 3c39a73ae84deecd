"""The wheel: it holds all that the code reads, and works from an empty folder, beside other packages too."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedspan import ROOMS
from server.superlink.bundle import bundle_digest
from tests.harness import sample_run
from tests.harness.manifests import ROOT

READ = {".css", ".html", ".json", ".txt", ".typed", ".yaml"}  # by the code, besides Python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make dist` does it: of the source distribution, which so is complete."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "fedspan.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site_packages(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed") / "site-packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*command, str(wheel)], check=True)
    return folder


def fedspan(site_packages: Path, *arguments: str, before: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed script in an empty folder, with the other packages of this environment but no .pth file of it."""
    empty = site_packages.parent / "empty"
    empty.mkdir(exist_ok=True)
    path = [*([before] if before else []), site_packages, sysconfig.get_path("purelib")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", str(site_packages / "bin" / "fedspan"), *arguments]
    done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, check=False)
    assert list(empty.iterdir()) == []
    return done


def data_files() -> Iterator[str]:
    for room in ROOMS:
        for file in (ROOT / room).rglob("*"):
            if file.suffix in READ and file.is_file():
                yield file.relative_to(ROOT).as_posix()


def test_wheel_holds_every_file_that_the_code_reads(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = set(data_files())
    assert len(wanted) > 20
    assert wanted - held == set()
    assert {"fedspan.py", "server/superlink/app/pyproject.toml", "server/superlink/app/LICENSE"} <= held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/"))]


def test_installed_command_works_and_ships_the_code_of_the_checkout(site_packages: Path) -> None:
    told = fedspan(site_packages, "--help")
    assert (told.returncode, told.stdout.splitlines()[0]) == (0, "usage: fedspan VERB ...")
    assert fedspan(site_packages, "data", "recipe", "--help").stdout.startswith("usage: fedspan data recipe ")
    (site_packages / "common" / "foreign.py").write_text("another package's")
    told = fedspan(site_packages, "code", "digest")
    assert (told.stdout.strip(), told.stderr) == (bundle_digest(ROOT), "")


def test_installed_command_writes_a_report(site_packages: Path, tmp_path: Path) -> None:
    run = sample_run.completed(tmp_path / "sample")
    told = fedspan(site_packages, "report", str(run))
    assert told.returncode == 0, told.stderr
    assert "<style>" in (run / "report.html").read_text()


def test_code_that_another_package_wrote_over_is_not_shipped(site_packages: Path, tmp_path: Path) -> None:
    site_packages = Path(shutil.copytree(site_packages, tmp_path / "site-packages"))
    (site_packages / "client" / "__init__.py").write_text("MINE = True\n")
    told = fedspan(site_packages, "code", "digest")
    assert (told.returncode, told.stdout) == (2, "")
    assert f"{site_packages}/client/__init__.py: not the file that was installed" in told.stderr


@pytest.mark.parametrize("shape", ["common/__init__.py", "server.py"])
def test_package_of_the_same_name_that_comes_first_is_named(site_packages: Path, tmp_path: Path, shape: str) -> None:
    other = tmp_path / "other" / shape
    other.parent.mkdir(parents=True)
    other.touch()
    room = Path(shape).parts[0].removesuffix(".py")
    told = fedspan(site_packages, "--version", before=tmp_path / "other")
    assert (told.returncode, told.stdout) == (2, "")
    (line,) = told.stderr.splitlines()
    assert line.startswith(f"error: {other} is imported as `{room}` in place of FedSpan's {site_packages / room}; ")

"""Lock the packages of the images by version and hash: ``python -m deploy.lock`` writes ``deploy/lock/*.txt``.

Versions are those of constraints.txt; uv finds the files and hashes in the package index. One file is locked for each
package: the wheel that pip takes in the images (Python 3.11, Debian 12, x86-64), or the source where there is no wheel.
A Dockerfile installs ``build.txt``, which is needed to build such sources, ``packages.txt``, and one of the two builds
of PyTorch. Decision 026 has the reasons, and lists files without a hash.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "lock"
CUDA = re.compile(r"torch|triton|(nvidia|cuda)-.+")  # PyPI's PyTorch, and what it needs besides the other one
#: PyTorch's build for CPUs, by version; it lies in PyTorch's own index, which uv is not asked for.
CPU = {"2.13.0": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"}
_PYTHON, _GLIBC = (3, 11), 36  # versions in the base image, Debian 12
_OLD = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}  # other names, by the minor version of glibc
_COMPILE = "pip compile pyproject.toml --constraints constraints.txt --python-version 3.11 --format pylock.toml"
_COMPILE += " --python-platform x86_64-manylinux_2_28 --extra 8bit --extra demo"


def main() -> None:
    """Write all files again."""
    command = [str(Path(sys.executable).with_name("uv")), *_COMPILE.split()]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S603 - our words
    packages = tomllib.loads(told)["packages"]
    files: dict[str, list[str]] = {name: [] for name in ("build", "packages", "torch-cuda", "torch-cpu")}
    for package in packages:
        files[_file_of(package["name"])].append(_entry(package["name"], package["version"], digest_of(package)))
        if package["name"] == "torch":
            files["torch-cpu"].append(_entry("torch", f"{package['version']}+cpu", CPU[package["version"]]))
    FOLDER.mkdir(exist_ok=True)
    for name, entries in files.items():
        (FOLDER / f"{name}.txt").write_text("# Made by `make lock`.\n" + "".join(entries), encoding="utf-8")


def digest_of(package: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the file of a package that is to be installed: its best wheel, or its source."""
    wheels = {tag: wheel for wheel in package.get("wheels", []) for tag in _tags_of(wheel["url"])}
    best = next((wheels[tag] for tag in _tags() if tag in wheels), None)
    return str((best or package["sdist"])["hashes"]["sha256"])


def _tags_of(url: str) -> frozenset[Tag]:
    return parse_wheel_filename(url.rpartition("/")[2])[3]


def _tags() -> Iterator[Tag]:
    """Tags of the wheels that run in an image, the best first."""
    names = [name for minor in range(_GLIBC, 4, -1) for name in (f"manylinux_2_{minor}", _OLD.get(minor)) if name]
    platforms = [f"{name}_x86_64" for name in (*names, "linux")]
    yield from cpython_tags(_PYTHON, platforms=platforms)
    yield from compatible_tags(_PYTHON, "cp311", platforms)


def _entry(name: str, version: str, digest: str) -> str:
    return f"{name}=={version} --hash=sha256:{digest}\n"


def _file_of(name: str) -> str:
    if CUDA.fullmatch(name):
        return "torch-cuda"
    return "build" if name == "setuptools" else "packages"


if __name__ == "__main__":
    main()

"""The bundle is Flower's own, byte for byte, without a look at what it does not hold."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.cli.build import build_fab_from_disk

from common.errors import ConfigError
from server.superlink.bundle import make_bundle

ROOT = Path(__file__).parents[3]
DECOYS = (".venv/lib/site.py", "runs/one/model.py", "docs/conf.py", "server/__pycache__/app.py", "build/server/app.py")


def write(file: Path, text: str = "x = 1\n") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every folder that is read."""
    folders: list[Path] = []
    scandir = os.scandir

    def spy(path: Any = ".") -> Any:
        folders.append(Path(os.fsdecode(path)))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", spy)
    return folders


def test_bundle_of_a_checkout_is_flowers_own(tmp_path: Path, visited: list[Path]) -> None:
    app = tmp_path / "app"
    app.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, app)
    for package in ("server", "client", "strategies", "common", "deploy"):
        shutil.copytree(ROOT / package, app / package)
    for decoy in (*DECOYS, "server/test_app.py", "client/notes.txt"):
        write(app / decoy)
    (app / "common" / "link.py").symlink_to(app / "docs" / "conf.py")
    (app / "common" / "linked").symlink_to(app / "docs")
    visited.clear()
    ours = make_bundle(app)
    read = {path.relative_to(app).parts[0] for path in visited if path != app}
    assert read == {"server", "client", "strategies", "common"}
    assert not any(path.name == "__pycache__" for path in visited)
    assert ours == build_fab_from_disk(app)


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"fab-include": ["src/**/*.py"]},
        {"fab-include": ["/src/*.py", "/LICENSE"]},
        {"fab-include": ["src/de*/one.py"]},
        {"fab-include": ["src/deep"]},
        {"fab-include": ["deep/"]},
        {"fab-include": ["LICENSE", "one.py"]},
        {"fab-include": ["**/one.py"]},
        {"fab-include": ["src/[a-d]*/one.py"]},
        {"fab-include": ["src/**"], "fab-exclude": ["docs/**", "src/deep/two.py"]},
        {"fab-exclude": ["*.json", ".gitignore"]},
    ],
)
def test_patterns_mean_what_they_mean_to_flower(tmp_path: Path, patterns: dict[str, list[str]]) -> None:
    app = {"publisher": "tests", **patterns, "components": {"serverapp": "a:app", "clientapp": "b:app"}}
    project = {"project": {"name": "app", "version": "1.0.0"}, "tool": {"flwr": {"app": app}}}
    write(tmp_path / "pyproject.toml", tomli_w.dumps(project))
    write(tmp_path / "LICENSE", "free\n")
    write(tmp_path / ".gitignore", "runs/\nhidden.py\n")
    for file in ("src/a.py", "src/deep/one.py", "src/deep/two.py", "src/deeper/one.py", "src/hidden.py", *DECOYS):
        write(tmp_path / file)
    write(tmp_path / "src" / "deep" / "one.json", "{}")
    assert make_bundle(tmp_path) == build_fab_from_disk(tmp_path)


def test_folder_without_an_app_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be bundled .*No such file"):
        make_bundle(tmp_path)
    write(tmp_path / "pyproject.toml", '[project]\nname = "x"\nversion = "1.0.0"\n')
    with pytest.raises(ConfigError, match=r"cannot be bundled .*Invalid Flower App configuration"):
        make_bundle(tmp_path)
    write(tmp_path / "pyproject.toml", "[project\n")
    with pytest.raises(ConfigError, match="cannot be bundled"):
        make_bundle(tmp_path)

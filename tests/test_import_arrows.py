"""Who may import whom; and which folders stay free of Flower."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "common": {"server", "client", "strategies", "deploy"},
    "strategies": {"server", "client", "deploy"},
    "client": {"server", "deploy"},
    "server": {"client", "deploy"},
}
# Files that talk to Flower; training code and strategy maths do not.
FLOWER = {
    "client/app.py",
    "client/connect/worker_process.py",
    "client/preflight/superlink.py",
    "client/connect/supernode.py",
    "client/connect/worker.py",
    "common/protocol/records.py",
    "common/protocol/wire.py",
    "strategies/flower/strategy.py",
    "strategies/flower/messages.py",
    "strategies/flower/streaming.py",
    "server",
    "deploy",
}


def imported(path: Path) -> set[str]:
    """Top-level packages imported anywhere in a file, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_import_arrows_hold(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(ROOT)): bad for f in files if (bad := imported(f) & FORBIDDEN[folder])}
    assert wrong == {}


def test_only_named_files_know_flower() -> None:
    wrong = []
    for folder in (*FORBIDDEN, "deploy"):
        for file in (ROOT / folder).rglob("*.py"):
            name = str(file.relative_to(ROOT))
            if "flwr" in imported(file) and not ({name, folder} & FLOWER):
                wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("file", ["worker_process.py", "verify.py"])
def test_site_leaves_fedspans_code_to_the_bundle(file: str) -> None:
    """What it imported of an installed FedSpan would stand in for the bundle's own."""
    assert not imported(ROOT / "client" / "connect" / file) & {*FORBIDDEN, "deploy"}


def test_the_check_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from server.app import app\n    import client.session\n")
    assert imported(file) == {"server", "client"}

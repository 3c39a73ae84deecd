"""The ninth strategy of docs/new-strategy.md, applied to a copy of the tree: three files, lint, types, tests, a run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.sandbox.tiny import make_federation
from server.run.folder import read_lines
from tests.harness.processes import ROOT, environment

PAGE = ROOT / "docs" / "new-strategy.md"
RUN = """
import sys
from pathlib import Path
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from deploy.experiment.simulate import InProcessGrid
from server.app import federate
source, run_dir = map(Path, sys.argv[1:])
with InProcessGrid(resolved(load(source, FederationConfig), source)) as grid:
    federate(grid, source, run_dir, resume=False, flower_run=None, keep_model=False)
"""


def applied(page: str, tree: Path) -> set[str]:
    """Apply a page's blocks to a tree; names of the files that they make or change."""
    touched = set()
    for language, name, body in re.findall(r"^```(python|diff)(?: (\S+))?\n(.*?)^```$", page, re.M | re.S):
        lines = body.splitlines()
        if language == "diff":
            name = lines.pop(0).removeprefix("+++ ")
            before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in kinds) for kinds in (" ", " +"))
            text = (tree / name).read_text()
            assert f"\n{text}".count(f"\n{before}") == 1, f"{name} has not exactly one place for: {before}"
            body = text.replace(before, after)
        if name:
            (tree / name).write_text(body)
            touched.add(name)
    return touched


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A copy of the tree with the strategy, and what the page touched."""
    copy = tmp_path_factory.mktemp("tree")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    touched = applied(PAGE.read_text(), copy)
    done = within(copy, "-m", "deploy", "schemas")
    assert done.returncode == 0, done.stdout + done.stderr
    return copy, touched


def within(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy, which is what it then imports."""
    env = {**environment(), "PYTHONPATH": str(copy), "MYPYPATH": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=env, capture_output=True, text=True, timeout=550, check=False
    )


def test_three_files_of_the_product_change_and_the_schemas(tree: tuple[Path, set[str]]) -> None:
    copy, touched = tree
    files = {str(f.relative_to(copy)) for f in copy.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    changed = {n for n in files if not (ROOT / n).exists() or (ROOT / n).read_bytes() != (copy / n).read_bytes()}
    made = {"deploy/schemas/federation.schema.json", "docs/reference.md"}  # by `fedspan schemas`
    assert made <= changed
    assert changed - made == touched
    assert {name for name in touched if not name.startswith("tests/")} == {
        "common/config/strategy.py",
        "strategies/__init__.py",
        "strategies/fedit_ls.py",
    }
    schema = json.loads((copy / "deploy/schemas/federation.schema.json").read_text())
    assert "ridge" in schema["$defs"]["FedITLSConfig"]["properties"]


def test_linter_takes_it(tree: tuple[Path, set[str]]) -> None:
    for arguments in (("format", "--check", "."), ("check", ".")):
        done = within(tree[0], "-m", "ruff", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_type_checker_takes_it(tree: tuple[Path, set[str]]) -> None:
    done = within(tree[0], "-m", "mypy")
    assert done.returncode == 0, done.stdout + done.stderr


def test_laws_and_its_own_oracle_hold(tree: tuple[Path, set[str]]) -> None:
    chosen = ["tests/strategies/test_fedit_ls.py", "tests/strategies/test_laws.py", "-k", "fedit_ls or fedit-ls"]
    done = within(tree[0], "-m", "pytest", "-p", "no:cacheprovider", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout, re.M)
    assert passed is not None
    assert int(passed[1]) >= 15


def test_a_federation_learns_with_it(tree: tuple[Path, set[str]], tmp_path: Path) -> None:
    strategy = {"name": "fedit-ls", "modules": "linear", "blocks": "lower half", "rank": 4, "lora_alpha": 8.0}
    file = make_federation(tmp_path, {"site-a": 9, "site-b": 17}, strategy=strategy, rounds=3)
    run_dir = tmp_path / "run"
    done = within(tree[0], "-c", RUN, str(file), str(run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run_dir / "run.json").read_text())["status"] == "completed"
    measured = [
        r for r in read_lines(run_dir / "metrics.jsonl") if r["phase"] == "evaluate" and r["client"] == "server"
    ]
    judged = {record["round"]: record["evaluate"]["loss"] for record in measured}
    assert judged[3] < judged[0]

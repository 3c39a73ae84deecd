"""What a user can get wrong is one line on stderr and exit code 2, before anything is started."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from deploy.cli import main
from deploy.sandbox.tiny import make_federation


def edit(file: Path, **changes: object) -> None:
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))


def set_data(folder: Path, **changes: object) -> None:
    site = folder / "site-a.yaml"
    edit(site, data={**yaml.safe_load(site.read_text())["data"], **changes})


def add_site(folder: Path, name: str, **changes: object) -> None:
    """Another site with site-a's data."""
    site = yaml.safe_load((folder / "site-a.yaml").read_text())
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**site, "name": name, **changes}))
    edit(folder / "federation.yaml", local={"sites": ["site-a.yaml", f"{name}.yaml"]})


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such file": (lambda f: (f / "federation.yaml").unlink(), "federation.yaml: no such file"),
    "unknown key": (lambda f: edit(f / "federation.yaml", roundz=3), "unknown key `roundz`; did you mean `rounds`?"),
    "unknown key in a site file": (
        lambda f: edit(f / "site-a.yaml", devise="cpu"),
        "site-a.yaml: unknown key `devise`",
    ),
    "no site file": (lambda f: (f / "site-a.yaml").unlink(), "site-a.yaml: no such file"),
    "no shard": (lambda f: (f / "site-a.jsonl").unlink(), "site-a.jsonl does not exist"),
    "no sites": (lambda f: edit(f / "federation.yaml", local=None), "missing key `local.sites`"),
    "no model": (lambda f: edit(f / "federation.yaml", model={"path": "absent"}), "absent does not exist or holds no"),
    "two sites of one name": (
        lambda f: edit(f / "federation.yaml", local={"sites": ["site-a.yaml", "site-a.yaml"]}),
        "`name` 'site-a' is also the name of",
    ),
    "two sites of one ledger": (
        lambda f: add_site(f, "site-b", ledger="site-a-ledger.jsonl"),
        "site-a-ledger.jsonl is also that of",
    ),
    "two sites of one ledger, by a link": (
        lambda f: ((f / "other").symlink_to("site-a-ledger.jsonl"), add_site(f, "site-b", ledger="other")),
        "site-a-ledger.jsonl is also that of",
    ),
    "two sites of one folder for models": (
        lambda f: (edit(f / "site-a.yaml", keep={"model": "models"}), add_site(f, "site-b")),
        "site-b.yaml: `keep.model` is also that of",
    ),
    "somebody else's folder for models": (
        lambda f: (edit(f / "site-a.yaml", keep={"model": "."}), (f / "tiny").mkdir(), (f / "tiny" / "x").touch()),
        "tiny exists and holds no model of a federation; move it away, or name another folder",
    ),
    "more clients than sites": (
        lambda f: edit(f / "federation.yaml", cohort={"min_clients": 3}),
        "`cohort.min_clients` is 3, but `local.sites` lists 1",
    ),
    "larger rounds than sites": (
        lambda f: edit(f / "federation.yaml", cohort={"mode": "buffered", "size": 4, "max_age": 1, "min_clients": 1}),
        "`cohort.size` is 4, but `local.sites` lists 1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_nothing_is_written(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, says = MISTAKES[mistake]
    file = make_federation(tmp_path, {"site-a": 9})
    make(tmp_path)
    capsys.readouterr()  # transformers shows its progress
    assert main(["run", str(file), "--runs", str(tmp_path / "runs")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_run_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = make_federation(tmp_path, {"site-a": 9})
    (tmp_path / "runs" / "again").mkdir(parents=True)
    (tmp_path / "runs" / "again" / "metrics.jsonl").write_text("old")
    assert main(["run", str(file), "--runs", str(tmp_path / "runs"), "--name", "again"]) == 2
    assert "again already holds a run (metrics.jsonl)" in capsys.readouterr().err
    assert (tmp_path / "runs" / "again" / "metrics.jsonl").read_text() == "old"

"""What `fedspan serve` refuses before anything is started, and what it does for a service manager."""

from pathlib import Path

import pytest

from common.system.processes import free_ports
from deploy.sandbox.tiny import make_federation
from tests.harness.command import fedspan
from tests.harness.sample_run import completed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make_federation(tmp_path, {"site-a": 9, "site-b": 17}, local=None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            [],
            "give --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile, or --insecure",
        ),
        (["--ssl-ca-certfile", "ca", "--ssl-certfile", "c", "--ssl-keyfile", "k"], "ca does not exist"),
        (["--insecure", "--registry", "register.json"], "--registry needs TLS: give --ssl-ca-certfile"),
        (["--insecure", "--signature", "none.sig"], "none.sig: cannot be read (No such file or directory)"),
        (["--insecure", "--tries", "-1"], "'-1'; allowed: whole numbers, 0 and more"),
        (["--insecure", "--resume"], "holds no run that could go on"),
    ],
)
def test_mistakes_are_told_before_anything_starts(file: Path, options: list[str], says: str) -> None:
    runs = file.parent / "runs"
    code, said = fedspan("serve", file, "--runs", runs, *options)
    assert code == 2
    assert says in said
    assert not runs.exists()


def test_service_manager_may_start_a_run_again_that_has_ended(file: Path) -> None:
    run = completed(file.parent / "runs" / "tiny")
    again = ["serve", file, "--runs", run.parent, "--insecure"]
    code, said = fedspan(*again, "--resume-if-begun")
    assert code == 0
    assert "the run has ended well" in said
    assert "<html" in (run / "report.html").read_text()  # its supervisor had died before it wrote one
    code, said = fedspan(*again)
    assert code == 2
    assert "already holds a run" in said


def test_standing_server_makes_no_folder_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its default is the folder of this code."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "server").mkdir(mode=0o755)
    monkeypatch.chdir(tmp_path)
    code, said = fedspan("server", "start", "--insecure", "--fleet-api-address", f"127.0.0.1:{free_ports(1)[0]}")
    assert code == 2
    assert f"is in the git work tree {tmp_path}" in said
    assert (tmp_path / "server").stat().st_mode & 0o777 == 0o755

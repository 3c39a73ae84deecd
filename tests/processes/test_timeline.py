"""The timeline of docs/operators.md and docs/hospitals.md, command by command as it stands there, in empty folders.

Only what a reader would replace is replaced: the server's address, the site's name, a shard and a model of the test's
own. A command that goes on (the server, a site) gets a process of its own, as the pages say.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from transformers import AutoModelForCausalLM

from common.system.processes import ProcessGroup, Started, free_ports
from deploy.sandbox.flower import wait_for
from deploy.sandbox.tiny import make_federation, make_shard
from server.run.folder import read_lines, read_run
from tests.harness.processes import FEDSPAN, ROOT, SECONDS, environment

pytestmark = pytest.mark.timeout(1200)
SITES = ("site-a", "site-b")
ENDLESS = (["server", "start"], ["site", "join"], ["site", "watch"])


def commands(page: str, section: int) -> list[list[str]]:
    """The commands under a numbered heading of a page, each as words."""
    text = (ROOT / "docs" / page).read_text()
    (body,) = re.findall(rf"^#+ {section}\. .*?\n(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    lines = re.sub(r"\\\n +", "", "".join(re.findall(r"^    .*\n", body, re.M))).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("    fedspan ", "    cd "))]


class Party:
    """Somebody who follows a page in a folder of their own.

    Args:
        folder: empty.
        port: of the server.
        group: where commands that go on are started.
    """

    def __init__(self, folder: Path, port: int, group: ProcessGroup) -> None:
        folder.mkdir()
        self.folder, self._port, self._group = folder, port, group

    def follow(self, page: str, section: int, site: str = "site-a", only: str = "") -> list[Started]:
        """Run a section's commands, for a site; the processes of those that go on."""
        going_on = []
        for words in commands(page, section):
            words = [self._own(word, site) for word in words]
            if words[0] == "cd":
                self.folder /= words[1]
            elif only not in shlex.join(words):
                continue
            elif words[1:3] in ENDLESS:
                command = ["env", f"--chdir={self.folder}", *FEDSPAN, *words[1:]]
                going_on.append(self._group.start(f"{site}-{words[2]}", command, environment()))
            else:
                self._run(words)
        return going_on

    def _run(self, words: list[str]) -> None:
        if "--watch" in words:
            return  # a display, until Ctrl-C
        more = ["--yes"] if words[1:3] == ["site", "agree"] else []  # nobody sits here
        command = [*FEDSPAN, *words[1:], *more]
        done = subprocess.run(
            command, cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"

    def _own(self, word: str, site: str) -> str:
        word = re.sub(r"(fl\.example\.org|0\.0\.0\.0):9092", f"127.0.0.1:{self._port}", word)
        return word.replace("site-a", site)


def check_log(log: str) -> None:
    """A site's log of a run fits on a screen, in FedSpan's own words."""
    lines = log.splitlines()[1:]  # the first is the command
    assert len(lines) <= 20, log
    assert [line for line in lines if re.search(r"flwr|uvicorn|alembic|INFO|SuperNode ID", line)] == []
    for part in ("link: connected to", "site: coding asks", "site: ready: ", "the model after round 1 is in"):
        assert sum(part in line for line in lines) == 1, (part, log)
    assert sum(" site: round 1 of 1: " in line for line in lines) == 2, log  # trained, evaluated


def check_page(log: Path) -> None:
    """The site's page is at the address that its command prints."""

    def address() -> str | None:
        found = re.search(r"http://\S+", log.read_text()) if log.exists() else None
        return None if found is None else found.group()

    wait_for(lambda: address() is not None, SECONDS)
    assert "1 of 1 rounds are trained here" in httpx.get(str(address())).text


def test_documents_lead_from_empty_folders_to_a_trained_model(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with ProcessGroup(tmp_path / "logs") as group:
        operator = Party(tmp_path / "operator", port, group)
        make_federation(tmp_path / "made", {}, name="coding", rounds=1, local=None, cohort={"min_clients": 2})
        shutil.copytree(tmp_path / "made", operator.folder, dirs_exist_ok=True)
        (operator.folder / "federation.yaml").rename(operator.folder / "coding.yaml")
        operator.follow("operators.md", 1)
        operator.follow("operators.md", 2)
        hospitals = {site: Party(tmp_path / site, port, group) for site in SITES}
        for number, (site, hospital) in enumerate(hospitals.items()):
            operator.follow("operators.md", 3, site)
            shutil.move(operator.folder / f"coding-{site}.zip", hospital.folder)
            make_shard(hospital.folder / "rows.jsonl", 60, 60 * number)
            shutil.copytree(tmp_path / "made" / "model", hospital.folder / "models" / "smollm2")
            hospital.follow("hospitals.md", 1, site)
            shutil.copy(hospital.folder / f"{site}.pub", operator.folder)
            operator.follow("operators.md", 5, site, only="sites add")
        (server,) = operator.follow("operators.md", 5, only="server start")
        wait_for((operator.folder / "server" / "server.json").exists, SECONDS)
        joined = []
        for site, hospital in hospitals.items():
            for section in (3, 4, 5):
                joined += hospital.follow("hospitals.md", section, site)
        operator.follow("operators.md", 7)
        operator.follow("operators.md", 8, only="status")
        make_shard(operator.folder / "rows.jsonl", 20, 200)  # no site has these
        operator.follow("operators.md", 9)
        for site, hospital in hospitals.items():
            hospital.follow("hospitals.md", 6, site)
            check_page(tmp_path / "logs" / f"{site}-watch.log")
            check_log((tmp_path / "logs" / f"{site}-join.log").read_text())
        for site, hospital in hospitals.items():
            hospital.follow("hospitals.md", 7, site)
        assert [process.process.poll() for process in (server, *joined)] == [None] * 3  # until they are ended
    run = operator.folder / "runs" / "coding"
    assert read_run(run)["status"] == "completed"
    trained = [record["client"] for record in read_lines(run / "metrics.jsonl") if record["phase"] == "train"]
    assert sorted(trained) == list(SITES)
    AutoModelForCausalLM.from_pretrained(run / "model")
    assert (run / "report.html").is_file()

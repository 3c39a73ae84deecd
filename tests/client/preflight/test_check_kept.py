"""Whether the federation's model can be kept: its folder is free, its disk has room."""

import json
from typing import Any

import pytest

from tests.client.preflight.test_check import Files, files, look, output

__all__ = ["files", "output"]  # fixtures

GIGABYTES = 10**9


def test_site_that_keeps_no_model_is_told_so(files: Files) -> None:
    finding = look("kept model", files.subject())
    assert (finding.level, "does not come here" in finding.found) == ("skipped", True)


@pytest.mark.parametrize(("when", "times"), [("end", 2), ("best", 4), ("every", 3)])
@pytest.mark.parametrize("strategy", [{"name": "fedftg", "rank": 2}, {"name": "fedsa-lora", "rank": 2}])
def test_room_for_all_that_is_written_on_the_way(
    files: Files,
    when: str,
    times: int,
    strategy: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files.change("site", keep={"model": "models", "when": when})
    files.change("federation", strategy=strategy, evaluation={"server": None}, rounds=2)
    subject = files.subject()
    if strategy["name"] == "fedftg":
        one = sum(p.nbytes for p in subject.tuned.model.parameters())
    else:  # the federation's adapter, and the site's own
        one = 2 * sum(p.nbytes for p in (subject.tuned.parameters | subject.tuned.local).values())
    for free, level in ((times * one, "ok"), (times * one - 1, "FAIL")):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: type("Usage", (), {"free": free})())
        finding = look("kept model", subject)
        assert finding.level == level, finding
    assert "make room, name a folder on another disk" in finding.mend


def test_folder_of_somebody_else_fails_and_one_of_ours_does_not(files: Files) -> None:
    files.change("site", keep={"model": "models"})
    folder = files.site.parent / "models" / "tiny"
    folder.mkdir(parents=True)
    assert look("kept model", files.subject()).level == "ok"
    (folder / "thesis.txt").write_text("years of work")
    finding = look("kept model", files.subject())
    assert (finding.level, "exists and holds no model of a federation" in finding.found) == ("FAIL", True)
    assert "move it away" in finding.found
    (folder / "delivered.json").write_text(json.dumps({"run": "x", "models": {}}))
    assert look("kept model", files.subject()).level == "ok"

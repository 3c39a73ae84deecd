"""What a site's people read of it: its link, its work, its losses."""

import json
import logging
import time
from pathlib import Path

import pytest

from client.progress import Progress
from client.watch.link_state import LinkState
from client.watch.status import in_words
from common.config.federation import FederationConfig
from deploy.cli import main
from deploy.sandbox.tiny import make_federation

NOW = 1_700_000_000.0
ROUND_ONE = {"steps": 20.0, "seconds": 4.0, "loss": 2.5}


@pytest.fixture
def federation() -> FederationConfig:
    return FederationConfig.model_validate(
        {
            "name": "coding",
            "model": {"path": "m"},
            "strategy": "fedftg",
            "rounds": 14,
            "training": {"learning_rate": 1.0, "local_steps": 20},
        }
    )


def status(home: Path, **told: object) -> Path:
    """A site file, and beside it the site's working files with a status that is as of now."""
    make_federation(home, {"site-a": 30}, name="coding")
    known = {"time": time.time(), "site": "site-a", "superlink": "fl:9092", "link": "up", "link_since": NOW}
    (home / ".site-a").mkdir()
    (home / ".site-a" / "status.json").write_text(json.dumps({**known, "worker": {"state": "idle"}, **told}))
    return home / "site-a.yaml"


def test_log_says_in_a_line_what_was_done_in_a_round(
    federation: FederationConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "site")
    progress = Progress(tmp_path / "work.json")
    progress.begin(1, federation, "hello", None)
    progress.ready(30, 3, "2 x NVIDIA L4")
    progress.end(0)
    assert json.loads((tmp_path / "work.json").read_text())["devices"] == "2 x NVIDIA L4"
    progress.begin(1, federation, "train", 1)
    progress.scored(0, {"loss": 3.25, "rouge_l": 0.125, "bleu_4": 0.5, "examples": 9})
    progress.trained(ROUND_ONE)
    progress.end(1_500_000)
    progress.begin(1, federation, "train", 2)
    progress.trained({"steps": 20.0})
    progress.refuse("this site's policy: `max_rounds` is 1")
    progress.begin(1, federation, "deliver", 1)
    progress.ended(1, Path("models/coding/best"))
    progress.end(0)
    assert [record.getMessage() for record in caplog.records] == [
        "coding asks this site to take part: fedftg, 14 rounds",
        "ready: 30 training rows, 3 held out, 2 x NVIDIA L4",
        "round 1 of 14: the model after round 0 has here: loss 3.250, ROUGE-L 0.125; 20 steps in 4 s, "
        "training loss 2.500; 1.5 MB leave",
        "round 2 of 14: refused: this site's policy: `max_rounds` is 1",
        "the run has ended after round 2 of 14; the model after round 1 is in models/coding/best",
    ]


def test_work_is_kept_over_a_restart_and_a_resumed_run_counts_a_round_once(
    federation: FederationConfig, tmp_path: Path
) -> None:
    file = tmp_path / "work.json"
    first = Progress(file)
    for number in (1, 2):
        first.begin(1, federation, "train", number)
        first.trained({**ROUND_ONE, "loss": float(number)})
        first.end(10)
    again = Progress(file)
    again.begin(2, federation, "train", 2)  # the run was resumed after round 1
    again.step(7, 20)
    kept = json.loads(file.read_text())
    assert (kept["doing"], kept["round"], kept["rounds"]) == ("training", 2, 14)
    again.trained({**ROUND_ONE, "loss": 9.0})
    again.end(10)
    kept = json.loads(file.read_text())
    assert [(line["round"], line["loss"]) for line in kept["trained"]] == [(1, 1.0), (2, 9.0)]
    assert (kept["doing"], kept["round"], kept["step"]) == (None, None, None)


def test_next_run_of_a_federation_begins_anew(federation: FederationConfig, tmp_path: Path) -> None:
    progress = Progress(tmp_path / "work.json")
    seen = []
    for number, run, message in ((1, "a", "train"), (1, "a", "evaluate"), (2, "a", "train"), (3, "b", "hello")):
        progress.begin(number, federation, message, None if message == "hello" else 4, run)
        if message == "train":
            progress.trained(ROUND_ONE)
        if message == "evaluate":
            progress.ended(4)
        progress.end(0)
        work = json.loads((tmp_path / "work.json").read_text())
        seen.append((len(work["trained"]), work["ended"]))
    assert seen == [(1, None), (1, 4), (1, None), (0, None)]  # the second is resumed after it had ended


@pytest.mark.parametrize(
    "kept",
    ["", "{", "[]", '{"federation": "coding"}', '{"rounds": 3, "trained": 1, "scored": []}'],
)
def test_file_of_another_form_is_begun_anew(federation: FederationConfig, tmp_path: Path, kept: str) -> None:
    file = tmp_path / "work.json"
    file.write_text(kept)
    progress = Progress(file)
    progress.begin(1, federation, "train", 1)
    progress.trained(ROUND_ONE)
    progress.end(10)
    assert [line["round"] for line in json.loads(file.read_text())["trained"]] == [1]


def test_progress_that_cannot_be_written_ends_no_training(
    federation: FederationConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress(tmp_path / "missing" / "work.json")
    for number in (1, 2):
        progress.begin(1, federation, "train", number)
        progress.trained(ROUND_ONE)
        progress.end(10)
    assert caplog.text.count("cannot be written") == 1


def test_link_tells_each_change_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "link")
    file = tmp_path / "link.json"
    link, states = LinkState("fl:9092", file), []
    for event in ("waits", "waits", "refused", "up", "up", "lost", "lost", "up"):
        if event == "up":
            link.up()
        else:
            link.down(event, refused=event == "refused", patience=120.0 if event == "waits" else None)
        states.append(json.loads(file.read_text())["state"])
    assert states == ["waiting", "waiting", "refused", "up", "up", "lost", "lost", "up"]
    assert [record.getMessage() for record in caplog.records] == [
        "waits; trying on for 120 seconds",
        "refused; trying on",
        "connected to fl:9092; waiting to be asked",
        "lost; trying on",
        "connected to fl:9092 again; waiting to be asked",
    ]


def test_status_says_what_a_site_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = {"federation": "coding", "strategy": "fedftg", "rounds": 14, "doing": "training", "round": 3}
    work |= {"since": time.time() - 40, "step": 12, "steps": 20, "refused": None}
    work |= {"trained": [{"round": 1, "loss": 2.5, "seconds": 4.0}, {"round": 2, "loss": None, "seconds": None}]}
    work |= {"scored": [{"after": 0, "scores": {"loss": 3.25}}]}
    assert main(["site", "status", str(status(tmp_path, work=work))]) == 0
    first, doing, *results = capsys.readouterr().out.splitlines()
    assert first.startswith("site-a: connected to fl:9092 since 2023-11-1")
    assert doing == "coding (fedftg), round 3 of 14; training for 0:00:40, step 12 of 20"
    assert results == ["training loss by round: 2.500", "loss of the federation's model here: 3.250 after round 0"]
    work |= {"doing": None, "round": None, "ended": 12, "model": "/kept/coding/best"}
    for told in ({"work": work, "time": time.time()}, {"work": work, "time": NOW}):
        _, ended, where, *_ = in_words({"worker": {"state": "idle"}, **told})
        assert (ended, where) == (
            "coding (fedftg), round 12 of 14; the run has ended",
            "the model is in /kept/coding/best",
        )


def test_link_that_is_refused_is_not_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = status(tmp_path, link="refused", link_reason="fl:9092 does not let the key in\x1b[2J")
    assert main(["site", "status", str(file)]) == 1
    (first, asked) = capsys.readouterr().out.splitlines()
    assert first.startswith("site-a: refused since 2023-11-1")
    assert first.endswith("fl:9092 does not let the key in\\x1b[2J")
    assert asked == "not asked yet"


def test_site_that_does_not_take_part_is_said_to_be_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "status", str(status(tmp_path, time=NOW))]) == 1
    assert "does not take part; fedspan site join was last seen 2023-11-1" in capsys.readouterr().out
    assert list(in_words({"time": NOW, "site": "x"})) != []
    (tmp_path / ".site-a" / "status.json").unlink()
    assert main(["site", "status", str(tmp_path / "site-a.yaml")]) == 2
    assert "this site has not joined yet" in capsys.readouterr().err

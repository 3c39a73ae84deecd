"""The comparison page and tables, made of run folders whose numbers are known."""

import csv
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deploy.cli import main
from deploy.experiment.compare import write_comparison

LOSS = {"fedit": [0.52, 0.61, 0.58], "flexlora": [0.41, 0.47, 0.50], "<b>ours</b>": [0.44, 0.55]}
BYTES = {"fedit": 4000, "flexlora": 3000, "<b>ours</b>": 500}


def cell(folder: Path, strategy: str, seed: int, loss: float) -> None:
    """A finished run of two rounds and two sites."""
    folder.mkdir(parents=True)
    records: list[dict[str, object]] = []
    for number in (0, 1, 2):
        told = {
            "loss": loss + 2.0 - number,
            "rouge_l": 0.1 * number,
            "perplexity": None,
            "examples": 64,
            "generated": 16,
        }
        records.append({"round": number, "client": "server", "phase": "evaluate", "evaluate": told})
    for number in (1, 2):
        for site, spent in (("site-a", 3.0), ("site-b", 5.0)):
            moved, seconds = {"down": 0 if number == 1 else 1000, "up": BYTES[strategy]}, {"train": spent, "wait": 99.0}
            records.append({"round": number, "client": site, "phase": "train", "bytes": moved, "seconds": seconds})
        found = {"client-cosine/layers.0": 0.2 * number, "client-cosine/layers.1": 0.4 * number}
        found |= {"truncation-loss/layers.0": 0.03, "numerical-rank/layers.0": 16.0} if strategy == "flexlora" else {}
        spent = {"aggregate": 0.5}
        records.append(
            {"round": number, "client": "server", "phase": "aggregate", "diagnostics": found, "seconds": spent}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "run.json").write_text(json.dumps({"status": "completed"}))
    (folder / "cell.json").write_text(json.dumps({"seed": seed}))
    sample = {"prompt": "a & b?", "expected": "yes", "before": "no", "after": f"{strategy} says"}
    (folder / "samples.json").write_text(json.dumps([sample]))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Three strategies; of the last one a seed is missing. A fourth found no learning rate: three runs are missing."""
    settings = []
    where = {"clients": 2, "alpha": 0.5, "rank": 8, "local_steps": None}
    for number, (strategy, losses) in enumerate(LOSS.items()):
        names = [f"final/{number}-{seed}" for seed in range(3)]
        for seed, loss in enumerate(losses):
            cell(tmp_path / names[seed], strategy, seed, loss)
        tried: list[dict[str, object]] = [{"learning_rate": rate, "score": 1.0} for rate in (1e-3, 1e-2, 1e-1)]
        rate = 1e-1 if number == 0 else 1e-2
        settings.append({"strategy": strategy, **where, "learning_rate": rate, "tried": tried, "cells": names})
    tried = [{"learning_rate": 1.0, "score": None, "status": "failed"}, {"learning_rate": 2.0, "score": None}]
    settings.append({"strategy": "rolora", **where, "learning_rate": None, "tried": tried, "cells": []})
    partitions = [{"clients": 2, "alpha": 0.5, "sites": {"site-a": {"x": 5, "y": 1}, "site-b": {"y": 7}}}]
    summary = {"name": "trial", "select_by": "loss", "settings": settings, "partitions": partitions, "seeds": [0, 1, 2]}
    (tmp_path / "experiment.json").write_text(json.dumps(summary))
    return tmp_path


def table(text: str) -> dict[str, str]:
    """A Markdown table's rows by their first cell."""
    return {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}


def estimate(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def test_final_table_holds_mean_and_deviation_over_seeds_and_marks_the_best(out: Path) -> None:
    write_comparison(out)
    text = (out / "comparison.md").read_text()
    rows = table(text.split("at equal bytes")[0])
    assert f"**{estimate(LOSS['flexlora'])}**" in rows["FlexLoRA"]
    assert f"| {estimate(LOSS['fedit'])} |" in rows["FedIT"]
    assert "| 0.1† | 3 |" in rows["FedIT"]  # the largest rate that was tried
    assert "| 0.01 | 2 |" in rows["<b>ours</b>"]
    assert "| – | 0 | – |" in rows["RoLoRA"]
    moved = (2 * 3000 * 2 + 2 * 1000) / 2 / 2  # both rounds and sites, per round and site
    assert f"{moved / 1000:.1f} kB" in rows["FlexLoRA"]
    assert "Perplexity" not in text  # not measured


def test_notes_say_on_how_many_rows_and_by_what_rates_and_are_the_same_everywhere(out: Path) -> None:
    write_comparison(out)
    text, page = (out / "comparison.md").read_text(), (out / "comparison.html").read_text()
    for told in (
        "Judged on 64 rows of it; 16 of them were answered.",
        "The learning rate is the one with the best loss on the validation set, with one seed.",
        "† marks the smallest or largest of those tried",
        "rates without a score: RoLoRA with 2 clients, Dirichlet alpha 0.5, rank 8: 1 (failed), 2 (no result).",
    ):
        assert told in text, told
        assert told in page, told


def test_nothing_is_said_of_a_choice_where_one_rate_was_given_nor_of_a_best_where_all_are_the_same(out: Path) -> None:
    summary = json.loads((out / "experiment.json").read_text())
    for setting in summary["settings"]:
        setting["tried"] = []
    del summary["seeds"]  # as an earlier version wrote it
    for number, strategy in enumerate(("fedit", "flexlora")):
        cell(out / f"again/{number}", strategy, 0, 0.5)
        summary["settings"][number]["cells"] = [f"again/{number}"]
    summary["settings"] = summary["settings"][:2]
    (out / "experiment.json").write_text(json.dumps(summary))
    text = write_comparison(out).read_text()
    assert "Mean loss: the same of all strategies." in text
    assert "One learning rate was given, and none picked." in text
    assert "†" not in text
    assert "validation set" not in text
    assert "are not there" not in text


def test_second_table_compares_at_the_bytes_that_the_thriftiest_strategy_moved(out: Path) -> None:
    write_comparison(out)
    text = (out / "comparison.md").read_text()
    title, rows = text.split("at equal bytes: at most ")[1].split("**", 1)
    assert title == "2.0 kB per site"  # ours: 500 up twice, 1,000 down once; one round of fedit or flexlora is more
    at_equal_bytes = table(rows)
    assert f"| 2 | **{estimate(LOSS['<b>ours</b>'])}** |" in at_equal_bytes["<b>ours</b>"]
    assert f"| 0 | {estimate([loss + 2.0 for loss in LOSS['fedit']])} |" in at_equal_bytes["FedIT"]
    assert "RoLoRA" not in at_equal_bytes  # has no run


def test_numbers_are_given_as_tables_too(out: Path) -> None:
    write_comparison(out)
    with (out / "comparison.csv").open() as file:
        final = {(r["strategy"], r["measure"]): r for r in csv.DictReader(file)}
    told = final["flexlora", "loss"]
    assert float(told["mean"]) == pytest.approx(statistics.mean(LOSS["flexlora"]))
    assert float(told["deviation"]) == pytest.approx(statistics.stdev(LOSS["flexlora"]))
    assert (told["clients"], told["alpha"], told["seeds"], told["learning_rate"]) == ("2", "0.5", "3", "0.01")
    assert float(final["fedit", "seconds"]["mean"]) == 2 * (5.0 + 0.5)  # the slowest site and the server
    with (out / "comparison-rounds.csv").open() as file:
        rounds = {(r["strategy"], r["seed"], r["round"], r["measure"]): r["value"] for r in csv.DictReader(file)}
    assert float(rounds["fedit", "1", "1", "loss"]) == pytest.approx(0.61 + 1.0)
    assert float(rounds["fedit", "1", "2", "client-cosine"]) == pytest.approx(0.6)  # mean over layer groups
    assert float(rounds["fedit", "0", "1", "bytes"]) == 2 * 4000
    assert not [key for key in rounds if key[0] == "fedit" and key[3] == "truncation-loss"]


class Page(HTMLParser):
    """Checks that what is opened is closed, and collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")
        ]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)


def test_page_is_whole_fetches_nothing_and_is_the_same_again(out: Path) -> None:
    text = write_comparison(out).read_text()
    page = Page()
    page.feed(text)
    assert (page.open, page.fetched) == ([], [])
    assert "script" not in page.tags
    assert "b" not in page.tags  # a label is text
    for words in ("4 of 12 runs are not there", "Truncation loss", "Numerical rank", "&lt;b&gt;ours", "a &amp; b?"):
        assert words in text, words
    assert "Stable rank" not in text  # nobody reported it
    assert len(re.findall(r"<svg", text)) == 2 + 1 + 1  # loss and ROUGE-L, updates, partition
    assert write_comparison(out).read_text() == text


def test_folder_without_results_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    assert "holds no experiment" in capsys.readouterr().err
    settings = [{"strategy": "fedit", "clients": 2, "alpha": None, "rank": None, "local_steps": None}]
    settings = [{**settings[0], "learning_rate": None, "tried": [], "cells": []}]
    summary = {"name": "x", "select_by": "loss", "settings": settings, "partitions": []}
    (tmp_path / "experiment.json").write_text(json.dumps(summary))
    assert main(["compare", str(tmp_path)]) == 0
    assert "There is no result to compare yet." in (tmp_path / "comparison.html").read_text()

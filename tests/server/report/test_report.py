"""The report says what the run's records say, in one file that needs nothing else."""

import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

from common.errors import RunFolderError
from deploy.cli import main
from server.report.figures import FIGURES, Figure
from server.report.format import precise
from server.report.read import read_run
from server.report.write import render, write_report
from tests.harness.sample_run import ROUNDS, SAMPLES, begin, completed, evaluate, play_round, scores

VOID = {"meta", "link", "br", "img", "input", "hr", "use", "path", "rect", "circle"}


class Page(HTMLParser):
    """Checks that tags close, collects ids, addresses and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.addresses += [v or "" for k, v in attrs if k in ("href", "src", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.addresses += [v or "" for k, v in attrs if k in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += f"{data} "


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return completed(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return write_report(run).read_text()


def test_page_is_well_formed_and_self_contained(html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert [a for a in page.addresses if not a.startswith("#")] == []
    assert {a[1:] for a in page.addresses} <= set(page.ids)
    assert not re.search(r"<script|@import|url\((?!#)|https?://(?!www\.w3\.org/)", html)


def test_headline_compares_the_federation_with_the_base_model(html: str) -> None:
    before, after = scores("server", 0), scores("server", ROUNDS)
    text = " ".join(Page(html).text.split())
    assert f"loss went from {before['loss']:.3f} to {after['loss']:.3f} (better)" in text
    assert f"ROUGE-L went from {before['rouge_l']:.3f} to {after['rouge_l']:.3f} (better)" in text
    assert "held-out loss is better at 2 of 3, worse at 1 (site-c)" in text


def test_every_round_site_and_phase_is_there(html: str, run: Path) -> None:
    text = Page(html).text
    for site in ("site-a", "site-b", "site-c"):
        assert site in text
    for phase in ("Download", "Load", "Train", "Evaluate", "Upload", "Wait"):
        assert phase in text
    for record in read_run(run).metrics:
        if record["phase"] == "train":
            assert f"{record['seconds']['wait']:,.1f}" in text
        if record["phase"] == "evaluate":
            assert f"{record['evaluate']['loss']:.3f}" in text


def test_questions_are_shown_with_both_answers(html: str) -> None:
    text = " ".join(Page(html).text.split())
    for sample in SAMPLES:
        for key in ("prompt", "expected", "before", "after"):
            assert " ".join(sample[key].split()) in text


def test_settings_versions_and_problems_are_there(html: str) -> None:
    text = Page(html).text
    assert "learning_rate: 0.001" in text
    for package in ("flwr", "torch", "transformers", "peft"):
        assert package in text
    assert "CUDA out of memory in round 3, step 4" in text


def test_new_figure_stands_in_its_section(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new plot is a drawing and a line of the table: the page shows it wherever that says."""
    sections = re.findall(r'<h2 id="(\w+)">', render(read_run(run)))
    for section in sections:
        one = Figure(Markup("<svg></svg>"), f"about {section}")
        monkeypatch.setitem(FIGURES, section, [lambda run, one=one: [one]])
    html = render(read_run(run))
    assert len(sections) > 5
    for section in sections:
        shown = html.split(f'<h2 id="{section}">')[1].split("</section>")[0]
        assert f"<figure><svg></svg><figcaption>about {section}</figcaption></figure>" in shown


def test_pages_and_styles_are_installed_with_the_code() -> None:
    """What setuptools takes besides Python files is named in pyproject.toml."""
    root = Path(__file__).parents[3]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    for file in [
        file
        for folder in ("server", "deploy")
        for kind in ("html", "css")
        for file in root.glob(f"{folder}/**/*.{kind}")
    ]:
        assert any(file.match(pattern) for pattern in patterns), file


def test_the_same_folder_gives_the_same_bytes(run: Path, html: str) -> None:
    assert render(read_run(run)) == html


def test_text_of_others_cannot_become_markup(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script><img src=x onerror=y>"&'
    run = completed(tmp_path / "run")
    (run / "samples.json").write_text(json.dumps([{"prompt": evil, "expected": evil, "before": evil, "after": evil}]))
    for name in ("events.jsonl", "metrics.jsonl"):
        text = (run / name).read_text().replace('"site-b"', json.dumps(evil)).replace("CUDA out of memory", "<b>CUDA")
        (run / name).write_text(text)
    html = render(read_run(run))
    assert "<script" not in html
    assert "<img" not in html
    assert "<b>CUDA" not in html
    Page(html)


def test_run_that_failed_before_any_round_has_a_report_with_its_reason(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    folder.fail("1 of 2 sites joined within 300 seconds; site-b: its base model differs", "FederationError")
    text = Page(render(read_run(folder.path))).text
    assert "site-b: its base model differs" in text
    assert "No trained model was evaluated" in text


def test_run_that_failed_in_the_middle_shows_what_there_is(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    play_round(folder, 1)
    evaluate(folder, "server", 1)
    folder.fail("round 2: 0 valid updates, 2 needed", "FederationError")
    text = " ".join(Page(render(read_run(folder.path))).text.split())
    assert "round 2: 0 valid updates, 2 needed" in text
    assert "1 of 4" in text


def test_many_sites_and_rounds_still_fit_one_page(tmp_path: Path) -> None:
    run = completed(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = [
        {
            **record,
            "round": record["round"] + 4 * n,
            "client": f"site-{n:02d}" if record["client"] == "site-b" else record["client"],
        }
        for n in range(30)
        for record in lines
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in more))
    html = render(read_run(run))
    Page(html)
    assert len(html) < 3_000_000


def test_command_line_writes_it_and_names_a_folder_that_holds_no_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ["--runs", str(tmp_path.parent)]
    assert main(["report", tmp_path.name, *runs]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is no run folder: it holds no run.json\n"
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json: not valid JSON"):
        write_report(tmp_path)
    assert main(["report", run.name, "--runs", str(run.parent)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_tiny_diagnostics_are_not_shown_as_zero() -> None:
    assert [precise(v) for v in (None, 0.0, 2.14e-5, 0.25)] == ["–", "0.000", "2.1e-05", "0.250"]

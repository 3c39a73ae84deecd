"""The report says what the run's records say, in one file that needs nothing else."""

import hashlib
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import pytest
from cryptography.hazmat.primitives import hashes
from markupsafe import Markup

from client.privacy.agreement import make_agreement
from common.errors import RunFolderError
from common.system.keys import read_certificates
from common.web.format import precise
from deploy.cli import main
from server.report import write
from server.report.figures import FIGURES, Figure
from server.report.write import render, write_report
from server.run.events import describe
from server.run.from_supervisor import keep_signatures, write_owners
from server.run.read import read_all
from server.run.state import read_state
from server.superlink import security
from server.superlink.process import OwnSuperLink, Tls
from tests.harness import sample_run
from tests.harness.certificates import Authority
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
    for record in read_all(run).metrics:
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
    sections = re.findall(r'<h2 id="(\w+)">', render(read_all(run)))
    for section in sections:
        one = Figure(Markup("<svg></svg>"), f"about {section}")
        monkeypatch.setitem(FIGURES, section, [lambda run, one=one: [one]])
    html = render(read_all(run))
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
        for folder in ("common", "server", "client", "deploy")
        for kind in ("html", "css", "js")
        for file in root.glob(f"{folder}/**/*.{kind}")
    ]:
        assert any(file.match(pattern) for pattern in patterns), file


def test_the_same_folder_gives_the_same_bytes(run: Path, html: str) -> None:
    assert render(read_all(run)) == html


def test_text_of_others_cannot_become_markup(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script><img src=x onerror=y>"&'
    run = completed(tmp_path / "run")
    (run / "samples.json").write_text(json.dumps([{"prompt": evil, "expected": evil, "before": evil, "after": evil}]))
    for name in ("events.jsonl", "metrics.jsonl"):
        text = (run / name).read_text().replace('"site-b"', json.dumps(evil)).replace("CUDA out of memory", "<b>CUDA")
        (run / name).write_text(text)
    html = render(read_all(run))
    assert "<script" not in html
    assert "<img" not in html
    assert "<b>CUDA" not in html
    Page(html)


def test_run_that_failed_before_any_round_has_a_report_with_its_reason(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    folder.fail("1 of 2 sites joined within 300 seconds; site-b: its base model differs", "FederationError")
    folder.close()
    text = Page(render(read_all(folder.path))).text
    assert "site-b: its base model differs" in text
    assert "No trained model was evaluated" in text


def test_run_that_failed_in_the_middle_shows_what_there_is(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    play_round(folder, 1)
    evaluate(folder, "server", 1)
    folder.fail("round 2: 0 valid updates, 2 needed", "FederationError")
    folder.close()
    text = " ".join(Page(render(read_all(folder.path))).text.split())
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
    html = render(read_all(run))
    Page(html)
    assert len(html) < 3_000_000


def test_command_line_writes_it_and_names_a_folder_that_holds_no_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ["--runs", str(tmp_path.parent)]
    assert main(["report", tmp_path.name, *runs]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is no run folder: it holds no run.json\n"
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json cannot be read"):
        write_report(tmp_path)
    assert main(["report", run.name, "--runs", str(run.parent)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_tiny_diagnostics_are_not_shown_as_zero() -> None:
    assert [precise(v) for v in (None, 0.0, 2.14e-5, 0.25)] == ["–", "0.000", "2.1e-05", "0.250"]


def text_of(run: Path) -> str:
    with mock.patch.dict(FIGURES, clear=True):  # drawing takes a second
        return " ".join(Page(render(read_all(run))).text.split())


def test_site_that_tells_no_held_out_rows_is_not_said_to_have_none(tmp_path: Path) -> None:
    run = completed(tmp_path / "run")
    events = (run / "events.jsonl").read_text().replace('"held_out": 164', '"held_out": 0')
    (run / "events.jsonl").write_text(events)
    assert "site-b 1,480 not told" in text_of(run)
    assert "site-a 2,210 245" in text_of(run)
    assert describe(read_all(run).events[3]) == "site-b joined: 1480 rows, held-out rows not told, cpu"


def test_no_round_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_run, "ROUNDS", 24)
    monkeypatch.setattr(write, "figures", lambda run: {})
    html = render(read_all(completed(tmp_path / "run")))
    for part in ("drift", "sites"):
        section = html.split(f'<h2 id="{part}">')[1].split("</section>")[0]
        shown = re.findall(r'<th scope="col">(\d+)</th>', section)
        assert shown[:24] == [str(number) for number in range(1, 25)]


def test_duration_counts_every_part_of_a_resumed_run(tmp_path: Path) -> None:
    run = completed(tmp_path / "run")
    start, lines = read_all(run).info["started"], read_all(run).events
    for number, event in enumerate(lines):
        event["time"] = start + 100 * number
    cut = next(i for i, event in enumerate(lines) if event["event"] == "round_started" and event["round"] == 3)
    pause = 86400
    for event in lines[cut:]:
        event["time"] += pause
    lines.insert(cut, {"time": start + 100 * cut + pause, "event": "resumed", "round": 2, "lost": None})
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lines))
    info = read_all(run).info | {"finished": lines[-1]["time"], "seconds": 5.0}
    (run / "run.json").write_text(json.dumps(info))
    last = len(lines) - 2  # events in all, without the resumption, from 0
    assert read_state(run).worked == [pytest.approx(100.0 * (cut - 1)), pytest.approx(100.0 * (last - cut))]
    assert f"in 2 parts, {(100 * last + pause) // 3600} h" in text_of(run)


def test_run_and_federation_are_named_and_the_operators_folders_are_not(tmp_path: Path) -> None:
    run = completed(tmp_path / "second-try")
    events = (run / "events.jsonl").read_text().replace("CUDA out", f"{tmp_path}/models/base is gone, CUDA out")
    (run / "events.jsonl").write_text(events)
    text = text_of(run)
    assert "Federation report second-try" in text
    assert "Federation sample" in text
    assert "…/base is gone" in text
    assert "path: SmolLM2-135M-Instruct" in text
    assert str(tmp_path) not in text


def test_run_that_was_stopped_says_so_with_the_reason(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    play_round(folder, 1)
    folder.interrupt()
    folder.close()
    assert "This run was stopped after 1 of 4 rounds. the server was stopped, by Flower or a signal" in text_of(
        folder.path
    )


def test_code_signer_link_and_keys_are_told(tmp_path: Path) -> None:
    run, files = completed(tmp_path / "run"), [tmp_path / name for name in ("root.crt", "server.pem", "server.key")]
    for file, content in zip(files, Authority(tmp_path).server(), strict=True):
        file.write_bytes(content)
    tls = Tls(*files)
    keep_signatures(run, [{"digest": "0", "key": "SHA256:reviewer", "signature": "x", "made": "2026-11-20T10:00:00"}])
    write_owners(run, {"7": {"site": "site-a", "key": "SHA256:site-a-key"}})
    link = OwnSuperLink(Path("socket"), "0.0.0.0:9092", tls, tmp_path / "sites.json")
    assert "Code and link not recorded" in text_of(run)
    for _ in range(2):  # a second submission of the same
        security.note(run, b"bundle", link, sample_run.federation())
    text = text_of(run)
    for told in (
        hashlib.sha256(b"bundle").hexdigest(),
        make_agreement(sample_run.federation()).digest,
        "SHA256:reviewer",
        "SHA256:site-a-key",
        "only registered keys",
        read_certificates(tls.certificate)[0].fingerprint(hashes.SHA256()).hex(),
    ):
        assert told in text
    assert "other code" not in text
    security.note(run, b"changed", OwnSuperLink(Path("socket"), "0.0.0.0:9092"), sample_run.federation())
    assert "the run began with other code" in text_of(run)
    assert "WITHOUT TLS" in text_of(run)


def test_models_and_who_has_them_are_told(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    assert 'id="model"' not in render(read_all(folder.path))
    play_round(folder, 1)
    folder.event("best_round", round=1, metric="loss", score=3.26)
    folder.model_info(
        {"best": {"round": 1, "metric": "loss", "score": 3.26}, "stopped_early": "no better for 2 rounds"}
    )
    assert "Round 1 is the best so far: loss 3.260." in text_of(folder.path)
    digests = {"trained_digest": "aa" * 32, "files_digest": "bb" * 32}
    folder.model_info({"models": {"model": {"round": 2, **digests}, "best": {"round": 1, **digests}}})
    folder.event("delivering", clients=["site-a", "site-b", "site-c"], deadline=60)
    folder.event("model_delivered", client="site-a", round=2, same=True)
    folder.event("model_missing", client="site-b", reason=f"site-b: {tmp_path}/models is full")
    folder.event("model_delivered", client="site-c", round=2, same=False)
    folder.close()
    text = text_of(folder.path)
    for told in (
        "The run ended before its last round: no better for 2 rounds.",
        f"best 1 {'aa' * 32} {'bb' * 32}",
        "site-a of round 2, the same files as the server's",
        "site-b not yet: site-b: …/models is full",
        "site-c of round 2, files that differ from the server's",
    ):
        assert told in text

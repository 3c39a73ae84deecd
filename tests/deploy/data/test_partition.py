"""One data set among sites: who gets what, the same for the same seed, and what is refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config.load import load
from common.config.site import SiteConfig
from common.data.images import load_images
from common.data.rows import load_rows
from deploy.cli import main
from tests.harness.tiny_images import COLORS, make_image_federation, make_images

LABELS = ("a", "b", "c", "d")
ROWS = [{"text": f"row {i}", "label": LABELS[i % 4], "ward": f"ward {i % 7 // 2}"} for i in range(200)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return file


def run(data: Path, *options: str, out: str = "out") -> int:
    texts = [] if data.is_dir() or "--prompt" in options else ["--prompt", "text", "--answer", "label"]
    return main(["data", "partition", str(data), "--out", str(data.parent / out), *texts, *options])


def shards(out: Path) -> list[list[dict[str, Any]]]:
    files = sorted(out.glob("site-*.jsonl"), key=lambda file: int(file.stem.partition("-")[2]))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


SPLITS = {
    "iid": ["--by", "iid", "--sites", "3"],
    "dirichlet": ["--by", "dirichlet", "--sites", "3", "--label", "label", "--alpha", "0.3"],
    "label": ["--by", "label", "--sites", "4", "--label", "label", "--labels-per-site", "2"],
    "column": ["--by", "column", "--column", "ward"],
    "quantity": ["--by", "quantity", "--sizes", "6,3,1"],
}


@pytest.mark.parametrize("by", SPLITS)
def test_every_row_is_at_one_site_and_the_seed_decides_where(data: Path, by: str) -> None:
    for out, seed in (("one", "7"), ("two", "7"), ("other", "8")):
        assert run(data, *SPLITS[by], "--seed", seed, out=out) == 0
    found = shards(data.parent / "one")
    assert sorted(row["text"] for shard in found for row in shard) == sorted(row["text"] for row in ROWS)
    assert all(found)
    same = [p.name for p in (data.parent / "one").iterdir()]
    assert all((data.parent / "one" / n).read_bytes() == (data.parent / "two" / n).read_bytes() for n in same)
    assert (shards(data.parent / "other") == found) == (by == "column")


def test_splits_are_what_they_are_called(data: Path) -> None:
    for by, options in SPLITS.items():
        assert run(data, *options, out=by) == 0
    found = {by: shards(data.parent / by) for by in SPLITS}
    assert [len(shard) for shard in found["quantity"]] == [120, 60, 20]
    assert [len(shard) for shard in found["iid"]] == [67, 67, 66]
    assert [{row["ward"] for row in shard} for shard in found["column"]] == [{f"ward {i}"} for i in range(4)]
    held = [{row["label"] for row in shard} for shard in found["label"]]
    assert held == [{"a", "b"}, {"c", "d"}, {"a", "b"}, {"c", "d"}]

    def skew(by: str) -> float:
        """Mean share of a site's most frequent label; 0.25 when labels are spread evenly."""
        shares = [max(Counter(row["label"] for row in shard).values()) / len(shard) for shard in found[by]]
        return sum(shares) / len(shares)

    assert skew("iid") < 0.35 < skew("dirichlet") <= 1


def test_site_files_can_be_used_and_the_record_holds_counts_only(data: Path) -> None:
    assert run(data, *SPLITS["dirichlet"]) == 0
    out = data.parent / "out"
    record = json.loads((out / "partition.json").read_text())
    assert record["rows"] == 200
    assert record["plan"] == {"by": "dirichlet", "seed": 0, "sites": 3, "label": "label", "alpha": 0.3}
    for site, shard in zip(record["sites"], shards(out), strict=True):
        file = out / f"{site['name']}.yaml"
        assert len(load_rows(load(file, SiteConfig).data, file).rows) == site["rows"]
        assert site["labels"] == Counter(row["label"] for row in shard)
    assert "row 1" not in (out / "partition.json").read_text() + (out / "partition.svg").read_text()
    picture = (out / "partition.svg").read_text()
    assert all(f">{site['name']}<" in picture and f">{site['rows']}<" in picture for site in record["sites"])
    assert all(f">{label}<" in picture for label in LABELS)


def test_folder_of_images_becomes_tables_that_name_them(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "scans", 4, seed=0)
    assert run(folder, "--by", "label", "--label", "label", "--sites", "3", "--labels-per-site", "1") == 0
    found = shards(tmp_path / "out")
    assert [{row["label"] for row in shard} for shard in found] == [{color} for color in COLORS]
    assert all(Path(row["image"]).is_file() for shard in found for row in shard)
    assert yaml.safe_load((tmp_path / "out" / "site-1.yaml").read_text())["data"]["prompt"] == "image"


def loaded(out: Path, site: str = "site-1") -> list[tuple[str, str]]:
    """The images of a site as its worker reads them."""
    file = out / f"{site}.yaml"
    return [(row.prompt, row.answer) for row in load_images(load(file, SiteConfig).data, file)[0]]


def test_folder_of_images_may_be_named_by_a_relative_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_images(tmp_path / "scans", 2, seed=0)
    monkeypatch.chdir(tmp_path)
    assert run(Path("scans"), "--by", "iid", "--sites", "1", out="deep/out") == 0
    assert loaded(tmp_path / "deep" / "out") == [
        (str(tmp_path / "scans" / color / f"{i}.png"), color) for color in COLORS for i in range(2)
    ]


@pytest.mark.parametrize(
    ("prompt", "cell"),
    [("image", "scans/{}"), ("{image}", "scans/{}"), ("scans/{image}", "{}"), ("image", "{{folder}}/scans/{}")],
)
def test_table_of_images_names_them_from_anywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompt: str, cell: str
) -> None:
    folder = tmp_path / "a {b}"
    files = sorted(make_images(folder / "scans", 2, seed=0).glob("*/*"))
    cells = [cell.format(file.relative_to(folder / "scans")).replace("{folder}", str(folder)) for file in files]
    (folder / "all.jsonl").write_text("\n".join(json.dumps({"image": c, "label": "x"}) for c in cells))
    monkeypatch.chdir(folder)
    options = ["--by", "iid", "--sites", "1", "--prompt", prompt, "--answer", "label"]
    assert run(Path("all.jsonl"), *options, out="deep/out") == 0
    assert loaded(folder / "deep" / "out") == [(str(file), "x") for file in files]


def test_images_that_are_not_there_are_known_by_the_federation(tmp_path: Path, data: Path) -> None:
    """Texts stay what they are, even where one of them is a file's name."""
    (tmp_path / "row 0").touch()
    assert run(data, *SPLITS["iid"]) == 0
    assert yaml.safe_load((tmp_path / "out" / "site-1.yaml").read_text())["data"]["prompt"] == "text"
    file = make_image_federation(
        tmp_path / "federation", {"one": 1}, task={"type": "image-classification", "labels": list(LABELS)}
    )
    assert run(data, *SPLITS["iid"], "--federation", str(file), out="other") == 0
    assert yaml.safe_load((tmp_path / "other" / "site-1.yaml").read_text())["data"]["prompt"] == f"{tmp_path}/{{text}}"


def test_record_tells_the_value_that_makes_a_site_apart_from_its_name(data: Path) -> None:
    data.write_text("\n".join(json.dumps({**row, "name": row["ward"]}) for row in ROWS))
    assert run(data, "--by", "column", "--column", "name") == 0
    sites = json.loads((data.parent / "out" / "partition.json").read_text())["sites"]
    assert [(site["name"], site["value"]) for site in sites] == [(f"site-{i + 1}", f"ward {i}") for i in range(4)]


def test_label_that_looks_like_mathematics_is_drawn_as_it_is(data: Path) -> None:
    data.write_text("\n".join(json.dumps({**row, "label": f"$\\{row['label']}^{{$"}) for row in ROWS))
    assert run(data, *SPLITS["label"]) == 0
    assert ">$\\a^{$<" in (data.parent / "out" / "partition.svg").read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "secret", "label": "a"}\n{"text": "secret", "label": ""}\n', "row 2: column 'label' is empty"),
        ('{"text": "secret", "label": "a"}\n{"text": "secret \\ud83d", "label": "b"}\n', "row 2: column 'text' is no"),
        ('{"text": "secret", "label": "a"}\n{"text": "b", "label": "b", "x": "\\ud83d"}\n', "row 2: column 'x' is no"),
    ],
)
def test_row_that_cannot_be_used_is_named_with_its_file(
    capsys: pytest.CaptureFixture[str], data: Path, content: str, says: str
) -> None:
    data.write_text(content)
    assert run(data, "--by", "iid", "--sites", "1") == 2
    said = capsys.readouterr().err
    assert f"{data}, {says}" in said
    assert "secret" not in said
    assert [file.name for file in data.parent.iterdir()] == [data.name]


def test_value_of_a_split_that_is_missing_is_named_with_its_file(
    capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    data.write_text("\n".join(json.dumps(row) for row in [*ROWS, {**ROWS[0], "ward": " "}]))
    assert run(data, *SPLITS["column"]) == 2
    assert f"{data}, row 201: column 'ward' is empty" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--prompt", "", "--answer", ""], ["--prompt", "text", "--answer", "lable"]])
def test_csv_without_a_header_does_not_have_its_first_row_quoted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str]
) -> None:
    file = tmp_path / "all.csv"
    file.write_text("secret,test\nsecret,b\n")
    assert run(file, "--by", "iid", "--sites", "1", *options) == 2
    said = capsys.readouterr().err
    assert "--prompt" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--by", "iid"], 2, "--by iid needs --sites"),
        (["--by", "column", "--column", "ward", "--sites", "2"], 2, "--by column takes no --sites"),
        (["--by", "iid", "--sites", "0"], 2, "--sites is 0; allowed: 1 or more"),
        (["--by", "quantity", "--sizes", "1,x"], 2, "--sizes is '1,x'; allowed: positive numbers"),
        (["--by", "quantity", "--sizes", "1000,1"], 2, "site(s) 2 would be empty"),
        (["--by", "iid", "--sites", "201"], 2, "201 sites for 200 rows: some would be empty"),
        (["--by", "column", "--column", "wrad"], 2, "has no column 'wrad'; did you mean 'ward'? columns: text, label"),
        (["--by", "iid", "--sites", "2", "--label", "ward 1"], 2, "--label: shard "),
        (["--by", "iid", "--sites", "2", "--prompt", "txet", "--answer", "label"], 2, "--prompt: shard "),
        (["--by", "iid", "--sites", "2", "--prompt", "{text} {x}", "--answer", "label"], 2, "has no column 'x'"),
        (["--by", "iid", "--sites", "2", "--prompt", "text", "--answer", "{lable}"], 2, "did you mean 'label'?"),
        (["--by", "iid", "--sites", "2", "--prompt", "text", "--answer", "{label"], 2, "--answer: template is not re"),
        (["--by", "iid", "--sites", "2", "--seed", "-1"], 2, "--seed is -1; allowed: 0 or more"),
        (
            ["--by", "label", "--sites", "1", "--label", "label", "--labels-per-site", "2"],
            2,
            "100 of 200 rows would be at no site",
        ),
        (
            ["--by", "dirichlet", "--sites", "150", "--label", "label", "--alpha", "0.01"],
            2,
            "the 200 rows cannot be split so",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    data: Path,
    options: list[str],
    code: int,
    says: str,
) -> None:
    assert run(data, *options) == code
    assert says in capsys.readouterr().err
    assert [file.name for file in data.parent.iterdir()] == [data.name]


def test_labels_are_held_against_the_federations(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    federation: dict[str, Any] = {
        "name": "x",
        "model": {"path": "m"},
        "task": {"type": "sequence-classification", "labels": ["a", "b", "c"]},
        "strategy": {"name": "rolora", "head": "train"},
        "rounds": 1,
        "training": {"learning_rate": 0.1, "local_steps": 1},
    }
    file = data.parent / "federation.yaml"
    file.write_text(yaml.safe_dump(federation))
    assert run(data, *SPLITS["iid"], "--federation", str(file)) == 2
    assert "label(s) 'd' of the data are not in `task.labels` of" in capsys.readouterr().err
    template = ["--prompt", "text", "--answer", "{label}", "--label", "ward"]  # a site's labels are its answers
    assert run(data, *SPLITS["iid"], *template, "--federation", str(file)) == 2
    assert "label(s) 'd' of the data are not in `task.labels` of" in capsys.readouterr().err
    federation["task"]["labels"].append("d")
    file.write_text(yaml.safe_dump(federation))
    assert run(data, *SPLITS["iid"], "--federation", str(file)) == 0
    assert run(data, *SPLITS["iid"], *template, "--federation", str(file), out="other") == 0


def test_folder_that_exists_is_left_alone(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    (data.parent / "out").mkdir()
    assert run(data, *SPLITS["iid"]) == 1
    assert "exists already; name another folder with --out" in capsys.readouterr().err

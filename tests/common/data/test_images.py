"""Folders and tables of images become the same rows; unreadable ones are counted, never silently left out."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config.section import DataConfig
from common.config.task import ImageClassificationTask
from common.data.images import load_images, read_image
from common.data.rows import Row, split_held_out
from common.data.tasks import ImageClassification, make_task
from common.errors import DataError
from tests.harness.tiny_images import COLORS, make_images


def load(path: Path, **options: object) -> tuple[list[Row], int]:
    config = DataConfig(path=path.name, prompt="image", answer="label", **options)  # type: ignore[arg-type]
    return load_images(config, path.parent / "site.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "scans", 3, seed=0)


def test_folder_gives_every_image_with_its_sub_folder_as_label(folder: Path) -> None:
    rows, left_out = load(folder)
    assert left_out == 0
    assert [(row.prompt, row.answer) for row in rows] == [
        (str(folder / color / f"{i}.png"), color) for color in COLORS for i in range(3)
    ]


def test_table_names_images_beside_it(folder: Path) -> None:
    table = folder.parent / "scans.jsonl"
    lines = [{"image": f"scans/{color}/{i}.png", "label": color} for color in COLORS for i in range(3)]
    table.write_text("\n".join(map(json.dumps, lines)))
    assert [(r.prompt, r.key()) for r in load(table)[0]] == [(r.prompt, r.key()) for r in load(folder)[0]]


def test_side_of_an_image_depends_on_its_bytes_and_not_on_its_place(folder: Path) -> None:
    moved = folder.parent / "elsewhere"
    shutil.copytree(folder, moved)
    (moved / "red" / "0.png").rename(moved / "red" / "a.png")
    keys = [{row.key() for row in split_held_out(load(place)[0], 0.3)[1]} for place in (folder, moved)]
    assert keys[0] == keys[1]
    row = load(folder)[0][0]
    assert (
        row.key()
        == hashlib.sha256(f"{hashlib.sha256(Path(row.prompt).read_bytes()).hexdigest()}\0blue".encode()).hexdigest()
    )


def test_unreadable_image_is_counted_in_the_error_and_named_in_the_log_only(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "blue" / "patient-smith.png").write_bytes(b"no image")
    (folder / "red" / "1.png").write_bytes((folder / "red" / "1.png").read_bytes()[:60])
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(
            DataError, match=r"2 of 10 images cannot be read \(numbers 4, 9; .*skip_unreadable: true"
        ) as caught,
    ):
        load(folder)
    assert "smith" not in str(caught.value)
    assert "patient-smith.png" in caplog.text
    rows, left_out = load(folder, skip_unreadable=True)
    assert (len(rows), left_out) == (8, 2)


@pytest.mark.parametrize(
    ("mode", "order", "name"),
    [("I;16", "<u2", "0.png"), ("I;16", "<u2", "0.tif"), ("I;16B", ">u2", "0.tif"), ("I;16", "<u2", "0.jp2")],
)
def test_sixteen_bits_become_eight_over_the_whole_range(tmp_path: Path, mode: str, order: str, name: str) -> None:
    pixels = np.array([[0, 128, 129, 257], [4095, 128 * 257, 65534, 65535]])
    file = tmp_path / name
    Image.frombytes(mode, (4, 2), pixels.astype(order).tobytes()).save(file)
    with Image.open(file) as image:
        assert image.mode == mode  # or this would be a test of something else
    found = read_image(str(file))
    assert found.mode == "RGB"
    expected = [[0, 0, 1, 1], [16, 128, 255, 255]]
    assert np.asarray(found).tolist() == [[[grey] * 3 for grey in row] for row in expected]


@pytest.mark.parametrize("kind", ["int32", "float32"])
def test_pixels_without_a_fixed_range_are_unreadable_and_the_log_says_why(
    folder: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    Image.fromarray(np.full((4, 4), 7, kind)).save(folder / "blue" / "0.tif")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(DataError, match=r"1 of 10 images cannot be read \(numbers 2;"),
    ):
        load(folder)
    mode = "I" if kind == "int32" else "F"
    assert f"blue/0.tif (pixels of mode {mode} have no fixed range; save it with 8 bits, or 16 unsigned)" in caplog.text
    rows, left_out = load(folder, skip_unreadable=True)
    assert (len(rows), left_out) == (9, 1)


def test_file_that_is_no_image_counts_as_unreadable_whatever_its_ending(folder: Path) -> None:
    (folder / "blue" / "IM0001").write_bytes(b"DICM")
    (folder / "red" / "0.png").rename(folder / "red" / "0.jfif")
    (folder / "red" / "Thumbs.db").write_bytes(b"x")
    with pytest.raises(DataError, match=r"1 of 10 images cannot be read \(numbers 4;"):
        load(folder)
    assert len(load(folder, skip_unreadable=True)[0]) == 9


def test_shard_without_a_readable_image_is_refused_even_when_some_may_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "scans" / "red").mkdir(parents=True)
    with pytest.raises(DataError, match="has no rows"):
        load(tmp_path / "scans", skip_unreadable=True)
    (tmp_path / "scans" / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 of 1 images cannot be read"):
        load(tmp_path / "scans", skip_unreadable=True)


def test_image_that_vanishes_later_is_an_error_without_its_name(folder: Path) -> None:
    task = make_task(ImageClassificationTask(labels=list(COLORS)))
    assert isinstance(task, ImageClassification)
    examples = task.examples(None, load(folder)[0], None, 8)
    assert [example.label for example in examples] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    (folder / "blue" / "0.png").unlink()
    with pytest.raises(DataError, match="cannot be read any more") as caught:
        task.collater(None)(examples)
    assert "0.png" not in str(caught.value)


def test_label_that_is_not_listed_is_counted_not_quoted(folder: Path) -> None:
    task = make_task(ImageClassificationTask(labels=["blue", "green"]))
    with pytest.raises(
        DataError, match=r"3 of 9 rows .numbers 7, 8, 9. have a label that is not in task.labels: \['blue', 'green'\]"
    ):
        task.examples(None, load(folder)[0], None, 8)


def test_only_images_may_be_skipped(tmp_path: Path) -> None:
    from common.config.task import CausalLMTask

    config = DataConfig(path="rows.jsonl", prompt="a", answer="b", skip_unreadable=True)
    with pytest.raises(DataError, match="skip_unreadable is true; it is for images"):
        make_task(CausalLMTask()).rows(config, tmp_path / "site.yaml")

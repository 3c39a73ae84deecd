"""Folders and tables of images become the same rows; unreadable ones are counted, never silently left out."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from common.config.section import DataConfig
from common.config.task import ImageClassificationTask
from common.data.images import load_images, read_image
from common.data.rows import Row, split_held_out
from common.data.tasks import ImageClassification, make_task
from common.errors import DataError
from tests.harness.tiny_images import COLORS, make_images


def load(path: Path, **options: object) -> tuple[list[Row], int]:
    config = DataConfig(path=path.name, prompt="image", answer="label", **options)  # type: ignore[arg-type]
    return load_images(config, path.parent / "site.yaml")[:2]


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


def dicom(file: Path, pixels: Any, photometric: str = "MONOCHROME2", **more: Any) -> Path:
    """A DICOM file with such pixels (rows, columns) in 16 bits, or (rows, columns, 3) in 8."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = Dataset()
    data.file_meta, data.PhotometricInterpretation = meta, photometric
    data.SOPClassUID, data.SOPInstanceUID = SecondaryCaptureImageStorage, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape[-2:] if photometric[0] == "M" else pixels.shape[:2]
    data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    data.SamplesPerPixel = 1 if photometric[0] == "M" else 3
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    data.PixelData = pixels.tobytes()
    for key, value in more.items():
        setattr(data, key, value)
    data.save_as(file, enforce_file_format=True)
    return file


GREY = np.array([[0, 1000, 1040, 1100, 4095]], dtype=np.int16)


def grey(file: Path) -> list[int]:
    pixels = np.asarray(read_image(str(file)))
    assert pixels.ndim == 3
    assert (pixels == pixels[..., :1]).all()
    return [int(value) for value in pixels[0, :, 0]]


def test_dicom_is_seen_through_its_window(tmp_path: Path) -> None:
    """C.11.2.1.2: with centre 40 and width 81, -0.5 is black, 79.5 white, and 39.5 in the middle."""
    told = {"WindowCenter": [40, 300], "WindowWidth": [81, 2000], "RescaleIntercept": -1000, "RescaleSlope": 1}
    window = [0, round(255 * 0.5 / 80), round(255 * 40.5 / 80), 255, 255]
    assert grey(dicom(tmp_path / "a.dcm", GREY, **told)) == window
    assert grey(dicom(tmp_path / "IM0001", GREY, **told)) == window  # without an ending
    assert grey(dicom(tmp_path / "b.dcm", GREY, "MONOCHROME1", **told)) == [255 - value for value in window]
    assert grey(dicom(tmp_path / "c.dcm", GREY)) == [round(255 * int(value) / 4095) for value in GREY[0]]


def test_dicom_in_colour_keeps_its_colours(tmp_path: Path) -> None:
    pixels = np.array([[[200, 30, 40], [10, 20, 250]]], dtype=np.uint8)
    assert np.array_equal(np.asarray(read_image(str(dicom(tmp_path / "a.dcm", pixels, "RGB")))), pixels)


def test_dicom_that_is_no_single_image_is_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    label = tmp_path / "scans" / "a"
    label.mkdir(parents=True)
    dicom(label / "1.dcm", GREY)
    dicom(label / "2.dcm", np.stack([GREY, GREY]), NumberOfFrames=2)
    report = pydicom.dcmread(label / "1.dcm")
    del report.PixelData
    report.save_as(label / "3.dcm")
    (label / "4.dcm").write_bytes(b"no DICOM at all")
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=r"3 of 4 images .*numbers 2, 3, 4;"):
        load(tmp_path / "scans")
    assert "a DICOM file of 2 frames; save the wanted one as a file of its own" in caplog.text
    assert "a DICOM file without pixels" in caplog.text
    assert len(load(tmp_path / "scans", skip_unreadable=True)[0]) == 1


def test_image_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # the top of the picture is on the right
    image.save(tmp_path / "a.png", exif=exif)
    turned = np.asarray(read_image(str(tmp_path / "a.png")))
    assert turned.shape == (3, 2, 3)
    assert turned[0, 1].tolist() == [255, 255, 255]

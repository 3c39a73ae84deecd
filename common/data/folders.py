"""Folders as shards: tables in parts, as the hub writes them, and images with a sub-folder per label.

A file's name may hold a patient's, so errors on images name labels alone.
"""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError

log = logging.getLogger(__name__)
IMAGES = {".bmp", ".dcm", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}  # beside the labels' folders
LITTER = {"thumbs.db", "desktop.ini"}  # files that file managers write, in lower case
_NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "_metadata.json"}
_BESIDE = {
    "",
    ".md",
    ".txt",
    ".yaml",
    ".yml",
    ".py",
    ".crc",
    ".cff",
    ".bib",
}  # endings of files that may lie beside tables
_SPLIT = re.compile(r"(train|training|validation|valid|val|dev|eval|test|testing)(?![A-Za-z])", re.IGNORECASE)
_PART = re.compile(r"-(\d+)-of-(\d+)$")


def labelled_images(path: Path) -> list[dict[str, str]]:
    """Files and labels: images are in a label's folder or below it, by name; every file there counts as an image.

    Raises:
        DataError: a folder cannot be listed, or images lie beside the labels' folders.
    """
    rows: list[dict[str, str]] = []
    beside = 0
    for entry in _entries(path, path):
        if os.path.isfile(entry):  # noqa: PTH113 - of a link that leads nowhere, Path.is_file may raise
            beside += Path(entry).suffix.lower() in IMAGES
        else:
            label = path / entry.name
            rows += [{"image": str(file), "label": entry.name} for file in _files(label, label)]
    if beside:
        raise DataError(
            f"shard {path}: {beside} image(s) beside the labels' folders; move each into its label's folder"
        )
    return rows


def _files(folder: Path, label: Path) -> Iterator[Path]:
    """Files in a folder and below it. A link to a folder is not followed but given, as an image that is unreadable."""
    for entry in _entries(folder, label):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(folder / entry.name, label)
        elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
            yield folder / entry.name


def _entries(folder: Path, label: Path) -> list[os.DirEntry[str]]:
    """A folder's entries by name, without dot files and litter. Errors name no folder below ``label``; the log does."""
    try:
        with os.scandir(folder) as found:
            kept = [entry for entry in found if not entry.name.startswith(".") and entry.name.lower() not in LITTER]
    except OSError as error:
        log.error("folder %s cannot be listed", folder)  # the preflight shows no warnings of this module
        where = (
            f"folder {label}" if folder == label else f"a folder below {label}, which the log of this machine names,"
        )
        raise DataError(f"{where} cannot be listed ({error.strerror})") from None
    return sorted(kept, key=lambda entry: entry.name)


def parts(folder: Path, endings: dict[str, str], kind: str, split: str | None) -> tuple[str, list[Path]] | None:
    """Format and files of the tables in a folder, in order; None where it holds no tables, or other files than these.

    Args:
        folder: that holds them, or folders with them.
        endings: formats by the ending of a file's name.
        kind: the format to take; ``auto``: the only one that is there.
        split: the split to take; None: the only one that is there.

    Raises:
        DataError: it is not clear which files are meant, or one is missing.
    """
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        within = file.relative_to(folder)
        if any(part.startswith((".", "_")) for part in within.parts) or file.name.lower() in LITTER | _NO_ROWS:
            continue
        ending = file.suffix.lower()
        if ending in endings and file.is_file():
            found.setdefault(endings[ending], []).append(file)
        elif file.is_file() and not (ending in _BESIDE and (ending or file.name.isupper())) and kind == "auto":
            return None
    if kind != "auto":
        found = {kind: found[kind]} if kind in found else {}
    if not found:
        return None
    if len(found) > 1:
        raise DataError(f"shard {folder} holds tables of several formats; name one in data.format: {', '.join(found)}")
    ((kind, files),) = found.items()
    return kind, _of_split(folder, files, split)


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split(file.relative_to(folder)), []).append(file)
    if split is None and len(splits) == 1:
        chosen = files
    elif split in splits:
        chosen = splits[str(split)]
    else:
        names = ", ".join(name or "(files without a split in their name)" for name in splits)
        what = "holds several splits" if split is None else f"has no split {split!r}"
        raise DataError(f"shard {folder} {what}; name one in data.split: {names}")
    if len(folders := {file.parent for file in chosen}) > 1:
        some = ", ".join(sorted(str(place.relative_to(folder)) for place in folders)[:5])
        raise DataError(f"shard {folder}: its tables lie in several folders ({some}); point data.path at one")
    whole = {int(match[2]) for file in chosen if (match := _PART.search(file.stem))}
    if whole and len(chosen) != max(whole):
        raise DataError(f"shard {folder}: {len(chosen)} of {max(whole)} parts are there; fetch the others")
    return chosen


def _split(file: Path) -> str:
    """The split that a file's name, or its folder's, begins with; empty where none does."""
    match = _SPLIT.match(file.name) or next((m for part in file.parts[-2::-1] if (m := _SPLIT.fullmatch(part))), None)
    return match[1].lower() if match else ""

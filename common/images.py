"""Private images: an image folder or a table of paths becomes rows; pixels are read when a batch is made.

Errors count images and give their numbers; a file's name may hold a patient's, so only the site's own log has it.
"""

import hashlib
import logging
import warnings
from pathlib import Path

from PIL import Image

from common.config import DataConfig, resolve
from common.errors import DataError
from common.rows import Row, load_rows

log = logging.getLogger(__name__)
_LISTED = 10  # numbers of unreadable images in an error


def load_images(config: DataConfig, beside: Path) -> tuple[list[Row], int]:
    """All images of a shard in its order, and how many were left out. A row's prompt is its file's absolute path.

    Args:
        config: where the shard is; its ``prompt`` gives a path, relative to the table, its ``answer`` a label.
        beside: the file that holds ``config``; a relative path is relative to its folder.

    Raises:
        DataError: see ``load_rows``; or all images cannot be read, or some and ``config.skip_unreadable`` is false.
    """
    shard = resolve(config.path, beside)
    found = load_rows(config, beside)
    rows: list[Row] = []
    unreadable: list[int] = []
    for number, row in enumerate(found, start=1):
        file = shard.parent / row.prompt  # absolute paths stay what they are
        digest = _digest(file)
        if digest is None:
            unreadable.append(number)
            log.warning("image %d of shard %s cannot be read: %s", number, shard, file)
        else:
            rows.append(Row(str(file), row.answer, digest))
    if unreadable and not (config.skip_unreadable and rows):
        some = ", ".join(map(str, unreadable[:_LISTED])) + (", ..." if len(unreadable) > _LISTED else "")
        hint = "" if config.skip_unreadable else "; mend them, or set data.skip_unreadable: true"
        raise DataError(
            f"shard {shard}: {len(unreadable)} of {len(found)} images cannot be read (numbers {some}; the log of this "
            f"machine names the files){hint}"
        )
    return rows, len(unreadable)


def read_image(file: str) -> Image.Image:
    """The pixels of an image as RGB; the first frame of several.

    Raises:
        DataError: the file has changed and cannot be read any more.
    """
    image = _decode(Path(file))
    if image is None:
        log.warning("image %s cannot be read", file)
        raise DataError("an image that could be read before cannot be read any more; the log of this machine names it")
    return image


def _digest(file: Path) -> str | None:
    """SHA-256 of a readable image's bytes (hex)."""
    if _decode(file) is None:
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _decode(file: Path) -> Image.Image | None:
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:  # warnings quote the file
            return image.convert("RGB")
    except Exception:  # noqa: BLE001 - Pillow's decoders raise anything
        return None

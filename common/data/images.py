"""Private images: an image folder or a table of paths becomes rows; pixels are read when a batch is made.

Errors count images and give their numbers; a file's name may hold a patient's, so only the site's own log has it.
"""

import hashlib
import logging
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from common.config.section import DataConfig, resolve
from common.data.dicom import is_dicom, read_dicom
from common.data.rows import Loaded, Row, load_rows
from common.errors import DataError
from common.system.files import is_lfs_pointer

log = logging.getLogger(__name__)
_LISTED = 10  # numbers of unreadable images in an error


def load_images(config: DataConfig, beside: Path) -> Loaded:
    """All images of a shard in its order. A row's prompt is its file's absolute path.

    Args:
        config: where the shard is; its ``prompt`` gives a path, relative to the table, its ``answer`` a label.
        beside: the file that holds ``config``; a relative path is relative to its folder.

    Raises:
        DataError: see ``load_rows``; or all images cannot be read, or some and ``config.skip_unreadable`` is false.
    """
    shard = resolve(config.path, beside)
    found, left_out, how = load_rows(config, beside)
    rows: list[Row] = []
    unreadable: list[int] = []
    for number, row in enumerate(found, start=1):
        file = shard.parent / row.prompt  # absolute paths stay what they are
        try:
            rows.append(Row(str(file), row.answer, _digest(file)))
        except DataError as error:
            unreadable.append(number)
            log.warning("image %d of shard %s cannot be read: %s (%s)", number, shard, file, error)
    if unreadable and not (config.skip_unreadable and rows):
        some = ", ".join(map(str, unreadable[:_LISTED])) + (", ..." if len(unreadable) > _LISTED else "")
        hint = "" if config.skip_unreadable else "; mend them, or set data.skip_unreadable: true"
        raise DataError(
            f"shard {shard}: {len(unreadable)} of {len(found)} images cannot be read (numbers {some}; the log of this "
            f"machine names the files and the reasons){hint}"
        )
    return Loaded(rows, left_out + len(unreadable), how)


def read_image(file: str) -> Image.Image:
    """The pixels of an image as RGB, 8 bits each, turned as its EXIF says; the first frame of several.

    16-bit values are scaled to 0..255; for DICOM see ``read_dicom``.

    Raises:
        DataError: the file has changed and cannot be read any more.
    """
    try:
        return _decode(Path(file))
    except DataError as error:
        log.warning("image %s cannot be read (%s)", file, error)
    raise DataError("an image that could be read before cannot be read any more; the log of this machine names it")


def _digest(file: Path) -> str:
    """SHA-256 of a readable image's bytes (hex)."""
    _decode(file)
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _decode(file: Path) -> Image.Image:
    """See ``read_image``. 16-bit images are scaled here, because Pillow would turn all values above 255 into white.

    Raises:
        DataError: the text has the reason why the image cannot be read, but not the file's name.
    """
    try:
        if is_lfs_pointer(file):
            raise DataError("a Git-LFS pointer, not the image itself; run git lfs pull")
        with warnings.catch_warnings(action="ignore"):  # warnings quote the file
            return read_dicom(file) if is_dicom(file) else _ordinary(file)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise anything
        raise DataError(type(error).__name__) from None


def _ordinary(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("I", "F"):
            raise DataError(f"pixels of mode {image.mode} have no fixed range; save it with 8 bits, or 16 unsigned")
        if image.mode.startswith("I;16"):
            return image.convert("I").point(lambda value: value / 257 + 0.5).convert("RGB")
        return image.convert("RGB")

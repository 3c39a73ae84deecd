"""DICOM images as a screen would show them: windowed, bright where they should be, one frame."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import DataError

_ENDINGS = {".dcm", ".dicom", ".ima"}


def is_dicom(file: Path) -> bool:
    """Whether a file says that it is DICOM, or is named so."""
    if file.suffix.lower() in _ENDINGS:
        return True
    with file.open("rb") as opened:
        return opened.read(132)[128:] == b"DICM"


def read_dicom(file: Path) -> Image.Image:
    """The pixels as RGB, 8 bits each.

    Grey values go through the first window of the file; without one, from the lowest to the highest that occurs.
    MONOCHROME1 is inverted, as white is low there.

    Raises:
        DataError: says why it cannot be read, and does not name it.
    """
    from pydicom import dcmread
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
    from pydicom.pixels.utils import pixel_array

    data = dcmread(file, force=file.suffix.lower() in _ENDINGS)
    if "PixelData" not in data:
        raise DataError("a DICOM file without pixels (a report, a structure set)")
    frames = int(data.get("NumberOfFrames", 1) or 1)
    if frames > 1:
        raise DataError(f"a DICOM file of {frames} frames; save the wanted one as a file of its own")
    try:
        pixels = pixel_array(data)  # (rows, columns), or (rows, columns, 3) in RGB
    except Exception as error:
        syntax = getattr(getattr(data.file_meta, "TransferSyntaxUID", None), "name", "unknown")
        raise DataError(f"DICOM pixels compressed as {syntax} cannot be read; save it uncompressed") from error
    interpretation = str(data.PhotometricInterpretation)
    if interpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, data)
        pixels = pixels >> (8 * (pixels.dtype.itemsize - 1))
    if pixels.ndim == 3:
        return Image.fromarray(pixels.astype(np.uint8), "RGB")
    if not interpretation.startswith("MONOCHROME"):
        raise DataError(f"a DICOM file of photometric interpretation {interpretation}; save it as MONOCHROME2 or RGB")
    shown = _windowed(apply_modality_lut(pixels, data).astype(np.float64), data)
    if interpretation == "MONOCHROME1":
        shown = 1.0 - shown
    return Image.fromarray((shown * 255.0 + 0.5).astype(np.uint8), "L").convert("RGB")


def _windowed(values: Any, data: Any) -> Any:  # noqa: ANN401 - arrays (rows, columns), and a pydicom data set
    """Values brought to 0..1 by the first window (DICOM PS3.3, C.11.2.1.2)."""
    centre, width = (_first(data.get(key)) for key in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        low, high = float(values.min()), float(values.max())
        return (values - low) / ((high - low) or 1.0)
    function = str(data.get("VOILUTFunction", "LINEAR")).upper()
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(-4.0 * (values - centre) / width))
    if function == "LINEAR":  # in whole grey values: a window of width 1 has one step
        centre, width = centre - 0.5, max(width - 1.0, 1e-9)
    return np.clip((values - centre) / width + 0.5, 0.0, 1.0)


def _first(value: Any) -> float | None:  # noqa: ANN401
    """The first of one or several values."""
    several = hasattr(value, "__iter__") and not isinstance(value, str)
    value = next(iter(value), None) if several else value
    return None if value is None or value == "" else float(value)

"""Which device and which arithmetic a site trains with."""

from typing import Literal

import torch

from common.errors import TrainingError

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def pick_device(device: str) -> torch.device:
    """The device that a site file asks for; ``auto`` is CUDA when present.

    Raises:
        TrainingError: CUDA is asked for and there is none, or not so many.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    picked = torch.device(device)
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise TrainingError(
            f"device {device} is asked for; this machine has {torch.cuda.device_count()} CUDA device(s)"
        )
    return picked


def pick_autocast(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The autocast type of forward and backward; None for the weights' own type.

    Raises:
        TrainingError: float16 is asked for on a CPU.
    """
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    if precision == "float16" and device.type == "cpu":
        raise TrainingError("precision float16 needs a CUDA device; on a CPU use float32 or bfloat16")
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]

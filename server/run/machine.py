"""On which software and machine a run runs."""

import os
import platform
from pathlib import Path

import psutil

from common.text import installed

_PACKAGES = ("fedspan", "flwr", "torch", "transformers", "peft", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter to a result."""
    return {"python": platform.python_version(), **{package: installed(package) for package in _PACKAGES}}


def machine() -> dict[str, object]:
    """System, processor, cores, memory and GPUs of the server's machine."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {"system": platform.platform(), "cpu": model, "cores": os.cpu_count(), "memory_gib": memory, "gpus": gpus}

"""This machine: its facts, a process's peak memory, and retries when memory runs out."""

import gc
import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil

from common.text import installed

E = TypeVar("E")
T = TypeVar("T")


def resident_peak() -> int:
    """Most bytes that this process's program has held resident at a time.

    On Linux ``ru_maxrss`` would be too large: it includes the memory from before the process executed this program,
    which after a fork is all of its parent's memory.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def attempt(work: Callable[[], T]) -> T | None:
    """The result of ``work``; None when it ran out of memory, on a CUDA device or on the CPU.

    The exception is dropped here, because it would keep all tensors of the frames that it passed through alive.
    """
    import torch  # here, so that looking at a run's folder does not load it

    try:
        return work()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
    return None


def release() -> None:
    """Free the memory of a failed attempt: tensors in reference cycles, and the cache of CUDA's allocator."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def halving(rows: list[E], size: int, work: Callable[[list[E]], T]) -> Iterator[T]:
    """The results of ``work`` on ``size`` rows at a time, in order; when memory runs out, ``size`` is halved.

    Raises:
        RuntimeError: PyTorch's own, when memory runs out with one row.
    """
    start = 0
    while start < len(rows):
        part = rows[start : start + size]
        done = attempt(partial(work, part)) if len(part) > 1 else work(part)
        if done is None:
            release()
            size = len(part) // 2
        else:
            yield done
            start += len(part)


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

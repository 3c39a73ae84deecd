"""When memory runs out: go on with fewer rows at a time."""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch

E = TypeVar("E")
T = TypeVar("T")


def attempt(work: Callable[[], T]) -> T | None:
    """What ``work`` returns; None when it ran out of memory, on a CUDA device or on the CPU.

    An exception keeps all tensors of the frames that it went through; it ends here, and they with it.
    """
    try:
        return work()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
    return None


def release() -> None:
    """Free what is left of a failed attempt: tensors in reference cycles, and the cache of CUDA's allocator."""
    gc.collect()
    torch.cuda.empty_cache()


def halving(rows: list[E], size: int, work: Callable[[list[E]], T]) -> Iterator[T]:
    """What ``work`` makes of ``size`` rows at a time, in order; of half as many from where memory runs out.

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

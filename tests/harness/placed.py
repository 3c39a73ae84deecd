"""Several devices without any: tensors on "cpu:1", "cpu:2" and so on, which no operation takes beside another's.

A `Placed` tensor says that it is on such a device, and holds a tensor of the CPU with its values. An operation whose
tensors are on several devices is an error, as on CUDA, where only copies, and single numbers and indices
of the CPU, are allowed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class Placed(Tensor):
    """A tensor on a device that there is not."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type["Placed"], inner: Tensor, device: torch.device) -> "Placed":
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["inner"], self.device

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], device: torch.device, *_: object) -> "Placed":
        return Placed(inner["inner"], device)

    def untyped_storage(self) -> torch.UntypedStorage:
        """Where the values are, for who writes them to a file."""
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        """The values, as a device gives them."""
        return self.inner.tolist()

    def data_ptr(self) -> int:
        """As above."""
        return self.inner.data_ptr()

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"Placed({self.inner}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def several_devices() -> Iterator[None]:
    """Let tensors be made on such devices, and be moved there and back."""
    with _Everywhere():
        yield


def _run(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    # Empty ones do not count: torch.tensor([], device="cpu:1"), as a cache of keys begins, is made on the CPU.
    on = {t.device for t in tensors if (t.ndim and t.numel()) or isinstance(t, Placed)}
    if func in _INDEXING and on == {CPU, args[0].device}:  # indices may be on the CPU
        on = {args[0].device}
    if "_foreach_" in str(func) and str(func).split(".")[1].endswith("_"):  # each tensor where it is
        return func(*tree_map_only(Placed, lambda tensor: tensor.inner, args), **kwargs)
    if func in _COPIES:
        device = kwargs.get("device") or args[0].device
    elif len(on) > 1:
        raise RuntimeError(f"{func} takes tensors on {', '.join(sorted(map(str, on)))}")
    else:
        device = kwargs.get("device") or next(iter(on), CPU)
    a, k = tree_map_only(Placed, lambda tensor: tensor.inner, (args, dict(kwargs)))
    if k.get("device") is not None:
        k["device"] = CPU
    made = func(*a, **k)
    if device.type != "cpu" or not device.index:
        return made
    made = tree_map_only(Tensor, lambda tensor: Placed(tensor, device), made)
    return return_and_correct_aliasing(func, args, kwargs, made) if on else made

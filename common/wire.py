"""Tensors on the wire: torch <-> Flower records, bit for bit, nothing unpickled.

float32, float64, float16 and integers travel in NumPy's ``.npy`` form, Flower's own, so that any Flower app can read
them. NumPy has no bfloat16: such a tensor travels as its raw little-endian bytes under the stype ``fedspan.bf16``.
"""

import io
import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from common.errors import WireError

BF16 = "fedspan.bf16"
_NUMPY = "numpy.ndarray"
_DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def encode(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """A Flower record of ``tensors``, in their order.

    Raises:
        WireError: a tensor's dtype cannot travel.
    """
    return ArrayRecord({name: _encode(name, tensor.detach().cpu()) for name, tensor in tensors.items()})


def decode(record: Mapping[str, Array]) -> dict[str, Tensor]:
    """The tensors of a Flower record, on the CPU, sharing no memory with it.

    Raises:
        WireError: an array's bytes do not fit its declared dtype, shape or serialisation type.
    """
    return {name: _decode(name, array) for name, array in record.items()}


def num_bytes(record: Mapping[str, Array]) -> int:
    """Bytes of payload in a record (without Flower's envelope)."""
    return sum(len(array.data) for array in record.values())


def _encode(name: str, tensor: Tensor) -> Array:
    if tensor.dtype == torch.bfloat16:
        raw = tensor.contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
        return Array("bfloat16", tuple(tensor.shape), BF16, raw)
    if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
        raise WireError(f"{name}: dtype {tensor.dtype} cannot travel; allowed: bfloat16, {', '.join(_DTYPES)}")
    return Array(tensor.contiguous().numpy())


def _decode(name: str, array: Array) -> Tensor:
    shape = tuple(array.shape)
    if array.stype == BF16:
        if array.dtype != "bfloat16" or len(array.data) != 2 * math.prod(shape):
            raise WireError(f"{name}: {len(array.data)} bytes do not make a bfloat16 tensor of shape {shape}")
        raw = np.frombuffer(array.data, dtype="<i2").astype(np.int16).reshape(shape)  # a copy: messages are read-only
        return torch.from_numpy(raw).view(torch.bfloat16)
    if array.stype != _NUMPY or array.dtype not in _DTYPES:
        allowed = f"bfloat16 as {BF16}; {', '.join(_DTYPES)} as {_NUMPY}"
        raise WireError(f"{name}: dtype {array.dtype!r} as {array.stype!r} is not readable; allowed: {allowed}")
    try:
        value = np.load(io.BytesIO(array.data), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise WireError(f"{name}: not a .npy array ({type(error).__name__})") from None
    if not isinstance(value, np.ndarray) or value.shape != shape or str(value.dtype) != array.dtype:
        raise WireError(f"{name}: declared as {array.dtype} {shape}, holds something else")
    return torch.from_numpy(np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C"))

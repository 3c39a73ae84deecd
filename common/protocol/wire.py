"""Tensors on the wire: torch <-> Flower records, bit for bit, nothing unpickled.

float32, float64, float16 and integers travel in NumPy's ``.npy`` form, Flower's own, so that any Flower app can read
them. NumPy has no bfloat16: such a tensor travels as its raw little-endian bytes under the stype ``fedspan.bf16``.

Flower moves every array of a record by calls of its own, at every hop, and a SuperLink with a database spends some 5 ms
of computing on it; a hundred small factors take seconds, whatever the link. So between FedSpan's own processes small
tensors travel in bundles: bytes in safetensors' format, as one array under the stype ``fedspan.safetensors``.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.errors import WireError

BF16 = "fedspan.bf16"
BUNDLE = "fedspan.safetensors"
_BUNDLE_BYTES = 4 * 2**20  # so large a tensor travels alone; Flower sends at most 5 MiB in one call
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


def encode(tensors: Mapping[str, Tensor], *, bundled: bool = False) -> ArrayRecord:
    """A Flower record of ``tensors``.

    Args:
        tensors: by name.
        bundled: small ones travel together; for readers that use ``decode``.

    Raises:
        WireError: a tensor's dtype cannot travel.
    """
    arrays: dict[str, Array] = {}
    bundle: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.dtype != torch.bfloat16 and str(value.dtype).removeprefix("torch.") not in _DTYPES:
            raise WireError(f"{name}: dtype {value.dtype} cannot travel; allowed: bfloat16, {', '.join(_DTYPES)}")
        if not bundled or value.nbytes >= _BUNDLE_BYTES:
            arrays[name] = _encode(value)
            continue
        bundle[name] = value.clone()  # safetensors refuses tensors that share memory
        if sum(part.nbytes for part in bundle.values()) >= _BUNDLE_BYTES:
            arrays[f"{BUNDLE}/{len(arrays)}"] = _bundle(bundle)
            bundle = {}
    if bundle:
        arrays[f"{BUNDLE}/{len(arrays)}"] = _bundle(bundle)
    return ArrayRecord(arrays)


def decode(record: Mapping[str, Array]) -> dict[str, Tensor]:
    """The tensors of a Flower record, on the CPU, sharing no memory with it.

    Raises:
        WireError: bytes do not fit the declared dtype, shape or serialisation type, or a tensor is there twice.
    """
    tensors: dict[str, Tensor] = {}
    for name, array in record.items():
        found = _unbundled(name, array) if array.stype == BUNDLE else {name: _decode(name, array)}
        if twice := found.keys() & tensors.keys():
            raise WireError(f"{min(twice)} is there twice")
        tensors |= found
    return tensors


def num_bytes(record: Mapping[str, Array]) -> int:
    """Bytes of payload in a record (without Flower's envelope)."""
    return sum(len(array.data) for array in record.values())


def _encode(tensor: Tensor) -> Array:
    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
        return Array("bfloat16", tuple(tensor.shape), BF16, raw)
    return Array(tensor.numpy())


def _bundle(tensors: dict[str, Tensor]) -> Array:
    raw = save(tensors)
    return Array("uint8", (len(raw),), BUNDLE, raw)


def _unbundled(name: str, array: Array) -> dict[str, Tensor]:
    try:
        tensors = load(array.data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise WireError(f"{name}: not a bundle of tensors ({type(error).__name__})") from None
    for inner, tensor in tensors.items():
        if tensor.dtype not in (torch.bfloat16, *_DTYPES.values()):
            raise WireError(f"{inner}: dtype {tensor.dtype} is not readable; allowed: bfloat16, {', '.join(_DTYPES)}")
    return tensors


def _decode(name: str, array: Array) -> Tensor:
    shape, order = tuple(array.shape), "C"
    if array.stype == BF16 and array.dtype == "bfloat16":
        values, kind = memoryview(array.data), np.dtype("<i2")
    elif array.stype == _NUMPY and array.dtype in _DTYPES:
        values, kind, order = _npy(name, array, shape)
    else:
        allowed = f"bfloat16 as {BF16}; {', '.join(_DTYPES)} as {_NUMPY}"
        raise WireError(f"{name}: dtype {array.dtype!r} as {array.stype!r} is not readable; allowed: {allowed}")
    if min(shape, default=0) < 0 or len(values) != kind.itemsize * math.prod(shape):
        raise WireError(f"{name}: {len(values)} bytes do not make a {array.dtype} tensor of shape {shape}")
    try:
        flat = np.frombuffer(values, kind).astype(kind.newbyteorder("="))  # a copy: messages are read-only
        tensor = torch.from_numpy(np.asarray(flat.reshape(shape, order=order), order="C"))  # type: ignore[call-overload]
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise WireError(f"{name}: shape {shape} is no tensor's ({type(error).__name__})") from None
    return tensor.view(torch.bfloat16) if array.stype == BF16 else tensor


def _npy(name: str, array: Array, shape: tuple[int, ...]) -> tuple[memoryview, "np.dtype[Any]", str]:
    """The values of a ``.npy`` file, their type, and their order ("C" or "F").

    Its header must be the one that NumPy writes for what was declared: it is compared, and never parsed.
    """
    data, kind = memoryview(array.data), np.dtype(array.dtype).newbyteorder("<")
    width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}.get(bytes(data[:8]))  # of the header's length
    if width is None:
        raise WireError(f"{name}: not a .npy array")
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    header = bytes(data[8 + width : start]).rstrip()
    for order in "CF":
        if header == f"{{'descr': '{kind.str}', 'fortran_order': {order == 'F'}, 'shape': {shape}, }}".encode():
            return data[start:], kind, order
    raise WireError(f"{name}: declared as {array.dtype} {shape}, holds something else")

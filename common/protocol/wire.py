"""Tensors on the wire: torch <-> Flower records, bit for bit, nothing unpickled.

float32, float64, float16 and integers are sent in NumPy's ``.npy`` format, which Flower uses, so that any Flower app
can read them. NumPy has no bfloat16: such a tensor is sent as raw little-endian bytes with the stype ``fedspan.bf16``.

Flower moves every array of a record by separate calls, at every hop, and a SuperLink with a database spends some 5 ms
of computing on each: a hundred small factors take seconds on any link. So FedSpan's own processes bundle small tensors:
bytes in safetensors' format, as one array with the stype ``fedspan.safetensors`` (decision 005).

The reader checks sizes before it decodes anything: the parsed header of a bundle takes over twenty times its bytes, so
a record may hold no more bytes than the expected tensors.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.errors import WireError
from common.protocol.kinds import short

BF16 = "fedspan.bf16"
BUNDLE = "fedspan.safetensors"
_BUNDLE_BYTES = 4 * 2**20  # larger tensors are sent alone; Flower sends at most 5 MiB in one call
_ENTRY_BYTES = 256  # most bytes per tensor beside name and values: a .npy header, or an entry of a bundle's header
_MOST_DIMENSIONS = 32
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
    """Make a Flower record of ``tensors``.

    Args:
        tensors: the tensors by name.
        bundled: bundle small tensors; only for readers that use ``decode``.

    Raises:
        WireError: a tensor's dtype cannot be sent.
    """
    arrays: dict[str, Array] = {}
    bundle: dict[str, Tensor] = {}
    size = 0  # bytes of the bundle, with its header
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.dtype != torch.bfloat16 and str(value.dtype).removeprefix("torch.") not in _DTYPES:
            raise WireError(f"{name}: dtype {value.dtype} cannot travel; allowed: bfloat16, {', '.join(_DTYPES)}")
        if not bundled or value.nbytes >= _BUNDLE_BYTES:
            arrays[name] = _encode(value)
            continue
        bundle[name] = value.clone()  # safetensors refuses tensors that share memory
        size += value.nbytes + told_bytes([name])
        if size >= _BUNDLE_BYTES:
            arrays[f"{BUNDLE}/{len(arrays)}"] = _bundle(bundle)
            bundle, size = {}, 0
    if bundle:
        arrays[f"{BUNDLE}/{len(arrays)}"] = _bundle(bundle)
    return ArrayRecord(arrays)


def decode(record: Mapping[str, Array], most: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """The tensors of a Flower record, on the CPU, in new memory.

    Args:
        record: arrays and bundles by key.
        most: for a record from the other side: the most bytes of each tensor, by the names of all tensors that may
            come; checked before anything is decoded. None: for a record that this process made itself.

    Raises:
        WireError: the record has more tensors or bytes than ``most`` allows, or other names; bytes do not match the
            declared dtype, shape or stype; or a tensor occurs twice.
    """
    if most is not None:
        _check_sizes(record, most)
    headers = 2 * _BUNDLE_BYTES if most is None else told_bytes(most)
    tensors: dict[str, Tensor] = {}
    for name, array in record.items():
        found = _unbundled(name, array, headers) if array.stype == BUNDLE else {name: _decode(name, array)}
        if twice := found.keys() & tensors.keys():
            raise WireError(f"{min(twice)} is there twice")
        if most is not None:
            for inner, tensor in found.items():
                _check_size(inner, tensor.nbytes, most)
        tensors |= found
    return tensors


def told_bytes(names: Iterable[str]) -> int:
    """Most bytes of a record with tensors of these names, beside the tensors' values."""
    return sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)


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


def _check_sizes(record: Mapping[str, Array], most: Mapping[str, int]) -> None:
    """Reject a record whose number of arrays, names or bytes are not allowed, before anything is decoded."""
    if len(record) > len(most):
        raise WireError(f"{len(record)} arrays came; allowed: up to {len(most)}")
    for name, array in record.items():
        if array.stype != BUNDLE:
            _check_size(name, len(array.data), most, _ENTRY_BYTES)
    came, allowed = num_bytes(record), sum(most.values()) + told_bytes(most)
    if came > allowed:
        raise WireError(f"{came} bytes of tensors came; allowed: up to {allowed}")


def _check_size(name: str, came: int, most: Mapping[str, int], beside: int = 0) -> None:
    if name not in most:
        raise WireError(
            f"tensor {short(name)} was not to come; allowed: {len(most)} others, e.g. {min(most, default='')}"
        )
    if came > most[name] + beside:
        raise WireError(f"{name}: {came} bytes came; allowed: up to {most[name] + beside}")


def _unbundled(name: str, array: Array, headers: int) -> dict[str, Tensor]:
    """The tensors of a bundle; its header may have at most ``headers`` bytes."""
    told = int.from_bytes(array.data[:8], "little")
    if told > headers:
        raise WireError(f"{short(name)}: a bundle's header of {told} bytes; allowed: up to {headers}")
    try:
        tensors = load(array.data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise WireError(f"{short(name)}: not a bundle of tensors ({type(error).__name__})") from None
    for inner, tensor in tensors.items():
        if tensor.dtype not in (torch.bfloat16, *_DTYPES.values()):
            raise WireError(f"{inner}: dtype {tensor.dtype} is not readable; allowed: bfloat16, {', '.join(_DTYPES)}")
    return tensors


def _decode(name: str, array: Array) -> Tensor:
    shape, order = tuple(array.shape), "C"
    if len(shape) > _MOST_DIMENSIONS:  # the product of a huge shape alone would take for ever
        raise WireError(f"{name}: {len(shape)} dimensions; allowed: up to {_MOST_DIMENSIONS}")
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
    """The values of a ``.npy`` file, their dtype, and their order ("C" or "F").

    The header must equal the header that NumPy writes for the declared dtype and shape; it is compared, never parsed.
    """
    data, kind = memoryview(array.data), np.dtype(array.dtype).newbyteorder("<")
    width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}.get(
        bytes(data[:8])
    )  # bytes that hold the header's length
    if width is None:
        raise WireError(f"{name}: not a .npy array")
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    header = bytes(data[8 + width : start]).rstrip()
    for order in "CF":
        if header == f"{{'descr': '{kind.str}', 'fortran_order': {order == 'F'}, 'shape': {shape}, }}".encode():
            return data[start:], kind, order
    raise WireError(f"{name}: declared as {array.dtype} {shape}, holds something else")

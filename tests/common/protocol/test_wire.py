"""Tensors pass the wire bit for bit; anything else is refused by name."""

import io
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, strategies as st
from safetensors.torch import save

from common.errors import WireError
from common.protocol import wire


def through_flower(record: ArrayRecord) -> ArrayRecord:
    """A record after Flower's own serialisation, as it comes out at the other end."""
    contents = {key: obj.deflate() for key, obj in get_all_nested_objects(record).items()}
    received = inflate_object_from_contents(record.object_id, contents)
    assert isinstance(received, ArrayRecord)
    return received


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(st.integers(1, 5), min_size=0, max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_every_bit_pattern_survives(dtype: torch.dtype, shape: list[int], seed: int) -> None:
    width = torch.empty(0, dtype=dtype).element_size()
    count = int(np.prod(shape))
    raw = np.random.default_rng(seed).integers(0, 256, size=count * width, dtype=np.uint8)  # NaNs and infinities too
    tensor = torch.from_numpy(raw).view(dtype).reshape(shape)
    for bundled in (False, True):
        received = wire.decode(through_flower(wire.encode({"a.weight": tensor}, bundled=bundled)))["a.weight"]
        assert received.dtype == dtype
        assert received.shape == tensor.shape
        assert bits(received) == bits(tensor)


def test_non_contiguous_tensor_keeps_its_values() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    for bundled in (False, True):
        assert torch.equal(wire.decode(wire.encode({"x": tensor}, bundled=bundled))["x"], tensor)


@pytest.mark.parametrize("bundled", [False, True])
def test_decoded_tensor_is_writable_and_owns_its_memory(bundled: bool) -> None:
    record = wire.encode({"x": torch.zeros(2, dtype=torch.bfloat16), "y": torch.zeros(2)}, bundled=bundled)
    for tensor in wire.decode(record).values():
        tensor.add_(1)
    assert all(not t.any() for t in wire.decode(record).values())


def test_float32_record_is_readable_with_flower_alone() -> None:
    tensor = torch.randn(3, 4)
    np.testing.assert_array_equal(wire.encode({"w": tensor})["w"].numpy(), tensor.numpy())


def test_num_bytes_counts_the_payload() -> None:
    assert wire.num_bytes(wire.encode({"a": torch.zeros(10, 10, dtype=torch.bfloat16)})) == 200


def test_small_tensors_travel_together_and_large_ones_alone() -> None:
    sent = {f"small.{i}": torch.full((2**18,), float(i)) for i in range(10)} | {"large": torch.ones(2**20)}
    sent |= {"view.a": sent["large"][:5], "view.b": sent["large"][:5], "flags": torch.tensor([True, False])}
    record = wire.encode(sent, bundled=True)
    assert [array.stype for array in record.values()].count(wire.BUNDLE) == 3  # of 4, 4 and 2 MiB
    assert len(record) == 4
    assert wire.num_bytes(record) < 1.001 * sum(tensor.nbytes for tensor in sent.values())
    received = wire.decode(through_flower(record))
    assert received.keys() == sent.keys()
    assert all(torch.equal(received[name], tensor) for name, tensor in sent.items())


ENDLESS = ([0, 2**63], [0, 2**62, 2**62], [0] + [2] * 70)


def header(text: str) -> bytes:
    """A bundle without values."""
    return len(text).to_bytes(8, "little") + text.encode()


def bundle(raw: bytes) -> Array:
    return Array("uint8", (len(raw),), wire.BUNDLE, raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff" * 64,
        pickle.dumps({"x": 1}),
        save({"x": torch.zeros(9)})[:-1],
        save({"x": torch.zeros(9)}) + b"\0",
        save({"x": torch.zeros(9)}).replace(b"[9]", b"[8]"),
        save({"x": torch.zeros(2, dtype=torch.float8_e5m2)}),
        save({"x": torch.zeros(2, dtype=torch.complex64)}),
        *(header(f'{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}') for shape in ENDLESS),
    ],
)
def test_malformed_bundle_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError, match=r"'part': not a bundle|'part': a bundle's header of|x: dtype"):
        wire.decode({"part": bundle(raw)})


def test_tensor_that_is_there_twice_is_refused_by_name() -> None:
    record = {"a": bundle(save({"x": torch.zeros(2)})), **wire.encode({"x": torch.zeros(2)})}
    with pytest.raises(WireError, match="x is there twice"):
        wire.decode(record)


def test_many_names_make_more_bundles_not_a_longer_header() -> None:
    sent = {f"{i:06}".zfill(600): torch.tensor(float(i)) for i in range(10_000)}  # 6 MB of names
    record = wire.encode(sent, bundled=True)
    assert len(record) == 3
    assert wire.decode(record, dict.fromkeys(sent, 4)).keys() == sent.keys()
    assert wire.decode(record).keys() == sent.keys()


MOST = {"x": 8, "y": 8}


@pytest.mark.parametrize("bundled", [False, True])
@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"x": torch.zeros(2), "z": torch.zeros(0)}, "tensor 'z' was not to come"),
        (
            {"x": torch.zeros(200)},
            "x: 928 bytes came; allowed: up to 264|872 bytes of tensors came; allowed: up to 534",
        ),
        ({"x": torch.zeros(3), "y": torch.zeros(1)}, "x: 12 bytes came; allowed: up to 8"),
        ({"x": torch.zeros(2), "y": torch.zeros(2), "z": torch.zeros(2)}, "3 arrays came; allowed: up to 2|tensor 'z'"),
    ],
)
def test_nothing_beyond_what_was_to_come_is_taken(tensors: dict[str, torch.Tensor], reason: str, bundled: bool) -> None:
    with pytest.raises(WireError, match=reason):
        wire.decode(wire.encode(tensors, bundled=bundled), MOST)


@pytest.mark.parametrize("bundled", [False, True])
def test_all_that_was_to_come_is_taken(bundled: bool) -> None:
    tensors = {"x": torch.ones(2), "y": torch.ones(4, dtype=torch.bfloat16)}
    received = wire.decode(wire.encode(tensors, bundled=bundled), MOST)
    assert all(torch.equal(received[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("most", [None, MOST])
def test_long_header_is_refused_before_it_is_parsed(most: dict[str, int] | None) -> None:
    entries = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(400_000))
    record = {"part": bundle(header(f"{{{entries}}}"))}
    assert len(record["part"].data) > 20e6
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=r"header of \d+ bytes; allowed: up to|bytes of tensors came"):
            wire.decode(record, most)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_endless_dimensions_are_refused_before_they_are_multiplied() -> None:
    array = Array("float32", (2**63,) * 1_000_000, "numpy.ndarray", b"")
    with pytest.raises(WireError, match="x: 1000000 dimensions; allowed: up to 32"):
        wire.decode({"x": array}, MOST)


def npy(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


class Evil:
    """Would touch the disk when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def says(header: str, values: bytes = b"\0" * 12) -> bytes:
    """A ``.npy`` file with this header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + values


def shaped(shape: object, more: str = ", }") -> str:
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}{more}"


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (2,), "numpy.ndarray", npy(np.zeros(3, np.float32))),  # other shape than declared
        Array("float64", (3,), "numpy.ndarray", npy(np.zeros(3, np.float32))),  # other dtype than declared
        Array("float32", (3,), "numpy.ndarray", npy(np.zeros(3, np.float32))[:-1]),  # cut off
        Array("float32", (3,), "numpy.ndarray", b""),
        Array("float32", (1,), "numpy.ndarray", pickle.dumps(Evil())),
        Array("object", (1,), "numpy.ndarray", npy(np.array([Evil()], dtype=object))),
        Array("float32", (1,), "numpy.ndarray", npy(np.array([Evil()], dtype=object))),
        Array("bfloat16", (3,), wire.BF16, b"\0" * 5),
        Array("float32", (3,), wire.BF16, b"\0" * 6),
        Array("float32", (3,), "pickle", b"\0" * 12),
        Array("float32", (3,), "numpy.ndarray", b"PK\x03\x04" + b"\0" * 60),  # np.load takes it for a .npz file
        Array("float32", (3,), "numpy.ndarray", says(shaped((2**45,)))),  # would be allocated
        Array("float32", (2**45,), "numpy.ndarray", says(shaped((2**45,)))),
        Array("float32", (2**70,), "numpy.ndarray", says(shaped((2**70,)))),
        Array("float32", (3,), "numpy.ndarray", says(shaped("((3,)", ""))),
        Array("float32", (3,), "numpy.ndarray", says("-" * 9000 + "1")),
        Array("float32", (3,), "numpy.ndarray", says(shaped((3,)))[:20]),
        Array("float32", (-1, -3), "numpy.ndarray", says(shaped((-1, -3)))),
        Array("bfloat16", (-1, -6), wire.BF16, b"\0" * 12),
        *(Array("bfloat16", tuple(shape), wire.BF16, b"") for shape in ENDLESS),
        *(Array("float32", tuple(shape), "numpy.ndarray", says(shaped(tuple(shape)), b"")) for shape in ENDLESS),
    ],
)
def test_malformed_array_is_refused_by_name(array: Array) -> None:
    with pytest.raises(WireError, match=r"layer\.weight"):
        wire.decode({"layer.weight": array})


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i8", "|b1", "|i1", "<f2"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_arrays_are_read_as_numpy_reads_them(dtype: str, shape: tuple[int, ...], version: tuple[int, int]) -> None:
    value = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    for one in (value, np.asfortranarray(value) if shape else value):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, one, version)
        array = Array(value.dtype.name, shape, "numpy.ndarray", buffer.getvalue())
        found = wire.decode({"x": array})["x"]
        assert found.is_contiguous()
        np.testing.assert_array_equal(found.numpy(), np.load(io.BytesIO(array.data)))


def test_dtype_that_cannot_travel_is_refused_by_name() -> None:
    with pytest.raises(WireError, match=r"x: dtype torch.complex64"):
        wire.encode({"x": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_tensor_keeps_its_shape(dtype: torch.dtype) -> None:
    assert wire.decode(through_flower(wire.encode({"x": torch.empty(3, 0, dtype=dtype)})))["x"].shape == (3, 0)

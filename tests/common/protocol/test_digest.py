"""Digests tell different tensors apart and do not depend on storage."""

import torch

from common.protocol.digest import tensor_digest, tensors_digest


def test_digest_depends_on_value_dtype_and_shape_only() -> None:
    a = torch.arange(6, dtype=torch.float32)
    assert tensor_digest(a) == tensor_digest(a.clone())
    assert tensor_digest(a.reshape(2, 3).T.contiguous().T) == tensor_digest(a.reshape(2, 3))
    different = {tensor_digest(t) for t in (a, a.reshape(2, 3), a.reshape(3, 2), a.double(), a.bfloat16(), a + 1e-6)}
    assert len(different) == 6


def test_digest_of_named_tensors_ignores_their_order_but_not_their_names() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    assert tensors_digest({"x": x, "y": y}) == tensors_digest({"y": y, "x": x})
    assert tensors_digest({"x": x, "y": y}) != tensors_digest({"x": y, "y": x})


def test_minus_zero_is_not_zero() -> None:
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))


def test_empty_and_scalar_tensors_have_digests() -> None:
    assert tensor_digest(torch.empty(0, 3)) != tensor_digest(torch.empty(3, 0))
    assert tensor_digest(torch.tensor(1.0)) != tensor_digest(torch.tensor([1.0]))

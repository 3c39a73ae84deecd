"""Differential privacy of a whole shard: clip an update, add Gaussian noise.

The mechanism (decision 014): the update x is the change that training made, over all tensors jointly. The site sends
min(1, C / |x|) x + N(0, (z C)^2 I), with C = `clip` and z = `noise_multiplier`. Two shards with the same number of rows
may give updates 2 C apart, so a round is a Gaussian mechanism of sensitivity 2 C and standard deviation z C; what that
costs is in ``common.accountant``.
"""

import math
import os
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from common.config.site import PrivacyConfig
from common.errors import DivergedError

_CHUNK = 2**20  # numbers that get noise at a time
_MARGIN = 1e-6  # updates are clipped to this share below the limit, so that rounding cannot exceed it
_GRID = 2.0**-20  # in units of the noise's standard deviation: sent numbers are rounded to multiples of it


def private(changes: Mapping[str, Tensor], config: PrivacyConfig) -> dict[str, Tensor]:
    """Clip the changes jointly and add noise; float32 on the CPU.

    With `noise` shared they are only clipped: ``common.masking.noise`` adds the noise when they are integers.

    Args:
        changes: the whole update: each tensor's change, by name.
        config: the site file's section ``privacy``.

    Raises:
        DivergedError: the update is not finite.
    """
    norm = norm_of(changes.values())
    if not math.isfinite(norm):
        raise DivergedError("the update is not finite; lower training.learning_rate")
    kept = min(1.0, config.clip * (1 - _MARGIN) / norm) if norm > 0 else 1.0
    if config.noise == "shared":
        return {name: change.detach().to("cpu", torch.float32).mul(kept) for name, change in changes.items()}
    std = config.noise_multiplier * config.clip
    return {name: _noised(change, kept, std) for name, change in changes.items()}


def norm_of(tensors: Iterable[Tensor]) -> float:
    """L2 norm of all tensors together, accumulated in float64."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors))


def _noised(change: Tensor, kept: float, std: float) -> Tensor:
    """``kept`` times the change, plus noise.

    Sums with floating-point noise have gaps that depend on the change (Mironov, CCS 2012) and so reveal it. So the sum
    is computed in float64 and rounded to a grid that does not depend on the change and is far coarser than the gaps.
    """
    result = change.detach().to("cpu", torch.float32, copy=True).contiguous()
    grid = 2.0 ** math.floor(math.log2(std)) * _GRID
    flat = result.view(-1)
    for part in flat.split(_CHUNK):
        exact = part.double().mul_(kept).add_(gaussian(part.numel()), alpha=std)
        part.copy_(exact.div_(grid).round_().mul_(grid))
    return result


def gaussian(count: int) -> Tensor:
    """Standard Gaussians in float64, from the operating system's cryptographic generator (Box and Muller, 1958)."""
    pairs = (count + 1) // 2
    bits = np.frombuffer(os.urandom(16 * pairs), dtype="<u8") >> np.uint64(11)
    uniform = torch.from_numpy((bits.astype(np.float64) + 1.0) * 2.0**-53)  # in (0, 1]
    radius, angle = uniform[:pairs].log_().mul_(-2.0).sqrt_(), uniform[pairs:].mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]

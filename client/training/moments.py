"""Storage of Adam's two moments.

Between steps: float32, or 8 bits by bitsandbytes (arXiv 2110.02861). Between rounds: as named tensors at the site.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import TrainingError

Moments = Literal["float32", "8bit"]
_NAMES = ("exp_avg", "exp_avg_sq")


class Float32Moments:
    """Stores both moments in float32."""

    def load(self, state: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments, in ``like``'s shape, zero at first."""
        first, second = (state[name] if name in state else torch.zeros_like(like) for name in _NAMES)
        return first, second

    def save(self, state: dict[str, Any], *moments: Tensor) -> None:
        """Keep them for the next step."""
        state.update(zip(_NAMES, moments, strict=True))


class EightBitMoments:
    """Stores both moments in blocks of 8-bit codes, each block with its largest value in float32.

    Raises:
        TrainingError: bitsandbytes is not installed.
    """

    def __init__(self) -> None:
        try:
            from bitsandbytes import functional
        except ImportError:
            raise TrainingError(
                "strategy.moments is 8bit, which needs bitsandbytes at this site: `make setup` installs it, and an "
                "image has it with --build-arg EXTRAS=8bit"
            ) from None
        self._functional = functional
        self._codes: dict[str, Tensor] = {
            name: functional.create_dynamic_map(signed=name == "exp_avg")  # type: ignore[no-untyped-call]
            for name in _NAMES
        }

    def load(self, state: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments, in ``like``'s shape, zero at first."""
        if _NAMES[0] not in state:
            return torch.zeros_like(like), torch.zeros_like(like)
        first, second = (
            self._functional.dequantize_blockwise(
                state[name], absmax=state[f"{name}-largest"], code=self._code(name, like)
            )
            for name in _NAMES
        )
        return first, second

    def save(self, state: dict[str, Any], *moments: Tensor) -> None:
        """Keep them for the next step."""
        for name, moment in zip(_NAMES, moments, strict=True):
            code = self._code(name, moment)
            state[name], kept = self._functional.quantize_blockwise(moment.contiguous(), code=code)
            state[f"{name}-largest"] = kept.absmax

    def _code(self, name: str, like: Tensor) -> Tensor:
        code = self._codes[name] = self._codes[name].to(like.device)
        return code


def moment_store(moments: Moments) -> Float32Moments | EightBitMoments:
    """The store for a number format.

    Raises:
        TrainingError: the format needs bitsandbytes, which is not installed.
    """
    return Float32Moments() if moments == "float32" else EightBitMoments()

"""What a site declares of the noise that it adds, so that the server can tell it from a wild update."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.config.site_policy import PrivacyConfig


@dataclass(frozen=True)
class Declared:
    """A site's differential privacy, as the server knows it.

    Attributes:
        clip: L2 norm of the whole update before noise is added.
        noise: standard deviation of the noise on every number that leaves.
        delta: of the guarantee.
        max_epsilon: the site's budget, after which it stops.
    """

    clip: float
    noise: float
    delta: float
    max_epsilon: float

    @classmethod
    def of(cls, config: PrivacyConfig) -> "Declared":
        """Of a site file's section."""
        return cls(config.clip, config.noise_multiplier * config.clip, config.delta, config.max_epsilon)

    @classmethod
    def read(cls, told: Mapping[str, object]) -> "Declared | None":
        """From a site's hello; None when it adds no noise.

        Raises:
            ValueError: a number is missing, or not positive and finite.
        """
        if not told:
            return None
        numbers: list[float] = []
        for key in cls.__dataclass_fields__:
            value = told.get(key)
            if not isinstance(value, float) or not 0 < value < math.inf:
                raise ValueError(f"its privacy's {key} is {value!r}; allowed: a positive number")
            numbers.append(value)
        return cls(*numbers)


def longest_noise(entries: int, std: float) -> float:
    """L2 norm that ``entries`` independent Gaussians of this standard deviation exceed with probability below 1e-12.

    Source: Laurent and Massart (2000), lemma 1: a chi-square variable with d degrees of freedom exceeds
    d + 2 sqrt(d t) + 2 t <= (sqrt(d) + sqrt(2 t))^2 with probability at most exp(-t).
    """
    return std * (math.sqrt(entries) + math.sqrt(2 * math.log(1e12)))

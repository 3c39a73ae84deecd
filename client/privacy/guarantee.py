"""How much noise hides a site's update, and from whom: noise of its own, or noise that a masked sum's sites share.

With shared noise each site adds a discrete Gaussian of standard deviation s to its masked integers, and the server sees
only sums of at least T sites (`secure_aggregation.threshold`). A site that colludes with the server tells it its own
noise. If c sites do, T - c honest parts remain, as long as no two lists of survivors have T signatures: honest sites
sign one list, colluding ones both, so a round must have fewer than 2 T - c sites. Otherwise, and with c >= T - 1, a
site has only its own part. A site refuses larger rounds and sums of fewer sites, so a round's cost is known before it.

The sum of h such parts is at least as private as one Gaussian of variance h s^2 - 4, in steps of the grid (decision
034). With s >= 2^10 steps that costs a share of 2^-19 of a multiplier; the multipliers here are smaller by 2^-18.
"""

import math
from dataclasses import dataclass

from common.config.federation import FederationConfig
from common.config.site import PrivacyConfig
from common.errors import PolicyError

_COARSE = 2.0**-18


@dataclass(frozen=True)
class Guarantee:
    """Standard deviation of the noise that hides a site's update, in units of its `clip`.

    Attributes:
        noise_multiplier: the noise that the server cannot take off, together with as many sites as `colluders`.
        worst_multiplier: the site's own part, which nobody can take off.
        most_sites: the largest round for which the first holds; None: any.
        part: standard deviation of the noise that the site adds to a number.
    """

    noise_multiplier: float
    worst_multiplier: float
    most_sites: int | None
    part: float


def in_federation(privacy: PrivacyConfig, federation: FederationConfig) -> Guarantee:
    """The noise that a site file's section ``privacy`` amounts to in a federation.

    Raises:
        PolicyError: the sum has less noise than the site asks for.
    """
    secure = federation.secure_aggregation
    return guarantee(privacy, None, 0.0) if secure is None else guarantee(privacy, secure.threshold, secure.noise)


def guarantee(privacy: PrivacyConfig, threshold: int | None, part: float) -> Guarantee:
    """The same for plain numbers.

    Args:
        privacy: the section.
        threshold: fewest sites in a sum that the server sees; None: it sees every update by itself.
        part: standard deviation of the noise that every site adds to its masked numbers; 0: none.

    Raises:
        PolicyError: the sum has less noise than the site asks for.
    """
    if privacy.noise == "local":
        return Guarantee(
            privacy.noise_multiplier, privacy.noise_multiplier, None, privacy.noise_multiplier * privacy.clip
        )
    if threshold is None or part <= 0:
        raise PolicyError(
            "this site's privacy: `noise` shared needs a federation with `secure_aggregation.noise`; in this one the "
            "server would see the site's update without enough noise; allowed here: `noise` local"
        )
    parts = honest_parts(threshold, privacy.colluders)
    own = part / privacy.clip * (1 - _COARSE)
    if own * math.sqrt(parts) < privacy.noise_multiplier * (1 - 2 * _COARSE):
        least = privacy.noise_multiplier * privacy.clip / math.sqrt(parts)
        raise PolicyError(
            f"this site's privacy: `noise_multiplier` is {privacy.noise_multiplier:g}; {parts} honest sites add up to "
            f"{own * math.sqrt(parts):.4g}; allowed: `secure_aggregation.noise` from {least:.4g}"
        )
    most = most_sites(threshold, privacy.colluders) if parts > 1 else None
    return Guarantee(own * math.sqrt(parts), own, most, part)


def honest_parts(threshold: int, colluders: int) -> int:
    """Fewest parts of the noise in a sum that server and ``colluders`` sites do not know; a site's own is one."""
    return max(threshold - colluders, 1)


def most_sites(threshold: int, colluders: int) -> int:
    """The largest round in which honest sites sign only one list of survivors."""
    return 2 * threshold - colluders - 1

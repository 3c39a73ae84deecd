"""Cost of updates with Gaussian noise: mu-GDP, and from it epsilon (decision 014).

An update that is clipped to C and gets noise of deviation z C is a Gaussian mechanism of sensitivity 2 C: mu = 2 / z.
Updates compose, also adaptively, to the root of the sum of their mu^2, without loss (Dong, Roth, Su, arXiv 1905.02383,
theorem 2.7 and corollary 3.3); opacus converts mu into epsilon at the given delta.
"""

import math

_MOST = 500.0  # the largest epsilon that opacus looks for


def cost(noise_multiplier: float) -> float:
    """mu^2 of one update; the mu^2 of several updates add up."""
    return (2.0 / noise_multiplier) ** 2


def epsilon(mu_squared: float, delta: float) -> float:
    """Epsilon of all updates whose ``cost`` adds up to ``mu_squared``, at ``delta``; infinite above 500."""
    from opacus.accountants.analysis import gdp  # takes seconds to import

    mu = math.sqrt(mu_squared)
    if mu == 0 or gdp.delta_eps_mu(eps=0.0, mu=mu) <= delta:
        return 0.0
    if gdp.delta_eps_mu(eps=_MOST, mu=mu) > delta:
        return math.inf
    return float(gdp.eps_from_mu(mu=mu, delta=delta))

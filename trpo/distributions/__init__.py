"""Action distributions as stateless functions of a parameter array η.

A distribution object holds only static shape. The old policy is therefore one stored tensor η_old [B, K], and all that
TRPO needs of π is a formula in η: log π, its gradient (the score), the KL divergence and its Hessian (the Fisher
metric). Shapes: `B` samples, `K` parameters per sample, `A` action components; any leading shape may stand for `B`.
"""

from trpo.distributions.bernoulli import Bernoulli
from trpo.distributions.categorical import Categorical
from trpo.distributions.contract import Distribution
from trpo.distributions.gaussian import DiagonalGaussian
from trpo.distributions.ordinal import Ordinal
from trpo.distributions.spaces import distribution_for

__all__ = ["Bernoulli", "Categorical", "DiagonalGaussian", "Distribution", "Ordinal", "distribution_for"]

"""The natural-gradient update, usable on its own: Fisher products, conjugate gradients, line search, the TRPO step."""

from trpo.natural_gradient.conjugate_gradient import CGSolution, CGStatus, conjugate_gradient
from trpo.natural_gradient.direction import blind_direction
from trpo.natural_gradient.effective_dimension import effective_dimension
from trpo.natural_gradient.fisher import fisher_product
from trpo.natural_gradient.kronecker import KroneckerPreconditioner
from trpo.natural_gradient.line_search import LineSearchResult, Rejection, backtracking_line_search
from trpo.natural_gradient.report import Outcome, StepReport
from trpo.natural_gradient.step import trust_region_step

__all__ = [
    "CGSolution",
    "CGStatus",
    "KroneckerPreconditioner",
    "LineSearchResult",
    "Outcome",
    "Rejection",
    "StepReport",
    "backtracking_line_search",
    "blind_direction",
    "conjugate_gradient",
    "effective_dimension",
    "fisher_product",
    "trust_region_step",
]

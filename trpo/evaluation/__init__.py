"""Policy + environment → episode returns; frames → mp4."""

from trpo.evaluation.episodes import SIDE_BY_SIDE
from trpo.evaluation.result import Evaluation
from trpo.evaluation.returns import check_environment, evaluate

__all__ = ["SIDE_BY_SIDE", "Evaluation", "check_environment", "evaluate"]

"""rgpb: fused losses that reward good and penalise bad examples, from hidden states and the LM head to the
gradients."""

from rgpb.engine.workspace import Workspace
from rgpb.fused import FusedLoss, coefficients, fused_loss
from rgpb.head import LMHead
from rgpb.layout import Layout, Responses, TokenScores, pairs
from rgpb.logprob import linear_logprob
from rgpb.objectives import OBJECTIVES, objective
from rgpb.parallel import VocabShard

__version__ = "0.1.0"

__all__ = [
    "OBJECTIVES", "FusedLoss", "LMHead", "Layout", "Responses", "TokenScores", "VocabShard", "Workspace",
    "coefficients", "fused_loss", "linear_logprob", "objective", "pairs",
]  # fmt: skip

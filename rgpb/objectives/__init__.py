"""The objectives by name. One is a pure function of `Responses`; `@objective` registers it.

@objective(couples="pair", ref="sums")
def my_loss(responses, *, beta=0.1):
    chosen, rejected = pairs(responses.log_ratios())
    return -F.logsigmoid(beta * (chosen - rejected))
"""

from rgpb.objectives.registry import OBJECTIVES, Objective, is_registered, objective, resolve, unit_values, units

from rgpb.objectives import group, pair, token, unpaired  # isort: skip  (they register themselves)
from rgpb.objectives.unpaired import RunningMean

__all__ = [
    "OBJECTIVES", "Objective", "RunningMean", "group", "is_registered", "objective", "pair", "resolve", "token",
    "unit_values", "units", "unpaired",
]  # fmt: skip

"""The objectives by name. One is a pure function of `Responses`; `@objective` registers it.

@objective(couples="pair", ref="sums")
def my_loss(responses, *, beta=0.1):
    chosen, rejected = pairs(responses.log_ratios())
    return -F.logsigmoid(beta * (chosen - rejected))
"""

from rgpb.objectives.registry import OBJECTIVES, Objective, objective, resolve, unit_values

from rgpb.objectives import pair, token  # isort: skip  (they register themselves)

__all__ = ["OBJECTIVES", "Objective", "objective", "pair", "resolve", "token", "unit_values"]

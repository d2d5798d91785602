"""The objectives by name. One is a pure function of `Responses`; `@objective` registers it.

@objective(couples="pair", ref="sums")
def my_loss(responses, *, beta: Annotated[float, Positive()] = 0.1):
    chosen, rejected = pairs(responses.log_ratios())
    return -F.logsigmoid(beta * (chosen - rejected))

registry: what the engine has to know of one, their table, the check of their options. ranges: what an option may be.
single, pairs, groups: the package's own, by what one value belongs to. sums: weighted sums, and reading a name.
"""

from rgpb.objectives import groups, pairs, single
from rgpb.objectives.groups import best, draw_negatives
from rgpb.objectives.ranges import AtLeast, Between, NonNegative, OneOf, Positive, Range
from rgpb.objectives.registry import (
    OBJECTIVES,
    Objective,
    Option,
    OptionText,
    check_options,
    describe_options,
    drawn,
    is_registered,
    objective,
    option,
    suggest,
    unit_values,
    units,
)
from rgpb.objectives.single import RunningMean
from rgpb.objectives.sums import parse_sum, resolve, reward_scale, weighted_sum

__all__ = [
    "OBJECTIVES", "AtLeast", "Between", "NonNegative", "Objective", "OneOf", "Option", "OptionText", "Positive",
    "Range", "RunningMean", "best", "check_options", "describe_options", "draw_negatives", "drawn", "groups",
    "is_registered", "objective", "option", "pairs", "parse_sum", "resolve", "reward_scale", "single", "suggest",
    "unit_values", "units", "weighted_sum",
]  # fmt: skip

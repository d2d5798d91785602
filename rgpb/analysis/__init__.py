"""What a loss does to a model, seen from token scores: coefficients, likelihood–derivative curves, differences between
preferred and dispreferred responses, and shifts from one model to another. Numbers first; `plot_*` draws them.

Everything is a function of `TokenScores` but two definitions that speak of the whole vocabulary, `gradient_difference`
and `vocabulary_shift`: they take hidden states and the head, and hold a chunk of logits at a time.

Derivative means ∂L/∂·. Coefficient means −∂L/∂(log p): positive where gradient descent raises the token.

Dimensions: P token positions (masked ones included), B responses, B/2 pairs stacked `[chosen; rejected]`, T steps of
the longest response, U units, V vocabulary, H hidden size, G points of a curve, C × R points of a landscape.
Papers: RGPB is Tuan & Wang 2024 (arXiv 2408.16751); BNF is "As Simple as Fine-tuning: LLM Alignment via
Bidirectional Negative Feedback Loss" (ICLR 2025).
"""

from rgpb.analysis.changes import Shifts, VocabularyShift, gini, percentile_shares, shifts, vocabulary_shift
from rgpb.analysis.derivatives import (
    Coefficients,
    Curve,
    Landscape,
    LikelihoodCurves,
    ObjectiveLike,
    coefficient_landscape,
    coefficients,
    likelihood_curves,
)
from rgpb.analysis.numbers import (
    GradientDifference,
    InformationDifference,
    agility,
    gradient_difference,
    information_difference,
    make_responses,
    perplexity,
)
from rgpb.analysis.plots import (
    plot_coefficients,
    plot_gradient_difference,
    plot_information_difference,
    plot_landscapes,
    plot_likelihood_curves,
    plot_percentile_shares,
    plot_perplexity_agility,
    plot_shifts,
    plot_vocabulary_shift,
)

__all__ = [
    "Coefficients",
    "Curve",
    "GradientDifference",
    "InformationDifference",
    "Landscape",
    "LikelihoodCurves",
    "ObjectiveLike",
    "Shifts",
    "VocabularyShift",
    "agility",
    "coefficient_landscape",
    "coefficients",
    "gini",
    "gradient_difference",
    "information_difference",
    "likelihood_curves",
    "make_responses",
    "percentile_shares",
    "perplexity",
    "plot_coefficients",
    "plot_gradient_difference",
    "plot_information_difference",
    "plot_landscapes",
    "plot_likelihood_curves",
    "plot_percentile_shares",
    "plot_perplexity_agility",
    "plot_shifts",
    "plot_vocabulary_shift",
    "shifts",
    "vocabulary_shift",
]

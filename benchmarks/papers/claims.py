"""The table: claims of the four papers, the world and the trial in which each is tried, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import on_groups, on_pairs, policies, worlds
from .judge import Above, Part, Slope, Values

PAPERS = {"RGPB": "Tuan & Wang 2024", "BNF": "BNF (ICLR 2025)", "SWEPO": "SWEPO", "MC-PO": "MC-PO"}
WORLDS: dict[str, Callable[..., worlds.World]] = {
    world.__name__: world
    for world in (
        worlds.cue_in_prompt, worlds.hh_rlhf, worlds.cue_in_answer, worlds.sums, policies.backwards,
        worlds.alpaca_eval, on_groups.distribution,
    )
}  # fmt: skip
TRIALS: dict[str, Callable[[worlds.World], tuple[Values, dict[str, Any]]]] = {
    trial.__name__: trial
    for trial in (
        on_pairs.four_losses, on_pairs.two_stages, on_pairs.coefficients, on_pairs.each_rate, on_pairs.without_partners,
        on_pairs.how_far, on_groups.group_losses, on_groups.order_of_answers, on_groups.six_choices, on_groups.bias,
        on_groups.samplers, on_groups.switched_copy, on_groups.negatives,
    )
}  # fmt: skip


class Claim(NamedTuple):
    """A statement of a paper that can be tried on small models.

    Attributes:
        name: unique.
        paper: a key of `PAPERS`; place: section, table or appendix.
        text: the claim in a sentence or two.
        world, trial: keys of `WORLDS` and `TRIALS`.
        parts: quantities, how they are judged, smallest effects; the claim holds where all parts do.
        beside: numbers that are told and decide nothing.
    """

    name: str
    paper: str
    place: str
    text: str
    world: str
    trial: str
    parts: Sequence[Part]
    beside: Sequence[Part] = ()


LOG_PPL, REWARD, RIGHT, ORDER = "log perplexity", "expected reward", "sums answered rightly", "accuracy of the order"
LOGP, SHIFT = "change of log p per token of chosen", "abs. shift of log p per"
RATES = ("0.0001", "0.0003", "0.001")
FOUR_CONTEST = [
    (f"SWEPO, p = {p}", f"{x}") for p in (1, 2) for x in ("DPO, best and random", "DPO, best and worst", "InfoNCA")
]
MC = {name: f"{name}, 5 candidates, beta 0.1" for name in on_groups.SAMPLERS}


def dpo_first(rates: Sequence[str]) -> list[Part]:
    """DPO has the highest agility and the worst perplexity of the four losses, at each learning rate."""
    others = ("MLE", "unlikelihood", "ExMATE")
    return [Above(q, f"DPO at {r}", x, at=r) for r in rates for q in ("agility", LOG_PPL) for x in others]


def by_tilt(sign: int, name: str) -> list[Part]:
    """Log-perplexity and agility change with a tenfold β, both in the direction of `sign`."""
    names = (name, "") if sign > 0 else ("", name)
    return [Above(f"change of {quantity} by a tenfold β", *names) for quantity in (LOG_PPL, "agility")]


EXMATE_SECOND: list[Part] = [Above(LOG_PPL, x, "ExMATE") for x in ("MLE", "unlikelihood", "DPO")] + [
    Above("agility", "ExMATE", "MLE"), Above("agility", "ExMATE", "unlikelihood"), Above("agility", "DPO", "ExMATE"),
]  # fmt: skip
EXMATE_BEFORE = [
    Above(LOG_PPL, "MLE, then DPO", "ExMATE, then DPO"), Above("agility", "ExMATE, then DPO", "MLE, then DPO"),
]  # fmt: skip
SECOND_STAGE = [
    Above(LOG_PPL, "MLE", "MLE, then ExMATE"), Above("agility", "MLE, then ExMATE", "MLE"),
    Above(LOG_PPL, "MLE, then DPO", "MLE"), Above("agility", "MLE, then DPO", "MLE"),
]  # fmt: skip
RECIPE = "DPO after ExMATE ends with a lower perplexity and a higher agility than DPO after MLE."
SECOND = (
    "As second stage after MLE, ExMATE improves both perplexity and agility, while DPO gives up perplexity for agility."
)
DIFFER = "Where chosen and rejected responses differ much"
# fmt: off
CLAIMS = (
    Claim("rgpb_small_difference_dpo", "RGPB", "§6.2",
          "Where the same response is chosen under its own prompt and rejected under a slightly different one, DPO learns "
          "next to nothing: agility stays near zero (here: under a tenth of ExMATE's), perplexity above MLE's.",
          "cue_in_prompt", "four_losses",
          [part for r in ("0.0003", "0.001", "0.003") for part in (
              Above("a tenth of ExMATE's agility less |agility|", f"DPO at {r}", at=r),
              Above(LOG_PPL, f"DPO at {r}", "MLE", at=r))],
          [Above("log p of chosen", "start"), Above("agility", "ExMATE")]),
    Claim("rgpb_small_difference_exmate", "RGPB", "§6.2",
          "In the same case ExMATE improves both at once: lower perplexity and higher agility than MLE.",
          "cue_in_prompt", "four_losses", [Above(LOG_PPL, "MLE", "ExMATE"), Above("agility", "ExMATE", "MLE")]),
    Claim("rgpb_small_difference_unlikelihood", "RGPB", "§6.2",
          "In the same case unlikelihood training ends with a higher perplexity than MLE.",
          "cue_in_prompt", "four_losses", [Above(LOG_PPL, "unlikelihood", "MLE")]),
    Claim("rgpb_large_difference_dpo", "RGPB", "§6.3",
          f"{DIFFER} (HH-RLHF), DPO reaches the highest agility and the worst perplexity.",
          "hh_rlhf", "four_losses", dpo_first(RATES)),
    Claim("rgpb_large_difference_exmate", "RGPB", "§6.3",
          f"{DIFFER} (HH-RLHF), ExMATE reaches the lowest perplexity and the second highest agility.",
          "hh_rlhf", "four_losses", EXMATE_SECOND),
    Claim("rgpb_large_generated_dpo", "RGPB", "§6.3",
          f"{DIFFER} (generated dialogues), DPO reaches the highest agility and the worst perplexity.",
          "cue_in_answer", "four_losses", dpo_first(("0.0003", "0.001", "0.003"))),
    Claim("rgpb_large_generated_exmate", "RGPB", "§6.3",
          f"{DIFFER} (generated dialogues), ExMATE reaches the lowest perplexity and the second highest agility.",
          "cue_in_answer", "four_losses", EXMATE_SECOND),
    Claim("rgpb_recipe", "RGPB", "§6.4", RECIPE, "hh_rlhf", "two_stages", EXMATE_BEFORE),
    Claim("rgpb_recipe_generated", "RGPB", "§6.4", f"{RECIPE} (Here on generated dialogues.)",
          "cue_in_answer", "two_stages", EXMATE_BEFORE),
    Claim("rgpb_second_stage", "RGPB", "§6.4", SECOND, "hh_rlhf", "two_stages", SECOND_STAGE),
    Claim("rgpb_second_stage_generated", "RGPB", "§6.4", f"{SECOND} (Here on generated dialogues.)",
          "cue_in_answer", "two_stages", SECOND_STAGE),
    Claim("rgpb_coefficient_dpo", "RGPB", "Appendix G",
          "A larger β of DPO lowers agility and preserves the probabilities of the chosen responses better.",
          "hh_rlhf", "coefficients", by_tilt(-1, "DPO")),
    Claim("rgpb_coefficient_exmate", "RGPB", "Appendix G",
          "A larger β of ExMATE lowers the probabilities of the chosen responses and raises agility.",
          "hh_rlhf", "coefficients", by_tilt(1, "ExMATE")),

    Claim("bnf_no_collapse", "BNF", "§2.1, §3.2",
          "On nearly identical pairs the sum of likelihood losses, up on the chosen and down on the rejected (NLL+PLL), "
          "makes the model collapse (here: chosen responses lose more than one nat per token), while BNF does not.",
          "sums", "each_rate",
          [part for r in RATES for part in (
              Above(LOGP, "", f"NLL+PLL at {r}", by=1.0, at=r), Above(LOGP, f"BNF at {r}", by=-1.0, at=r))]),
    Claim("bnf_dpo_chosen", "BNF", "§2.3",
          "On nearly identical pairs DPO lowers the likelihood of the chosen response.",
          "sums", "each_rate", [Above(LOGP, "", f"DPO at {r}", at=r) for r in RATES]),
    Claim("bnf_keeps_reasoning", "BNF", "§2.3, §5.1",
          "On pairs of nearly identical solutions BNF preserves the model better than DPO and NLL+PLL do: a higher "
          "likelihood of the right solution, and more sums answered rightly.",
          "sums", "each_rate",
          [Above(q, f"BNF at {r}", f"{x} at {r}", at=r) for r in RATES for q in (LOGP, RIGHT) for x in ("DPO", "NLL+PLL")]),
    Claim("bnf_pairing_ratio", "BNF", "§5.2, Table 6",
          "The larger the part of the pairs that are whole, the better the result.",
          "sums", "without_partners",
          [Above(RIGHT, more, less) for less, more in (("0%", "25%"), ("25%", "50%"), ("50%", "100%"))]),
    Claim("bnf_unpaired", "BNF", "§5.2, Table 6",
          "BNF improves over the model it starts from even when no response has a partner (pairing ratio 0 %).",
          "sums", "without_partners", [Above(RIGHT, "0%", "start")]),
    Claim("bnf_smallest_shift", "BNF", "§5.3, Figure 3a, 3d",
          "Of BNF, DPO, IPO and SimPO, BNF moves the log-likelihood of the policy's own answers least and SimPO most.",
          "hh_rlhf", "how_far",
          [Above(f"{SHIFT} {q}", f"{a} at {r}", f"{b} at {r}", at=r) for r in RATES for q, a, b in (
              *(("answer", x, "BNF") for x in ("DPO", "IPO", "SimPO")),
              *(("token", x, "BNF") for x in ("DPO", "IPO", "SimPO")),
              *(("answer", "SimPO", x) for x in ("DPO", "IPO")))]),
    Claim("bnf_logit_shift", "BNF", "§5.3, Figure 3b, 3e",
          "BNF moves the logits of the answer's tokens more than DPO and IPO do.",
          "hh_rlhf", "how_far",
          [Above(f"abs. logit shift per {q}", f"BNF at {r}", f"{x} at {r}", at=r)
           for r in RATES for q in ("answer", "token") for x in ("DPO", "IPO")]),
    Claim("bnf_even_shifts", "BNF", "§5.3, Figure 3f",
          "BNF spreads logit shifts most evenly over the tokens: the lowest Gini coefficient of the four.",
          "hh_rlhf", "how_far",
          [Above("Gini coefficient of logit shifts", f"{x} at {r}", f"BNF at {r}", at=r)
           for r in RATES for x in ("DPO", "IPO", "SimPO")]),
    Claim("bnf_central_shifts", "BNF", "§5.3, Figure 4",
          "Token by token BNF's log-likelihood shifts are less extreme than DPO's: fewer of them lie in the outer two of "
          "the ten bins that DPO's shifts fill equally.",
          "hh_rlhf", "how_far",
          [Above("part of the tokens in DPO's outer bins", f"DPO at {r}", f"BNF at {r}", at=r) for r in RATES]),

    Claim("swepo_positives", "SWEPO", "§6.2, Table 1",
          "Contrasting all responses above the mean with those below is better than the best with all others (p = 0).",
          "backwards", "group_losses", [Above(REWARD, "SWEPO, p = 0", "SWEPO, one against all, p = 0")]),
    Claim("swepo_weighting", "SWEPO", "§6.2, Table 1",
          "Weighting the group contrast by the deviation (p = 1) or its square (p = 2) improves on no weighting (p = 0).",
          "backwards", "group_losses", [Above(REWARD, f"SWEPO, p = {p}", "SWEPO, p = 0") for p in (1, 2)]),
    Claim("swepo_alpaca", "SWEPO", "Table 1",
          "SWEPO weighted by deviation (p = 1, p = 2) learns real preferences better than DPO on the best response and a "
          "random or the worst one, and than InfoNCA; here: orders held-out answers better.",
          "alpaca_eval", "order_of_answers", [Above(ORDER, a, b) for a, b in FOUR_CONTEST]),
    Claim("swepo_baselines", "SWEPO", "Table 1",
          "SWEPO weighted by deviation (p = 1, p = 2) gives a better policy than DPO on the best response and a random "
          "or the worst one, and than InfoNCA.",
          "backwards", "group_losses", [Above(REWARD, a, b) for a, b in FOUR_CONTEST]),
    Claim("swepo_variance", "SWEPO", "Table 2",
          "Over random choices of the rejected response DPO's result varies more than that of SWEPO, which takes all "
          "responses.",
          "backwards", "six_choices", [Above("sd of the expected reward", "DPO, choice and order", "SWEPO, p = 1, order")]),
    Claim("swepo_bias", "SWEPO", "Theorem 5.1",
          "After training with SWEPO on k acceptable and k other responses per prompt, the policy's expected attribute "
          "deviates from that of the acceptable distribution as 1/√k.",
          "distribution", "bias", [Slope("bias, swepo", -0.5)],
          [Slope(f"bias, {name}", -0.5) for name in ("swepo, early", "swepo, best stop", "mle")]),
    Claim("swepo_bias_sample", "SWEPO", "Theorem 5.1",
          "The mean of an attribute over k sampled acceptable responses deviates from the true mean as 1/√k.",
          "distribution", "bias", [Slope("bias, sample mean", -0.5, floor="bound σ_max/√k less bias, sample mean")]),

    Claim("mcpo_candidates", "MC-PO", "§5.3, Figure 2",
          "MC-PO gets worse as the better candidates are removed, from five to three to one.",
          "backwards", "samplers",
          [Above(REWARD, MC["mc"], "mc, 3 candidates, beta 0.1"),
           Above(REWARD, "mc, 3 candidates, beta 0.1", "mc, 1 candidate, beta 0.1")]),
    Claim("mcpo_min", "MC-PO", "§5.3, Figure 2",
          "Taking the candidate with the lowest βΔ gives the worst policy of the samplers.",
          "backwards", "samplers", [Above(REWARD, MC[x], MC["min"]) for x in ("mc", "random", "max")]),
    Claim("mcpo_samplers", "MC-PO", "§5.3, Figure 2",
          "Drawing the rejected response with probability ∝ e^{βΔ} gives a better policy than taking the candidate with "
          "the highest or lowest βΔ, or any.",
          "backwards", "samplers", [Above(REWARD, MC["mc"], MC[x]) for x in ("random", "max", "min")],
          [Above(on_groups.EVEN, MC["mc"]),
           *(Above(REWARD, "mc, 5 candidates, beta 1", f"{x}, 5 candidates, beta 1") for x in ("random", "max", "min")),
           Above(on_groups.EVEN, "mc, 5 candidates, beta 1")]),
    Claim("mcpo_noise_share", "MC-PO", "§5.4",
          "The kernel avoids the switched copy: under the trained policy its share of the draws is below one in six.",
          "backwards", "switched_copy",
          [Above("the switched copy's share of the draws", "", "MC-PO of 6", by=-1 / 6)]),
    Claim("mcpo_noise", "MC-PO", "§5.4, Table 2",
          "With a switched copy of the preferred response among the candidates MC-PO gives a better policy than DPO on a "
          "candidate drawn at random, and loses less than it by the injection.",
          "backwards", "switched_copy",
          [Above(REWARD, "MC-PO of 6", "DPO, any of 6"),
           Above("loss of expected reward by the switched copy", "DPO", "MC-PO")]),
    Claim("mcpo_noise_pairs", "MC-PO", "§5.4, Table 2",
          "DPO with the switched copy as the rejected response degenerates: worse than with a random candidate, and than "
          "the model that it started from.",
          "backwards", "switched_copy", [Above(REWARD, x, "DPO(−), switched") for x in ("DPO, any of 6", "reference")]),
    Claim("mcpo_negatives", "MC-PO", "§5.4, Table 3",
          "MC-PO improves as the number M of drawn rejected responses goes from 1 to 2 to 3.",
          "backwards", "negatives", [Above(REWARD, f"MC-PO, M = {m + 1}", f"MC-PO, M = {m}") for m in (1, 2)]),
    Claim("mcpo_negatives_random", "MC-PO", "§5.4, Table 3",
          "From M = 1 to M = 3 MC-PO gains more than the same loss with rejected responses drawn at random (RNCE).",
          "backwards", "negatives", [Above("gain of expected reward from M = 1 to M = 3", "MC-PO", "RNCE")],
          [Above("gain of expected reward from M = 1 to M = 3", name) for name in ("MC-PO", "RNCE")]),
    Claim("mcpo_rnce", "MC-PO", "§5.4, Table 3",
          "At each M of 1, 2 and 3 MC-PO is better than the same loss with rejected responses drawn at random (RNCE).",
          "backwards", "negatives", [Above(REWARD, f"MC-PO, M = {m}", f"RNCE, M = {m}") for m in (1, 2, 3)]),
)
# fmt: on

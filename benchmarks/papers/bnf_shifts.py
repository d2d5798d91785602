"""How far BNF, DPO, IPO and SimPO move likelihoods and logits, on HH-RLHF (BNF, §5.3, Figures 3 and 4).

No learning rate is picked: every method is run at every rate of a grid, and a claim has to hold at each of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rgpb.analysis import percentile_shares, shifts

from .claim import Claim, Finding, curves, decide, differences, every, need, spread, write
from .models import Batch, Method, clone, padded, scores, targets, train
from .rgpb_dialogues import PROMPT, RATES, REPLY, Dialogues, prepare

CLAIMS = (
    Claim(
        "bnf_smallest_shift", "BNF", "§5.3, Figure 3a, 3d",
        "Of BNF, DPO, IPO and SimPO, BNF moves the log-likelihood of the policy's own answers least and SimPO most.",
    ),
    Claim(
        "bnf_logit_shift", "BNF", "§5.3, Figure 3b, 3e",
        "BNF moves the logits of the answer's tokens more than DPO and IPO do.",
    ),
    Claim(
        "bnf_even_shifts", "BNF", "§5.3, Figure 3f",
        "BNF spreads logit shifts most evenly over the tokens: the lowest Gini coefficient of the four.",
    ),
    Claim(
        "bnf_central_shifts", "BNF", "§5.3, Figure 4",
        "Token by token BNF's log-likelihood shifts are less extreme than DPO's: fewer of them lie in the outer two of "
        "the ten bins that DPO's shifts fill equally.",
    ),
)  # fmt: skip
METHODS: dict[str, Method] = {
    "BNF": ("bnf", {}),
    "DPO": ("dpo", {"beta": 0.1}),
    "IPO": ("ipo", {"tau": 0.1}),
    "SimPO": ("simpo", {"beta": 2.0, "gamma": 0.5}),
}


QUANTITIES = ("likelihood", "likelihood_per_token", "logit", "logit_per_token", "gini", "outer")


class Shift(NamedTuple):
    """Of one model against the reference, on its greedy answers; means over the answers.

    Attributes:
        likelihood: abs(Σ shift of log p); likelihood_per_token: that over the length.
        logit: Σ abs(shift of the target's logit); logit_per_token: that over the length.
        gini: of an answer's absolute logit shifts.
        tokens: shift of log p of the tokens of the held-out pairs: the same tokens for all methods; NaN where masked.
    """

    likelihood: float
    likelihood_per_token: float
    logit: float
    logit_per_token: float
    gini: float
    tokens: Tensor


@torch.no_grad()
def answers(model: PreTrainedModel, texts: Dialogues, count: int, length: int) -> Batch:
    """A batch of greedy answers to test prompts, of up to `length` tokens; all prompts are equally long."""
    prompts = [list(chosen[0]) for chosen, _ in texts.test[:count]]
    inputs = torch.tensor(prompts)
    found = model.eval().generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=length, do_sample=False,
        eos_token_id=texts.end, pad_token_id=texts.pad,
    )  # fmt: skip
    replies = [[token for token in row if token != texts.pad] for row in found[:, PROMPT:].tolist()]
    return padded(list(zip(prompts, replies)), pad=texts.pad)


def measure(model: PreTrainedModel, reference: PreTrainedModel, batch: Batch, common: Batch) -> Shift:
    """Shifts on `batch`, the model's own answers, and token by token on `common`."""
    own, fixed = (shifts(scores(reference, b), scores(model, b), targets(model, b)) for b in (batch, common))
    likelihood, per_token, logit, logit_per_token, gini = (
        x.nanmean().item() for x in (own.logp.abs(), own.logp_mean.abs(), own.logit, own.logit_mean, own.gini)
    )
    return Shift(likelihood, per_token, logit, logit_per_token, gini, fixed.token_logp)


def outer(tokens: Tensor, of: Tensor) -> float:
    """Part of `tokens` in the first and the last of the ten bins that `of` fills equally: 0.2 for `of` itself."""
    return percentile_shares(tokens, of)[[0, -1]].sum().item()


def run(
    out: Path, data: dict[str, Path], *, seeds: int = 4, quick: bool = False, progress: bool = True
) -> list[Finding]:
    """One epoch of each method at each learning rate from the same start, which is the reference.

    Args:
        out: folder for tables, pictures and JSON.
        data: "hh_rlhf", a folder.
        seeds: runs of each; they draw the weights of the start and the order of the pairs.
        quick: a few steps of a smaller model.
        progress: show progress.

    Raises:
        ValueError: no such data.
    """
    texts, starts, batches, test, _, _, settings = prepare(need(data, "hh_rlhf"), seeds, quick, progress)
    steps, length = (2, 4) if quick else (len(batches[0]), REPLY)
    values: dict[str, dict[str, dict[float, list[float]]]] = {
        quantity: {name: {rate: [] for rate in RATES} for name in METHODS} for quantity in QUANTITIES
    }
    for seed, (reference, its) in enumerate(zip(starts, batches)):
        for rate in RATES:
            moved: dict[str, Tensor] = {}
            for name, (objective, options) in METHODS.items():
                model = clone(reference)
                label = f"{name} at {rate:g}, seed {seed}" if progress else None
                train(model, its, objective, ref_model=reference, lr=rate, steps=steps, progress=label, **options)
                found = measure(model, reference, answers(model, texts, len(texts.test), length), test)
                moved[name] = found.tokens
                for quantity in QUANTITIES[:-1]:
                    values[quantity][name][rate].append(getattr(found, quantity))
            for name, tokens in moved.items():
                values["outer"][name][rate].append(outer(tokens, moved["DPO"]))
    header = ["", "learning rate", "abs. shift of log p", "… per token", "abs. logit shift", "… per token"]
    rows = [[*header, "Gini of logit shifts", "part in DPO's outer bins"]]
    for name in METHODS:
        rows += [[name, f"{rate:g}", *(spread(values[q][name][rate]) for q in QUANTITIES)] for rate in RATES]
    settings = {name: value for name, value in settings.items() if name != "learning rate"} | {
        "methods": {name: [m, o] for name, (m, o) in METHODS.items()}, "learning rates": RATES,
        "rule for the learning rate": "none picked: a claim has to hold at each of them",
        "answers": f"greedy, up to {length} tokens",
    }  # fmt: skip

    def gaps(quantity: str, larger: str, smaller: str, rate: float) -> str:
        return decide(differences(values[quantity][larger][rate], values[quantity][smaller][rate]))

    others = ("DPO", "IPO", "SimPO")
    per_rate = [
        {
            rate: every(
                [gaps(q, name, "BNF", rate) for q in ("likelihood", "likelihood_per_token") for name in others]
                + [gaps("likelihood", "SimPO", name, rate) for name in ("DPO", "IPO")]
            )
            for rate in RATES
        },
        {
            rate: every([gaps(q, "BNF", name, rate) for q in ("logit", "logit_per_token") for name in ("DPO", "IPO")])
            for rate in RATES
        },
        {rate: every([gaps("gini", name, "BNF", rate) for name in others]) for rate in RATES},
        {rate: gaps("outer", "DPO", "BNF", rate) for rate in RATES},
    ]
    told = {
        "likelihood": "Absolute shift of log p per answer",
        "logit_per_token": "Absolute logit shift per token",
        "gini": "Gini coefficient",
        "outer": "Part of the tokens in DPO's outer bins",
    }
    findings = []
    for claim, verdicts, (quantity, text) in zip(CLAIMS, per_rate, told.items()):
        parts = [
            f"at {rate:g} {', '.join(f'{name} {spread(values[quantity][name][rate], 2)}' for name in METHODS)} "
            f"({verdict})"
            for rate, verdict in verdicts.items()
        ]
        finding = Finding(claim, every([*verdicts.values()]), f"{text}: {'; '.join(parts)}.", rows, settings)
        write(finding, out, curves({told[q]: values[q] for q in told}, "learning rate", log=True))
        findings.append(finding)
    return findings

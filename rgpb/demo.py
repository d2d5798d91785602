"""`rgpb demo`: a small model that often drops the carry is taught by pairs of answers that differ in a digit or two.

    noisy answers ──mle──▶ one model that is about as often wrong as right ──BNF, DPO, NLL+PLL──▶ three models

All three start from that model, which is their reference too, and see the same pairs in the same order. Everything runs
through `rgpb.train`, as on real data.
"""

from __future__ import annotations

import random
from typing import Any

METHODS = {"bnf": "BNF", "dpo": "DPO", "nll_pll": "NLL+PLL"}


def arithmetic_pairs(n: int, seed: int) -> list[dict[str, str]]:
    """Sums of two numbers of two digits, worked out digit by digit, and the same with a wrong tens digit.

    {"prompt": "37+45=", "chosen": "7+5=12,3+4+1=08,082", "rejected": "7+5=12,3+4+1=07,072"}

    The wrong one forgets a carry, or adds one that isn't there. It then carries on rightly from the wrong digit, so the
    two differ in one digit of the working and the same digit of the result.

    Args:
        n: how many, from 1 to 7000. No two have the same prompt.
        seed: another one gives other sums in another order.

    Raises:
        ValueError: `n` out of range.
    """
    if not 1 <= n <= 7000:
        raise ValueError(f"n: expected 1 to 7000, got {n}")
    drawn = list(range(90 * 90))
    random.Random(seed).shuffle(drawn)
    pairs: list[dict[str, str]] = []
    for number in drawn:
        a, b = 10 + number // 90, 10 + number % 90
        carry = (a % 10 + b % 10) // 10
        tens = a // 10 + b // 10 + carry
        wrong = tens - 1 if carry else tens + 1
        if tens // 10 == wrong // 10:  # else both digits of the tens would differ
            pairs.append({"prompt": f"{a}+{b}=", "chosen": _worked(a, b, tens), "rejected": _worked(a, b, wrong)})
        if len(pairs) == n:
            break
    return pairs


def _worked(a: int, b: int, tens: int) -> str:
    ones = a % 10 + b % 10
    carry, last = divmod(ones, 10)
    return f"{a % 10}+{b % 10}={ones:02d},{a // 10}+{b // 10}+{carry}={tens:02d},{tens:02d}{last}"

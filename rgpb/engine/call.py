"""`Call`: everything about one call but its tensors, settled once at the door.

Operators take the tensors that are there and the call as a string that describes itself:

    rgpb::loss(Tensor[] inputs, str call) -> Tensor[]

so that one schema serves every loss, every head and every path. `Tensors` names the tensors; the call's `given` says
which of them the list holds.

Dimensions: P positions, B responses, V vocabulary, H hidden size.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgpb.engine.chunks import Chunks
from rgpb.head import HeadWeight, LMHead


class Call(NamedTuple):
    """How a call is run, and of what.

    Attributes:
        impl: the kernel set.
        path: of `plan.PATHS`, settled.
        chunks: what the loops hold at a time.
        workspace: bytes.
        kept: key of a `Workspace` to keep them in, or 0.
        operands: dtype of the products' operands, by name ("bfloat16").
        ignore_index, softcap, scale: as the public functions have them.
        entropy: whether H_o is asked for.
        accumulate: whether the forward makes O = Q W − w_y, which becomes the gradient of hidden.
        tolerance: of skipping, or None.
        tile: with a tolerance, columns whose softmax mass is kept together.
        by_row: whether the tolerance is relative to each row's own coefficient, also where its response is known.
        sort_vocab: whether the vocabulary is put in order for that.
        objective: its registered name, for a single pass; else "".
        options: its options, names and literals.
        mean: whether the loss is the units' mean, else their sum.
        group_size: K, or 0.
        scored: whether a single pass returns the statistics, too.
        validate: whether tensors are read to check them, and to leave ignored positions out. Else these are computed
            like the others, against entry 0 of the vocabulary, and their coefficients are 0.
        needs: whether gradients of hidden, weight and bias are asked for.
        needs_more: the same of the columns beside the weight.
        stored: of a quantised weight its `Quantised.named`, else empty.
        given: names of the tensors that come with it, of `Tensors`.
    """

    impl: str
    path: str
    chunks: Chunks
    workspace: int
    operands: str
    ignore_index: int
    softcap: float | None
    scale: float
    entropy: bool = False
    accumulate: bool = False
    tolerance: float | None = None
    tile: int = 0
    by_row: bool = False
    kept: int = 0
    sort_vocab: bool = False
    objective: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    mean: bool = True
    group_size: int = 0
    scored: bool = True
    validate: bool = True
    needs: tuple[bool, bool, bool] = (False, False, False)
    needs_more: bool = False
    stored: tuple[str, ...] = ()
    given: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the products' operands."""
        return getattr(torch, self.operands)

    def weight_dtype(self, weight: Tensor) -> torch.dtype:
        """Of the weight's values, whose codes `weight` may be."""
        return getattr(torch, self.stored[1]) if self.stored else weight.dtype

    def encode(self) -> str:
        """As text: a Python literal, field by field. `parse` reads it."""
        fields: dict[str, object] = {**self._asdict(), "chunks": tuple(self.chunks)}
        return "{" + ", ".join(f"{name!r}: {_constant(value)!r}" for name, value in fields.items()) + "}"

    @staticmethod
    def parse(text: str) -> Call:
        """What `encode` wrote."""
        return _parse(text)


def _constant(value: Any) -> Any:
    """`value`; what a compiler has for a symbol becomes the number it stands for, since a text has no symbols."""
    if not torch.compiler.is_compiling():
        return value
    if isinstance(value, tuple):
        return tuple([_constant(part) for part in value])
    if value is None or isinstance(value, bool | str):
        return value
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # only where a compiler has it loaded already

    return guard_scalar(value)


@lru_cache(256)
def _parse(text: str) -> Call:
    fields = ast.literal_eval(text)
    return Call(**{**fields, "chunks": Chunks(*fields["chunks"])})


def encodable(options: dict[str, Any]) -> bool:
    """Whether `Call` can carry them: what a literal can say."""
    return all(
        type(value) in (bool, int, str) or (type(value) is float and -math.inf < value < math.inf)
        for value in options.values()
    )


class Tensors(NamedTuple):
    """The tensors of a call; what isn't there is None.

    Attributes:
        hidden: [P, H].
        weight, bias: [V, H], [V]; where the call has it `stored`, the weight's codes.
        target: int64 [P].
        tokens: int64 [B], of each response, that count.
        label, rewards: float64 [B].
        ref_logp, ref_log_odds: [P] of the reference.
        ref_sums: float64 [B], where the reference came as sums.
        z_y, lse_other, h_o: statistics, [P].
        g_zy, g_lo, g_ho: their upstream gradients, [P].
        active, left_out, order: of skipping (`sweeps.Scored`).
        more: [V, r], columns beside the weight's.
        scales, zeros: of a stored weight.
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    target: Tensor | None = None
    tokens: Tensor | None = None
    label: Tensor | None = None
    rewards: Tensor | None = None
    ref_logp: Tensor | None = None
    ref_log_odds: Tensor | None = None
    ref_sums: Tensor | None = None
    z_y: Tensor | None = None
    lse_other: Tensor | None = None
    h_o: Tensor | None = None
    g_zy: Tensor | None = None
    g_lo: Tensor | None = None
    g_ho: Tensor | None = None
    active: Tensor | None = None
    left_out: Tensor | None = None
    order: Tensor | None = None
    more: Tensor | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None

    @staticmethod
    def of(hidden: Tensor, head: LMHead, target: Tensor, **more: Tensor | None) -> Tensors:
        """Those of a call, flat; hidden [..., H], target [...]."""
        x, y, weight = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1), head.weight
        if isinstance(weight, HeadWeight):
            more["more"] = weight.more
            if weight.quantised is not None:
                more.update(scales=weight.quantised.scales, zeros=weight.quantised.zeros)
            weight = weight.base
        return Tensors(x, weight, head.bias, y, **more)

    @property
    def head(self) -> dict[str, Tensor | None]:
        """Those that make the weight."""
        return {"weight": self.weight, "more": self.more, "scales": self.scales, "zeros": self.zeros}

    def need(self, *names: str) -> list[Tensor]:
        """The tensors of these names, which every call of the operator that asks has."""
        found = [x for name in names if (x := getattr(self, name)) is not None]
        assert len(found) == len(names)
        return found

    def pack(self, call: Call) -> tuple[list[Tensor], str]:
        """An operator's arguments: those that are there, and the call that names them."""
        return self.present, call._replace(given=self.given).encode()

    @property
    def given(self) -> tuple[str, ...]:
        """The names of those that are there."""
        return tuple(name for name, x in zip(self._fields, self) if x is not None)

    @property
    def present(self) -> list[Tensor]:
        """Those that are there."""
        return [x for x in self if x is not None]

    @staticmethod
    def unpack(inputs: Sequence[Tensor], call: Call) -> Tensors:
        """By the names that the call gives them."""
        return Tensors(**dict(zip(call.given, inputs)))

"""The door: arguments → checked tensors and the `Call`; every ValueError about tensors and how is raised here.

Options are checked where they are declared, in `objectives/registry.py`. What only a sweep can see (a target outside
the vocabulary, hidden states that aren't finite) is refused by the sweep, in `engine/sweeps.py`, so that it costs no
synchronisation of its own.

Dimensions: B responses, T padded length, N packed length, P positions (B · T or N), V vocabulary, H hidden size,
G groups, K responses of a group.
"""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rgpb.arguments import parse_bytes
from rgpb.engine.call import Call, encodable
from rgpb.engine.chunks import Chunks, Sizes, TooSmall, chunks, mass_tile, sizes
from rgpb.engine.operator import is_traced
from rgpb.engine.plan import DEFAULT_WORKSPACE, PATHS, SHARDED, SPLIT, UNREAD, Plan, of_impl, plan
from rgpb.engine.workspace import Workspace, settled
from rgpb.head import HeadWeight, LMHead, as_head
from rgpb.kernels import IMPLEMENTATIONS, devices, kernel_set, resolve_impl, why_not
from rgpb.kernels.devices import architecture
from rgpb.layout import Layout, TokenScores, tokens_of_each
from rgpb.objectives import Objective, is_registered
from rgpb.parallel import VocabShard, all_sum, check_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
ENGINES = ("auto", "chunked", "tiled")
REDUCTIONS = ("mean", "sum", "none")

Reference = TokenScores | Tensor | tuple[Tensor, Tensor | LMHead]


# -- how --------------------------------------------------------------------------------------------------------------


class How(NamedTuple):
    """How a loss is computed, as a caller says it; `linear_logprob` has the meaning of each."""

    impl: str = "auto"
    path: str = "auto"
    grad_tolerance: float | str | None = None
    sort_vocab: bool = False
    workspace: int = DEFAULT_WORKSPACE
    kept: int = 0
    by_row: bool = False
    validate: bool = True


def check_how(
    device: torch.device, impl: str, engine: str | None, path: str, grad_tolerance: float | str | None,
    sort_vocab: bool | None, workspace: int | str | Workspace | None, tolerance_per: str = "response",
    *, shared: bool = False, validate: bool = True,
) -> How:  # fmt: skip
    """`How` on a device, with the old `engine` translated. `shared` as for `settled`.

    Raises:
        ValueError: a value that doesn't exist, an engine that contradicts `impl`, or what can't do without a read.
    """
    if not isinstance(validate, bool):
        raise ValueError(f"validate: expected True or False, got {validate!r}")
    if not validate and grad_tolerance is not None:
        raise ValueError(
            "grad_tolerance: expected None with validate=False, since what is left out is read from the device, "
            f"got {grad_tolerance!r}"
        )
    for name, given, known in (("impl", impl, IMPLEMENTATIONS), ("path", path, PATHS)):
        if given not in known:
            raise ValueError(f"{name}: expected one of {known}, got {given!r}")
    if engine is not None:
        impl = _without_engine(device, impl, engine)
    if tolerance_per not in ("response", "row"):
        raise ValueError(f"tolerance_per: expected 'response' or 'row', got {tolerance_per!r}")
    if tolerance_per == "row" and grad_tolerance is None:
        raise ValueError("tolerance_per: expected 'response' without grad_tolerance, got 'row'")
    size, kept = settled(_bytes_of(workspace), device, shared or not validate)
    if sort_vocab is None:  # an order that is estimated once is worth it
        sort_vocab = bool(kept) and grad_tolerance is not None
    kept = kept if validate else 0  # whoever replays a call would write into memory that others hold by then
    return How(impl, path, grad_tolerance, sort_vocab, size, kept, tolerance_per == "row", validate)


def _bytes_of(workspace: int | str | Workspace | None) -> int | str | Workspace | None:
    """A workspace whose size is a text, such as "64MiB", as a number."""
    if not isinstance(workspace, str) or workspace == "auto":
        return workspace
    try:
        return parse_bytes(workspace)
    except ValueError:
        raise ValueError(
            f"workspace: expected bytes, as 2**29 or '512MiB', a Workspace or 'auto', got {workspace!r}"
        ) from None


def _without_engine(device: torch.device, impl: str, engine: str) -> str:
    """The `impl` that `engine` and `impl` meant together."""
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, got {engine!r}")
    meant = impl
    if engine == "tiled":
        if impl not in ("auto", "triton", "tiled"):
            raise ValueError(
                f"engine: expected 'chunked' with impl={impl!r}, since the tile kernels are Triton's, got 'tiled'"
            )
        if (reason := why_not("tiled", device)) is not None:
            raise ValueError(f"engine: expected 'chunked' or None, since {reason}; got 'tiled'")
        meant = "tiled"
    elif engine == "chunked":
        if impl == "tiled":
            raise ValueError("engine: expected 'tiled' with impl='tiled', got 'chunked'")
        meant = resolve_impl("auto", device)[0] if impl == "auto" else impl
    warnings.warn(f"engine={engine!r} is deprecated: give impl={meant!r}", DeprecationWarning, stacklevel=_caller())
    return meant


def _caller() -> int:
    """The `stacklevel` of the first frame that isn't this package's, for a warning in the function that asks."""
    if torch.compiler.is_compiling():
        return 1
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "rgpb":
        frame, level = frame.f_back, level + 1
    return level


def check_ignore_index(ignore_index: int) -> int:
    """As a plain int."""
    try:
        return operator.index(ignore_index)
    except TypeError as error:
        raise ValueError(f"ignore_index: expected a whole number, got {ignore_index!r}") from error


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The operands' type of the products: autocast's where it is on, else that of the hidden states."""
    device = hidden.device.type
    if hidden.dtype == torch.float64:  # autocast leaves it alone
        return hidden.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def check_tolerance(grad_tolerance: object, sort_vocab: bool, entropy_grad: bool, dtype: torch.dtype) -> float | None:
    """The tolerance as a number. "auto" is eps / 8 of `dtype`: a quarter of its rounding unit.

    On a real model, in float32, the gradient of the hidden states moved by 0.6 to 1.2 times the tolerance, in units of
    its norm, and that of the weight by less (benchmarks/results/cpu-2-threads/skipping).

    Raises:
        ValueError: not a number ≥ 0 or "auto"; with a gradient of the entropy; `sort_vocab` without it.
    """
    if not isinstance(sort_vocab, bool):
        raise ValueError(f"sort_vocab: expected True, False or None, got {sort_vocab!r}")
    if grad_tolerance is None:
        if sort_vocab:
            raise ValueError("sort_vocab: expected False without grad_tolerance, since nothing is skipped; got True")
        return None
    if entropy_grad:
        raise ValueError(
            "grad_tolerance: expected None where the entropy has a gradient, which the masses don't bound; "
            f"got {grad_tolerance!r}"
        )
    if isinstance(grad_tolerance, str) and grad_tolerance == "auto":
        return torch.finfo(dtype).eps / 8
    number = isinstance(grad_tolerance, Real) and not isinstance(grad_tolerance, bool)
    if not number or not 0 <= float(grad_tolerance) < 1:  # type: ignore[arg-type]
        raise ValueError(f"grad_tolerance: expected None, 'auto' or a number in [0, 1), got {grad_tolerance!r}")
    return float(grad_tolerance)  # type: ignore[arg-type]


def plan_call(
    hidden: Tensor,
    head: LMHead,
    how: How,
    *,
    spec: Objective | None = None,
    options: dict[str, Any] | None = None,
    reduction: str = "mean",
    entropy_grad: bool = False,
    unit_tokens: Callable[[], Sequence[int]] | None = None,
    split: bool = False,
) -> tuple[Plan, Sizes]:
    """What will run for these tensors, and the sizes that decided it.

    Args:
        spec, options, reduction: the objective, its options and how its values are reduced; None for scores alone.
        unit_tokens: see `engine.plan.Request`.
        split: whether other ranks have tokens of the same responses.

    Raises:
        ValueError: an `impl` or a `path` that can't serve the request, or a `workspace` too small for one row.
    """
    vocab, width = head.weight.shape
    grad, bias = torch.is_grad_enabled(), head.bias
    dtype = compute_dtype(hidden)
    impls = _without_reads(head, resolve_impl(how.impl, hidden.device), how.validate)
    late = SHARDED if head.shard is not None else SPLIT if split else ""
    if not how.validate and spec is not None and not (spec.terms and kernel_set(impls[0]).token_losses):
        late = UNREAD
    registered = spec is not None and is_registered(spec) and encodable(options or {})
    plain = not isinstance(head.weight, HeadWeight)
    strided = plain and width > 1 and head.weight.stride(1) != 1
    shape = sizes(
        vocab,
        width,
        head.weight.dtype,
        dtype,
        devices.kind(hidden.device),
        impls[0],
        architecture(hidden.device),
        strided,
        None if plain else head.weight.trained,
        head.softcap is not None,
    )
    made = plan(
        hidden.numel() // width,
        shape,
        impls,
        hidden_grad=grad and hidden.requires_grad,
        weight_grad=grad and (head.weight.requires_grad or (bias is not None and bias.requires_grad)),
        couples=spec.couples if spec is not None and registered else "batch",
        scalar=reduction != "none",
        half=torch.float16 in (hidden.dtype, head.weight.dtype, dtype),
        entropy_grad=entropy_grad,
        skipping=how.grad_tolerance is not None,
        sort_vocab=how.sort_vocab,
        kept=how.kept > 0,
        split=late,
        unit_tokens=unit_tokens,
        path=how.path,
        workspace=how.workspace,
    )
    shape = shape.skipping(how.sort_vocab, how.kept > 0) if how.grad_tolerance is not None else shape
    shape = of_impl(shape, made.impl)
    return made, shape


def _without_reads(head: LMHead, impls: tuple[str, ...], validate: bool) -> tuple[str, ...]:
    """The kernel sets to choose from; without `validate` those that read nothing from the device."""
    if validate:
        return impls
    if head.shard is not None:
        raise ValueError("head.shard: expected None with validate=False, got a VocabShard")
    if impls == ("tiled",):
        raise ValueError(
            "impl: expected another with validate=False, since the tile kernels read a flag of each chunk, got 'tiled'"
        )
    return tuple(impl for impl in impls if impl != "tiled")


def _named_rightly(error: TooSmall, workspace: int, planned: Callable[[int], object]) -> TooSmall:
    """A refusal of `workspace` that names a size which isn't refused: with it grows what is held beside the row."""
    while True:
        try:
            planned(error.least)
        except TooSmall as more:
            error = more
        else:
            return TooSmall(error.least, error.columns, workspace)


def make_call(
    hidden: Tensor,
    head: LMHead,
    how: How,
    ignore_index: int,
    *,
    spec: Objective | None = None,
    options: dict[str, Any] | None = None,
    reduction: str = "mean",
    entropy: bool = False,
    group_size: int | None = None,
    unit_tokens: Callable[[], Sequence[int]] | None = None,
    split: bool = False,
) -> Call:
    """The `Call` of checked arguments. Args and errors as `plan_call`.

    Args:
        entropy: of scores alone, whether H_o is asked for, with its gradient; an objective says so itself.
        group_size: K, or None.
    """
    entropy, entropy_grad = (entropy, entropy) if spec is None else (spec.entropy, spec.entropy_grad)
    tolerance = check_tolerance(how.grad_tolerance, how.sort_vocab, entropy_grad, head.weight.dtype)
    if tolerance is not None and head.shard is not None:
        raise ValueError(
            "grad_tolerance: expected None with a sharded head, of which no rank knows all masses; "
            f"got {how.grad_tolerance!r}"
        )
    options = {} if options is None else options

    def planned(workspace: int) -> tuple[Plan, Sizes, Chunks]:
        made, shape = plan_call(
            hidden, head, how._replace(workspace=workspace), spec=spec, options=options, reduction=reduction,
            entropy_grad=entropy_grad, unit_tokens=unit_tokens, split=split,
        )  # fmt: skip
        return made, shape, chunks(shape, workspace, made.path)

    try:
        made, shape, held = planned(how.workspace)
    except TooSmall as error:
        raise _named_rightly(error, how.workspace, planned) from None
    single, skip = made.path == "single", tolerance is not None and made.path != "forward"
    grad, bias, weight = torch.is_grad_enabled(), head.bias, head.weight
    parts = weight if isinstance(weight, HeadWeight) else HeadWeight(weight)
    how_stored = parts.quantised
    operands = {2: NAMES[compute_dtype(hidden)], 4: "float32", 8: "float64"}[shape.gemm]
    return Call(
        impl=made.impl,
        path=made.path,
        chunks=held,
        workspace=how.workspace,
        operands=operands,
        ignore_index=ignore_index,
        softcap=head.softcap,
        scale=head.scale,
        entropy=entropy,
        accumulate=not single and grad and hidden.requires_grad and not entropy_grad,
        tolerance=tolerance if skip else None,
        tile=mass_tile(devices.kind(hidden.device)) if skip else 0,
        by_row=how.by_row,
        kept=how.kept,
        sort_vocab=how.sort_vocab and skip,
        objective=spec.name if single and spec is not None else "",
        options=tuple((name, options[name]) for name in sorted(options)) if single else (),
        mean=reduction == "mean",
        group_size=group_size or 0,
        validate=how.validate,
        needs=(hidden.requires_grad, parts.base.requires_grad, bias is not None and bias.requires_grad),
        needs_more=parts.more is not None and parts.more.requires_grad,
        stored=() if how_stored is None else how_stored.named,
    )


# -- tensors ----------------------------------------------------------------------------------------------------------


def check_inputs(hidden: Tensor, head: Tensor | LMHead, target: Tensor, temperature: float = 1.0) -> LMHead:
    """What can be refused of the tensors from shapes, dtypes and devices alone; and the head at the temperature."""
    head = as_head(head)
    weight, bias = head.weight, head.bias
    for name, given in (("hidden", hidden), ("head.weight", weight), ("target", target)):
        if not isinstance(given, Tensor) and not (given is weight and isinstance(weight, HeadWeight)):
            raise ValueError(f"{name}: expected a tensor, got {type(given).__name__}")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden: expected dtype float64, float32, bfloat16 or float16, got {hidden.dtype}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"head.weight: expected shape [V, H] with V, H ≥ 1, got {list(weight.shape)}")
    more = weight.more if isinstance(weight, HeadWeight) else None
    if more is not None and (more.ndim != 2 or len(more) != len(weight.base) or more.dtype != weight.dtype):
        raise ValueError(
            f"head.weight.more: expected shape [V={len(weight.base)}, r] and dtype {weight.dtype}, "
            f"got {list(more.shape)} {more.dtype}"
        )
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden: expected shape [..., H={weight.shape[1]}] to match head.weight, got {list(hidden.shape)}"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target: expected shape {list(hidden.shape[:-1])} (hidden's without H), got {list(target.shape)}"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"target: expected dtype int64, got {target.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"head.bias: expected shape [V={weight.shape[0]}] and dtype {weight.dtype}, "
            f"got {list(bias.shape)} {bias.dtype}"
        )
    if weight.dtype != hidden.dtype and (
        not torch.is_autocast_enabled(hidden.device.type) or torch.float64 in (weight.dtype, hidden.dtype)
    ):
        raise ValueError(
            f"head.weight: expected the dtype of hidden, {hidden.dtype} (they may differ under autocast), "
            f"got {weight.dtype}"
        )
    for name, tensor in (("head.weight", weight), ("target", target), ("head.bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device} as hidden, got {tensor.device}")
    parts = {"head.weight": weight} if isinstance(weight, Tensor) else {"head.weight.base": weight.base}
    _check_transforms({"hidden": hidden, **parts, "head.weight.more": more, "head.bias": bias, "target": target})
    softcap, scale = head.softcap, head.scale
    if softcap is not None and not (_is_number(softcap) and 1e-30 < softcap < 1e30):
        raise ValueError(f"head.softcap: expected a positive number (1e-30 to 1e30) or None, got {softcap}")
    if not _is_number(scale) or not abs(scale) < 1e30:
        raise ValueError(f"head.scale: expected a finite number, got {scale}")
    _check_shard(head.shard, weight.shape[0])
    return _at_temperature(
        head._replace(softcap=None if softcap is None else float(softcap), scale=float(scale)), temperature
    )


def _at_temperature(head: LMHead, temperature: float) -> LMHead:
    """The head whose logits are z / T: c · tanh(s / c) / T = c' · tanh(s' / c') with c' = c / T and s' = s / T."""
    if not _is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive finite number, got {temperature!r}")
    scale, softcap = head.scale / temperature, None if head.softcap is None else head.softcap / temperature
    if not abs(scale) < 1e30 or not (softcap is None or 1e-30 < softcap < 1e30):
        raise ValueError(
            "temperature: expected one that leaves the head's scale below 1e30 and its soft-cap from 1e-30 to 1e30, "
            f"got {temperature!r} with scale={head.scale} and softcap={head.softcap}"
        )
    return head._replace(softcap=softcap, scale=scale)


def _in_transform(x: Tensor) -> bool:
    forward = forward_ad._current_level >= 0
    if torch.compiler.is_compiling():  # a trace shows no tangents
        return forward
    functorch: Any = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) or (forward and forward_ad.unpack_dual(x).tangent is not None)


def _check_transforms(tensors: dict[str, Tensor | None]) -> None:
    """Refuse tangents, which the operators would drop, and `torch.func`, for whose transforms they have no rule."""
    functorch: Any = torch._C._functorch
    if not torch.compiler.is_compiling() and forward_ad._current_level < 0 and not functorch.maybe_current_level():
        return
    for name, x in tensors.items():
        if x is not None and _in_transform(x):
            raise ValueError(
                f"{name}: expected a tensor without tangent, outside the transforms of torch.func (jvp, jacfwd, grad, "
                "vmap, …), got one inside; use backward() or torch.autograd.grad, or rgpb.reference, the dense form, "
                "which serves them all"
            )


def _check_shard(shard: VocabShard | None, rows: int) -> None:
    """Refuse a shard that isn't one, or that the rows of the weight don't fit."""
    if shard is None:
        return
    if not isinstance(shard, VocabShard):
        raise ValueError(f"head.shard: expected a VocabShard or None, got {type(shard).__name__}")
    check_group("head.shard.group", shard.group)
    if not 0 <= shard.start <= shard.vocab - rows:
        raise ValueError(
            f"head.shard: expected {rows} rows of head.weight within the {shard.vocab} of the whole head, "
            f"got the first at {shard.start}"
        )


def _is_number(x: object) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def tokens_of_units(
    spec: Objective, layout: Layout, group_size: int | None, checks: Checks
) -> Callable[[], list[int]] | None:
    """What gives the tokens of each pair or group; None where the objective couples something else, where tensors have
    no values yet, or where nothing is read. They are read with the checks, or, without any, when they are first asked
    for."""
    count = layout.tokens
    unknown = torch.compiler.is_compiling() or is_traced(count) or not checks.validate
    if spec.couples not in ("pair", "group") or unknown:
        checks.read()
        return None
    members = count.view(2, -1) if spec.unit == "pair" else count.view(-1, group_size or 1).t()
    found = checks.read(members.sum(0))
    return cache(lambda: members.sum(0).tolist() if found is None else found)


def check_ranks(data_group: ProcessGroup | None, sequence_group: ProcessGroup | None) -> None:
    """Refuse groups that this rank doesn't belong to."""
    for name, group in (("data_group", data_group), ("sequence_group", sequence_group)):
        if group is not None:
            check_group(name, group)


def make_layout(
    target: Tensor, cu_seqlens: Tensor | None, ignore_index: int, sequence_group: ProcessGroup | None = None,
    empty: bool = False, validate: bool = True,
) -> Layout:  # fmt: skip
    """The grouping of a padded [B, T] or packed [N] target.

    Args:
        empty: packed, B may be 0 as it may be padded.
        validate: read `cu_seqlens` to check them.
    """
    layout = _own_layout(target, cu_seqlens, ignore_index, 1 if empty else 2, validate)
    return layout._replace(tokens=all_sum(layout.tokens, sequence_group), group=sequence_group)


def _own_layout(
    target: Tensor, cu_seqlens: Tensor | None, ignore_index: int, least: int, validate: bool
) -> Layout:  # fmt: skip
    """That of this rank's tokens alone."""
    mask = target != ignore_index
    if cu_seqlens is None:
        if target.ndim != 2:
            raise ValueError(f"target: expected shape [B, T], or [N] with cu_seqlens, got {list(target.shape)}")
        return Layout(target.shape[0], None, mask.sum(1), mask.reshape(-1))
    if target.ndim != 1:
        raise ValueError(f"target: expected packed shape [N] together with cu_seqlens, got {list(target.shape)}")
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < least or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: expected int32 or int64 of shape [B+1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != target.device:
        raise ValueError(f"cu_seqlens: expected device {target.device} as target, got {cu_seqlens.device}")
    lengths = cu_seqlens.long().diff()
    positions = None if torch.compiler.is_compiling() else len(target)
    if positions is not None and validate:
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != positions or any(before > after for before, after in pairwise(ends)):
            raise ValueError(
                f"cu_seqlens: expected not decreasing from 0 to N={positions}, got {ends[:8]} … {ends[-1]}"
            )
    return Layout(len(cu_seqlens) - 1, lengths, tokens_of_each(mask, lengths, positions), mask, positions=positions)


def check_units(spec: Objective, layout: Layout, reduction: str) -> None:
    """Refuse responses that make no whole pairs, and an unknown reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if spec.unit == "pair" and layout.responses % 2:
        raise ValueError(
            f"target: expected an even number of responses, stacked [chosen; rejected], for {spec.name}, "
            f"got {layout.responses}"
        )


class Checks:
    """What the door can only refuse by reading tensors, read at once: on a GPU each read waits for all before it.

    validate: False where nothing is read, and so nothing refused.
    """

    def __init__(self, validate: bool = True) -> None:
        self.validate = validate
        self._wrong: list[Tensor] = []
        self._refuse: list[Callable[[], None]] = []

    def add(self, wrong: Tensor, refuse: Callable[[], None]) -> None:
        """Where any of `wrong`, bool, holds, `refuse` is called. Nothing is looked at while a compiler traces."""
        if self.validate and not torch.compiler.is_compiling():
            self._wrong.append(wrong)
            self._refuse.append(refuse)

    def read(self, more: Tensor | None = None) -> list[int] | None:
        """Refuse what is wrong, in the order in which it was added.

        Args:
            more: int64 [n], read along with the checks.

        Returns:
            The values of `more`; None where there was nothing to read beside.

        Raises:
            ValueError: of the first check that fails.
        """
        wrong, refuse, self._wrong, self._refuse = self._wrong, self._refuse, [], []
        if not wrong:
            return None
        some = (wrong[0] if len(wrong) == 1 else torch.cat([x.reshape(-1) for x in wrong])).any().view(1)
        failed, *found = (some if more is None else torch.cat([some.long(), more])).tolist()
        for which, refused in zip(wrong, refuse) if failed else ():
            if bool(which.any()):
                refused()
        return None if more is None else found


def check_label(
    spec: Objective, label: Tensor | None, responses: int, hidden: Tensor, checks: Checks
) -> Tensor | None:  # fmt: skip
    """The label as float64 ±1 [B]."""
    if label is None:
        if spec.label:
            raise ValueError(f"label: expected [B={responses}] bool or ±1 for {spec.name}, got None")
        return None
    if not isinstance(label, Tensor):
        raise ValueError(f"label: expected a tensor, got {type(label).__name__}")
    if not spec.label and is_registered(spec):
        beside = ", which takes the chosen for +1 and the rejected for −1 by itself" if spec.parts else ""
        raise ValueError(f"label: expected None, since {spec.name} has no use for it{beside}, got {list(label.shape)}")
    if label.shape != (responses,):
        raise ValueError(f"label: expected shape [B={responses}], got {list(label.shape)}")
    if label.is_complex():
        raise ValueError(f"label: expected bool or values of ±1, got {label.dtype}")
    if label.device != hidden.device:
        raise ValueError(f"label: expected device {hidden.device} as hidden, got {label.device}")
    _check_transforms({"label": label})
    if label.dtype == torch.bool:
        return label.double().mul_(2).sub_(1)
    given = label

    def refuse() -> None:
        wrong = given[given.abs() != 1][:4].tolist()
        raise ValueError(f"label: expected bool or values of ±1, got {wrong}; for labels of 0 and 1 give label.bool()")

    checks.add(label.abs() != 1, refuse)
    return label.double()


def check_groups(
    spec: Objective, group_size: int | None, rewards: Tensor | None, layout: Layout, hidden: Tensor, checks: Checks
) -> tuple[int | None, Tensor | None]:
    """(K, rewards as float64 [B] with 0 for responses without tokens)."""
    if spec.unit != "group" and is_registered(spec):
        for name, given in (("group_size", group_size), ("rewards", rewards)):
            if given is not None:
                raise ValueError(f"{name}: expected None, since {spec.name} compares no groups, got {given!r}")
        return None, None
    if spec.rewards and rewards is None:
        raise ValueError(f"rewards: expected [G, K] numbers for {spec.name}, got None")
    if rewards is not None:
        if not isinstance(rewards, Tensor) or rewards.is_complex():
            got = rewards.dtype if isinstance(rewards, Tensor) else type(rewards).__name__
            raise ValueError(f"rewards: expected a tensor of real numbers, got {got}")
        if not spec.rewards and is_registered(spec):
            raise ValueError(
                f"rewards: expected None, since {spec.name} has no use for them, got {list(rewards.shape)}"
            )
        if rewards.ndim != 2 or rewards.numel() != layout.responses or group_size not in (None, rewards.shape[1]):
            of = f" in groups of {group_size}" if group_size else ""
            raise ValueError(
                f"rewards: expected shape [G, K] for {layout.responses} responses{of}, got {list(rewards.shape)}"
            )
        if rewards.device != hidden.device:
            raise ValueError(f"rewards: expected device {hidden.device} as hidden, got {rewards.device}")
        _check_transforms({"rewards": rewards})
        group_size = rewards.shape[1]
    if group_size is None:
        if spec.unit == "group":
            raise ValueError(f"group_size: expected the responses per group, 2 or more, for {spec.name}, got None")
        return None, None
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2:
        raise ValueError(f"group_size: expected a whole number, 2 or more, got {group_size!r}")
    if layout.responses % group_size:
        raise ValueError(f"target: expected groups of {group_size} responses, got {layout.responses} responses")
    if rewards is None:
        return group_size, None
    reward = torch.where(layout.tokens > 0, rewards.reshape(-1).double(), 0.0)

    def refuse() -> None:
        at = int((~reward.isfinite()).nonzero()[0])
        raise ValueError(f"rewards: expected finite numbers, got {reward[at].item()} for response {at}")

    checks.add(~reward.isfinite(), refuse)
    return group_size, reward


def reference_scores(
    spec: Objective, ref: Reference | None, hidden: Tensor, target: Tensor, layout: Layout,
    score: Callable[[Tensor, Tensor | LMHead, Tensor], TokenScores] | None, checks: Checks,
) -> tuple[TokenScores | None, Tensor | None]:  # fmt: skip
    """Per-token scores [P] of the reference, or where only sums came these, float64 [B].

    score: of `(ref_hidden, ref_head)` and the targets, where the reference comes that way; None where it can't.
    """
    if ref is None:
        if spec.ref is not None:
            raise ValueError(f"ref: expected the reference's scores for {spec.name}, got None")
        return None, None
    if spec.ref is None and is_registered(spec):
        raise ValueError(f"ref: expected None, since {spec.name} has no reference, got {type(ref).__name__}")
    if isinstance(ref, Tensor) and ref.shape == (layout.responses,) and ref.shape != target.shape:
        if spec.ref == "tokens":
            raise ValueError(
                f"ref: expected scores per token, {list(target.shape)}, for {spec.name}, "
                f"got one sum per response, {list(ref.shape)}"
            )
        _check_ref("ref", ref, ref.shape, hidden)
        there = layout.tokens > 0
        _check_logp("ref", ref, there, checks)
        return None, torch.where(there, _plain(ref).double(), 0.0)
    if isinstance(ref, Tensor | TokenScores):
        assert layout.mask is not None  # the door's layouts have one
        scores = check_scores("ref", ref, layout.mask.view(target.shape), hidden, checks)
    elif isinstance(ref, tuple) and len(ref) == 2 and score is not None:
        with torch.no_grad():
            scores = score(*ref, target)
    else:
        pair = "" if score is None else " or (ref_hidden, ref_head)"
        raise ValueError(f"ref: expected TokenScores, a tensor of log-probabilities{pair}, got {type(ref).__name__}")
    return TokenScores(*(_plain(x).reshape(-1) for x in (scores.logp, scores.log_odds, scores.lse))), None


def check_scores(
    name: str, given: TokenScores | Tensor, counts: Tensor, hidden: Tensor, checks: Checks
) -> TokenScores:  # fmt: skip
    """Scores of each token; of log-probabilities alone the log-odds are made from them.

    counts: which tokens have one, bool.
    """
    if isinstance(given, Tensor):
        _check_ref(name, given, counts.shape, hidden)
        _check_logp(name, given, counts, checks)
        logp = given.clamp(max=0)  # what rounding left above 0; `_check_logp` refuses more
        # log(1 − p) from log p, each branch where it is exact
        complement = torch.where(logp > -0.693, torch.log(-torch.expm1(logp)), torch.log1p(-torch.exp(logp)))
        return TokenScores(logp, logp - complement, torch.zeros_like(logp))
    for field in ("logp", "log_odds", "lse"):
        _check_ref(f"{name}.{field}", getattr(given, field), counts.shape, hidden)

    def look_again() -> None:  # 0 also stands for a position that was never scored
        scored = (given.logp != 0) | (given.log_odds != 0) | (given.lse != 0)
        again = Checks()
        _check_logp(f"{name}.logp", torch.where(scored, given.logp, torch.nan), counts, again)
        again.read()

    checks.add((given.logp < 0) < counts, look_again)
    return given


def _plain(x: Tensor) -> Tensor:
    """Detached; what was made under inference_mode as a copy that autograd may keep."""
    if not torch.compiler.is_compiling() and x.is_inference() and not torch.is_inference_mode_enabled():
        return x.clone()
    return x.detach()


def _check_logp(name: str, given: Tensor, mask: Tensor, checks: Checks) -> None:
    """Log-probabilities wherever the mask says; NaN stands for a position that was never scored."""
    wrong = (given <= 1e-3) < mask

    def refuse() -> None:
        at = int(wrong.reshape(-1).nonzero()[0])
        value = given.reshape(-1)[at].item()
        raise ValueError(
            f"{name}: expected a log-probability, at most 0, wherever target isn't ignored, "
            f"got {value:.4g} at flat position {at}"
        )

    checks.add(wrong, refuse)


def _check_ref(name: str, given: Tensor, shape: tuple[int, ...], hidden: Tensor) -> None:
    if not isinstance(given, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(given).__name__}")
    if given.shape != shape or not given.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point tensor of shape {list(shape)}, got {given.dtype} {list(given.shape)}"
        )
    if given.device != hidden.device:
        raise ValueError(f"{name}: expected device {hidden.device} as hidden, got {given.device}")
    _check_transforms({name: given})

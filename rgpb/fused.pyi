"""What `python tools/stub.py` makes of rgpb/fused.py and the registered objectives; not to be edited."""

# fmt: off
# ruff: noqa: I001
from collections.abc import Callable, Mapping
from typing import Any
import torch
from torch import Tensor, nn
from rgpb.engine.workspace import Workspace
from rgpb.head import LMHead
from rgpb.layout import TokenScores
from rgpb.validation import Reference as Reference
from typing import Literal, overload
from torch.distributed import ProcessGroup
from rgpb.objectives import RunningMean

HOW: tuple[str, ...]

@overload
def fused_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *,
    objective: str | Callable[..., Tensor] | Mapping[str, float], label: Tensor | None = None,
    ref: Reference | None = None, group_size: int | None = None, rewards: Tensor | None = None,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
    **options: Any
) -> Tensor: ...
@overload
def fused_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *,
    objective: str | Callable[..., Tensor] | Mapping[str, float], label: Tensor | None = None,
    ref: Reference | None = None, group_size: int | None = None, rewards: Tensor | None = None,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
    **options: Any
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def fused_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *,
    objective: str | Callable[..., Tensor] | Mapping[str, float], label: Tensor | None = None,
    ref: Reference | None = None, group_size: int | None = None, rewards: Tensor | None = None,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
    **options: Any
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

def coefficients(
    objective: str | Callable[..., Tensor] | Mapping[str, float], scores: TokenScores | Tensor, *,
    target: Tensor | None = None, label: Tensor | None = None, ref: TokenScores | Tensor | None = None,
    group_size: int | None = None, rewards: Tensor | None = None, cu_seqlens: Tensor | None = None,
    ignore_index: int = -100, reduction: str = "mean", return_metrics: bool = False, **options: Any
) -> Any: ...

class FusedLoss(nn.Module):
    name: Any
    objective: str | Callable[..., Tensor] | Mapping[str, float]
    options: dict[str, Any]
    running: Any
    def __init__(self, objective: str | Callable[..., Tensor] | Mapping[str, float], **options: Any) -> None: ...
    def forward(
        self, hidden: Tensor, head: Tensor | LMHead, target: Tensor, label: Tensor | None = None, **keywords: Any
    ) -> Any: ...
    def extra_repr(self) -> str: ...

@overload
def mle_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, length_normalize: bool = True,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def mle_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, length_normalize: bool = True,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def mle_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, length_normalize: bool = True,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def bnf_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, label: Tensor, *, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def bnf_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, label: Tensor, *, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def bnf_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, label: Tensor, *, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def bco_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, label: Tensor, *, beta: float = 0.1,
    delta: RunningMean | float | None = None, ref: Reference, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> Tensor: ...
@overload
def bco_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, label: Tensor, *, beta: float = 0.1,
    delta: RunningMean | float | None = None, ref: Reference, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def bco_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, label: Tensor, *, beta: float = 0.1,
    delta: RunningMean | float | None = None, ref: Reference, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: bool, impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def kto_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, label: Tensor, *, beta: float = 0.1,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0, z0: Tensor | RunningMean | float | None = None,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def kto_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, label: Tensor, *, beta: float = 0.1,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0, z0: Tensor | RunningMean | float | None = None,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def kto_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, label: Tensor, *, beta: float = 0.1,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0, z0: Tensor | RunningMean | float | None = None,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def nll_pll_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, length_normalize: bool = True,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def nll_pll_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, length_normalize: bool = True,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def nll_pll_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, length_normalize: bool = True,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def unlikelihood_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, alpha: float = 1.0, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> Tensor: ...
@overload
def unlikelihood_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, alpha: float = 1.0, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def unlikelihood_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, alpha: float = 1.0, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: bool, impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def exmate_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 1.0, length_normalize: bool = True,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def exmate_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 1.0, length_normalize: bool = True,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def exmate_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 1.0, length_normalize: bool = True,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def dpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def dpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def dpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def ipo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, tau: float = 0.1, length_normalize: bool = True,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def ipo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, tau: float = 0.1, length_normalize: bool = True,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def ipo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, tau: float = 0.1, length_normalize: bool = True,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def simpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 2.0, gamma: float = 0.5,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def simpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 2.0, gamma: float = 0.5,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def simpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 2.0, gamma: float = 0.5,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def sequence_unlikelihood_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, alpha: float = 1.0, length_normalize: bool = False,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def sequence_unlikelihood_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, alpha: float = 1.0, length_normalize: bool = False,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def sequence_unlikelihood_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, alpha: float = 1.0, length_normalize: bool = False,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def slic_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, delta: float = 1.0, lam: float = 0.0,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def slic_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, delta: float = 1.0, lam: float = 0.0,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def slic_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, delta: float = 1.0, lam: float = 0.0,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def cpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, gamma: float = 0.0,
    lam: float = 1.0, length_normalize: bool = False, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> Tensor: ...
@overload
def cpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, gamma: float = 0.0,
    lam: float = 1.0, length_normalize: bool = False, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def cpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, gamma: float = 0.0,
    lam: float = 1.0, length_normalize: bool = False, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: bool, impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def orpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, lam: float = 0.1, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> Tensor: ...
@overload
def orpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, lam: float = 0.1, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def orpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, lam: float = 0.1, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: bool, impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def rdpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, alpha: float = 0.01,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def rdpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, alpha: float = 0.01,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def rdpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, alpha: float = 0.01,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def rpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, lam: float = 1.0, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def rpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, lam: float = 1.0, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def rpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, lam: float = 1.0, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def exo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, epsilon: float = 0.001,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def exo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, epsilon: float = 0.001,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def exo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, epsilon: float = 0.001,
    ref: Reference, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def sppo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def sppo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def sppo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def nca_pair_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def nca_pair_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def nca_pair_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def apo_zero_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def apo_zero_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def apo_zero_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def apo_down_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def apo_down_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def apo_down_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def infonca_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, tau: float = 1.0,
    group_size: int | None = None, ref: Reference, rewards: Tensor, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> Tensor: ...
@overload
def infonca_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, tau: float = 1.0,
    group_size: int | None = None, ref: Reference, rewards: Tensor, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def infonca_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, tau: float = 1.0,
    group_size: int | None = None, ref: Reference, rewards: Tensor, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: bool, impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def nca_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, tau: float = 1.0,
    group_size: int | None = None, ref: Reference, rewards: Tensor, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> Tensor: ...
@overload
def nca_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, tau: float = 1.0,
    group_size: int | None = None, ref: Reference, rewards: Tensor, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def nca_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, tau: float = 1.0,
    group_size: int | None = None, ref: Reference, rewards: Tensor, cu_seqlens: Tensor | None = None,
    data_group: ProcessGroup | None = None, sequence_group: ProcessGroup | None = None, ignore_index: int = -100,
    temperature: float = 1.0, reduction: str = "mean", return_metrics: bool, impl: str = "auto",
    engine: str | None = None, path: str = "auto", grad_tolerance: float | str | None = None,
    tolerance_per: str = "response", sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None,
    validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def swepo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, alpha: float = 1.0, p: int = 2,
    mode: Literal["above_mean", "one_vs_all"] = "above_mean", group_size: int | None = None, ref: Reference,
    rewards: Tensor, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def swepo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, alpha: float = 1.0, p: int = 2,
    mode: Literal["above_mean", "one_vs_all"] = "above_mean", group_size: int | None = None, ref: Reference,
    rewards: Tensor, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def swepo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, alpha: float = 1.0, p: int = 2,
    mode: Literal["above_mean", "one_vs_all"] = "above_mean", group_size: int | None = None, ref: Reference,
    rewards: Tensor, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def rnce_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference, group_size: int,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def rnce_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference, group_size: int,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def rnce_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, ref: Reference, group_size: int,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def mc_po_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1,
    sampler: Literal["mc", "max", "min", "random"] = "mc", m: int = 1, generator: torch.Generator | None = None,
    ref: Reference, group_size: int, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def mc_po_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1,
    sampler: Literal["mc", "max", "min", "random"] = "mc", m: int = 1, generator: torch.Generator | None = None,
    ref: Reference, group_size: int, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def mc_po_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1,
    sampler: Literal["mc", "max", "min", "random"] = "mc", m: int = 1, generator: torch.Generator | None = None,
    ref: Reference, group_size: int, cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

@overload
def multi_dpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0,
    pairing: Literal["best", "all"] = "best", group_size: int | None = None, ref: Reference, rewards: Tensor,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[False] = False, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor: ...
@overload
def multi_dpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0,
    pairing: Literal["best", "all"] = "best", group_size: int | None = None, ref: Reference, rewards: Tensor,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: Literal[True], impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def multi_dpo_loss(
    hidden: Tensor, head: Tensor | LMHead, target: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0,
    pairing: Literal["best", "all"] = "best", group_size: int | None = None, ref: Reference, rewards: Tensor,
    cu_seqlens: Tensor | None = None, data_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None, ignore_index: int = -100, temperature: float = 1.0,
    reduction: str = "mean", return_metrics: bool, impl: str = "auto", engine: str | None = None,
    path: str = "auto", grad_tolerance: float | str | None = None, tolerance_per: str = "response",
    sort_vocab: bool | None = None, workspace: int | str | Workspace | None = None, validate: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

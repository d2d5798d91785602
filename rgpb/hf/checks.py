"""What a model must pass once: its head is what `LMHead` holds, and packed responses stay apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from rgpb.head import LMHead, declared_scaling, described
from rgpb.hf.attach import Attached, HeadForward, Results, Step, head_forward, run, through
from rgpb.hf.batches import IGNORE, check_bounds, restarting_positions
from rgpb.hf.heads import state, view
from rgpb.hf.sharded import whole_output
from rgpb.hf.wrappers import parts, sharded_by
from rgpb.parallel import VocabShard

_LOUD = 50.0  # the size that logits are raised to, so that any soft-cap in use bends them visibly

# Keys of a batch that say nothing of who sees what, where attention is causal
_TOKENS = {"input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k"}
_TOKENS |= {"max_length_q", "max_length_k", "labels", "output_router_logits"}

# Hooks and forwards from here move, gather or cast weights and leave what the head computes as it is.
_NEUTRAL = ("accelerate.", "deepspeed.", "torch.", "transformers.distributed.", "rgpb.")


class _Probe(Step):
    """Lets the head make its logits of an amplified input, and keeps what `LMHead` would make them of.

    Attributes:
        linear: W x + b of the amplified input; of the rank's own rows where the head has a `shard`.
        shard: of the head.
        eps: of the coarsest dtype that took part.
    """

    linear: Tensor
    shard: VocabShard | None
    eps: float

    def __init__(self, model: PreTrainedModel, gain: float):
        super().__init__(lambda head, x: Results())
        self.model, self.gain = model, gain

    def inside(self, head: nn.Module, x: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        x = x * self.gain
        held = view(head, self.model)
        self.results = Results()
        made = logits(x)
        held = view(head, self.model)  # a quantised layer's first forward may settle what it computes in
        x = held.inputs(x)
        if x.shape[-1] != held.weight.shape[1]:
            found = f"{x.shape[-1]} in its hidden states and {held.weight.shape[1]} in its head"
            raise ValueError(f"model: expected one hidden size in {described(self.model)}, got {found}")
        self.linear, self.shard = held.logits(x), held.shard
        self.eps = max(torch.finfo(dtype).eps for dtype in (x.dtype, held.weight.dtype, self.linear.dtype, made.dtype))
        return made


def check_head(model: PreTrainedModel, attached: Attached) -> tuple[float | None, float]:
    """Compare the model's own logits with those of its head as `LMHead` holds it, on three tokens.

    A multimodal family may ignore the soft-cap or scale of its text model's config, and some scale the head's input
    instead of the logits: what the logits show is taken. Compares twice, as things are and with the head's input scaled
    up until the logits reach 50, since a soft-cap leaves small logits nearly as they are. Runs without gradients, in
    evaluation mode, and puts every module's training flag back.

    Returns:
        Soft-cap and scale. Kept until something changes that they depend on.

    Raises:
        ValueError: no soft-cap and scale explain the logits; or it would have to run a model whose parameters are on
            several ranks.
    """
    held = head_forward(model)
    declared = declared_scaling(model)
    key = ("head", *_behaviour(model, held), declared)
    if key in attached.passed:
        return attached.passed[key]
    name = described(model)
    if (how := sharded_by(model)) is not None:
        loaded = "; load it before there is a configuration of ZeRO-3, or transformers loads it in parts"
        raise ValueError(
            f"model: expected {name} attached before it is wrapped in {how}, or unchanged since, got neither; its head "
            f"can't be checked now: call rgpb.hf.attach(model) first, then wrap{loaded * (how == 'ZeRO-3')}"
        )
    candidates = dict.fromkeys((cap, scale) for cap in (declared[0], None) for scale in (declared[1], 1.0))
    inputs = {"input_ids": probe_ids(model, 3)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    gain = 1.0
    with evaluating(model):
        for _ in range(2):
            probe = _Probe(model, gain)
            own = whole_output(_probed(model, probe, inputs)["logits"])
            if probe.shard is not None and own.shape[-1] == probe.shard.vocab:
                own = own[..., probe.shard.start :][..., : probe.linear.shape[-1]]
            if own.shape != probe.linear.shape:
                raise ValueError(
                    f"model: expected logits {tuple(probe.linear.shape)} of {name}, got {tuple(own.shape)}"
                )
            off = {}
            for cap, scale in candidates:
                off[cap, scale] = (own.double() - _shaped(probe.linear.double(), cap, scale)).abs().max().item()
            size = (probe.linear.double() * declared[1]).abs().max().item()
            fits = {c: None for c in candidates if off[c] <= 16 * probe.eps * max(size, 1.0)}
            if not fits:
                cap, scale = min(off, key=lambda c: off[c] if off[c] == off[c] else torch.inf)
                raise ValueError(
                    f"model: {name} does more to its hidden states or logits than LMHead holds: its logits differ by "
                    f"up to {off[cap, scale]:.3g} from those of its hidden states and head, at best "
                    f"(softcap {cap}, scale {scale:.6g}, logits up to {size:.3g})"
                )
            candidates = fits
            gain = max(1.0, _LOUD / max(size, 1e-3))
    attached.passed[key] = next(iter(candidates))
    return attached.passed[key]


def _probed(model: PreTrainedModel, probe: _Probe, inputs: dict[str, Tensor]) -> Any:
    """A forward of a few tokens and nothing else. What needs more is refused, in the model's own words."""
    try:
        return through(model, probe, partial(model._call_impl, **inputs, use_cache=False))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        if at is not None and str(at.tb_frame.f_globals.get("__name__")).startswith("rgpb."):
            raise
        raise ValueError(
            f"model: expected one that runs on {' and '.join(inputs)} alone, which its check gives it, got "
            f"{described(model)}, whose forward raises {type(error).__name__}: {error}"
        ) from error


def _behaviour(model: PreTrainedModel, held: HeadForward) -> tuple[Any, ...]:
    """What the head's logits depend on beside its weights, as something that compares."""
    head = held.head
    own = [type(model).forward, type(head).forward, getattr(held.forward, "__func__", held.forward)]
    hooks = [*head._forward_pre_hooks.values(), *head._forward_hooks.values()]
    if sharded_by(model) is None:  # where it is, a hook that only looks mustn't end the training
        hooks += model._forward_hooks.values()
    acting = [f for f in (*own[2:], *hooks) if not str(getattr(f, "__module__", "")).startswith(_NEUTRAL)]
    return (*own[:2], tuple(acting), state(head))


def _shaped(z: Tensor, cap: float | None, scale: float) -> Tensor:
    z = z * scale
    return z if cap is None else torch.tanh(z / cap) * cap


def head_inside(
    model: PreTrainedModel, head: nn.Module, x: Tensor, scaling: tuple[float | None, float]
) -> tuple[Tensor, LMHead]:
    """What the head multiplies its input x with, and the head as it is at the moment, within its module's forward.

    scaling: as `check_head` found it.
    """
    held = view(head, model)
    bias = held.bias if held.bias is None or held.bias.dtype == held.weight.dtype else held.bias.to(held.weight.dtype)
    return held.inputs(x), LMHead(held.weight, bias, *scaling, held.shard)


def check_packed(model: PreTrainedModel, inputs: dict[str, Any], cu_seqlens: Tensor, attached: Attached) -> None:
    """Fill in `position_ids`; refuse whatever would let one packed response see another."""
    name = described(model)
    if model.config.is_encoder_decoder:
        raise ValueError(f"cu_seqlens: expected a causal LM, since no other can be packed, got {name}")
    if inputs.get("attention_mask") is not None:
        raise ValueError(
            "attention_mask: expected none in a packed batch, since transformers tells responses apart "
            f"only where there is no mask; got shape {tuple(inputs['attention_mask'].shape)}"
        )
    check_bounds(cu_seqlens, inputs["input_ids"])
    restarting = restarting_positions(cu_seqlens)
    given = inputs.setdefault("position_ids", restarting)
    if not torch.equal(given, restarting.to(given)):
        expected = "[1, N], restarting from 0 where cu_seqlens says"
        raise ValueError(f"position_ids: expected {expected}, got {given.tolist()}")
    key = packing_of(model)
    if key not in attached.passed and (how := sharded_by(model)) is not None:
        raise ValueError(
            f"cu_seqlens: expected {name} attached before it is wrapped in {how}, since it can't be tried now whether "
            "it keeps packed responses apart; call rgpb.hf.attach(model) first, then wrap"
        )
    if (longest := _longest_row(model)) is not None and int(cu_seqlens[-1]) > longest:
        raise ValueError(
            f"cu_seqlens: expected rows of at most {longest} tokens, since {name} attends within chunks of the packed "
            f"row, not of each response, got {int(cu_seqlens[-1])}"
        )
    if (wrong := try_packing(model, attached)) is not None:
        raise ValueError(f"cu_seqlens: {wrong}")


def _longest_row(model: PreTrainedModel) -> int | None:
    """Up to how many tokens a row is packed where what attention does depends on places in the row (Llama 4)."""
    config = model.config.get_text_config()
    if "chunked_attention" not in (getattr(config, "layer_types", None) or ()):
        return None
    limits = [config.attention_chunk_size]
    if getattr(config, "attn_temperature_tuning", False):
        limits.append(config.floor_scale - 1)
    return min(limits)


def check_shift(model: PreTrainedModel, attached: Attached, shift: Callable[[Tensor], Tensor]) -> None:
    """Compare what a model makes of labels, which its forward shifts itself, with what it makes of `shift`'s result.

    Raises:
        ValueError: the two differ.
    """
    key, name = ("shift", type(model).forward), described(model)
    if key in attached.passed:
        return
    if (how := sharded_by(model)) is not None:
        raise ValueError(
            f"decoder_input_ids: expected {name} attached before it is wrapped in {how}, since it can't be tried now "
            "how it shifts labels; call rgpb.hf.attach(model) first, then wrap"
        )
    ids = probe_ids(model, 4)
    labels = ids.flip(1)
    labels[:, -1] = IGNORE
    with evaluating(model):
        own, ours = (
            whole_output(model._call_impl(input_ids=ids, use_cache=False, **given)["logits"])[:, :-1]
            for given in ({"labels": labels.clone()}, {"decoder_input_ids": shift(labels.clone())})
        )
    if not (own - ours).abs().max().item() <= 32 * torch.finfo(own.dtype).eps * own.abs().max().item():
        raise ValueError(
            f"decoder_input_ids: expected them for {name}, which shifts labels in a way of its own; got labels alone"
        )
    attached.passed[key] = None


def check_left_padded(model: PreTrainedModel, inputs: dict[str, Any], attached: Attached) -> None:
    """Refuse padding on the left, without position ids, where the model would count it as positions."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or inputs.get("position_ids") is not None:
        return
    if model.config.is_encoder_decoder or torch.compiler.is_compiling() or bool((mask[:, 0] != 0).all()):
        return
    if not try_left_padding(model, attached):
        raise ValueError(
            f"attention_mask: expected padding on the right, or position_ids, since {described(model)} counts padding "
            "on the left as positions; got rows that begin with 0"
        )


def try_left_padding(model: PreTrainedModel, attached: Attached) -> bool:
    """Whether padding on the left changes nothing; tried once for each kind of attention."""
    key = ("left", model.config._attn_implementation)
    if key not in attached.passed:
        ids = probe_ids(model, 5)
        mask = (torch.arange(5, device=ids.device) >= 2)[None].long()
        with evaluating(model):
            (alone, eps), (behind, _) = (
                rounded(model, attached, {"input_ids": ids[:, cut:], "attention_mask": mask[:, cut:]}) for cut in (2, 0)
            )
        alone, behind = alone[:, -3:], behind[:, -3:]
        size = alone.abs().max().item()
        attached.passed[key] = (alone - behind).abs().max().item() <= max(32 * eps, 1e-3) * size
    return attached.passed[key]


def check_ahead(model: PreTrainedModel, inputs: dict[str, Any], attached: Attached) -> None:
    """Refuse a decoder that looks ahead: its log-probs would be of tokens that it has seen.

    What else a batch holds beside tokens (token types, a permutation) may say who sees what, and isn't looked into.
    """
    if model.config.model_type == "paligemma" and transformers.__version__.startswith("4."):
        raise ValueError(
            f"transformers: expected 5 or later for {described(model)}, which before attends to later tokens where its "
            f"forward is given no labels, got {transformers.__version__}"
        )
    if model.config.is_encoder_decoder or torch.compiler.is_compiling() or not set(inputs) <= _TOKENS:
        return
    if _ahead(model) not in attached.passed and sharded_by(model) is not None:
        return
    if try_ahead(model, attached):
        raise ValueError(
            f"model: expected one that attends to earlier tokens alone, got {described(model)}, whose hidden states "
            "change with the token behind them; where that can be chosen, it is by is_decoder=True in its config, by "
            "another attn_implementation, or by token_type_ids in the batch"
        )


def _ahead(model: PreTrainedModel) -> tuple[Any, ...]:
    """What `try_ahead` keeps its finding by."""
    return "ahead", type(model).forward, model.config._attn_implementation


def try_ahead(model: PreTrainedModel, attached: Attached) -> bool:
    """Whether what comes later changes a hidden state; tried once for each kind of attention."""
    key = _ahead(model)
    if key not in attached.passed:
        ids = probe_ids(model, 4)
        with evaluating(model):
            (one, eps), (other, _) = (
                rounded(model, attached, {"input_ids": tokens})
                for tokens in (ids, torch.cat([ids[:, :-1], ids[:, :1]], dim=1))
            )
        moved, size = (one - other)[:, :-1].abs().max().item(), one.abs().max().item()
        attached.passed[key] = moved > max(16 * eps, 1e-4) * size
    return attached.passed[key]


def packing_of(model: PreTrainedModel) -> tuple[str, str]:
    """What `try_packing` keeps its finding by."""
    return "packing", model.config._attn_implementation


def try_packing(model: PreTrainedModel, attached: Attached) -> str | None:
    """What is wrong with this model's packed responses, or None; tried once for each kind of attention."""
    key = packing_of(model)
    if key not in attached.passed:
        attached.passed[key] = _tried_packing(model, attached)
    return attached.passed[key]


def _tried_packing(model: PreTrainedModel, attached: Attached) -> str | None:
    name, attention = described(model), model.config._attn_implementation
    tokens, other = probe_ids(model, 5), probe_ids(model, 5)
    positions = torch.tensor([[0, 1, 2, 0, 1]], device=tokens.device)
    other[:, :3] = tokens[:, :3].flip(1)
    with evaluating(model):
        found = [
            rounded(model, attached, {"input_ids": ids, "position_ids": positions[:, -ids.shape[1] :]})
            for ids in (tokens, other, tokens[:, 3:])
        ]
    packed, beside, alone = (x[:, -2:] for x, _ in found)
    eps, size = found[0][1], alone.abs().max().item()
    leak, shift = (packed - beside).abs().max().item(), (packed - alone).abs().max().item()
    # A masked neighbour adds exact zeros; a response by itself runs in other shapes, and rounds differently.
    if leak <= 8 * eps * size and shift <= max(32 * eps, 1e-3) * size:
        return None
    return (
        f"{name} with {attention} attention does not keep packed responses apart: hidden states of size {size:.3g} "
        f"move by {leak:.3g} with what stands before the response and are {shift:.3g} away from those of the response "
        "alone; give a padded batch instead"
    )


def head_input(model: PreTrainedModel, attached: Attached, inputs: dict[str, Any]) -> Tensor:
    """What the head's weight is multiplied with for these inputs, differentiable. [B, T, H]"""
    return rounded(model, attached, inputs)[0]


def rounded(model: PreTrainedModel, attached: Attached, inputs: dict[str, Any]) -> tuple[Tensor, float]:
    """`head_input`, and the machine epsilon of the model's products: under an autocast that the forward brings itself,
    as accelerate's does, another than that of the head's input."""
    eps = 0.0

    def inside(head: nn.Module, x: Tensor) -> Results:
        nonlocal eps
        kind = x.device.type
        eps = torch.finfo(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype).eps
        return Results(tensors=(view(head, model).inputs(x),))

    step = Step(inside)
    call = partial(model.__dict__["_rgpb_forwards"][-1], **inputs, use_cache=False)
    (hidden,) = run(model, step, call).tensors or ()
    return hidden, max(eps, torch.finfo(hidden.dtype).eps)


def check_offloaded(model: PreTrainedModel) -> None:
    """Refuse to train parameters that accelerate offloads: it moves copies in, and their gradients reach nothing."""
    held = [parameter for module in parts(model) for parameter in module._parameters.values() if parameter is not None]
    if torch.is_grad_enabled() and any(parameter.is_meta and parameter.requires_grad for parameter in held):
        away = [key for key, parameter in model.named_parameters() if parameter.is_meta and parameter.requires_grad]
        raise ValueError(
            f"model: expected what is trained of {described(model)} on a device, got {away[0]} and {len(away) - 1} "
            "others that accelerate offloads, where no gradient reaches them; freeze them (requires_grad_(False)), "
            "score under torch.no_grad(), or load the model without offloading"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def probe_ids(model: PreTrainedModel, count: int) -> Tensor:
    """A few different token ids, [1, count], that are none of the special ones."""
    config = model.config.get_text_config()
    given = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]  # eos may be several
    special = {token for own in given for token in (own if isinstance(own, list | tuple) else [own])}
    ids = [token for token in range(count + len(special)) if token not in special][:count]
    try:
        embedding: Any = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if not isinstance(weight := getattr(embedding, "weight", None), Tensor):
        raise ValueError(f"model: expected one embedding of tokens in {described(model)}, got {described(embedding)}")
    device = weight.device
    return torch.tensor([ids], device="cpu" if device.type == "meta" else device)  # meta: offloaded, moved by hooks

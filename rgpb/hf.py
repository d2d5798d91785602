"""transformers models: from a model and a batch to hidden states, head and aligned targets, without logits.

Dimensions: B responses, T positions of a padded batch, N of a packed one, H hidden size, V vocabulary.

A batch is what a transformers collator makes: a mapping with `input_ids`, `attention_mask` and `labels`, all
[B, T], the labels int64, −100 on prompt and padding and *not* shifted. Whatever else it holds goes to the
model by name (`position_ids`, `token_type_ids`, `decoder_input_ids`, ...).

A packed batch has no padding: `input_ids` [1, N], `labels` [1, N] and `cu_seqlens` [B + 1], the responses'
first positions and then N. `pack` makes one from a padded batch. transformers keeps packed responses apart by
the restarts in `position_ids` [1, N] (filled in where absent), where there is no attention mask and no cache.
With "sdpa" and "eager" attention it builds an [N, N] mask for that; flash attention needs none.

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> from rgpb import hf
>>> sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
>>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
>>> input_ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
>>> batch = {"input_ids": input_ids, "labels": input_ids.masked_fill(input_ids < 3, -100)}
>>> with torch.no_grad():
...     reference = hf.token_scores(model, batch)
>>> tuple(reference.logp.shape)
(2, 4)
>>> loss = hf.loss(model, batch, "dpo", ref=reference, beta=0.1)
>>> loss.backward()
>>> round(loss.item(), 4)
0.6931
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rgpb.engine.plan import DEFAULT_WORKSPACE
from rgpb.fused import Reference, check_groups, fused_loss, make_layout, reference_scores
from rgpb.head import LMHead
from rgpb.layout import Responses, TokenScores, repeat
from rgpb.logprob import linear_logprob
from rgpb.objectives import Objective, resolve
from rgpb.objectives.registry import check_options, drawn

IGNORE = -100
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# As configs call them: Gemma, RecurrentGemma, xLSTM; Cohere, Falcon-H1, Muse; Granite and MiniCPM-3, Inkling.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_TIED_SCALE = ("umt5", "switch_transformers", "udop")  # d_model^-½ where the embeddings are tied
_LOUD = 50.0  # the size `check_head` raises logits to, so that any soft-cap in use bends them visibly

# What a model has passed, so that each check runs once: "head", "packing" with its attention implementation.
_passed: WeakKeyDictionary[PreTrainedModel, set[str]] = WeakKeyDictionary()


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The backbone's last hidden states, differentiable: what the head of `read_head` turns into logits.

    Args:
        model: a transformers causal LM, an encoder–decoder with text input, or a PEFT model around one.
        input_ids: int64 [B, T]; of an encoder–decoder, what the encoder reads.
        attention_mask: [B, T], or whatever else the model takes, or None.
        kwargs: further inputs of the model. An encoder–decoder needs `decoder_input_ids`, or `labels`, which
            are then shifted right as the model itself does. Causal models ignore `labels`.

    Returns:
        [B, T, H] in the head's dtype (in the backbone's under autocast); for an encoder–decoder T is the
        decoder's.

    Raises:
        ValueError: a model of a kind that this module can't take apart, or no inputs for the decoder.
    """
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids: expected a tensor (a batch goes in as **batch), got {type(input_ids).__name__}")
    model = _unwrap(model)
    labels = kwargs.pop("labels", None)
    if model.config.is_encoder_decoder and kwargs.get("decoder_input_ids") is None:
        kwargs["decoder_input_ids"] = _shift_right(model, labels)
    backbone = _backbone(model)
    hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)[0]
    if torch.is_autocast_enabled(hidden.device.type):
        return hidden
    return hidden.to(read_head(model).weight.dtype)  # Mamba returns float32 for a head of 16 bits, and casts


def read_head(model: nn.Module) -> LMHead:
    """Weight, bias, soft-cap and scale of a transformers model's head; the same as `LMHead.from_model`.

    The weight is the model's parameter itself, so gradients reach it, tied or not. Soft-cap and scale come
    from the config, by the names that the families in transformers use. A family with a name of its own for
    them, or with a head that does something else besides, passes here and fails in `check_head`.

    Args:
        model: a transformers model with a plain linear LM head, or a PEFT model around one.

    Raises:
        ValueError: the head is missing, wrapped (LoRA), quantised, sharded or not on a real device.
    """
    model = _unwrap(model)
    linear, name = model.get_output_embeddings(), _name(model)
    # A subclass of Linear or of Parameter means an adapted, quantised or sharded head: its weight is not W.
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
        found, weight = f"{type(linear).__module__}.{_name(linear)}", getattr(linear, "weight", None)
        held = "" if weight is None else f" with a weight of type {type(weight).__name__}"
        raise ValueError(f"model: expected a plain nn.Linear as head of {name}, got {found}{held}")
    weight, bias = linear.weight, linear.bias
    if weight.dtype not in _FLOATS or weight.dim() != 2 or weight.is_meta:
        found = f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"model: expected a float weight [V, H] on a device as head of {name}, got {found}")
    final = getattr(model, "final_logits_bias", None)  # BART and its relatives: a buffer [1, V]
    if final is not None:
        final = final.to(weight).view(-1)
        bias = final if bias is None else bias + final
    config = model.config.get_text_config()
    caps = (getattr(config, attribute, None) for attribute in _SOFTCAPS)
    return LMHead(weight, bias, next((cap for cap in caps if cap is not None), None), _scale(config))


def check_head(model: nn.Module) -> None:
    """Compare the model's own logits with those of `hidden_states` and `read_head`, on three tokens.

    Catches a family whose head does more than this module knows of. Compares twice: as things are, and with
    the head's input scaled up until the logits reach 50, since a soft-cap leaves small logits nearly as they
    are. Runs in evaluation mode without gradients, and puts every module's training flag back. `token_scores`
    and `loss` call this once for each model.

    Args:
        model: as for `hidden_states`.

    Raises:
        ValueError: the two disagree by more than rounding. Names the family and the largest difference.
    """
    model = _unwrap(model)
    head, name = read_head(model), _name(model)
    inputs = {"input_ids": _probe(model, 3)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    gain = 1.0
    linear: nn.Linear = model.get_output_embeddings()
    amplify = linear.register_forward_pre_hook(lambda _, args: (args[0] * gain, *args[1:]))
    try:
        with evaluating(model):
            hidden = hidden_states(model, **inputs)
            if hidden.shape[-1] != head.weight.shape[1]:
                found = f"{hidden.shape[-1]} in its hidden states and {head.weight.shape[1]} in its head"
                raise ValueError(f"model: expected one hidden size in {name}, got {found}")
            size = _dense(hidden, head._replace(softcap=None)).abs().max().item()
            for gain in (1.0, max(1.0, _LOUD / max(size, 1e-3))):
                ours, own = _dense(hidden * gain, head), model(**inputs, use_cache=False).logits
                if own.shape != ours.shape:
                    found = f"{tuple(own.shape)}"
                    raise ValueError(f"model: expected logits {tuple(ours.shape)} of {name}, got {found}")
                difference = (own.double() - ours.double()).abs().max().item()
                eps = max(torch.finfo(tensor.dtype).eps for tensor in (hidden, head.weight, ours, own))
                if not difference <= 16 * eps * max(size * gain, 1.0):
                    raise ValueError(
                        f"model: {name} does more to its hidden states or logits than LMHead holds: its "
                        f"logits differ by up to {difference:.3g} from those of its hidden states and head "
                        f"(softcap {head.softcap}, scale {head.scale:.6g}, logits up to {size * gain:.3g})"
                    )
    finally:
        amplify.remove()
    _passed.setdefault(model, set()).add("head")


def aligned_targets(labels: Tensor, cu_seqlens: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Shift a causal LM's labels: target[:, t] = labels[:, t + 1] is what the hidden state at t predicts.

    The last position of every row, or of every response of a packed row, predicts nothing and gets
    `ignore_index`. An encoder–decoder's labels are aligned already: its decoder's inputs were shifted.

    Args:
        labels: int64 [B, T], or [1, N] when packed.
        cu_seqlens: int32 or int64 [B + 1], the packed responses' first positions and N, or None.
        ignore_index: the label of positions that don't count.

    Returns:
        int64 in the shape of `labels`.
    """
    if labels.dim() != 2:
        raise ValueError(f"labels: expected [B, T], or [1, N] when packed, got shape {tuple(labels.shape)}")
    target = torch.full_like(labels, ignore_index)
    target[:, :-1] = labels[:, 1:]
    if cu_seqlens is not None:
        _check_bounds(cu_seqlens, labels)
        target[:, cu_seqlens[1:].long() - 1] = ignore_index  # an empty response repeats the end before it
    return target


def pack(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A padded batch without its padding: the responses end to end in one row.

    Args:
        batch: with `input_ids` and `attention_mask`, both [B, T]. Padding may be on either side.

    Returns:
        Every [B, T] tensor of the batch as [1, N], except the mask, which is gone; `position_ids` [1, N] that
        restart at each response; `cu_seqlens` int32 [B + 1]. What has another shape stays as it is.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    fitting = isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.shape == mask.shape
    if ids is None or mask is None or not fitting or ids.dim() != 2:
        raise ValueError(f"batch: expected input_ids and attention_mask, both [B, T], got {_shapes(batch)}")
    kept = mask.bool()
    packed = {
        name: value[kept][None] if isinstance(value, Tensor) and value.shape == ids.shape else value
        for name, value in batch.items()
        if name != "attention_mask"
    }
    packed["cu_seqlens"] = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    packed["position_ids"] = _restarting(packed["cu_seqlens"])
    return packed


def token_scores(model: nn.Module, batch: Mapping[str, Any], *, entropy: bool = False, **options: Any) -> TokenScores:
    """`linear_logprob` of a batch's labels under a transformers model.

    Args:
        model: as for `hidden_states`. Its head is checked once (`check_head`), and so is, at the first packed
            batch, that the model keeps packed responses apart.
        batch: padded or packed, as at the top of this module.
        entropy: also compute the entropies.
        options: `impl`, `workspace` and whatever else `linear_logprob` takes.

    Returns:
        Scores in the shape of `labels` ([N] when packed), 0 where they don't count. A causal LM's stand one
        position before the label they belong to.

    Raises:
        ValueError: a batch that does not fit together, or a family that is not supported.
    """
    hidden, head, target, _ = _forward(_unwrap(model), batch)
    return linear_logprob(hidden, head, target, entropy=entropy, **options)


def loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    objective: str | Callable[[Responses], Tensor] | Mapping[str, float] = "bnf",
    *,
    label: Tensor | None = None,
    ref: Reference | nn.Module | None = None,
    group_size: int | None = None,
    rewards: Tensor | None = None,
    **options: Any,
) -> Any:
    """`fused_loss` of a batch under a transformers model.

    An objective that draws responses (mc_po) first scores all of them without gradient, in evaluation mode; only the
    drawn ones then pass through the model for the gradient.

    Args:
        model: as for `token_scores`.
        batch: padded or packed, as at the top of this module. Pairs are stacked `[chosen; rejected]`, the responses of
            a group are consecutive.
        objective: a name, a weighted sum, or a function of `Responses`.
        label: [B], bool or ±1, for the objectives that take one.
        ref: a reference model, run here in evaluation mode without gradients, or whatever `fused_loss` takes:
            best the `token_scores` of the same batch under the reference, computed once.
        group_size, rewards: K, and [G, K], for the objectives of groups.
        options: the objective's own, and those of `fused_loss` (`reduction`, `return_metrics`, `impl`, `engine`, …).

    Returns:
        What `fused_loss` returns: the loss, or (loss, metrics).

    Raises:
        ValueError: as for `token_scores` and `fused_loss`.
    """
    if isinstance(ref, nn.Module):
        teacher = _unwrap(ref, "ref")
        with evaluating(teacher):
            ref_hidden, ref_head, _, _ = _forward(teacher, batch)
        ref = (ref_hidden, ref_head)
    spec = resolve(objective)
    if spec.draw is not None:
        batch, ref, group_size, rewards = _drawn(_unwrap(model), batch, spec, ref, group_size, rewards, options)
    hidden, head, target, cu_seqlens = _forward(_unwrap(model), batch)
    inputs: dict[str, Any] = {"label": label, "ref": ref, "cu_seqlens": cu_seqlens}
    inputs.update(group_size=group_size, rewards=rewards)
    return fused_loss(hidden, head, target, objective=objective, **inputs, **options)


def _drawn(
    model: PreTrainedModel, batch: Mapping[str, Any], spec: Objective, ref: Any, group_size: int | None,
    rewards: Tensor | None, options: dict[str, Any],
) -> tuple[Mapping[str, Any], Tensor | TokenScores | None, int, Tensor | None]:  # fmt: skip
    """Batch, reference scores, group size and rewards of what `spec.draw` chooses; `options` lose their generator."""
    with evaluating(model):
        hidden, head, target, cu_seqlens = _forward(model, batch)
        how = {"impl": options.get("impl", "auto"), "workspace": options.get("workspace", DEFAULT_WORKSPACE)}
        layout = make_layout(target, cu_seqlens, IGNORE)
        size, reward = check_groups(spec, group_size, rewards, layout, hidden)
        ref_scores, ref_sums = reference_scores(spec, ref, hidden, target, layout, IGNORE, **how)
        scores = linear_logprob(hidden, head, target, **how).flat()
        own = check_options(spec, {name: x for name, x in options.items() if name in (spec.options or {})})
        keep = drawn(spec, Responses(scores, ref_scores, ref_sums, None, layout, size, reward), own)
    assert size is not None  # checked above
    most = max(2, int(keep.view(-1, size).sum(1).max()))
    # the drawn ones in their order, then, where a group has fewer, others that no longer count
    places = keep.view(-1, size).int().argsort(dim=1, descending=True, stable=True)[:, :most]
    rows = (places + torch.arange(len(places), device=keep.device)[:, None] * size).view(-1)
    options.pop("generator", None)
    if "m" in (spec.options or {}):
        options["m"] = most - 1
    chosen = _rows(batch, rows, len(keep), cu_seqlens)
    dropped = ~keep[rows]
    if bool(dropped.any()):
        at = dropped[:, None]
        if cu_seqlens is not None:
            at = repeat(dropped, cu_seqlens.long().diff()[rows], chosen["labels"].shape[1])[None]
        chosen["labels"] = chosen["labels"].masked_fill(at, IGNORE)
    kept_rewards = None if rewards is None else rewards.reshape(-1)[rows].view(-1, most)
    if ref_scores is None:
        return chosen, None if ref_sums is None else ref_sums[rows], most, kept_rewards
    flat = {n: getattr(ref_scores, n).view(target.shape) for n in ("logp", "log_odds", "lse")}
    picked = _rows(flat, rows, len(keep), cu_seqlens)
    return chosen, TokenScores(**picked), most, kept_rewards


def _rows(batch: Mapping[str, Any], rows: Tensor, count: int, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """Some of the `count` responses of a batch, in the order of `rows` [R]; what isn't a tensor of it stays."""
    if cu_seqlens is None:
        return {
            name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
            for name, value in batch.items()
        }
    lengths = cu_seqlens.long().diff()[rows]
    ends = lengths.cumsum(0)
    places = torch.arange(int(ends[-1]), device=rows.device)
    places = places - repeat(ends - lengths - cu_seqlens.long()[rows], lengths, len(places))
    tokens = int(cu_seqlens[-1])
    out = {
        name: value[..., places] if isinstance(value, Tensor) and value.ndim and value.shape[-1] == tokens else value
        for name, value in batch.items()
    }
    for name in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"):
        if name in out:
            out[name] = nn.functional.pad(ends, (1, 0)).to(cu_seqlens.dtype)
    return out


def _forward(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[Tensor, LMHead, Tensor, Tensor | None]:
    """Hidden states [B, T, H], head, targets [B, T], None; when packed [N, H], head, [N], cu_seqlens."""
    inputs = dict(batch)
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    cu_seqlens = inputs.pop("cu_seqlens", inputs.get("cu_seq_lens_q"))  # latter: DataCollatorWithFlattening's
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.dim() != 2:
        raise ValueError(f"batch: expected input_ids [B, T] and labels [B, T], got {_shapes(batch)}")
    if "head" not in _passed.setdefault(model, set()):
        check_head(model)
    if cu_seqlens is not None:
        _check_packed(model, inputs, cu_seqlens)
    hidden = hidden_states(model, **inputs)
    target = labels if model.config.is_encoder_decoder else aligned_targets(labels, cu_seqlens)
    if target.shape != hidden.shape[:-1]:
        expected, found = tuple(hidden.shape[:-1]), tuple(labels.shape)
        raise ValueError(f"labels: expected {expected}, the shape of the hidden states, got {found}")
    if cu_seqlens is not None:
        hidden, target = hidden[0], target[0]
    return hidden, read_head(model), target, cu_seqlens


def _check_packed(model: PreTrainedModel, inputs: dict[str, Any], cu_seqlens: Tensor) -> None:
    """Fill in `position_ids`; refuse whatever would let one packed response see another."""
    name, attention = _name(model), model.config._attn_implementation
    if model.config.is_encoder_decoder:
        raise ValueError(f"cu_seqlens: expected a causal LM, since no other can be packed, got {name}")
    if inputs.get("attention_mask") is not None:
        raise ValueError(
            "attention_mask: expected none in a packed batch, since transformers tells responses apart "
            f"only where there is no mask; got shape {tuple(inputs['attention_mask'].shape)}"
        )
    _check_bounds(cu_seqlens, inputs["input_ids"])
    restarting = _restarting(cu_seqlens)
    given = inputs.setdefault("position_ids", restarting)
    if not torch.equal(given, restarting.to(given)):
        expected = "[1, N], restarting from 0 where cu_seqlens says"
        raise ValueError(f"position_ids: expected {expected}, got {given.tolist()}")

    probe = f"packing, {attention}"
    if probe in _passed[model]:
        return
    if "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        raise ValueError(f"cu_seqlens: {name} attends within chunks of the packed row, not of each response")
    positions = torch.tensor([[0, 1, 2, 0, 1]], device=cu_seqlens.device)
    tokens, other = _probe(model, 5), _probe(model, 5)
    other[:, :3] = tokens[:, :3].flip(1)
    with evaluating(model):
        packed, beside, alone = (
            hidden_states(model, ids, position_ids=positions[:, -ids.shape[1] :])[:, -2:]
            for ids in (tokens, other, tokens[:, 3:])
        )
    eps, size = torch.finfo(alone.dtype).eps, alone.abs().max().item()
    leak, shift = (packed - beside).abs().max().item(), (packed - alone).abs().max().item()
    # A masked neighbour adds exact zeros; a response by itself runs in other shapes, and rounds differently.
    if not (leak <= 8 * eps * size and shift <= max(32 * eps, 1e-3) * size):
        raise ValueError(
            f"cu_seqlens: {name} with {attention} attention does not keep packed responses apart: hidden "
            f"states of size {size:.3g} move by {leak:.3g} with what stands before the response and are "
            f"{shift:.3g} away from those of the response alone; give a padded batch instead"
        )
    _passed[model].add(probe)


def _backbone(model: PreTrainedModel) -> Callable[..., Any]:
    """What maps a model's inputs to its last hidden states, first of its outputs."""
    backbone = model.base_model
    if backbone is model:  # where the prefix names a part of some enclosing model (Llama-4's text model)
        backbone = getattr(model, "model", model)
    if backbone is not model and not _makes_logits(backbone):
        return backbone
    encoder, decoder = getattr(model, "encoder", None), getattr(model, "decoder", None)
    if not model.config.is_encoder_decoder or encoder is None or decoder is None or _makes_logits(decoder):
        raise ValueError(f"model: expected a backbone that ends in hidden states, got none in {_name(model)}")

    def stacks(input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool, **kwargs: Any) -> Any:
        """T5 and its relatives have no backbone around their two stacks."""
        names = [name for name in kwargs if name.startswith("decoder_")]
        of_decoder = {name.removeprefix("decoder_"): kwargs.pop(name) for name in names}
        encoded = encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
        return decoder(
            **of_decoder,
            encoder_hidden_states=encoded,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )

    return stacks


def _makes_logits(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None


def _shift_right(model: PreTrainedModel, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError(f"decoder_input_ids: expected them, or labels, for {_name(model)}, got neither")
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise ValueError(f"decoder_input_ids: expected them for {_name(model)}, which can't shift labels")
    return shift(labels=labels)


def _scale(config: Any) -> float:
    """What multiplies x or W x. Before or after makes no difference: where it is x, the head has no bias."""
    family = config.model_type
    if getattr(config, "scale_decoder_outputs", family in _TIED_SCALE and config.tie_word_embeddings):
        return config.d_model**-0.5
    scale = 1.0
    for name in _MULTIPLIERS + _DIVISORS:
        factor = getattr(config, name, None)
        if factor is not None and family != "mpt":  # whose `logit_scale` is in the config and nowhere else
            scale *= 1 / factor if name in _DIVISORS and family != "hyperclovax" else factor
    return scale


def _dense(hidden: Tensor, head: LMHead) -> Tensor:
    """The logits themselves, for the few tokens of a check."""
    logits = nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def _probe(model: PreTrainedModel, count: int) -> Tensor:
    """A few different token ids, [1, count], that are none of the special ones."""
    config = model.config.get_text_config()
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    ids = [token for token in range(count + len(special)) if token not in special][:count]
    embedding: Any = model.get_input_embeddings()
    return torch.tensor([ids], device=embedding.weight.device)


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


def _check_bounds(cu_seqlens: Tensor, row: Tensor) -> None:
    """Refuse bounds that don't cut the row [1, N] into responses."""
    ints = (torch.int32, torch.int64)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in ints or row.dim() != 2 or row.shape[0] != 1:
        found = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)} beside {tuple(row.shape)}"
        raise ValueError(f"cu_seqlens: expected int32 or int64 [B + 1] beside labels [1, N], got {found}")
    bounds, total = cu_seqlens.tolist(), row.shape[1]
    if not total or bounds[:1] != [0] or bounds[-1] != total or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens: expected to rise from 0 to N = {total}, got {bounds}")


def _restarting(cu_seqlens: Tensor) -> Tensor:
    """Positions within each packed response, int64 [1, N]."""
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long())
    return (torch.arange(len(starts), device=starts.device) - starts)[None]


def _unwrap(model: nn.Module, argument: str = "model") -> PreTrainedModel:
    """The transformers model itself. PEFT's adapters live inside its modules, save for prompt learning."""
    wrapper: Any = model
    inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(f"{argument}: expected adapters inside the model, got PEFT's prompt learning")
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{argument}: expected a bare transformers PreTrainedModel, got {_name(inner)} "
            "(compile the training step or the backbone, not the model; take it out of DDP or FSDP)"
        )
    return inner


def _name(thing: object) -> str:
    family = getattr(getattr(thing, "config", None), "model_type", None)
    return type(thing).__name__ if family is None else f"{type(thing).__name__} (family {family})"


def _shapes(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(x.shape) if isinstance(x, Tensor) else _name(x) for name, x in batch.items()}

"""Steps of training on several ranks, each way to wrap a model, beside one process on all of the data.

Run on the ranks of tests/ranks.py by tests/test_wrapped.py. Dimensions: B responses, T positions.
"""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from rgpb import fused_loss, hf

V, H, K, IGNORE = 61, 32, 3, -100  # V is a multiple of no number of ranks
UNITS = 8  # of a step: for 4 ranks and 2 micro-batches
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "bnf": {"objective": "bnf", "unit": 1},
    "dpo": {"objective": "dpo", "unit": 2, "beta": 0.5},
    "sum": {"objective": {"dpo": 1.0, "mle": 0.3}, "unit": 2, "beta": 0.5},
    "swepo": {"objective": "swepo", "unit": K, "beta": 0.5},
    "mc_po": {"objective": "mc_po", "unit": K, "beta": 0.5, "m": 1, "sampler": "max"},
    "kto": {"objective": "kto", "unit": 1, "beta": 0.5},  # z0 is of all ranks
}
# As docs/integrate.md calls them
DDP = {"ddp": "DDP", "ddp_static": "DDP, `static_graph`", "ddp_unused": "DDP, `find_unused_parameters`"}
FSDP = {
    "fsdp1": "FSDP1, a unit for each layer",
    "fsdp2": "FSDP2, one unit",
    "fsdp2_layers": "FSDP2, a unit for each layer",
    "fsdp2_norm": "FSDP2, and one for last norm and head",
    "fsdp2_head": "FSDP2, and one for the head",
    "fsdp2_tied": "FSDP2, a unit for each layer, tied head",
    "fsdp2_roots": "FSDP2, body and head apart, and nothing around them",
    "fsdp2_empty": "FSDP2, all in units below the model's own",
}
ZERO = {"zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
# `lopsided`: all ranks but the first have one unit. `empty`: the last rank has no token. `accumulated`: two
# micro-batches a step, of which the first isn't synchronised;
# `synced`: both are
DATA = ("uneven", "lopsided", "empty", "accumulated", "synced")


class Run(NamedTuple):
    """What is run.

    Attributes:
        how: one of DDP, FSDP or ZERO; None for one process; "bare" for replicas that nothing keeps together.
        objective, data: one of OBJECTIVES, of DATA.
        bf16: the wrapper's own mixed precision; autocast where it has none.
        checkpointing: "", "reentrant" or "plain".
        dense: from the model's own logits.
        compiled: torch.compile, "inside" or "outside" the wrapper.
        lora: PEFT's adapters, and what a loss needs as reference is the model without them.
        scored: what runs without gradients between backward and step: "scores", "loss", or "own", the model itself;
            "pending": scores, between forward and backward; "after": the model itself, after the step.
    """

    how: str | None = "ddp"
    objective: str = "bnf"
    data: str = "uneven"
    bf16: bool = False
    checkpointing: str = ""
    dense: bool = False
    compiled: str = ""
    lora: bool = False
    scored: str = ""
    steps: int = 5


class Trained(NamedTuple):
    """The first step's loss and whole gradients, and the weights after all steps, by the bare model's names."""

    loss: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def model_of(tied: bool = False) -> transformers.LlamaForCausalLM:
    """The same on every rank; its head has a bias."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied))
    head = nn.Linear(H, V)
    if tied:
        head.weight = model.model.embed_tokens.weight
    model.lm_head = head
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


def adapted(model: Any) -> Any:
    """With LoRA in its attention, away from where it starts; the same on every rank."""
    import peft

    torch.manual_seed(2)
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, adapters)


def batch_of(unit: int, empty: int = 0) -> dict[str, Tensor]:
    """Responses of uneven lengths, unit by unit [UNITS, unit, T]; those of the last `empty` units have no token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (UNITS, unit, 9), generator=generator)
    lengths = torch.randint(4, 10, (UNITS, unit, 1), generator=generator)
    mask = torch.arange(9) < lengths
    labels = ids.masked_fill(~mask | (torch.arange(9) < 3), IGNORE)
    if empty:
        labels[-empty:] = IGNORE
    ref = -3 * torch.rand((UNITS, unit, 9), generator=generator)
    number = torch.arange(UNITS * unit).view(UNITS, unit, 1)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels, "ref": ref} | {
        "number": number
    }


def share(batch: dict[str, Tensor], units: slice) -> dict[str, Tensor]:
    """Some units, stacked as the objective wants: pairs `[chosen; rejected]`, groups in a row. [B, T]"""
    pairs = batch["labels"].shape[1] == 2
    return {k: (x[units].transpose(0, 1) if pairs else x[units]).reshape(-1, x.shape[-1]) for k, x in batch.items()}


def micro_batches(run: Run) -> list[dict[str, Tensor]]:
    """What this rank trains on in a step."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if run.how else (0, 1)
    each = UNITS // world
    empty = UNITS // 2 if run.data == "empty" else 0  # the second of two ranks
    batch = batch_of(OBJECTIVES[run.objective]["unit"], empty)
    parts = 2 if run.how and run.data in ("accumulated", "synced") else 1
    size = each // parts
    if run.how and run.data == "lopsided":
        first = UNITS - world + 1
        return [share(batch, slice(first + rank - 1, first + rank) if rank else slice(0, first))]
    return [share(batch, slice(first, first + size)) for first in range(rank * each, (rank + 1) * each, size)]


def loss_of(model: Any, batch: dict[str, Tensor], run: Run, **more: Any) -> Any:
    named = OBJECTIVES[run.objective]
    options = {k: v for k, v in named.items() if k not in ("objective", "unit")}
    batch = dict(batch)
    number, unit = batch.pop("number"), named["unit"]
    ref = batch.pop("ref")
    options["ref"] = "base" if run.lora else ref
    if unit == 1:
        options["label"] = number[:, 0] % 3 != 0
    if named["objective"] == "swepo":
        options["rewards"] = number.float().mul(1.7).sin().view(-1, unit)
    if named["objective"] == "mc_po":
        options["group_size"] = unit
    if not run.dense:
        return hf.loss(model, batch, named["objective"], **options, **more)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    # with the logits as hidden states and nothing as head: a dense log-softmax in float32
    target = hf.aligned_targets(batch["labels"])
    return fused_loss(logits, torch.eye(V), target, objective=named["objective"], **options)


def wrap(run: Run, model: Any) -> Any:
    """What the wrapper makes of an attached model."""
    how = run.how
    if how is None or how == "bare":
        return model
    if how.startswith("ddp"):
        compiled = functools.partial(torch.compile, backend="aot_eager")  # its graphs, without the time of a compiler
        wrapped = nn.parallel.DistributedDataParallel(
            compiled(model) if run.compiled == "inside" else model,
            static_graph=how == "ddp_static", find_unused_parameters=how == "ddp_unused",
        )  # fmt: skip
        return compiled(wrapped) if run.compiled == "outside" else wrapped
    if how == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        return FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}), use_orig_params=True,
            mixed_precision=MixedPrecision(torch.bfloat16, torch.float32, torch.float32) if run.bf16 else None,
            device_id=torch.device("cpu"),
        )  # fmt: skip
    if how.startswith("fsdp2"):
        return fsdp2(model, how, run.bf16)
    return zero(model, int(how[-1]), run)


def fsdp2(model: Any, how: str, bf16: bool) -> Any:
    """`fsdp2`: one unit; `_layers`: one for each layer; `_norm`: and the last norm with the head; `_head`: the head;
    `_roots`: and the body, with nothing around them; `_empty`: all that has parameters, and the model's own has none.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    shard = functools.partial(fully_shard, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    if how != "fsdp2":
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                shard(module)
    if how == "fsdp2_norm":
        shard([model.model.norm, model.lm_head])
    if how in ("fsdp2_head", "fsdp2_roots", "fsdp2_empty"):
        shard(model.lm_head)
    if how == "fsdp2_empty":
        shard(model.model.embed_tokens)
        shard(model.model.norm)
    if how == "fsdp2_roots":
        shard(model.model)
        return model
    return shard(model)


def deepspeed() -> Any:
    """DeepSpeed on CPUs, over gloo."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for 80 s, and of no use to gloo
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def zero(model: Any, stage: int, run: Run) -> Any:
    """A stage of ZeRO."""
    sharding: dict[str, Any] = {"stage": stage}
    if stage == 3:
        sharding["stage3_param_persistence_threshold"] = 0  # else all of a small model stays whole
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2 if run.data in ("accumulated", "synced") else 1,
        "zero_optimization": sharding,
        "gradient_clipping": 0.0,  # else 1.0
        "zero_allow_untested_optimizer": True,  # torch's own AdamW
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": run.bf16},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return deepspeed().initialize(model=model, optimizer=optimizer, config=config)[0]


def names_of(model: nn.Module) -> Any:
    """What is trained, by the names that it has without wrappers."""
    for name, parameter in model.named_parameters():
        for part in ("_fsdp_wrapped_module.", "_orig_mod.", "module."):
            name = name.replace(part, "")
        if parameter.requires_grad:
            yield name, parameter


def by_parts(objective: str, reduction: str) -> Trained:
    """One step in DDP: all ranks run the model on the same responses, and each scores other tokens of them."""
    run = Run("ddp", objective)
    model: Any = model_of()
    wrapped = wrap(run, hf.attach(model))
    batch = share(batch_of(OBJECTIVES[objective]["unit"]), slice(0, UNITS))
    labels = batch.pop("labels")
    target = hf.aligned_targets(labels)
    positions = torch.arange(target.shape[1])
    middle = target.shape[1] // 2 + 1
    own = positions < middle if dist.get_rank() == 0 else positions >= middle
    batch["shift_labels"] = target.masked_fill(~own, IGNORE)
    loss = loss_of(wrapped, batch, run, sequence_group=dist.group.WORLD, reduction=reduction)
    loss.backward()
    return Trained(loss.item(), tensors_of(model, wrapped, gradients=True), {})


def in_one(objective: str, reduction: str) -> Trained:
    """The same step in one process."""
    run, model = Run(None, objective), model_of()
    batch = share(batch_of(OBJECTIVES[objective]["unit"]), slice(0, UNITS))
    loss = loss_of(model, batch, run, reduction=reduction)
    loss.backward()
    return Trained(loss.item(), tensors_of(model, model, gradients=True), {})


def tensors_of(model: Any, wrapped: Any, gradients: bool) -> dict[str, Tensor]:
    """All gradients or weights, whole, by the bare model's names."""

    def of(parameter: Any) -> Tensor:
        x = parameter.grad if gradients else parameter.detach()
        x = x.full_tensor() if hasattr(x, "full_tensor") else x
        return x.float().clone()

    if type(wrapped).__name__ == "FullyShardedDataParallel":
        with type(wrapped).summon_full_params(wrapped, with_grads=gradients):
            return {name: of(parameter) for name, parameter in names_of(wrapped)}
    if type(wrapped).__name__ == "DeepSpeedEngine":
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

        get = safe_get_full_grad if gradients else safe_get_full_fp32_param
        return {name: get(parameter).float().clone() for name, parameter in names_of(model)}
    return {name: of(parameter) for name, parameter in names_of(model)}


def score(run: Run, wrapped: Any, batch: dict[str, Tensor]) -> Any:
    """Scores in evaluation between backward and step, by rgpb or by the model itself."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        if run.scored == "own":
            wrapped(**inputs)
            return wrapped.reshard() if hasattr(wrapped, "reshard") else None
        if run.scored == "loss":
            return hf.loss(wrapped, inputs, "mle")
        return hf.token_scores(wrapped, inputs)


def train(run: Run) -> Trained:
    """On the first rank alone the results, elsewhere nothing."""
    model: Any = model_of(tied=run.how == "fsdp2_tied")
    if run.lora:
        model = adapted(model)
    return steps_of(run, model, wrap(run, hf.attach(model, sync_elsewhere=run.how == "bare")))


def steps_of(run: Run, model: Any, wrapped: Any) -> Trained:
    micros = micro_batches(run)
    if run.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": run.checkpointing == "reentrant"})
    engine = wrapped if run.how in ZERO else None
    optimizer = engine or torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    autocast = run.bf16 and not (run.how in FSDP or run.how in ZERO)
    gradients, total = {}, torch.zeros(())
    for step in range(run.steps):
        optimizer.zero_grad()
        for number, batch in enumerate(micros):
            last = number == len(micros) - 1
            with unsynchronised(wrapped, run, last):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = loss_of(wrapped, batch, run)
                if run.scored == "pending":
                    score(run, wrapped, batch)
                if engine:
                    engine.backward(loss)
                else:
                    (loss / len(micros)).backward()
            if step == 0:
                total += loss.detach() / len(micros)
                if last:
                    gradients = tensors_of(model, wrapped, gradients=True)
            if engine:
                engine.step()
        if run.scored in ("scores", "loss", "own"):
            score(run, wrapped, micros[0])
        if not engine:
            optimizer.step()
        if run.scored == "after":
            with torch.no_grad():
                wrapped(input_ids=micros[0]["input_ids"])
    if run.how:
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    weights = tensors_of(model, wrapped, gradients=False)
    first = not run.how or dist.get_rank() == 0
    return Trained(total.item(), gradients, weights) if first else Trained(0.0, {}, {})


def unsynchronised(wrapped: Any, run: Run, last: bool) -> Any:
    """What a user puts around all micro-batches but the last, so that gradients are reduced once."""
    if run.data != "accumulated" or run.how in ZERO:
        return nullcontext()
    if run.how in FSDP and run.how != "fsdp1":
        for module in (wrapped, *wrapped.children()):  # the roots are among these
            if hasattr(module, "set_requires_gradient_sync"):
                module.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last else wrapped.no_sync()


@functools.cache
def alone(run: Run) -> Trained:
    """One process in float32 on all of the data; `run` as `expected` makes it."""
    model: Any = model_of(tied=run.how == "fsdp2_tied")
    if run.lora:
        model = adapted(model)
    return steps_of(run._replace(how=None), model, hf.attach(model))


def expected(run: Run) -> Trained:
    """What one process would find."""
    how, data = ("fsdp2_tied" if run.how == "fsdp2_tied" else None), "empty" if run.data == "empty" else "uneven"
    return alone(Run(how, run.objective, data, lora=run.lora, steps=run.steps))


def errors(found: Trained, right: Trained) -> dict[str, float]:
    """The largest of each kind: of a tensor, relative to its norm, or to 1 % of the largest one's.

    Raises:
        AssertionError: other tensors, or such that are all zero.
    """
    worst = {"loss": abs(found.loss - right.loss) / max(abs(right.loss), 1e-2)}
    for kind in ("gradients", "weights"):
        ours, theirs = getattr(found, kind), getattr(right, kind)
        assert theirs
        assert ours.keys() == theirs.keys()
        norms = {name: x.norm().item() for name, x in theirs.items()}
        floor = 0.01 * max(norms.values())
        assert all(norms.values()), f"{kind} that are all zero"
        worst[kind] = max((ours[n] - x).norm().item() / max(norms[n], floor) for n, x in theirs.items())
    return worst


def distances(found: Trained, right: Trained) -> tuple[float, float]:
    """Of the losses, and of all gradients together: relative."""
    both = [torch.cat([t.gradients[n].flatten() for n in sorted(t.gradients)]) for t in (found, right)]
    return abs(found.loss - right.loss) / abs(right.loss), ((both[0] - both[1]).norm() / both[1].norm()).item()


# -- other ways to get there, each run on every rank ------------------------------------------------------------------


def with_accelerate(attached_first: bool) -> tuple[Trained, float, float, float]:
    """A step by Accelerator.prepare in bf16; the loss afterwards, wrapped, unwrapped and of a model never wrapped."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    run, model = Run("ddp", bf16=True, steps=1), model_of()
    AcceleratorState._reset_state(reset_partial_state=True)  # of whatever ran in this process before
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        if attached_first:
            hf.attach(model)
        wrapped = accelerator.prepare(model)
        if not attached_first:
            hf.attach(wrapped)
        trained = steps_of(run._replace(bf16=False), model, wrapped)
        batch = micro_batches(run)[0]
        before = loss_of(wrapped, batch, run).item()
        with torch.no_grad():
            bare = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
            after = loss_of(bare, batch, run).item()
            other = model_of()
            other.load_state_dict(bare.state_dict())
            right = loss_of(other, batch, run).item()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return trained, before, after, right


def with_trainer(divides: bool) -> dict[str, Tensor]:
    """Weights after three steps of SGD by transformers' Trainer, each over two micro-batches of every rank."""
    import tempfile

    from accelerate.state import AcceleratorState
    from torch.optim.lr_scheduler import LambdaLR

    class PreferenceTrainer(transformers.Trainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            if divides:
                self.model_accepts_loss_kwargs = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore
            loss = loss_of(model, inputs, Run(objective="dpo"))
            return (loss, {"loss": loss}) if return_outputs else loss

    model, batch = model_of(), batch_of(2)
    rows = [{name: x[unit] for name, x in batch.items()} for unit in range(UNITS)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0,
            remove_unused_columns=False, use_cpu=True, dataloader_pin_memory=False, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = PreferenceTrainer(
            model, arguments, train_dataset=rows,  # type: ignore[arg-type]
            data_collator=lambda units: share({n: torch.stack([u[n] for u in units]) for n in units[0]}, slice(None)),
            optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
        )  # fmt: skip
        trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return tensors_of(model, model, gradients=False)


def by_sgd() -> dict[str, Tensor]:
    """The same in one process."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss_of(model, share(batch_of(2), slice(None)), Run(objective="dpo")).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tensors_of(model, model, gradients=False)


def refused(what: str) -> str:
    """What is said to a model that can't be trained."""
    model: Any = model_of()
    if what == "parts":
        model = nn.DataParallel(model)
    elif what != "bare":
        model = wrap(Run(what), model)
    batch = micro_batches(Run())[0]
    try:
        loss_of(model, batch, Run())
    except ValueError as error:
        return str(error)
    return "nothing"

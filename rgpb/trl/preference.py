"""TRL's trainers of preferences with this library's objectives: `PreferenceTrainer` and `UnpairedTrainer`.

Dimensions: B responses (pairs stacked `[chosen; rejected]`), T positions of a padded batch, N of a packed one.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.utils import get_config_model_id, global_then_local_main_first, use_adapter

from rgpb.head import described
from rgpb.hf import PreferenceMixin, aligned_targets, attach, evaluating, pack, token_scores
from rgpb.hf.batches import IGNORE, from_trl, packed_bounds
from rgpb.hf.wrappers import base_of, check_adapters
from rgpb.layout import TokenScores
from rgpb.objectives import OBJECTIVES, Objective, resolve
from rgpb.objectives.registry import GUESTS, find, suggest
from rgpb.trl.losses import NAMES

SCORES = ("logp", "log_odds")  # of the reference, for each token that counts
# Which option of an objective an argument of TRL's configuration is, by objective; else the argument's own name
OPTION = {("ipo", "beta"): "tau", ("exo", "label_smoothing"): "epsilon", ("discopop", "discopop_tau"): "tau"}
# TRL's defaults of arguments that are options of objectives
GIVEN = {"beta": 0.1, "label_smoothing": 0.0, "discopop_tau": 0.05, "desirable_weight": 1.0, "undesirable_weight": 1.0}
# What only TRL's own losses know: name → the value that leaves it out
THEIRS = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False}
MISMATCHED = "KL_"  # of the keys of a batch's completions behind prompts that they don't belong to


class Collator:
    """Batches as `rgpb.hf` takes them, from those that TRL's collators make.

    Args:
        collate: a collator of TRL's, or one whose batches have the same keys: `input_ids`, `attention_mask` and
            `completion_mask`, all [B, T].
        sides: what the rows of a batch are, one after the other, each for all examples: ("chosen", "rejected") or
            ("completion",).
        spec: the objective. One of single responses without labels sees the first side alone; None: all rows, without
            labels.
        packed: leave the padding out.
        stored: take the reference's scores from the examples.
    """

    def __init__(
        self, collate: Callable[[list[Any]], Mapping[str, Any]], sides: tuple[str, ...], spec: Objective | None,
        packed: bool, stored: bool = False,
    ) -> None:  # fmt: skip
        self.collate, self.sides, self.packed, self.stored = collate, sides, packed, stored
        self.whole = spec is None or spec.unit != "response" or spec.label
        self.labelled = spec is not None and spec.label

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        made = {n: x for n, x in self.collate(examples).items() if not n.startswith("ref_")}  # sums that TRL has stored
        other = {name.removeprefix(MISMATCHED): made.pop(name) for name in list(made) if name.startswith(MISMATCHED)}
        batch = from_trl(made)
        label, rows, sides = batch.pop("label"), len(batch["input_ids"]), self.sides
        if not self.whole:
            kept = len(examples)
            batch = {n: x[:kept] if isinstance(x, Tensor) and len(x) == rows else x for n, x in batch.items()}
            sides = sides[:1]
        if self.packed:
            batch = pack(batch)
        if self.stored:
            if (needed := column(sides[0], SCORES[0])) not in examples[0]:
                raise ValueError(
                    f"precompute_ref_log_probs: expected rows with {needed}, got {sorted(examples[0])}; the trainer "
                    "stores them for the datasets that it is made with, and in evaluate(dataset)"
                )
            counted = aligned_targets(batch["labels"], packed_bounds(batch)) != IGNORE
            for score in SCORES:
                parts = [torch.tensor(row[column(side, score)]) for side in sides for row in examples]
                values = torch.cat(parts).float()
                if len(values) != int(counted.sum()):
                    raise ValueError(
                        f"ref_{score}: expected one for each of {int(counted.sum())} completion tokens, got "
                        f"{len(values)}; the dataset's reference scores are of other tokens"
                    )
                placed = torch.zeros(counted.shape).masked_scatter(counted, values)
                batch[f"ref_{score}"] = placed[0] if self.packed else placed
        if self.labelled:
            batch["label"] = label
        if other:
            batch[MISMATCHED] = {name: x for name, x in from_trl(other).items() if name != "label"}
        return batch


def column(side: str, score: str) -> str:
    return f"ref_{side}_{score}"


class Shared(PreferenceMixin):
    """What the trainers of pairs and of single responses have in common."""

    sides: ClassVar[tuple[str, ...]]
    default: ClassVar[type[Any]]  # TRL's configuration
    args: Any
    model: Any
    if TYPE_CHECKING:  # TRL's
        _name: str
        _precompute_model_hash: str | None
        aux_loss_enabled: bool
        router_aux_loss_coef: float
        ref_model: Any

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: PreTrainedModel | None = None,
        args: Any = None,
        *rest: Any,
        options: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        for other, place in (("ref", "ref_model"), ("objective", "args.loss_type")):
            if other in keywords:
                raise ValueError(f"{other}: expected none, since here it is {place}; got {described(keywords[other])}")
        if args is None:
            name: str = model if isinstance(model, str) else get_config_model_id(model.config)  # type: ignore[arg-type]
            args = self.default(f"{name.split('/')[-1]}-{self._name}")
        if not isinstance(args, self.default):
            raise ValueError(f"args: expected a {self.default.__name__}, got {type(args).__name__}")
        objective, spec = objective_of(args, self.sides)
        own = "" if spec.parts else f"{spec.name}."
        given = {name.removeprefix(own): value for name, value in (options or {}).items()}
        found = options_of(args, spec)
        options = {name: value for name, value in found.items() if name.rpartition(".")[2] not in given} | given
        check_settings(args, spec, ref_model)
        data = keywords.get("train_dataset", rest[1] if len(rest) > 1 else None)
        if spec.ref is None and data is not None and {"image", "images"} & next(iter(data), {}).keys():
            raise ValueError(
                f"loss_type: expected one with a reference for images, since TRL refuses them where it loads none; got "
                f"{args.loss_type}; rgpb.hf.PreferenceMixin takes it"
            )
        if ref_model is None:
            new = [*rest, keywords.get("peft_config")] if spec.ref is not None else []
            check_adapters([*getattr(model, "peft_config", {}).values(), *new], "ref_model")
        self.spec, self.packed = spec, bool(getattr(args, "padding_free", False))
        self._how = {name: options[name] for name in ("impl", "workspace", "temperature") if name in options}
        self._stores = bool(args.precompute_ref_log_probs and spec.ref is not None)
        self._trained_tokens: Any = 0
        names = [term.name for term in terms_of(spec)]
        if names not in (["dpo"], ["kto"]):  # the model's card and tags say what it was trained with
            vars(self).update(_name=" + ".join(names), _paper={}, _tag_names=["trl", *names])
        with _as_trl_takes_it(args, spec), _attaching(type(self)):
            super().__init__(model, ref_model, args, *rest, objective=objective, options=options, **keywords)
        vars(self).update(padding_free=self.packed, precompute_ref_logps=self._stores)
        self._take_collator()
        if self.aux_loss_enabled:  # not in the model's config, which is saved
            base: Any = base_of(self.model)
            base.router_aux_loss_coef = self.router_aux_loss_coef

    @property
    def routed(self) -> bool:
        return bool(self.aux_loss_enabled)

    def _take_collator(self) -> None:
        """Around TRL's collator, or the user's, once it is there."""
        given: Any = self.data_collator
        theirs = given.collate if isinstance(given, Collator) else given
        self.data_collator = Collator(theirs, self.sides, self.spec, self.packed, self._stores)  # type: ignore[assignment]

    def objective_loss(
        self, model: nn.Module, inputs: dict[str, Any], reduction: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.model.training:
            mask = inputs.get("attention_mask")
            self._trained_tokens = self._trained_tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())
        inputs = dict(inputs)
        mismatched = inputs.pop(MISMATCHED, None)
        config = base_of(model).config.get_text_config()
        if self.aux_loss_enabled or getattr(config, "output_router_logits", False):
            inputs["output_router_logits"] = self.routed
        if mismatched is None:
            return super().objective_loss(model, inputs, reduction)
        with torch.no_grad():
            policy = token_scores(model, mismatched, **self._how)
            ref = self.reference_tokens(model, mismatched)
        kept, self.options = self.options, {**self.options, "z0": (policy.logp - ref.logp).double().sum(1)}
        try:
            return super().objective_loss(model, inputs, reduction)
        finally:
            self.options = kept

    def reference(self, model: nn.Module, batch: dict[str, Any]) -> TokenScores:
        """The scores of the reference model, of TRL's adapter "ref", or of the model without adapters."""
        return self.reference_tokens(model, {name: x for name, x in batch.items() if name != "output_router_logits"})

    def reference_tokens(self, model: nn.Module, batch: dict[str, Any]) -> TokenScores:
        """The reference's scores of a batch, without gradient; `model` holds it where there is no reference model."""
        adapter: AbstractContextManager[None] = nullcontext()
        if self.ref_model is not None:
            model = self.ref_model
        elif is_peft_model(self.model):
            peft: Any = self.accelerator.unwrap_model(self.model)
            adapter = adapter_of(peft, "ref" if "ref" in peft.peft_config else None)
        with evaluating(model), adapter, self.accelerator.autocast():
            return token_scores(model, batch, **self._how)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The dataset with the reference's scores of each token. TRL calls it at the end of its constructor."""
        if self.spec.ref is None:
            return dataset
        self._take_collator()
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"precompute_ref_log_probs: expected a Dataset, whose rows can be gone through before training; got "
                f"{type(dataset).__name__} as {name}"
            )
        if self.ref_model is None and self.is_deepspeed_enabled:
            raise ValueError(
                "precompute_ref_log_probs: expected a ref_model with DeepSpeed, since the model that is trained isn't "
                "in its engine yet; got none"
            )
        precision = self.args.bf16, self.args.fp16
        cut = self.args.max_length, getattr(self.args, "truncation_mode", None)
        scale = {name: self._how[name] for name in ("temperature",) if name in self._how}
        config = {**base_of(self.ref_model or self.model).config.to_dict(), "_name_or_path": ""}
        of = self._precompute_model_hash, config, tokens_of(dataset, self.sides), precision, cut, scale, SCORES
        key = [Hasher.hash(of)]  # the dataset's own fingerprint is another for each β
        broadcast_object_list(key, from_process=0)
        path = dataset._get_cache_file_path(key[0])
        if not all(self.gather(os.path.exists(path))):
            self._score(dataset, name, batch_size, key[0], path)
        names = {column(side, score) for side in self.sides for score in SCORES}  # perhaps those of another model
        others = dataset.remove_columns([name for name in dataset.column_names if name in names])
        return concatenate_datasets([others, Dataset.from_file(path)], axis=1)

    def _score(self, dataset: Dataset, name: str, batch_size: int, key: str, path: str) -> None:
        """Write the reference's scores of a dataset's rows."""
        assert isinstance(self.data_collator, Collator)
        collate = Collator(self.data_collator.collate, self.sides, None, self.packed)
        workers = self.args.dataloader_num_workers
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=collate, num_workers=workers))  # type: ignore[arg-type]
        found: list[list[Any]] = []
        for batch in tqdm(loader, f"reference scores of {name}", disable=bool(os.environ.get("TQDM_DISABLE"))):
            rows = per_row(self.reference_tokens(self.model, batch), batch, len(self.sides))
            found += self.accelerator.gather_for_metrics(rows, use_gather_object=True)
        if not os.path.exists(path):  # a dataset in memory has a place of its own on each rank
            names = [column(side, score) for side in self.sides for score in SCORES]
            dataset.map(
                partial(_taken, dict(zip(names, zip(*found)))), with_indices=True, batched=True,
                remove_columns=dataset.column_names, features=Features(dict.fromkeys(names, List(Value("float32")))),
                new_fingerprint=key, cache_file_name=path, desc=f"storing reference scores of {name}",
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["num_tokens"] = sum(self.gather(int(self._trained_tokens)))
        super().log(logs, start_time)


class PreferenceTrainer(Shared, DPOTrainer):
    """TRL's `DPOTrainer`, with any objective of pairs or single responses, and the loss without logits.

    Data, tokens, truncation, PEFT, the reference model, evaluation, checkpoints and their names are TRL's. `loss_type`
    takes TRL's fifteen names and every objective of this library that isn't one of groups, mixed by `loss_weights`:
    `DPOConfig(loss_type=["bnf", "sft"], loss_weights=[1.0, 0.1])`. An objective of single responses with labels takes
    the chosen as good and the rejected as bad; one without (`mle`) sees the chosen alone, and the rejected ones don't
    pass through the model.

    `args.beta` goes to the objectives with a reference (to the τ of `ipo`); an objective without one keeps its own
    default, or what `options` says. `args.label_smoothing` goes to those that have it, under its name or as the ε of
    `exo`; `args.discopop_tau` to `discopop`.

    What differs from `DPOTrainer`:

    * A step's loss is the mean over all of its pairs, on all ranks and over accumulation, as `PreferenceMixin` has it.
      Where batches are equally full that is TRL's.
    * `padding_free=True` packs each batch. Attention has to keep packed responses apart: see `rgpb.hf`.
    * `precompute_ref_log_probs=True` stores the reference's scores of each token, in the cache of the dataset, for the
      model, data, tokens and precision that they are of; they serve every loss, β and batch size. Scores that the
      dataset has from another trainer are left out.
    * The log has the metrics of `fused_loss`: `rewards/…`, `logps/…`, `perplexity`, `agility/…`, and TRL's
      `num_tokens`; not TRL's `entropy`, `mean_token_accuracy` and `logits/…`, which would cost further sweeps over the
      vocabulary, nor its `kl`. Rewards are β (S − R) with the β of the objective, so of `ipo`
      S − R; a tie in `rewards/accuracies` counts ½, in TRL's 0. Responses without a token count in no metric.
    * `ipo` and `sigmoid_norm` divide by the tokens that are predicted. TRL's also count the first one of a row that
      begins with its completion, behind an empty prompt or a cut at the start.
    * The model's card and tags have the name of the objective where that isn't `dpo` (`kto`).
    * There are no logits, so `compute_metrics` is refused.

    Args:
        model, ref_model, args, further arguments: `DPOTrainer`'s. Objectives without a reference load no `ref_model`.
        options: further arguments of `rgpb.hf.loss`: options of objectives (in a sum also `name.option`),
            `grad_tolerance`, `workspace`, ….

    Raises:
        ValueError: a loss type that nobody knows or that is one of groups; a setting that these objectives don't have
            (`ld_alpha`, `f_divergence_type`, `use_weighting`: `DPOTrainer` under `rgpb.trl.accelerate()` has them), or
            that none of them takes.
    """

    sides = ("chosen", "rejected")
    default = DPOConfig


class UnpairedTrainer(Shared, KTOTrainer):
    """TRL's `KTOTrainer`, with any objective of single responses, and the loss without logits.

    `KTOConfig(loss_type=…)` takes TRL's names and every objective of single responses: `"bnf"`, `"bco"`, or a sum such
    as `"bnf + 0.1*mle"`. An objective without labels sees the completions with the label True alone; the others are
    taken out of the dataset. `"kto"` has TRL's estimate of the KL divergence, from completions behind prompts that they
    don't belong to. Else as `PreferenceTrainer`.

    `KTOConfig` goes through the data in order, and TRL makes pairs a thousand chosen ones, then their rejected ones:
    `train_sampling_strategy="random"` mixes them, for every objective but `kto`.

    Args:
        model, ref_model, args, further arguments: `KTOTrainer`'s.
        options: as for `PreferenceTrainer`; in sums also `name.option`.

    Raises:
        ValueError: as `PreferenceTrainer`; and stored reference scores with `kto`, whose mismatched completions they
            don't cover: `KTOTrainer` under `rgpb.trl.accelerate()` stores both.
    """

    sides = ("completion",)
    default = KTOConfig

    def _prepare_dataset(self, dataset: Any, *rest: Any, **keywords: Any) -> Any:
        """TRL's, without the completions that the objective doesn't see."""
        dataset = super()._prepare_dataset(dataset, *rest, **keywords)
        if self.spec.label:
            return dataset
        with global_then_local_main_first():
            dataset = dataset.filter(_good)
        if next(iter(dataset), None) is None:
            raise ValueError(f"dataset: expected a label True, since {self.spec.name} sees those alone; got none")
        return dataset


def objective_of(args: Any, sides: tuple[str, ...]) -> tuple[str | dict[str, float], Objective]:
    """What `loss_type` and `loss_weights` mean together."""
    objective: str | dict[str, float]
    unit = "pair" if len(sides) == 2 else "response"
    known = sorted({*OBJECTIVES, *GUESTS, *NAMES})
    if isinstance(args.loss_type, str):
        objective = args.loss_type
        if find(objective) is None and not set(objective) & set("+-*"):
            raise ValueError(f"loss_type: expected names of {known}, got {objective!r}{suggest(objective, known)}")
    else:
        names = [NAMES.get(name, name) for name in args.loss_type]
        for given, name in zip(args.loss_type, names):
            if find(name) is None:
                how = "; of a sum give the names as a list, and loss_weights" if set(given) & set("+*") else ""
                raise ValueError(f"loss_type: expected names of {known}, got {given!r}{suggest(given, known)}{how}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"loss_type: expected each loss once, got {twice[0]!r} twice in {args.loss_type}")
        weights = dict(zip(names, map(float, getattr(args, "loss_weights", None) or [1.0] * len(names))))
        objective = names[0] if weights == {names[0]: 1.0} else weights
    spec = resolve(objective)
    for term in terms_of(spec):
        if term.unit not in (unit, "response"):
            raise ValueError(
                f"loss_type: expected objectives of {'pairs or ' * (unit == 'pair')}single responses, "
                f"got {term.name!r}, one of {term.unit}s; "
                f"{'GroupTrainer' if term.unit == 'group' else 'PreferenceTrainer'} takes it"
            )
    return objective, spec


def terms_of(spec: Objective) -> list[Objective]:
    return [term for term, _ in spec.parts] or [spec]


def options_of(args: Any, spec: Objective) -> dict[str, float]:
    """The options of the objectives that are arguments of TRL's configuration.

    Raises:
        ValueError: an argument that isn't TRL's default, and that none of the objectives takes.
    """
    found: dict[str, float] = {}
    for argument, default in GIVEN.items():
        value, taken = getattr(args, argument, default), False
        for term in terms_of(spec):
            name = OPTION.get((term.name, argument), argument)
            theirs = argument != "beta" or term.ref is not None
            if theirs and name in (term.options or {}) and not _ignored(args, term, argument):
                found[f"{term.name}.{name}" if spec.parts else name] = value
                taken = True
        if not taken and value != default:
            raise ValueError(
                f"{argument}: expected {default}, since none of loss_type {args.loss_type} takes it from the "
                f"configuration, got {value}; what an objective of this library has goes into options={{...}}"
            )
    return found


def _ignored(args: Any, term: Objective, argument: str) -> bool:
    """TRL's "sigmoid" has no smoothing, though `dpo` has."""
    return argument == "label_smoothing" and term.name == "dpo" and "dpo" not in args.loss_type


def check_settings(args: Any, spec: Objective, ref_model: Any) -> None:
    """Refuse what would be left out without a word."""
    for name, off in THEIRS.items():
        if getattr(args, name, off) != off:
            raise ValueError(
                f"{name}: expected {off!r}, since only TRL's own losses have it, got {getattr(args, name)!r}; "
                "DPOTrainer under rgpb.trl.accelerate() serves it"
            )
    if "exo_pair" in args.loss_type and not args.label_smoothing:
        raise ValueError("label_smoothing: expected above 0 with 'exo_pair', whose ε it is; got 0")
    if spec.ref is None and (ref_model is not None or getattr(args, "sync_ref_model", False)):
        given = "ref_model" if ref_model is not None else "sync_ref_model"
        raise ValueError(f"{given}: expected none, since loss_type {args.loss_type} has no reference; got one")
    names = [term.name for term in terms_of(spec)]
    if args.precompute_ref_log_probs and isinstance(args, KTOConfig) and "kto" in names:
        raise ValueError(
            "precompute_ref_log_probs: expected False with kto, whose mismatched completions have no stored scores, "
            "got True; KTOTrainer under rgpb.trl.accelerate() stores both"
        )
    if isinstance(args, KTOConfig) and "kto" in names and spec.name != "kto":
        raise ValueError(f"loss_type: expected kto by itself, as TRL prepares its data, got {args.loss_type!r}")


@contextmanager
def _as_trl_takes_it(args: Any, spec: Objective) -> Iterator[None]:
    """Settings for TRL's constructor, which warns of packing, loads a reference unless one is computed before, and
    mismatches completions for every loss but one."""
    seen: dict[str, Any] = {"precompute_ref_log_probs": args.precompute_ref_log_probs or spec.ref is None}
    if hasattr(args, "padding_free"):
        seen["padding_free"] = False
    if isinstance(args, KTOConfig) and spec.name != "kto":
        seen["loss_type"] = "apo_zero_unpaired"
    before = {name: getattr(args, name) for name in seen}
    vars(args).update(seen)
    try:
        yield
    finally:
        vars(args).update(before)


@contextmanager
def _attaching(kind: type[Any]) -> Iterator[None]:
    """TRL gives each model its fused head before anything wraps it: there it gets ours."""
    modules = [sys.modules[base.__module__] for base in kind.__mro__ if base in (DPOTrainer, KTOTrainer)]
    before = {module: module.add_fused_lm_head for module in modules}
    for module in modules:
        module.add_fused_lm_head = lambda model, **outputs: attach(model)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, function in before.items():
            module.add_fused_lm_head = function  # type: ignore[attr-defined]


@contextmanager
def adapter_of(model: Any, name: str | None) -> Iterator[None]:
    """With that adapter of a PEFT model, or with none; what is trained stays what it was."""
    trained = {p for p in model.parameters() if p.requires_grad}
    try:
        with use_adapter(model, name):
            yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)


def per_row(scores: TokenScores, batch: Mapping[str, Any], sides: int) -> list[list[Any]]:
    """Scores of the tokens that count, arrays of float32, for each example of a batch: SCORES of each side."""
    cu_seqlens = packed_bounds(batch)
    counted = aligned_targets(batch["labels"], cu_seqlens) != IGNORE
    if cu_seqlens is None:
        lengths = counted.sum(1)
    else:
        lengths = torch.nn.functional.pad(counted[0].cumsum(0), (1, 0))[cu_seqlens.long()].diff()
    count = len(lengths) // sides
    parts = [
        [x.cpu().numpy() for x in getattr(scores, name).reshape(-1)[counted.reshape(-1)].split(lengths.tolist())]
        for name in SCORES
    ]
    return [[part[row + count * side] for side in range(sides) for part in parts] for row in range(count)]


def tokens_of(dataset: Dataset, sides: tuple[str, ...]) -> str:
    """A digest of a dataset's tokens."""
    digest = hashlib.sha256()
    columns = dataset.select_columns(["prompt_ids", *(f"{side}_ids" for side in sides)]).with_format("arrow")
    for table in columns.iter(1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()


def _taken(columns: Mapping[str, tuple[Any, ...]], batch: Any, indices: list[int]) -> dict[str, list[Any]]:
    return {name: [values[i] for i in indices] for name, values in columns.items()}


def _good(row: Mapping[str, Any]) -> bool:
    return bool(row["label"])

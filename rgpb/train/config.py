"""The settings of a run, and what each may be."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from rgpb.arguments import argument, parse_bytes
from rgpb.objectives import Objective, registry, resolve
from rgpb.train.rows import PAIRINGS, SAMPLED_PAIRINGS

EVAL_SAMPLE = 200  # units evaluated on, and prompts held out, at most, unless settings say otherwise
EVAL_SPLIT = 0.05  # part of the prompts that is held out, unless --eval-split says otherwise
REPORTS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # any of these packages

BUILT_IN: dict[str, tuple[str, dict[str, Any]]] = {
    "nano-llama": (
        "LlamaConfig",
        {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "tiny-llama": (
        "LlamaConfig",
        {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
    "tiny-pythia": (
        "GPTNeoXConfig",
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
}


# What has a meaning with `online` alone, and with `lora_r` alone.
ONLINE = ("reward", "sampler", "candidates", "refresh", "temperature", "max_new_tokens")
LORA = ("lora_alpha", "lora_target", "merge")


class Range(NamedTuple):
    """What a number may be, in words and as a function."""

    text: str
    holds: Callable[[Any], bool]


WHOLE = Range("a positive whole number", lambda x: int(x) == x > 0)
COUNT = Range("a positive whole number", lambda x: isinstance(x, int) and x > 0)
POSITIVE = Range("a positive number", lambda x: 0 < x < math.inf)
NONNEGATIVE = Range("0 or more", lambda x: 0 <= x < math.inf)
PART = Range("a part of the steps, from 0 to 1", lambda x: 0 <= x <= 1)
SEVERAL = Range("a whole number, 2 or more", lambda x: isinstance(x, int) and x >= 2)
SPLIT = Range("a part of the prompts, from 0 to less than 1", lambda x: 0 <= x < 1)
LENGTH = Range("at least 2", lambda x: x >= 2)


def _option(default: Any, help: str, allowed: Range | None = None, **extra: Any) -> Any:
    """A field with what its flag on the command line needs, and the range of its number."""
    return field(default=default, metadata={"help": help, "allowed": allowed, **extra})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Each is a flag of `rgpb train` by the same name; `--quiet` is `progress=False`.

    >>> TrainConfig(data="pairs.jsonl", output="runs/dpo", loss="dpo", loss_option={"beta": 0.2}, progress=False).loss
    'dpo'
    """

    data: str = field(metadata={"help": "preference data: JSON (also gzipped), Parquet, Arrow, or a folder of these"})
    output: str = field(metadata={"help": "folder of the run"})
    eval_data: str | None = _option(None, "held-out data; default: --eval-split of --data")
    eval_split: float | None = _option(
        None,
        "part of the prompts of --data to hold out; 0: evaluate on what is trained on; default: "
        f"{EVAL_SPLIT:g}, {EVAL_SAMPLE} prompts at most, and 0 where that is less than two",
        SPLIT,
    )
    eval_rows: int | None = _option(
        None,
        f"evaluate on the first so many units; default: {EVAL_SAMPLE}, fewer where that would take long",
        COUNT,
    )
    loss: str = _option("bnf", "objective, or a weighted sum such as mle+0.5*dpo")
    loss_option: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "an option of the objective, such as beta=0.2; repeatable"}
    )
    pairing: str = _option(
        "best-worst",
        "which of K rewarded responses to compare; best-random and unpaired with --online alone; objectives of groups "
        "take all",
        choices=tuple(dict.fromkeys((*PAIRINGS, *SAMPLED_PAIRINGS))),
    )
    model: str = _option(
        "tiny-llama", f"folder of a model, a GGUF file, or a new model with its own tokenizer: {', '.join(BUILT_IN)}"
    )
    ref_model: str | None = _option(None, "folder or file of the reference model; default: the model before training")
    ref_cache: str | None = _option(
        None, "folder of reference scores, which runs share; default: rgpb/references in the user's cache folder"
    )
    precompute_ref: bool = _option(
        False, "score all references before the first step, so that no second model is held while training"
    )
    vocab_size: int = _option(1024, "of the tokenizer that a new model gets", COUNT)
    online: bool = _option(False, "sample completions from the model, judge them by --reward, and train on those")
    reward: str | None = _option(None, "with --online: FILE.py:FUNCTION or MODULE:FUNCTION of (prompts, completions)")
    sampler: str | None = _option(
        None,
        "with --online: FILE.py:FUNCTION or MODULE:FUNCTION of (prompts, candidates, model), which samples elsewhere",
    )
    candidates: int = _option(4, "with --online: completions sampled for a prompt", SEVERAL)
    refresh: int = _option(16, "with --online: optimizer steps between two samplings", COUNT)
    temperature: float = _option(1.0, "with --online: of sampling", POSITIVE)
    max_new_tokens: int | None = _option(
        None, "with --online: of a completion; default: what --max-length leaves", WHOLE
    )
    sft_epochs: float = _option(
        0.0, "first fine-tune that long on the chosen responses; that is then the reference", NONNEGATIVE
    )
    sft_lr: float | None = _option(None, "learning rate of the fine-tuning; default: --lr", POSITIVE)
    epochs: float = _option(1.0, "passes over the data", POSITIVE)
    steps: int | None = _option(None, "optimizer steps, instead of --epochs", WHOLE)
    batch_size: int = _option(
        8,
        "groups, pairs, or responses of unpaired data, in a batch, with --online prompts; of all processes together",
        COUNT,
    )
    grad_accum: int = _option(1, "batches per optimizer step", COUNT)
    lr: float = _option(1e-5, "peak learning rate", POSITIVE)
    warmup: float = _option(0.1, "how long it rises", PART)
    schedule: str = _option("linear", "how it falls", choices=("linear", "cosine", "constant"))
    weight_decay: float = _option(0.0, "AdamW's", NONNEGATIVE)
    max_grad_norm: float = _option(1.0, "gradients are clipped to it; 0: not at all", NONNEGATIVE)
    max_length: int = _option(1024, "tokens of prompt and response", LENGTH)
    max_prompt_length: int | None = _option(
        None, "what is left of a prompt at least where both are longer; default: half", WHOLE
    )
    truncation_side: str = _option("left", "where such a prompt is cut", choices=("left", "right"))
    allow: bool = _option(False, "go on where most of the data was cut, left out, or is otherwise not what it seems")
    packing: bool = _option(False, "put responses end to end instead of padding them")
    bf16: bool = _option(False, "bfloat16 autocast; weights stay float32")
    dtype: str = _option(
        "float32", "of the weights while they train; bf16 is saved in the dtype of --model", choices=("float32", "bf16")
    )
    lora_r: int | None = _option(None, "train adapters (LoRA) of this rank, by PEFT, instead of the weights", COUNT)
    lora_alpha: float | None = _option(None, "with --lora-r: scale of the adapters; default: twice the rank", POSITIVE)
    lora_target: str | None = _option(
        None, "with --lora-r: names of modules, such as q_proj,v_proj, or all-linear; default: PEFT's for the family"
    )
    merge: bool = _option(False, "with --lora-r: also save the weights with the adapters added in, under merged/")
    parallel: str | None = _option(
        None,
        "on several processes: the whole model in each (ddp), or a part in each (fsdp2); default: ddp",
        choices=("ddp", "fsdp2"),
    )
    timeout: float = _option(1800.0, "seconds until a process that doesn't answer counts as missing", POSITIVE)
    dropout: bool = _option(False, "train with the model's dropout; default: none, as in the reference")
    gradient_checkpointing: bool = _option(False, "recompute the backbone's activations instead of keeping them")
    cpu: bool = _option(False, "don't use a GPU")
    workspace: int | None = _option(
        None,
        "bytes the loss may hold beyond its inputs and gradients; default: 512MiB, on a GPU up to 4GiB of what is free",
        COUNT,
        type=argument(parse_bytes),
    )
    seed: int = _option(0, "of the weights of a new model, the order of the data and dropout")
    log_steps: int = _option(10, "steps between two lines of metrics", COUNT)
    eval_steps: int | None = _option(None, "steps between two evaluations; default: only before and after", WHOLE)
    save_steps: int = _option(500, "steps between two checkpoints", COUNT)
    keep_checkpoints: int = _option(2, "checkpoints kept", COUNT)
    report_to: str | None = _option(
        None, "also send metrics to this, of the environment's settings", choices=tuple(REPORTS)
    )
    overwrite: bool = _option(False, "start anew where --output holds another run")
    progress: bool = _option(True, "show progress", negative="quiet", negative_help="don't show progress")

    def check(self) -> tuple[Objective, dict[str, Any]]:
        """The objective and its options, after checking everything that can be checked without reading anything.

        Raises:
            ValueError: an unknown name, or a number out of range.
        """
        try:
            spec = resolve(self.loss)
        except ValueError as error:
            raise ValueError(f"loss: {str(error).removeprefix('objective: ')}") from None
        if spec.unit == "group" and self.pairing != "best-worst":
            raise ValueError(f"pairing: expected none, since {self.loss} takes whole groups; got {self.pairing!r}")
        pairings, where = (SAMPLED_PAIRINGS, "with") if self.online else (PAIRINGS, "without")
        if self.pairing not in pairings:
            other = "; or give --online" if self.pairing in SAMPLED_PAIRINGS else ""
            if self.online and self.pairing in PAIRINGS:
                other = " (objectives of groups compare all completions)"
            raise ValueError(f"pairing: expected one of {pairings} {where} online, got {self.pairing!r}{other}")
        if self.pairing == "unpaired" and spec.unit != "response":
            raise ValueError(
                f"pairing: expected best-worst or best-random, since {self.loss} compares two responses; "
                f"got {self.pairing!r}"
            )
        for entry in fields(self):
            allowed, value = entry.metadata.get("allowed"), getattr(self, entry.name)
            if allowed is not None and not (value is None and entry.default is None) and not allowed.holds(value):
                raise ValueError(f"{entry.name}: expected {allowed.text}, got {value}")
        if spec.ref is None and self.ref_model is not None:
            raise ValueError(f"ref_model: expected none, since {self.loss} has no reference; got {self.ref_model!r}")
        for name in ("ref_cache", "precompute_ref"):
            if getattr(self, name) and (spec.ref is None or self.online):
                why = "online, whose references are new each time" if self.online else f"{self.loss}, which has none"
                raise ValueError(f"{name}: expected none with {why}; got {getattr(self, name)!r}")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in ONLINE and not self.online and value != entry.default:
                raise ValueError(f"{entry.name}: expected none without online, got {value!r}")
            if entry.name in LORA and self.lora_r is None and value != entry.default:
                raise ValueError(f"{entry.name}: expected none without lora_r, got {value!r}")
            choices = entry.metadata.get("choices")
            if choices and value not in choices and not (value is None and entry.default is None):
                raise ValueError(f"{entry.name}: expected one of {choices}, got {value!r}")
        if self.eval_split is not None and self.eval_data is not None:
            raise ValueError(f"eval_split: expected none with eval_data, got {self.eval_split}")
        packages = REPORTS.get(self.report_to or "", ())
        if packages and not any(map(importlib.util.find_spec, packages)):
            raise ValueError(
                f"report_to: expected {self.report_to} to be installed (pip install {packages[0]}), got none"
            )
        if self.bf16 and self.dtype == "bf16":
            raise ValueError("bf16: expected False with dtype='bf16', whose weights need no autocast; got True")
        if self.lora_r is not None and self.model in BUILT_IN and not Path(self.model).is_dir() and not self.sft_epochs:
            raise ValueError(
                f"lora_r: expected a folder as model, since adapters alone are saved; got {self.model!r}, a new model"
            )
        if self.lora_r is not None and importlib.util.find_spec("peft") is None:
            raise ValueError('lora_r: expected peft to be installed (pip install "rgpb[peft]"), got none')
        if self.sampler is not None and self.temperature != 1.0:
            raise ValueError(f"temperature: expected none with sampler, which has its own; got {self.temperature}")
        if self.online and self.lora_r is not None:
            raise ValueError(f"lora_r: expected none with online, got {self.lora_r}")
        if self.online and self.parallel == "fsdp2":
            raise ValueError("parallel: expected ddp with online, whose samples a whole model makes; got 'fsdp2'")
        if self.online and self.sft_epochs:
            raise ValueError(f"sft_epochs: expected 0 with online, which has prompts alone; got {self.sft_epochs}")
        if not self.sft_epochs and self.sft_lr is not None:
            raise ValueError(f"sft_lr: expected none without sft_epochs, got {self.sft_lr}")
        options = check_options(spec, self.loss_option)
        if self.online and options.get("m", 1) >= self.candidates:
            most = self.candidates - 1
            raise ValueError(f"loss_option: expected m from 1 to {most}, less than the candidates, got {options['m']}")
        return spec, options


def check_options(spec: Objective, options: dict[str, Any]) -> dict[str, Any]:
    """The objective's options with their types, numbers given for numbers.

    Raises:
        ValueError: an option it doesn't have, or a value of another type or out of range.
    """
    known = spec.options or {}
    checked = {}
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"loss_option: expected one of {sorted(known)} for {spec.name}, got {key!r}")
        kind = type(known[key])
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if known[key] is None and number and math.isfinite(value) and key.rpartition(".")[2] != "generator":
            checked[key] = float(value)
        elif kind in (int, float) and number and math.isfinite(value) and kind(value) == value:
            checked[key] = kind(value)
        elif kind in (bool, str) and isinstance(value, kind):
            checked[key] = value
        else:
            wanted = "float" if known[key] is None else kind.__name__
            if key.rpartition(".")[2] == "generator":
                raise ValueError(f"loss_option: expected none of {key}, which --seed stands for, got {value!r}")
            raise ValueError(f"loss_option: expected {key} to be a {wanted} for {spec.name}, got {value!r}")
    try:
        return registry.check_options(spec, checked)
    except ValueError as error:
        raise ValueError(str(error).replace("options of", "loss_option:", 1)) from None

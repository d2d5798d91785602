"""The models of a run and their tokenizer: from a folder, from a GGUF file, or new."""

from __future__ import annotations

import copy
import importlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, Split
from tokenizers.pre_tokenizers import Sequence as Steps
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rgpb import hf
from rgpb.train.config import BUILT_IN, TrainConfig
from rgpb.train.files import save_whole_folder, write_json
from rgpb.train.rows import Preferences
from rgpb.train.tokens import PreferenceDataset, texts_of, train_tokenizer

# A model's folder is data: it is read where it lies, and the code that some bring is not run, nor offered to be
HERE = {"local_files_only": True, "trust_remote_code": False}

# How models split text into words, within which tokens are merged; {} is how many digits are one word
LATER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS: dict[str, list[Any]] = {  # by the name in a GGUF file; ByteLevel alone splits as GPT-2 does
    "gpt-2": [ByteLevel(add_prefix_space=False)],
    "smollm": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)],
    "qwen2": [Split(Regex(LATER.format("")), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)],
    "llama-bpe": [Split(Regex(LATER.format("{1,3}")), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)],
}


def is_hub_name(path: str) -> bool:
    """Whether that names a model of a hub, OWNER/NAME, rather than a path: no folder of the owner's name is here."""
    owner = path.partition("/")[0]
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None and not Path(owner).exists() and not is_gguf(path)


def fetched(config: TrainConfig) -> TrainConfig:
    """The settings with a folder in the place of each model that is named as on a hub.

    Raises:
        ValueError: no hub can be reached, or it has no such model for this user.
    """
    found: dict[str, Any] = {}
    for name in ("model", "ref_model"):
        value = getattr(config, name)
        if value is not None and is_hub_name(value):
            found[name] = _fetched(name, value)
    return replace(config, **found)


def _fetched(name: str, model: str) -> str:
    """The folder, in the hub's own cache, with the model of that name."""
    from huggingface_hub import snapshot_download

    beside = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
    try:
        folder = snapshot_download(model, allow_patterns=[*beside, "*.safetensors"], ignore_patterns=["*/*"])
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(model, allow_patterns=[*beside, "*.bin"], ignore_patterns=["*/*"])
    except Exception as error:  # of the network, of the hub, and of a name that it can't have
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"{name}: expected a folder with a config.json, a GGUF file, or the name of a model on a hub that can be "
            f"reached; got {model!r} ({said.strip()}). Where there is a network: hf download {model} "
            f"--local-dir {model.rpartition('/')[2]}; then give that folder"
        ) from error
    return folder


def family_of(config: TrainConfig) -> str | None:
    """The built-in configuration's name, or None for a folder."""
    for name, folder in (("model", config.model), ("ref_model", config.ref_model)):
        if name == "model" and folder in BUILT_IN and not Path(folder).is_dir():
            continue
        if folder is not None and is_gguf(folder):
            check_gguf(Path(folder), name)
        elif folder is not None and not (Path(folder) / "config.json").is_file():
            built_in = f", or one of {sorted(BUILT_IN)}" if name == "model" else ""
            if (Path(folder) / "model" / "config.json").is_file():
                built_in += f" (a run's is in {Path(folder) / 'model'})"
            raise ValueError(f"{name}: expected a folder with a config.json or a GGUF file{built_in}, got {folder!r}")
    return None if Path(config.model).is_dir() or is_gguf(config.model) else config.model


def make_tokenizer(config: TrainConfig, family: str | None, folder: Path, preferences: Preferences) -> Any:
    """The tokenizer of the model's folder; that of a GGUF file, or one learnt from the data, is kept in `folder`."""
    if family is None and not is_gguf(config.model):
        return load_tokenizer(config.model)
    place = folder / "tokenizer"
    if not place.exists():
        if family is None:
            tokenizer = load_tokenizer(config.model)
        else:
            tokenizer = train_tokenizer(texts_of(preferences), config.vocab_size)
        save_whole_folder(place, tokenizer.save_pretrained)
    return AutoTokenizer.from_pretrained(place, **HERE)


def make_model(config: TrainConfig, family: str | None, tokenizer: Any) -> PreTrainedModel:
    """The model to train; a new one with weights drawn from the run's seed, in float32."""
    if family is None:
        return load_model(config, config.model)
    kind, sizes = BUILT_IN[family]
    tokens = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    length = max(2048, config.max_length)
    made = getattr(transformers, kind)(vocab_size=len(tokenizer), max_position_embeddings=length, **sizes, **tokens)
    transformers.set_seed(config.seed)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    if dtype_of(config) != torch.float32:
        drawn, model = model, AutoModelForCausalLM.from_config(made, dtype=dtype_of(config))
        model.load_state_dict(drawn.state_dict())
    return model if config.dropout else without_dropout(model)


def load_model(config: TrainConfig, folder: str | Path) -> PreTrainedModel:
    """The model of a folder or a GGUF file, with weights of the dtype that the run trains in."""
    model = load_pretrained(folder, dtype_of(config))
    return model if config.dropout else without_dropout(model)


def is_gguf(path: str | Path) -> bool:
    """Whether that names a GGUF file, by its ending."""
    return Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir()


def check_gguf(path: Path, name: str = "model") -> None:
    """Refuse what can't be read as a GGUF file, before anything is.

    Raises:
        ValueError: no such file, one of another kind, or without the package `gguf`.
    """
    if not path.is_file():
        raise ValueError(f"{name}: expected a GGUF file, got {str(path)!r}, which isn't there")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{name}: expected a GGUF file, got {str(path)!r}, which doesn't begin as one")
    if find_spec("gguf") is None:
        raise ValueError(f"{name}: expected the package gguf, which reads {path.name}, got none; pip install gguf")


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model's folder or of a GGUF file.

    Of a GGUF file it has the special tokens that the file names, and splits words as the file names it, where
    transformers 5.17 takes others.

    Raises:
        ValueError: a GGUF file that can't be read, or whose words are split in a way that isn't known here.
    """
    if not is_gguf(path):
        return AutoTokenizer.from_pretrained(path, **HERE)
    path = Path(path)
    check_gguf(path)
    from gguf import GGUFReader

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **HERE)
        fields = GGUFReader(path).fields
    except Exception as error:
        raise ValueError(f"model: expected a GGUF file with a tokenizer, got {str(path)!r} ({error})") from error
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        token = None if field is None else tokenizer.convert_ids_to_tokens(int(field.contents()))
        setattr(tokenizer, f"{role}_token", token)
    _split_words_(tokenizer.backend_tokenizer, fields)
    tokenizer.clean_up_tokenization_spaces = False  # decoding gives the text that was encoded
    return tokenizer


def _split_words_(tokenizer: Any, fields: Any) -> None:
    """Let a tokenizer of merged bytes split text into words as a GGUF file names it; of one without a name, leave it.

    Raises:
        ValueError: a name that isn't known here.
    """
    kind, named = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if named is None or kind is None or kind.contents() != "gpt2":
        return
    words = named.contents()
    if words not in WORDS:
        *most, last = sorted(WORDS)
        raise ValueError(
            f"model: expected words split as {', '.join(most)} or {last} (tokenizer.ggml.pre), got {words!r}; a folder "
            "with the model's own tokenizer.json holds it"
        )
    tokenizer.pre_tokenizer = Steps(WORDS[words])
    if words == "llama-bpe":
        tokenizer.model.ignore_merges = True


def load_pretrained(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder or a GGUF file, with weights of that dtype.

    Of a GGUF file the weights are put into a model of their own, since the one that transformers makes counts as
    quantised and can't be saved.

    Raises:
        ValueError: a GGUF file that can't be read, or lacks weights.
    """
    if not is_gguf(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **HERE)
    path = Path(path)
    check_gguf(path)
    how: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype, **HERE}
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(path.parent, output_loading_info=True, **how)
    except Exception as error:
        raise ValueError(f"model: expected a GGUF file that transformers reads, got {str(path)!r} ({error})") from error
    read, info = both
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"model: expected all weights in {str(path)!r}, got none for {missing[0]} ({len(missing)} lack)"
        )
    config = copy.deepcopy(read.config)
    vars(config).pop("quantization_config", None)  # which the one that was read has in newer transformers alone
    config._name_or_path = ""  # the file's title, which PEFT would look up
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval()


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, whose modules drop nothing in training; its configuration stays as it is.

    Raises:
        ValueError: a model that still draws something in training.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__)):
                setattr(module, name, 0.0)
    ids = torch.arange(4)[None] % hf.read_head(model).weight.shape[0]
    modes = {module: module.training for module in model.modules()}
    seen = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for training in (False, True):
            model.train(training)
            seen.append(model(input_ids=ids, use_cache=False).logits)
    for module, mode in modes.items():
        module.training = mode
    if not torch.allclose(seen[0], seen[1], rtol=1e-3, atol=1e-3 * seen[0].abs().max().item()):
        raise ValueError(
            f"dropout: expected a model whose dropout can be turned off, got {type(model).__name__}, which computes "
            "something else in training than in evaluation; --dropout trains it as it is"
        )
    return model


def dtype_of(config: TrainConfig) -> torch.dtype:
    """Of the weights while they train."""
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32


def saved_dtype(config: TrainConfig, family: str | None) -> torch.dtype:
    """Of the weights when they are saved: float32, or with `dtype="bf16"` what the model's folder has, if it is one."""
    if config.dtype == "float32" or family is not None or is_gguf(config.model):
        return torch.float32
    return AutoConfig.from_pretrained(config.model, **HERE).dtype or torch.float32


def save_model(place: Path, model: Any, state: dict[str, Any] | None, dtype: torch.dtype) -> None:
    """`save_pretrained` with floating-point weights of that dtype.

    Args:
        state: all parameters, where the model holds parts of them.
    """
    whole = model.state_dict() if state is None else state
    cast = {name: x.to(dtype) if x.is_floating_point() and x.dtype != dtype else x for name, x in whole.items()}
    changed = any(cast[name] is not x for name, x in whole.items())
    model.save_pretrained(place, **({} if state is None and not changed else {"state_dict": cast}))
    note = place / "config.json"
    if changed and note.exists():
        write_json(note, {**json.loads(note.read_text()), "dtype": str(dtype).removeprefix("torch.")})


def rehearse(folder: Path, model: Any, tokenizer: Any, keep: int) -> None:
    """Save what is saved at the end, without the weights, and see whether there is room for these.

    Args:
        folder: the run's.
        model: whole or sharded.
        keep: checkpoints kept.

    Raises:
        ValueError: what can't be saved, or too little room.
    """
    place = folder / "rehearsal.tmp"
    try:
        save_whole_folder(place.with_suffix(""), lambda to: model.save_pretrained(to, state_dict={}))
        save_whole_folder(place.with_suffix(""), tokenizer.save_pretrained)
    except OSError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise ValueError(f"model: expected one that can be saved at the end, with its tokenizer; got {said}") from error
    finally:
        for left in (place, place.with_suffix("")):
            shutil.rmtree(left, ignore_errors=True)
    importlib.import_module("matplotlib.figure")  # the report's
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, grad in sizes if grad)
    whole = trained if hasattr(model, "peft_config") else sum(size for size, _ in sizes)
    there = sum(1 for _ in folder.glob("checkpoint-*"))
    needed = whole + max(1, keep + 1 - there) * (whole + 2 * trained)  # the model, and checkpoints with AdamW's state
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"output: expected {needed / 2**20:.0f} MiB free, for the model and {keep + 1} checkpoints (the oldest "
            f"goes last), got {free / 2**20:.0f} MiB in {folder}"
        )


def check_tokens(model: PreTrainedModel, name: str, sets: Sequence[PreferenceDataset]) -> None:
    """Refuse a model without the tokens or the positions that the data has."""
    for data in sets:
        check_sizes(model, name, int(data.tokens.max()), int(data.lengths().max()))


def check_sizes(model: PreTrainedModel, name: str, token: int, length: int) -> None:
    """Refuse a model without that token or so many positions."""
    vocab, longest = hf.read_head(model).weight.shape[0], getattr(model.config, "max_position_embeddings", None)
    if token >= vocab:
        raise ValueError(f"model: expected a vocabulary for token {token}, got {vocab} in {name}")
    if longest is not None and length > longest:
        raise ValueError(f"max_length: expected at most {longest}, the positions of {name}; got {length}")


def reference_model(config: TrainConfig) -> PreTrainedModel | None:
    """The model of `ref_model`, or None."""
    return None if config.ref_model is None else load_model(config, config.ref_model)

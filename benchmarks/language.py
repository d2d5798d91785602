"""A small language model of real text, for what depends on how peaked a trained model's distributions are.

    Python sources of the machine → byte-level BPE → a Llama, trained by `rgpb.train` → its states of held-out text

The sources are those of the standard library and of torch, without their tests: they lie wherever this runs, and a
model of them is soon more confident than one of prose. `--text` names other files, `--model` a model that is there.

Dimensions: N tokens in responses of length T, H hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgpb.bench.contest import Batch, finished
from rgpb.hf import hidden_states, read_head
from rgpb.train.tokens import train_tokenizer

SUFFIXES = (".py", ".md", ".rst", ".txt")
PIECE = 900  # characters of a text that is one training row, about
HELD_OUT = 20  # one file of so many is not trained on
LENGTH = 128  # T, of the held-out responses
STAGES = 4  # checkpoints at equal distances, the last is the trained model


class Scale(NamedTuple):
    """Sizes of model and training: `batch` rows of at most `length` tokens to a step, `text` bytes of files."""

    vocab: int
    width: int
    layers: int
    steps: int
    batch: int
    length: int
    lr: float
    text: int


# On two CPU threads an hour; on a GPU meant to take minutes.
SCALES = {
    "cuda": Scale(65536, 1024, 8, 800, 64, 512, 1e-3, 1 << 26),
    "cpu": Scale(32768, 192, 3, 1600, 8, 256, 2e-3, 1 << 26),
}


def sources() -> tuple[Path, ...]:
    """Folders of the standard library and of torch."""
    return Path(sysconfig.get_paths()["stdlib"]), Path(torch.__path__[0])


def files(places: tuple[Path, ...]) -> list[tuple[str, Path]]:
    """(name, path) of the texts in files and folders, without packages inside of a folder and without tests, in order.

    Raises:
        ValueError: none there.
    """
    found = []
    for place in places:
        inside = [place] if place.is_file() else place.rglob("*")
        for path in inside:
            name = place.name if path == place else f"{place.name}/{path.relative_to(place).as_posix()}"
            parts = name.lower().split("/")[1:]
            skipped = any("test" in part or part.endswith("-packages") or part == "__pycache__" for part in parts)
            if path.is_file() and not skipped and (path == place or path.suffix in SUFFIXES):
                found.append((name, path))
    if not found:
        raise ValueError(
            f"text: expected files, or folders with {', '.join(SUFFIXES)}, got {', '.join(map(str, places))}"
        )
    return sorted(found)


def read_corpus(places: tuple[Path, ...], most: int) -> tuple[list[str], list[str], str]:
    """Pieces of at most `most` bytes of the files, evenly spread where there are more; those of held-out files apart,
    and a digest of both.

    Raises:
        ValueError: too little for both parts.
    """
    named = files(places)
    part = min(1.0, most / max(1, sum(path.stat().st_size for _, path in named)))
    train: list[str] = []
    held_out: list[str] = []
    digest = hashlib.sha256()
    for name, path in named:
        drawn = zlib.crc32(name.encode())
        if drawn >= part * 2**32:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        digest.update(text.encode())
        (held_out if drawn % HELD_OUT == 0 else train).extend(pieces(text))
    if not train or not held_out:
        raise ValueError(
            f"text: expected files of which one in {HELD_OUT}, by a hash of its name, is held out and others aren't, "
            f"got {len(named)} files with {len(train)} pieces to train on and {len(held_out)} held out"
        )
    return train, held_out, digest.hexdigest()[:16]


def pieces(text: str) -> Iterator[str]:
    """The text in parts of whole lines, `PIECE` characters or a little more each."""
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= PIECE:
            yield "".join(lines)
            lines, length = [], 0
    if "".join(lines).strip():
        yield "".join(lines)


def train_stages(
    folder: Path, corpus: tuple[list[str], list[str], str], scale: Scale, tokens: int, device: str
) -> dict[int, Path]:  # fmt: skip
    """Train in `folder`, or go on there; the model after so many steps, before and at `STAGES` stages of training.

    Raises:
        ValueError: the folder belongs to another text or scale; or the held-out text has less than so many tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from rgpb.train import TrainConfig, train
    from rgpb.train.files import save_whole_file

    (texts, held_out, digest), heads = corpus, max(1, scale.width // 64)
    start, data, note = folder / "start", folder / "text.jsonl", folder / "scale.json"
    wanted = {**scale._asdict(), "corpus": digest}
    if note.exists() and json.loads(note.read_text()) != wanted:
        raise ValueError(f"out: expected a model of this text and scale in {folder}, got another; remove it")
    if not note.exists():
        tokenizer = train_tokenizer(texts, scale.vocab)
        held_out_ids(tokenizer, held_out, tokens)  # what there is too little of is known before the training
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=scale.vocab, hidden_size=scale.width, intermediate_size=3 * scale.width,
            num_hidden_layers=scale.layers, num_attention_heads=heads,
            max_position_embeddings=scale.length, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(start)
        tokenizer.save_pretrained(start)
        rows = ({"prompt": "", "completion": text, "label": True} for text in texts)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        save_whole_file(note, lambda path: path.write_text(json.dumps(wanted)))
    if not (folder / "run" / "result.json").exists():  # where the folder was moved since it isn't trained again
        train(
            TrainConfig(
                data=str(data), output=str(folder / "run"), loss="mle", model=str(start), steps=scale.steps,
                batch_size=scale.batch, max_length=scale.length, max_prompt_length=1, lr=scale.lr, schedule="cosine",
                bf16=device == "cuda", cpu=device == "cpu", save_steps=max(1, scale.steps // STAGES),
                keep_checkpoints=STAGES, log_steps=20, allow=True,
            )
        )  # fmt: skip
    saved = {int(path.name.partition("-")[2]): path for path in (folder / "run").glob("checkpoint-*")}
    return {0: start, **dict(sorted(saved.items())), scale.steps: folder / "run" / "model"}


def held_out_ids(tokenizer: Any, texts: list[str], tokens: int) -> Tensor:
    """Inputs and targets of so many tokens at most, in an even number of responses, [B, T + 1].

    Raises:
        ValueError: too little text.
    """
    length = min(LENGTH, tokens // 2)
    wanted, rows = tokens // (2 * length) * 2, []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        if len(ids) > length:
            rows.append(ids[: length + 1])
        if len(rows) == wanted:
            return torch.tensor(rows)
    raise ValueError(f"text: expected {wanted} held-out pieces of more than {length} tokens, got {len(rows)}")


@torch.no_grad()
def states_batch(folder: Path, tokenizer_folder: Path, texts: list[str], tokens: int, device: str) -> Batch:
    """States, head and targets of a model on the first of the texts that are long enough: a batch in bfloat16.

    What precedes a target is its response alone.

    Raises:
        ValueError: no model there, a head with more than a weight, or too little text for so many tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        what = "model: expected a folder with a transformers model and its tokenizer"
        raise ValueError(f"{what}, got {folder} ({' '.join(str(error).split())[:200]})") from error
    model = model.to(device).eval()
    head = read_head(model)
    if head.bias is not None or head.softcap is not None or head.scale != 1:
        raise ValueError(f"model: expected a head of a weight alone, got {type(model).__name__}'s")
    ids = held_out_ids(tokenizer, texts, tokens).to(device)
    hidden = torch.cat([hidden_states(model, part) for part in ids[:, :-1].split(16)])
    random = torch.Generator(device).manual_seed(0)
    return finished(hidden.bfloat16(), head.weight.detach().bfloat16().clone(), ids[:, 1:], random)

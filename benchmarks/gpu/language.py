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

from rgpb.bench.cases import EXACT_ROWS, Batch
from rgpb.data import train_tokenizer
from rgpb.head import LMHead
from rgpb.hf import hidden_states, read_head
from rgpb.reference import logits

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


class Corpus(NamedTuple):
    """Pieces of text, those of held-out files apart, and a digest of both."""

    train: list[str]
    held_out: list[str]
    digest: str


def read_corpus(places: tuple[Path, ...], most: int) -> Corpus:
    """At most `most` bytes of the files, an evenly spread part of them where there are more.

    Raises:
        ValueError: too little for both parts.
    """
    named = files(places)
    part = min(1.0, most / max(1, sum(path.stat().st_size for _, path in named)))
    made: tuple[list[str], list[str]] = ([], [])
    digest = hashlib.sha256()
    for name, path in named:
        drawn = zlib.crc32(name.encode())
        if drawn >= part * 2**32:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        digest.update(text.encode())
        made[drawn % HELD_OUT == 0].extend(pieces(text))
    if not all(made):
        raise ValueError(
            f"text: expected files of which one in {HELD_OUT}, by a hash of its name, is held out and others aren't, "
            f"got {len(named)} files with {len(made[0])} pieces to train on and {len(made[1])} held out"
        )
    return Corpus(*made, digest.hexdigest()[:16])


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


class Stage(NamedTuple):
    """A model on disk, and the optimizer steps that it has behind it; None for one that came from elsewhere."""

    folder: Path
    steps: int | None


def described(scale: Scale) -> str:
    """Model and training in a few words."""
    rows = f"{scale.steps} steps of {scale.batch} x {scale.length}"
    return f"{scale.layers} x {scale.width}, V = {scale.vocab}, {rows}, lr {scale.lr:g}"


def train_stages(folder: Path, corpus: Corpus, scale: Scale, tokens: int, device: str) -> list[Stage]:
    """Train in `folder`, or go on there; the model before and at `STAGES` stages of training.

    Raises:
        ValueError: an odd width; the folder belongs to another text or scale; or the held-out text has less than so
            many tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from rgpb.train import TrainConfig, train
    from rgpb.trainer import save_whole_file

    heads = max(1, scale.width // 64)
    if scale.width % (2 * heads):
        raise ValueError(
            f"shape: expected H a multiple of {2 * heads}, for {heads} heads of even size, got {scale.width}"
        )
    start, data, note = folder / "start", folder / "text.jsonl", folder / "scale.json"
    wanted = {**scale._asdict(), "corpus": corpus.digest}
    if note.exists() and json.loads(note.read_text()) != wanted:
        raise ValueError(f"out: expected a model of this text and scale in {folder}, got another; remove it")
    if not note.exists():
        tokenizer = train_tokenizer(corpus.train, scale.vocab)
        held_out_ids(tokenizer, corpus.held_out, tokens)  # what there is too little of is known before the training
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
        rows = ({"prompt": "", "completion": text, "label": True} for text in corpus.train)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        save_whole_file(note, lambda path: path.write_text(json.dumps(wanted)))
    every = max(1, scale.steps // STAGES)
    if (folder / "run" / "result.json").exists():  # also where the folder was moved since
        return stages_of(folder, scale)
    train(
        TrainConfig(
            data=str(data), output=str(folder / "run"), loss="mle", model=str(start), steps=scale.steps,
            batch_size=scale.batch, max_length=scale.length, max_prompt_length=1, lr=scale.lr,
            schedule="cosine", bf16=device == "cuda", cpu=device == "cpu", save_steps=every, keep_checkpoints=STAGES,
            log_steps=20,
        )
    )  # fmt: skip
    return stages_of(folder, scale)


def stages_of(folder: Path, scale: Scale) -> list[Stage]:
    """The models of a training that has ended."""
    saved = sorted((int(path.name.partition("-")[2]), path) for path in (folder / "run").glob("checkpoint-*"))
    stages = [Stage(path, steps) for steps, path in saved if steps < scale.steps]
    return [Stage(folder / "start", 0), *stages, Stage(folder / "run" / "model", scale.steps)]


def given_model(folder: Path) -> Stage:
    """A model and its tokenizer that are there already.

    Raises:
        ValueError: they aren't.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        if not folder.is_dir():
            raise OSError("there is no such folder")
        AutoConfig.from_pretrained(folder, local_files_only=True)
        AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model: expected a folder with a transformers model and its tokenizer, got {folder} ({what})"
        ) from error
    return Stage(folder, None)


def changed(folder: Path) -> str:
    """What tells this state of a folder from an earlier one."""
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()]
    return hashlib.sha256(repr(sorted(states)).encode()).hexdigest()[:16]


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

    What precedes a target is its response alone. The reference is the policy's own log-probabilities, perturbed, and
    labels alternate, as in the batches with random states.

    Raises:
        ValueError: a head with more than a weight, or too little text for so many tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model = model.to(device).eval()
    head = read_head(model)
    if head.bias is not None or head.softcap is not None or head.scale != 1:
        raise ValueError(f"model: expected a head of a weight alone, got {type(model).__name__}'s")
    ids = held_out_ids(tokenizer, texts, tokens).to(device)
    hidden = torch.cat([hidden_states(model, part) for part in ids[:, :-1].split(16)])
    hidden, weight, target = hidden.bfloat16(), head.weight.detach().bfloat16(), ids[:, 1:]
    logp = exact_logp(hidden, weight, target)
    random = torch.Generator(device).manual_seed(0)
    ref = (logp + 0.3 * torch.randn(target.shape, generator=random, device=device)).clamp(max=-1e-3).float()
    label = 1.0 - 2 * (torch.arange(len(target), device=device) % 2)
    return Batch(
        hidden.clone().requires_grad_(), weight.clone().requires_grad_(), target, label, ref, ref.new_zeros(0, 2), logp
    )


def exact_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log p of the targets in float64, in their shape."""
    head = LMHead(weight.double())
    rows = zip(hidden.flatten(0, 1).split(EXACT_ROWS), target.flatten().split(EXACT_ROWS))
    found = [logits(x.double(), head).log_softmax(-1).gather(-1, y[:, None])[:, 0] for x, y in rows]
    return torch.cat(found).view(target.shape)


def peakedness(batch: Batch) -> dict[str, Any]:
    """Perplexity of the targets, and the part of them that have more than nine tenths of the probability."""
    return {
        "perplexity": (-batch.logp).mean().exp().item(),
        "confident": (batch.logp > -0.10536).double().mean().item(),
    }

"""`rgpb evaluate`: loss, accuracies and log-probabilities of a model on held-out data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import rgpb
from rgpb import hf
from rgpb.train.command import described_losses
from rgpb.train.config import BUILT_IN, TrainConfig
from rgpb.train.evaluate import evaluate_set
from rgpb.train.files import write_json, write_text
from rgpb.train.flags import FIELDS, add_flags, settings_of
from rgpb.train.machine import check_devices, device_of, moved
from rgpb.train.models import check_tokens, family_of, fetched, load_model, load_tokenizer, reference_model
from rgpb.train.order import Order
from rgpb.train.ranks import processes
from rgpb.train.report import METRICS, counted, markdown, number, show
from rgpb.train.run import read_for, tokenised
from rgpb.train.teacher import References, weights_digest, weights_fingerprint
from rgpb.train.tokens import Collator, pad_of

# The flags, and what else they say here
FLAGS = {
    "output": "folder for evaluation.json and evaluation.md; default: the table is shown alone",
    "data": f"{FIELDS['data'].metadata['help']} (required)",
    "loss": "objective, or a weighted sum; default: bnf with --ref-model, mle without",
    "model": "folder of a model, a GGUF file, or the name of one on a hub (required)",
    "ref_model": "the same of the reference model, for losses that have one",
    "eval_rows": "evaluate on the first so many units; default: all",
    "batch_size": "groups, pairs, or responses of unpaired data, in a batch; default: 8",
    **dict.fromkeys(("seed", "cpu", "progress", "pairing", "max_length", "max_prompt_length", "truncation_side")),
    **dict.fromkeys(("packing", "allow", "loss_option", "ref_cache", "bf16", "dtype", "workspace")),
}


def add_parser(subparsers: Any) -> None:
    """`rgpb evaluate`, with the flags of `rgpb train` that have a meaning here."""
    parser = subparsers.add_parser(
        "evaluate",
        usage="rgpb evaluate --model MODEL --data DATA [flags]",
        help="loss, accuracies and log-probabilities of a model on held-out data",
        epilog=described_losses(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, FLAGS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command: evaluate, show the table, and write it with its JSON."""
    config = settings_of(arguments, output="", loss="", model="", only=FLAGS)
    if not config.model:
        raise ValueError("model: expected --model, or model in the file of --config; got neither")
    result = evaluate(config if config.loss else replace(config, loss="bnf" if config.ref_model else "mle"))
    rows = table(result)
    show(rows, title=f"{result['model']} on {result['data']}: {result['counts']['units']} units")
    if config.output:
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "evaluation.json", result)
        text = [
            f"# {result['model']}",
            "",
            *markdown(rows),
            "",
            f"Evaluated on {result['data']} with {result['loss']}.",
        ]
        write_text(folder / "evaluation.md", "\n".join([*text, f"Data: {counted(result['counts'])}.", ""]))
        print(f"written: {folder / 'evaluation.json'}, {folder / 'evaluation.md'}")
    return 0


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """The metrics with their titles, header first."""
    metrics = result["metrics"]
    return [["", "value"], *([title, number(metrics[name])] for name, title in METRICS.items() if name in metrics)]


def evaluate(config: TrainConfig) -> dict[str, Any]:
    """Loss and metrics of `config.model` on `config.data`, as a run evaluates: exact averages over all units.

    Returns:
        `model`, `ref_model`, `data`, `loss`, `options`; `counts` of the data; `metrics`, by the names that `fused_loss`
        gives them; `versions`.

    Raises:
        ValueError: settings, data or models that can't be used; a loss with a reference and no `ref_model`.
    """
    spec, options = config.check()
    if processes() > 1:
        raise ValueError(f"WORLD_SIZE: expected one process, since evaluation is not shared; got {processes()}")
    if config.model in BUILT_IN and not Path(config.model).is_dir():
        raise ValueError(f"model: expected one that was trained, got {config.model!r}, which would be new")
    if spec.ref is not None and config.ref_model is None:
        raise ValueError(f"ref_model: expected a model, since {spec.name} compares with a reference; got none")
    transformers.utils.logging.disable_progress_bar()
    preferences = read_for(config.data, spec, False)
    settings = fetched(config)
    family_of(settings)
    check_devices(settings)
    tokenizer = load_tokenizer(settings.model)
    data = tokenised(settings, spec, options, tokenizer, preferences)
    data = data if config.eval_rows is None else data.first(config.eval_rows)
    device = device_of(settings)
    model: Any = load_model(settings, settings.model)
    hf.check_head(model)
    check_tokens(model, config.model, [data])
    ref: Any = reference_model(settings)
    if ref is not None:
        check_tokens(ref, str(config.ref_model), [data])
        references = References(settings, weights_fingerprint(ref, weights_digest(ref)), pad_of(tokenizer))
        data = references.plan(data, Order(len(data), config.batch_size, None))
        if references.missing():
            references.model = moved(ref.requires_grad_(False), device)
        del ref
        references.ready()
    metrics, _ = evaluate_set(
        moved(model, device).eval(), data, spec, options, settings, collate=Collator(pad_of(tokenizer), config.packing),
        prepare=partial(_to, device), autocast=partial(torch.autocast, device.type, torch.bfloat16, config.bf16),
    )  # fmt: skip
    return {
        "model": config.model,
        "ref_model": config.ref_model,
        "data": config.data,
        "loss": spec.name,
        "options": options,
        "counts": data.counts,
        "metrics": metrics,
        "versions": {"rgpb": rgpb.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _to(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch, and the batches in it, on a device."""
    return {name: _to(device, x) if isinstance(x, Mapping) else x.to(device) for name, x in batch.items()}

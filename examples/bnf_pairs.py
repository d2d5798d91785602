"""BNF on pairs of a good and a bad response, in transformers' Trainer."""

import copy
import tempfile

import torch
from common import arguments, load, pairs
from common import stacked as collate
from transformers import Trainer, TrainingArguments

from rgpb import hf


class PreferenceTrainer(hf.PreferenceMixin, Trainer):
    """Counts pairs or responses over accumulated batches and ranks."""


def main(args):
    model, tokenizer = load(args.model)
    settings = TrainingArguments(
        tempfile.mkdtemp(),  # yours: a folder to keep
        max_steps=args.steps,
        learning_rate=args.lr,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def batches(rows):
        """BNF sees single responses: [chosen; rejected], and which of them are good."""
        return collate(rows, tokenizer) | {"label": torch.arange(2 * len(rows)) < len(rows)}

    reference = copy.deepcopy(model)  # the model before training
    trainer = PreferenceTrainer(
        model, settings, objective="bnf", ref=reference, train_dataset=pairs(), data_collator=batches
    )
    trainer.train()
    return [entry["rewards/margins"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    margins = main(arguments(batch=4, accumulate=2))
    print(f"BNF: reward of good less that of bad responses {margins[0]:.2f} → {margins[-1]:.2f}")

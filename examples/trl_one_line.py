"""BNF in TRL's DPOTrainer: one line is another."""

import tempfile

from common import arguments, load, pairs
from datasets import Dataset
from trl import DPOConfig

from rgpb.train.tokens import train_tokenizer
from rgpb.trl import PreferenceTrainer  # was: from trl import DPOTrainer


def main(args):
    model, tokenizer = load(args.model)
    if args.model is None:
        tokenizer = train_tokenizer(["a"], 258)
    settings = DPOConfig(
        tempfile.mkdtemp(),  # yours: a folder to keep
        loss_type="bnf",  # was: "sigmoid"
        precompute_ref_log_probs=True,
        max_steps=args.steps,
        learning_rate=args.lr,
        per_device_train_batch_size=args.batch,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=args.model is not None,
        dataloader_pin_memory=False,
    )
    names = "prompt", "chosen", "rejected"
    data = Dataset.from_list([dict(zip(names, row)) for row in pairs()])
    trainer = PreferenceTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return [entry["rewards/margins"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    margins = main(arguments(batch=4))
    print(f"BNF in TRL: reward of good less that of bad responses {margins[0]:.2f} → {margins[-1]:.2f}")

"""OnMC-PO: every few steps the model answers prompts, a function judges the answers, and the model learns from them.

`rgpb train --online` does it; a run that is broken off goes on with the same command.
"""

import json
import tempfile
from pathlib import Path

from common import arguments

from rgpb.train import TrainConfig, train


def reward(prompts, completions):
    """Yours: a reward model. Here: the part of a completion that is printable ASCII."""
    return [sum(" " <= letter <= "~" for letter in text) / max(len(text), 1) for text in completions]


def main(args):
    folder = Path(tempfile.mkdtemp())  # yours: a folder to keep
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{a} + 1 ="}) + "\n" for a in range(16)))
    config = TrainConfig(
        data=str(prompts),
        output=str(folder / "run"),
        model=args.model or "nano-llama",
        vocab_size=300,
        loss="mc_po",
        loss_option={"m": 2},
        online=True,
        candidates=args.k,
        refresh=2,
        max_new_tokens=8,
        steps=args.steps,
        batch_size=4,
        max_length=64,
        lr=args.lr,
        progress=False,
    )
    return train(config, reward=reward)


if __name__ == "__main__":
    result = main(arguments(steps=4, k=4))
    print(f"after {result['steps']} steps: loss {result['after']['loss']:.3f}")

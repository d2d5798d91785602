"""Training on preference data: `rgpb train`.

    data → tokens → (fine-tuning on the preferred) → training, reference scores ahead of it → metrics, model, report

Everything of a run lies in its output folder:

    run.json                 the settings; another run with other settings is refused
    metrics.jsonl            one line per log: "split" train or eval
    checkpoint-<step>/       model, optimizer, random states, metrics so far, and `progress.json`, written last:
                             a checkpoint without it is incomplete and not used; of several processes model and
                             optimizer lie in `dcp/`, and the folder is `checkpoint-<step>.tmp` until it is complete
    tokenizer/               where it was learnt from the data
    rollouts/                with `--online`: what was sampled, judged and trained on, round by round
    sft/                     the fine-tuning stage, a run of its own
    model/                   the trained model, or its adapters, and its tokenizer
    merged/                  with `--merge`: the model with the adapters added in
    result.json, report.md, report.png

The same command again goes on after the last complete checkpoint, and ends with the same weights as a run that was
never interrupted (bitwise on a CPU, on the same number of processes; on another to rounding).
"""

from rgpb.train.config import TrainConfig
from rgpb.train.run import train

__all__ = ["TrainConfig", "train"]

"""What the library does on a GPU, beside everything a user would run in its place: `python -m benchmarks.gpu --list`.

| module     | holds                                                                                 |
|------------|---------------------------------------------------------------------------------------|
| `smoke`    | what has to be right before anything is timed                                         |
| `card`     | ceilings; where the time of a call goes                                               |
| `journal`  | rows on disk, one line each: what is done, what is left; the JSON of a part           |
| `peers`    | who takes part: other libraries, where they are installed, beside naive and this one  |
| `calls`    | all of them on LM heads of known models; the longest batch; tuning                    |
| `kernels`  | each kernel against its roofline                                                      |
| `steps`    | whole training steps: time and memory                                                 |
| `skipping` | certified skipping, on a made-up distribution and on a trained model (`..language`)   |
| `verdict`  | what the results say, beside predictions and aims                                     |
| `cache`    | the kernels compiled where there is no GPU: `make gpu-cache`                           |

Contestants, checks and timing are those of `rgpb.bench`: nothing has a time unless the same call was right first.
Correctness at length is `pytest -m gpu`. `first_run.sh` does what fits into 500 seconds, in the order that matters.
"""

"""What the library does on a GPU, beside everything a user would run in its place: `python -m benchmarks.gpu --list`.

| module     | holds                                                                                                |
|------------|------------------------------------------------------------------------------------------------------|
| `journal`  | rows on disk, one line each; what is done, what is left; the JSON of a part                          |
| `lineup`   | the contestants: naive PyTorch, this library on each path, other libraries where they are installed  |
| `heads`    | the parts that time them on LM heads of known models                                                 |
| `correct`  | every loss, path and kernel against float64                                                          |
| `device`   | what the device can do, the longest batch, tuning                                                    |
| `roofline` | each kernel against its roofline; where a call's time goes                                           |
| `steps`    | whole training steps: time and memory; curves in bfloat16 beside float32                             |
| `skipping` | certified skipping, on a made-up distribution and on what a language model has learnt                |
| `language` | that model, and its text                                                                             |

With `--device cpu` the same contestants, as far as they run there, do the same jobs in float32.

No row of a contestant or kernel has a time unless the same call was right to the tolerance first; a profile only has
to be finite, and the bare products are the library's own.
"""

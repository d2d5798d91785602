"""transformers models: from a model and a batch to hidden states, head and aligned targets, without logits.

Dimensions: B responses, T positions of a padded batch, N of a packed one, H hidden size, V vocabulary.

A batch is what a transformers collator makes: a mapping with `input_ids`, `attention_mask` and `labels`, all
[B, T], the labels int64, −100 on prompt and padding and *not* shifted. Whatever else it holds goes to the
model by name (`position_ids`, `token_type_ids`, `decoder_input_ids`, ...).

A packed batch has no padding: `input_ids` [1, N], `labels` [1, N] and `cu_seqlens` [B + 1], the responses'
first positions and then N. `pack` makes one from a padded batch. transformers keeps packed responses apart by
the restarts in `position_ids` [1, N] (filled in where absent), where there is no attention mask and no cache.
With "sdpa" and "eager" attention it builds an [N, N] mask for that; flash attention needs none.

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> from rgpb import hf
>>> sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
>>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
>>> input_ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
>>> batch = {"input_ids": input_ids, "labels": input_ids.masked_fill(input_ids < 3, -100)}
>>> with torch.no_grad():
...     reference = hf.token_scores(model, batch)
>>> tuple(reference.logp.shape)
(2, 4)
>>> loss = hf.loss(model, batch, "dpo", ref=reference, beta=0.1)
>>> loss.backward()
>>> round(loss.item(), 4)
0.6931
"""

from rgpb.hf.batches import IGNORE, aligned_targets, pack
from rgpb.hf.checks import evaluating
from rgpb.hf.forward import loss, token_scores
from rgpb.hf.models import attach, check_head, hidden_states, read_head
from rgpb.hf.trainer import PreferenceMixin

__all__ = [
    "IGNORE",
    "PreferenceMixin",
    "aligned_targets",
    "attach",
    "check_head",
    "evaluating",
    "hidden_states",
    "loss",
    "pack",
    "read_head",
    "token_scores",
]

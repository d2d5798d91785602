"""What the examples share: the model that `--model` names, or a tiny one with random weights; batches of texts."""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TINY = {"vocab_size": 258, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
TINY |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


class Bytes:
    """The tokenizer of the tiny model: one token for each byte."""

    pad_token_id, eos_token_id = 0, 1

    def encode(self, text, add_special_tokens=True):
        return [2 + byte for byte in text.encode()]


def arguments(**more):
    """`--model`, `--steps`, `--lr`, and what an example adds by name and default."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="folder of a model; without it a tiny one with random weights is made")
    for name, default in {"steps": 12, "lr": 3e-3, **more}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=" ")
    return parser.parse_args()


def load(folder=None):
    """Model, without dropout, and tokenizer."""
    torch.manual_seed(0)
    if folder is None:
        return LlamaForCausalLM(LlamaConfig(**TINY)), Bytes()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def collate(responses, tokenizer):
    """[(prompt, response)] → input_ids, attention_mask, labels [B, T]: padded right, −100 where nothing is learnt."""
    encoded = [(tokenizer.encode(p), tokenizer.encode(r, add_special_tokens=False)) for p, r in responses]
    encoded = [(prompt, [*response, tokenizer.eos_token_id]) for prompt, response in encoded]
    longest = max(len(prompt) + len(response) for prompt, response in encoded)
    input_ids = torch.full((len(encoded), longest), tokenizer.pad_token_id or 0)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, (prompt, response) in enumerate(encoded):
        end = len(prompt) + len(response)
        input_ids[row, :end], mask[row, :end] = torch.tensor(prompt + response), 1
        labels[row, len(prompt) : end] = torch.tensor(response)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def pairs(count=16):
    """Sums with a right and a wrong answer: (prompt, chosen, rejected). Yours: a file of preferences."""
    return [(f"{i} + {i % 3} =", f" {i + i % 3}", f" {i + i % 3 + 1}") for i in range(count)]


def stacked(rows, tokenizer):
    """Pairs as the losses want them: all chosen, then all rejected."""
    return collate([(p, chosen) for p, chosen, _ in rows] + [(p, rejected) for p, _, rejected in rows], tokenizer)

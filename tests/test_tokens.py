"""Token ids of chats and strings against what templates and tokenizers give by themselves.

Templates have the structure of public families; tokenizers are learnt here, one of each kind.
"""

from __future__ import annotations

import functools
import json
import random

import pytest
import torch
from covering import covering
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rgpb.train import TrainConfig
from rgpb.train.rows import read_preferences, read_prompts
from rgpb.train.teacher import References, score_references
from rgpb.train.tokens import Collator, check_counts, prompt_tokens, tokenise, train_tokenizer, turn_end

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default-system": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe of help.<|im_end|>\n{% endif %}" + CHATML
    ),
    "marked": CHATML.replace(
        "{{ m['content'] }}<|im_end|>\n",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}",
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|stop|>\n\n{{ m['content'] | trim }}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
    ),
    "inst": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.system = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}"
        "{% elif m['role'] == 'user' %}[INST] {{ ns.system + m['content'] }} [/INST]{% set ns.system = '' %}"
        "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "inst-tight": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
        "{% else %}[INST]{{ m['content'] }}[/INST]{% endif %}{% endfor %}"
    ),
    "model-role": (
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "bars": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "no-header-of-its-own": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    ),
    "thinks": (  # writes the thoughts of the last turn alone
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n{{ m['reasoning_content'] or '' }}\n</think>\n\n"
        "{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "thinks-when-asked": (  # the generation prompt goes on where no chat does
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|Assistant|>"
        "{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% else %}<|User|>{{ m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}{{ {'user': 'USER', 'assistant': 'ASSISTANT'}.get(m['role'], 'SYSTEM') }}: "
        "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "sections": (
        "{% for m in messages %}### {{ m['role'] | capitalize }}:\n{{ m['content'] | trim }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
    ),
}  # fmt: skip
SPECIAL = [
    *("<s>", "</s>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "<lang>", "<end>", "<|im_start|>", "<|im_end|>"),
    *("<|start|>", "<|stop|>", "<|eot|>", "<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>", "<|end|>"),
]
WORDS = "the answer is twelve and not thirteen , play the playing game ? yes no 2 + 2 = 4 5 user assistant system"
TOKENIZERS = [
    *("bytes", "bytes-bos", "bytes-space", "metaspace-always", "metaspace-first", "metaspace-never", "prepended"),
    *("wordpiece", "several-around"),
]


@functools.cache
def learnt(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of that kind, without a template."""
    corpus = [WORDS, WORDS.title(), "[INST] <<SYS>> ### USER: ASSISTANT: \n\n é 漢 </think> <think>"] * 3
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.NFC(), pre_tokenizers.BertPreTokenizer()
        learner = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    else:
        made = Tokenizer(models.BPE(byte_fallback=not kind.startswith(("bytes", "several")), unk_token=None))
        alphabet = []
        if kind.startswith("metaspace"):
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind.partition("-")[2])
            made.decoder = decoders.Metaspace(prepend_scheme=kind.partition("-")[2])
        elif kind == "prepended":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes-space")
            made.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
        learner = trainers.BpeTrainer(
            vocab_size=500, special_tokens=[*SPECIAL, *(f"<0x{i:02X}>" for i in range(256) if not alphabet)],
            initial_alphabet=alphabet, show_progress=False,
        )  # fmt: skip
    made.train_from_iterator(corpus, learner)
    around = {"bytes-bos": "<s> $A", "metaspace-always": "<s> $A", "wordpiece": "[CLS] $A [SEP]"}
    around |= {"several-around": "<s> <lang> $A </s> <end>"}
    if kind in around:
        names = [name for name in around[kind].split() if name != "$A"]
        made.post_processor = processors.TemplateProcessing(
            single=around[kind], special_tokens=[(name, made.token_to_id(name)) for name in names]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="[PAD]")


def of(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of that kind with that template."""
    tokenizer = learnt(kind)
    tokenizer.chat_template = None if template is None else TEMPLATES.get(template, template)
    return tokenizer


def said(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


LONG = "the answer is twelve and not thirteen, play the playing game? " * 3
CHATS = {
    "turn": [said("user", LONG)],
    "turns": [said("user", "2 + 2 = ?"), said("assistant", "4, yes"), said("user", LONG), said("assistant", "no"),
              said("user", "and 漢 ?")],
    "system": [said("system", "be the system"), said("user", LONG)],
}  # fmt: skip
ANSWERS = {
    "words": ([said("assistant", "twelve é")], [said("assistant", "not the answer at all, no")]),
    "turns": (
        [said("assistant", " yes "), said("user", "is it?"), said("assistant", "it is")],
        [said("assistant", "5")],
    ),
    "thoughts": ([said("assistant", "4", reasoning_content="2 + 2")], [said("assistant", "</think>5")]),
}
CUTS = {
    "none": (4096, None, "left"),
    "left": (80, 40, "left"),
    "right": (80, 40, "right"),
    "response": (66, 60, "left"),
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids_of(tokenizer, chat, **more):
    return list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **more))


def shortened(chat, letters, side):
    """A chat without so many letters of what isn't the system's, from that side."""
    turns = [dict(turn) for turn in chat]
    for turn in turns if side == "left" else turns[::-1]:
        if turn["role"] != "system":
            gone = min(letters, len(turn["content"]))
            text, letters = turn["content"], letters - gone
            turn["content"] = text[gone:] if side == "left" else text[: len(text) - gone]
    return turns


ROWS = covering(2, template=TEMPLATES, kind=TOKENIZERS, chat=CHATS, answer=ANSWERS, cut=CUTS)


@pytest.mark.parametrize(
    ("template", "kind", "chat", "answer", "cut"), random.Random(1).sample(ROWS, 600) if len(ROWS) > 600 else ROWS
)
def test_chats_have_the_ids_of_their_template(tmp_path, template, kind, chat, answer, cut):
    """Of all of prompt and response, cut or not, and the same prompt online."""
    tokenizer, prompt, answers = of(kind, template), CHATS[chat], ANSWERS[answer]
    max_length, most, side = CUTS[cut]
    path = write(tmp_path / "d.jsonl", {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    options = {"max_length": max_length, "max_prompt_length": most, "truncation_side": side}
    try:
        data = tokenise(read_preferences(path), tokenizer, **options)
    except ValueError as error:  # nothing that may be cut makes the prompt short enough
        assert "got nothing; " in str(error)  # noqa: PT017
        assert cut != "none"
        emptied = ids_of(tokenizer, shortened(prompt, 10**6, side), add_generation_prompt=True)
        assert len(emptied) > most
        assert len(ids_of(tokenizer, prompt, add_generation_prompt=True)) >= max_length
        return
    letters = sum(len(turn["content"]) for turn in prompt) if cut != "none" else 0
    got = [response.tokens.tolist() for response in data[0]]

    def wanted(gone, a):
        return ids_of(tokenizer, [*shortened(prompt, gone, side), *a])[:max_length]

    gone = next((n for n in range(letters + 1) if wanted(n, answers[0]) == got[0]), None)
    assert gone is not None, "not the ids of the template"
    assert wanted(gone, answers[1]) == got[1]
    assert (gone > 0) == (data.counts["prompts cut"] > 0)
    assert not gone or max(len(ids_of(tokenizer, [*prompt, *a])) for a in answers) > max_length
    left = shortened(prompt, gone, side)
    asked = ids_of(tokenizer, left, add_generation_prompt=True)
    bare = tokenizer.apply_chat_template(left, tokenize=False, add_generation_prompt=True)
    for response, a in zip(data[0], answers):
        text = tokenizer.apply_chat_template([*left, *a], tokenize=False)
        shared = next((i for i, (x, y) in enumerate(zip(bare, text)) if x != y), len(bare))
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if response.targets is None:
            assert all(end <= shared for _, end in found[: response.prompt])
            assert response.prompt >= len(response.tokens) or found[response.prompt][1] > shared
        if response.tokens[: len(asked)].tolist() == asked and response.targets is None:
            assert response.prompt == len(asked)
    online, _ = prompt_tokens(read_prompts(path).rows, tokenizer, 4096)
    assert online == [ids_of(tokenizer, prompt, add_generation_prompt=True)]


STRINGS = {
    "space": ("2 + 2 =", " 4", " 5"),
    "none": ("the answer is:", "twelve", "Thirteen"),
    "word": ("the answer is play", "ing", " the game"),
    "behind-space": ("the answer ", "is é", "yes"),
    "lines": ("2 + 2\n", "\n4", "= 4\n\n"),
    "empty": ("", "the answer", "no"),
    "long": (LONG, " twelve", " not the answer at all, no"),
}


@pytest.mark.parametrize(("kind", "row", "cut"), covering(2, kind=TOKENIZERS, row=STRINGS, cut=CUTS))
def test_strings_have_the_ids_of_the_tokenizer(tmp_path, kind, row, cut):
    tokenizer, (prompt, *answers) = of(kind), STRINGS[row]
    max_length, most, side = CUTS[cut]
    if cut != "none":
        max_length, most = 20, 10
    path = write(tmp_path / "d.jsonl", {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    data = tokenise(
        read_preferences(path), tokenizer, max_length=max_length, max_prompt_length=most, truncation_side=side
    )
    whole, inner = tokenizer(prompt)["input_ids"], tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for response, answer in zip(data[0], answers):
        tokens, start = response.tokens.tolist(), response.prompt
        if cut == "none" or len(whole) + max(len(r.tokens) - r.prompt for r in data[0]) <= max_length:
            assert tokens[:start] == (whole or [tokenizer.eos_token_id])
        else:
            first = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
            head, tail = whole[:first], whole[first + len(inner) :]
            assert tokens[: len(head)] == head
            assert tokens[start - len(tail) : start] == tail
            kept = tokens[len(head) : start - len(tail)]
            assert kept == (inner[len(inner) - len(kept) :] if side == "left" else inner[: len(kept)])
            assert most <= start < len(whole)
        if len(tokens) < max_length:
            assert tokens[-1] == tokenizer.eos_token_id
            assert tokens[-2] != tokenizer.eos_token_id
            text = "".join(tokenizer.convert_ids_to_tokens(tokens[start:-1]))
            if kind.startswith(("metaspace", "prepended")):
                assert text.replace("▁", " ").replace("<0x0A>", "\n").replace("<0xC3><0xA9>", "é") == answer
            elif kind != "wordpiece":
                assert tokenizer.decode(tokens[start:-1], clean_up_tokenization_spaces=False) == answer
            else:
                assert tokens[start:-1] == tokenizer(answer, add_special_tokens=False)["input_ids"]


def test_a_string_that_ends_itself_has_one_end(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "2", "chosen": " 4</s>", "rejected": " 5"})
    chosen, rejected = tokenise(read_preferences(path), of("bytes"))[0]
    assert [response.tokens.tolist().count(1) for response in (chosen, rejected)] == [1, 1]


class TestBeside:
    """What messages hold beside role and content."""

    CALL = said(
        "assistant", "", tool_calls=[{"type": "function", "function": {"name": "look", "arguments": {"at": "é"}}}]
    )
    CALLS = CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}{% endfor %}",
    )
    TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    TWO = said("assistant", "", tool_calls=[{"name": "look"}, {"name": "find"}])
    FIRST = CHATML.replace("{{ m['content'] }}", "{{ m.tool_calls[0].name if m.tool_calls else m['content'] }}")
    PARTS = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% endif %}",
    )

    def data(self, tmp_path, template, row, **options):
        row = {"prompt": CHATS["turn"], "chosen": ANSWERS["words"][0], "rejected": ANSWERS["words"][1], **row}
        return tokenise(read_preferences(write(tmp_path / "d.jsonl", row)), of("bytes", template), **options)

    def test_calls_and_tools_reach_the_template(self, tmp_path):
        tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
        for given in (tools, json.dumps(tools)):
            data = self.data(tmp_path, self.TOOLS + self.CALLS, {"chosen": [self.CALL], "tools": given})
            for response, answer in zip(data[0], (self.CALL, ANSWERS["words"][1][0])):
                wanted = ids_of(of("bytes", self.TOOLS + self.CALLS), [*CHATS["turn"], answer], tools=tools)
                assert response.tokens.tolist() == wanted

    @pytest.mark.parametrize(
        ("row", "template", "message"),
        [
            ({"chosen": [CALL]}, CHATML, "tool_calls: expected a chat template that shows them"),
            ({"tools": [{"name": "look"}]}, CHATML, "tools: expected a chat template that shows them"),
            ({"tools": "look"}, CHATML, "tools: expected a list of objects, got 'look'"),
            ({"chat_template_kwargs": {"tokenize": 0}}, CHATML, "chat_template_kwargs: expected an object of other"),
            ({"chosen": [said("assistant", [{"type": "text", "text": "a"}])]}, CHATML, "takes lists of parts, got one"),
            ({"chosen": [said("assistant", [{"type": "image"}])]}, CHATML, "chosen: expected parts of text"),
            ({"chosen": [said("assistant", "")]}, CHATML, "chosen: expected some text"),
            ({"chosen": [said("assistant", "", name="b")]}, CHATML, "expected a response with something that"),
            ({"chosen": [said("assistant", " \n")]}, TEMPLATES["headers"], "expected a response with something that"),
            ({"chosen": [said("assistant", [{"type": "text", "text": ""}])]}, PARTS, "expected a response with"),
            ({"chosen": [TWO]}, FIRST, "tool_calls: expected a chat template that .* leaves out .*'find'"),
            ({"chosen": [TWO]}, FIRST.replace("[0]", "[-1]"), "tool_calls: expected .* leaves out .*'look'"),
            ({"chosen": [{"role": "assistant", "content": None}]}, CHATML, "chosen: expected a string or a list of"),
            ({}, "{{ raise_exception('never') }}", "expected a chat that the template takes, got TemplateError: never"),
            ({"chosen": [{**CALL, "content": None}]}, "{{ '-' + messages[-1].content }}", "TypeError.* has no content"),
            ({}, "{{ messages[7].content.x }}", "expected a chat that the template takes, got UndefinedError"),
            ({}, CHATML.replace("{% for", "{{ messages | length }}{% for"), "template that leaves the prompt as it is"),
        ],
    )  # fmt: skip
    def test_refused_by_file_and_line(self, tmp_path, row, template, message):
        with pytest.raises(ValueError, match=rf"d\.jsonl:1: .*{message}"):
            self.data(tmp_path, template, row)

    def test_what_a_template_leaves_out_is_counted(self, tmp_path):
        data = self.data(tmp_path, CHATML, {"chosen": [said("assistant", "a", name="b", id=3)]})
        assert data.counts["rows with name of messages left out by the template"] == 1
        with pytest.raises(ValueError, match="half of the rows affected, got rows with id of messages .*1 of 1"):
            check_counts("d", data.counts)

    def test_what_is_false_is_something(self, tmp_path):
        """As where a weight of 0 says that a turn isn't trained on."""
        for value, count in ((0, 1), (False, 1), ("", 0), (None, 0)):
            data = self.data(tmp_path, CHATML, {"chosen": [said("assistant", "a", weight=value)]})
            assert data.counts.get("rows with weight of messages left out by the template", 0) == count

    def test_content_beside_a_call(self, tmp_path):
        name = "rows with content beside tool_calls left out by the template"
        for template, count in ((self.FIRST, 1), (self.CALLS, 0)):
            data = self.data(tmp_path, template, {"chosen": [{**self.CALL, "content": "I look."}]})
            assert data.counts.get(name, 0) == count

    @pytest.mark.parametrize("template", ["chatml", "marked"])
    def test_turns_of_others_in_a_response(self, tmp_path, template):
        """Counted where the template doesn't say that they aren't trained on."""
        row = {"chosen": ANSWERS["turns"][0], "rejected": [said("bot", "no"), said("assistant", "yes")]}
        counts = self.data(tmp_path, TEMPLATES[template], row).counts
        found = {name: count for name, count in counts.items() if name.endswith("trained on")}
        each = {f"responses with turns of {role}, trained on": 1 for role in ("user", "bot")}
        assert found == ({} if template == "marked" else each)

    @pytest.mark.parametrize("role", ["system", "tool"])
    def test_turns_that_a_template_leaves_out_are_counted(self, tmp_path, role):
        row = {"prompt": [said("user", "a"), said("assistant", "b"), said(role, "c"), said("user", "d")]}
        name = f"rows with turns of {role} left out by the template"
        data = self.data(tmp_path, CHATML.replace("in messages", f"in messages if m.role != '{role}'"), row)
        assert data.counts[name] == 1
        assert name not in self.data(tmp_path, CHATML, row).counts

    def test_a_content_of_null(self, tmp_path):
        call = {**self.CALL, "content": None}
        with pytest.raises(ValueError, match=r"d\.jsonl:1: content: expected a chat template that takes null, got one"):
            self.data(tmp_path, self.CALLS, {"chosen": [call]})
        template = self.CALLS.replace("m['content']", "m['content'] or ''")
        data, tokenizer = self.data(tmp_path, template, {"chosen": [call]}), of("bytes", template)
        assert data[0][0].tokens.tolist() == ids_of(tokenizer, [*CHATS["turn"], call])

    def test_a_template_of_its_own_name_for_options(self, tmp_path):
        template = "{{ mood }}" + CHATML
        data = self.data(tmp_path, template, {"chat_template_kwargs": {"mood": "glad"}, "prompt": [said("user", "x")]})
        assert of("bytes", template).decode(data[0][0].tokens).startswith("glad<|im_start|>")

    def test_parts_of_text(self, tmp_path):
        data = self.data(tmp_path, self.PARTS, {"chosen": [said("assistant", [{"type": "text", "text": "parts"}])]})
        assert of("bytes", self.PARTS).decode(data[0][0].tokens).endswith("parts<|im_end|>\n")
        assert data.counts["rows with an empty prompt"] == 0
        nothing = {"prompt": [said("user", [{"type": "text", "text": ""}])]}
        assert self.data(tmp_path, self.PARTS, nothing).counts["rows with an empty prompt"] == 1


class TestMarked:
    """Templates that say what the assistant wrote."""

    def data(self, tmp_path):
        answers = ANSWERS["turns"]
        row = {"prompt": CHATS["turns"], "chosen": answers[0], "rejected": answers[1]}
        path = write(tmp_path / "d.jsonl", row, {**row, "prompt": CHATS["turn"]})
        return tokenise(read_preferences(path), of("bytes", "marked"))

    def test_targets_are_what_is_marked_of_the_response(self, tmp_path):
        data, tokenizer = self.data(tmp_path), of("bytes", "marked")
        wanted = [" yes <|im_end|>it is<|im_end|>", "5<|im_end|>"]
        assert [tokenizer.decode(r.tokens[r.targets]) for r in data[0]] == wanted
        for packing in (False, True):
            batch = Collator(0, packing)([data[0], data[1]])
            texts = tokenizer.decode(batch["labels"][batch["labels"] >= 0])
            assert texts == wanted[0] * 2 + wanted[1] * 2
        one, other = data.fingerprint(), data._with(targets=torch.ones_like(data.targets)).fingerprint()
        assert one != other

    def test_cached_references_are_those_of_the_marks(self, tmp_path):
        """The same tokens, of which another template marks others, don't find the scores of the first."""
        data = self.data(tmp_path)
        every = torch.arange(len(data.tokens)) - data.starts[:-1].repeat_interleave(data.lengths())
        both = (data, data._with(targets=every >= data.prompts.repeat_interleave(data.lengths())))
        config = TrainConfig(data="d", output="o", ref_cache=str(tmp_path / "cache"), cpu=True, progress=False)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=int(data.tokens.max()) + 1, **sizes))
        for marked in both:
            references = References(config, "weights", 0)
            references.model = model
            scored = references.plan(marked, [range(len(marked))])
            references.ready()
            torch.testing.assert_close(scored.ref.logp, score_references(model, marked, pad=0, batch_size=32).logp)

    def test_a_generation_prompt_that_no_chat_has(self, tmp_path):
        """The marks say where the response begins, behind what the assistant said before."""
        thinking = TEMPLATES["marked"].replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
        row = {"prompt": CHATS["turns"], "chosen": ANSWERS["turns"][0], "rejected": ANSWERS["turns"][1]}
        tokenizer = of("bytes", thinking)
        unit = tokenise(read_preferences(write(tmp_path / "d.jsonl", row)), tokenizer)[0]
        targets = [r.tokens[r.prompt :] if r.targets is None else r.tokens[r.targets] for r in unit]
        assert [tokenizer.decode(each) for each in targets] == [" yes <|im_end|>it is<|im_end|>", "5<|im_end|>"]

    @pytest.mark.parametrize("kind", ["trimmed", "wordpiece", "metaspace-always", "bytes"])
    @pytest.mark.parametrize("inside", ["{{ m['content'] }}<|im_end|>", "{{ m['content'] }}"])
    def test_marks_that_begin_or_end_with_a_space(self, tmp_path, kind, inside):
        """Which is a letter of no token where it is dropped, or left out of the offsets."""
        tokenizer = of("bytes" if kind == "trimmed" else kind)
        if kind == "trimmed":
            own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            own.post_processor = processors.ByteLevel(trim_offsets=True)
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>")
        end = "<|im_end|>" if inside.endswith("<|im_end|>") else ""
        marked = "{% generation %}" + inside + "{% endgeneration %}" + ("" if end else "<|im_end|>")
        tokenizer.chat_template = TEMPLATES["marked"].replace(
            "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}", marked
        )
        prompt = [said("user", "2"), said("assistant", " no "), said("user", "so ?")]
        answer = [said("assistant", " yes"), said("user", "is it ?"), said("assistant", " 4 ")]
        path = write(tmp_path / "d.jsonl", {"prompt": prompt, "chosen": answer, "rejected": [said("assistant", "5")]})
        chosen = tokenise(read_preferences(path), tokenizer)[0][0]
        text = tokenizer.decode(chosen.tokens[chosen.targets]).replace(" ", "")
        assert text == f"yes{end}4{end}"

    @pytest.mark.parametrize("first", [0, 1])
    def test_each_row_has_the_template_of_its_tools(self, tmp_path, first):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=of("bytes").backend_tokenizer, eos_token="</s>")
        tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + TEMPLATES["marked"]}
        plain = {"prompt": CHATS["turn"], "chosen": ANSWERS["turns"][0], "rejected": ANSWERS["turns"][1]}
        rows = [plain, {**plain, "tools": [{"name": "look"}]}]
        data = tokenise(read_preferences(write(tmp_path / "d.jsonl", *(rows[first:] + rows[:first]))), tokenizer)
        said_so = [data[(place - first) % 2][0] for place in range(2)]
        texts = [tokenizer.decode(r.tokens[r.prompt :] if r.targets is None else r.tokens[r.targets]) for r in said_so]
        turns = " yes <|im_end|>\n<|im_start|>user\nis it?<|im_end|>\n<|im_start|>assistant\nit is<|im_end|>"
        assert texts[0] == turns + "\n"
        assert texts[1] == " yes <|im_end|>it is<|im_end|>"

    def test_a_prompt_that_changes_when_the_response_follows_is_refused(self, tmp_path):
        """Also where the marks say where the response begins."""
        template = "{{ messages | length }}" + TEMPLATES["marked"]
        row = {"prompt": CHATS["turn"], "chosen": ANSWERS["words"][0], "rejected": ANSWERS["words"][1]}
        with pytest.raises(ValueError, match=r"d\.jsonl:1: expected a chat template that leaves the prompt as it is"):
            tokenise(read_preferences(write(tmp_path / "d.jsonl", row)), of("bytes", template))

    def test_a_unit_of_which_one_response_has_nothing_left(self, tmp_path):
        late = [said("tool", LONG * 2), said("assistant", "late")]
        row = {"prompt": [said("user", "2")], "chosen": [said("assistant", "4")], "rejected": [said("assistant", "5")]}
        path = write(tmp_path / "d.jsonl", row, {**row, "rejected": late}, {**row, "chosen": late})
        data = tokenise(read_preferences(path), of("bytes", "marked"), max_length=60)
        assert len(data) == 1
        assert data.counts["units left out, prompt fills max_length"] == 2

    def test_mismatched_completions_keep_their_marks(self, tmp_path):
        data, tokenizer = self.data(tmp_path), of("bytes", "marked")
        other = data.mismatched(4096)
        assert [tokenizer.decode(r.tokens[r.targets]) for (r,) in other] == [
            " yes <|im_end|>it is<|im_end|>", " yes <|im_end|>it is<|im_end|>",
            " yes <|im_end|>it is<|im_end|>", " yes <|im_end|>it is<|im_end|>",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("chatml", "<|im_end|>"), ("marked", "<|im_end|>"), ("headers", "<|eot|>"), ("inst", None), ("bars", "</s>"),
        ("inst-tight", "</s>"), ("model-role", "<end_of_turn>"), ("thinks", "<|im_end|>"), ("sections", None),
    ],
)  # fmt: skip
def test_how_a_turn_ends(tmp_path, template, end):
    row = read_prompts(write(tmp_path / "d.jsonl", {"prompt": CHATS["turn"]})).rows[0]
    found = turn_end(row, of("bytes", template))
    assert found == (None if end is None else of("bytes").convert_tokens_to_ids(end))
    assert turn_end(row._replace(prompt="a string"), of("bytes", template)) is None


class TestCounts:
    ROW = {"prompt": "2 +", "chosen": " 4", "rejected": " 5"}  # noqa: RUF012

    def counts(self, tmp_path, *rows, **options):
        found = read_preferences(write(tmp_path / "d.jsonl", *rows))
        return tokenise(found, train_tokenizer(["a"], 258), **options).counts

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"prompt": ""}, "rows with an empty prompt"),
            ({"rejected": " 4"}, "units of equal responses"),
            ({"prompt": "2 + " * 9}, "prompts cut"),
            ({"chosen": " 4 " * 20}, "responses cut to max_length"),
            ({"chosen": "2 + 4", "rejected": "2 + 5"}, "rows with responses that begin with the prompt"),
            ({"chosen": '[{"role": "assistant"}]'}, "rows with chats spelt out in a string"),
            ({"prompt": "[{'content': 'a'}]"}, "rows with chats spelt out in a string"),
            ({"score_chosen": 1, "score_rejected": 1}, "rows with a score_chosen that is the score_rejected"),
            ({"score_chosen": 1, "score_rejected": 2}, "rows with a score_chosen below the score_rejected"),
        ],
    )
    def test_each(self, tmp_path, change, name):
        beside = {"score_chosen": 2, "score_rejected": 1} if "score_chosen" in change else {}
        counts = self.counts(tmp_path, {**self.ROW, **beside}, {**self.ROW, **change}, max_length=30)
        assert counts[name] == 1
        check_counts("d", counts)
        rows = [{**self.ROW, **change}] * 2
        if name.startswith("responses"):
            rows = [{**each, "rejected": each["chosen"] + "x"} for each in rows]
        with pytest.raises(ValueError, match=f"d: expected at most half of the .* affected, got {name}"):
            check_counts("d", self.counts(tmp_path, *rows, max_length=30))

    def test_what_is_left_out_is_a_part_of_all(self, tmp_path):
        """Rows without a response are no rows of the data any more; nor are tied responses of groups."""
        whole = {"chosen": "2 +\n\nAssistant: 4", "rejected": "2 +\n\nAssistant: 5"}
        empty = {**whole, "rejected": "2 +\n\nAssistant:"}
        check_counts("d", self.counts(tmp_path, *[whole] * 3, *[empty] * 2))
        with pytest.raises(ValueError, match="rows left out, an empty response: 3 of 5"):
            check_counts("d", self.counts(tmp_path, *[whole] * 2, *[empty] * 3))
        for rewards, fine in (([1, 1, 1, 0], True), ([1, 1, 1, 1, 0], False)):
            row = {"prompt": "2 +", "completions": [f" {k}" for k in range(len(rewards))], "rewards": rewards}
            found = read_preferences(write(tmp_path / "d.jsonl", row))
            data = tokenise(found, train_tokenizer(["a"], 258), pairing="groups").without_tied_best()
            assert data.counts["responses"] == int((data.units >= 0).sum())
            if fine:
                check_counts("d", data.counts)
                continue
            with pytest.raises(ValueError, match="responses left out, as good as the best: 3 of 5"):
                check_counts("d", data.counts)

    def test_a_prompt_is_cut_no_more_than_has_to_be(self, tmp_path):
        row = {"prompt": "0123456789" * 3, "chosen": "ab", "rejected": "abcd"}
        found, tokenizer = read_preferences(write(tmp_path / "d.jsonl", row)), train_tokenizer(["a"], 258)
        for side, prompt in (("left", "567890123456789"), ("right", "012345678901234")):
            unit = tokenise(found, tokenizer, max_length=20, truncation_side=side)[0]
            assert [tokenizer.decode(r.tokens) for r in unit] == [f"{prompt}{a}<|endoftext|>" for a in ("ab", "abcd")]

    @pytest.mark.parametrize(("template", "count"), [("chatml", 0), ("inst", 0), ("sections", 2)])
    def test_responses_that_nothing_ends(self, tmp_path, template, count):
        row = {"prompt": CHATS["turn"], "chosen": ANSWERS["words"][0], "rejected": ANSWERS["words"][1]}
        counts = tokenise(read_preferences(write(tmp_path / "d.jsonl", row)), of("bytes", template)).counts
        assert counts["responses that nothing ends, as the chat template writes them"] == count
        check_counts("d", counts)

    def test_labels_of_one_class(self, tmp_path):
        good, bad = ({"prompt": "2 +", "completion": " 4", "label": label} for label in ("good", "bad"))
        assert self.counts(tmp_path, good, bad)["units of the only label"] == 0
        counts = self.counts(tmp_path, bad, bad)
        assert counts["units of the only label"] == 2
        with pytest.raises(ValueError, match="units of the only label"):
            check_counts("d", counts)
        check_counts("d", counts, ("units of the only label",))

    def test_what_was_read_and_what_not(self, tmp_path):
        counts = self.counts(tmp_path, {**self.ROW, "id": 3, "why": None})
        assert counts["rows read as prompt, chosen, rejected"] == 1
        assert counts["columns left unread (id, why)"] == 2


def test_prompts_that_cannot_be_cut(tmp_path):
    """There is nothing but what the system says and the template writes."""
    path = write(tmp_path / "d.jsonl", {"prompt": [said("system", LONG)]}, {"prompt": [said("user", LONG)]})
    tokenizer = of("bytes", "chatml")
    assert prompt_tokens(read_prompts(path).rows, tokenizer, 40)[0][0] is None
    (_, ids), cut = prompt_tokens(read_prompts(path).rows, tokenizer, 40)
    assert (cut, 35 < len(ids) <= 40) == (1, True)
    assert tokenizer.decode(ids).startswith("<|im_start|>user\n")
    assert tokenizer.decode(ids).endswith("game? <|im_end|>\n<|im_start|>assistant\n")

"""Layouts: the keys by which files of preferences go, and how a record of each becomes a row.

The first whose keys a record has, none of them null, is taken; the three of `FORMS` come before all others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Text = str | list[dict[str, Any]]

TEMPLATE = ("tools", "chat_template_kwargs")  # what a row of chats gives to the template beside its messages
RESERVED = {"messages", "conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"}
RESERVED |= {"tools", "return_assistant_tokens_mask", "tokenizer_kwargs", "padding", "truncation", "return_tensors"}
RESERVED |= {"max_length", "chat_template"}

GOOD = ("good", "chosen", "desirable", "true", "1", "+1")
BAD = ("bad", "rejected", "undesirable", "false", "0", "-1")
SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}  # roles by other names
SPELT_CHAT = re.compile(r"\s*\[\s*\{\s*['\"](role|from|content|value)['\"]\s*:")  # as JSON, or as Python shows it
ANTHROPIC = "\n\nAssistant:"  # where the last turn of a dialogue in one string begins


class Row(NamedTuple):
    """One line of a file.

    Attributes:
        where: file and line, for messages.
        prompt: a string, or a chat.
        completions: the responses, as many as `rewards`.
        rewards: higher is better: (1, 0) of a pair, (±1,) of a labelled response.
        template: what a chat's template gets beside the messages, such as `tools`; None: nothing.
    """

    where: str
    prompt: Text
    completions: tuple[Text, ...]
    rewards: tuple[float, ...]
    template: dict[str, Any] | None = None


class Preferences(NamedTuple):
    """A file of preferences.

    Attributes:
        source: the path.
        form: a key of `FORMS`.
        rows: at least one.
        layout: the keys that were read, and whether texts are chats.
        unread: the other keys.
        notes: how many rows have which peculiarity.
    """

    source: str
    form: str
    rows: list[Row]
    layout: str = ""
    unread: tuple[str, ...] = ()
    notes: dict[str, int] = {}  # noqa: RUF012


class Found(NamedTuple):
    """What a record says, before texts are looked at.

    Attributes:
        prompt: None where each of the texts begins with it.
        texts: responses by the key that messages name.
        rewards: one per text.
    """

    prompt: Any
    texts: dict[str, Any]
    rewards: Sequence[float]


class Layout(NamedTuple):
    """Keys and what they mean.

    Attributes:
        form: a key of `FORMS`.
        keys: what a record must have, none of them null.
        read: (where, record) → what it says.
        merged: rows are of one response each; those of the same prompt become one.
        replies: responses to a chat may be strings.
        absent: keys a record must not have.
    """

    form: str
    keys: tuple[str, ...]
    read: Callable[[str, dict[str, Any]], Found]
    merged: bool = False
    replies: bool = False
    absent: tuple[str, ...] = ()


def shown(value: Any) -> str:
    """A value as it stands in a message: 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def described(error: Exception) -> str:
    """An exception of another library in one line: 300 characters at most."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 300 else text[:297] + "…"


def common(*texts: str) -> int:
    """How many first letters all texts share."""
    low, high = 0, min(map(len, texts))
    while low < high:
        middle = (low + high + 1) // 2
        if all(text[:middle] == texts[0][:middle] for text in texts):
            low = middle
        else:
            high = middle - 1
    return low


def number(where: str, key: str, value: Any) -> float:
    """A finite number, or refused."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError(f"{where}: {key}: expected a finite number, got {shown(value)}")
    return float(value)


def _label(where: str, key: str, value: Any) -> float:
    if isinstance(value, str) and value.lower() in GOOD + BAD:
        return 1.0 if value.lower() in GOOD else -1.0
    if not isinstance(value, bool | int | float) or value not in (True, False, -1):
        raise ValueError(f"{where}: {key}: expected true, false, 0, 1, -1, good or bad, got {shown(value)}")
    return 1.0 if value > 0 else -1.0


def _pair(prompt: str | None, chosen: str, rejected: str) -> Callable[[str, dict[str, Any]], Found]:
    def read(where: str, record: dict[str, Any]) -> Found:
        of = None if prompt is None else record[prompt]
        return Found(of, {chosen: record[chosen], rejected: record[rejected]}, (1.0, 0.0))

    return read


def _after_messages(where: str, record: dict[str, Any]) -> Found:
    """Messages that are the prompt; or a copy of one of the chats, which then say all."""
    texts = {key: record[key] for key in ("chosen", "rejected")}
    return Found(None if record["messages"] in texts.values() else record["messages"], texts, (1.0, 0.0))


def _string(where: str, record: dict[str, Any], key: str) -> str:
    if not isinstance(value := record[key], str):
        raise ValueError(f"{where}: {key}: expected a string, got {shown(value)}")
    return value


def _instructed(where: str, record: dict[str, Any]) -> Found:
    """Of Alpaca: an instruction and, in the next line, what it is about, which may be empty."""
    parts = [_string(where, record, key) for key in ("instruction", "input")]
    return Found("\n".join(filter(None, parts)), {key: record[key] for key in ("chosen", "rejected")}, (1.0, 0.0))


def _with_system(*questions: str) -> Callable[[str, dict[str, Any]], Found]:
    """Strings that become a chat; without a system's turn where that is empty."""

    def read(where: str, record: dict[str, Any]) -> Found:
        system, *asked, _, _ = (_string(where, record, key) for key in ("system", *questions, "chosen", "rejected"))
        turns = [("system", system), ("user", "\n".join(filter(None, asked)))]
        chat = [{"role": role, "content": text} for role, text in turns if text or role == "user"]
        return Found(chat, {key: record[key] for key in ("chosen", "rejected")}, (1.0, 0.0))

    return read


def _versus(
    prompt: str | None, a: str, b: str, key: str, first: Sequence[Any] = (), second: Sequence[Any] = (),
    ties: Sequence[Any] = (), numbers: bool = False,
) -> Callable[[str, dict[str, Any]], Found]:  # fmt: skip
    """Two responses, and which is better: by the values that say so, or by a number below or above 0."""

    def read(where: str, record: dict[str, Any]) -> Found:
        value = record[key]
        if numbers:
            better = -number(where, key, value)
        elif isinstance(value, bool | int | str) and value in (*first, *second, *ties):
            better = 1.0 if value in first else -1.0 if value in second else 0.0
        else:
            expected = ", ".join(repr(v) for v in (*first, *second, *ties))
            raise ValueError(f"{where}: {key}: expected one of {expected}, got {shown(value)}")
        rewards = (1.0, 0.0) if better > 0 else (0.0, 1.0) if better < 0 else (0.0, 0.0)
        return Found(None if prompt is None else record[prompt], {a: record[a], b: record[b]}, rewards)

    return read


def _scored_pair(where: str, record: dict[str, Any]) -> Found:
    """Of WebGPT: a question with its source, and two answers with scores."""
    question = record["question"]
    prompt = question.get("full_text") if isinstance(question, dict) else question
    rewards = [number(where, key, record[key]) for key in ("score_0", "score_1")]
    return Found(prompt, {key: record[key] for key in ("answer_0", "answer_1")}, rewards)


def _summaries(where: str, record: dict[str, Any]) -> Found:
    """Of OpenAI's comparisons: a post, two summaries and the number of the better one."""
    info, choice = record["info"], record["choice"]
    two = _list(where, "summaries", record["summaries"])
    if len(two) != 2 or isinstance(choice, bool) or choice not in (0, 1):
        raise ValueError(f"{where}: choice: expected 0 or 1 of two summaries, got {shown(choice)} of {len(two)}")
    texts = {f"summaries[{i}]": _key(where, f"summaries[{i}]", each, "text") for i, each in enumerate(two)}
    post = next((info[key] for key in ("post", "article") if isinstance(info, dict) and info.get(key)), None)
    if not isinstance(post, str):
        raise ValueError(f"{where}: info: expected an object with a post or an article, got {shown(info)}")
    return Found(post, texts, (1.0 - choice, 0.0 + choice))


def _openai(where: str, record: dict[str, Any]) -> Found:
    """Of OpenAI's preference fine-tuning."""
    messages = _key(where, "input", record["input"], "messages")
    keys = ("preferred_output", "non_preferred_output")
    return Found(messages, {key: record[key] for key in keys}, (1.0, 0.0))


def _labelled(prompt: str | None, completion: str) -> Callable[[str, dict[str, Any]], Found]:
    def read(where: str, record: dict[str, Any]) -> Found:
        of = None if prompt is None else record[prompt]
        return Found(of, {completion: record[completion]}, (_label(where, "label", record["label"]),))

    return read


def _rewarded(completions: str, rewards: str) -> Callable[[str, dict[str, Any]], Found]:
    def read(where: str, record: dict[str, Any]) -> Found:
        texts, values = (_list(where, key, record[key]) for key in (completions, rewards))
        if len(values) != len(texts):
            raise ValueError(f"{where}: {rewards}: expected {len(texts)}, one per completion, got {len(values)}")
        found = [number(where, f"{rewards}[{i}]", value) for i, value in enumerate(values)]
        return Found(record["prompt"], {f"{completions}[{i}]": text for i, text in enumerate(texts)}, found)

    return read


def _answers(
    prompt: str, answers: str, text: str, score: str, sign: float = 1.0
) -> Callable[[str, dict[str, Any]], Found]:
    """A list of objects, each a response with its score."""

    def read(where: str, record: dict[str, Any]) -> Found:
        each = [(f"{answers}[{i}]", entry) for i, entry in enumerate(_list(where, answers, record[answers]))]
        rewards = [sign * number(where, f"{key}.{score}", _key(where, key, entry, score)) for key, entry in each]
        return Found(record[prompt], {key: _key(where, key, entry, text) for key, entry in each}, rewards)

    return read


def _judged(prompt: str | None, completion: str, score: str) -> Callable[[str, dict[str, Any]], Found]:
    """One response with its score; rows of one prompt belong together."""

    def read(where: str, record: dict[str, Any]) -> Found:
        reward = number(where, score, record[score])
        return Found(None if prompt is None else record[prompt], {completion: record[completion]}, (reward,))

    return read


def _list(where: str, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {key}: expected a list of at least one, got {shown(value)}")
    return value


def _key(where: str, place: str, entry: Any, key: str) -> Any:
    if not isinstance(entry, dict) or entry.get(key) is None:
        raise ValueError(f"{where}: {place}: expected an object with the key {key}, got {shown(entry)}")
    return entry[key]


FORMS = {
    "pairs": Layout("pairs", ("prompt", "chosen", "rejected"), _pair("prompt", "chosen", "rejected")),
    "labelled": Layout("labelled", ("prompt", "completion", "label"), _labelled("prompt", "completion")),
    "rewarded": Layout("rewarded", ("prompt", "completions", "rewards"), _rewarded("completions", "rewards")),
}

NO_PROMPT = ("prompt", "completion", "completions")
_SCORES = ("reward", "score", "helpfulness")
_WINNER = _versus(
    None, "conversation_a", "conversation_b", "winner", ["model_a"], ["model_b"], ["tie", "tie (bothbad)", "both_bad"]
)
LAYOUTS = (
    *(
        Layout("pairs", ("system", *keys, "chosen", "rejected"), _with_system(*keys), replies=True, absent=NO_PROMPT)
        for keys in (("instruction", "input"), ("question",), ("input",), ("instruction",))
    ),
    Layout("pairs", ("instruction", "input", "chosen", "rejected"), _instructed, absent=NO_PROMPT),
    *(
        Layout("pairs", (key, "chosen", "rejected"), _pair(key, "chosen", "rejected"), absent=NO_PROMPT)
        for key in ("question", "input", "instruction", "query")
    ),
    Layout("pairs", ("conversations", "chosen", "rejected"), _pair("conversations", "chosen", "rejected"),
           replies=True, absent=NO_PROMPT),
    Layout("pairs", ("messages", "chosen", "rejected"), _after_messages,
           replies=True, absent=NO_PROMPT),
    Layout("pairs", ("chosen", "rejected"), _pair(None, "chosen", "rejected"), absent=NO_PROMPT),
    Layout("pairs", ("input", "preferred_output", "non_preferred_output"), _openai),
    Layout("pairs", ("question", "response_j", "response_k"), _pair("question", "response_j", "response_k")),
    Layout("pairs", ("history", "human_ref_A", "human_ref_B", "labels"),
           _versus("history", "human_ref_A", "human_ref_B", "labels", [1], [0])),
    Layout("pairs", ("prompt", "response_0", "response_1", "better_response_id"),
           _versus("prompt", "response_0", "response_1", "better_response_id", [0], [1])),
    Layout("pairs", ("prompt", "response_1", "response_2", "preference_strength"),
           _versus("prompt", "response_1", "response_2", "preference_strength", numbers=True)),
    Layout("pairs", ("context", "response1", "response2", "overall_preference"),
           _versus("context", "response1", "response2", "overall_preference", numbers=True), replies=True),
    Layout("pairs", ("question", "answer_0", "answer_1", "score_0", "score_1"), _scored_pair),
    Layout("pairs", ("info", "summaries", "choice"), _summaries),
    Layout("pairs", ("conversation_a", "conversation_b", "winner"), _WINNER),
    Layout("rewarded", ("instruction", "completions"),
           _answers("instruction", "completions", "response", "overall_score"), absent=("prompt",)),
    Layout("rewarded", ("prompt", "answers"), _answers("prompt", "answers", "answer", "rank", -1.0)),
    *(
        Layout("rewarded", ("prompt", texts, scores), _rewarded(texts, scores), absent=("label", "labels"))
        for texts in ("completions", "responses")
        for scores in ("rewards", "scores")
    ),
    Layout("labelled", ("prompt", "response", "label"), _labelled("prompt", "response")),
    *(
        Layout("labelled", (key, "label"), _labelled(None, key), absent=NO_PROMPT)
        for key in ("messages", "conversations")
    ),
    *(
        Layout("rewarded", ("prompt", text, score), _judged("prompt", text, score), merged=True, absent=("label",))
        for text in ("completion", "response")
        for score in _SCORES
    ),
    *(
        Layout("rewarded", ("messages", score), _judged(None, "messages", score), merged=True, absent=NO_PROMPT)
        for score in _SCORES
    ),
)  # fmt: skip

# Scores that stand beside chosen and rejected: the pair says which is better, and what they contradict is counted.
BESIDE = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))


def keys_of(layout: Layout) -> set[str]:
    """Which keys of a record are read."""
    return {*layout.keys, *(key for pair in BESIDE for key in pair if "chosen" in layout.keys)}


def layout_of(where: str, record: Any) -> Layout:
    """The layout of a record.

    Raises:
        ValueError: no object, keys of none, or of two of `FORMS`.
    """
    forms = "; ".join(", ".join(layout.keys) for layout in FORMS.values())
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with the keys {forms}; got {shown(record)}")

    def has(layout: Layout) -> bool:
        return all(record.get(key) is not None for key in layout.keys) and not record.keys() & set(layout.absent)

    found = [layout for layout in FORMS.values() if has(layout)]
    found = found or [layout for layout in LAYOUTS if has(layout)][:1]
    if len(found) != 1:
        keys = {key: " ".join(key.split()) for key in sorted(record)}
        got = [name if record[key] is not None else f"{name} (null)" for key, name in keys.items()]
        raise ValueError(f"{where}: expected the keys of one form ({forms}), got {shown_keys(got)}")
    return found[0]


def shown_keys(keys: Sequence[str]) -> str:
    """Keys as they stand in a message."""
    text = ", ".join(keys) or "none"
    return text if len(text) <= 200 else text[:197] + "…"


def read_layout(where: str, record: Any) -> tuple[Layout, Row, list[str]]:
    """A record's layout, its row, and what is peculiar about it.

    Raises:
        ValueError: as `rgpb.train.rows.read_preferences`, of this record.
    """
    layout = layout_of(where, record)
    found = layout.read(where, record)
    texts = {key: _text(where, key, value) for key, value in found.texts.items()}
    prompt, completions = _apart(where, layout, found.prompt, texts)
    template = template_of(where, record["input"] if layout.read is _openai else record, prompt)
    notes = []
    given = found.prompt if isinstance(found.prompt, str) else ""
    if given.strip() and all(isinstance(text, str) and text.startswith(given) for text in completions):
        notes.append("rows with responses that begin with the prompt")
    given_texts = [text for text in (found.prompt, *found.texts.values()) if isinstance(text, str)]
    if any(SPELT_CHAT.match(text) for text in given_texts):
        notes.append("rows with chats spelt out in a string")
    for pair in BESIDE:
        scores = [record.get(key) for key in pair]
        if "chosen" in layout.keys and all(isinstance(s, int | float) and not isinstance(s, bool) for s in scores):
            if scores[0] == scores[1]:
                notes.append(f"rows with a {pair[0]} that is the {pair[1]}")
            elif scores[0] < scores[1]:
                notes.append(f"rows with a {pair[0]} below the {pair[1]}")
    return layout, Row(where, prompt, tuple(completions), tuple(found.rewards), template), notes


def read_prompt(where: str, record: Any) -> Row:
    """A record's prompt alone.

    Raises:
        ValueError: as `rgpb.train.rows.read_prompts`, of this record.
    """
    if isinstance(record, dict) and "prompt" not in record:
        keys = record.keys() - {"label", "score", "reward"}
        if "messages" in keys and not keys & {"chosen", "rejected"}:
            prompt = _text(where, "messages", record["messages"])
            if isinstance(prompt, list) and prompt:
                end = next((i for i in reversed(range(len(prompt))) if prompt[i]["role"] != "assistant"), -1) + 1
                if end:
                    return Row(where, prompt[:end], (), (), template_of(where, record, prompt))
        elif any(all(record.get(key) is not None for key in layout.keys) for layout in LAYOUTS):
            return read_layout(where, record)[1]._replace(completions=(), rewards=())
    if not isinstance(record, dict) or record.get("prompt") is None:
        raise ValueError(f"{where}: expected an object with the key prompt, got {shown(record)}")
    given = record["prompt"]
    if isinstance(given, str) and all(isinstance(record.get(key), list) for key in ("chosen", "rejected")):
        return read_layout(where, record)[1]._replace(completions=(), rewards=())
    prompt = _text(where, "prompt", given)
    if prompt == []:
        raise ValueError(f"{where}: prompt: expected some text, got []")
    return Row(where, prompt, (), (), template_of(where, record, prompt))


def template_of(where: str, record: dict[str, Any], prompt: Text) -> dict[str, Any] | None:
    """What a chat's template gets beside the messages."""
    if isinstance(prompt, str):
        return None
    tools, more = record.get("tools"), record.get("chat_template_kwargs")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError(f"{where}: tools: expected a list of objects, got {shown(tools)}") from None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{where}: tools: expected a list of objects, got {shown(tools)}")
    if more and not (isinstance(more, dict) and not RESERVED & more.keys()):
        raise ValueError(f"{where}: chat_template_kwargs: expected an object of other names, got {shown(more)}")
    made = {**(more or {}), **({"tools": tools} if tools else {})}
    _check_strings(where, "tools", made)
    return made or None


def _text(where: str, key: str, value: Any) -> Text:
    """A string or a chat, whose turns have role and content by these names."""
    if isinstance(value, dict) and ("role" in value or "from" in value):  # one turn by itself
        value = [value]
    if isinstance(value, str):
        _check_strings(where, key, value)
        return value
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        value = [_named(turn) for turn in value]
        if all(isinstance(turn.get("role"), str) and turn["role"] and _is_content(turn) for turn in value):
            _check_strings(where, key, value)
            parts = [part for turn in value if isinstance(turn.get("content"), list) for part in turn["content"]]
            for part in parts:
                text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                if not isinstance(text, str):
                    raise ValueError(
                        f'{where}: {key}: expected parts of text, {{"type": "text", "text": …}}, since nothing else '
                        f"reaches the model; got {shown(part)}"
                    )
            return value
    raise ValueError(f'{where}: {key}: expected a string or a list of {{"role", "content"}}, got {shown(value)}')


def _named(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn without what is null beside content; of ShareGPT's {"from", "value"} by the usual names."""
    turn = {key: value for key, value in turn.items() if value is not None or key in ("content", "value")}
    if "role" in turn or not isinstance(turn.get("from"), str) or "value" not in turn:
        return turn
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": SHAREGPT.get(turn["from"], turn["from"]), "content": turn["value"], **rest}


def _is_content(turn: dict[str, Any]) -> bool:
    """Text, parts, or nothing where the turn says something else, such as a tool's call."""
    content = turn.get("content")
    if content is None:
        return any(value for key, value in turn.items() if key not in ("role", "content"))
    return isinstance(content, str | list)


def _check_strings(where: str, key: str, value: Any) -> None:
    """Refuse what UTF-8 can't say, wherever it is."""
    for text in _strings(value):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: {key}: expected text that UTF-8 can say, got half a surrogate pair") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from (str(key), *_strings(each))
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def _apart(where: str, layout: Layout, given: Any, texts: dict[str, Text]) -> tuple[Text, list[Text]]:
    """Prompt and responses of one kind, also where the responses begin with the prompt."""
    key = layout.keys[0] if given is not None else next(iter(texts))
    prompt = None if given is None else _text(where, key, given)
    if prompt == []:
        raise ValueError(f"{where}: {key}: expected some text, got []")
    all_chats = all(isinstance(text, list) for text in texts.values())
    if isinstance(prompt, list) and layout.replies and not any(isinstance(text, list) for text in texts.values()):
        texts = {name: [{"role": "assistant", "content": text}] if text else "" for name, text in texts.items()}
    chat = isinstance(next(iter(texts.values())) if prompt is None else prompt, list) or all_chats
    for name, text in texts.items():
        if text in ("", []):
            raise ValueError(f"{where}: {name}: expected some text, got {shown(text)}")
        if isinstance(text, list) != chat:
            expected, got = ("a chat" if c else "a string" for c in (chat, not chat))
            of = f"as {next(iter(texts)) if prompt is None else 'the prompt'} is"
            raise ValueError(f"{where}: {name}: expected {expected} {of}, got {got}")
    if not chat:
        strings = [str(text) for text in texts.values()]
        if prompt is None:
            shared = _shared_text(strings)
            return shared, [text[len(shared) :] for text in strings]
        return prompt, [*strings]
    chats = {name: text for name, text in texts.items() if isinstance(text, list)}
    for name, chat_ in chats.items():
        if not any(value for turn in chat_ for field, value in turn.items() if field != "role"):
            raise ValueError(f"{where}: {name}: expected some text, got {shown(chat_)}")
    opening = {c[0]["role"] not in ("assistant", "model") for c in chats.values()}
    if prompt is None or (isinstance(prompt, str) and True in opening):
        shared_turns = _shared_turns(where, chats)
        if prompt is not None and not _says(shared_turns, str(prompt)):
            names = " and ".join(chats)
            raise ValueError(
                f"{where}: {key}: expected the text of a turn with which {names} begin, got {shown(prompt)}"
            )
        return shared_turns, [c[len(shared_turns) :] for c in chats.values()]
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}], [*chats.values()]
    if all(c[: len(prompt)] == prompt and len(c) > len(prompt) for c in chats.values()):
        return prompt, [c[len(prompt) :] for c in chats.values()]
    for name, chat_ in chats.items():
        if chat_[0]["role"] in ("user", "system", "developer"):
            raise ValueError(
                f"{where}: {name}: expected a response, or the whole chat with the turns of {key} first, got one that "
                f"begins with a turn of {chat_[0]['role']}"
            )
    return prompt, [*chats.values()]


def _shared_text(texts: Sequence[str]) -> str:
    """The prompt with which all texts begin: up to their last common turn of Anthropic's dialogues; else to the last
    whole word, without the space behind it; what is left then is never empty."""
    shared = common(*texts)
    turn = texts[0].rfind(ANTHROPIC, 0, shared)
    if turn >= 0:
        return texts[0][: turn + len(ANTHROPIC)]
    if any(len(text) == shared for text in texts):
        shared = len(texts[0][:shared].rstrip())
        while shared and not texts[0][shared - 1].isspace():
            shared -= 1
    else:
        following = any(text[shared].isalnum() for text in texts)
        while shared and following and texts[0][shared - 1].isalnum():
            shared -= 1
    return texts[0][: shared - (texts[0][shared - 1 : shared] == " ")] if shared else ""


def _shared_turns(where: str, chats: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The turns with which all chats begin. What is left of each is a response."""
    all_chats = [*chats.values()]
    first, shortest = all_chats[0], min(map(len, all_chats))
    if all(chat == first for chat in all_chats):
        shared = len(first)
        while shared and first[shared - 1]["role"] in ("assistant", "model"):
            shared -= 1
    else:
        shared = 0
        while shared < shortest - 1 and all(chat[shared] == first[shared] for chat in all_chats):
            shared += 1
    for name, chat in chats.items():
        if not shared or shared == len(chat) or chat[shared]["role"] in ("user", "system", "developer"):
            got = f"turns of {', '.join(turn['role'] for turn in chat)}"
            raise ValueError(
                f"{where}: {name}: expected a chat whose first turns are the prompt"
                f"{', the same in each,' if len(chats) > 1 else ''} and whose last one is a response, got "
                f"{got if len(got) <= 60 else got[:57] + '…'}{f', the same up to turn {shared}' * (len(chats) > 1)}"
            )
    return first[:shared]


def _says(turns: Sequence[dict[str, Any]], prompt: str) -> bool:
    """Whether a prompt given as a string is one of these turns, or all of them in one."""
    words = " ".join(prompt.split())
    contents = [" ".join(str(turn.get("content")).split()) for turn in turns]
    return any(words in content for content in contents) or any(content and content in words for content in contents)

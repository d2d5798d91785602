"""What SECURITY.md says: nothing that is read runs anything."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import training
from training import write
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

from rgpb.demo import arithmetic_pairs
from rgpb.train import config as settings_module
from rgpb.train import models, report, train
from rgpb.train.parallel import load_state, save_state
from rgpb.train.ranks import Ranks

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("rgpb", "kernels", "benchmarks", "tools", "docs", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]  # fmt: skip
# Modules that unpickle; of pickle itself, what is made of it where
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
ALLOWED = {("rgpb/train/parallel.py", "pickle"): {"Unpickler", "UnpicklingError"}}
# Calls by their last two names, and what each must be given
NEVER = {
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "np.load", "numpy.load", "pd.read_pickle", "jit.load"),
    "hub.load",
}  # fmt: skip
GIVEN = {"torch.load": {"weights_only": True}, "dcp.load": {"storage_reader": None, "planner": None}}


def called(node):
    """ "torch.load" of a call of that; "eval" of one of a plain name."""
    parts, node = [], node.func
    while isinstance(node, ast.Attribute):
        parts, node = [node.attr, *parts], node.value
    return ".".join([*([node.id] if isinstance(node, ast.Name) else []), *parts][-2:])


def faults(text, name):
    """What a source does that could run what it reads, each with its line."""
    found = []
    for node in ast.walk(ast.parse(text)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            roots = {each.partition(".")[0] for each in names} & PICKLES
            found += [f"{line}: imports {root}" for root in roots if (name, root) not in ALLOWED]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = node.value.id
            if module in PICKLES and node.attr not in ALLOWED.get((name, module), ()):
                found.append(f"{line}: {module}.{node.attr}")
        if isinstance(node, ast.Call):
            call, given = called(node), {word.arg: word.value for word in node.keywords}
            if call in NEVER:
                found.append(f"{line}: {call}")
            for word, value in GIVEN.get(call, {}).items():
                if word not in given or (value is not None and getattr(given[word], "value", None) is not value):
                    found.append(f"{line}: {call} without {word}={value or '…'}")
            for word in ("trust_remote_code", "allow_pickle"):
                if word in given and getattr(given[word], "value", None) is not False:
                    found.append(f"{line}: {word} that isn't False")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles(path):
    assert faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from dill import loads", "import torch\ntorch.load(x)", "torch.load(x, weights_only=False)",
        "yaml.load(x)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "np.load(x)", "dcp.load(x, planner=p)",
        "f(x, trust_remote_code=given)", "torch.hub.load(x)", "import os, marshal",
    ],
)  # fmt: skip
def test_the_walk_sees_one(text):
    assert len(faults(text, "rgpb/x.py")) == 1


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.fixture
def marker(tmp_path):
    """(pickle, folder that it makes). It works: read by a plain unpickler, the folder is there."""
    place = tmp_path / "unpickled"
    made = pickle.dumps(Marker(place))
    pickle.loads(made)
    place.rmdir()
    return made, place


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **training.SMALL))


def test_weights_of_a_model(tmp_path, marker, model):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    for content in (marker[0], torch_file(tmp_path, Marker(marker[1]))):
        (tmp_path / "model" / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(Exception, match="(?i)weights.only|unpickl"):
            models.load_pretrained(tmp_path / "model", torch.float32)
        assert not marker[1].exists()


def torch_file(folder, value):
    """What torch.save writes of a value."""
    torch.save(value, folder / "saved")
    return (folder / "saved").read_bytes()


def test_code_of_a_model(tmp_path, model, monkeypatch):
    """Refused without the question that transformers would ask, whose answer here is yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    model.save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model" / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    brought = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(brought))
    for load in (lambda folder: models.load_pretrained(folder, torch.float32), models.load_tokenizer):
        with pytest.raises(ValueError, match="custom code"):
            load(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_a_chat_template():
    """In transformers' sandbox."""
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="(?i)unsafe|undefined"):
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=template)


class TestCheckpointOfSeveralRanks:
    """torch.distributed's format; read by one process here."""

    @pytest.fixture
    def saved(self, tmp_path, model):
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.zeros(1, 2, dtype=torch.int64)).logits.sum().backward()
        optimizer.step()
        save_state(tmp_path / "dcp", model, optimizer, Ranks())
        return tmp_path / "dcp", model, optimizer

    def test_is_read(self, saved):
        place, model, optimizer = saved
        before = {name: x.clone() for name, x in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        optimizer.param_groups[0]["lr"] = 7.0
        load_state(place, model, optimizer, Ranks())
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert optimizer.param_groups[0]["lr"] == 1e-3

    def test_pickle_of_contents(self, saved, marker):
        place, model, optimizer = saved
        (place / ".metadata").write_bytes(marker[0])
        with pytest.raises(ValueError, match=r"\.metadata: expected the records of a checkpoint alone, got \w+\.mkdir"):
            load_state(place, model, optimizer, Ranks())
        assert not marker[1].exists()

    def test_pickle_of_a_number(self, saved, marker):
        """In the place of the learning rate."""
        place, model, optimizer = saved
        other = torch_file(place.parent, Marker(marker[1]))
        (place / "other").write_bytes(other)
        contents = pickle.loads((place / ".metadata").read_bytes())
        for index, where in contents.storage_data.items():
            if index.fqn.endswith(".lr"):
                where.relative_path, where.offset, where.length = "other", 0, len(other)
        (place / ".metadata").write_bytes(pickle.dumps(contents))
        with pytest.raises(dcp.api.CheckpointException, match="(?i)weights.only"):
            load_state(place, model, optimizer, Ranks())
        assert not marker[1].exists()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that was broken off behind a checkpoint, with a cache of the reference: a function that goes on with it."""
    monkeypatch.setitem(settings_module.BUILT_IN, "tiny-llama", ("LlamaConfig", training.SMALL))
    monkeypatch.setattr(report, "plot", lambda runs, path: None)
    data = write(tmp_path / "pairs.jsonl", arithmetic_pairs(8, seed=1))
    case = training.config(data, tmp_path / "run", steps=4, save_steps=2, ref_cache=str(tmp_path / "cache"))
    assert training.run([case], stop=3)[0].startswith("KeyboardInterrupt")
    return lambda: train(case)


def test_files_of_a_checkpoint(tmp_path, run, marker):
    """One file at a time in the place of what torch.save wrote; the rest of the folder is as it was."""
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    kept = {file: file.read_bytes() for file in checkpoint.iterdir()}
    pickles = [file for file, content in kept.items() if content.startswith(b"PK") and file.suffix != ".safetensors"]
    before, ended = shutil.copytree(tmp_path / "run", tmp_path / "before"), {}
    for file in pickles:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(before, tmp_path / "run")
        file.write_bytes(torch_file(tmp_path, Marker(marker[1])))
        try:
            ended[file.name] = run()["resumed"]
        except pickle.UnpicklingError as error:
            ended[file.name] = "refused" if "weights_only" in str(error) else str(error)
        assert not marker[1].exists(), file.name
    read, unread = ("optimizer.pt", "scheduler.pt"), ("rng_state.pth", "training_args.bin")
    assert ended == {**dict.fromkeys(read, "refused"), **dict.fromkeys(unread, 2)}


def test_files_of_the_reference_cache(tmp_path, run, marker):
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert files
    for file in files:
        file.write_bytes(marker[0])
        file.with_suffix(".pt").write_bytes(marker[0])
    with pytest.raises(ValueError, match="ref_cache: expected a whole file"):
        run()
    assert not marker[1].exists()

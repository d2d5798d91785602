"""`rgpb plan`: what a call will run, why, and what it costs.

Dimensions: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rgpb.arguments import argument, parse_bytes, positive
from rgpb.bench.measure import copy_rate, memory_of_machine, product_rate
from rgpb.engine.chunks import Sizes, sizes
from rgpb.engine.plan import (
    DEFAULT_WORKSPACE,
    SHARDED,
    Plan,
    auto_workspace,
    of_impl,
    plan,
    predicted_seconds,
    ring_gathered,
    ring_reduced,
    shard_held,
    shard_traffic,
)
from rgpb.engine.rates import RATES, Rates
from rgpb.kernels import IMPLEMENTATIONS, resolve_impl, why_not
from rgpb.objectives import Objective, resolve


class GPU(NamedTuple):
    """Key in `RATES`, GiB of memory as the vendor prints it, and how fast it copies beside the GPU of those rates."""

    arch: str
    memory: int
    copies: float = 1.0


GPUS = {
    "a100": GPU("sm_80", 80),
    "h100": GPU("sm_90", 80, 0.7),
    "h200": GPU("sm_90", 141),
    "b200": GPU("sm_100", 180),
    "rtx5090": GPU("sm_120", 32),
    "mi300x": GPU("gfx9", 192),
}


class Head(NamedTuple):
    """An LM head: H, V, and the soft-cap of its logits."""

    width: int
    vocab: int
    softcap: float | None = None


HEADS = {
    "deepseek-v3": Head(7168, 129280),
    "gemma-2-2b": Head(2304, 256000, 30.0),
    "gemma-2-9b": Head(3584, 256000, 30.0),
    "gemma-2-27b": Head(4608, 256000, 30.0),
    "gpt2": Head(768, 50257),
    "llama-2-7b": Head(4096, 32000),
    "llama-2-13b": Head(5120, 32000),
    "llama-2-70b": Head(8192, 32000),
    "llama-3-8b": Head(4096, 128256),
    "llama-3-70b": Head(8192, 128256),
    "llama-3-405b": Head(16384, 128256),
    "llama-3.1-8b": Head(4096, 128256),
    "llama-3.1-70b": Head(8192, 128256),
    "llama-3.1-405b": Head(16384, 128256),
    "llama-3.2-1b": Head(2048, 128256),
    "llama-3.2-3b": Head(3072, 128256),
    "llama-3.3-70b": Head(8192, 128256),
    "mistral-7b": Head(4096, 32000),
    "mistral-7b-v0.3": Head(4096, 32768),
    "mixtral-8x7b": Head(4096, 32000),
    "olmo-2-7b": Head(4096, 100352),
    "phi-2": Head(2560, 51200),
    "phi-3-mini": Head(3072, 32064),
    "phi-4": Head(5120, 100352),
    "pythia-160m": Head(768, 50304),
    "pythia-410m": Head(1024, 50304),
    "pythia-1b": Head(2048, 50304),
    "pythia-1.4b": Head(2048, 50304),
    "pythia-2.8b": Head(2560, 50304),
    "pythia-6.9b": Head(4096, 50432),
    "pythia-12b": Head(5120, 50688),
    "qwen2.5-0.5b": Head(896, 151936),
    "qwen2.5-1.5b": Head(1536, 151936),
    "qwen2.5-3b": Head(2048, 151936),
    "qwen2.5-7b": Head(3584, 152064),
    "qwen2.5-14b": Head(5120, 152064),
    "qwen2.5-32b": Head(5120, 152064),
    "qwen2.5-72b": Head(8192, 152064),
    "qwen3-0.6b": Head(1024, 151936),
    "qwen3-1.7b": Head(2048, 151936),
    "qwen3-4b": Head(2560, 151936),
    "qwen3-8b": Head(4096, 151936),
    "qwen3-14b": Head(5120, 151936),
    "qwen3-32b": Head(5120, 151936),
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand `plan`."""
    parser = subparsers.add_parser("plan", help="what a call will run, why, and what it costs", description=__doc__)
    parser.add_argument(
        "--tokens", type=argument(positive), default=8192, help="N, response tokens of a rank; default %(default)s"
    )
    parser.add_argument("--model", metavar="NAME", help=f"{', '.join(HEADS)}; or a folder with a config.json")
    for name, text in (("hidden", "H"), ("vocab", "V")):
        parser.add_argument(f"--{name}", type=argument(positive), help=f"{text}, in place of --model")
    parser.add_argument("--loss", type=argument(resolve), default="bnf", help="or a sum; default %(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="default %(default)s")
    parser.add_argument("--device-type", choices=("cpu", "cuda"), default="cuda", help="default %(default)s")
    parser.add_argument("--gpu", type=str.lower, choices=tuple(GPUS), help="for time and memory; default h200")
    parser.add_argument(
        "--impl",
        choices=IMPLEMENTATIONS[1:],
        help="default: triton on cuda, what auto takes on cpu",
    )
    parser.add_argument(
        "--unit-tokens", type=argument(positive), metavar="N",
        help="of each pair or group, for losses that couple these; default: so few that they fit a chunk",
    )  # fmt: skip
    parser.add_argument("--skipping", action="store_true", help="with a grad_tolerance")
    parser.add_argument("--frozen-head", action="store_true", help="the head has no gradient, as with LoRA")
    for name, text in (
        ("tp", "that hold the head together, each some of its rows, and have the same tokens"),
        ("fsdp", "that have other tokens, and each a part of the (rows of the) head between steps"),
    ):
        parser.add_argument(f"--{name}", type=argument(positive), default=1, help=f"ranks {text}; default %(default)s")
    parser.add_argument(
        "--workspace",
        type=argument(parse_bytes),
        help='default: what workspace="auto" takes, 512MiB or what a GPU has free',
    )
    parser.set_defaults(run=run)


def head_of(model: str) -> Head:
    """The LM head of a model.

    Args:
        model: a name in `HEADS`, in any case; or a folder with a transformers config.json.

    Raises:
        ValueError: neither, or a config.json without a hidden size and a vocabulary.
    """
    if model.lower() in HEADS:
        return HEADS[model.lower()]
    path = Path(model) / "config.json"
    if not path.is_file():
        near = ", ".join(get_close_matches(model.lower(), HEADS, 4, 0.5)) or "llama-3-8b"
        raise ValueError(
            f"model: expected a name that `rgpb plan --help` lists, as {near}, or a folder with a config.json, "
            f"got {model!r}; --hidden and --vocab describe any other"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: expected JSON in {path}, got {error}") from error
    given = config if isinstance(config, dict) else {}
    text = given.get("text_config")
    given = {**given, **(text if isinstance(text, dict) else {})}  # of models that also see or hear

    def size(*names: str) -> int:
        found = next((given[name] for name in names if name in given), None)
        if type(found) is not int or found < 1:
            raise ValueError(f"model: expected a positive integer {names[0]} in {path}, got {found!r}")
        return found

    return Head(size("hidden_size", "n_embd"), size("vocab_size"), given.get("final_logit_softcapping"))


def _head(a: argparse.Namespace) -> Head:
    given = {name: getattr(a, name) for name in ("model", "hidden", "vocab") if getattr(a, name) is not None}
    if set(given) not in ({"model"}, {"hidden", "vocab"}):
        got = " ".join(f"--{name} {value}" for name, value in given.items()) or "none of these"
        raise ValueError(f"model: expected either --model, or both --hidden and --vocab, got {got}")
    return Head(a.hidden, a.vocab) if a.model is None else head_of(a.model)


def naive_bytes(tokens: int, vocab: int, itemsize: int, gradient: bool = True, softcap: bool = False) -> int:
    """What the naive form holds at its peak beyond inputs and gradients: 3 · N · V float32 numbers, whatever the loss.

    In the backward: log-probabilities, their gradient from `gather`, and that of the logits or, for BNF, of Σ p log p;
    with a soft-cap also its tanh, in the type of the inputs.
    A forward-only call holds logits and log-probabilities, and 16-bit logits beside their float32 copy.
    """
    return tokens * vocab * (12 + itemsize * softcap if gradient else 8 + 2 * (itemsize == 2))


def naive_moved(itemsize: int, entropy: bool = False, softcap: bool = False) -> int:
    """Bytes that the naive form reads and writes for each of its N · V logits, forward and backward.

    What its products read isn't counted, as it isn't for the library; what they write is.

    Args:
        itemsize: of the inputs and their logits, 2 or 4.
        entropy: whether the loss has a sum over the vocabulary beside the target, as BNF's Σ p log p.
        softcap: whether the logits are soft-capped, in the type of the inputs.
    """
    passes = 6 + 11 * entropy  # log_softmax 2, its gradient 3, the gradient of gather 1; the sum and its gradient 11
    narrow = 1 + 13 * softcap  # logits written; z / c, tanh and c · tanh 6, their gradients 7
    return 4 * passes + itemsize * narrow + 12 * (itemsize == 2)  # raised to float32, and the gradient back


class Prediction(NamedTuple):
    """Seconds of a plan, of its bare products and of the naive form; what they come from, and more of that."""

    ours: float
    floor: float
    naive: float
    source: str
    more: str | None = None


def units_of(a: argparse.Namespace, spec: Objective) -> Callable[[], list[int]] | None:
    """What gives the tokens of each pair or group; the last one has what is left.

    Raises:
        ValueError: a loss that couples neither, or fewer tokens in all.
    """
    if a.unit_tokens is None:
        return None
    if spec.couples not in ("pair", "group"):
        raise ValueError(f"unit-tokens: expected a loss that couples pairs or groups, got {spec.name}")
    if a.unit_tokens > a.tokens:
        raise ValueError(f"unit-tokens: expected at most the {a.tokens} of --tokens, got {a.unit_tokens}")
    whole, rest = divmod(a.tokens, a.unit_tokens)
    return lambda: [a.unit_tokens] * whole + [rest] * (rest > 0)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ValueError: a head that isn't described, or twice; a GPU's name beside --device-type cpu; an implementation that
            isn't there; `workspace` too small for one row; kernels that can't serve the request.
    """
    a, spec, dtype, lm_head = arguments, arguments.loss, DTYPES[arguments.dtype], _head(arguments)
    cuda = a.device_type == "cuda"
    if a.gpu is not None and not cuda:
        raise ValueError(f"gpu: expected no --gpu beside --device-type cpu, got {a.gpu!r}")
    gpu = a.gpu or "h200"
    impls = _impls(a.impl, cuda)
    if a.tp > lm_head.vocab:
        raise ValueError(f"tp: expected at most the {lm_head.vocab} rows of the head, got {a.tp}")
    rows = -(-lm_head.vocab // a.tp)
    head = sizes(
        rows, lm_head.width, dtype, dtype, a.device_type, impls[0], arch=GPUS[gpu].arch if cuda else None,
        softcap=lm_head.softcap is not None,
    )  # fmt: skip
    weight = rows * lm_head.width * dtype.itemsize
    held = 2 * a.tokens * lm_head.width * dtype.itemsize + (1 if a.frozen_head else 2) * weight
    held += shard_held(a.tokens, lm_head.width, 4) * (a.tp > 1)
    auto = auto_workspace(GPUS[gpu].memory * 2**30 - held) if cuda and a.tp == 1 else DEFAULT_WORKSPACE
    workspace = auto if a.workspace is None else a.workspace
    planned = partial(
        plan, a.tokens, head, impls, weight_grad=not a.frozen_head, couples=spec.couples, half=dtype == torch.float16,
        entropy_grad=spec.entropy_grad, skipping=a.skipping, split=SHARDED if a.tp > 1 else "",
        unit_tokens=units_of(a, spec),
    )  # fmt: skip
    head = head.skipping(False, False) if a.skipping else head
    chosen, whole_head = planned(workspace=workspace), head
    head = of_impl(head, chosen.impl)
    softcap, units = lm_head.softcap is not None, 2 if a.frozen_head else 3
    moved = naive_moved(dtype.itemsize, spec.entropy or spec.entropy_grad, softcap)
    naive = naive_bytes(a.tokens, rows, dtype.itemsize, softcap=softcap)
    named = "" if a.model is None else f"{a.model}: "
    capped = f", logits soft-capped at {lm_head.softcap:g}" if lm_head.softcap is not None else ""
    print(f"call    {spec.name}, {a.dtype}, on a {a.device_type} device")
    whole = lm_head.vocab * lm_head.width * dtype.itemsize
    print(f"head    {named}H = {lm_head.width}, V = {lm_head.vocab}, {_mebibytes(whole)}{capped}")
    if a.tp * a.fsdp > 1:
        print(_ranks(a, lm_head, spec.entropy, dtype.itemsize))
    print(f"path    {chosen.path}: {chosen.reason}")
    print(f"impl    {chosen.impl}")
    print(f"work    {chosen.units} × 2·N·V·H = {chosen.flops / 1e12:,.3g} TFLOP; naive PyTorch does {units} ×")
    job = (chosen, head, a.tokens, units, moved, workspace)
    times = on_gpu(*job, GPUS[gpu]) if cuda else on_cpu(*job, dtype)
    if times is None:
        print("time    not predicted: there are rates for 16-bit products on a GPU only")
    else:
        print(
            f"time    {_time(times.ours)} predicted for {gpu if cuda else 'this CPU'}, "
            f"{times.ours / times.floor:.2f} × the bare products' {_time(times.floor)}; from {times.source}"
        )
        if times.more is not None:
            print(f"        {times.more}")
    if a.skipping:
        saved = {"two_pass": 3, "single": 2, "frozen": 1}.get(chosen.path, 0)
        print(
            f"        as if nothing could be left out; less {saved} of {chosen.units} products, times the share that is"
        )
    print(f"chunks  up to {chosen.rows:,} of {a.tokens:,} rows at a time{_together(chosen)}")
    print(f"memory  {_mebibytes(chosen.extra_bytes)} beyond inputs and gradients, {_mebibytes(workspace)} allowed")
    print(
        f"naive   {_mebibytes(naive)}: 3·N·V float32 numbers{', and the N·V of tanh' * softcap}; "
        f"{naive / chosen.extra_bytes:,.1f} times the memory above"
    )
    if times is not None:
        print(
            f"        {_time(times.naive)} predicted, {times.naive / times.ours:.2f} times the time above: "
            f"{units} × 2·N·V·H at the library's rate, {moved}·N·V bytes at that of copies"
        )
    if cuda and times is not None and workspace < auto:
        larger = planned(workspace=auto)
        faster = on_gpu(larger, of_impl(whole_head, larger.impl), a.tokens, units, moved, auto, GPUS[gpu])
        if faster is not None and faster.ours < times.ours:
            print(
                f'remedy  workspace="auto", here {auto >> 20:,} MiB: {larger.path}, {_time(faster.ours)} predicted, '
                f"{times.ours / faster.ours:.2f} times as fast"
            )
    print(f"fits    {_fits(held + chosen.extra_bytes, held + naive, gpu if cuda else None)}")
    print(
        "        hidden states, head, their gradients, the above; not counted: the rest of the model, optimiser states"
    )
    return 0


def _ranks(a: argparse.Namespace, head: Head, entropy: bool, itemsize: int) -> str:
    """What a rank holds and sends, and what it would with the whole head on each. The lines below it are a rank's."""
    rows, gradient = -(-head.vocab // a.tp), "" if a.frozen_head else ", and as much for its gradient"
    own, whole = rows * head.width * itemsize, head.vocab * head.width * itemsize
    lines = [f"ranks   {a.tp * a.fsdp}"]
    holds, sends = f"{_mebibytes(own)} of the head{gradient}", []
    if a.fsdp > 1:
        holds += f"; between steps {_mebibytes(-(-own // a.fsdp))} each"
        sends += [f"{_mebibytes(ring_gathered(own, a.fsdp))} for the head from {a.fsdp} ranks{gradient}"]
    if a.tp > 1:
        lines[0] += f": {a.tp} hold the head together, {rows:,} rows each, and have the same tokens"
        holds += f"; {_mebibytes(shard_held(a.tokens, head.width, 4))} for X and dX in float32"
        scores, hidden = (_mebibytes(ring_reduced(n, a.tp)) for n in shard_traffic(a.tokens, head.width, 4, entropy))
        sends += [f"{scores} for the scores and {hidden} for dX, summed over {a.tp} ranks"]
    lines += [f"holds   {holds}", f"sends   {sends[0]}", *(f"        {text}" for text in sends[1:])]
    if a.tp > 1:
        gathered = _mebibytes(ring_gathered(whole, a.tp * a.fsdp))
        lines += [
            f"beside  the whole head on each rank, for 1/{a.tp} of the tokens: holds {_mebibytes(whole)}{gradient};",
            f"        sends {gathered}{gradient}",
        ]
    return "\n".join(lines)


def _impls(impl: str | None, cuda: bool) -> tuple[str, ...]:
    """The kernel sets to plan for. A GPU needn't be here for that; the CPU is the one that is."""
    if not cuda:
        return resolve_impl(impl or "auto", torch.device("cpu"))
    if impl == "cpp":
        raise ValueError(f"impl: expected 'triton' or 'torch', since {why_not(impl, torch.device('cuda'))}; got 'cpp'")
    return (impl,) if impl else ("triton",)  # what `auto` takes until tile kernels have been timed


def on_gpu(
    chosen: Plan, head: Sizes, tokens: int, units: int, moved: int, workspace: int, gpu: GPU
) -> Prediction | None:  # fmt: skip
    """From `RATES`; None where there are none. `units` and `moved`: the naive form's products, and bytes per logit."""
    if chosen.seconds is None:
        return None
    rates, unit = RATES[gpu.arch], chosen.flops / chosen.units
    rates = rates._replace(copy=gpu.copies * rates.copy)
    ours = seconds_of(chosen, head, rates, tokens, workspace)
    naive = unit * units / rates.library + moved * tokens * head.vocab / rates.copy
    return Prediction(ours, products_seconds(chosen, head), naive, "ceilings, not measured")


def on_cpu(
    chosen: Plan, head: Sizes, tokens: int, units: int, moved: int, workspace: int, dtype: torch.dtype
) -> Prediction:  # fmt: skip
    """As `on_gpu`, from rates measured here in about a second. The naive form multiplies in `dtype`."""
    gemm = dtype if head.gemm == dtype.itemsize else torch.float32
    rate, copy = product_rate(gemm, "cpu", result=torch.float32), copy_rate("cpu")
    theirs, fresh = product_rate(dtype, "cpu"), copy_rate("cpu", fresh=True)
    rates, unit = Rates(rate, rate, copy), chosen.flops / chosen.units
    ours = seconds_of(chosen, head, rates, tokens, workspace)
    if head.convert:  # the weight, for a chunk's logits and its dX, and once for the slices of dW
        times = 2 * -(-tokens // chosen.rows) + (chosen.path == "two_pass")
        ours += times * head.vocab * head.width * (dtype.itemsize + head.gemm) / copy
    naive = unit * units / theirs + moved * tokens * head.vocab / fresh
    more = f"{_name(gemm)} products; naive's in {_name(dtype)} {_giga(theirs)}FLOP/s; copies {_giga(copy)}B/s, "
    more += f"naive's into new memory {_giga(fresh)}B/s"
    return Prediction(ours, chosen.flops / rate, naive, f"{_giga(rate)}FLOP/s measured now", more)


def seconds_of(chosen: Plan, head: Sizes, rates: Rates, tokens: int, workspace: int) -> float:
    """A plan's seconds at such rates."""
    return predicted_seconds(head, rates, chosen.path, chosen.units, tokens, (chosen.rows, chosen.together), workspace)


def products_seconds(chosen: Plan, head: Sizes) -> float:
    """The bare products of a plan at the library's rate on the architecture of `head`."""
    assert head.arch is not None
    return chosen.flops / RATES[head.arch].library


PREDICTED = ("Llama-3-8B", "Qwen2.5-7B", "Gemma-2-9B", "Pythia-2.8B")


def predictions(gpu: str = "h200", tokens: int = 8192) -> str:
    """A Markdown table: what each path is predicted to take for the heads of `PREDICTED`, bf16, on both kernel sets."""
    lines = [
        "| head | job, workspace | bare products | triton | tiled |",
        "|---|---|---:|---:|---:|",
    ]
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("token-wise loss, 4 GiB", {"couples": "token", "workspace": 4 << 30}),
        ("token-wise loss, 512 MiB", {"couples": "token"}),
        ("any loss, 512 MiB", {"couples": "batch"}),
        ("frozen head, 512 MiB", {"weight_grad": False}),
        ("log-probabilities, 512 MiB", {"weight_grad": False, "hidden_grad": False}),
    ]
    for name in PREDICTED:
        width, vocab, softcap = HEADS[name.lower()]
        for job, request in jobs:
            cells = []
            for impl in ("triton", "tiled"):
                head = sizes(
                    vocab, width, torch.bfloat16, torch.bfloat16, "cuda", impl, arch=GPUS[gpu].arch,
                    softcap=softcap is not None,
                )  # fmt: skip
                made = plan(tokens, head, **request)
                assert made.seconds is not None
                floor = products_seconds(made, head)
                cells.append(f"{made.path}, {made.seconds * 1e3:.1f} ms, {made.seconds / floor:.2f} × {made.units}U")
            unit = 2e3 * tokens * vocab * width / RATES[GPUS[gpu].arch].library
            lines.append(f"| {name} | {job} | U = {unit:.1f} ms | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _together(chosen: Plan) -> str:
    """Of how many rows the gradients are multiplied at once."""
    return f"; gradients of {chosen.together:,} are multiplied at once" if chosen.together > chosen.rows else ""


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _giga(rate: float) -> str:
    return f"{rate / 1e9:,.3g} G"


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds * 1e3:,.1f} ms"


def _fits(ours: int, naive: int, gpu: str | None) -> str:
    """Whether so many bytes find room on the GPU, or on this machine."""
    memory = memory_of_machine() if gpu is None else GPUS[gpu].memory * 2**30
    owner = "this machine" if gpu is None else f"the {gpu}"
    if memory is None:
        return f"not known, {_gibibytes(ours)}: {owner} doesn't say how much it has; naive {_gibibytes(naive)}"
    words = ["yes" if size <= memory else "NO" for size in (ours, naive)]
    return f"{words[0]}, {_gibibytes(ours)} of {owner}'s {_gibibytes(memory)}; naive {words[1]}, {_gibibytes(naive)}"


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"

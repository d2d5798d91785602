"""What tests of several ranks run on each of them: slices of one problem, so that the whole is known everywhere.

Dimensions: B responses, T padded length, P positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist

from rgpb import LMHead, VocabShard, fused_loss, linear_logprob, objective
from rgpb.objectives import OBJECTIVES, RunningMean, resolve

V, H = 53, 12
COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "reduce_scatter_tensor", "all_gather_into_tensor")


def problem(dtype="float64", head=(), responses=12, length=5, seed=0, scale=1.0):
    """One batch: hidden [B, T, H], weight [V, H], bias [V], target [B, T] with masked places, labels, rewards.

    Response 3 has no token. `head`: of "bias", "softcap", "scale". `scale`: of the weight.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(getattr(torch, dtype))

    target = torch.randint(V, (responses, length), generator=random)
    target[torch.rand(responses, length, generator=random) < 0.3] = -100
    if responses > 3:
        target[3] = -100
    return {
        "hidden": normal(responses, length, H),
        "weight": normal(V, H) * 0.5 * scale,
        "bias": normal(V) * 0.5 if "bias" in head else None,
        "softcap": 3.0 if "softcap" in head else None,
        "scale": 0.7 if "scale" in head else 1.0,
        "target": target,
        "ref_hidden": normal(responses, length, H),
        "label": torch.rand(responses, generator=random) < 0.5,
        "rewards": torch.randn(responses // 3, 3, generator=random, dtype=torch.float64),
    }


def entropic(responses):
    """An objective of the tests: Σ of H_o over a response, and of log p, squared."""
    return (responses.sum(responses.policy.other_entropy) - responses.logps()).square()


def register():
    if "entropic" not in OBJECTIVES:
        objective("entropic", couples="batch", entropy_grad=True)(entropic)


def arguments(name, p, ref):
    """What the objective needs of the batch."""
    register()
    spec, given = resolve(name), {}
    if spec.label:
        given["label"] = p["label"]
    if spec.ref:
        given["ref"] = ref
    if spec.rewards:
        given["rewards"] = p["rewards"]
    elif spec.unit == "group":
        given["group_size"] = 3
    return given


def run(p, name, shard=None, rows=slice(None), **keywords):
    """Loss and gradients of hidden, weight and bias; `rows` of the head. The reference has other hidden states."""
    hidden, weight = p["hidden"].clone().requires_grad_(), p["weight"][rows].clone().requires_grad_()
    bias = None if p["bias"] is None else p["bias"][rows].clone().requires_grad_()
    head = LMHead(weight, bias, p["softcap"], p["scale"], shard)
    given = {**arguments(name, p, (p["ref_hidden"], head)), **keywords}
    made = fused_loss(hidden, head, p["target"], objective=name, **given)
    loss, metrics = made if isinstance(made, tuple) else (made, {})
    loss.sum().backward()
    return {
        "loss": loss.detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
        "bias": None if bias is None else bias.grad,
        "metrics": metrics,
    }


@contextmanager
def counted():
    """Bytes given to each collective, by its name: [(name, bytes)]."""
    seen, real = [], {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name):
        def collective(*args, **keywords):
            tensors = [x for x in args[1:] if isinstance(x, torch.Tensor)] if "gather" in name else [args[0]]
            seen.append((name, sum(x.numel() * x.element_size() for x in tensors)))
            return real[name](*args, **keywords)

        return collective

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield seen
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


# -- a head on several ranks ------------------------------------------------------------------------------------------


def cuts(parts, total=V):
    """Where slices of these lengths start and end; the last takes what is left."""
    starts = [sum(parts[:r]) for r in range(len(parts) + 1)]
    return [slice(starts[r], total if r == len(parts) - 1 else starts[r + 1]) for r in range(len(parts))]


def vocab_parallel(names, parts, keywords, **given):
    """The losses `names` on this rank's rows of the head: [(run, bytes of collectives)]."""
    group, rank = dist.group.WORLD, dist.get_rank()
    p, rows = problem(**given), cuts(parts)[rank]
    shard = VocabShard.of(group, rows.stop - rows.start)
    assert (shard.start, shard.vocab) == (rows.start, V)
    found = []
    for name in names:
        with counted() as seen:
            found.append((run(p, name, shard=shard, rows=rows, **keywords), list(seen)))
    return found


# -- groups for batches and sequences ---------------------------------------------------------------------------------


def units(name, parts, total=12):
    """The responses of each rank, for `parts` units on each; the last has those that are left."""
    unit = resolve(name).unit
    width = {"response": 1, "pair": 2, "group": 3}[unit]
    slices = cuts(parts, total // width)
    every = torch.arange(total)
    members = every.view(2, -1).t() if unit == "pair" else every.view(-1, width)
    return [members[part].t().reshape(-1) if unit == "pair" else members[part].reshape(-1) for part in slices]


def some_of(p, which):
    """The same batch with the responses `which` only, whole groups of them."""
    rewards = p["rewards"].view(-1)[which[: len(which) // 3 * 3]].view(-1, 3)
    return {**p, **{k: p[k][which] for k in ("hidden", "target", "ref_hidden", "label")}, "rewards": rewards}


def columns_of(p, part):
    """The same batch with the positions `part` of each response."""
    return {**p, **{k: p[k][:, part] for k in ("hidden", "target", "ref_hidden")}}


def packed(p, lengths):
    """The same end to end, the first `lengths` positions of each response."""
    at = [(b, t) for b, n in enumerate(lengths) for t in range(n)]
    b, t = torch.tensor(at, dtype=torch.int64).view(-1, 2).t()
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return {**p, **{k: p[k][b, t] for k in ("hidden", "target", "ref_hidden")}}, {"cu_seqlens": ends}


GROUPS = {}


def grid(shape):
    """Of the ranks laid out in `shape`, this one's group along each dimension. Made once; all ranks ask alike."""
    if shape not in GROUPS:
        ranks, mine = torch.arange(dist.get_world_size()).view(shape), []
        for dimension in range(len(shape)):
            for members in ranks.movedim(dimension, -1).reshape(-1, shape[dimension]).tolist():
                group = dist.new_group(members)
                if dist.get_rank() in members:
                    mine.append(group)
        GROUPS[shape] = mine
    return GROUPS[shape]


def place(shape):
    """This rank's index along each dimension."""
    return tuple(int(i) for i in (torch.arange(dist.get_world_size()).view(shape) == dist.get_rank()).nonzero()[0])


def sharded(names, shape, vocab=None, data=None, sequence=None, pack=False, keywords=None, **given):
    """The losses `names` on this rank's part of head, batch and responses.

    shape: ranks along (vocab, data, sequence), each cut into the lengths of the argument of that name.
    """
    groups, at = grid(shape), place(shape)
    whole, found = problem(**given), []
    for name in names:
        p, more = whole, {**(keywords or {})}
        if data is not None:
            p = some_of(p, units(name, data)[at[1]])
            more["data_group"] = groups[1]
        if sequence is not None:
            p = columns_of(p, cuts(sequence, whole["target"].shape[1])[at[2]])
            more["sequence_group"] = groups[2]
        if pack:
            p, bounds = packed(p, [p["target"].shape[1]] * len(p["target"]))
            more.update(bounds)
        rows, shard = slice(None), None
        if vocab is not None:
            rows = cuts(vocab)[at[0]]
            shard = VocabShard.of(groups[0], rows.stop - rows.start)
        found.append(run(p, name, shard=shard, rows=rows, **more))
    return found


def running(parts):
    """bco's running δ over two batches, uneven on the ranks: [δ after each]."""
    p, delta, found = problem(), RunningMean(), []
    for seed in (0, 1):
        p = problem(seed=seed)
        mine = some_of(p, units("bco", parts)[dist.get_rank()])
        run(mine, "bco", delta=delta, data_group=dist.group.WORLD)
        found.append(float(delta.mean))
    return found, float(delta.count)


def mismatched(parts):
    """kto's z0 from Δ of which each rank has some, the last none."""
    p, rank = problem(), dist.get_rank()
    z0 = torch.arange(1.0, 6.0).split(parts)[rank] if rank < len(parts) else torch.zeros(0)
    mine = some_of(p, units("kto", (1, 5, 2, 0))[rank])
    return run(mine, "kto", z0=z0, data_group=dist.group.WORLD)


# -- single questions -------------------------------------------------------------------------------------------------


def scores_of(parts, **given):
    """All scores of `linear_logprob` with entropy, and the gradients of Σ score · weight of its own."""
    p, rows = problem(**given), cuts(parts)[dist.get_rank()]
    return scores(p, rows, VocabShard.of(dist.group.WORLD, rows.stop - rows.start))


def scores(p, rows=slice(None), shard=None):
    """The same of a batch."""
    hidden, weight = p["hidden"].clone().requires_grad_(), p["weight"][rows].clone().requires_grad_()
    bias = None if p["bias"] is None else p["bias"][rows]
    made = linear_logprob(hidden, LMHead(weight, bias, p["softcap"], p["scale"], shard), p["target"], entropy=True)
    total = sum(
        (torch.where(x.isfinite(), x, 0) * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)).sum()
        for x in made
    )
    total.backward()
    return {"scores": [x.detach() for x in made], "hidden": hidden.grad, "weight": weight.grad}


def ruled_out(parts):
    """As `scores_of` with a bias of −∞ on all rows of the last rank, and on the first row of the others."""
    p, slices = problem(head=("bias",)), cuts(parts)
    rows = slices[dist.get_rank()]
    return scores(without(p, slices), rows, VocabShard.of(dist.group.WORLD, rows.stop - rows.start))


def without(p, slices):
    """The batch where those rows of the head have a bias of −∞, and no token has them for its target."""
    bias = p["bias"].clone()
    bias[slices[-1]] = -torch.inf
    for part in slices:
        bias[part.start] = -torch.inf
    possible = bias.isfinite().nonzero()[:, 0]
    target = torch.where(p["target"] < 0, p["target"], possible[p["target"] % len(possible)])
    return {**p, "bias": bias, "target": target}


def confident(parts):
    """λ of tokens whose logit is 40 above the others, float32."""
    p, rows = problem("float32"), cuts(parts)[dist.get_rank()]
    p = certain(p)
    head = LMHead(p["weight"][rows], shard=VocabShard.of(dist.group.WORLD, rows.stop - rows.start))
    return linear_logprob(p["hidden"], head, p["target"]).log_odds


def certain(p):
    """The batch whose hidden states are 40 / |w|² of their target's row of the head."""
    rows = p["weight"][p["target"].clamp(min=0)]
    return {**p, "hidden": 40 * rows / rows.square().sum(-1, keepdim=True)}


def autocast(parts, **given):
    """dpo of float32 hidden states and weights in bfloat16 products."""
    p, rows = problem("float32", **given), cuts(parts)[dist.get_rank()]
    shard = VocabShard.of(dist.group.WORLD, rows.stop - rows.start)
    with torch.autocast("cpu", torch.bfloat16):
        return run(p, "dpo", shard=shard, rows=rows)


def drawn_alike(shape, **cut):
    """mc_po's draws of ranks with the same responses, from generators that differ: loss of each rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    keywords = {"sampler": "random", "m": 1, "generator": generator}
    return [float(x["loss"]) for x in sharded(["mc_po"], shape, keywords=keywords, **cut)]


def refused(parts, change, keywords):
    """What an error says on this rank; `change`: of the batch."""
    p, rows = problem(), cuts(parts)[dist.get_rank()]
    p = {**p, **change}
    try:
        shard = VocabShard.of(dist.group.WORLD, rows.stop - rows.start)
        run(p, "mle", shard=shard, rows=rows, **keywords)
    except ValueError as error:
        return str(error)


def refused_of_sequences(keywords):
    """The same of tokens on several ranks."""
    try:
        run(columns_of(problem(), cuts((2,), 5)[0]), "mle", sequence_group=dist.group.WORLD, **keywords)
    except ValueError as error:
        return str(error)


def compiled(**cut):
    """dpo under torch.compile on two ranks, and the same without: [run]."""
    made = []
    for call in (torch.compile(run, backend="aot_eager"), run):
        p, more, rank = problem("float32"), {}, dist.get_rank()
        if "vocab" in cut:
            rows = cuts(cut["vocab"])[rank]
            more = {"shard": VocabShard.of(dist.group.WORLD, rows.stop - rows.start), "rows": rows}
        if "sequence" in cut:
            p, more = columns_of(p, cuts(cut["sequence"], 5)[rank]), {"sequence_group": dist.group.WORLD}
        made.append(call(p, "dpo", **more))
    return made


def held_beyond(tokens, width, vocab, workspace, name):
    """Bytes that a step holds at its worst beyond inputs and gradients, and what the plan says of it."""
    from rgpb.bench.measure import peak_memory
    from rgpb.engine.chunks import sizes
    from rgpb.engine.plan import plan, shard_held

    group, ranks = dist.group.WORLD, dist.get_world_size()
    rows = vocab // ranks
    generator = torch.Generator().manual_seed(dist.get_rank())
    weight = torch.randn(rows, width, generator=generator).requires_grad_()
    hidden = torch.randn(4, tokens // 4, width, generator=torch.Generator().manual_seed(9)).requires_grad_()
    target = torch.randint(vocab, (4, tokens // 4), generator=torch.Generator().manual_seed(9))
    target[:, ::4] = -100
    tokens = int((target != -100).sum())
    head = LMHead(weight, shard=VocabShard.of(group, rows))
    given = {"label": torch.tensor([1, -1, 1, -1]), "ref": torch.full(target.shape, -3.0)} if name == "bnf" else {}

    class Result:
        gradients = ()

    def step():
        hidden.grad = weight.grad = None
        fused_loss(hidden, head, target, objective=name, workspace=workspace, **given).backward()
        Result.gradients = (hidden.grad, weight.grad)
        return Result

    own = sizes(rows, width, torch.float32, torch.float32, "cpu", "cpp")
    planned = plan(tokens, own, ("cpp", "torch"), hidden_grad=True, weight_grad=True, couples="batch", path="two_pass",
                   workspace=workspace)  # fmt: skip
    return peak_memory(step, "cpu").extra, planned.extra_bytes + shard_held(tokens, width, 4)

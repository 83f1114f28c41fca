"""Circuits carried across a bridge: identities on a rotated copy, controls, ablations, the stage and its refusals."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import rotate_
from made_bridge import chosen, exact_bridge

from sparsetrain.bridging import steering
from sparsetrain.bridging.bridge import Bridge, Pair
from sparsetrain.bridging.dense import OwnModel
from sparsetrain.bridging.directions import read_norm, read_of, transferred
from sparsetrain.bridging.residuals import BridgeError
from sparsetrain.bridging.transfer_measures import against_random, defined, share
from sparsetrain.config import AbsTopKOptions, ModelOptions
from sparsetrain.model import Transformer
from sparsetrain.tasks import TaskData

V, T, D = 40, 9, 16
ALL = AbsTopKOptions(*[1.0] * 8)
READS = ("blocks.0.attn_in", "blocks.0.mlp_in", "blocks.1.attn_in", "blocks.1.mlp_in")


def options(**changed) -> ModelOptions:
    return ModelOptions(n_layers=2, d_model=D, d_head=4, n_ctx=16, abs_topk=ALL, bigram=False, **changed)


@torch.no_grad()
def shaken(model: Transformer, seed=0) -> Transformer:
    """A model none of whose parameters is as it was at first, gains of norms included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def pair():
    """A dense model with uneven gains, its copy in another basis, and the exact bridge between their residuals."""
    dense = shaken(Transformer(options(), V))
    sparse = copy.deepcopy(dense)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]
    rotate_(sparse, rotation)
    give_gains_(sparse)
    sparse, dense = OwnModel(sparse, None), OwnModel(dense, None)
    return sparse, dense, exact_bridge(sparse, rotation)


@torch.no_grad()
def give_gains_(model):
    """Uneven gains, undone in what reads through them."""
    norms = [(m.norm.resid, r) for b in model.blocks for m, r in ((b.attn, b.attn.qkv), (b.mlp, b.mlp.up))]
    for norm, reader in [*norms, (model.norm, model.unembed)]:
        gain = torch.linspace(0.5, 2, D)
        norm.weight.mul_(gain)
        reader.weight.div_(gain)


def random_tokens(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (n, T), generator=torch.Generator().manual_seed(seed))


def task_data(n: int = 8) -> TaskData:
    """Prompts of random tokens; those of a pair are equally long."""
    last = torch.randint(3, T, (n // 2,), generator=torch.Generator().manual_seed(2)).repeat_interleave(2)
    right = torch.arange(n) % 2
    return TaskData("made", random_tokens(n), last, 3 + right, 4 - right, torch.full((n,), 3), ("",) * n)


def carried(pair, **channels):
    sparse, dense, bridge = pair
    return transferred(chosen(sparse, **channels), bridge, sparse, dense, random_tokens(6, seed=5))[0]


def at_heldout(pair, found):
    sparse, dense, _ = pair
    prompts = steering.read_prompts(dense, task_data(), list(steering.by_read(found)))
    return prompts, steering.node_changes(sparse, found, prompts)


def by_hand(sparse, data, edits):
    """Answers of the sparse model with its reads edited."""
    logits = sparse.steer(data.tokens, edits)
    return steering.answers(logits[torch.arange(len(data)), data.last], data)


@pytest.mark.parametrize("read", [*READS, "final_resid"])
def test_a_direction_does_what_editing_the_channel_does(pair, read):
    """The copy has the sparse model's scales, so that this holds to rounding, at any strength."""
    sparse, dense, _ = pair
    found = carried(pair, **{read.replace(".", "__"): [5]})
    assert [d.node for d in found] == [f"{read}:5"]
    prompts, moved = at_heldout(pair, found)
    assert moved[found[0].node].abs().max() > 0.1

    def edit(strength):
        def edited(x):
            change = steering.changes(x, prompts.data)
            return torch.cat([x[..., :5], x[..., 5:6] + strength * change[..., 5:6], x[..., 6:]], -1)

        return {found[0].read: edited}

    for strength in (0.3, 1.0):
        got = steering.steer(dense, prompts, steering.along(found, moved), strength)
        torch.testing.assert_close(got, by_hand(sparse, prompts.data, edit(strength)), rtol=1e-4, atol=1e-5)


def test_all_channels_of_a_read_are_a_patch_of_it(pair):
    _, dense, _ = pair
    found = carried(pair, blocks__1__attn_in=slice(None))
    prompts, moved = at_heldout(pair, found)
    steered = steering.steer(dense, prompts, steering.along(found, moved), 1)
    patched = steering.steer(dense, prompts, steering.patch(prompts, ["blocks.1.attn_in"]), 1)
    torch.testing.assert_close(steered, patched, rtol=1e-4, atol=1e-5)


def test_all_channels_of_all_reads_are_the_counterfactual(pair):
    """What earlier reads have already moved is not moved again by later ones."""
    _, dense, _ = pair
    found = carried(pair, **{read.replace(".", "__"): slice(None) for read in (*READS, "final_resid")})
    prompts, moved = at_heldout(pair, found)
    target = steering.plain(dense, steering.counterfactuals(prompts.data))
    pushes = steering.along(found, moved)
    torch.testing.assert_close(steering.steer(dense, prompts, pushes, 1), target, rtol=1e-3, atol=1e-4)
    base = steering.plain(dense, prompts.data)
    torch.testing.assert_close(steering.steer(dense, prompts, pushes, 0), base)
    assert share(steering.steer(dense, prompts, pushes, 1), base, target)["value"] == pytest.approx(1, abs=1e-3)


def test_a_counterfactual_asks_for_the_answers_of_its_prompt(pair):
    _, dense, _ = pair
    data = task_data()
    own, other = steering.plain(dense, data), steering.plain(dense, steering.counterfactuals(data))
    rows = torch.arange(len(data)) ^ 1
    torch.testing.assert_close(other[:, :2], own[rows][:, [1, 0]])
    torch.testing.assert_close(other[:, 2], -own[rows][:, 2])


def test_random_directions_have_the_lengths_and_angles_of_the_given(pair):
    """Between reads too: one rotation turns them all."""
    found = carried(pair, blocks__0__mlp_in=[1, 4, 9], blocks__1__mlp_in=[2])
    turned, again = (steering.turned(found, torch.Generator().manual_seed(0)) for _ in range(2))
    ours, theirs = (torch.stack([d.vector for d in those]) for those in (found, turned))
    torch.testing.assert_close(theirs @ theirs.T, ours @ ours.T, rtol=1e-4, atol=1e-5)
    assert (torch.cosine_similarity(ours, theirs).abs() < 0.8).all()
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(turned, again, strict=True))
    assert [d.node for d in turned] == [d.node for d in found]


def test_the_steepest_direction_does_more_than_any_other_of_its_length(pair):
    """And what it does is what the gradient says, as far as that goes: at a small length."""
    _, dense, _ = pair
    (ours,) = (replace(d, vector=1e-2 * d.vector) for d in carried(pair, blocks__0__mlp_in=[1]))
    prompts, moved = at_heldout(pair, [ours])
    base = steering.plain(dense, prompts.data)

    def raised(direction):
        pushes = steering.along([direction], moved)
        return (steering.steer(dense, prompts, pushes, 1) - base)[:, 1].mean().item()

    most = steering.steepest(dense, prompts, moved, ours)
    torch.testing.assert_close(most.vector.norm(), ours.vector.norm())
    others = [steering.turned([ours], torch.Generator().manual_seed(i))[0] for i in range(20)]
    cosines = [torch.cosine_similarity(other.vector, most.vector, dim=0).item() for other in others]
    assert raised(most) > 0
    for other, cosine in zip(others, cosines, strict=True):
        assert raised(other) == pytest.approx(cosine * raised(most), abs=0.03 * raised(most))


def test_the_probe_is_the_way_between_the_sides_and_as_long_as_the_circuits(pair):
    found = carried(pair, blocks__1__mlp_in=[2, 3])
    prompts, moved = at_heldout(pair, found)
    pushes = steering.along(found, moved)
    probe = steering.probes(pushes, prompts)
    read = "blocks.1.mlp_in"
    weight = pushes[read].change.norm(dim=-1)
    by_hand = sum(
        weight[row, t] * (prompts.reads[read][row + 1, t] - prompts.reads[read][row, t])
        for row in range(0, len(prompts.data), 2)
        for t in range(int(prompts.data.last[row]) + 1)
    )
    torch.testing.assert_close(probe[read], by_hand / by_hand.norm(), rtol=1e-4, atol=1e-5)
    made = steering.along_probe(pushes, prompts, probe)[read].change
    torch.testing.assert_close(made.norm(dim=-1), weight)
    assert ((made @ probe[read])[0::2] >= 0).all() and ((made @ probe[read])[1::2] <= 0).all()


def test_prompts_are_compared_from_their_last_tokens_back_to_where_they_first_differ(pair):
    tokens = torch.tensor([[7, 8, 1, 2, 3, 0], [7, 8, 4, 5, 2, 3], [7, 1, 2, 3, 0, 0], [7, 4, 2, 3, 0, 0]])
    data = replace(task_data(4), tokens=tokens, last=torch.tensor([4, 5, 3, 3]))
    values = torch.randn(4, 6, 5)
    found = steering.changes(values, data)
    by_hand = torch.zeros(4, 6, 5)
    for row, at, partner, there in [
        (0, 2, 1, 3), (0, 3, 1, 4), (0, 4, 1, 5),
        (1, 3, 0, 2), (1, 4, 0, 3), (1, 5, 0, 4),  # not at 2, which the shorter one lacks
        *((row, at, 5 - row, at) for row in (2, 3) for at in (1, 2, 3)),
    ]:  # fmt: skip
        by_hand[row, at] = values[partner, there] - values[row, at]
    torch.testing.assert_close(found, by_hand)
    alike = replace(data, tokens=tokens[[0, 0, 2, 2]], last=torch.tensor([4, 4, 3, 3]))
    assert steering.changes(values, alike).abs().sum(-1).nonzero().tolist() == [[0, 4], [1, 4], [2, 3], [3, 3]]


@pytest.mark.parametrize("read", READS)
def test_a_full_patch_of_prompts_of_other_lengths_reaches_reads_before_the_last_token(pair, read):
    """Two prompts that differ in a token in the middle, where one of them has two."""
    _, dense, _ = pair
    tokens = random_tokens(4)
    tokens[1, 4:8] = tokens[0, 3:7]  # after other tokens at 2 and 3
    tokens[3, 4:8] = tokens[2, 3:7]
    tokens[[1, 3], :2] = tokens[[0, 2], :2]
    data = replace(task_data(4), tokens=tokens, last=torch.tensor([6, 7, 6, 7]))
    prompts = steering.read_prompts(dense, data, [read])
    patched = steering.steer(dense, prompts, steering.patch(prompts, [read]), 1)
    base = steering.plain(dense, data)
    assert (patched[:, 2] - base[:, 2]).abs().min() > 1e-3


def test_a_rise_is_held_against_the_size_of_random_ones():
    base = torch.zeros(8, 3)
    found, draws = base.clone(), torch.zeros(2, 8, 3)
    found[:, 1] = 0.4
    draws[0, :, 1], draws[1, :, 1] = 0.1, -0.1  # which would cancel out
    assert against_random(found, draws, base) == pytest.approx(
        {"rise": 0.4, "random_rise": 0, "random_lowest": -0.1, "random_highest": 0.1, "random_size": 0.1,
         "ratio": 4, "low": 4, "high": 4}, abs=1e-6,
    )  # fmt: skip
    found[:4, 1] = 0.2
    measured = against_random(found, draws, base)
    assert measured["ratio"] == pytest.approx(3, rel=1e-5) and 2 <= measured["low"] < 3 < measured["high"] <= 4
    assert against_random(found, draws * 0, base)["ratio"] is None


def test_ablated_reads_have_the_means_component_and_keep_the_rest(pair):
    _, dense, _ = pair
    found = carried(pair, blocks__1__mlp_in=[2, 3, 7])
    spans = steering.spans(found)
    (name, span), mean, x = *spans.items(), torch.randn(D), torch.randn(3, 4, D)
    assert span.shape == (3, D)
    out = steering.ablations(spans, {name: mean})[name](x)
    torch.testing.assert_close(out @ span.T, (mean @ span.T).expand(3, 4, 3), rtol=1e-4, atol=1e-5)
    rest = torch.eye(D) - span.T @ span
    torch.testing.assert_close(out @ rest, x @ rest, rtol=1e-4, atol=1e-5)
    # A read whose every token is ablated along all directions is its mean.
    tokens = task_data().tokens
    means = dense.run(tokens, [name])[0][name].flatten(0, 1).mean(0)
    whole = steering.ablations({name: torch.eye(D)}, {name: means})
    edited = dense.steer(tokens, {name: lambda x: means.expand_as(x)})
    torch.testing.assert_close(dense.steer(tokens, whole), edited, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_a_norm_at_fixed_scale_is_its_derivative_where_the_scale_does_not_change(norm):
    model = OwnModel(shaken(Transformer(options(norm=norm), V)), None)
    module = model.model.blocks[1].mlp.norm.resid
    h = torch.randn(D) * 3
    found = read_norm(model, "blocks.1.mlp_in", h[None])
    change = torch.randn(D)
    along = h - h.mean() if norm == "layer" else h
    if norm != "none":
        change = change - along * (change @ along) / (along @ along)
    _, derivative = torch.autograd.functional.jvp(module, h, change)
    torch.testing.assert_close(found.push(change), derivative, rtol=1e-4, atol=1e-5)
    assert found.centred == (norm == "layer")
    if norm != "layer":
        unit = torch.zeros(D)
        unit[3] = found.pull(3)
        torch.testing.assert_close(found.push(unit)[3], torch.tensor(1.0))


def test_a_norm_of_another_kind_is_refused(pair):
    class Grouped(OwnModel):
        def normed(self, read, resid):
            return torch.nn.functional.group_norm(resid.reshape(-1, D), 4).view_as(resid)

    with pytest.raises(BridgeError, match="norm before blocks.0.attn_in must divide a token's residual by one number"):
        read_norm(Grouped(pair[0].model, None), "blocks.0.attn_in", torch.randn(5, D))


def test_nodes_without_a_place_are_listed_with_the_reason(pair):
    _, dense, _ = pair
    sparse = OwnModel(shaken(Transformer(options(positions="concat", d_pos=4), V)), None)
    with torch.no_grad():
        sparse.model.blocks[1].attn.norm.resid.weight[6] = 0
    bridge = Bridge([Pair("blocks.1.resid_pre", "blocks.0.resid_pre")], D, D, topk=1).requires_grad_(False)
    nodes = chosen(sparse, blocks__0__attn_in=[1], blocks__1__attn_in=[3, 6, D + 1], final_resid=[0], blocks__0__q=[2])
    found, left = transferred(nodes, bridge, sparse, dense, random_tokens(4))
    assert [(d.node, d.dense_site, d.dense_read) for d in found] == [
        ("blocks.1.attn_in:3", "blocks.0.resid_pre", "blocks.0.attn_in")
    ]
    assert {node: why.split(",")[0] for node, why in left.items()} == {
        "blocks.0.attn_in:1": "the bridge has no pair for blocks.0.resid_pre",
        "blocks.1.attn_in:6": "the gain of the sparse model's norm is zero there",
        f"blocks.1.attn_in:{D + 1}": "it reads a channel of positions",
        "final_resid:0": "the bridge has no pair for final_resid",
    }

    class Bare(OwnModel):
        def __init__(self, model):
            super().__init__(model, None)
            self.reads = ("final_in",)

    left = transferred(nodes, bridge, sparse, Bare(dense.model), random_tokens(4))[1]
    assert "through no norm" in left["blocks.1.attn_in:3"]
    assert [read_of(site) for site in sparse.sites] == list(sparse.reads)


def test_a_share_is_a_ratio_of_means_within_its_interval():
    generator = torch.Generator().manual_seed(0)
    base, target = torch.zeros(40, 3), torch.zeros(40, 3)
    target[:, 2] = -4 + torch.randn(40, generator=generator)
    moved = 0.25 * target
    assert share(moved, base, target) == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25}, rel=1e-5)
    moved[:, 2] += torch.randn(40, generator=generator)
    found = share(moved, base, target)
    assert found["low"] < found["value"] < found["high"] and found["high"] - found["low"] > 0.05


def test_a_model_that_cannot_do_the_task_is_told_from_one_that_can():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 3, generator=generator)
    assert not defined(base)[0]  # noise around zero
    base[:, 2] += 2
    assert defined(base)[0]
    base[:, 2] = 0.01
    assert not defined(base)[0]  # certain, but nothing

"""Runs of many node sets on the same prompts: no bit differs from whole runs, and less is computed."""

import pytest
import torch

from sparsetrain.config import RunConfig, load_config
from sparsetrain.kernels import reference
from sparsetrain.model import Transformer, attend_at, taken
from sparsetrain.pruning import replay
from sparsetrain.pruning.ablation import build_ablation, draw_places, site_reader
from sparsetrain.pruning.evaluate import all_answer_logits, answer_logits
from sparsetrain.pruning.graph import full, node_sites
from sparsetrain.pruning.replay import Replay
from sparsetrain.pruning.space import units, without
from sparsetrain.tasks import TaskData

V, T, N = 20, 9, 70  # two batches of prompts
MODELS = {
    "sparse": ["model.positions=concat", "model.d_pos=4"],
    "dense": [
        "model.abs_topk=1",
        "model.norm=layer",
        "model.positions=learned",
        "model.sink=false",
        "model.bigram=false",
    ],
    "of all positions": ["model.causal=false"],
}
KINDS = ["zero", "mean_position", "resample", "corrupted"]


def build(name: str) -> Transformer:
    small = ["model.n_layers=2", "model.d_model=16", "model.d_head=4", "model.n_ctx=12", "sparsity.density=1"]
    model = Transformer(load_config(RunConfig, [*small, *MODELS[name]]).model, V, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model.requires_grad_(False)


def prompts(n_read: int = 0) -> TaskData:
    generator = torch.Generator().manual_seed(2)
    tokens, corrupted = (torch.randint(V, (N, T), generator=generator) for _ in range(2))
    last = torch.randint(3, T, (N, n_read) if n_read else (N,), generator=generator)
    right = torch.arange(N) % 2
    return TaskData("made", tokens, last, right, 1 - right, torch.zeros(N, dtype=torch.int64), ("",) * N, corrupted)


def ablation_of(model, kind, data):
    corpus = [torch.randint(V, (8, 12), generator=torch.Generator().manual_seed(3))]
    return build_ablation(site_reader(model, node_sites(model.options)), kind, corpus, data)


def some_of(nodes, share, seed):
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.rand(mask.shape, generator=generator) < share for site, mask in nodes.items()}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sink", [True, False])
def test_a_few_queries_get_what_all_do(sink, causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 7, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    logits = torch.tensor([0.5, -1.0], dtype=torch.float64) if sink else None
    at = torch.tensor([[0, 3], [6, 6], [2, 5]])
    expected = taken(reference.attend(q, k, v, logits, 4, causal), at)
    torch.testing.assert_close(attend_at(taken(q, at), k, v, logits, 4, at if causal else None), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_read", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_answers_alone_are_those_of_a_run_of_all_positions(name, n_read, kind):
    model, data = build(name).double(), prompts(n_read)
    ablation, nodes = ablation_of(model, kind, data), some_of(full(model), 0.5, 0)
    read = site_reader(model, node_sites(model.options))
    places = draw_places(ablation, data.tokens, torch.Generator().manual_seed(0))
    replaced = ablation.replacements(read, data.trimmed(), places)
    edits = {site: lambda x, s=site: torch.where(nodes[s], x, replaced[s].to(x.dtype)) for site in nodes}
    logits, _ = model.run(data.trimmed().tokens, edits=edits)
    found = answer_logits(model, data, nodes, ablation, places)
    torch.testing.assert_close(found, taken(logits, data.read_at) if n_read else taken(logits, data.read_at)[:, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_no_bit_depends_on_what_was_run_before(name, kind, monkeypatch):
    model, data = build(name), prompts()
    ablation = ablation_of(model, kind, data)
    base = some_of(full(model), 0.6, 1)
    one, other = units(base)[3], units(base)[-2]
    tries = [
        base,
        without(base, [one]),
        without(base, [other]),
        without(base, [one, other]),
        some_of(base, 0.5, 2),
        base,
    ]
    for most in (2**30, 30_000, 1):
        monkeypatch.setattr(replay, "KEPT_BYTES", most)
        runs = Replay(model, data, ablation)
        for nodes in tries:
            assert torch.equal(runs.logits(nodes), all_answer_logits(model, data, nodes, ablation))


def test_a_try_begins_where_its_unit_is_whatever_was_tried_before():
    model, data = build("sparse"), prompts()
    runs, base = Replay(model, data, ablation_of(model, "zero", data)), full(model)
    calls = []
    for l, block in enumerate(model.blocks):
        for half in ("attn", "mlp"):
            getattr(block, half).register_forward_hook(lambda *_, name=f"{half}{l}": calls.append(name))

    def halves(nodes):
        calls.clear()
        runs.logits(nodes)
        return list(dict.fromkeys(calls))

    def dropped(site, of=base):
        return without(of, [(site, (1,))])

    everything = ["attn0", "mlp0", "attn1", "mlp1"]
    assert halves(base) == everything
    assert halves(dropped("blocks.0.q")) == everything
    assert halves(dropped("blocks.1.mlp_act")) == ["mlp1"]
    assert halves(dropped("blocks.0.mlp_in")) == everything[1:]
    assert halves(dropped("blocks.1.v")) == everything[2:]  # not from where the try before it differs
    taken_ = dropped("blocks.1.k")
    assert halves(taken_) == everything[2:]
    assert halves(dropped("blocks.1.mlp_out", taken_)) == ["mlp1"]  # what was tried last was taken
    assert halves(dropped("final_resid", taken_)) == ["mlp1"]
    assert halves(dropped("blocks.1.q", taken_)) == everything[2:]

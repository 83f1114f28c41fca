"""Circuit probing, on models whose neurons are known by construction."""

import dataclasses
import math

import pytest
import torch

from sparsetrain.config import ConfigError, ProbingOptions, RunConfig, load_config
from sparsetrain.model import Transformer
from sparsetrain.pruning import probing, probing_measures
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.probing_data import ProbeData, check_labels
from sparsetrain.tasks import TaskData, TaskError

OFF = [f"model.abs_topk.{s}=1" for s in ("attn_in", "q", "k", "v", "attn_out", "mlp_in", "mlp_act", "mlp_out")]
PLAIN = ["model.n_layers=1", "model.d_model=24", "model.d_head=12", "model.mlp_ratio=1", "model.n_ctx=4",
         "model.norm=none", "model.activation=relu", "model.bias=false", "model.bigram=false", "model.sink=false",
         "sparsity.density=1", *OFF]  # fmt: skip
U, W, K = 4, 3, 8  # values of the variables u and w, and tokens with the same values
OPTIONS = ProbingOptions(batch_size=96, epochs=60, lr=0.01)


def tokens_of() -> tuple[torch.Tensor, torch.Tensor]:
    """The values of u and w of each of U x W x K tokens."""
    rows = torch.cartesian_prod(torch.arange(U), torch.arange(W), torch.arange(K))
    return rows[:, 0], rows[:, 1]


@pytest.fixture(scope="module", params=[0, 1, 2])
def built(request) -> tuple[Transformer, dict[str, dict[str, list[int]]]]:
    """A model with u, w and noise in neurons of their own, and which these are, by variable and site.

    A first token is any of the U x W x K, a second token another one with a mark. Head 0 carries u and head 1 w from
    the first token to the second; the MLP reads u and w of the token it is at. The first 12 channels of the residual
    stream hold the embedding, the others what sublayers write.
    """
    seed = request.param
    generator = torch.Generator().manual_seed(seed)
    u, w = tokens_of()
    n = len(u)
    model = Transformer(load_config(RunConfig, PLAIN).model, 2 * n).requires_grad_(False)
    for p in model.parameters():
        p.zero_()
    model.embed.weight[torch.arange(2 * n), u.repeat(2)] = 1
    model.embed.weight[torch.arange(2 * n), U + w.repeat(2)] = 1
    model.embed.weight[:, 7:10] = torch.rand(2 * n, 3, generator=generator)
    model.embed.weight[:n, 10], model.embed.weight[n:, 11] = 1, 1
    act, out = torch.randperm(24, generator=generator)[:10], 12 + torch.randperm(12, generator=generator)[:10]
    block = model.blocks[0]
    block.mlp.up.weight[act, torch.arange(10)] = 1
    block.mlp.out.weight[out, act] = 1
    for head, at in ((0, 0), (1, 12)):
        q, k, v = (24 * i + at + head for i in range(3))
        block.attn.qkv.weight[q, 11] = block.attn.qkv.weight[k, 10] = 12
        values = range(U) if head == 0 else range(U, U + W)
        for i, value in enumerate(values):
            block.attn.qkv.weight[v + i, value] = 1
            block.attn.out.weight[out[value], at + head + i] = 1
    model.unembed.weight[torch.arange(U), out[:U]] = 1
    expected = {}
    for name, which, head, width in (("u", slice(0, U), 0, U), ("w", slice(U, U + W), 13, W)):
        written = sorted(out[which].tolist())
        expected[name] = {
            "blocks.0.mlp_act": sorted(act[which].tolist()), "blocks.0.mlp_out": written,
            "blocks.0.q": [head], "blocks.0.k": [head], "blocks.0.v": list(range(head, head + width)),
            "blocks.0.attn_out": written,
        }  # fmt: skip
    return model, expected


def prompts(variable: str, n: int, seed: int, of_token: int) -> ProbeData:
    """Two tokens each; the label is a value of the first or the second, and the answer is its u."""
    u, w = tokens_of()
    tokens = torch.randint(len(u), (n, 2), generator=torch.Generator().manual_seed(seed))
    a, b = u[tokens[:, of_token]], w[tokens[:, of_token]]
    label = {"u": a, "w": b, "sum": (a + b) % 3}[variable]
    tokens = tokens + torch.tensor([0, len(u)])
    last = torch.ones(n, dtype=torch.int64)
    data = TaskData("made", tokens, last, a, (a + 1) % U, a, tuple(map(str, range(n))))
    return ProbeData(variable, data, label, last, tuple(map(str, range(int(label.max()) + 1))))


def zero(sublayer: probing.Sublayer) -> Ablation:
    return Ablation("zero", {site: torch.zeros(width) for site, width in sublayer.widths.items()})


def search(model: Transformer, part: str, data: ProbeData, **changes):
    options = dataclasses.replace(OPTIONS, sublayer=f"blocks.0.{part}", **changes)
    ablation = zero(probing.Sublayer(model, options.sublayer))
    return probing.probe(model, data, options, ablation), options, ablation


@pytest.mark.parametrize("variable", ["u", "w"])
@pytest.mark.parametrize("part", ["mlp", "attn"])
def test_exactly_the_neurons_that_compute_a_variable_are_found(built, part, variable):
    model, expected = built
    of_token = int(part == "mlp")
    found, options, ablation = search(model, part, prompts(variable, 288, 0, of_token))
    assert {s: m.nonzero().flatten().tolist() for s, m in found.neurons.items()} == {
        site: expected[variable][site] for site in found.neurons
    }


@pytest.mark.parametrize("part", ["mlp", "attn"])
def test_a_variable_that_is_not_computed_has_no_neurons(built, part):
    found, _, _ = search(built[0], part, prompts("sum", 288, 0, int(part == "mlp")))
    assert not any(mask.any() for mask in found.neurons.values())

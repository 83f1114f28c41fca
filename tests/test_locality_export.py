from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsetrain.config import AbsTopKOptions, ModelOptions
from sparsetrain.locality.edges import edges_of
from sparsetrain.locality.export import permuted
from sparsetrain.locality.measures import block_fill, mean_length
from sparsetrain.locality.positions import LocalityError, identity, plan_of, random_layout
from sparsetrain.model import Transformer

OPTIONS = ModelOptions(n_layers=2, d_model=24, d_head=6, mlp_ratio=3, n_ctx=16, d_pos=5)
VARIANTS = {
    "default": {},
    "concat": {"positions": "concat"},
    "learned": {"positions": "learned"},
    "layer norm": {"norm": "layer"},
    "layer norm, concat": {"norm": "layer", "positions": "concat"},
    "no norm": {"norm": "none", "positions": "concat"},
    "no sinks": {"sink": False},
    "no bigram": {"bigram": False},
    "no biases": {"bias": False},
    "relu": {"activation": "relu"},
    "both ways": {"causal": False},
    "no AbsTopK": {"abs_topk": AbsTopKOptions(*[1.0] * 8)},
    "one head": {"d_head": 24},
}


def trained(options, seed=0):
    """A model none of whose tensors is constant or symmetric, some of it zero; in float64."""
    model, g = Transformer(options, 11), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=g)
            if p.dim() == 2:
                p *= torch.rand(p.shape, generator=g) < 0.5
    return model.double()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("sheet", [1, 2])
def test_the_function_is_kept(name, sheet):
    options = replace(OPTIONS, **VARIANTS[name])
    model = trained(options)
    plan = plan_of(options, 11, sheet)
    layout = random_layout(plan, 1)
    other, there = permuted(model, layout)
    tokens = torch.randint(0, 11, (4, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (other(tokens) - model(tokens)).abs().max() < 1e-10
    assert not torch.equal(other.blocks[0].mlp.up.weight, model.blocks[0].mlp.up.weight)
    edges, moved = edges_of(model, plan), edges_of(other, plan)
    assert mean_length(moved, there) == pytest.approx(mean_length(edges, layout), abs=1e-12)
    assert block_fill(moved, identity(plan), 4, 0.2) == block_fill(edges, without_tokens(layout), 4, 0.2)


def without_tokens(layout):
    names = ("tokens_in", "tokens_out", "contexts")
    return layout.replace({n: np.arange(len(s)) for n, s in layout.slots.items() if n in names})


def test_without_places_for_tokens_and_from_candidates():
    model = trained(OPTIONS).float()
    dense, _ = permuted(model, random_layout(plan_of(OPTIONS, 11, tokens=False), 1))
    up = model.blocks[1].mlp.up
    up.hold_((up.weight != 0).flatten().nonzero().flatten())
    held, _ = permuted(model, random_layout(plan_of(OPTIONS, 11, tokens=False), 1))
    assert all(torch.equal(p, held.state_dict()[n]) for n, p in dense.state_dict().items())


def test_the_model_itself_is_not_touched():
    model = trained(OPTIONS)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    other, _ = permuted(model, identity(plan_of(OPTIONS, 11)))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_a_layout_of_another_model_is_refused():
    layout = random_layout(plan_of(replace(OPTIONS, n_layers=3, mlp_ratio=2), 11), 0)
    with pytest.raises(LocalityError) as error:
        permuted(trained(OPTIONS), layout)
    assert "blocks.0.mlp has (48, 0) there, (72, 0) here" in str(error.value)
    assert "blocks.2.qk has (24, 6) there, None here" in str(error.value)

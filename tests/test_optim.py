"""Learning rate, gradient scaling and decay against hand-computed numbers."""

import pytest
import torch

from sparsetrain.config import OptimOptions, RunConfig, SparsityOptions, load_config
from sparsetrain.model import Transformer
from sparsetrain.optim import decay_, learning_rate, scale_gradients_


def test_sharkfin_follows_the_papers_figure():
    """Gao et al. 2025, Fig 11: relative rates of ef = 4, pfrac = 1/4 (density 1/64), read off the figure."""
    optim, target = OptimOptions(lr=1.0), SparsityOptions(density=1 / 64)
    rates = [learning_rate(optim, target, p) for p in (0.01, 0.3, 0.4, 0.5, 1.0)]
    assert rates == pytest.approx([0.125, 0.137, 0.163, 0.505, 0.0], abs=0.01)


def test_without_sharkfin_the_rate_warms_up_and_falls_linearly():
    optim = OptimOptions(lr=2.0, warmup=0.1, sharkfin=False)
    assert [learning_rate(optim, SparsityOptions(), p) for p in (0, 0.05, 0.5)] == pytest.approx([0, 0.95, 1.0])


@pytest.mark.parametrize("rule, size, after", [("normalise", 3.0, 1.0), ("normalise", 0.1, 1.0), ("clip", 3.0, 1.0),
                                               ("clip", 0.1, 0.1), ("none", 3.0, 3.0)])  # fmt: skip
def test_gradients_are_scaled_by_the_rms_over_all_parameters(rule, size, after):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    for p in model.parameters():
        p.grad = torch.full_like(p, size)
    rms = scale_gradients_(model, rule)
    assert rms.item() == pytest.approx(size)
    assert all(torch.allclose(p.grad, torch.tensor(after), rtol=1e-3) for p in model.parameters())


def test_decay_spares_vectors_and_the_bigram_table():
    options = load_config(RunConfig, ["model.n_layers=1", "model.d_model=16", "sparsity.density=1"]).model
    model = Transformer(options, 10, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    decay_(model, OptimOptions(weight_decay=0.1), lr=0.5)
    for name, p in model.named_parameters():
        expected = 1.0 if p.dim() == 1 or name == "bigram" else 0.95
        assert torch.allclose(p, torch.tensor(expected)), name

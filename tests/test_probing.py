"""Circuit probing, on models whose neurons are known by construction."""

import dataclasses
import math

import pytest
import torch

from sparsetrain.config import ConfigError, RunConfig, load_config
from sparsetrain.model import Transformer
from sparsetrain.prune_config import ProbingOptions
from sparsetrain.pruning import probing, probing_measures
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.probing_data import ProbeData, check_labels
from sparsetrain.tasks import TaskData, TaskError

PLAIN = ["model.n_layers=1", "model.d_model=24", "model.d_head=12", "model.mlp_ratio=1", "model.n_ctx=4",
         "model.norm=none", "model.activation=relu", "model.bias=false", "model.bigram=false", "model.sink=false",
         "sparsity.density=1", "model.abs_topk=1"]  # fmt: skip
U, W, K = 4, 3, 8  # values of the variables u and w, and tokens with the same values
OPTIONS = ProbingOptions(batch_size=96, epochs=40, lr=0.01, count_penalty=3e-3)


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


def search(model: Transformer, part: str, data: ProbeData, state=None, **changes) -> probing.Found:
    options = dataclasses.replace(OPTIONS, sublayer=f"blocks.0.{part}", **changes)
    return probing.probe(model, data, options, zero(probing.Sublayer(model, options.sublayer)), state)


def numbers(found: probing.Found) -> dict[str, list[int]]:
    return {site: mask.nonzero().flatten().tolist() for site, mask in found.neurons.items()}


@pytest.mark.parametrize("variable", ["u", "w"])
@pytest.mark.parametrize("part", ["mlp", "attn"])
def test_exactly_the_neurons_that_compute_a_variable_are_found(built, part, variable):
    model, expected = built
    found = search(model, part, prompts(variable, 192, 0, int(part == "mlp")))
    assert numbers(found) == {site: expected[variable][site] for site in found.neurons}


def test_the_published_penalty_finds_them_too(built):
    model, expected = built
    found = search(model, "mlp", prompts("u", 192, 0, 1), count_penalty=ProbingOptions().count_penalty)
    assert numbers(found) == {site: expected["u"][site] for site in found.neurons}


@pytest.mark.parametrize("part", ["mlp", "attn"])
def test_nothing_is_found_for_shuffled_labels(built, part):
    found = search(built[0], part, prompts("u", 192, 0, int(part == "mlp")).shuffled(1))
    assert not any(numbers(found).values())


def test_measures_of_known_neurons(built):
    model, _ = built
    train, heldout = (prompts("u", 192, seed, 1) for seed in (0, 1))
    options = dataclasses.replace(OPTIONS, sublayer="blocks.0.mlp")
    ablation = zero(probing.Sublayer(model, options.sublayer))
    found = probing.probe(model, train, options, ablation)
    measured = probing_measures.measure_probing(model, found, (train, heldout), ablation, options)
    assert measured["n_neurons"] == 2 * U and measured["n_all"] == 48 and measured["answer"] == ""
    assert measured["knn"] == 1 and measured["knn_chance"] == 1 / U
    assert measured["knn_full"] < 0.9, "w and noise stand in the way"
    # Head 0 brings the first token's u to the same channels, so that the answer is not certain even in the full model.
    assert measured["accuracy"] > measured["accuracy_without"] + 0.2
    assert measured["accuracy_without_others"] == measured["accuracy"], "the answer does not read the others"
    assert measured["accuracy_without_random_std"] > 0


def test_an_empty_mask_has_a_stated_answer(built):
    model, _ = built
    train, heldout = (prompts("u", 96, seed, 1).shuffled(seed) for seed in (0, 1))
    options = dataclasses.replace(OPTIONS, sublayer="blocks.0.mlp", epochs=2, count_penalty=10)
    ablation = zero(probing.Sublayer(model, options.sublayer))
    found = probing.probe(model, train, options, ablation)
    measured = probing_measures.measure_probing(model, found, (train, heldout), ablation, options)
    assert measured["n_neurons"] == 0
    assert measured["answer"].startswith("no neuron of blocks.0.mlp under zero ablation brings prompts of the same u")
    first = (heldout.label == 0).float().mean().item()
    assert measured["knn"] == pytest.approx(first), "a zero vector is as near to every exemplar: the first is taken"
    assert measured["accuracy"] == measured["accuracy_without"] == measured["accuracy_without_random"]


def test_exemplars_by_hand():
    exemplars, classes = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([4, 7])
    updates = torch.tensor([[2.0, 1.0], [0.1, 0.2], [-1.0, -0.5], [1.0, 1.1]])
    # Nearest: the first; the second; the second (cosine -0.45 against -0.89); the second.
    assert probing_measures.exemplar_accuracy(exemplars, classes, updates, torch.tensor([4, 7, 4, 4])) == 0.5


def plain_loss(updates: list[list[float]], label: list[int]) -> float:
    """The published formula, written out."""
    total = 0.0
    for i, x in enumerate(updates):
        same = everything = 0.0
        for j, y in enumerate(updates):
            if i != j:
                cosine = sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(
                    sum(a * a for a in x) * sum(b * b for b in y)
                )
                near = math.exp(-(1 - cosine))
                everything += near
                same += near if label[i] == label[j] else 0
        total -= math.log((same + 1e-5) / (everything + 1e-5))
    return total / len(updates)


def test_the_loss_is_the_published_formula_and_has_its_gradient():
    generator = torch.Generator().manual_seed(0)
    updates = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 0, 1, 0, 1, 1, 3])  # 2 and 3 have no other of their kind
    ours = probing.soft_nearest_neighbours(updates, label)
    assert ours.item() == pytest.approx(plain_loss(updates.tolist(), label.tolist()), abs=1e-12)
    single = probing.soft_nearest_neighbours(updates.float(), label)
    assert single.item() == pytest.approx(ours.item(), abs=1e-5)
    assert torch.autograd.gradcheck(
        lambda x: probing.soft_nearest_neighbours(x, label), (updates.clone().requires_grad_(),)
    )


def test_the_loss_of_zero_vectors_is_finite_and_so_is_its_gradient():
    updates = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    some = updates * torch.tensor([1, 0, 1, 0])[:, None]
    loss = probing.soft_nearest_neighbours(some, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.isfinite() and updates.grad.isfinite().all() and updates.grad.abs().max() < 10


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_sublayer_on_its_own_does_what_it_does_in_the_model(part):
    """With AbsTopK, a norm, biases and concatenated positions; at positions that differ."""
    options = ["model.n_layers=2", "model.d_model=16", "model.d_head=4", "model.n_ctx=8", "sparsity.density=1",
               "model.positions=concat", "model.d_pos=4"]  # fmt: skip
    model = Transformer(load_config(RunConfig, options).model, 20, torch.Generator().manual_seed(0))
    tokens = torch.randint(20, (5, 8), generator=torch.Generator().manual_seed(1))
    position = torch.tensor([7, 2, 3, 3, 5])
    zeros = torch.zeros(5, dtype=torch.int64)
    data = ProbeData("v", TaskData("t", tokens, position, zeros, zeros, zeros, tuple("abcde")), zeros, position, ("0",))
    sublayer = probing.Sublayer(model, f"blocks.1.{part}")
    generator = torch.Generator().manual_seed(2)
    masks = {site: torch.rand(width, generator=generator) for site, width in sublayer.widths.items()}
    replacements = {site: torch.randn(width, generator=generator) for site, width in sublayer.widths.items()}
    ours = sublayer.updates(sublayer.inputs(data), position, masks, replacements)
    edits = {s: lambda x, s=s: x * masks[s] + (1 - masks[s]) * replacements[s] for s in masks}
    _, seen = model.run(tokens, read=[f"blocks.1.{part}_out"], edits=edits)
    torch.testing.assert_close(ours, seen[f"blocks.1.{part}_out"][torch.arange(5), position], rtol=0, atol=1e-6)
    assert len(ours.unique(dim=0)) == 5


def test_a_search_that_was_killed_goes_on_to_the_same_bits(built, tmp_path, monkeypatch):
    model, _ = built
    data, state = prompts("u", 96, 0, 1), tmp_path / "deep" / "state.safetensors"
    whole = search(model, "mlp", data, epochs=7)
    finish = probing._Search.finish_epoch

    def killed(self, loss):
        if self.epoch == 4:
            raise KeyboardInterrupt
        finish(self, loss)

    with monkeypatch.context() as m:
        m.setattr(probing._Search, "finish_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            search(model, "mlp", data, state, epochs=7)
    assert all(p.requires_grad is False for p in model.parameters())
    resumed = search(model, "mlp", data, state, epochs=7)
    assert (resumed.first_loss, resumed.last_loss) == (whole.first_loss, whole.last_loss)
    assert all(torch.equal(resumed.tau[site], whole.tau[site]) for site in whole.tau)
    with monkeypatch.context() as m:
        m.setattr(probing._Search, "step", lambda self, loss: pytest.fail("a finished search has no step to take"))
        again = search(model, "mlp", data, state, epochs=7)
    assert all(torch.equal(again.tau[site], whole.tau[site]) for site in whole.tau)


def test_a_state_of_another_search_or_a_damaged_one_is_not_used(built, tmp_path, caplog):
    model, _ = built
    data, state = prompts("u", 96, 0, 1), tmp_path / "state.safetensors"
    search(model, "mlp", data, state, epochs=2)
    other = search(model, "mlp", data.shuffled(0), state, epochs=2)
    assert "is of a search with other settings, prompts or weights" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(
        other.tau.values(), search(model, "mlp", data.shuffled(0), epochs=2).tau.values(), strict=True))  # fmt: skip
    state.write_bytes(state.read_bytes()[:40])
    search(model, "mlp", data, state, epochs=2)
    assert "cannot be read" in caplog.text


def test_labels_of_no_use_are_refused(built):
    model, _ = built
    data = prompts("u", 8, 0, 1)

    def labelled(*label):
        return dataclasses.replace(data, label=torch.tensor(label), classes=("one", "two", "three"))

    with pytest.raises(TaskError, match="u must have at least 2 values among the training prompts, got 1; take other"):
        search(model, "mlp", labelled(1, 1, 1, 1, 1, 1, 1, 1))
    with pytest.raises(TaskError, match="must have at least 2 training prompts, got two has 1; raise train_pairs"):
        search(model, "mlp", labelled(0, 0, 0, 1, 2, 2, 2, 2))
    with pytest.raises(TaskError, match="got three has 0"):
        check_labels(labelled(0, 0, 0, 1, 1, 1, 1, 1), labelled(0, 0, 0, 1, 1, 1, 1, 2))
    with pytest.raises(ConfigError, match=r"sublayer must be one of blocks.0.attn, blocks.0.mlp, got 'blocks.1.mlp'"):
        probing.Sublayer(model, "blocks.1.mlp")

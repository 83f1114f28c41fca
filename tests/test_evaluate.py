"""Ablation, calibration and measures against hand-computed numbers and identities."""

import math

import pytest
import torch
import torch.nn.functional as F

import sparsetrain
from sparsetrain.pruning import evaluate, graph
from sparsetrain.pruning.ablation import Ablation, build_ablation, draw_places, site_reader
from sparsetrain.tasks import TaskData, encode_task, load_task


@pytest.fixture(scope="module")
def loaded(tiny_run):
    model, tokenizer = sparsetrain.load(tiny_run)
    model.requires_grad_(False)
    return model, tokenizer


@pytest.fixture(scope="module")
def data(loaded) -> TaskData:
    g = torch.Generator().manual_seed(0)
    last = torch.tensor([9, 5, 7, 9])
    answers = torch.tensor([3, 4, 3, 4])
    return TaskData("made", torch.randint(400, (4, 10), generator=g), last, answers, answers.flip(0),
                    torch.full((4,), 3), ("a", "b", "c", "d"))  # fmt: skip


@pytest.fixture(scope="module")
def corpus():
    return [torch.randint(400, (4, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("kind", ["mean_data", "mean_task", "zero", "resample"])
def test_invariant_keeping_every_node_is_the_full_model(loaded, data, corpus, kind):
    model, _ = loaded
    ablation = build_ablation(site_reader(model, graph.node_sites(model.options)), kind, corpus, data)
    rows = torch.arange(4)
    for nodes in (graph.full(model), {s: m.float() for s, m in graph.full(model).items()}):
        kept = evaluate.all_answer_logits(model, data, nodes, ablation)
        torch.testing.assert_close(kept, model(data.tokens)[rows, data.last], rtol=0, atol=1e-5)


def test_means_are_over_all_tokens_of_the_corpus(loaded, corpus):
    model, _ = loaded
    ablation = build_ablation(site_reader(model, graph.node_sites(model.options)), "mean_data", corpus)
    _, seen = model.run(torch.cat(corpus), read=["blocks.1.mlp_act", "final_resid"])
    for site, x in seen.items():
        torch.testing.assert_close(ablation.values[site], x.flatten(0, 1).mean(0), rtol=1e-4, atol=1e-6)


def test_task_means_leave_out_padding(loaded, data):
    model, _ = loaded
    ablation = build_ablation(site_reader(model, graph.node_sites(model.options)), "mean_task", [], data)
    _, seen = model.run(data.tokens, read=["blocks.0.q"])
    real = torch.cat([seen["blocks.0.q"][i, : n + 1] for i, n in enumerate(data.last)])
    torch.testing.assert_close(ablation.values["blocks.0.q"], real.mean(0), rtol=1e-4, atol=1e-6)


def test_ablated_nodes_take_the_replacement_and_kept_ones_do_not_change(loaded, data):
    model, _ = loaded
    site = "blocks.0.attn_in"
    mask = torch.zeros(32, dtype=torch.bool)
    mask[:5] = True
    values = {s: torch.full((n,), 0.5) for s, n in graph.node_sites(model.options).items()}
    edits = evaluate.mask_edits({site: mask}, values)
    _, seen = model.run(data.tokens, read=[site], edits=edits)
    _, plain = model.run(data.tokens, read=[site])
    assert (seen[site][..., 5:] == 0.5).all()
    assert torch.equal(seen[site][..., :5], plain[site][..., :5])
    soft = evaluate.mask_edits({site: mask.float()}, values)
    torch.testing.assert_close(model.run(data.tokens, edits=soft)[0], model.run(data.tokens, edits=edits)[0])


def test_resampled_nodes_come_from_one_place_of_the_corpus(loaded, data, corpus):
    model, _ = loaded
    ablation = build_ablation(site_reader(model, graph.node_sites(model.options)), "resample", corpus, seed=3)
    places = draw_places(ablation, data.tokens, torch.Generator().manual_seed(0))
    sites = ("blocks.1.mlp_in", "blocks.1.mlp_act")
    nothing = {s: torch.zeros(n, dtype=torch.bool) for s, n in graph.node_sites(model.options).items() if s in sites}
    read = site_reader(model, graph.node_sites(model.options))
    edits = evaluate.mask_edits(nothing, ablation.replacements(read, data, places))
    _, seen = model.run(data.tokens, read=sites, edits=edits)
    _, whole = model.run(torch.cat(corpus), read=sites)
    row = places[2, 4]
    origin = (whole[sites[0]].flatten(0, 1) - ablation.values[sites[0]][row]).abs().sum(-1).argmin()
    for site in sites:
        torch.testing.assert_close(seen[site][2, 4], whole[site].flatten(0, 1)[origin], rtol=0, atol=1e-5)


def test_an_empty_circuit_says_the_same_whatever_the_prompt(loaded, data, corpus):
    model, _ = loaded
    ablation = build_ablation(site_reader(model, graph.node_sites(model.options)), "mean_data", corpus)
    nothing = {site: ~mask for site, mask in graph.full(model).items()}
    logits = evaluate.all_answer_logits(model, data, nothing, ablation)
    bigram = F.embedding(data.tokens[torch.arange(4), data.last], model.bigram)
    rest = logits - bigram
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=0, atol=1e-5)


def test_task_loss_is_the_binary_cross_entropy_of_the_answers(data):
    logits = torch.zeros(4, 400)
    logits[:, 3], logits[:, 4], logits[:, 7] = 2.0, 0.5, 50.0
    loss, accuracy = evaluate.task_score(logits, data)
    good, bad = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    assert loss == pytest.approx((2 * good + 2 * bad) / 4)
    assert accuracy == 0.5
    assert evaluate.task_score(torch.zeros(4, 400), data)[0] == pytest.approx(evaluate.CHANCE)


def test_calibration_undoes_a_scale_and_a_shift(data):
    g = torch.Generator().manual_seed(0)
    many = data.take([0, 1, 2, 3] * 50)
    side = (many.correct == many.positive).float() * 2 - 1
    logits = torch.zeros(200, 400)
    # Right with probability sigmoid(1) if read as scale 1, shift 0; then distorted.
    sign = torch.where(torch.rand(200, generator=g) < torch.sigmoid(torch.tensor(1.0)), 1.0, -1.0)
    difference = (sign - 0.7 * side) / 0.1
    logits[torch.arange(200), many.correct] = difference
    found = evaluate.calibrate(logits, many)
    assert found.scale == pytest.approx(0.1, rel=0.25)
    assert found.shift == pytest.approx(0.7, abs=0.2)
    assert evaluate.task_score(logits, many, found)[0] < evaluate.task_score(logits, many)[0]


def test_calibration_never_makes_a_useless_circuit_look_good(data):
    logits = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    many = data.take([0, 1, 2, 3] * 100)
    assert evaluate.task_score(logits, many, evaluate.calibrate(logits, many))[0] > 0.66


def test_kl_is_zero_for_equal_logits_and_matches_its_definition():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 9, generator=g), torch.randn(5, 9, generator=g)
    assert evaluate.kl_divergence(a, a) == pytest.approx(0, abs=1e-6)
    p = a.softmax(-1)
    assert evaluate.kl_divergence(a, b) == pytest.approx(
        (p * (p / b.softmax(-1)).log()).sum(-1).mean().item(), rel=1e-4
    )


def test_built_in_tasks_run_through_the_model(loaded, tiny_run):
    model, tokenizer = loaded
    data = encode_task(load_task("single_double_quote"), tokenizer, 4, "heldout", 0, 200)
    nothing = Ablation("zero", {s: torch.zeros(n) for s, n in graph.node_sites(model.options).items()})
    loss, _ = evaluate.task_score(evaluate.all_answer_logits(model, data, graph.full(model), nothing), data)
    assert 0 < loss < 5

"""Brain-inspired modular training: networks, costs, phases and places as published, and what the command says of it."""

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from sparsetrain.bench import bimt, bimt_picture, bimt_report, bimt_tasks
from sparsetrain.bench.bimt_tasks import Examples, Experiment, experiments
from sparsetrain.bench.bimt_training import ARMS, Run, charged_wires, plan_of, strength, wires_of
from sparsetrain.bench.kernels import BenchError
from sparsetrain.cli import main
from sparsetrain.locality.cost import total_cost
from sparsetrain.locality.measures import mean_length

ARM = {name: i for i, name in enumerate(ARMS)}
BIMT = ARM["all (BIMT)"]


def crossed(rng):
    """Outputs that are the inputs in the opposite order: without swaps every wire is long."""
    x, test_x = (2 * torch.rand(64, 4, generator=rng) - 1 for _ in range(2))
    return Examples(x, x.flip(1), test_x, test_x.flip(1))


CROSSED = Experiment((4, 12, 4), crossed, steps=800, lr=1e-2, relayout_every=50)


@pytest.fixture(scope="module")
def trained():
    run = Run(CROSSED, [0, 1])
    run.train()
    return run, {(row["arm"], row["seed"]): row for row in bimt.rows_of(run, "crossed", 1.0)}


def test_all_arms_learn(trained):
    rows, chance = trained[1], 1 / 3
    assert all(row["test"] < chance / 10 for row in rows.values())
    assert max(row["test"] for (arm, _), row in rows.items() if arm == "none") < chance / 1000


@pytest.mark.parametrize("seed", [0, 1])
def test_bimt_has_far_shorter_wires_at_like_error(trained, seed):
    rows = trained[1]
    l1, local, swap, whole = (rows[arm, seed] for arm in ("L1", "L1 + local", "L1 + swap", "all (BIMT)"))
    assert whole["length"] < 0.4 * l1["length"] and whole["length"] < 0.8 * local["length"]
    assert swap["length"] < 0.6 * l1["length"]
    assert whole["test"] < 2 * l1["test"] + 1e-3
    assert whole["n_live"] < rows["none", seed]["n_live"] / 2


def test_swaps_are_never_seen_by_the_network(trained):
    """To the last bit, over a whole training: what moves is where nodes are."""
    run, _ = trained
    n = len(run.seeds)
    for parameter in run.networks.parameters():
        still, moved = (parameter[ARM[arm] * n : (ARM[arm] + 1) * n] for arm in ("L1", "L1 + swap"))
        assert torch.equal(still, moved)
    assert (run.layouts[ARM["L1"] * n].slots["layer.1"] != run.layouts[ARM["L1 + swap"] * n].slots["layer.1"]).any()


def test_a_move_changes_no_output_and_lowers_the_cost():
    run = Run(CROSSED, [3])
    x, _ = run.examples_of("test")
    outputs, cost = run.networks(x), run.cost(0)
    run.move_(200)
    assert torch.equal(run.networks(x), outputs)
    assert run.cost(0) < cost
    assert [layout.slots["layer.1"].tolist() != list(range(12)) for layout in run.layouts] == [0, 0, 0, 1, 1]
    assert [bool(length.any()) for length in run.lengths[0]] == [False, False, True, False, True]


def test_a_seed_trains_alone_as_beside_others(trained):
    run, alone = trained[0], Run(replace(CROSSED, steps=60), [1])
    beside = Run(replace(CROSSED, steps=60), [0, 1])
    for some in (alone, beside):
        some.train()
    for ours, others in zip(alone.networks.parameters(), beside.networks.parameters(), strict=True):
        torch.testing.assert_close(ours, others[1::2])
    again = Run(replace(CROSSED, steps=60), [1])
    again.train()
    assert all(map(torch.equal, alone.networks.parameters(), again.networks.parameters()))
    assert len(run.layouts) == 10


def test_batches_are_the_same_for_all_arms_and_differ_between_steps():
    run = Run(replace(CROSSED, batch=8), [0, 1])
    whole = run.examples_of("train")
    (x, y), (later, _) = run._some(*whole), run._some(*whole)
    assert x.shape == (10, 8, 4) and torch.equal(y, x.flip(2)) and not torch.equal(x, later)
    assert torch.equal(x[0], x[2]) and torch.equal(x[1], x[9]) and not torch.equal(x[0], x[1])


@pytest.mark.parametrize("name", ["independence", "modular_addition", "digits"])
@pytest.mark.parametrize("biases", [False, True])
def test_the_cost_is_that_of_a_loop_over_wires(name, biases):
    known = experiments()[name]
    run = Run(
        replace(
            known, widths=(8, 5, 4, 3), draw=crossed, biases_from=0.5, vocab=known.vocab and 7, dtype=torch.float64
        ),
        [0],
    )
    run.move_(200)
    run.networks.requires_grad_(False)
    expected = sum(by_hand(run, i, biases) for i in range(1, 5))
    halfway = run.experiment.steps // 2
    assert float(run.cost(halfway if biases else halfway - 1)) == pytest.approx(expected, rel=1e-12)


def by_hand(run, i, biases):
    """The published cost of network i."""
    e, arm, total = run.experiment, run.arms[i], 0.0
    places = {name: run.layouts[i].coordinates(name) for name in run.plan.classes}
    for l, weight in enumerate(run.networks.weights):
        n_rows, n_columns = weight.shape[1:]
        below, factor = places[f"layer.{l}"], e.last_factor if l == len(e.widths) - 2 else e.factor
        cost = 0.0
        for j in range(n_rows):
            for k in range(n_columns):
                apart = abs(places[f"layer.{l + 1}"][j] - below[k % len(below)]).sum() if arm.local else 0.0
                cost += abs(float(weight[i, j, k])) * (factor * apart + e.gap)
        bias = sum(e.gap * abs(float(b)) for b in run.networks.biases[l][i]) * biases
        total += cost / (n_rows * n_columns) + bias / n_rows if e.reduce == "mean" else cost + bias
    if e.vocab:
        total += e.gap * float(run.networks.embedding[i].abs().mean())
    return total


@pytest.mark.parametrize("name", ["independence", "modular_addition", "digits"])
def test_nodes_move_by_the_cost_that_is_trained_on(name):
    e = replace(experiments()[name], widths=(8, 5, 4, 3), draw=crossed, dtype=torch.float64, gap=0.0, vocab=0)
    run = Run(e, [0])
    wires = charged_wires(wires_of(run.networks, BIMT, run.plan), e)
    run.networks.requires_grad_(False)
    before, trained_on = total_cost(wires, run.layouts[BIMT]), by_hand(run, BIMT, False)
    run.move_(200)
    after = total_cost(wires, run.layouts[BIMT])
    assert after < before and after / before == pytest.approx(by_hand(run, BIMT, False) / trained_on, rel=1e-6)
    still = run.layouts[BIMT].slots["layer.0"].tolist()
    assert (still == sorted(still)) == (name == "digits") or name == "independence"


def test_wires_carry_the_magnitudes_of_weights():
    run = Run(CROSSED, [0])
    wires = wires_of(run.networks, 3, run.plan)
    assert sum(float(piece.weights.sum()) for piece in wires) == pytest.approx(
        sum(float(w[3].detach().double().abs().sum()) for w in run.networks.weights)
    )
    assert 0.2 < mean_length(wires, run.layouts[3]) < 0.5


def test_phases_are_the_published_ones():
    known = experiments()
    by_name = {
        "independence": {0: 1e-3, 4999: 1e-3, 5000: 1e-2, 14999: 1e-2, 15000: 1e-3, 19999: 1e-3},
        "feature_sharing": {4999: 1e-3, 5000: 1e-2, 15000: 1e-3},
        "compositionality": {4999: 1e-3, 5000: 3e-3, 19999: 3e-3},
        "two_moons": {4999: 1e-3, 5000: 1e-2, 10000: 1e-2},
        "modular_addition": {4999: 0.1, 5000: 1.0, 14999: 1.0, 15000: 0.1},
        "s4": {0: 1.0, 19999: 1.0},
        "digits": {9999: 0.01, 10000: 0.1, 20000: 1.0, 39999: 1.0},
    }
    assert list(by_name) == list(known)
    for name, steps in by_name.items():
        assert {step: strength(known[name], step) for step in steps} == steps
    assert [e.biases_from for e in known.values()] == [0.75, 0.75, 0.75, 0, 0, 0, 0]


def test_networks_are_plain_perceptrons_and_begin_alike_in_all_arms():
    e = replace(experiments()["modular_addition"], widths=(6, 5, 7), vocab=9)
    run = Run(e, [0, 1])
    tokens = torch.randint(9, (10, 11, 2), generator=torch.Generator().manual_seed(0))
    outputs = run.networks(tokens)
    for i in range(10):
        x = F.embedding(tokens[i], run.networks.embedding[i]).flatten(1)
        (first, second), (b, c) = ([p[i] for p in group] for group in (run.networks.weights, run.networks.biases))
        torch.testing.assert_close(outputs[i], F.linear(F.silu(F.linear(x, first, b)), second, c))
    for parameter in run.networks.parameters():
        assert torch.equal(parameter[:2], parameter[8:]) and not torch.equal(parameter[0], parameter[1])
    assert run.networks.weights[0].abs().max() <= 6**-0.5 < 1.05 * run.networks.weights[0].abs().max()


def test_embeddings_side_by_side_share_their_places():
    plan = plan_of(experiments()["modular_addition"])
    assert [plan.classes[f"layer.{i}"].n for i in range(4)] == [32, 50, 50, 59]
    assert plan.matrices[0].columns == ("layer.0", "layer.0") and plan.matrices[1].columns == ("layer.1",)


def test_data_are_what_the_formulas_say():
    x = torch.tensor([[0.5, -0.5, 0.5, 0.5]])
    torch.testing.assert_close(bimt_tasks.independence(x), torch.tensor([[1.0, 1.25]]))
    x = torch.tensor([[0.5, -2.5, 2.0, -2.0]])
    torch.testing.assert_close(bimt_tasks.compositionality(x), torch.tensor([[5.0]]))
    shared = experiments()["feature_sharing"].draw(torch.Generator().manual_seed(0))
    a, b, c = shared.test_x.T
    torch.testing.assert_close(shared.test_y, torch.stack([a**2, a**2 + b**2, a**2 + b**2 + c**2], 1))
    assert shared.train_x.shape == (100, 3) and -0.9 > shared.train_x.min() > -1 and 0.9 < shared.train_x.max() < 1


def test_moons_are_half_circles_with_noise():
    points, which = bimt_tasks.two_moons(4000, torch.Generator().manual_seed(0))
    for moon, centre, side in ((0, (0.0, 0.0), 1), (1, (1.0, 0.5), -1)):
        from_centre = points[which == moon] - torch.tensor(centre)
        off = from_centre.norm(dim=1) - 1
        assert abs(off.mean()) < 0.02 and off.std() == pytest.approx(0.1, rel=0.1)
        assert (side * from_centre[:, 1]).mean() == pytest.approx(2 / math.pi, abs=0.02)


def test_tables_are_those_of_their_groups():
    for name, p in (("modular_addition", 59), ("s4", 24)):
        drawn = experiments()[name].draw(torch.Generator().manual_seed(0))
        pairs, results = torch.cat([drawn.train_x, drawn.test_x]), torch.cat([drawn.train_y, drawn.test_y])
        assert len(drawn.train_x) == int(0.8 * p * p) and len(pairs.unique(dim=0)) == p * p
        product = torch.empty(p, p, dtype=torch.int64)
        product[pairs[:, 0], pairs[:, 1]] = results
        ordered = product.sort(0).values, product.sort(1).values.T
        assert all((table == torch.arange(p)[:, None]).all() for table in ordered)
        assert torch.equal(product[product], product[:, product]), "associative"
        assert torch.equal(product, product.T) == (name == "modular_addition")
        assert torch.equal(product[0], torch.arange(p)), "the first is the neutral one"


def test_digits_are_images_or_an_error_that_says_what_to_install():
    try:
        import sklearn  # noqa: F401
    except ImportError:
        with pytest.raises(BenchError, match="pip install scikit-learn"):
            bimt.measure(["digits"], 1, True, str, None)
        return
    drawn = experiments()["digits"].draw(torch.Generator().manual_seed(0))
    assert drawn.train_x.shape == (1437, 64) and drawn.test_y.shape == (360, 10)
    assert drawn.train_x.min() == 0 and drawn.train_x.max() == 1 and (drawn.test_y.sum(1) == 1).all()


def test_the_command_trains_says_and_goes_on(tmp_path, capsys, monkeypatch):
    out = tmp_path / "bimt.json"
    monkeypatch.setattr(bimt, "QUICK_STEPS", 20)
    asked = ["bench", "bimt", "--quick", "--threads", "1", "--experiments", "two_moons", "--out", str(out)]
    main(asked)
    said = capsys.readouterr().out
    assert "| all (BIMT) |" in said and "`two_moons`" in said and "No test error of the publication" in said
    rows = (tmp_path / "bimt" / "quick" / "rows.jsonl").read_text()
    main(asked)
    assert (tmp_path / "bimt" / "quick" / "rows.jsonl").read_text() == rows, "nothing is trained twice"
    assert capsys.readouterr().out == said
    assert main([*asked, "--experiments", "three_moons"]) != 0
    assert "must be among independence, " in capsys.readouterr().err


def test_a_picture_has_every_node_and_wires_as_thick_as_weights():
    run = Run(CROSSED, [0])
    drawn = ElementTree.fromstring(bimt.picture(run))
    tags = [element.tag.split("}")[1] for element in drawn.iter()]
    assert tags.count("circle") == 3 * 20 and tags.count("text") == 3 * (1 + 4 + 4)
    moved, still = torch.tensor([[0.75], [0.25]]).numpy(), torch.tensor([[0.25], [0.75]]).numpy()
    layer = [(torch.tensor([[1.0, -0.5], [0.01, 0.0]]).numpy(), moved, still)]
    elements = list(ElementTree.fromstring(bimt_picture.draw({"one": layer})).iter())
    lines = [e for e in elements if e.tag.endswith("line")]
    assert [(e.text, e.get("x")) for e in elements if e.tag.endswith("text")] == [
        ("one", "0"), ("1", "75.0"), ("2", "225.0"), ("1", "225.0"), ("2", "75.0"),
    ]  # fmt: skip
    assert [(e.get("stroke-width"), e.get("stroke")) for e in lines] == [
        ("2.00", bimt_picture.POSITIVE), ("1.00", bimt_picture.NEGATIVE),
    ]  # fmt: skip
    assert [(e.get("x1"), e.get("x2")) for e in lines] == [("75.0", "225.0"), ("225.0", "225.0")]


def test_the_report_says_where_ours_is_worse():
    row = {
        "experiment": "independence", "steps": 20000, "train": 1e-4, "test_wrong": None, "train_wrong": None,
        "length": 0.1, "null": 0.2, "total": 30.0, "n_live": 20, "n_weights": 520, "seconds": 9.0,
        "relayout_seconds": 1.0, "commit": "abc",
    }  # fmt: skip
    tests = enumerate([7e-3, 1e-2, 2.74e-2])
    rows = [{**row, "arm": arm, "seed": seed, "test": test} for seed, test in tests for arm in ARMS]
    env = {"device": "a CPU", "threads": 1, "versions": {"torch": "2"}, "date": "today"}
    said = bimt_report.summary({"environment": env, "rows": rows})
    assert "1.5e-02 (7.0e-03, 1.0e-02, 2.7e-02), published 7.4e-03: 2 times as much; 2 of 3 seeds are worse" in said
    assert "| all (BIMT) | 1.5e-02 (7.0e-03-2.7e-02) | 1.0e-04 (1.0e-04-1.0e-04) | 0.100" in said
    assert "| 0.50 (0.50-0.50) | 30 (30-30) | 20 (20-20) | 9 (1) | 7.4e-03, 2.0e-04, 28.0, 0.041, 19 |" in said


def test_shares_of_wrong_answers_are_of_classes_and_of_ones_for_classes():
    outputs = torch.tensor([[[2.0, 1.0], [0.0, 1.0], [3.0, 4.0], [1.0, 0.0]]] * 2)
    classes = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])
    assert bimt._wrong(outputs, classes).tolist() == bimt._wrong(outputs, torch.eye(2)[classes]).tolist() == [0, 0.5]

"""Lines through settings, and circuits at equal loss, worked out by hand."""

import math

import pytest
from made_sweep import model_rows, ruled_sweep, write_rows

from sparsetrain.analysis.frontier_data import read_study
from sparsetrain.analysis.frontier_lines import all_lines, equal_capability
from sparsetrain.analysis.frontier_text import factor_table


def grid(width, density, loss=3.0, edges=None, **more):
    values = {"model.d_model": width, "sparsity.density": density}
    return model_rows(loss, edges or {"a": 5}, n_nonzero=round(width * 100 * density), n_params=width * 100,
                      arm="dense" if density == 1 else "", **values, **more)  # fmt: skip


def named(study, lines):
    return {line["name"]: [study.settings[i].name for i in line["settings"]] for line in lines}


def test_lines_of_equal_size_of_equal_l0_and_along_each_key(tmp_path):
    cells = [(64, 0.5), (64, 0.25), (128, 0.25), (128, 0.125), (64, 1), (128, 1)]
    study = read_study([write_rows(tmp_path, *(grid(w, d) for w, d in cells))])
    ways = all_lines(study)
    dense = ["dense d_model=64 density=1", "dense d_model=128 density=1"]
    assert named(study, ways["size"]) == {
        "dense": dense,
        "6.4k weights": ["d_model=64 density=0.25", "d_model=64 density=0.5"],
        "12.8k weights": ["d_model=128 density=0.125", "d_model=128 density=0.25"],
    }
    assert named(study, ways["l0"]) == {
        "dense": dense,
        "1.6k nonzeros": ["d_model=64 density=0.25", "d_model=128 density=0.125"],
        "3.2k nonzeros": ["d_model=64 density=0.5", "d_model=128 density=0.25"],
    }
    assert named(study, ways["model.d_model"])["density=0.25"] == [
        "d_model=64 density=0.25",
        "d_model=128 density=0.25",
    ]
    assert set(ways) == {"size", "l0", "model.d_model", "sparsity.density"}


def test_counts_that_are_nearly_equal_share_a_line(tmp_path):
    """L0 is equal up to a factor of 1.6 and size up to 1.1, from the least of a line on; in L0 one of each size."""
    counts = {"a": (1000, 9000), "b": (1400, 9800), "c": (1600, 10000), "d": (1500, 10000), "e": (2300, 20000)}
    study = read_study([write_rows(
        tmp_path, *(model_rows(3.0, {"t": 5}, n_nonzero=n, n_params=size, **{"model.n_layers": name})
                    for name, (n, size) in counts.items()),
    )])  # fmt: skip
    ways = {way: [len(line["settings"]) for line in lines] for way, lines in all_lines(study).items()}
    assert ways["size"] == [2, 2, 1]
    names = [f"n_layers={name}" for name in counts]
    assert named(study, all_lines(study)["l0"]) == {
        "1k to 1.5k nonzeros": [names[0], names[3]],
        "1.4k to 1.6k nonzeros": [names[1], names[2]],
        "2.3k nonzeros": [names[4]],
    }


def test_arms_and_what_does_not_change_sizes_are_held_on_a_line(tmp_path):
    models = [model_rows(3.0, {"a": 5}, n_nonzero=n, arm=arm, **{"model.abs_topk.q": s, "sparsity.density": n / 4000})
              for arm in ("near", "far") for s in (1, 2) for n in (500, 1000)]  # fmt: skip
    study = read_study([write_rows(tmp_path, *models)])
    found = {line["name"]: len(line["settings"]) for line in all_lines(study)["size"]}
    assert found == {f"4k weights q={s} (made, {arm})": 2 for arm in ("near", "far") for s in (1, 2)}


def test_circuits_are_compared_at_equal_loss_task_by_task(tmp_path):
    """Log edges of `a` fall from log 16 to log 4 along the sparse line, so they are 8 half way; dense ones are 64."""
    study = read_study([write_rows(
        tmp_path,
        grid(64, 0.25, 3.4, {"a": 4, "b": 10, "hard": None}), grid(64, 0.5, 3.0, {"a": 16, "b": 10, "hard": 50}),
        grid(32, 1, 3.2, {"a": 64, "b": 40, "hard": 7}),
    )])  # fmt: skip
    [row] = equal_capability(study, all_lines(study)["size"])
    assert row["loss"] == 3.2 and (row["n_tasks"], row["n_asked"]) == (2, 3)
    assert row["edges"] == pytest.approx(math.sqrt(8 * 10))
    assert row["dense_edges"] == pytest.approx(math.sqrt(64 * 40))
    assert row["factor"] == pytest.approx(math.sqrt(8 * 4))
    assert row["interval"] == (pytest.approx(4), pytest.approx(8))  # of the two tasks alone
    assert (row["n_circuits"], row["n_without_edges"]) == (6, 0)


def test_circuits_without_edges_are_counted_beside_the_factor(tmp_path):
    models = grid(64, 0.5, 3.0, {"a": 0, "b": 5}), grid(32, 1, 3.0, {"a": 9, "b": 5})
    study = read_study([write_rows(tmp_path, *models)])
    [row] = equal_capability(study, all_lines(study)["size"])
    assert row["factor"] == pytest.approx(3) and (row["n_circuits"], row["n_without_edges"]) == (4, 1)
    assert factor_table([row])[1][0][-2:] == [
        "2 of 2; 1 of 4 circuits have no edge", "6, where the real ones shrink by 3 (2 tasks)"
    ]  # fmt: skip


def test_without_an_overlap_the_nearest_settings_are_named(tmp_path):
    study = read_study(
        [write_rows(tmp_path, grid(64, 0.25, 3.4), grid(64, 0.5, 3.1), grid(32, 1, 2.9), grid(64, 1, 2.5))]
    )
    [row] = equal_capability(study, all_lines(study)["size"])
    assert row["nearest"] == [["d_model=64 density=0.5", 3.1], ["dense d_model=32 density=1", 2.9]]
    assert "factor" not in row


def test_sides_that_share_no_task_have_no_factor(tmp_path):
    study = read_study(
        [write_rows(tmp_path, grid(64, 0.5, 3.0, {"a": 5, "b": None}), grid(32, 1, 3.0, {"a": None, "b": 5}))]
    )
    [row] = equal_capability(study, all_lines(study)["size"])
    assert (row["factor"], row["n_tasks"], row["n_asked"]) == (None, 0, 2)


def test_a_task_that_no_compared_circuit_needs_an_edge_for_is_in_no_factor(tmp_path):
    models = (
        grid(64, 0.5, 3.0, {"a": 0, "b": 4}),
        grid(32, 1, 3.0, {"a": 0, "b": 8}),
        grid(64, 1, 2.0, {"a": 9, "b": 9}),
    )
    study = read_study([write_rows(tmp_path, *models)])
    [row] = equal_capability(study, all_lines(study)["size"])
    assert (row["factor"], row["n_tasks"], row["n_circuits"]) == (pytest.approx(2), 1, 2)
    study = read_study([write_rows(tmp_path / "none", *(of[:1] for of in models))])
    [row] = equal_capability(study, all_lines(study)["size"])
    assert (row["factor"], row["interval"], row["n_tasks"]) == (None, None, 0)
    assert factor_table([row])[1][0][-3] == "no task that both reach, and that needs an edge"


def test_a_dense_line_without_circuits_is_said_to_have_none(tmp_path):
    study = read_study([write_rows(tmp_path, grid(64, 0.5), grid(32, 1, 3.0, {"a": None}))])
    [row] = equal_capability(study, all_lines(study)["size"])
    assert row["nearest"] is None


def test_a_line_is_held_to_the_dense_models_of_its_depth(tmp_path):
    cells = [(64, 0.5, 2, 10), (64, 0.5, 8, 10), (64, 1, 2, 30), (64, 1, 8, 900)]
    models = [grid(w, d, edges={"a": n}, **{"model.n_layers": depth}) for w, d, depth, n in cells]
    for depth, rows in zip((2, 8), models, strict=False):
        for row in rows:
            row["n_params"] = 6400 * depth
            row["n_nonzero"] = 3200 * depth
    study = read_study([write_rows(tmp_path, *models)])
    found = {(r["line"], r["dense"]): r["factor"] for r in equal_capability(study, all_lines(study)["size"])}
    assert found == {
        ("12.8k weights", "dense n_layers=2"): pytest.approx(3),
        ("51.2k weights", "dense n_layers=8"): pytest.approx(90),
    }


def test_the_interval_has_the_noise_of_the_loss_that_is_compared_at(tmp_path):
    """Dense edges rise steeply with the loss, and the sparse setting's own loss is known to 0.1 only."""
    sparse = [grid(64, 0.5, loss, {"a": 10, "b": 10}, seed=i) for i, loss in enumerate((2.9, 3.0, 3.1))]
    dense = [grid(w, 1, loss, {"a": n, "b": n}) for w, loss, n in ((64, 2.5, 10), (32, 3.5, 1000))]
    study = read_study([write_rows(tmp_path, *sparse, *dense)])
    [row] = equal_capability(study, all_lines(study)["size"])
    assert row["factor"] == pytest.approx(10, rel=1e-6)
    low, high = row["interval"]
    assert low < 8 and high > 12.5  # 100 to the power of a tenth is 1.6


def test_an_arm_is_held_to_its_own_baseline(tmp_path):
    models = [model_rows(3.0, {"a": edges}, arm=arm, n_nonzero=4000 if "dense" in arm else 1000)
              for arm, edges in (("x", 10), ("y", 10), ("x-dense", 50), ("y-dense", 90), ("z", 10))]  # fmt: skip
    study = read_study([write_rows(tmp_path, *models)])
    found = [(row["line"], row["dense"], row["factor"]) for row in equal_capability(study, all_lines(study)["size"])]
    assert [(line.split(", ")[-1], dense.split(", ")[-1], factor) for line, dense, factor in found] == [
        ("x)", "x-dense)", pytest.approx(5)), ("y)", "y-dense)", pytest.approx(9)),
        ("z)", "x-dense)", pytest.approx(5)), ("z)", "y-dense)", pytest.approx(9)),
    ]  # fmt: skip


def test_a_depth_that_an_arm_sets_counts_too(tmp_path):
    models = [model_rows(3.0, {"a": 10}, arm=arm, n_nonzero=4000 if arm == "base" else 1000)
              for arm in ("shallow", "deep", "base")]  # fmt: skip
    for rows, depth in zip(models, (2, 8, 2), strict=True):
        rows[0]["n_layers"] = depth
    study = read_study([write_rows(tmp_path, *models)])
    (row,) = equal_capability(study, all_lines(study)["size"])
    assert "shallow" in row["line"]


def test_the_factor_of_a_made_sweep_is_found(tmp_path):
    """There dense circuits are 2.5 / sqrt(density) times as large, and between two densities what lies between."""
    study = read_study([ruled_sweep(tmp_path, (64, 96, 128, 192, 256), (0.0625, 0.25), noise=0.2)])
    rows = [row for row in equal_capability(study, all_lines(study)["size"]) if row.get("factor")]
    assert len(rows) >= 6
    assert all(2.5 / 0.5 * 0.8 < row["factor"] < 2.5 / 0.25 * 1.25 for row in rows)
    assert all(row["interval"][0] < row["factor"] < row["interval"][1] for row in rows)

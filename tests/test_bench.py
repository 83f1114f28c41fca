"""The benchmark: it measures what it says, refuses what is wrong, and its tables follow from its rows."""

import json
import shutil

import pytest
import torch

from sparsetrain import machine
from sparsetrain.bench import kernels, report, run, timing
from sparsetrain.cli import main
from sparsetrain.kernels import costs, cpu

CPU = torch.device("cpu")
PLAN = kernels.Plan((32, 64), (0.05, 0.5), {32: 256, 64: 256}, {32: 2, 64: 2}, ((32, 128),))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernels, "plan", lambda *_: PLAN)


@pytest.fixture(scope="module")
def result():
    """One small run, for the tests that read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "plan", lambda *_: PLAN)
        rows = kernels.measure(CPU, True, lambda _: None)
    return {"environment": machine.describe(CPU), "rows": rows}


def test_every_op_is_timed_beside_its_rivals(result):
    found = {(row["op"], row.get("pass"), row["dtype"], row["case"], row.get("density")) for row in result["rows"]}
    for which in ("forward", "training"):
        for dtype in ("float32", "bfloat16"):
            for case in ("ours (cpu)", "ours, token-major"):
                assert ("sparse_linear", which, dtype, case, 0.05) in found
            assert ("sparse_linear", which, dtype, "dense fp32", 1.0) in found
        assert ("sparse_linear", which, "float32", "torch.sparse CSR", 0.05) in found
        for case in ("cpu", "reference", "auto"):
            assert ("choice", which, "float32", case, 0.5) in found
    for case in ("torch.sparse CSR, by hand", "ours, by hand"):
        assert ("sparse_linear", "training", "float32", case, 0.05) in found
    for case in ("ours", "ours, channel-major", "topk + scatter"):
        assert ("abs_topk", None, "bfloat16", case, None) in found
    for case in ("ours", "ours, rows of 4", "ours, columns of 4", "topk + scatter"):
        assert ("project_", None, "float32", case, None) in found
    for row in result["rows"]:
        assert len(row["seconds"]) == (kernels.CHOICE_ROUNDS if row["op"] == "choice" else 2)
        assert min(row["seconds"]) > 0


def test_the_tables_hold_the_ratios_of_the_rows(result):
    text = report.summary(result)
    assert text.count("**`sparse_linear`") == 4 and "**`abs_topk`**" in text and "**`project_`**" in text
    assert "Break-even density" in text and "by the model it had" in text
    rows = [row for row in result["rows"] if row["op"] == "abs_topk" and row["k"] == 64 and row["dtype"] == "float32"]
    ours, rival = (next(r for r in rows if r["case"] == case) for case in ("ours", "topk + scatter"))
    ratios = sorted(slow / fast for slow, fast in zip(rival["seconds"], ours["seconds"], strict=True))
    assert f"{sum(ratios) / 2:.3g} ({ratios[0]:.2g}-{ratios[1]:.2g})" in text


def test_break_even_is_where_the_lines_cross():
    def row(case, density, seconds):
        return {"op": "sparse_linear", "case": case, "density": density, "seconds": [seconds]}

    rows = [row("ours (cpu)", 0.01, 1.0), row("ours (cpu)", 0.04, 4.0), row("dense fp32", 1.0, 2.0)]
    assert report.break_even(rows) == pytest.approx(0.02)
    assert report.break_even([*rows[:2], row("dense fp32", 1.0, 5.0)]) is None


def test_choices_say_how_much_longer_auto_took_than_the_fastest():
    def rows(dtype, **seconds):
        common = {"op": "choice", "pass": "forward", "dtype": dtype, "m": 8, "k": 8, "n": 4, "density": 0.5}
        return [common | {"nnz": 32, "token_major": True, "case": c, "seconds": s} for c, s in seconds.items()]

    environment = {"device": "none", "threads": 1, "date": "today"}
    timed = rows("float32", cpu=[2.0, 2.0], reference=[1.0, 3.0, 1.0], auto=[3.0, 3.0, 3.0]) + rows(
        "bfloat16", cpu=[1.0], auto=[1.0]
    )
    dense_lost, alone = report.choices({"environment": environment, "rows": timed})
    assert dense_lost["case"] == "d = 8, 4 token-major tokens, 50%, float32, forward"
    assert (dense_lost["best"], dense_lost["auto"]) == ("reference", 3.0)
    assert (dense_lost["fitted"], dense_lost["fitted_ratio"]) == ("reference", 1.0)
    assert (alone["best"], alone["auto"]) == ("cpu", 1.0)


def test_the_cost_model_is_fitted_for_every_type_and_pass(result):
    fitted = report.coefficients(result)
    for dtype in ("float32", "bfloat16"):
        for which in ("forward", "training"):
            assert "cpu" in fitted[dtype][which]
            assert dtype == "bfloat16" or "reference" in fitted[dtype][which]
            assert all(value >= 0 for terms in fitted[dtype][which].values() for value in terms.values())


@pytest.mark.parametrize("name, wrong", [
    ("matmul", lambda real: lambda *a: real(*a) * 1.001),
    ("sampled_matmul", lambda real: lambda *a: real(*a).roll(1)),
    ("abs_topk", lambda real: lambda x, k: real(x, k - 1)),
    ("project_", lambda real: lambda w, k, *floors: real(w, k)),
])  # fmt: skip
def test_a_wrong_op_is_not_timed(small, monkeypatch, name, wrong):
    monkeypatch.setattr(cpu, name, wrong(getattr(cpu, name)))
    with pytest.raises(kernels.BenchError, match="it is not timed"):
        kernels.measure(CPU, True, lambda _: None)


def test_cases_are_interleaved_and_slow_ones_have_fewer_rounds(monkeypatch):
    order = []
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) * 3.0)  # each call takes three seconds
    taken = timing.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 5, CPU)
    assert order[:4] == list("abab")
    rounds = ["".join(order[i : i + 2]) for i in range(4, 10, 2)]
    assert set(rounds) == {"ab", "ba"}, "neither always finds what the other left in the caches"
    assert [len(times) for times in taken.values()] == [3, 3]


def test_the_command_writes_figures_and_prints_tables(small, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", "--device", "cpu", "--threads", "1", "--quick", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["environment"]["versions"]["torch"] == torch.__version__
    assert len(written["rows"]) > 40
    assert "| d | tokens | density |" in capsys.readouterr().out
    assert main(["bench", "--quick", "--publish", "--out", str(out)]) == 1
    assert "publishing needs a whole run" in capsys.readouterr().err


def test_publishing_writes_the_figures_the_page_and_the_model(small, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "benchmarks.md"
    page.write_text("# Benchmarks\n\n<!-- bench kernels-cpu -->\nold\n<!-- end kernels-cpu -->\n\nkept\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    shutil.copy(costs.FILE, tmp_path / "costs.json")
    monkeypatch.setattr(costs, "FILE", tmp_path / "costs.json")
    before = costs.FILE.read_text()
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(kernels.BenchError, match="a folder that is there, got .*elsewhere"):
        run.bench("kernels", CPU, tmp_path / "bench.json", publish=elsewhere)
    elsewhere.mkdir()
    run.bench("kernels", CPU, tmp_path / "bench.json", publish=elsewhere)
    assert {f.name for f in elsewhere.iterdir()} == {"kernels-cpu.json", "benchmarks.md", "costs.json"}
    assert costs.FILE.read_text() == before
    run.bench("kernels", CPU, tmp_path / "bench.json", publish=tmp_path / "docs")
    text = page.read_text()
    assert "old" not in text and text.endswith("kept\n") and "**`abs_topk`**" in text
    assert json.loads((tmp_path / "docs" / "kernels-cpu.json").read_text())["rows"]
    model = json.loads((tmp_path / "costs.json").read_text())
    assert "cuda" in model and model["cpu"]["float32"]["training"]["cpu"]["multiply"] >= 0


def test_a_missing_section_is_added_at_the_end(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n")
    report.write_section(page, "x", "one")
    report.write_section(page, "x", "two")
    assert page.read_text() == "# Title\n\n<!-- bench x -->\ntwo\n<!-- end x -->\n"

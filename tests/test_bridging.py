"""Bridges: identities between a model and a rotated copy of it, training jointly and afterwards, resumption, errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import sparsetrain
from sparsetrain import checkpoint
from sparsetrain.bridge_config import BridgeConfig
from sparsetrain.bridging import regression
from sparsetrain.bridging.bridge import Bridge, Pair, bridge_losses, kl, normalised_error, spread_rows, weigh
from sparsetrain.bridging.dense import OwnModel
from sparsetrain.bridging.fitting import Fitting
from sparsetrain.bridging.quality import quality, worst
from sparsetrain.bridging.regression import regress_
from sparsetrain.bridging.residuals import BridgeError
from sparsetrain.bridging.train import FitSteps, bridge, check_models, load_bridge
from sparsetrain.config import ConfigError, RunConfig, load_config
from sparsetrain.data import evaluation_batches, prepare
from sparsetrain.kernels import ops
from sparsetrain.train import train


def own(folder):
    return OwnModel(*sparsetrain.load(folder))


def held_out(run, n_batches=2):
    config = checkpoint.load_run(run)[2]
    return list(evaluation_batches(prepare(config.data).tokens("val"), n_batches, 4, 32))


def fit(sparse, dense, *overrides):
    threads = ["run.threads=1", "train.log_every=5", "train.eval_batches=2", "train.batch_size=4"]
    return load_config(BridgeConfig, [f"bridge.sparse={sparse}", f"bridge.dense={dense}", *threads, *overrides])


def joint(tiny, dense_run, folder, *overrides):
    where = [f"run.out={folder}", f"bridge.dense={dense_run}"]
    return load_config(BridgeConfig, [*tiny, *where, *overrides])


def test_the_exact_rotation_explains_all_and_changes_nothing(dense_run, rotated_run):
    folder, rotation = rotated_run
    sparse, dense = own(folder), own(dense_run)
    exact = Bridge([Pair(site, site) for site in sparse.sites], 32, 32, topk=1)
    with torch.no_grad():
        for encoder, decoder in zip(exact.encoders, exact.decoders, strict=True):
            encoder.weight.copy_(rotation.T)
            decoder.weight.copy_(rotation)
            encoder.bias.zero_()
            decoder.bias.zero_()
    report = quality(exact, sparse, dense, held_out(dense_run))
    assert len(report["pairs"]) == 5
    for row in report["pairs"]:
        assert 1 - row["explained_to_sparse"] < 1e-6 and 1 - row["explained_to_dense"] < 1e-6
        assert abs(row["kl_to_sparse"]) < 1e-6 and abs(row["kl_to_dense"]) < 1e-6
        assert row["loss_to_sparse"] == pytest.approx(report["dense_loss"], abs=1e-5)


def test_a_trained_bridge_to_a_rotated_copy_finds_the_rotation(dense_run, rotated_run):
    folder, _ = rotated_run
    config = fit(folder, dense_run, "bridge.topk=1", "train.steps=40")
    report = json.loads((bridge(config) / "report.json").read_text())
    for row in report["pairs"]:
        assert 1 - row["explained_to_sparse"] < 1e-3 and 1 - row["explained_to_dense"] < 1e-3, row
        assert row["kl_to_sparse"] < 1e-3 and row["kl_to_dense"] < 1e-3, row


def test_normalised_error_is_what_the_variance_explained_leaves():
    target = torch.randn(4, 8, 16, dtype=torch.float64) * 3 + 2
    mean = target.flatten(0, 1).mean(0)
    assert normalised_error(mean.expand_as(target), target) == pytest.approx(1)
    assert normalised_error(target, target) == 0
    found = target + torch.randn_like(target)
    by_hand = (found - target).square().sum() / (target - mean).square().sum()
    assert normalised_error(found, target) == pytest.approx(by_hand.item(), rel=1e-12)
    assert normalised_error(found * 7, target * 7) == pytest.approx(by_hand.item(), rel=1e-12)  # no gain in shrinking


def test_kl_is_that_of_the_definition_over_the_common_vocabulary():
    wanted, logits = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 9, dtype=torch.float64)
    p, q = wanted.softmax(-1), logits[..., :7].softmax(-1)
    assert torch.allclose(kl(p.log(), logits), (p * (p / q).log()).sum(-1))
    assert kl(p.log(), wanted).abs().max() < 1e-12
    with torch.autocast("cpu", torch.bfloat16):
        close_by = kl(p.log().float(), logits.bfloat16())
    assert torch.allclose(close_by.double(), kl(p.log(), logits.bfloat16().double()), atol=1e-5)


def test_over_the_steps_each_row_takes_each_hybrid_pass_equally_often():
    taken = torch.zeros(7, 5)
    for shift in range(5):
        for site, rows in enumerate(spread_rows(7, 5, shift, torch.device("cpu"))):
            taken[rows, site] += 1
    assert (taken == 1).all()


def test_the_hybrid_losses_are_the_mean_of_single_passes(dense_run, tiny_run):
    """One site a row, over as many steps as there are sites, is every row at every site."""
    sparse, dense = own(tiny_run), own(dense_run)
    bridge_ = Bridge([Pair(site, site) for site in sparse.sites], 32, 32, topk=0.5)
    tokens, targets = held_out(dense_run, 1)[0]
    regress_(bridge_, sparse, dense, [tokens])
    with torch.no_grad():
        report = quality(bridge_, sparse, dense, [(tokens, targets)])
        parts = [bridge_losses(bridge_, sparse, dense, tokens, sparse.run(tokens)[0], i) for i in range(5)]
    for way in ("to_sparse", "to_dense"):
        single = sum(row[f"kl_{way}"] for row in report["pairs"])
        assert sum(p[f"kl_{way}"].item() for p in parts) / 5 == pytest.approx(single, rel=1e-4)
        explained = sum(1 - row[f"explained_{way}"] for row in report["pairs"])
        assert parts[0][f"nmse_{way}"].item() == pytest.approx(explained, rel=1e-3)


def test_each_loss_reaches_what_it_shall_train_and_the_dense_model_stays(tiny, dense_run):
    sparse, dense = own(train(load_config(RunConfig, [*tiny, "run.name=graded"]))), own(dense_run)
    sparse.model.requires_grad_(True)
    dense.model.requires_grad_(False)
    bridge_ = Bridge([Pair(site, site) for site in sparse.sites], 32, 32, topk=0.5)
    tokens = held_out(dense_run, 1)[0][0]
    reached = {}
    for name in ("nmse_to_sparse", "nmse_to_dense", "kl_to_sparse", "kl_to_dense"):
        losses = bridge_losses(bridge_, sparse, dense, tokens, sparse.run(tokens)[0], 0)
        bridge_.zero_grad()
        sparse.model.zero_grad()
        losses[name].backward()
        reached[name] = {
            "encoder": bridge_.encoders[1].weight.grad is not None,
            "decoder": bridge_.decoders[1].weight.grad is not None,
            "sparse": sparse.model.blocks[0].mlp.out.weight.grad is not None,
        }
        assert all(p.grad is None for p in dense.model.parameters())
    assert reached["nmse_to_sparse"] == {"encoder": True, "decoder": False, "sparse": True}
    assert reached["nmse_to_dense"] == {"encoder": False, "decoder": True, "sparse": True}
    assert reached["kl_to_sparse"] == {"encoder": True, "decoder": False, "sparse": True}
    assert reached["kl_to_dense"] == {"encoder": False, "decoder": True, "sparse": True}


def test_a_batch_in_parts_takes_the_hybrid_passes_of_the_whole(tiny, tiny_run, dense_run):
    """And moves the scales once, by its first part."""
    config = joint(tiny, dense_run, "nowhere")
    tokens, targets = held_out(dense_run, 1)[0]
    sparse = own(tiny_run)
    seen = []
    for n_parts in (1, 2, 4):
        fitting = Fitting(config, sparse, own(dense_run), torch.device("cpu"))
        regress_(fitting.bridge, sparse, fitting.dense, [tokens])
        for x, y in zip(tokens.chunk(n_parts), targets.chunk(n_parts), strict=True):
            fitting.loss(x, y, 3, sparse.model).backward()
        seen.append(fitting.parts)
        fitting.step_(0.5)
    for name in ("pretrain", "kl_to_sparse", "kl_to_dense"):
        assert [parts[name].item() for parts in seen] == pytest.approx([seen[0][name].item()] * 3, rel=1e-3)


def test_a_joint_run_resumes_bit_for_bit_and_is_an_ordinary_run(tiny, dense_run, tmp_path):
    whole = bridge(joint(tiny, dense_run, tmp_path / "a", "bridge.regress_every=10"))
    stopped = joint(tiny, dense_run, tmp_path / "b", "bridge.regress_every=10")
    run_dir = whole.parents[1]
    there = tmp_path / "b" / run_dir.name
    there.parent.mkdir()
    shutil.copytree(run_dir, there)
    shutil.rmtree(there / "model")
    shutil.rmtree(there / "checkpoints" / "step_00000020")
    (there / "bridges" / "dense" / "bridge.safetensors").unlink()
    again = bridge(stopped)
    ours, theirs = load_bridge(again)[0].state_dict(), load_bridge(whole)[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    models = [sparsetrain.load(run)[0].state_dict() for run in (there, run_dir)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])
    assert (again / "report.json").read_text() == (whole / "report.json").read_text()
    logged = {key for line in (run_dir / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert {
        f"bridge/{n}" for n in ("pretrain", "nmse_to_sparse", "nmse_to_dense", "kl_to_sparse", "kl_to_dense")
    } < logged
    assert "bridge" in json.loads((run_dir / "summary.json").read_text())
    with pytest.raises(ConfigError, match=r"another config.*\n.*bridge.kl_to_dense: 1.0 there, 2.0 now"):
        bridge(joint(tiny, dense_run, tmp_path / "a", "bridge.regress_every=10", "bridge.kl_to_dense=2"))


def test_a_bridge_to_a_trained_run_leaves_it_alone_and_resumes(dense_run, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = {name: t.clone() for name, t in sparsetrain.load(run)[0].state_dict().items()}
    folder = bridge(fit(run, dense_run, "train.steps=20", "train.checkpoint_every=10", "train.eval_every=10"))
    first = {**load_bridge(folder)[0].state_dict()}
    assert all(torch.equal(before[name], t) for name, t in sparsetrain.load(run)[0].state_dict().items())
    with pytest.raises(BridgeError, match="the dense model must have the weights that it had when the bridge"):
        check_models(folder, {"dense": own(run), "sparse": own(run)})
    (folder / "bridge.safetensors").unlink()
    (folder / "report.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_00000020")
    again = bridge(fit(run, dense_run, "train.steps=20", "train.checkpoint_every=10", "train.eval_every=10"))
    assert all(torch.equal(first[name], t) for name, t in load_bridge(again)[0].state_dict().items())


def test_a_fit_keeps_at_least_one_of_the_runs_own_channels(dense_run, tiny_run):
    with pytest.raises(ConfigError, match="bridge.topk must keep at least one of 32 channels, got 0.02"):
        bridge(fit(tiny_run, dense_run, "bridge.topk=0.02"))


def test_a_run_goes_on_with_its_own_bridge_alone(tiny, dense_run, tiny_run, tmp_path):
    short = ["train.steps=4", "train.checkpoint_every=2"]
    folder = bridge(joint(tiny, dense_run, tmp_path, *short))
    run_dir = folder.parents[1]
    with pytest.raises(ConfigError, match="must be a new run, .* the bridge 'other', got one .* without it"):
        bridge(joint(tiny, tiny_run, tmp_path, *short, "bridge.name=other"))
    assert not (run_dir / "bridges" / "other").exists()
    before = (folder / "report.json").read_bytes()
    for name in ("bridge.safetensors", "report.json"):
        (folder / name).unlink()
        with pytest.raises(checkpoint.CheckpointError, match="must hold a finished bridge"):
            load_bridge(folder)
        bridge(joint(tiny, dense_run, tmp_path, *short))
        assert (folder / "report.json").read_bytes() == before and load_bridge(folder)
    with pytest.raises(ConfigError, match=r"what is trained beside its model \(bridge\), got a command"):
        train(load_config(RunConfig, [str(run_dir / "config.yaml")]))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.n_layers=3"], "bridge.sites must map sites where depths differ, got none for a sparse model of 3"),
        (["bridge.sites=[blocks.0.resid_pre]"], "'blocks.0.resid_pre' must be SPARSE=DENSE"),
        (["bridge.sites=[blocks.9.resid_pre=final_resid]"], "sparse sites must be among .* got blocks.9.resid_pre"),
        (["bridge.sites=[final_resid=final_resid,embed=embed]"], "sites must be among"),
        (
            ["bridge.sites=[final_resid=final_resid,blocks.0.resid_pre=blocks.0.resid_pre]"],
            "sparse sites must be named once each and in forward order",
        ),
        (["bridge.topk=0.01"], "bridge.topk must keep at least one of 32 channels"),
        (["run.compile=true"], "run.compile must be false with a bridge"),
        (["bridge.dense=null"], "bridge.dense must name the dense model, got null"),
        (["model.n_ctx=64"], "model.n_ctx must be at most the dense model's 32, got 64"),
    ],
)
def test_a_bridge_that_cannot_be_is_refused_before_training(tiny, dense_run, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        bridge(joint(tiny, dense_run, tmp_path, *overrides))
    assert not (tmp_path / "run").exists()


def test_depths_and_widths_may_differ(tiny, dense_run, tmp_path):
    sites = "blocks.0.resid_pre=blocks.0.resid_pre,blocks.1.resid_pre=blocks.0.resid_mid,final_resid=final_resid"
    folder = bridge(joint(tiny, dense_run, tmp_path, "model.n_layers=3", "model.d_model=48", f"bridge.sites=[{sites}]"))
    loaded, _ = load_bridge(folder)
    assert [(p.sparse, p.dense) for p in loaded.pairs] == [tuple(item.split("=")) for item in sites.split(",")]
    assert loaded.encoders[0].weight.shape == (48, 32)


def test_the_dense_model_is_found_from_another_folder(tiny, dense_run, tmp_path, monkeypatch):
    monkeypatch.chdir(dense_run.parent)
    config = joint(tiny, dense_run.name, tmp_path, "train.steps=2", "train.eval_every=2")
    folder = bridge(config)
    monkeypatch.chdir(tmp_path)
    assert load_bridge(folder)[1].bridge.dense == str(dense_run.resolve())
    assert bridge(joint(tiny, dense_run, tmp_path, "train.steps=2", "train.eval_every=2")) == folder


def test_a_joint_run_goes_on_from_another_folder_and_with_another_cache(tiny, dense_run, tmp_path, monkeypatch):
    """Folders that the first command named from where it was; what is there counts, not what it is called from here."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    short = [f"bridge.dense={dense_run}", f"run.out={tmp_path}/runs", "train.steps=4", "train.checkpoint_every=2"]
    monkeypatch.chdir(tmp_path / "here")
    folder = bridge(load_config(BridgeConfig, [*tiny, *short, "data.cache=first"]))
    run = folder.parents[1]
    before = load_bridge(folder)[0].state_dict()
    monkeypatch.chdir(tmp_path / "there")
    config = checkpoint.load_run(run)[2]
    assert Path(config.data.tokenizer).is_file()  # as prune and transfer read it
    assert len(checkpoint.run_corpus(run, config).tokens("val"))
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    (folder / "bridge.safetensors").unlink()
    assert bridge(load_config(BridgeConfig, [*tiny, *short, "data.cache=second"])) == folder
    after = load_bridge(folder)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    other = tmp_path / "other.json"
    other.write_text((run / "tokenizer.json").read_text().replace("print", "tnirp"))
    with pytest.raises(ConfigError, match="another config.*\n.*data.tokenizer: "):
        bridge(load_config(BridgeConfig, [*tiny, *short, f"data.tokenizer={other}"]))


def test_a_run_whose_tokenizer_was_moved_is_read_with_its_own(tiny, tiny_run, tmp_path, monkeypatch):
    (tmp_path / "t.json").write_bytes((tiny_run / "tokenizer.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    small = ["data.tokenizer=t.json", "run.name=moved", "train.steps=2", f"run.out={tmp_path}"]
    run = train(load_config(RunConfig, [*tiny, *small]))
    config = checkpoint.load_run(run)[2]
    there = checkpoint.run_corpus(run, config)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    again = checkpoint.run_corpus(run, config)
    assert again.tokens("val").tolist() == there.tokens("val").tolist()


def test_a_fit_reads_its_corpus_in_the_cache_that_it_is_given(dense_run, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    bridge(fit(tmp_path / "run", dense_run, "train.steps=1", f"data.cache={tmp_path / 'cache'}"))
    assert list((tmp_path / "cache").glob("text-*/manifest.json"))


def test_a_joint_run_returns_to_the_regression_now_and_then(tiny, dense_run, tmp_path):
    explained = []
    for every in (0, 19):  # of 20 steps
        folder = bridge(joint(tiny, dense_run, tmp_path / str(every), f"bridge.regress_every={every}", "bridge.topk=1"))
        explained.append(worst(json.loads((folder / "report.json").read_text())))
    assert explained[1]["explained_to_dense"] > explained[0]["explained_to_dense"] + 0.02
    assert explained[1]["explained_to_sparse"] > explained[0]["explained_to_sparse"] + 0.02


@pytest.mark.parametrize("n_bytes", [1, 2 * 8 * 65**2, 2**31])
def test_a_regression_needs_no_more_sums_and_tokens_at_once_than_there_is_room_for(
    dense_run, tiny_run, monkeypatch, n_bytes
):
    """And comes to what least squares on all tokens at once come to."""
    sparse, dense = own(tiny_run), own(dense_run)
    batches = [tokens for tokens, _ in held_out(dense_run, 3)]
    monkeypatch.setattr(regression, "SUMS_BYTES", n_bytes)
    monkeypatch.setattr(regression, "PART_BYTES", 1)  # a sequence at a time
    fitted = Bridge([Pair(site, site) for site in sparse.sites], 32, 32, topk=1)
    most = {"sums": 0, "rows": 0}
    gather, run = regression._gather, sparse.run

    def gathered(pairs, *rest):
        most["sums"] = max(most["sums"], len(pairs))
        return gather(pairs, *rest)

    def watched(tokens):
        most["rows"] = max(most["rows"], len(tokens))
        return run(tokens)

    monkeypatch.setattr(regression, "_gather", gathered)
    monkeypatch.setattr(sparse, "run", watched)
    regress_(fitted, sparse, dense, batches)
    assert most == {"sums": {1: 1, 2 * 8 * 65**2: 2}.get(n_bytes, 5), "rows": 1}
    with torch.no_grad():
        all_at_once = torch.cat(batches)
        s, d = (m.run(all_at_once)[0]["blocks.1.resid_mid"].flatten(0, 1).double() for m in (sparse, dense))
        x = s - s.mean(0)
        penalty = regression.RIDGE * x.square().mean() * len(x)
        by_hand = d.mean(0) + x @ torch.linalg.solve(x.T @ x + penalty * torch.eye(32), x.T @ (d - d.mean(0)))
        torch.testing.assert_close(fitted.decode(3, s.float()), by_hand.float(), rtol=1e-3, atol=1e-4)


def test_a_residual_that_is_not_finite_is_refused_with_its_side_and_site(dense_run, tiny_run):
    sparse, dense = own(tiny_run), own(dense_run)
    fitted = Bridge([Pair(site, site) for site in sparse.sites], 32, 32, topk=1)
    with torch.no_grad():
        dense.model.blocks[0].mlp.out.bias[3] = torch.inf
    with pytest.raises(BridgeError, match=r"the dense model's residuals must be finite, .* at blocks.1.resid_pre"):
        regress_(fitted, sparse, dense, [held_out(dense_run, 1)[0][0]])


def test_a_step_never_waits_for_the_device(dense_run, tiny_run):
    """On torch's device without numbers, where whatever asks for one fails."""
    sparse, dense = own(tiny_run), own(dense_run)
    for model in (sparse, dense):
        model.model.to("meta")
    config = fit(tiny_run, dense_run)
    fitted = Bridge([Pair(site, site) for site in sparse.sites], 32, 32, topk=0.5).to("meta")
    tokens = torch.zeros(4, 32, dtype=torch.int64, device="meta")
    with ops.using("reference"):
        h_sparse = sparse.run(tokens)[0]
        fitted.follow_(h_sparse)
        weigh(bridge_losses(fitted, sparse, dense, tokens, h_sparse, 3), config.bridge).backward()
    assert all(p.grad is not None for p in fitted.parameters())


def test_a_fit_takes_its_batches_in_parts(dense_run, tiny, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    sizes = []
    for n_parts in (1, 2):
        corpus = [item for item in tiny if item.startswith("data.")]
        config = fit(tmp_path / "run", dense_run, f"train.accumulate={n_parts}", *corpus)
        sparse = own(tiny_run)
        steps = FitSteps(config, sparse, own(dense_run), torch.device("cpu"), tmp_path / str(n_parts))
        tokens, targets = steps._batch()
        parts = list(zip(tokens.chunk(n_parts), targets.chunk(n_parts), strict=True))
        twin = Fitting(config, sparse, steps.fitting.dense, torch.device("cpu"))
        twin.load_(steps.fitting.tensors() | _no_moments(twin.bridge))
        by_hand = torch.stack([twin.loss(x, y, 0, sparse.model) for x, y in parts]).mean()
        sizes.append(steps.advance().item())
        assert sizes[-1] == pytest.approx(by_hand.item(), rel=1e-6)
    assert sizes[0] != sizes[1]  # errors are over the variance of each part


def _no_moments(bridge_):
    zeros = {"step": torch.zeros(())}
    return {
        f"{name}.{key}": zeros.get(key, torch.zeros_like(p))
        for name, p in bridge_.named_parameters()
        for key in ("step", "exp_avg", "exp_avg_sq")
    }

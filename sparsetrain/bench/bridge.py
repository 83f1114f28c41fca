"""Times a step that trains a sparse model with a bridge beside what it is made of, at several depths."""

from collections.abc import Callable
from statistics import median

import torch

from sparsetrain.bench.timing import interleaved, ratio
from sparsetrain.bridge_config import BridgeConfig
from sparsetrain.bridging.dense import OwnModel
from sparsetrain.bridging.fitting import Fitting
from sparsetrain.config import config_from_dict
from sparsetrain.data import prepare
from sparsetrain.model import Transformer
from sparsetrain.step import build, train_step

SITES = ("attn_in", "q", "k", "v", "attn_out", "mlp_in", "mlp_act", "mlp_out")
SIZES = ((2, 128, 64), (4, 256, 64), (8, 256, 64))  # layers, width of both models, tokens in a sequence
QUICK = ((2, 32, 32),)
ROUNDS = 20
LONGEST = 60  # seconds for the rounds of one case


def measure(device: torch.device, quick: bool, say: Callable[[str], None]) -> list[dict]:
    """Time, round by round, a step with a bridge, a step of the sparse model alone, and the dense model's forward.

    Returns:
        A row for each size: layers, d_model, n_ctx, batch_size, and seconds: those of each round, by what was timed.
    """
    rows = []
    for n_layers, d_model, n_ctx in QUICK if quick else SIZES:
        say(f"{n_layers} layers, width {d_model}")
        config = _config(n_layers, d_model, n_ctx, device)
        rows.append({**config_row(config), "seconds": interleaved(_cases(config, device), ROUNDS, device, LONGEST)})
    return rows


def config_row(config: BridgeConfig) -> dict:
    """The sizes of a config."""
    m = config.model
    return {"layers": m.n_layers, "d_model": m.d_model, "n_ctx": m.n_ctx, "batch_size": config.train.batch_size}


def _config(n_layers: int, d_model: int, n_ctx: int, device: torch.device) -> BridgeConfig:
    model = {"n_layers": n_layers, "d_model": d_model, "n_ctx": n_ctx}
    sparsity = {"density": 0.0625, "anneal_start": 0.0, "anneal_stop": 0.0, "min_alive": min(4, d_model // 16)}
    train = {"steps": 1_000_000, "batch_size": 32}
    return config_from_dict(
        BridgeConfig,
        {
            "run": {"device": device.type}, "data": {"vocab_size": 1024}, "model": model, "sparsity": sparsity,
            "train": train, "bridge": {"dense": "a model of its own"},
        },
    )  # fmt: skip


def _cases(config: BridgeConfig, device: torch.device) -> dict[str, Callable[[], object]]:
    corpus = prepare(config.data)
    dense = OwnModel(_dense(config, corpus.tokenizer.get_vocab_size(), device), corpus.tokenizer)
    alone, joint = (build(config.run_config, corpus, device) for _ in range(2))
    fitting = Fitting(config, OwnModel(joint.model, corpus.tokenizer), dense, device)
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.batch_size, config.model.n_ctx + 1)
    tokens = torch.randint(0, dense.vocab_size, shape, generator=generator).to(device)
    x, y = tokens[:, :-1], tokens[:, 1:]

    def step_with_bridge() -> None:
        train_step(joint, lambda a, b: fitting.loss(a, b, joint.step, joint.model), x, y)
        fitting.step_(0.5)

    return {
        "with a bridge": step_with_bridge,
        "alone": lambda: train_step(alone, alone.model.loss, x, y),
        "dense forward": torch.no_grad()(lambda: dense.run(x)),
    }


def _dense(config: BridgeConfig, n_tokens: int, device: torch.device) -> Transformer:
    options = config_from_dict(
        type(config.model),
        {
            **{k: getattr(config.model, k) for k in ("n_layers", "d_model", "n_ctx")},
            "abs_topk": dict.fromkeys(SITES, 1.0),
        },
    )
    return Transformer(options, n_tokens, torch.Generator().manual_seed(0)).to(device).requires_grad_(False).eval()


def summary(result: dict) -> str:
    """A Markdown table: medians, and the cost of a step over four of the sparse model's and a dense forward."""
    env = result["environment"]
    lines = [
        "| layers, width | with a bridge | alone | dense forward | of 4 x alone + forward |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        seconds = row["seconds"]
        allowed = [4 * a + d for a, d in zip(seconds["alone"], seconds["dense forward"], strict=False)]
        share = ratio(seconds["with a bridge"], allowed)
        cells = [f"{1e3 * median(seconds[name]):.0f} ms" for name in ("with a bridge", "alone", "dense forward")]
        cells.append(f"{share[0]:.2f} ({share[1]:.2f} to {share[2]:.2f})")
        lines.append(f"| {row['layers']}, {row['d_model']} | {' | '.join(cells)} |")
    return (
        f"{env['device']}, {env['threads']} thread(s), torch {env['versions']['torch']}, commit {env['commit']}, "
        f"{env['date']}. Medians of at most {ROUNDS} interleaved rounds, density 1/16, both models of one size, "
        "32 sequences of 64 tokens; in brackets the least and the greatest of the rounds.\n\n" + "\n".join(lines)
    )

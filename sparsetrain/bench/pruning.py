"""Times what a search for a circuit of nodes is made of, beside whole runs with dense products."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from unittest import mock

import torch
from torch import Tensor

from sparsetrain.bench.kernels import BenchError
from sparsetrain.bench.timing import interleaved, ratio
from sparsetrain.config import ModelOptions
from sparsetrain.linear import Linear
from sparsetrain.model import Transformer
from sparsetrain.prune_config import NodeMaskOptions
from sparsetrain.pruning import evaluate, node_masks
from sparsetrain.pruning.ablation import BATCH, Ablation, build_ablation, site_reader
from sparsetrain.pruning.evaluate import all_answer_logits, logits_at_answers, mask_edits
from sparsetrain.pruning.graph import NodeSet, full, node_sites
from sparsetrain.pruning.replay import Replay
from sparsetrain.pruning.space import Units, units, without
from sparsetrain.sparsity import multiply_nonzeros_
from sparsetrain.tasks import TaskData

WHOLE, OURS = "whole runs", "ours"
RUN, STEP = "a run without a node", "a step of masks"
SIZES = ((2, 128, 1 / 10), (2, 512, 1 / 50), (2, 1024, 1 / 100))  # layers, width, density
QUICK = ((2, 32, 1 / 10),)
N_TOKENS, N_PROMPTS, N_CTX, SHORTEST = 1024, 64, 64, 8  # vocabulary; prompts of 8 to 63 tokens
N_NODES, N_TRIES, N_STEPS = 120, 10, 4  # of the circuit; in a round
ROUNDS, LONGEST = 7, 60  # LONGEST: seconds for the rounds of one case
TOLERANCE = 1e-3  # of the greatest logit: sums of a product are taken in another order


@dataclass(frozen=True)
class _Case:
    """One size: the model with dense weights and with their nonzeros, the prompts, and a circuit's tries."""

    dense: Transformer
    sparse: Transformer
    data: TaskData
    ablation: Ablation
    tries: list[NodeSet]


def measure(device: torch.device, quick: bool, say: Callable[[str], None]) -> list[dict]:
    """Time runs of cleaning and steps of mask training, round by round, as they are done here and as whole runs.

    A whole run computes every position of every block with dense products, and begins at the first; AbsTopK,
    attention and the rest are ours in both. Weights are random, for the time does not depend on what they are.

    Returns:
        A row for each size and part of a search (`what`): layers, d_model, density, n (runs or steps in a round), and
        seconds: those of each round, by what was timed.

    Raises:
        BenchError: the two do not give the same logits.
    """
    rows = []
    for n_layers, d_model, density in QUICK if quick else SIZES:
        say(f"{n_layers} layers, width {d_model}, density {density:g}")
        case, size = _case(n_layers, d_model, density, device), (n_layers, d_model, density)
        _check(case)
        for what, n, timed in ((RUN, len(case.tries), _runs(case)), (STEP, N_STEPS, _steps(case))):
            seconds = interleaved(timed, 2 if quick else ROUNDS, device, LONGEST)
            row = dict(zip(("layers", "d_model", "density"), size, strict=True))
            rows.append({"what": what, **row, "n": n, "seconds": seconds})
    return rows


def _case(n_layers: int, d_model: int, density: float, device: torch.device) -> _Case:
    generator = torch.Generator().manual_seed(0)
    options = ModelOptions(n_layers=n_layers, d_model=d_model, n_ctx=N_CTX)
    dense = Transformer(options, N_TOKENS, generator).to(device).requires_grad_(False)
    for linear in (m for m in dense.modules() if isinstance(m, Linear)):
        size = linear.weight.abs().flatten()
        linear.weight *= linear.weight.abs() >= size.kthvalue(round((1 - density) * size.numel()) + 1).values
    data = _prompts(generator).to(device)
    sparse = copy.deepcopy(dense)
    multiply_nonzeros_(sparse, BATCH * data.tokens.shape[1])
    corpus = [torch.randint(N_TOKENS, (32, N_CTX), generator=generator).to(device)]
    ablation = build_ablation(site_reader(dense, node_sites(options)), "mean_data", corpus, data)
    return _Case(dense, sparse, data, ablation, _nodes_of_tries(dense, generator))


def _prompts(generator: torch.Generator) -> TaskData:
    tokens = torch.randint(N_TOKENS, (N_PROMPTS, N_CTX - 1), generator=generator)
    last = torch.randint(SHORTEST - 1, N_CTX - 1, (N_PROMPTS,), generator=generator)
    right = torch.arange(N_PROMPTS) % 2
    return TaskData("made", tokens, last, right, 1 - right, torch.zeros_like(right), ("",) * N_PROMPTS)


def _nodes_of_tries(model: Transformer, generator: torch.Generator) -> list[NodeSet]:
    """A random circuit, then sets that lack one more unit each, of which every second try is taken."""
    everything: Units = full(model)
    nodes = units(everything)
    chosen = [nodes[i] for i in torch.randperm(len(nodes), generator=generator)[:N_NODES]]
    kept = {site: torch.zeros_like(mask) for site, mask in everything.items()}
    for site, (channel,) in chosen:
        kept[site][channel] = True
    sets = [kept]
    for i, unit in enumerate(chosen[:N_TRIES]):
        sets.append(without(kept, [unit]))
        kept = sets[-1] if i % 2 else kept
    return sets


def _whole_logits(model: Transformer, data: TaskData, masks: NodeSet, ablation: Ablation, places: Tensor) -> Tensor:
    """`evaluate.answer_logits`, of all positions in all blocks."""
    replacements = ablation.replacements(site_reader(model, node_sites(model.options)), data, places)
    visit = model.visitor({}, (), mask_edits(masks, replacements))
    return logits_at_answers(model, model.final_resid(data.tokens, visit), data)


def _runs(case: _Case) -> dict[str, Callable[[], list[Tensor]]]:
    def whole() -> list[Tensor]:
        with mock.patch.object(evaluate, "answer_logits", _whole_logits):
            return [all_answer_logits(case.dense, case.data, kept, case.ablation) for kept in case.tries]

    def ours() -> list[Tensor]:
        replay = Replay(case.sparse, case.data, case.ablation)
        return [replay.logits(kept) for kept in case.tries]

    return {WHOLE: whole, OURS: ours}


def _steps(case: _Case) -> dict[str, Callable[[], dict[str, Tensor]]]:
    def ours(model: Transformer = case.sparse) -> dict[str, Tensor]:
        return node_masks.rank_nodes(model, case.data, case.ablation, NodeMaskOptions(steps=N_STEPS), True, 0)

    def whole() -> dict[str, Tensor]:
        with mock.patch.object(node_masks, "answer_logits", _whole_logits):
            return ours(case.dense)

    return {WHOLE: whole, OURS: ours}


def _check(case: _Case) -> None:
    """Raise where logits depend on how a set is run: nothing is timed then."""
    whole, ours = (torch.stack(run()) for run in _runs(case).values())
    apart, greatest = (whole - ours).abs().max(), whole.abs().max()
    if not apart <= TOLERANCE * greatest:
        raise BenchError(f"logits must be those of whole runs to {TOLERANCE * greatest:.1g}, got some {apart:.1g} away")


def summary(result: dict) -> str:
    """A Markdown table: median milliseconds of each run or step, and how many times faster ours is."""
    env = result["environment"]
    lines = [
        "| layers, width, density | part of a search | whole runs | ours | times faster |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = [f"{1e3 * median(row['seconds'][name]) / row['n']:.3g} ms" for name in (WHOLE, OURS)]
        faster = ratio(row["seconds"][WHOLE], row["seconds"][OURS])
        size = f"{row['layers']}, {row['d_model']}, {100 * row['density']:.3g} %"
        cells = [size, row["what"], *times, f"{faster[0]:.2f} ({faster[1]:.2f} to {faster[2]:.2f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return (
        f"{env['device']}, {env['threads']} thread(s), torch {env['versions']['torch']}, commit {env['commit']}, "
        f"{env['date']}. Medians of at most {ROUNDS} interleaved rounds of {N_TRIES + 1} runs, the first whole, "
        f"or {N_STEPS} steps; a circuit of {N_NODES} nodes, {N_PROMPTS} prompts of {SHORTEST} to {N_CTX - 1} tokens, "
        "random weights; in brackets the least and the greatest of the rounds.\n\n" + "\n".join(lines)
    )

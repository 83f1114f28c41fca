"""Edge attribution patching on the component graph, from gradients at the sites of ordinary runs.

The gradient at a head's own query, key or value input is the head's slice of the gradient at the site, taken back
through its weights and the norm; so one backward pass of the model serves every edge. What the sources change is
expanded to (H, B, T, D) one block at a time: memory grows with the sites of a run, not with sources x (B, T, D).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from sparsetrain.model import Edit
from sparsetrain.pruning.ablation import Ablation
from sparsetrain.pruning.component_graph import ComponentGraph, attention_bias, read_heads
from sparsetrain.pruning.edges import EdgeSet, gated_logits, like
from sparsetrain.pruning.evaluate import logits_at_answers
from sparsetrain.pruning.objective import LateExtremes, Metric, refuse_if_flat
from sparsetrain.tasks import TaskData

Edits = dict[str, Edit]


class Sources:
    """What the sources of a batch write, and what replaces it: expanded when it is asked for, one name at a time.

    Args:
        graph: the component graph.
        data: trimmed prompts.
        ablation: what replaces activations.
        places: (N, T) rows of the ablation's bank.
        clean: what `graph.read_sites` gives of these prompts.
    """

    def __init__(
        self, graph: ComponentGraph, data: TaskData, ablation: Ablation, places: Tensor, clean: Mapping[str, Tensor]
    ):
        self.graph, self.data, self.ablation, self.places, self.clean = graph, data, ablation, places, clean

    @cached_property
    def _corrupted(self) -> Mapping[str, Tensor]:
        return self.graph.read_sites(self.data.corrupted)

    def replacement(self, name: str) -> Tensor:
        """What replaces the sources of one name; broadcasts over (n, B, T, D)."""
        if self.ablation.kind == "corrupted":
            return self.graph.writes(name, self._corrupted)
        one = Ablation(self.ablation.kind, {name: self.ablation.values[name]})
        return one.replacements(self.graph.read, self.data, self.places)[name]

    def change(self, name: str) -> Tensor:
        """How far the sources of one name are from their replacements: (n, B, T, D)."""
        return self.graph.writes(name, self.clean) - self.replacement(name)

    def empty_logits(self) -> Tensor:
        """The outputs with every edge cut; a masked run, for the metrics that ask for them alone."""
        replacements = {name: self.replacement(name) for name in self.graph.source_names}
        return gated_logits(self.graph, self.data, like(self.graph, 0.0), replacements)


Path = Callable[[Sources], Iterator[Edits]]


def inputs_on_the_way(steps: int) -> Path:
    """Runs with the embedding k / steps of the way from its replacement to itself, k = 0 ... steps - 1.

    Source: Hanna et al. 2024. These are the points of the released code; the paper writes k = 1 ... steps.
    """

    def path(sources: Sources) -> Iterator[Edits]:
        start = sources.replacement("embed").sum(0)
        yield from ({"embed": _toward(start, k / steps)} for k in range(steps))

    return path


def activations_on_the_way(steps: int) -> Path:
    """Runs with the embedding, or one attention's or MLP's output, k / steps of the way to itself, k = 1 ... steps.

    Source: the code released with Hanna et al. 2024. An edge's score is the mean over the runs of all components.
    """

    def path(sources: Sources) -> Iterator[Edits]:
        starts = {"embed": sources.replacement("embed").sum(0)}
        for l, block in enumerate(sources.graph.model.blocks):
            at = f"blocks.{l}."
            bias = attention_bias(block.attn, sources.clean.get(at + "attn_out"))
            starts[at + "attn_out"] = sources.replacement(at + "heads").sum(0) + bias
            starts[at + "mlp_out"] = sources.replacement(at + "mlp").sum(0)
        for site, start in starts.items():
            yield from ({site: _toward(start, k / steps)} for k in range(1, steps + 1))

    return path


def component_scores(
    graph: ComponentGraph, data: TaskData, ablation: Ablation, places: Tensor, metric: Metric, path: Path | None
) -> EdgeSet:
    """(activation - replacement) . gradient of the metric at the target's input, summed over a batch of prompts.

    Args:
        graph: the component graph.
        data: trimmed prompts.
        ablation: what replaces activations.
        places: (N, T) rows of the ablation's bank.
        metric: what is differentiated.
        path: the runs whose gradients are averaged; None: the run as it is, with the one forward that gives the
            activations (Syed et al. 2023).

    Raises:
        ValueError: there is no path, and the metric's gradient at the full model is zero.
    """
    with torch.set_grad_enabled(path is None):
        sites, logits = _run(graph, data, {})
    clean = {site: x.detach() for site, x in sites.items()} | {"embed": graph.embeddings(data.tokens)}
    sources = Sources(graph, data, ablation, places, clean)
    ends = LateExtremes(logits.detach(), sources.empty_logits)
    scores = {group: logits.new_zeros(there.shape) for group, there in graph.edges.items()}
    if path is None:
        refuse_if_flat(metric, data, ends)
        _add(scores, sources, sites, _gradients(sites, metric(logits, data, ends)))
        return scores
    runs = list(path(sources))
    for edits in runs:
        with torch.enable_grad():
            sites, logits = _run(graph, data, edits)
            gradients = _gradients(sites, metric(logits, data, ends))
        _add(scores, sources, sites, gradients)
    return {group: score / len(runs) for group, score in scores.items()}


def _toward(start: Tensor, share: float) -> Edit:
    return lambda x: start + share * (x - start)


def _run(graph: ComponentGraph, data: TaskData, edits: Edits) -> tuple[dict[str, Tensor], Tensor]:
    """The sites of a run and its logits; gradients begin at the embedding, since weights need none."""
    seen: dict[str, Tensor] = {}
    blocks = range(len(graph.model.blocks))
    reads = [f"blocks.{l}.{s}" for l in blocks for s in ("resid_pre", "resid_mid", "q", "k", "v", "mlp_in")]
    move = edits.get("embed", lambda x: x)
    edits = {
        **edits,
        "embed": lambda x: move(x).detach().requires_grad_(torch.is_grad_enabled()),
        # Without a norm it is the residual stream itself, whose gradient is not only the MLP's.
        **{f"blocks.{l}.mlp_in": lambda x: x.view_as(x) for l in blocks},
    }
    visit = graph.model.visitor(seen, [*graph.write_sites, *reads, "final_resid"], edits)
    return seen, logits_at_answers(graph.model, graph.model.final_resid(data.tokens, visit), data)


def _gradients(sites: dict[str, Tensor], values: Tensor) -> dict[str, Tensor]:
    read = [site for site in sites if site.rpartition(".")[2] in ("q", "k", "v", "mlp_in", "final_resid")]
    return dict(zip(read, torch.autograd.grad(values.sum(), [sites[site] for site in read]), strict=True))


def _add(scores: EdgeSet, sources: Sources, sites: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """Add to the scores the products of the sources' changes and the gradients at the targets' inputs."""
    graph = sources.graph
    for l in range(len(graph.model.blocks)):
        targets = _input_gradients(graph, l, sites, gradients)
        if l == len(graph.model.blocks) - 1:
            targets["logits"] = gradients["final_resid"][None]
        start = 0
        for name in graph.source_names:
            readers = [group for group in targets if graph.edges[group].shape[1] > start]
            if not readers:
                break
            change = sources.change(name).flatten(1)  # (n, B T D)
            for group in readers:
                scores[group][:, start : start + len(change)] += targets[group].flatten(1) @ change.T
            start += len(change)


def _input_gradients(
    graph: ComponentGraph, l: int, sites: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """For each group of a block the gradient at each target's own residual stream: (R, B, T, D)."""
    block, at = graph.model.blocks[l], f"blocks.{l}."
    pre, mid = sites[at + "resid_pre"], sites[at + "resid_mid"]
    p = graph.position_vectors(pre.shape[1])
    found = {}
    with torch.enable_grad():
        x = pre.detach().expand(graph.n_heads, *pre.shape).requires_grad_()
        for i, name in enumerate("qkv"):
            out = read_heads(block.attn, i, x, p)
            (found[at + name],) = torch.autograd.grad(out, x, gradients[at + name])
        x = mid.detach().requires_grad_()
        out = block.mlp.norm(x, p, block.mlp.topk.mlp_in)
        (found[at + "mlp"],) = torch.autograd.grad(out, x, gradients[at + "mlp_in"])
    found[at + "mlp"] = found[at + "mlp"][None]
    return found

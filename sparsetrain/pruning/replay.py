"""One node set after another on the same prompts: of each run only what comes after the first change is computed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.model import Transformer
from sparsetrain.pruning.ablation import Ablation, site_reader
from sparsetrain.pruning.evaluate import at_answers, logits_of, mask_edits, parts
from sparsetrain.pruning.graph import NodeSet, node_sites
from sparsetrain.tasks import TaskData

KEPT_BYTES = 2**30  # of residual streams, at most; where there are more, every second, third... alone is kept


@dataclass
class _Run:
    """A node set that was run, and the residual streams before some halves of blocks, of each part of the prompts."""

    nodes: NodeSet
    flat: Tensor  # all its masks, on the CPU
    before: dict[int, list[Tensor]]


class Replay:
    """Runs a model with all but some nodes ablated, again and again on the same prompts.

    The residual streams of the last run are kept, and those of the run before it that it was a try from: a search that
    tries to drop one unit after the other from a set begins each run where the unit is. The bits are those of
    `evaluate.all_answer_logits`.

    Args:
        model: the model.
        data: the prompts.
        ablation: what replaces nodes.
    """

    def __init__(self, model: Transformer, data: TaskData, ablation: Ablation):
        self.model, self.data, self.ablation = model, data, ablation
        self.rows, self.parts, self.places = [], [], []
        self.read = site_reader(model, node_sites(model.options))
        for rows, part, places in parts(data, ablation, seed=0):
            self.rows.append(rows)
            self.parts.append(part.trimmed())
            self.places.append(places)
        self.n_halves = 2 * model.options.n_layers
        width = model.options.d_model * model.embed.weight.element_size()
        n_bytes = 3 * self.n_halves * width * sum(part.tokens.numel() for part in self.parts)
        self.stride = -(-n_bytes // KEPT_BYTES)
        sites = node_sites(model.options).items()
        self.half_of = torch.cat([torch.full((n,), _half(site, self.n_halves)) for site, n in sites])
        self.base: _Run | None = None
        self.last: _Run | None = None

    @torch.no_grad()
    def logits(self, nodes: NodeSet) -> Tensor:
        """Logits (N, V) after each prompt, (N, P, V) where they are read at P positions, with other nodes ablated."""
        run, first = _Run(nodes, torch.cat([nodes[s] for s in node_sites(self.model.options)]).cpu(), {}), 0
        if self.last and not (run.flat & ~self.last.flat).any():  # the last try was taken, and is what is tried from
            self.base = self.last
        for known in (self.base, self.last):
            if known and (half := self._first(known, run)) > first:
                first = half
                run.before = {i: x for i, x in known.before.items() if i <= first}
        found = [self._logits(i, first, run) for i in range(len(self.parts))]
        self.last = run
        return torch.cat(found)[torch.cat(self.rows).argsort()]

    def _first(self, known: _Run, run: _Run) -> int:
        """The half of a block to begin with: the last one whose residual stream is kept and the same in both runs."""
        changed = self.half_of[known.flat != run.flat]
        until = int(changed.min()) if len(changed) else self.n_halves
        return max((half for half in known.before if half <= until), default=0)

    def _logits(self, i: int, first: int, run: _Run) -> Tensor:
        part, model = self.parts[i], self.model
        replacements = self.ablation.replacements(self.read, part, self.places[i])  # of all parts they may be too many
        visit = model.visitor({}, (), mask_edits(run.nodes, at_answers(model, replacements, part)))
        x, p = model.embedded(part.tokens)
        if first:
            x = run.before[first][i]
        if p is not None and first == self.n_halves - 1:
            p = p[part.read_at]
        for half in range(first, self.n_halves):
            if half > first and half % self.stride == 0:
                run.before.setdefault(half, []).append(x)
            block, prefix = model.blocks[half // 2], f"blocks.{half // 2}."
            at = part.read_at if half // 2 == model.options.n_layers - 1 else None
            if half % 2:
                x = block.think(x, p, prefix, visit)
            else:
                x, p = block.look(x, p, prefix, visit, at)
        return logits_of(model, visit("final_resid", x), part)


def _half(site: str, n_halves: int) -> int:
    """Which half of a block a site is in."""
    if site == "final_resid":
        return n_halves
    _, layer, name = site.split(".")
    return 2 * int(layer) + name.startswith("mlp")

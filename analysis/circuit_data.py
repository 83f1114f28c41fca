"""All that a circuit page shows, as plain values: nodes with activations, edges, links, words and numbers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from sparsetrain.analysis import snippets
from sparsetrain.analysis.circuit_layout import Layout, channel_of, is_residual, kind_of, lay_out, site_of
from sparsetrain.analysis.readings import cautions, readings
from sparsetrain.config import RunConfig
from sparsetrain.model import Transformer
from sparsetrain.pruning.circuit import Circuit
from sparsetrain.pruning.graph import READS, WRITES
from sparsetrain.tasks import TaskData

FORMAT = "sparsetrain-circuit-page-1"
TOKENS_SHOWN = 8  # with most weight to or from a residual channel


@dataclass(frozen=True)
class Link:
    """A way between two points that is no edge: residual, qk or unembed (which alone has a weight)."""

    source: str
    target: str
    kind: str
    weight: float | None = None


@dataclass(frozen=True)
class Text:
    """What the nodes are shown on.

    Attributes:
        tokenizer: the model's.
        windows: (N, T) held-out tokens of the corpus.
        prompts: pairs of the task, positive and negative in turn.
    """

    tokenizer: Tokenizer
    windows: Tensor
    prompts: TaskData


def page_data(circuit: Circuit, text: Text, model: Transformer, config: RunConfig) -> tuple[dict[str, Any], Layout]:
    """Collect what the page shows.

    Args:
        circuit: the circuit.
        text: what its nodes are shown on.
        model: the full model it is part of.
        config: of the run that trained the model.

    Returns:
        Plain values, for JSON, and the layout. Points are nodes first, then the marks that stand for the two
        ends of the model; edges and links name them by their number.
    """
    names = circuit.node_names()
    marks = end_marks(names, model, text.prompts)
    links = all_links(names, marks, model)
    unembedding = [(link.source, link.target, link.weight) for link in links if link.kind == "unembed"]
    weights = [(edge.source, edge.target, edge.weight) for edge in circuit.edges]
    sites = ["embed", "positions", *circuit.nodes, "logits"]
    layout = lay_out([*names, *marks], [*weights, *unembedding], sites, model.options.d_head)
    number = {name: i for i, name in enumerate([*names, *marks])}
    data = {
        "format": FORMAT,
        "facts": _facts(circuit, config),
        "readings": [asdict(reading) for reading in readings(circuit.measures)],
        "cautions": cautions(circuit.measures),
        "measures": circuit.measures,
        "settings": circuit.settings,
        "nodes": _nodes(names, circuit, text, model),
        "marks": [_mark(name, text, model) for name in marks],
        "edges": [[number[a], number[b], snippets.significant(weight)] for a, b, weight in weights],
        "links": [[number[l.source], number[l.target], l.kind, l.weight] for l in links],
        "windows": text.windows.tolist(),
        "vocabulary": _used_texts(text),
        "prompts": snippets.prompt_texts(text.prompts, text.tokenizer),
    }
    return data, layout


def end_marks(names: Sequence[str], model: Transformer, prompts: TaskData) -> list[str]:
    """What stands for the ends of the model: channels the embedding writes that are read, and the answers.

    The answer of each side is the most common one of `prompts`, as "logits:<token>".
    """
    d = model.options.d_model
    written = (model.embed.weight != 0).any(0)
    if model.options.positions == "learned":
        written |= (model.positions.weight != 0).any(0)
    read = sorted({channel_of(n) for n in names if _reads(site_of(n))})
    marks = [f"embed:{c}" for c in read if c < d and written[c]]
    marks += [f"positions:{c}" for c in read if c >= d]
    answers = [_most_common(prompts.correct[side::2]) for side in (0, 1)]
    return marks + [f"logits:{token}" for token in dict.fromkeys(answers)]


def all_links(names: Sequence[str], marks: Sequence[str], model: Transformer) -> list[Link]:
    """Links from each write to each later read of its channel, pairs of query and key, and the unembedding."""
    starts = [mark for mark in marks if is_residual(site_of(mark))]
    links = list(_residual_links([*starts, *names]))
    present = set(names)
    for name in names:
        if kind_of(site_of(name)) == "q" and (key := f"{site_of(name)[:-1]}k:{channel_of(name)}") in present:
            links.append(Link(name, key, "qk"))
    to_logits = _unembedding(model)
    for name in names:
        for mark in marks:
            if site_of(name) == "final_resid" and site_of(mark) == "logits":
                weight = to_logits[channel_of(mark), channel_of(name)].item()
                if weight:
                    links.append(Link(name, mark, "unembed", snippets.significant(weight)))
    return links


def describe(name: str, d_model: int, d_head: int) -> str:
    """A node in words."""
    site, channel = site_of(name), channel_of(name)
    kind = kind_of(site)
    residual = f"residual channel {channel}" if channel < d_model else f"position channel {channel - d_model}"
    if not site.startswith("blocks."):
        return {"final_resid": f"final {residual}", "embed": f"embedding of {residual}"}.get(site, residual)
    place = f"layer {site.split('.')[1]}, {'MLP' if kind.startswith('mlp') else 'attention'}: "
    if kind in READS:
        return f"{place}reads {residual}"
    if kind in WRITES:
        return f"{place}writes {residual}"
    if kind == "mlp_act":
        return f"{place}neuron {channel}"
    role = {"q": "query", "k": "key", "v": "value"}[kind]
    return f"{place}{role} channel {channel % d_head} of head {channel // d_head}"


def _residual_links(names: Sequence[str]) -> Iterator[Link]:
    """Links along the residual stream; names in forward order."""
    writers: dict[int, list[str]] = {}
    for name in names:
        if _reads(site_of(name)):
            yield from (Link(writer, name, "residual") for writer in writers.get(channel_of(name), ()))
        elif is_residual(site_of(name)):
            writers.setdefault(channel_of(name), []).append(name)


def _reads(site: str) -> bool:
    return site == "final_resid" or kind_of(site) in READS


def _most_common(tokens: Tensor) -> int:
    return Counter(tokens.tolist()).most_common(1)[0][0]


def _unembedding(model: Transformer) -> Tensor:
    """Weights (V, D) from the normed final residual to the logits, with the norm's gains."""
    return (model.unembed.weight * getattr(model.norm, "weight", 1)).detach()


def _facts(circuit: Circuit, config: RunConfig) -> dict[str, str]:
    m = config.model
    return {
        "run": circuit.settings.get("run", config.run.name),
        "method": circuit.method,
        "ablation": circuit.ablation.kind,
        "model": f"{m.n_layers} layers, d_model {m.d_model}, {m.d_model // m.d_head} heads of {m.d_head}, "
        f"{m.mlp_ratio * m.d_model} neurons a layer, context {m.n_ctx}",
        "weights": "dense" if config.sparsity.density == 1 else f"{config.sparsity.density:.2%} of the blocks' nonzero",
        "calibration": f"scale {circuit.calibration.scale:.3g}, shift {circuit.calibration.shift:.3g}",
    }


def _nodes(names: Sequence[str], circuit: Circuit, text: Text, model: Transformer) -> list[dict[str, Any]]:
    channels = {s: mask.nonzero().flatten().tolist() for s, mask in circuit.nodes.items() if mask.any()}
    if not channels:
        return []
    on_corpus = snippets.activations(model, text.windows, channels)
    on_prompts = snippets.activations(model, text.prompts.tokens, channels)
    nodes = []
    for name, corpus, prompts in zip(names, on_corpus, on_prompts, strict=True):
        node = {
            "name": name,
            "words": describe(name, model.options.d_model, model.options.d_head),
            "effect": circuit.effects.get(name),
            "replacement": _replacement(circuit, name),
            "corpus": snippets.on_corpus(corpus),
            "prompts": snippets.on_prompts(prompts, text.prompts.last),
        }
        if kind_of(site_of(name)) in ("q", "k", "v"):
            node["head"] = channel_of(name) // model.options.d_head
        if site_of(name) == "final_resid":
            node["tokens"] = _strongest(_unembedding(model)[:, channel_of(name)], text.tokenizer)
        nodes.append(node)
    return nodes


def _replacement(circuit: Circuit, name: str) -> float | None:
    """What stands in for the node when it is ablated, the mean of several; None where it is not kept."""
    if site_of(name) not in circuit.ablation.values:
        return None
    return snippets.significant(circuit.ablation.values[site_of(name)][..., channel_of(name)].mean().item())


def _mark(name: str, text: Text, model: Transformer) -> dict[str, Any]:
    if site_of(name) == "logits":
        return {"name": name, **_answer(channel_of(name), text)}
    mark = {"name": name, "words": describe(name, model.options.d_model, model.options.d_head)}
    if site_of(name) == "embed":
        mark["tokens"] = _strongest(model.embed.weight.detach()[:, channel_of(name)], text.tokenizer)
    return mark


def _answer(token: int, text: Text) -> dict[str, str]:
    """The text of an answer's token, and which prompts it answers."""
    sides = []
    for word, side in (("positive", 0), ("negative", 1)):
        answers = text.prompts.correct[side::2].tolist()
        if token in answers:
            sides.append(f"{'the' if set(answers) == {token} else 'an'} answer of the {word} prompts")
    shown = snippets.text(token, text.tokenizer)
    return {"token": shown, "words": f"logit of {shown!r}, {' and '.join(sides)}"}


def _strongest(weights: Tensor, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """The tokens with most weight, by size."""
    order = weights.abs().argsort(descending=True, stable=True)[:TOKENS_SHOWN].tolist()
    found = [(snippets.text(token, tokenizer), snippets.significant(weights[token].item())) for token in order]
    return [(shown, weight) for shown, weight in found if weight]


def _used_texts(text: Text) -> dict[int, str]:
    return {token: snippets.text(token, text.tokenizer) for token in text.windows.unique().tolist()}

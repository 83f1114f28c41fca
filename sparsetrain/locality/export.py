"""Put the weights of a model in the order of its nodes' places, so that near nodes have near indices."""

import torch
from torch import Tensor

from sparsetrain.linear import Linear
from sparsetrain.locality.positions import Layout, LocalityError, Plan, identity, plan_of
from sparsetrain.model import Transformer

UNORDERED = ("tokens_in", "tokens_out", "contexts")  # they have places, but their indices mean something elsewhere

Side = tuple[str, ...]  # the classes that lie along a dimension of a tensor, one after the other; (): it stays


def permuted(model: Transformer, layout: Layout) -> tuple[Transformer, Layout]:
    """The same function with its channels, neurons and heads in the order of their slots; and the layout of that.

    Every matrix, bias, norm and sink is permuted with the classes that it joins, all at once. Tokens keep their
    indices, and the bigram table is left alone. Logits differ by rounding alone, save where AbsTopK cuts between equal
    magnitudes, which goes by index: rare in float32, common in bfloat16.

    Args:
        model: its weights may be held at candidates; those of the result are dense.
        layout: of this model, see `plan_of`.

    Raises:
        LocalityError: the layout is of another architecture.
    """
    full = plan_of(model.options, model.vocab_size, layout.plan.sheet)
    _check(full, layout.plan)
    orders = _orders(layout)
    dense = {f"{name}.weight": m.dense_weight() for name, m in model.named_modules() if isinstance(m, Linear)}
    state = {**model.state_dict(), **dense}
    with torch.device("meta"):
        other = Transformer(model.options, model.vocab_size)
    other.load_state_dict({name: _moved(t, _sides(full, name), orders) for name, t in state.items()}, assign=True)
    kept = {name: slots for name, slots in layout.slots.items() if name in UNORDERED}
    return other.train(model.training), identity(layout.plan).replace(kept)


def _check(full: Plan, plan: Plan) -> None:
    known = {name: (c.n, c.block) for name, c in full.classes.items()}
    of_layout = {name: (c.n, c.block) for name, c in plan.classes.items()}
    wrong = [f"{name} has {here} there, {known.get(name)} here" for name, here in of_layout.items()
             if known.get(name) != here]  # fmt: skip
    wrong += [f"{name} is missing there" for name in known if name not in of_layout and name not in UNORDERED]
    if wrong:
        raise LocalityError("the layout does not fit the model (nodes, block):\n  " + "\n  ".join(wrong))


def _orders(layout: Layout) -> dict[str, Tensor]:
    """For each class that is permuted, and for the heads of each block, the old indices in their new order."""
    orders = {}
    for name, c in layout.plan.classes.items():
        if name not in UNORDERED:
            orders[name] = torch.from_numpy(layout.order(name))
        if c.block:
            orders[c.heads] = orders[name][:: c.block] // c.block
    return orders


def _sides(full: Plan, name: str) -> tuple[Side, ...]:
    """What lies along each dimension of a parameter."""
    matrix = {m.name: m for m in full.matrices}.get(name.removesuffix("bias").removesuffix("weight") + "weight")
    if matrix:
        rows = () if matrix.rows[0] in UNORDERED else matrix.rows
        return (rows,) if name.endswith("bias") else (rows, matrix.columns)
    if name == "bigram":
        return ()
    if name == "positions.weight":  # concatenated; learnt ones are a matrix of the plan
        return (), ("positions",)
    if name.endswith(".sink"):
        return ((name.removesuffix("attn.sink") + "heads",),)
    return (("positions",) if ".norm.pos." in name else ("residual",),)  # a norm's gain or bias


def _moved(tensor: Tensor, sides: tuple[Side, ...], orders: dict[str, Tensor]) -> Tensor:
    """A copy of a tensor with the nodes along each dimension in their orders."""
    for dim, side in enumerate(sides):
        if side:
            order, start = [], 0
            for name in side:
                order.append(orders[name] + start)
                start += len(orders[name])
            tensor = tensor.index_select(dim, torch.cat(order).to(tensor.device))
    return tensor.clone()

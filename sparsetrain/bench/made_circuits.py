"""Transformers made by hand, small enough to be followed with a pencil, and the circuits they were made to have."""

import random

import torch

from sparsetrain.config import AbsTopKOptions, ModelOptions
from sparsetrain.model import Transformer
from sparsetrain.tasks import TaskData

# Weights of the neurons relu(s) and relu(s - 1) in what the MLP writes, s the sum of two heads that are 0 or 1.
GATES = {"or": (1.0, -1.0), "and": (0.0, 1.0), "add": (1.0, 0.0)}

QUOTE_TOKENS = ("(", "'", '"', "a", "b", "c")
# The circuit: a letter looks for the quote and copies its kind; neurons tell the kinds apart, twice.
QUOTE_CIRCUIT = (
    ("blocks.0.attn_in:2", "blocks.0.q:0"), ("blocks.0.attn_in:0", "blocks.0.k:0"),
    ("blocks.0.attn_in:1", "blocks.0.v:0"), ("blocks.0.v:0", "blocks.0.attn_out:5"),
    ("blocks.0.mlp_in:5", "blocks.0.mlp_act:0"), ("blocks.0.mlp_in:5", "blocks.0.mlp_act:1"),
    ("blocks.0.mlp_act:0", "blocks.0.mlp_out:6"), ("blocks.0.mlp_act:1", "blocks.0.mlp_out:7"),
    ("blocks.1.mlp_in:6", "blocks.1.mlp_act:0"), ("blocks.1.mlp_in:7", "blocks.1.mlp_act:1"),
    ("blocks.1.mlp_act:0", "blocks.1.mlp_out:8"), ("blocks.1.mlp_act:1", "blocks.1.mlp_out:9"),
)  # fmt: skip


def gate(name: str) -> Transformer:
    """Two heads that each tell whether the tokens are on, an MLP that is their OR, AND or sum, and a decoy.

    The decoy, head 2, does as the others do; the MLP reads it too, and writes it to a channel that nothing reads.
    Channels: 0 on, 1 to 3 the heads, 4 the output, 5 unread.
    """
    options = ModelOptions(
        n_layers=1, d_model=6, d_head=2, mlp_ratio=1, n_ctx=2, activation="relu", norm="none", causal=False,
        bigram=False, sink=False, positions="learned", abs_topk=AbsTopKOptions(*[1.0] * 8),
    )  # fmt: skip
    model = _empty(Transformer(options, 2))
    block = model.blocks[0]
    model.embed.weight[1, 0] = 1
    model.positions.weight[:, 5] = torch.tensor([1.0, -1.0])
    for head in range(3):
        block.attn.qkv.weight.chunk(3)[2][2 * head, 0] = 1  # queries and keys are zero: the mean of the tokens
        block.attn.out.weight[1 + head, 2 * head] = 1
    for neuron, (bias, weight) in enumerate(zip((0, -1), GATES[name], strict=True)):
        block.mlp.up.weight[neuron, 1:3], block.mlp.up.bias[neuron] = 1, bias
        block.mlp.out.weight[4, neuron] = weight
    block.mlp.up.weight[2, 3] = block.mlp.out.weight[5, 2] = 1
    model.unembed.weight[1, 4] = 1
    return model


def gate_data(name: str) -> TaskData:
    """One prompt, two tokens that are on; its partner's are off."""
    on, one = torch.ones(1, 2, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    return TaskData(name, on, one, one, 0 * one, one, ("on on",), 0 * on)


def quote_model() -> Transformer:
    """A weight-sparse transformer that closes quotes, with AbsTopK, RMSNorm and attention sinks, and with decoys.

    Channels: 0 a quote, 1 its kind, 2 a letter, 3 which letter, 4 a bracket, 5 to 9 what is found out. Decoys lose
    AbsTopK or attention to the circuit, or copy what is not there.
    """
    shares = AbsTopKOptions(attn_out=1 / 16, mlp_act=1 / 64, mlp_out=1 / 16)
    options = ModelOptions(n_layers=2, d_model=16, d_head=4, n_ctx=8, bigram=False, abs_topk=shares)
    model = _empty(Transformer(options, len(QUOTE_TOKENS)))
    for parameter in (
        model.norm,
        *(norm.resid for block in model.blocks for norm in (block.attn.norm, block.mlp.norm)),
    ):
        parameter.weight.fill_(1)
    model.embed.weight[0, 4] = model.embed.weight[1:3, 0] = model.embed.weight[2, 1] = 1
    model.embed.weight[1, 1] = -1
    model.embed.weight[3:, 2], model.embed.weight[3:, 3] = 1, torch.tensor([1.0, -1.0, 0.5])
    _fill_quote_blocks(model)
    model.unembed.weight[2, 8] = model.unembed.weight[1, 9] = 4
    return model


def quote_data() -> TaskData:
    """Sixteen pairs of prompts, `("abc` and `('abc`, which are to be closed."""
    draw = random.Random(0)
    texts = []
    for _ in range(16):
        letters = "".join(draw.choices("abc", k=draw.randint(1, 4)))
        texts += [f'("{letters}', f"('{letters}"]
    tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor([QUOTE_TOKENS.index(c) for c in text])
    correct = tokens[:, 1].clone()
    partners = tokens.view(-1, 2, tokens.shape[1]).flip(1).view_as(tokens)
    last = torch.tensor([len(text) - 1 for text in texts])
    positive = torch.full_like(correct, QUOTE_TOKENS.index('"'))
    return TaskData("quote_closing", tokens, last, correct, 3 - correct, positive, tuple(texts), partners)


def _fill_quote_blocks(model: Transformer) -> None:
    first, second = model.blocks
    q, k, v = first.attn.qkv.weight.chunk(3)
    q[0, 2] = k[0, 0] = 4
    v[0, 1] = first.attn.out.weight[5, 0] = 1
    first.mlp.up.weight[0, 5], first.mlp.up.weight[1, 5] = 4, -4
    first.mlp.out.weight[6, 0] = first.mlp.out.weight[7, 1] = 1
    second.mlp.up.weight[0, 6] = second.mlp.up.weight[1, 7] = 4
    second.mlp.out.weight[8, 0] = second.mlp.out.weight[9, 1] = 1
    # Decoys: a key that loses attention, a value nobody attends to, writes and neurons that lose AbsTopK, and a head
    # that copies what is not there yet.
    q[1, 2] = k[1, 4] = 1
    v[4, 3] = first.attn.out.weight[6, 4] = 1
    first.attn.out.weight[7, 0] = 0.5
    first.mlp.up.weight[5, 2] = first.mlp.out.weight[9, 5] = 1
    first.mlp.out.weight[8, 0] = first.mlp.out.weight[8, 1] = 0.5
    q, k, v = second.attn.qkv.weight.chunk(3)
    q[0, 2] = k[0, 2] = 4
    v[0, 9] = second.attn.out.weight[8, 0] = 1
    second.mlp.up.weight[7, 5] = second.mlp.up.weight[8, 2] = 0.5
    second.mlp.out.weight[9, 7] = second.mlp.out.weight[9, 8] = second.mlp.out.weight[5, 0] = 0.5


def _empty(model: Transformer) -> Transformer:
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    return model

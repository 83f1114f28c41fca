"""Compiles RASP programs with Tracr into transformers of ours, each one small file that needs no Tracr to be read.

`python -m sparsetrain.bench.compile_programs FILE.py FOLDER`; programs/protocol.py shows what such a file holds. Tracr
is imported here alone: `pip install tracr-pypi` brings it, with jax.
"""

import argparse
import itertools
import json
import math
import random
import runpy
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsetrain.bench.kernels import BenchError
from sparsetrain.checkpoint import save_sparse
from sparsetrain.config import AbsTopKOptions, ModelOptions, config_to_dict
from sparsetrain.model import Transformer

BOS = "BOS"
MOST = 256  # sequences that are kept of a program; all where there are no more
N_EXPECTED = 8  # sequences whose outputs, by Tracr's own transformer, are kept too
TOLERANCE = 1e-3  # of our outputs beside Tracr's; attention logits of 100 and more lose digits in float32


@dataclass(frozen=True)
class Program:
    """A program in RASP, and what it is compiled for and run on.

    Attributes:
        output: the sequence it computes, a tracr.rasp.rasp.SOp.
        vocabulary: the tokens it may read.
        max_seq_len: the longest sequence, without BOS, that the transformer is made for.
        length: how many tokens the sequences have that it is run on, without BOS; at most max_seq_len.
        causal: let each position see only what comes before it and itself.
    """

    output: Any
    vocabulary: Collection[Any]
    max_seq_len: int
    length: int
    causal: bool = False


FIELDS = ", ".join(field.name for field in fields(Program))


def compile_file(source: Path, folder: Path) -> list[Path]:
    """Compile every program of a Python file.

    Args:
        source: a file that defines PROGRAMS: for each name a tuple of what `Program` holds.
        folder: where `<name>.safetensors` of each is written.

    Returns:
        The files written.

    Raises:
        BenchError: Tracr is not installed, the file has no PROGRAMS, or a transformer's outputs are not Tracr's.
    """
    try:
        programs = runpy.run_path(str(source)).get("PROGRAMS")
    except ModuleNotFoundError as error:
        raise BenchError(f"{source} must find what it imports, got {error}; pip install tracr-pypi") from error
    folder.mkdir(parents=True, exist_ok=True)
    try:
        made = {name: Program(*values) for name, values in programs.items()}
    except (AttributeError, TypeError) as error:
        raise BenchError(f"{source} must define PROGRAMS, for each name ({FIELDS}); got {error}") from error
    return [_compile(name, program, folder / f"{name}.safetensors") for name, program in made.items()]


def sequences(program: Program, seed: int = 0) -> list[tuple]:
    """All sequences of the program's length, or as many of them as are kept, drawn from a seed."""
    if not 1 <= program.length <= program.max_seq_len:
        raise BenchError(f"length must be between 1 and max_seq_len = {program.max_seq_len}, got {program.length}")
    tokens = sorted(program.vocabulary, key=lambda token: (str(type(token)), token))
    if len(tokens) ** program.length <= MOST:
        return list(itertools.product(tokens, repeat=program.length))
    drawn: dict[tuple, None] = {}
    draw = random.Random(seed)
    while len(drawn) < MOST:
        drawn[tuple(draw.choices(tokens, k=program.length))] = None
    return list(drawn)


def _compile(name: str, program: Program, target: Path) -> Path:
    from tracr.compiler import compiling

    compiled = compiling.compile_rasp_to_model(
        program.output, set(program.vocabulary), program.max_seq_len, program.causal, compiler_bos=BOS
    )
    encoder = compiled.input_encoder
    tokens = torch.tensor([encoder.encode([BOS, *sequence]) for sequence in sequences(program)])
    unembed = _unembedding(compiled)
    model = _transformer(compiled, unembed, program.causal)
    outputs = _outputs(compiled, tokens, unembed)
    _check(name, model, tokens, outputs)
    values = getattr(compiled.output_encoder, "encoding_map", {})  # none of a number
    notes = {
        "program": name,
        "model": json.dumps(config_to_dict(model.options)),
        "vocabulary": json.dumps([str(token) for token in encoder.encoding_map]),
        "outputs": json.dumps([str(value) for value in values]),
    }
    held = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    some = outputs[:: math.ceil(len(outputs) / N_EXPECTED)]
    save_sparse(target, {**held, "tokens": tokens.to(torch.int16), "expected": some.contiguous()}, **notes)
    return target


def _transformer(compiled: Any, unembed: Tensor, causal: bool) -> Transformer:
    """Tracr's transformer as one of ours: widths are padded with zeros, and what it computes stays."""
    sizes = compiled.model_config
    weights = {
        key: {name: torch.from_numpy(np.array(w)).float() for name, w in part.items()}
        for key, part in compiled.params.items()
    }
    embed, positions = (weights[key]["embeddings"] for key in ("token_embed", "pos_embed"))
    d_head = max(sizes.key_size, math.ceil(embed.shape[1] / sizes.num_heads))
    d_model = d_head * sizes.num_heads
    options = ModelOptions(
        n_layers=sizes.num_layers, d_model=d_model, d_head=d_head, mlp_ratio=math.ceil(sizes.mlp_hidden_size / d_model),
        n_ctx=len(positions), activation="relu", norm="none", causal=causal, bigram=False, sink=False,
        positions="learned", abs_topk=AbsTopKOptions(*[1.0] * 8),
    )  # fmt: skip
    model = Transformer(options, max(len(embed), len(unembed)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        _put(model.embed.weight, embed)
        _put(model.positions.weight, positions)
        _put(model.unembed.weight, unembed)
        for l, block in enumerate(model.blocks):
            _fill_block(block, {k: weights[f"transformer/layer_{l}/{k}"] for k in PARTS}, sizes.num_heads)
    return model.requires_grad_(False)


PARTS = ("attn/query", "attn/key", "attn/value", "attn/linear", "mlp/linear_1", "mlp/linear_2")


def _fill_block(block: torch.nn.Module, weights: dict[str, dict[str, Tensor]], n_heads: int) -> None:
    qkv, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
    for i, part in enumerate(PARTS[:3]):
        w = weights[part]["w"].unflatten(1, (n_heads, -1))  # (D, H, key size)
        # Attention divides by the root of a head's width, which is greater here.
        scale = math.sqrt(block.attn.d_head / w.shape[2]) if i == 0 else 1.0
        _put(qkv[i].unflatten(0, (n_heads, -1)), scale * w.movedim(0, 2))
        _put(biases[i].unflatten(0, (n_heads, -1)), scale * weights[part]["b"].unflatten(0, (n_heads, -1)))
    out = weights["attn/linear"]
    _put(block.attn.out.weight.unflatten(1, (n_heads, -1)), out["w"].unflatten(0, (n_heads, -1)).movedim(2, 0))
    _put(block.attn.out.bias, out["b"])
    for linear, part in ((block.mlp.up, "mlp/linear_1"), (block.mlp.out, "mlp/linear_2")):
        _put(linear.weight, weights[part]["w"].T)
        _put(linear.bias, weights[part]["b"])


def _put(target: Tensor, values: Tensor) -> None:
    """Write into the first entries of every dimension."""
    target[tuple(slice(n) for n in values.shape)] = values


def _unembedding(compiled: Any) -> Tensor:
    """What Tracr reads its outputs with, (outputs, D); a program whose output is a number has one."""
    import haiku
    import jax.numpy as jnp

    def read(x):
        return compiled.get_compiled_model().unembed(x, use_unembed_argmax=False)

    identity = jnp.eye(len(compiled.residual_labels))
    matrix = haiku.without_apply_rng(haiku.transform(read)).apply(compiled.params, identity)
    return torch.from_numpy(np.array(matrix)).float().reshape(len(identity), -1).T


def _outputs(compiled: Any, tokens: Tensor, unembed: Tensor) -> Tensor:
    """The outputs of Tracr's own transformer after every token but BOS: (N, P, outputs)."""
    run = compiled.forward(compiled.params, tokens.numpy())
    return torch.from_numpy(np.array(run.transformer_output.output)).float()[:, 1:] @ unembed.T


def _check(name: str, model: Transformer, tokens: Tensor, outputs: Tensor) -> None:
    ours = model(tokens)[:, 1:]
    n = outputs.shape[-1]
    error = max((ours[..., :n] - outputs).abs().max().item(), ours[..., n:].abs().sum().item())
    if error > TOLERANCE:
        raise BenchError(f"the transformer of {name} must give Tracr's own outputs, got {error:.2g} apart; report it")


def main() -> None:
    """Compile the programs of a file."""
    parser = argparse.ArgumentParser("sparsetrain.bench.compile_programs", description=__doc__)
    parser.add_argument("source", type=Path, metavar="FILE.py")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    for path in compile_file(options.source, options.folder):
        print(f"{path} ({path.stat().st_size} bytes)")


if __name__ == "__main__":
    main()

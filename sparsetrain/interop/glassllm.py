"""The language models that the package glassllm ships (MIT licence), as Hugging Face folders to bridge to.

They are real, small and of somebody else's making: 4 blocks, 852,608 parameters, trained on the books of Lewis Carroll
(`en`) or Machado de Assis (`pt`). No code of the package takes part, and none of its files is part of this one.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from sparsetrain.checkpoint import CheckpointError, whole_folder

LANGUAGES = ("en", "pt")
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
SPACE = "▁"
# Their names and Llama's: of a block's matrices, which they hold as (inputs, outputs), and of its norms.
MATRICES = {
    "attn.W_Q": "self_attn.q_proj", "attn.W_K": "self_attn.k_proj", "attn.W_V": "self_attn.v_proj",
    "attn.W_O": "self_attn.o_proj", "ffn.W1": "mlp.gate_proj", "ffn.W3": "mlp.up_proj", "ffn.W2": "mlp.down_proj",
}  # fmt: skip
NORMS = {"norm1.gamma": "input_layernorm", "norm2.gamma": "post_attention_layernorm"}
ROTATED = ("attn.W_Q", "attn.W_K")


def import_glassllm(language: str, folder: str | Path) -> Path:
    """Write a model of the installed package glassllm as a Hugging Face folder of a Llama, for `load_dense`.

    A corpus of its tokens takes `data.tokenizer=FOLDER/tokenizer.json data.end_of_text='<eos>'`.

    Args:
        language: en or pt.
        folder: one that does not exist yet; written whole or not at all.

    Returns:
        `folder`, with config.json, tokenizer.json and model.safetensors (float32).

    Raises:
        CheckpointError: the package is not installed or not of the kind known here, or `folder` exists.
    """
    folder = Path(folder)
    if language not in LANGUAGES:
        raise CheckpointError(f"glassllm's language must be one of {', '.join(LANGUAGES)}, got {language!r}")
    if folder.exists():
        raise CheckpointError(f"the folder must be a new one, got {folder}, which exists; name another")
    config, arrays, spelling = _read(language)
    weights, tokenizer = llama_weights(config, arrays), build_tokenizer(spelling)
    with whole_folder(folder) as unfinished:
        (unfinished / "config.json").write_text(json.dumps(llama_config(config, arrays), indent=1) + "\n")
        tokenizer.save(str(unfinished / "tokenizer.json"))
        save_file(weights, unfinished / "model.safetensors", {"format": "pt"})
    return folder


def llama_config(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What config.json says of a Llama that has these weights."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        "vocab_size": config["vocab_size"], "hidden_size": config["d_model"],
        "intermediate_size": arrays["blocks.0.ffn.W1"].shape[1], "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"], "num_key_value_heads": config["n_kv_heads"],
        "max_position_embeddings": config["max_len"], "rope_theta": config["rope_base"],
        "rms_norm_eps": config["eps"], "hidden_act": "silu", "tie_word_embeddings": True,
        **{f"{name[1:-1]}_token_id": i for i, name in enumerate(SPECIAL) if name != "<unk>"},
    }  # fmt: skip


def llama_weights(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The weights under Llama's names, in its layout, in float32.

    What queries and keys are rotated by pairs neighbouring channels there; Llama pairs the halves of a head.
    """
    d_head = config["d_model"] // config["n_heads"]
    weights = {"model.embed_tokens.weight": arrays["E"], "model.norm.weight": arrays["norm_f.gamma"]}
    for l in range(config["n_layers"]):
        for theirs, llamas in NORMS.items():
            weights[f"model.layers.{l}.{llamas}.weight"] = arrays[f"blocks.{l}.{theirs}"]
        for theirs, llamas in MATRICES.items():
            matrix = arrays[f"blocks.{l}.{theirs}"].T
            if theirs in ROTATED:
                pairs = matrix.reshape(-1, d_head // 2, 2, matrix.shape[1])
                matrix = pairs.swapaxes(1, 2).reshape(matrix.shape)
            weights[f"model.layers.{l}.{llamas}.weight"] = matrix
    return {name: torch.tensor(np.ascontiguousarray(w), dtype=torch.float32) for name, w in weights.items()}


def build_tokenizer(spelling: Mapping[str, Any]) -> Tokenizer:
    """Their BPE of characters: pieces are lines' ends, and runs of what is no space with the spaces before it.

    Args:
        spelling: `alphabet`, a list of characters, and `merges`, pairs of tokens by rank.
    """
    merges = [(first, second) for first, second in spelling["merges"]]
    tokens = [*SPECIAL, *spelling["alphabet"], *(first + second for first, second in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\n|{SPACE}*[^{SPACE}\n]+|{SPACE}+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    return tokenizer


def _read(language: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """The sizes, arrays and tokenizer of a model, out of the package's files."""
    try:
        shipped = resources.files("glassllm") / "weights"
        spelling = json.loads((shipped / f"{language}.tokenizer.json").read_text(encoding="utf-8"))
        with resources.as_file(shipped / f"{language}.npz") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
            return json.loads(str(arrays.pop("__config__"))), arrays, spelling
    except ModuleNotFoundError:
        raise CheckpointError(
            "glassllm must be installed to take its model, got no such package; pip install glassllm"
        ) from None
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"glassllm must ship the model {language} as it is known here, got: {error}") from None

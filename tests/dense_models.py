"""Small random models of transformers' families and of ours, behind the interface of dense models."""

import warnings
from functools import cache

import pytest
import torch

from sparsetrain.bridging.dense import OwnModel
from sparsetrain.bridging.hf_model import HfModel
from sparsetrain.config import ModelOptions
from sparsetrain.data import train_tokenizer
from sparsetrain.model import Transformer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

V, T = 99, 10
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": V, "n_positions": 40}
COMMON = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": V,
    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
FALCON = {k: COMMON[k] for k in COMMON if k not in ("intermediate_size", "max_position_embeddings")}
# Kind, options, whether attention and MLP read the residual at once.
FAMILIES = {
    "gpt2": ("GPT2", GPT2, False),
    "neox": ("GPTNeoX", COMMON, True),
    "neox-sequential": ("GPTNeoX", {**COMMON, "use_parallel_residual": False}, False),
    "llama": ("Llama", GROUPED, False),
    "qwen2": ("Qwen2", GROUPED, False),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}, False),
    "opt": ("OPT", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}, False),
    "phi": ("Phi", COMMON, True),
    "gpt-neo": (
        "GPTNeo",
        {
            "hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4,
            "vocab_size": V, "max_position_embeddings": 40, "window_size": 4,
        },
        False,
    ),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 4}, False),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 4}, False),
    "stablelm": ("StableLm", GROUPED, False),
    "stablelm-parallel": ("StableLm", {**GROUPED, "use_parallel_residual": True}, True),
    "falcon": ("Falcon", {**FALCON, "multi_query": True}, True),
    "falcon-two-norms": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, True),
    "falcon-sequential": ("Falcon", {**FALCON, "parallel_attn": False, "alibi": True, "multi_query": False}, False),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": V}, False),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4}, False),
    "granite": ("Granite", {**GROUPED, "residual_multiplier": 0.22}, False),
}  # fmt: skip
LAYER_NORMS = {"gpt2", "neox", "neox-sequential", "opt", "phi", "gpt-neo", "stablelm", "stablelm-parallel", "bloom",
               *(name for name in FAMILIES if name.startswith("falcon"))}  # fmt: skip
PARALLEL = [name for name, (_, _, parallel) in FAMILIES.items() if parallel]
# One of each kind of block is looked at from all sides; the others prove themselves when they are built.
KINDS = ("gpt2", "llama", "gemma2", "neox", "phi", "bloom", "mixtral")


def theirs(name: str):
    """A random model none of whose parameters is as it was at first."""
    kind, options, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@cache
def built(name: str) -> HfModel:
    """The same behind the interface, for tests that only run it."""
    return HfModel(theirs(name), train_tokenizer(iter(["nothing"]), 257))


def ours(tokenizer, n_layers=2, **options) -> OwnModel:
    options = {"n_ctx": 16, "d_model": 32, "d_head": 8, **options}
    model = Transformer(ModelOptions(n_layers=n_layers, **options), V, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return OwnModel(model, tokenizer)


def random_tokens(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (n, T), generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())

"""GPT-2-family checkpoints of Hugging Face as run directories, which every stage after training reads as one of ours.

Only safetensors files, config.json and tokenizer.json are read, and `transformers` is not needed. Pickles
(pytorch_model.bin), which can run code when they are loaded, never are.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from sparsetrain.checkpoint import CheckpointError, build, save_sparse, whole_folder
from sparsetrain.config import AbsTopKOptions, RunConfig, config_from_dict, config_to_yaml
from sparsetrain.data import file_hash

Find = Callable[[str], Path | None]  # a file of a checkpoint by its name; None where the checkpoint has none

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
SIZES = ("n_positions", "n_embd", "n_layer", "n_head")
# What must be so, since our transformer has no other variant of the architecture.
FIXED = {
    "model_type": "gpt2", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False, "add_cross_attention": False,
}  # fmt: skip
# What GPT2Config takes where config.json is silent.
DEFAULTS = {
    **FIXED, "model_type": None, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True,
}  # fmt: skip
# Their names and ours: of a block's modules, whose linear maps they hold as (inputs, outputs), and of the others.
BLOCK = {
    "ln_1": "attn.norm.resid", "attn.c_attn": "attn.qkv", "attn.c_proj": "attn.out",
    "ln_2": "mlp.norm.resid", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.out",
}  # fmt: skip
ENDS = {"wte": "embed", "wpe": "positions", "ln_f": "norm", "lm_head": "unembed"}
CONSTANTS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which older files hold
REMEDIES = {
    "model.safetensors": "; pickles (pytorch_model.bin) are not read, since loading one can run code: "
    "transformers' save_pretrained writes safetensors",
    "tokenizer.json": "; transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it",
}


def import_gpt2(source: str | Path, run_dir: str | Path) -> Path:
    """Make a run directory of a GPT-2 model, for `checkpoint.load_run` and all that stands on it.

    The model is dense: no AbsTopK, sinks or bigram table. It comes without a corpus (`data.source` is none), so what
    reads the corpus refuses it; name one under `data` in the run's config.yaml to have it.

    Args:
        source: a folder on disk, or the name of a Hugging Face repository, which is fetched.
        run_dir: a folder that does not exist yet; written whole or not at all.

    Returns:
        `run_dir`, with config.yaml, tokenizer.json and model.safetensors (float32).

    Raises:
        CheckpointError: the source has no config.json, tokenizer.json or safetensors, is no GPT-2 or a variant that our
            transformer does not have, or `run_dir` exists.
    """
    run_dir = Path(run_dir)
    if run_dir.exists():
        raise CheckpointError(f"the run directory must be a new one, got {run_dir}, which exists; name another")
    find = finder(source)
    read = _json(found(find, "config.json", source))
    config = run_config(read, run_dir)
    tensors = _tensors(find, source, {**DEFAULTS, **read}["tie_word_embeddings"])
    model = build(config.model, tensors, Path(source))
    tokenizer = found(find, "tokenizer.json", source)
    _check_tokenizer(tokenizer, model.vocab_size)
    with whole_folder(run_dir) as folder:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        (folder / "config.yaml").write_text(config_to_yaml(config))
        notes = {"tokenizer": file_hash(folder / "tokenizer.json"), "imported_from": str(source)}
        save_sparse(folder / "model.safetensors", model.state_dict(), **notes)
    return run_dir


def run_config(theirs: Mapping[str, Any], run_dir: Path) -> RunConfig:
    """The config of a run that has this GPT-2 model.

    Args:
        theirs: what config.json holds.
        run_dir: names the run.

    Raises:
        CheckpointError: the model is no GPT-2, or a variant that our transformer does not have; all reasons at once.
    """
    c = {**DEFAULTS, **theirs}
    if problems := _problems(c):
        raise CheckpointError("config.json must describe a GPT-2 that can be imported:\n  " + "\n  ".join(problems))
    width = c["n_embd"]
    sites = [field.name for field in fields(AbsTopKOptions)]
    model = {
        "n_layers": c["n_layer"], "d_model": width, "d_head": width // c["n_head"],
        "mlp_ratio": _n_inner(c) // width, "n_ctx": c["n_positions"], "norm": "layer",
        "norm_eps": c["layer_norm_epsilon"], "activation": ACTIVATIONS[c["activation_function"]],
        "positions": "learned", "bigram": False, "sink": False, "bias": True, "abs_topk": dict.fromkeys(sites, 1.0),
    }  # fmt: skip
    run = {"name": run_dir.name, "out": str(run_dir.parent)}
    dense = {"density": 1.0}
    return config_from_dict(RunConfig, {"run": run, "data": {"source": "none"}, "model": model, "sparsity": dense})


def _problems(c: Mapping[str, Any]) -> list[str]:
    """Why a config.json cannot be followed."""
    found = [f"{key} must be {value}, got {c[key]}" for key, value in FIXED.items() if c[key] != value]
    if c["activation_function"] not in ACTIVATIONS:
        found.append(f"activation_function must be one of {', '.join(ACTIVATIONS)}, got {c['activation_function']}")
    found += [f"{key} must be a whole number above 0, got {c[key]!r}" for key in SIZES if not _is_size(c[key])]
    if found:
        return found
    if _n_inner(c) % c["n_embd"]:
        found.append(f"n_inner must be a multiple of n_embd = {c['n_embd']}, got {_n_inner(c)}")
    if c["n_embd"] % c["n_head"]:
        found.append(f"n_embd must be a multiple of n_head = {c['n_head']}, got {c['n_embd']}")
    return found


def _n_inner(c: Mapping[str, Any]) -> int:
    return c["n_inner"] or 4 * c["n_embd"]


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _tensors(find: Find, source: str | Path, tied: bool) -> dict[str, Tensor]:
    """All weights under our names, in our layout and in float32; those that we do not know under a name of theirs."""
    tensors = {}
    for file in _weight_files(find, source):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    if not name.endswith(CONSTANTS):
                        tensors[_our_name(name)] = _our_layout(name, stored.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} must be a readable safetensors file, got: {error}") from None
    if tied and "embed.weight" in tensors:
        tensors["unembed.weight"] = tensors["embed.weight"].clone()
    return tensors


def _our_name(theirs: str) -> str:
    """`transformer.h.0.attn.c_attn.weight` is `blocks.0.attn.qkv.weight`."""
    *path, kind = theirs.removeprefix("transformer.").split(".")
    if path[:1] == ["h"]:
        inner = ".".join(path[2:])
        return f"blocks.{path[1]}.{BLOCK.get(inner, inner)}.{kind}"
    whole = ".".join(path)
    return f"{ENDS.get(whole, whole)}.{kind}"


def _our_layout(theirs: str, tensor: Tensor) -> Tensor:
    """A tensor in float32, with the rows of a block's linear map for its outputs."""
    transposed = ".h." in f".{theirs}" and tensor.dim() == 2
    return (tensor.T if transposed else tensor).float().contiguous()


def _check_tokenizer(path: Path, n_tokens: int) -> None:
    try:
        last = max(Tokenizer.from_file(str(path)).get_vocab().values())
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(f"{path} must be a readable tokenizer.json, got: {error}") from None
    if last >= n_tokens:
        raise CheckpointError(
            f"{path} must have tokens below {n_tokens}, the rows of the model's embedding, got {last}"
        )


def _weight_files(find: Find, source: str | Path) -> list[Path]:
    whole, index = find("model.safetensors"), "model.safetensors.index.json"
    if whole is None and find(index) is not None:
        return [found(find, name, source) for name in sorted({*_json(find(index))["weight_map"].values()})]
    return [whole or found(find, "model.safetensors", source)]


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be readable JSON, got: {error}") from None
    if not isinstance(read, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(read).__name__}")
    return read


def finder(source: str | Path) -> Find:
    """What finds the files of a folder on disk, or of a Hugging Face repository, which are fetched."""
    return _in_folder(Path(source)) if Path(source).is_dir() else _on_hub(str(source))


def found(find: Find, name: str, source: str | Path) -> Path:
    """A file of a checkpoint.

    Raises:
        CheckpointError: there is none of that name; how to make one.
    """
    path = find(name)
    if path is None:
        raise CheckpointError(f"{source} must hold {name}, got none there{REMEDIES.get(name, '')}")
    return path


def _in_folder(folder: Path) -> Find:
    return lambda name: folder / name if (folder / name).is_file() else None


def _on_hub(repository: str) -> Find:
    # Imported here: it takes a while, and only a name on the hub needs it.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def find(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):  # that one says that there is no network
                return None
            reason: Exception = error
        except Exception as error:  # huggingface_hub and the network each have errors of their own
            reason = error
        raise CheckpointError(
            f"{repository} must be a folder, or a Hugging Face repository that can be fetched, got no such folder and "
            f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
        ) from reason

    return find

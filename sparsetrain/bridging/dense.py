"""A dense model for a bridge: our own transformer, or any causal language model of Hugging Face."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sparsetrain.bridging.residuals import Edit, Entering, Entrance, Residuals, check_names, hooked
from sparsetrain.checkpoint import load
from sparsetrain.model import Transformer


class OwnModel:
    """Our transformer, sparse or dense, as `Residuals`; trained or frozen, as its parameters are."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        blocks = [f"blocks.{l}." for l in range(model.options.n_layers)]
        self.model = model
        self.tokenizer = tokenizer
        self.sites = (*(b + site for b in blocks for site in ("resid_pre", "resid_mid")), "final_resid")
        self.reads = (*(b + read for b in blocks for read in ("attn_in", "mlp_in")), "final_in")
        self.width = model.options.d_model
        self.vocab_size = model.vocab_size
        self.n_ctx = model.options.n_ctx

    def run(self, tokens: Tensor, read: Collection[str] = ()) -> tuple[dict[str, Tensor], Tensor]:
        """See `Residuals.run`. Reads are as they are after AbsTopK, with concatenated positions beside them."""
        check_names(self, read)
        seen: dict[str, Tensor] = {}
        with hooked([(self.model.norm, "out", partial(_keep, seen))] if "final_in" in read else []):
            visit = self.model.visitor(seen, [*self.sites, *({*read} - {"final_in"})])
            logits = self.model.logits(self.model.final_resid(tokens, visit), tokens)
        return seen, logits

    def enter(self, tokens: Tensor, entering: Entering) -> Tensor:
        """See `Residuals.enter`; a batch that is spread over all sites costs half a forward pass."""
        batch = Entrance(self, tokens, entering, grows=True)
        resid = self.model.final_resid(batch.tokens, batch.put)
        return self.model.logits(batch.in_order(resid), tokens)

    def steer(self, tokens: Tensor, edits: Mapping[str, Edit]) -> Tensor:
        """See `Residuals.steer`."""
        check_names(self, edits)
        inside = {name: edit for name, edit in edits.items() if name != "final_in"}
        with hooked([(self.model.norm, "out", _edit(edits["final_in"]))] if "final_in" in edits else []):
            return self.model.run(tokens, edits=inside)[0]

    def normed(self, read: str, resid: Tensor) -> Tensor:
        """See `Residuals.normed`; without concatenated positions."""
        if read == "final_in":
            return self.model.norm(resid)
        _, l, kind = read.split(".")
        sublayer = "attn" if kind == "attn_in" else "mlp"
        return self.model.blocks[int(l)].get_submodule(sublayer).norm.resid(resid)


def _keep(seen: dict[str, Tensor], module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
    seen["final_in"] = out


def _edit(edit: Edit) -> Callable:
    return lambda module, args, kwargs, out: edit(out)


def load_dense(source: str | Path, device: str | torch.device = "cpu") -> Residuals:
    """Load a dense model, frozen and in float32.

    Args:
        source: a run directory of ours, or a folder or repository of a causal language model of Hugging Face with
            config.json, tokenizer.json and safetensors. No pickle is read, and no code that comes with a model is run.
        device: where its weights go.

    Raises:
        BridgeError: there is no such model, or it cannot be bridged to.
        CheckpointError: a file is missing or damaged.
    """
    if _is_ours(Path(source)):
        model, tokenizer = load(source, device)
        return OwnModel(model.requires_grad_(False), tokenizer)
    from sparsetrain.bridging.hf_model import load_hf  # transformers is an extra

    return load_hf(source, device)


def _is_ours(folder: Path) -> bool:
    return (folder / "config.yaml").exists() or (folder / "model" / "config.yaml").exists()

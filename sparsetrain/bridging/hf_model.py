"""Any causal language model of Hugging Face as `Residuals`, proven on a few tokens when it is built."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sparsetrain.bridging.hf_blocks import close, find_blocks, find_final_norm, find_list
from sparsetrain.bridging.hf_hooks import change, enter_block, keep, steer_block
from sparsetrain.bridging.residuals import BridgeError, Edit, Entering, Entrance, check_names, hooked
from sparsetrain.interop.huggingface import finder, found

log = logging.getLogger(__name__)

PROBE_TOKENS = 7


class HfModel:
    """A causal language model of `transformers`, frozen.

    Building it runs the model on a few random tokens: to find its sites, and to prove that a sequence whose residual is
    replaced at any of them goes on as the sequence that the residual is of.

    Args:
        model: in float32.
        tokenizer: that of its tokens.

    Raises:
        BridgeError: no residual sites are found, replacing the residual at one does not do what it should, or the model
            is not in float32 or gives numbers that are not finite.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        modules = find_list(model)
        _check_precision(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.n_ctx = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        tokens = self._probe_tokens(2 * len(modules) + 1)
        self.blocks = find_blocks(modules, lambda: self._logits(tokens[:2]))
        self.parallel = [b.index for b in self.blocks if b.mid is None]
        if self.parallel:
            self.blocks = [replace(b, write=None, mid=None) for b in self.blocks]
        self._last = modules[-1]
        self._norms = self._find_norms(find_final_norm(model, modules, lambda: self._logits(tokens[:1])))
        self._places = self._find_places()
        self.sites, self.reads = tuple(self._places), tuple(self._norms)
        residuals, logits = self.run(tokens)
        _check_finite(residuals)
        self.width, self.vocab_size = residuals["final_resid"].shape[-1], logits.shape[-1]
        self.grows = self._trouble(tokens, residuals, logits, grows=True) is None
        if not self.grows and (trouble := self._trouble(tokens, residuals, logits, grows=False)):
            raise BridgeError(trouble)
        self._report()

    def run(self, tokens: Tensor, read: Collection[str] = ()) -> tuple[dict[str, Tensor], Tensor]:
        """See `Residuals.run`."""
        check_names(self, read)
        seen: dict[str, Tensor] = {}
        places = {**self._places, **{name: (self._norms[name], "out") for name in {*read} - {*self.sites}}}
        with hooked([keep(seen, name, *place) for name, place in places.items()]):
            logits = self._logits(tokens)
        return {name: seen[name].reshape(seen["final_resid"].shape) for name in places}, logits

    def enter(self, tokens: Tensor, entering: Entering) -> Tensor:
        """See `Residuals.enter`; a batch that is spread over all sites costs half a forward pass, or a whole one where
        the model does not let its batch grow on the way."""
        return self._enter(tokens, entering, self.grows)

    def steer(self, tokens: Tensor, edits: Mapping[str, Edit]) -> Tensor:
        """See `Residuals.steer`. An edit between attention and MLP has that block's attention run twice."""
        check_names(self, edits)
        hooks = [change(norm, edits[name]) for name, norm in self._norms.items() if name in edits]
        for block in self.blocks:
            hooks += steer_block(block, edits)
        if "final_resid" in edits:
            hooks.append(change(self._last, edits["final_resid"]))
        with hooked(hooks):
            return self._logits(tokens)

    def normed(self, read: str, resid: Tensor) -> Tensor:
        """See `Residuals.normed`."""
        return self._norms[read](resid)

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits

    def _enter(self, tokens: Tensor, entering: Entering, grows: bool) -> Tensor:
        batch = Entrance(self, tokens, entering, grows)
        hooks = [hook for block in self.blocks for hook in enter_block(block, batch)]
        hooks.append(change(self._last, lambda x: batch.in_order(batch.put("final_resid", x))))
        with hooked(hooks):
            return self._logits(batch.tokens)

    def _find_places(self) -> dict[str, tuple[nn.Module, str]]:
        """For every site, the module at whose input or output it is."""
        places: dict[str, tuple[nn.Module, str]] = {}
        for block in self.blocks:
            places[block.resid_pre] = block.module, "in"
            if block.mid:
                places[block.resid_mid] = block.mid, "in"
        return {**places, "final_resid": (self._last, "out")}

    def _find_norms(self, final: nn.Module | None) -> dict[str, nn.Module]:
        """For every read, its norm."""
        norms = {}
        for block in self.blocks:
            norms[f"blocks.{block.index}.attn_in"] = block.attn_norm
            norms[f"blocks.{block.index}.mlp_in"] = block.mlp_norm
        return {name: norm for name, norm in {**norms, "final_in": final}.items() if norm is not None}

    def _probe_tokens(self, n: int) -> Tensor:
        """(n, T): a sequence for every site there can be."""
        n_tokens = self.model.get_input_embeddings().num_embeddings
        length = min(PROBE_TOKENS, self.n_ctx or PROBE_TOKENS)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(n_tokens, (n, length), generator=generator).to(self.model.device)

    def _trouble(self, tokens: Tensor, residuals: dict[str, Tensor], logits: Tensor, grows: bool) -> str | None:
        """Why a hybrid pass does not do what it should, or None.

        Row i enters at site i with the residual of row i + 1, whose logits must come of it.
        """
        name, n = type(self.model).__name__, len(self.sites)
        rows = torch.arange(n, device=tokens.device)
        others = rows.roll(-1)
        entering = {s: (rows[i : i + 1], residuals[s][others[i : i + 1]]) for i, s in enumerate(self.sites)}
        try:
            out = self._enter(tokens[:n], entering, grows)
        except (RuntimeError, ValueError, IndexError) as error:  # a model that wants the batch it began with
            return f"the residual of {name} must be replaceable at {', '.join(self.sites)}, got {error}"
        wrong = [i for i in range(n) if not close(out[i], logits[others[i]])]
        if not wrong:
            return None
        off = (out[wrong[0]] - logits[others[wrong[0]]]).abs().max().item()
        return (
            f"what {name} does from {self.sites[wrong[0]]} onward must follow from the residual there, got logits that "
            f"are off by up to {off:.2g} with the residual of another sequence there"
        )

    def _report(self) -> None:
        name, n = type(self.model).__name__, len(self.blocks)
        if self.parallel:
            log.info(
                "%s: attention and MLP of %s add to the residual at once, or nothing between them can be replaced; "
                "there is a site per block: %d, not %d",
                name, "all blocks" if len(self.parallel) == n else f"blocks {self.parallel}", n + 1, 2 * n + 1,
            )  # fmt: skip
        if not self.grows:
            log.info("%s: hybrid passes run whole batches, at twice the cost: its batch cannot grow on the way", name)


def load_hf(source: str | Path, device: str | torch.device = "cpu") -> HfModel:
    """Load a causal language model of Hugging Face; see `load_dense`."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise BridgeError(
            f"{source} is a Hugging Face model, which needs transformers, got {error}; pip install 'sparsetrain[hf]'"
        ) from None
    tokenizer = _tokenizer(found(finder(source), "tokenizer.json", source))
    try:
        stored = AutoConfig.from_pretrained(source, trust_remote_code=False).dtype
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise BridgeError(
            f"{source} must hold a causal language model of Hugging Face in safetensors, got: {error}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise BridgeError(f"{source} must hold all weights of {type(model).__name__}, got none of {', '.join(missing)}")
    if stored not in (None, torch.float32):
        log.info("%s is in %s; it is loaded as float32", source, str(stored).removeprefix("torch."))
    return HfModel(model.to(device), tokenizer)


def _tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise BridgeError(f"{path} must be a readable tokenizer.json, got: {error}") from None
    tokenizer.no_truncation()  # see `data.prepare`
    tokenizer.no_padding()
    return tokenizer


def _check_precision(model: nn.Module) -> None:
    if others := {str(p.dtype) for p in model.parameters()} - {"torch.float32"}:
        raise BridgeError(
            f"the dense model must be in float32, got {', '.join(sorted(others))}; call its float(), or load it with "
            "load_dense, which does"
        )


def _check_finite(seen: Mapping[str, Any]) -> None:
    if not bool(seen["final_resid"].isfinite().all()):  # once it is not finite it stays so
        first = next(name for name, x in seen.items() if not bool(x.isfinite().all()))
        raise BridgeError(
            f"the dense model's residual must be finite, got infinite values or NaN first at {first}; its weights may "
            "have been damaged, or have overflowed in half precision before they were saved"
        )

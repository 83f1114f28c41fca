"""Any causal language model of Hugging Face as `Residuals`, proven on a few tokens when it is built."""

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sparsetrain.bridging.hf_blocks import (
    Sublayers, close, find_blocks, find_sublayers, is_norm, stream, with_stream, with_written, written,
)  # fmt: skip
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
        self.blocks = find_blocks(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        config = model.config.get_text_config()
        self.n_ctx = getattr(config, "max_position_embeddings", None)
        _check_precision(model)
        tokens = self._probe_tokens(config.vocab_size)
        self.sublayers = self._find_sublayers(tokens)
        self.per_block = any(s.mid is None for s in self.sublayers)
        self.final_norm = self._find_final_norm(tokens)
        self.sites = self._sites()
        self.reads = self._reads()
        residuals, logits = self.run(tokens)
        self.width, self.vocab_size = residuals["final_resid"].shape[-1], logits.shape[-1]
        self.grows = self._passes(tokens, residuals, logits, grows=True) is None
        if not self.grows and (trouble := self._passes(tokens, residuals, logits, grows=False)):
            raise BridgeError(trouble)
        self._report()

    def run(self, tokens: Tensor, read: Collection[str] = ()) -> tuple[dict[str, Tensor], Tensor]:
        """See `Residuals.run`.

        Raises:
            BridgeError: the residual is not finite, at which site first.
        """
        check_names(self, read)
        seen: dict[str, Tensor] = {}
        hooks = [(module, at, _keep(seen, site)) for site, (module, at) in self._places().items()]
        hooks += [(self._norm(name), "out", _keep(seen, name)) for name in read if name in self.reads]
        with hooked(hooks):
            logits = self._logits(tokens)
        shape = seen["final_resid"].shape
        seen = {name: seen[name].reshape(shape) for name in (*self.sites, *(n for n in read if n in self.reads))}
        _check_finite(seen)
        return seen, logits

    def enter(self, tokens: Tensor, entering: Entering) -> Tensor:
        """See `Residuals.enter`; a batch that is spread over all sites costs half a forward pass, or a whole one where
        the model does not let its batch grow on the way."""
        return self._enter(tokens, entering, self.grows)

    def steer(self, tokens: Tensor, edits: Mapping[str, Edit]) -> Tensor:
        """See `Residuals.steer`. Each edit between attention and MLP runs its block's attention twice."""
        check_names(self, edits)
        hooks = [(self._norm(name), "out", _edit_out(edits[name])) for name in edits if name in self.reads]
        for l, block in enumerate(self.blocks):
            hooks += self._steer_block(l, block, edits)
        if "final_resid" in edits:
            hooks.append((self.blocks[-1], "out", _edit_out(edits["final_resid"])))
        with hooked(hooks):
            return self._logits(tokens)

    def normed(self, read: str, resid: Tensor) -> Tensor:
        """See `Residuals.normed`."""
        return self._norm(read)(resid)

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits

    def _enter(self, tokens: Tensor, entering: Entering, grows: bool) -> Tensor:
        batch = Entrance(self, tokens, entering, grows)
        hooks = []
        for l, block in enumerate(self.blocks):
            hooks += self._enter_block(l, block, batch)

        def at_end(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
            return with_written(out, batch.in_order(batch.put("final_resid", written(out))))

        with hooked([*hooks, (self.blocks[-1], "out", at_end)]):
            return self._logits(batch.tokens)

    def _enter_block(self, l: int, block: nn.Module, batch: Entrance) -> list[tuple[nn.Module, str, Callable]]:
        """Rows enter where a block begins; those that enter between attention and MLP too, with attention silent."""
        pre, mid = f"blocks.{l}.resid_pre", f"blocks.{l}.resid_mid"
        size = 0

        def at_start(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            nonlocal size
            x = batch.put(mid, batch.put(pre, stream(args, kwargs)))
            size = len(x)
            return with_stream(args, kwargs, x)

        def silence(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
            x = written(out)
            rows = x.reshape(size, -1).index_fill(0, batch.rows_at(mid, size), 0)
            return with_written(out, rows.reshape(x.shape))

        hooks: list = [(block, "in", at_start)] if {pre, mid} & batch.entering.keys() else []
        return hooks + ([(self._writer(l), "out", silence)] if mid in batch.entering else [])

    def _steer_block(
        self, l: int, block: nn.Module, edits: Mapping[str, Edit]
    ) -> list[tuple[nn.Module, str, Callable]]:
        """What edits the residual where a block begins, and between its attention and its MLP.

        For the latter the block runs up to there first; then what the edit gives enters it with attention silent.
        """
        pre, mid = edits.get(f"blocks.{l}.resid_pre"), edits.get(f"blocks.{l}.resid_mid")
        silent = False

        def at_start(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            nonlocal silent
            silent = False
            if pre:
                args, kwargs = with_stream(args, kwargs, pre(stream(args, kwargs)))
            if mid:
                x = stream(args, kwargs)
                args, kwargs = with_stream(args, kwargs, mid(self._reach_mid(l, args, kwargs).reshape(x.shape)))
                silent = True
            return args, kwargs

        def silence(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
            return with_written(out, torch.zeros_like(written(out))) if silent else None

        hooks: list = [(block, "in", at_start)] if pre or mid else []
        return hooks + ([(self._writer(l), "out", silence)] if mid else [])

    def _reach_mid(self, l: int, args: tuple, kwargs: dict) -> Tensor:
        """The residual between a block's attention and its MLP, run up to there."""

        def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
            raise _Reached(stream(args, kwargs))

        try:
            with hooked([(self._reader(l), "in", stop)]):
                self.blocks[l].forward(*args, **kwargs)
        except _Reached as reached:
            return reached.x
        raise AssertionError("a block was run that does not reach its MLP")

    def _places(self) -> dict[str, tuple[nn.Module, str]]:
        """For every site, the module at whose input or output it is."""
        found_at: dict[str, tuple[nn.Module, str]] = {}
        for l, block in enumerate(self.blocks):
            found_at[f"blocks.{l}.resid_pre"] = block, "in"
            if not self.per_block:
                found_at[f"blocks.{l}.resid_mid"] = self._reader(l), "in"
        return {**found_at, "final_resid": (self.blocks[-1], "out")}

    def _sites(self) -> tuple[str, ...]:
        return tuple(self._places())

    def _reads(self) -> tuple[str, ...]:
        names = []
        for l, s in enumerate(self.sublayers):
            names += [f"blocks.{l}.attn_in"] * bool(s.attn_norm) + [f"blocks.{l}.mlp_in"] * bool(s.mlp_norm)
        return (*names, *["final_in"] * bool(self.final_norm))

    def _norm(self, read: str) -> nn.Module:
        if read == "final_in":
            return self.final_norm
        _, l, kind = read.split(".")
        return self.blocks[int(l)].get_submodule(getattr(self.sublayers[int(l)], kind.replace("_in", "_norm")))

    def _writer(self, l: int) -> nn.Module:
        return self.blocks[l].get_submodule(self.sublayers[l].write)

    def _reader(self, l: int) -> nn.Module:
        return self.blocks[l].get_submodule(self.sublayers[l].mid)

    def _probe_tokens(self, n_tokens: int) -> Tensor:
        """(2L + 1, T): a sequence for every site there can be."""
        shape = 2 * len(self.blocks) + 1, min(PROBE_TOKENS, self.n_ctx or PROBE_TOKENS)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(n_tokens, shape, generator=generator).to(self.model.device)

    def _find_sublayers(self, tokens: Tensor) -> list[Sublayers]:
        found: list[Sublayers] = []

        def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found.append(find_sublayers(module, args, kwargs, found[-1] if found else Sublayers()))

        with hooked([(block, "in", look) for block in self.blocks]):
            self._logits(tokens[:2])
        return found

    def _find_final_norm(self, tokens: Tensor) -> nn.Module | None:
        """The norm that reads what the last block gives."""
        inside = {m for m in self.blocks.modules()}
        last: list[Tensor] = []
        norms: list[nn.Module] = []

        def at_end(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            last.append(written(out))

        def look(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            if last and (args or kwargs) and stream(args, kwargs) is last[0] and out.shape == last[0].shape:
                norms.append(module)

        outside = [m for m in self.model.modules() if m not in inside and is_norm(m)]
        with hooked([(self.blocks[-1], "out", at_end), *((m, "out", look) for m in outside)]):
            self._logits(tokens[:1])
        return norms[0] if norms else None

    def _passes(self, tokens: Tensor, residuals: dict[str, Tensor], logits: Tensor, grows: bool) -> str | None:
        """Why a hybrid pass does not do what it should, or None.

        Row i enters at site i with the residual of row i + 1, whose logits must come of it.
        """
        n = len(self.sites)
        rows = torch.arange(n, device=tokens.device)
        others = rows.roll(-1)
        entering = {s: (rows[i : i + 1], residuals[s][others[i : i + 1]]) for i, s in enumerate(self.sites)}
        try:
            out = self._enter(tokens[:n], entering, grows)
        except (RuntimeError, ValueError, IndexError) as error:  # a model that wants the batch it began with
            return f"the residual of {type(self.model).__name__} must be replaceable, got {error}"
        wrong = [s for i, s in enumerate(self.sites) if not close(out[i], logits[others[i]])]
        if not wrong:
            return None
        off = max((out[i] - logits[others[i]]).abs().max().item() for i in range(n))
        return (
            f"what {type(self.model).__name__} does from {wrong[0]} onward must follow from the residual there, got "
            f"logits that differ by up to {off:.2g} when it is replaced there by that of another sequence"
        )

    def _report(self) -> None:
        name, n = type(self.model).__name__, len(self.blocks)
        if self.per_block:
            parallel = [l for l, s in enumerate(self.sublayers) if s.mid is None]
            log.info(
                "%s: attention and MLP of %s add to the residual at once (or nothing between them can be replaced), "
                "so there is a site per block: %d, not %d",
                name, "all blocks" if len(parallel) == n else f"blocks {parallel}", n + 1, 2 * n + 1,
            )  # fmt: skip
        if not self.grows:
            log.info("%s: hybrid passes run whole batches, at twice the cost: its batch cannot grow on the way", name)


class _Reached(Exception):
    """A block was run as far as it had to be."""

    def __init__(self, x: Tensor):
        self.x = x


def load_hf(source: str | Path, device: str | torch.device = "cpu") -> HfModel:
    """Load a causal language model of Hugging Face; see `load_dense`."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise BridgeError(
            f"{source} is a Hugging Face model, which needs transformers, got {error}; pip install 'sparsetrain[hf]'"
        ) from None
    tokenizer = _tokenizer(found(finder(source), "tokenizer.json", source))
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise BridgeError(
            f"{source} must hold a causal language model of Hugging Face in safetensors, got: {error}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise BridgeError(f"{source} must hold all weights of {type(model).__name__}, got none of {', '.join(missing)}")
    return HfModel(model.to(device), tokenizer)


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise BridgeError(f"{path} must be a readable tokenizer.json, got: {error}") from None


def _check_precision(model: nn.Module) -> None:
    kinds = {p.dtype for p in model.parameters()} - {torch.float32}
    if kinds:
        raise BridgeError(
            f"the dense model must be in float32, got {', '.join(sorted(map(str, kinds)))}; "
            "call its float(), or load it with load_dense, which does"
        )


def _check_finite(seen: Mapping[str, Tensor]) -> None:
    if not bool(seen["final_resid"].isfinite().all()):  # once it is not finite it stays so
        first = next(name for name, x in seen.items() if not bool(x.isfinite().all()))
        raise BridgeError(
            f"the dense model's residual must be finite, got infinite values or NaN first at {first}; its weights may "
            "have been damaged, or have overflowed in half precision before they were saved"
        )


def _keep(seen: dict[str, Tensor], name: str) -> Callable:
    """A hook, of an input or an output, that keeps the residual stream there."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, *out: Any) -> None:
        seen[name] = written(out[0]) if out else stream(args, kwargs)

    return hook


def _edit_out(edit: Edit) -> Callable:
    return lambda module, args, kwargs, out: with_written(out, edit(written(out)))

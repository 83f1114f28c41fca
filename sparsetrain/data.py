"""From a corpus to token files: read documents, train or load the tokenizer, write them to files, draw batches.

A prepared corpus is a folder that is written whole or not at all:

    data/<source>-<fingerprint>/{tokenizer.json, train.bin, val.bin, manifest.json}

Batch i of a run is a pure function of (seed, i, rank), so nothing of the data needs saving to resume.
"""

import glob
import hashlib
import itertools
import json
import logging
import os
import shutil
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from sparsetrain.config import DataOptions
from sparsetrain.files import WriteError, make_folder

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
# The pre-tokenizer of the paper's released tokenizer (openai/circuit_sparsity, tinypython_2k).
PRE_TOKENIZER = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SUFFIXES = {"text": (".txt", ".md", ".py", ".rst"), "json": (".json", ".jsonl"), "parquet": (".parquet",)}
NOT_OURS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
CHUNK = 256  # documents encoded at a time


class DataError(ValueError):
    """A corpus or tokenizer that cannot be used."""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def tokens(self, split: str) -> np.ndarray:
        """The tokens of `train` or `val`: a read-only memory map, documents joined by end-of-text.

        Of uint16, or of uint32 where the tokenizer has ids from 65,536 on; the manifest says which.
        """
        return np.memmap(self.folder / f"{split}.bin", dtype=self.manifest["dtype"], mode="r")


def require_source(options: DataOptions) -> None:
    """Raise a DataError if no corpus is named."""
    if options.source == "none":
        raise DataError(
            "data.source must name a corpus, got none, as an imported model has; take an ablation of the task's "
            "prompts (mean_task, mean_position, zero, corrupted), or name a corpus in the run's config.yaml"
        )


def prepare(options: DataOptions) -> Corpus:
    """Read, tokenize and store a corpus, or find it stored already.

    Args:
        options: the `data` section of a run's config.

    Returns:
        The corpus. Its manifest lists files with their SHA-256, what was skipped and why, the rule of the split,
        token counts and the tokenizer's hash.

    Raises:
        DataError: there is no corpus, nothing readable was found, a side of the split is empty, or the tokenizer does
            not fit.
    """
    require_source(options)
    files, skipped = _screen(options)
    chosen = asdict(options)
    if options.end_of_text == END_OF_TEXT:
        del chosen["end_of_text"]  # corpora that were prepared before there was a choice stay valid
    identity = {
        "options": {k: v for k, v in chosen.items() if k not in ("cache", "paths", "tokenizer")},
        "files": [digest for _, digest in files],  # not their names: a corpus may be moved
        "tokenizer": _given_tokenizer(options) and file_hash(Path(options.tokenizer)),
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = Path(options.cache) / f"{options.source}-{fingerprint[:12]}"
    if not (folder / "manifest.json").exists():
        _write_corpus(folder, options, fingerprint, files, skipped)
    return Corpus(folder, json.loads((folder / "manifest.json").read_text()))


def train_tokenizer(texts: Iterator[str], vocab_size: int, end_of_text: str = END_OF_TEXT) -> Tokenizer:
    """Train a byte-level BPE with the paper's pre-tokenizer (Gao et al. 2025, A.6; 2,048 tokens there).

    Differs: end-of-text is token 0 (2047 in the paper's tokenizer), which also serves as padding.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batch(
    tokens: np.ndarray, seed: int, index: int, rank: int, batch_size: int, n_ctx: int, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """Batch `index` of a run: inputs and targets, both (batch_size, n_ctx) int64; windows drawn uniformly from those
    that start at a multiple of `stride`."""
    n_starts = -(-(len(tokens) - n_ctx) // stride)
    starts = np.random.default_rng((seed, rank, index)).integers(0, n_starts, batch_size) * stride
    return _windows(tokens, starts, n_ctx)


def evaluation_batches(
    tokens: np.ndarray, n_batches: int, batch_size: int, n_ctx: int, stride: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows spread evenly over `tokens`, without overlap as long as there is room; the same ones each time.

    They start at multiples of `stride`.
    """
    n_windows = min(n_batches * batch_size, max(1, (len(tokens) - 1) // max(n_ctx, stride)))
    starts = np.linspace(0, len(tokens) - n_ctx - 1, n_windows).astype(np.int64) // stride * stride
    for first in range(0, n_windows, batch_size):
        yield _windows(tokens, starts[first : first + batch_size], n_ctx)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _windows(tokens: np.ndarray, starts: np.ndarray, n_ctx: int) -> tuple[Tensor, Tensor]:
    window = torch.from_numpy(tokens[starts[:, None] + np.arange(n_ctx + 1)].astype(np.int64))
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def _screen(options: DataOptions) -> tuple[list[tuple[str, str]], Counter]:
    """(path, SHA-256) of each usable file, and how many were skipped for which reason."""
    if options.source == "hub":
        return [], Counter()
    usable, skipped = [], Counter()
    for path in _find_files(options):
        try:
            reason = _why_unusable(path, options)
            if reason:
                skipped[reason] += 1
            else:
                usable.append((str(path), file_hash(path)))
        except OSError:
            skipped["unreadable"] += 1
    if not usable:
        where = ", ".join(options.paths) or "the standard library"
        raise DataError(f"data must hold at least one readable file, got none in {where} (skipped: {dict(skipped)})")
    return usable, skipped


def _why_unusable(path: Path, options: DataOptions) -> str | None:
    if not path.stat().st_size:
        return "empty"
    if options.source == "parquet":
        with open(path, "rb") as file:
            return None if file.read(4) == b"PAR1" else "not parquet"
    content = path.read_bytes()
    if b"\0" in content:
        return "binary"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    return None


def _find_files(options: DataOptions) -> list[Path]:
    if options.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = (p for p in root.rglob("*.py") if not NOT_OURS.intersection(p.relative_to(root).parts))
        return sorted(found)
    suffixes = SUFFIXES[options.source]
    paths: set[Path] = set()
    for name in options.paths:
        here = Path(name).expanduser()
        if here.is_dir():
            inside = (p for p in here.rglob("*") if p.suffix in suffixes and p.is_file())
            paths.update(p for p in inside if not any(part.startswith(".") for part in p.relative_to(here).parts))
        elif matches := glob.glob(str(here), recursive=True):
            paths.update(p for m in matches if (p := Path(m)).is_file())
        else:
            raise DataError(f"data.paths must name files, folders or globs that exist, got {name!r}")
    return sorted(paths)


def _documents(options: DataOptions, files: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Stream the texts of the corpus through Hugging Face datasets."""
    # Imported here: it takes a second, and only preparing a corpus needs it.
    from datasets import load_dataset

    column = "text" if options.source in ("stdlib", "text") else options.text_column
    try:
        if options.source == "hub":
            rows = load_dataset(options.hub, options.hub_subset, split=options.hub_split, streaming=True)
        else:
            builder = "text" if options.source == "stdlib" else options.source
            extra = {"sample_by": "document"} if builder == "text" else {}
            names = [glob.escape(name) for name, _ in files]  # load_dataset takes them as patterns
            rows = load_dataset(builder, data_files={"train": names}, split="train", streaming=True, **extra)
        for row in rows:
            if column not in row:
                raise DataError(f"data.text_column must be one of {sorted(row)}, got {column!r}")
            if row[column] is not None and not isinstance(row[column], str):
                raise DataError(f"the column {column} must hold text, got {row[column]!r:.80}; see data.text_column")
            if row[column]:
                yield row[column]
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow and the network each have errors of their own
        source = options.hub if options.source == "hub" else f"the {options.source} files"
        raise DataError(f"could not read {source}: {type(error).__name__}: {error}") from error


def _given_tokenizer(options: DataOptions) -> Tokenizer | None:
    """The tokenizer that the config names, checked; None where one is to be trained."""
    if not options.tokenizer:
        return None
    try:
        tokenizer = Tokenizer.from_file(options.tokenizer)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise DataError(f"data.tokenizer must be a readable tokenizer.json, got {options.tokenizer}: {error}") from None
    if tokenizer.token_to_id(options.end_of_text) is None:
        raise DataError(
            f"the tokenizer {options.tokenizer} must have the token {options.end_of_text}, got none; "
            "name its own in data.end_of_text"
        )
    tokenizer.no_truncation()  # as some that come with models do, which would cut documents short, or fill them up
    tokenizer.no_padding()
    return tokenizer


def _token_type(tokenizer: Tokenizer) -> np.dtype:
    """What token files hold ids in: uint16 where that is enough for all of a tokenizer's."""
    return np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)


def _first_characters(documents: Iterator[str], limit: int) -> Iterator[str]:
    seen = 0
    for text in documents:
        if seen >= limit:
            return
        seen += len(text)
        yield text


def _write_corpus(
    folder: Path, options: DataOptions, fingerprint: str, files: list[tuple[str, str]], skipped: Counter
) -> None:
    make_folder(folder.parent)
    try:
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    except OSError as error:
        raise WriteError(f"could not write into {folder.parent}: {error}; set data.cache to another folder") from None
    try:
        tokenizer = _given_tokenizer(options) or train_tokenizer(
            _first_characters(_documents(options, files), options.tokenizer_characters),
            options.vocab_size,
            options.end_of_text,
        )
        tokenizer.save(str(unfinished / "tokenizer.json"))
        counts = _write_tokens(unfinished, options, tokenizer, _documents(options, files), len(files))
        manifest = {
            "fingerprint": fingerprint,
            "source": options.source,
            "split": f"a document is held out if its SHA-256 falls in the lowest {options.val_fraction:g}",
            "tokens": counts,
            "dtype": _token_type(tokenizer).name,
            "tokenizer_sha256": file_hash(unfinished / "tokenizer.json"),
            "skipped": dict(skipped),
            "files": files,
        }
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1))
        if not folder.exists():  # another process may have been faster
            os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    log.info("prepared %s: %s tokens; skipped files: %s", folder, counts, dict(skipped) or "none")


def _write_tokens(
    folder: Path, options: DataOptions, tokenizer: Tokenizer, documents: Iterator[str], n_documents: int
) -> dict[str, int]:
    end = tokenizer.token_to_id(options.end_of_text)
    counts, stored_as = {"train": 0, "val": 0}, _token_type(tokenizer)
    progress = tqdm(desc="tokenizing", unit=" documents", total=n_documents or None, disable=None)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val, progress:
        for texts in _batched(documents):
            for text, encoding in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
                side = "val" if _held_out(text, options.val_fraction) else "train"
                ids = np.asarray([*encoding.ids, end], dtype=stored_as)
                (val if side == "val" else train).write(ids.tobytes())
                counts[side] += len(ids)
            progress.update(len(texts))
            if options.max_tokens and sum(counts.values()) >= options.max_tokens:
                break
    if not all(counts.values()):
        raise DataError(
            f"both sides of the split must hold text, got {counts} tokens; add documents or change data.val_fraction"
        )
    return counts


def _batched(documents: Iterator[str]) -> Iterator[tuple[str, ...]]:
    while chunk := tuple(itertools.islice(documents, CHUNK)):
        yield chunk


def _held_out(text: str, fraction: float) -> bool:
    """Split by content: copies of a document fall on the same side, whatever their names."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64

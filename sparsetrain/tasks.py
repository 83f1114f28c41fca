"""Tasks as tensors: the built-in tasks or a user's own, drawn from a seed, checked on the tokenizer.

A task is a source of prompt pairs. A prompt's right answer is one token, the one that training text has
there: the tokens of prompt and answer read together begin with the prompt's own. A built-in answer such as
`]]` with its line break is one token to some tokenizers and two to others; where it is several, its first is
asked for, as long as the two sides still differ. Names and the answers of users' files must be whole tokens, and
where a task has sets of right and wrong answers (greater_than) so must all of them.

The split rests on the prompts' text: no prompt is in both `train` and `heldout`, whatever the seeds.
"""

import difflib
import hashlib
import inspect
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparsetrain.task_encoding import Encoded, Refused, Unaligned, encode_pair
from sparsetrain.task_files import InexpressibleTask, TaskError, linked_groups, read_pairs
from sparsetrain.task_language import LANGUAGE_GENERATORS
from sparsetrain.task_probing import PROBING_TASKS, probing_task
from sparsetrain.task_prompts import GENERATORS, NAME_ANSWERS, Pair

log = logging.getLogger(__name__)

Split = Literal["train", "heldout"]
PAD = 0
FEWEST_PAIRS = 2  # of a file; fewer make no task
# Candidates in a row without a new pair. In a small vocabulary one in fifty has names that are single tokens.
LONGEST_FAILURE = 2000
HOPELESS = 500  # the same before the first pair


@dataclass(frozen=True)
class Task:
    """A source of prompt pairs.

    Attributes:
        name: the paper's name, or the stem of the user's file.
        description: one line, in plain words.
        candidates: the pairs of one split in a seeded order: without end, or each pair of a file once.
        whole_answers: an answer of several tokens is refused; otherwise its first token is asked for.
        from_file: the pairs are a fixed list, so there may be fewer than asked for.
    """

    name: str
    description: str
    candidates: Callable[[Split, random.Random], Iterator[Pair]]
    whole_answers: bool = False
    from_file: bool = False


@dataclass(frozen=True)
class TaskData:
    """Encoded prompts; rows 2i and 2i + 1 are the positive and the negative prompt of pair i."""

    name: str
    tokens: Tensor  # (N, T) int64, padded on the right with PAD, which causal attention never looks at
    last: Tensor  # (N,) index of each prompt's last token; (N, P) where a model is read at several positions
    correct: Tensor  # (N,) token id of the right answer
    wrong: Tensor  # (N,) token id of the wrong one
    positive: Tensor  # (N,) token id of the pair's positive answer
    prompts: tuple[str, ...]
    corrupted: Tensor | None = None  # (N, T) each prompt's partner, of as many tokens, with another right answer
    # (N, V) bool: all right and all wrong answers, where there are several; `correct` and `wrong` are one of them.
    correct_set: Tensor | None = None
    wrong_set: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def end(self) -> Tensor:
        """(N,) the last position that is read."""
        return self.last if self.last.dim() == 1 else self.last.amax(1)

    @property
    def read_at(self) -> Tensor:
        """(N, P) the positions that are read."""
        return self.last if self.last.dim() == 2 else self.last[:, None]

    def trimmed(self) -> "TaskData":
        """The same prompts without the positions after the last that is read in any of them."""
        n = int(self.end.max()) + 1
        corrupted = None if self.corrupted is None else self.corrupted[:, :n]
        return replace(self, tokens=self.tokens[:, :n], corrupted=corrupted)

    def to(self, device: torch.device | str) -> "TaskData":
        """The same prompts with their tensors on `device`."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def take(self, rows: slice | Sequence[int]) -> "TaskData":
        """Some of the prompts, by slice or row numbers."""
        numbers = range(len(self))[rows] if isinstance(rows, slice) else [int(row) for row in rows]
        index = torch.tensor(list(numbers), dtype=torch.int64, device=self.tokens.device)
        tensors = {name: tensor[index] for name, tensor in self._tensors().items()}
        return replace(self, prompts=tuple(self.prompts[row] for row in numbers), **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def load_task(name_or_path: str) -> Task:
    """Find a built-in task by its name, or read one from a file.

    Args:
        name_or_path: one of TASKS, a probing task (see `task_probing`), or the path of a .jsonl file; each line is an
            object with the keys `positive` and `negative` (the prompts), `positive_answer` and `negative_answer`
            (single tokens).

    Returns:
        The task. A file's task is named after the file.

    Raises:
        TaskError: no built-in task has this name, or the file is missing, empty or malformed.
    """
    if name_or_path in TASKS:
        return TASKS[name_or_path]
    if probing := probing_task(name_or_path):
        return replace(_built_in(probing.draw), whole_answers=True, from_file=True)  # a small modulus has few pairs
    path = Path(name_or_path)
    if path.suffix != ".jsonl":
        near = difflib.get_close_matches(name_or_path, [*TASKS, *PROBING_TASKS], n=3, cutoff=0.4) or list(TASKS)
        raise TaskError(
            f"task must be a built-in name or the path of a .jsonl file, got {name_or_path!r}; "
            f"the nearest names are {', '.join(near)}"
        )
    return _file_task(path)


def encode_task(
    task: Task, tokenizer: Tokenizer, n_pairs: int, split: Split, seed: int, n_ctx: int, aligned: bool = False
) -> TaskData:
    """Draw pairs of one split and encode them, leaving out repeats and pairs that do not suit the tokenizer.

    Args:
        task: what to draw from.
        tokenizer: the model's tokenizer.
        n_pairs: how many pairs; a task from a file gives up to as many, and a warning if there are fewer.
        split: `train` or `heldout`; they share no prompt, whatever the seeds.
        seed: decides which pairs are drawn and in which order; fewer pairs are the first of more.
        n_ctx: the model's context length; a prompt is at most n_ctx - 1 tokens.
        aligned: refuse pairs whose prompts differ in length, and give each prompt its corrupted partner: the other
            one, or that of the task.

    Returns:
        2 * n_pairs prompts.

    Raises:
        TaskError: an argument is out of range.
        InexpressibleTask: too few pairs pass; says why the first was refused.
    """
    if split not in get_args(Split):
        raise TaskError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    if n_pairs < 1:
        raise TaskError(f"n_pairs must be at least 1, got {n_pairs}")
    candidates = task.candidates(split, random.Random(f"{task.name} {split} {seed}"))
    chosen, refused = _choose(candidates, n_pairs, tokenizer, n_ctx, task.whole_answers, aligned)
    _check_number(task, tokenizer, n_pairs, split, len(chosen), refused)
    _report_first_tokens(task, chosen, tokenizer)
    return _stack(task.name, chosen, aligned, tokenizer.get_vocab_size())


def nonsense(parts: Sequence[TaskData], tokenizer: Tokenizer, seed: int) -> tuple[TaskData, ...]:
    """Ask the same prompts for two arbitrary words: the control that shows what pruning finds on its own.

    Args:
        parts: an encoded task, e.g. its training and its held-out prompts; all parts ask for the same two words.
        tokenizer: the tokenizer that encoded them.
        seed: chooses the words among the vocabulary's whole words that are no answers of the task.

    Returns:
        The same prompts; positive ones ask for one word, negative ones for the other.

    Raises:
        TaskError: the vocabulary has fewer than two such words.

    Source: Drori 2026, the control with arbitrary answers.
    """
    answers = {token for data in parts for token in (*data.correct.tolist(), *data.wrong.tolist())}
    words = [
        token
        for token in range(tokenizer.get_vocab_size())
        if token not in answers and re.fullmatch(" [a-z]{2,}", tokenizer.decode([token]))
    ]
    name = parts[0].name
    if len(words) < 2:
        raise TaskError(
            f"the vocabulary must hold two whole words besides the answers of {name}, got {len(words)}; "
            "train a tokenizer with a larger vocabulary"
        )
    first, second = random.Random(f"nonsense {name} {seed}").sample(words, 2)
    return tuple(_ask_for(data, first, second) for data in parts)


def _ask_for(data: TaskData, first: int, second: int) -> TaskData:
    is_positive = data.correct == data.positive
    return replace(
        data,
        name=f"{data.name}_nonsense",
        correct=torch.where(is_positive, first, second),
        wrong=torch.where(is_positive, second, first),
        positive=torch.full_like(data.positive, first),
        correct_set=None,
        wrong_set=None,
    )


def _choose(
    candidates: Iterator[Pair], n_pairs: int, tokenizer: Tokenizer, n_ctx: int, whole_answers: bool, aligned: bool
) -> tuple[dict[Pair, Encoded], list[Refused]]:
    """The first `n_pairs` different pairs that suit, encoded, and the reasons against the others."""
    chosen: dict[Pair, Encoded] = {}
    refused: list[Refused] = []
    n_failed = 0
    for pair in candidates:
        n_failed += 1
        if pair not in chosen:
            try:
                chosen[pair] = encode_pair(pair, tokenizer, n_ctx, whole_answers, aligned)
                n_failed = 0
            except Refused as reason:
                refused.append(reason)
        if len(chosen) == n_pairs or n_failed == (LONGEST_FAILURE if chosen else HOPELESS):
            break
    return chosen, refused


def _check_number(
    task: Task, tokenizer: Tokenizer, n_pairs: int, split: Split, found: int, refused: list[Refused]
) -> None:
    """Raise if there are too few pairs; warn if a file has fewer than asked for or some of no use."""
    reason = f"; {len(refused)} were refused, the first because {refused[0]}" if refused else ""
    fewest = min(n_pairs, FEWEST_PAIRS) if task.from_file else n_pairs
    remedy = "train a tokenizer with a larger vocabulary"
    if refused and isinstance(refused[0], Unaligned):
        remedy = "take another ablation, as mean_task or mean_position, which needs no partners"
    remedy += ", or " + ("add pairs to the file" if task.from_file else "write your own prompts as a .jsonl file")
    if found < fewest:
        raise InexpressibleTask(
            f"task {task.name} must give {fewest} different pairs for {split} with this tokenizer of "
            f"{tokenizer.get_vocab_size()} tokens, got {found}{reason}; "
            f"{remedy}",
            reason=str(refused[0]) if refused else "too few of its prompts differ",
        )
    if task.from_file and (found < n_pairs or refused):
        log.warning("task %s: %d pairs for %s, %d asked for%s", task.name, found, split, n_pairs, reason)


def _report_first_tokens(task: Task, chosen: dict[Pair, Encoded], tokenizer: Tokenizer) -> None:
    """Tell once which answers are longer than the token asked for."""
    asked = {}
    for pair, encoded in chosen.items():
        for answer, token in zip((pair.positive_answer, pair.negative_answer), encoded.answers, strict=True):
            text = tokenizer.decode([token])
            if text != answer:
                asked[answer] = text
    for answer, text in asked.items():
        log.info("task %s: %r is several tokens here; asking for the first, %r", task.name, answer, text)


def _stack(name: str, chosen: dict[Pair, Encoded], aligned: bool, n_tokens: int) -> TaskData:
    """Lay encoded pairs out as rows: positive, negative, positive, ..."""
    rows = [ids for encoded in chosen.values() for ids in encoded.prompts]
    partners = [ids for encoded in chosen.values() for ids in encoded.partners]
    answers = torch.tensor([encoded.answers for encoded in chosen.values()])  # (pairs, 2)
    right_sets = [ids for encoded in chosen.values() for ids in encoded.right_sets]
    wrong_sets = [ids for encoded in chosen.values() for ids in encoded.wrong_sets]
    return TaskData(
        name=name,
        tokens=_padded(rows),
        last=torch.tensor([len(ids) - 1 for ids in rows]),
        correct=answers.flatten(),
        wrong=torch.tensor([encoded.wrong for encoded in chosen.values()]).flatten(),
        positive=answers[:, 0].repeat_interleave(2),
        prompts=tuple(prompt for pair in chosen for prompt in (pair.positive, pair.negative)),
        corrupted=_padded(partners) if aligned else None,
        correct_set=_as_mask(right_sets, n_tokens) if right_sets else None,
        wrong_set=_as_mask(wrong_sets, n_tokens) if wrong_sets else None,
    )


def _padded(rows: list[list[int]]) -> Tensor:
    tokens = torch.full((len(rows), max(map(len, rows))), PAD, dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def _as_mask(rows: list[list[int]], n_tokens: int) -> Tensor:
    mask = torch.zeros(len(rows), n_tokens, dtype=torch.bool)
    for row, ids in zip(mask, rows, strict=True):
        row[ids] = True
    return mask


def _side(text: str) -> Split:
    """The split a text belongs to: a fair coin that depends on nothing but the text."""
    return "heldout" if hashlib.sha256(text.encode()).digest()[0] % 2 else "train"


def _built_in(draw: Callable[[random.Random], Pair]) -> Task:
    def candidates(split: Split, rng: random.Random) -> Iterator[Pair]:
        while True:
            pair = draw(rng)
            # Asked of both prompts, not of the pair: a prompt can occur in several pairs.
            if _side(pair.positive) == _side(pair.negative) == split:
                yield pair

    description = inspect.getdoc(draw).splitlines()[0]
    whole = draw in NAME_ANSWERS or draw in LANGUAGE_GENERATORS
    return Task(draw.__name__, description, candidates, whole_answers=whole)


def _file_task(path: Path) -> Task:
    pairs = read_pairs(path)
    groups = linked_groups(pairs)

    def candidates(split: Split, rng: random.Random) -> Iterator[Pair]:
        mine = [pair for pair, group in zip(pairs, groups, strict=True) if _side(group) == split]
        yield from rng.sample(mine, len(mine))

    return Task(path.stem, f"pairs from {path}", candidates, whole_answers=True, from_file=True)


TASKS: dict[str, Task] = {draw.__name__: _built_in(draw) for draw in (*GENERATORS, *LANGUAGE_GENERATORS)}

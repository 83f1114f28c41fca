"""Prompts with the value of a variable: what circuit probing learns from and is measured on."""

from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparsetrain.task_probing import PROBING_TASKS, probing_task
from sparsetrain.tasks import Split, TaskData, TaskError, encode_task, load_task


@dataclass(frozen=True)
class ProbeData:
    """N different prompts, each with the value of a variable, and where a sublayer is probed for it.

    Attributes:
        variable: its name.
        prompts: with right and wrong answers; rows need not be pairs.
        label: (N,) index into `classes`.
        position: (N,) the token after which the sublayer's update is read.
        classes: the values of the variable.
    """

    variable: str
    prompts: TaskData
    label: Tensor
    position: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str) -> "ProbeData":
        """The same prompts with their tensors on `device`."""
        return replace(
            self, prompts=self.prompts.to(device), label=self.label.to(device), position=self.position.to(device)
        )

    def shuffled(self, seed: int) -> "ProbeData":
        """The same prompts with their labels dealt out anew: the control that has nothing to find."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return replace(self, variable=f"{self.variable}, shuffled", label=self.label[order.to(self.label.device)])


def check_labels(train: ProbeData, heldout: ProbeData | None = None) -> None:
    """Refuse labels from which nothing can be learnt or measured.

    Raises:
        TaskError: there is one class only, or a class has fewer than two training prompts, or none to take as the
            exemplar of a class that is held out.
    """
    counts = train.label.bincount(minlength=len(train.classes)).tolist()
    if sum(n > 0 for n in counts) < 2:
        raise TaskError(
            f"the variable {train.variable} must have at least 2 values among the training prompts, "
            f"got {sum(n > 0 for n in counts)}; take other prompts or another variable"
        )
    held = set() if heldout is None else set(heldout.label.tolist())
    few = [f"{name} has {n}" for i, (name, n) in enumerate(zip(train.classes, counts, strict=True))
           if n == 1 or (n == 0 and i in held)]  # fmt: skip
    if few:
        raise TaskError(
            f"every value of {train.variable} must have at least 2 training prompts, got {', '.join(few)}; "
            "raise train_pairs"
        )


def probe_data(
    task: str, variable: str | None, tokenizer: Tokenizer, n_pairs: tuple[int, int], seed: int, n_ctx: int,
    position: int = -1,
) -> tuple[ProbeData, ProbeData]:  # fmt: skip
    """Draw training and held-out prompts of a probing task, each prompt once.

    Args:
        task: `subject_verb`, `reflexive`, or `squares_mod_113` and its like.
        variable: one of the task's; None takes the first.
        tokenizer: the model's.
        n_pairs: pairs drawn for training and to hold out; prompts that recur are left out.
        seed: decides which.
        n_ctx: the model's context length.
        position: which token is probed, counted from the prompt's end, -1 the last.

    Raises:
        TaskError: there is no such task or variable, a prompt is shorter than the position asks for, or the labels
            are of no use (see `check_labels`).
    """
    found = probing_task(task)
    if found is None:
        raise TaskError(
            f"task must be one whose prompts have known variables ({', '.join(PROBING_TASKS)}, squares_mod_113 or "
            f"another modulus from 3), got {task!r}; build a ProbeData for a task of your own"
        )
    variable = variable or next(iter(found.variables))
    if variable not in found.variables:
        raise TaskError(f"the variable of {task} must be one of {', '.join(found.variables)}, got {variable!r}")
    parts: list[tuple[Split, int]] = [("train", n_pairs[0]), ("heldout", n_pairs[1])]
    drawn = [_distinct(encode_task(load_task(task), tokenizer, n, split, seed, n_ctx)) for split, n in parts]
    values = [[found.variables[variable](prompt) for prompt in data.prompts] for data in drawn]
    classes = tuple(sorted({*values[0], *values[1]}))
    train, heldout = (
        ProbeData(variable, data, torch.tensor([classes.index(v) for v in of]), _positions(data, position), classes)
        for data, of in zip(drawn, values, strict=True)
    )
    check_labels(train, heldout)
    return train, heldout


def _distinct(data: TaskData) -> TaskData:
    first: dict[str, int] = {}
    for row, prompt in enumerate(data.prompts):
        first.setdefault(prompt, row)
    return data.take(list(first.values()))


def _positions(data: TaskData, position: int) -> Tensor:
    at = data.last + 1 + position
    if int(at.min()) < 0:
        short = data.prompts[int(at.argmin())]
        raise TaskError(f"position must be within every prompt, got {position} where {short!r} is shorter")
    return at

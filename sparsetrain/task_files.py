"""Pairs from a user's JSON-lines file, checked line by line, and which of them belong together."""

import json
from dataclasses import fields
from pathlib import Path

from sparsetrain.task_prompts import Pair

KEYS = [field.name for field in fields(Pair)]
FORMAT = f"give each line the keys {', '.join(KEYS)}"


class TaskError(ValueError):
    """A task that cannot be found, read or encoded; `reason` says in a few words what the message says in full."""

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason or message


class InexpressibleTask(TaskError):
    """A task of which a tokenizer, or a context length, allows too few prompts."""


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSON-lines file, in its order.

    Raises:
        TaskError: the file is missing, empty or malformed; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"a task file must be readable UTF-8 text, got {error} for {path}") from error
    pairs = [_read_pair(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise TaskError(f"{path} must hold one pair a line, got an empty file; {FORMAT}")
    return pairs


def linked_groups(pairs: list[Pair]) -> list[str]:
    """For each pair, the first in order of all prompts that are linked with it by shared prompts.

    Pairs that share a prompt must fall on the same side of the split, and none of a user's is dropped for it.
    """
    parent: dict[str, str] = {}

    def find(prompt: str) -> str:
        while parent.setdefault(prompt, prompt) != prompt:
            prompt = parent[prompt]
        return prompt

    for pair in pairs:
        low, high = sorted((find(pair.positive), find(pair.negative)))
        parent[high] = low
    return [find(pair.positive) for pair in pairs]


def _read_pair(line: str, where: str) -> Pair:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise TaskError(f"{where} must be a JSON object on one line, got {line[:40]!r} ({error}); {FORMAT}") from error
    if not isinstance(row, dict):
        raise TaskError(f"{where} must be a JSON object, got {line[:40]!r}; {FORMAT}")
    problems = [f"no {key}" for key in KEYS if key not in row]
    problems += [f"an unknown key {key}" for key in row if key not in KEYS]
    problems += [f"{key} {text!r}" for key, text in row.items() if not (isinstance(text, str) and text)]
    if problems:
        raise TaskError(f"{where} must hold four texts that are not empty, got {', '.join(problems)}; {FORMAT}")
    pair = Pair(**row)
    if pair.positive == pair.negative or pair.positive_answer == pair.negative_answer:
        raise TaskError(f"{where} must hold two prompts and two answers that differ, got the same text twice")
    return pair

"""Files that are written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


class WriteError(RuntimeError):
    """A file that could not be written."""


def make_folder(folder: Path) -> None:
    """Make a folder and those it lies in, where they are not there yet.

    Raises:
        WriteError: it could not be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"could not make {folder}: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; one that holds `content` already is left alone.

    Raises:
        WriteError: it could not be written; what was there is untouched.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        if path.exists() and path.read_bytes() == content:
            return
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise WriteError(f"could not write {path}: {error}; what was there before is untouched") from error

"""What every page is made of: its data as JSON, Bokeh's script library, our own scripts and styles. Needs no torch."""

import json
from importlib import resources
from typing import Any

from bokeh.resources import Resources


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it lies in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def renumbered(item: Any) -> Any:
    """Bokeh numbers its models from one counter of the process; number them anew, in order of appearance."""
    numbers: dict[str, str] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [walk(v) for v in value]
        if isinstance(value, dict):
            return {key: renumber(v) if key in ("id", "root_id") else walk(v) for key, v in value.items()}
        return value

    def renumber(number: str) -> str:
        return numbers.setdefault(number, f"m{len(numbers)}")

    return walk(item)


def library(*components: str) -> str:
    """The scripts of the installed Bokeh, which a page carries with it."""
    return Resources(mode="inline", components=list(components), log_level="error").render_js()


def asset(name: str) -> str:
    """The text of a script or style sheet that lies beside this file."""
    return resources.files("sparsetrain.analysis").joinpath(name).read_text(encoding="utf-8")

"""What every page is: one file that opens offline and asks nothing of the network. Needs no torch.

A template, our style sheet and scripts, the script library of the installed Bokeh, and two blocks of JSON: `page-data`,
what scripts show, and `figure-data`, the picture.
"""

import html
import json
from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import Any

from bokeh.resources import Resources

TEMPLATE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
$style
</style>
</head>
<body>
$body
<noscript>The picture needs JavaScript; everything it runs lies in this file.</noscript>
<script type="application/json" id="page-data">$data</script>
<script type="application/json" id="figure-data">$figure</script>
$library
<script>
$script
</script>
</body>
</html>
""")


def whole_page(
    title: str, body: str, drawn: Any, data: Any = None, scripts: Sequence[str] = ("embed",),
    components: Sequence[str] = ("bokeh",),
) -> bytes:  # fmt: skip
    """A page; the same arguments and versions give the same bytes.

    Args:
        title: plain text, of the tab.
        body: HTML; the picture goes into the element that it was made for.
        drawn: the picture, of `bokeh.embed.json_item`; None where there is none, and no library is needed.
        data: what `scripts` read as `page-data`.
        scripts: our own that run, in this order; the last sets `data-ready` of the body. `embed` only draws.
        components: what the picture needs of Bokeh.
    """
    return TEMPLATE.substitute(
        title=html.escape(title),
        body=body,
        data=_script_json(data),
        figure=_script_json(_renumbered(drawn)),
        library=Resources(mode="inline", components=list(components), log_level="error").render_js() if drawn else "",
        style=_asset("page.css"),
        script="\n".join(_asset(f"{name}.js") for name in scripts),
    ).encode()


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it lies in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _renumbered(item: Any) -> Any:
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


def _asset(name: str) -> str:
    """The text of a script or style sheet that lies beside this file."""
    return resources.files("sparsetrain.analysis").joinpath(name).read_text(encoding="utf-8")

"""The circuit page: one file that shows a circuit, opens offline and asks nothing of the network.

A circuit of channels is shown here, one of components by `component_page.py`.

The page is a template, the script library of the installed Bokeh, our own scripts and style sheet, and two blocks of
JSON: `page-data`, all that is shown, and `figure-data`, the picture. The template holds no data. What a circuit does to
a dense model it was carried to stands below, as `transfer_section.py` writes it.
"""

import html
from pathlib import Path
from string import Template
from typing import Any

from sparsetrain.analysis.circuit_data import Text, page_data
from sparsetrain.analysis.circuit_figure import circuit_figure
from sparsetrain.analysis.component_page import write_component_page
from sparsetrain.analysis.page_parts import asset, library, script_json
from sparsetrain.analysis.snippets import WINDOWS, corpus_windows
from sparsetrain.analysis.transfer_section import transfer_sections
from sparsetrain.checkpoint import load_run, run_corpus
from sparsetrain.files import write_whole
from sparsetrain.pruning.circuit import load_circuit
from sparsetrain.tasks import encode_task, load_task

PAIRS = 4  # of the task's held-out prompts

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
<header id="header"></header>
<main>
<section id="picture" aria-label="The circuit">
<form id="controls"></form>
<div id="figure"></div>
</section>
<aside id="panel" aria-live="polite"></aside>
</main>
<section id="below"></section>
$transfer
<noscript>This page needs JavaScript; everything it runs lies in this file.</noscript>
<script type="application/json" id="page-data">$data</script>
<script type="application/json" id="figure-data">$figure</script>
$library
<script>
$script
</script>
</body>
</html>
""")


def write_page(run: str | Path, circuit_folder: str | Path) -> Path:
    """Write `circuit.html` into a circuit's folder, whole or not at all.

    Args:
        run: the run directory the circuit was found in.
        circuit_folder: what `save_circuit` wrote.

    Returns:
        The page's path. The same inputs and versions give the same bytes.

    Raises:
        CheckpointError: the run holds no readable model.
        CircuitError: the folder holds no readable circuit.
        TaskError: the circuit's task cannot be found.
        WriteError: the page could not be written.
    """
    model, tokenizer, config = load_run(run)
    circuit = load_circuit(circuit_folder)
    task = load_task(circuit.settings.get("task", circuit.task))
    prompts = encode_task(task, tokenizer, PAIRS, "heldout", circuit.settings["prune"]["seed"], config.model.n_ctx)
    words = {"name": task.name, "description": task.description}
    page = Path(circuit_folder) / "circuit.html"
    if circuit.graph == "component":
        return write_component_page(page, circuit, model, tokenizer, prompts, words)
    if config.data.source == "none":
        more = encode_task(task, tokenizer, WINDOWS // 2, "heldout", 1, config.model.n_ctx)
        windows, source = (
            more.tokens[:, : int(more.end.min()) + 1],
            "the task's prompts (no corpus came with the model)",
        )
    else:
        windows, source = corpus_windows(run_corpus(run, config), config.model.n_ctx), "the corpus"
    data, layout = page_data(circuit, Text(tokenizer, windows, prompts), model, config)
    data = {"task": words, "windows_of": source, "load_from": Path(run).as_posix(), **data}
    title = f"{task.name}: a circuit of {data['facts']['run']}"
    transfer = transfer_sections(run, circuit_folder, circuit)
    write_whole(page, _fill(title, data, circuit_figure(data, layout), transfer).encode())
    return page


def _fill(title: str, data: dict[str, Any], figure: dict[str, Any], transfer: str) -> str:
    return TEMPLATE.substitute(
        title=html.escape(title),
        data=script_json(data),
        figure=script_json(figure),
        transfer=transfer,
        library=library("bokeh"),
        style=asset("circuit_page.css"),
        script="\n".join(asset(f"{name}.js") for name in ("page_elements", "circuit_panel", "circuit_page")),
    )

"""The circuit page: one file that shows a circuit, opens offline and asks nothing of the network.

A circuit of channels is shown here, one of components by `component_page.py`.

All that it shows lies in its `page-data`. What a circuit does to a dense model it was carried to stands below, as
`transfer_section.py` writes it.
"""

from pathlib import Path

from sparsetrain.analysis.circuit_data import Text, page_data
from sparsetrain.analysis.circuit_figure import circuit_figure
from sparsetrain.analysis.component_page import write_component_page
from sparsetrain.analysis.page_parts import whole_page
from sparsetrain.analysis.snippets import WINDOWS, corpus_windows
from sparsetrain.analysis.transfer_section import transfer_sections
from sparsetrain.checkpoint import load_run, run_corpus
from sparsetrain.files import write_whole
from sparsetrain.pruning.circuit import load_circuit
from sparsetrain.tasks import encode_task, load_task

PAIRS = 4  # of the task's held-out prompts

BODY = """\
<header id="header"></header>
<main>
<section id="picture" aria-label="The circuit">
<form id="controls"></form>
<div id="figure"></div>
</section>
<aside id="panel" aria-live="polite"></aside>
</main>
<section id="below"></section>
"""
SCRIPTS = ("page_elements", "circuit_panel", "circuit_page")


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
        DataError: the run's corpus cannot be read.
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
    body = BODY + transfer_sections(run, circuit_folder, circuit)
    write_whole(page, whole_page(title, body, circuit_figure(data, layout), data, SCRIPTS))
    return page

"""Circuits that are known: the compiled programs compute what Tracr's do, and their circuits are the protocol's."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from sparsetrain.bench import compile_programs, known_circuits, made_circuits
from sparsetrain.bench.kernels import BenchError
from sparsetrain.checkpoint import CheckpointError, load_sparse, read_notes, save_sparse
from sparsetrain.pruning.ablation import build_ablation
from sparsetrain.pruning.component_graph import ComponentGraph
from sparsetrain.pruning.edges import batches, edge_names, n_edges

# All edges and those of the circuit: with tokens and positions apart (zero, corrupted), and as one input.
# Source: the ground-truth protocol, found there with other code.
COUNTS = {
    "xproportion": ((32, 5, 3), (23, 5, 3)),
    "reverse": ((94, 11, 2), (77, 10, 2)),
    "reverse_full": ((94, 9, 2), (77, 8, 2)),
    "hist": ((13, 6, 4), (8, 6, 4)),
    "detect_ab": ((32, 10, 5), (23, 8, 5)),
    "sort_unique": ((32, 11, 6), (23, 10, 6)),
    "sort": ((59, 13, 7), (46, 12, 7)),
    "length": ((13, 4, 0), (8, 4, 0)),
    "length_full": ((13, 2, 0), (8, 2, 0)),
}
REVERSE = {
    ("tokens", "a0.h0<v>"), ("a0.h0", "m0"), ("tokens", "m0"), ("m0", "m1"), ("tokens", "m1"), ("positions", "m1"),
    ("m1", "m2"), ("m2", "a3.h0<q>"), ("positions", "a3.h0<k>"), ("tokens", "a3.h0<v>"), ("a3.h0", "logits"),
}  # fmt: skip
HAS_TRACR = importlib.util.find_spec("tracr") is not None


def program(name: str) -> Path:
    return known_circuits.PROGRAMS / f"{name}.safetensors"


def test_every_program_of_the_table_is_there_and_small():
    files = sorted(known_circuits.PROGRAMS.glob("*.safetensors"))
    assert {path.stem for path in files} == COUNTS.keys()
    assert all(path.stat().st_size < 50_000 for path in files)


@pytest.mark.parametrize("name", COUNTS)
def test_outputs_are_those_of_tracrs_own_transformer(name):
    model, data = known_circuits.load_program(program(name))
    rows, expected = known_circuits.expected_outputs(program(name))
    assert len(rows) >= 8
    logits = model(data.tokens[rows])[:, 1:]
    n = expected.shape[-1]
    torch.testing.assert_close(logits[..., :n], expected, rtol=0, atol=1e-5)
    assert not logits[..., n:].any()


@pytest.mark.parametrize("name", ["reverse", "hist", "sort"])
def test_programs_compute_what_they_are_called(name):
    model, data = known_circuits.load_program(program(name))
    notes = read_notes(program(name))
    vocabulary, values = json.loads(notes["vocabulary"]), json.loads(notes["outputs"])
    does = {"reverse": lambda x: x[::-1], "hist": lambda x: [str(x.count(t)) for t in x], "sort": sorted}[name]
    outputs = model(data.tokens)[:, 1:, : len(values)].argmax(-1)
    for row, output in zip(data.tokens[:, 1:].tolist(), outputs.tolist(), strict=True):
        assert [values[i] for i in output] == list(does([vocabulary[t] for t in row]))


def test_sequences_are_read_at_every_token_and_have_another_as_partner():
    _, data = known_circuits.load_program(program("reverse"))
    assert data.tokens.shape == (81, 5) and data.last.shape == (81, 4)
    assert torch.equal(data.last[0], torch.arange(1, 5))
    same = (data.tokens == data.corrupted).all(1)
    assert not same.any(), "no sequence is its own partner"
    assert torch.equal(data.tokens.unique(dim=0), data.corrupted.unique(dim=0))
    again = known_circuits.load_program(program("reverse"))[1]
    assert torch.equal(data.corrupted, again.corrupted)


@pytest.mark.parametrize("name", COUNTS)
def test_circuits_have_the_published_numbers_of_edges_and_are_enough(name):
    model, data = known_circuits.load_program(program(name))
    data = data.take(slice(None, None, -(-len(data) // 81)))  # fewer where there are many, to save time
    for split, counts in zip((True, False), COUNTS[name], strict=True):
        graph = ComponentGraph(model, split_embedding=split)
        found = [known_circuits.by_removal(graph, data, kind) for kind in ("zero", "corrupted")]
        assert (n_edges(graph.edges), *(n_edges(circuit.edges) for circuit in found)) == counts
        assert all(circuit.error < 1e-4 for circuit in found)
        if name == "reverse" and split:
            assert set(edge_names(graph, found[0].edges)) == REVERSE
        if name == "reverse_full" and split:
            assert set(edge_names(graph, found[0].edges)) == REVERSE - {("tokens", "a0.h0<v>"), ("a0.h0", "m0")}


@pytest.mark.parametrize("name", made_circuits.GATES)
def test_gates_compute_what_they_are_called(name):
    model = made_circuits.gate(name)
    tokens = torch.tensor([[0, 0], [1, 1]])
    assert model(tokens)[:, -1, 1].tolist() == [0, {"or": 1, "and": 1, "add": 2}[name]]
    block = model.blocks[0]
    block.attn.out.weight[2] = 0  # without head 1
    assert model(tokens)[1, -1, 1].item() == {"or": 1, "and": 0, "add": 1}[name]


def test_the_gates_circuits_are_enough_and_removal_is_blind_to_the_branches_of_or():
    circuits = {
        circuit.name: circuit for circuit in known_circuits.known_circuits([]) if circuit.graph.kind != "channel"
    }
    assert circuits.keys() == made_circuits.GATES.keys()
    for name, circuit in circuits.items():
        assert n_edges(circuit.graph.edges) == 29 and n_edges(circuit.edges) == 5 and circuit.error == 0
        prompts = list(batches(circuit.graph, circuit.data, circuit.ablation))
        needed = known_circuits.necessary_edges(circuit.graph, prompts)
        if name == "or":
            assert edge_names(circuit.graph, needed) == [("m0", "logits")]
            assert len(circuit.alternatives) == 2
            for branch in circuit.alternatives:
                assert n_edges(branch) == 3
                assert known_circuits.change(circuit.graph, prompts, branch) == 0
        else:
            assert edge_names(circuit.graph, needed) == edge_names(circuit.graph, circuit.edges)
            assert not circuit.alternatives


def test_the_sparse_transformer_closes_quotes_by_the_edges_it_was_made_of():
    model, data = made_circuits.quote_model(), made_circuits.quote_data()
    logits = model(data.tokens)[torch.arange(len(data)), data.last]
    assert torch.equal(logits.argmax(1), data.correct)
    zero, corrupted = (c for c in known_circuits.known_circuits([]) if c.graph.kind == "channel")
    assert n_edges(zero.graph.edges) >= 2 * len(made_circuits.QUOTE_CIRCUIT) + 6, "decoys"
    assert set(edge_names(zero.graph, zero.edges)) == set(made_circuits.QUOTE_CIRCUIT)
    # The partner has the same letters and a quote at the same place, so it does not matter where attention looks.
    assert set(edge_names(corrupted.graph, corrupted.edges)) == {
        edge for edge in made_circuits.QUOTE_CIRCUIT if edge[1] not in ("blocks.0.q:0", "blocks.0.k:0")
    }
    assert zero.error < 1e-6 and corrupted.error < 1e-6


def test_removal_sees_an_edge_only_where_its_change_counts():
    """By hand: the sum of two heads that are on is 2; with one cut it is 1, and with the decoy cut it is 2."""
    graph, data = ComponentGraph(made_circuits.gate("add"), split_embedding=True), made_circuits.gate_data("add")
    prompts = list(batches(graph, data, build_ablation(graph.read, "corrupted", [], data)))
    names = edge_names(graph, graph.edges)
    for cut, expected in (("a0.h0", 1.0), ("a0.h2", 0.0)):
        kept = known_circuits.named_edges(graph, [name for name in names if name != (cut, "m0")])
        assert known_circuits.change(graph, prompts, kept) == expected
    with pytest.raises(ValueError, match=r"edges must be among those of the graph, got \[\('m0', 'a0.h0<q>'\)\]"):
        known_circuits.named_edges(graph, [("m0", "a0.h0<q>")])


def test_files_that_are_no_programs_are_refused(tmp_path):
    save_sparse(tmp_path / "weights.safetensors", {"a": torch.ones(2)})
    with pytest.raises(BenchError, match="must be written by compile_programs, got a file without model, outputs"):
        known_circuits.load_program(tmp_path / "weights.safetensors")
    notes = {key: value for key, value in read_notes(program("hist")).items() if key not in ("format", "sparse_shapes")}
    tensors = load_sparse(program("hist"))
    del tensors["model.unembed.weight"]
    save_sparse(tmp_path / "part.safetensors", tensors, **notes)
    with pytest.raises(CheckpointError, match="unembed.weight is missing there"):
        known_circuits.load_program(tmp_path / "part.safetensors")


def test_sequences_are_all_there_are_or_a_seeded_choice_of_them():
    few = compile_programs.sequences(compile_programs.Program(None, {2, 1}, max_seq_len=3, length=2))
    assert few == [(1, 1), (1, 2), (2, 1), (2, 2)]
    many = compile_programs.Program(None, set("abcd"), max_seq_len=6, length=6)
    drawn = compile_programs.sequences(many)
    assert len(set(drawn)) == len(drawn) == compile_programs.MOST
    assert drawn == compile_programs.sequences(many)
    with pytest.raises(BenchError, match="length must be between 1 and max_seq_len = 3, got 4"):
        compile_programs.sequences(compile_programs.Program(None, {1}, max_seq_len=3, length=4))


def test_a_file_without_programs_is_refused(tmp_path):
    for text, words in (
        ("", "must define PROGRAMS"),
        ("PROGRAMS = {'a': (1, 2)}", "for each name .output, vocabulary"),
    ):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(BenchError, match=words):
            compile_programs.compile_file(tmp_path / "mine.py", tmp_path)


@pytest.mark.skipif(HAS_TRACR, reason="Tracr is installed")
def test_what_to_install_is_said(tmp_path):
    with pytest.raises(BenchError, match="pip install tracr-pypi"):
        compile_programs.compile_file(known_circuits.PROGRAMS / "protocol.py", tmp_path)


@pytest.mark.skipif(not HAS_TRACR, reason="needs tracr-pypi")
@pytest.mark.filterwarnings("default")
def test_programs_are_compiled_to_the_same_weights(tmp_path):
    made = compile_programs.compile_file(known_circuits.PROGRAMS / "protocol.py", tmp_path)
    assert {path.stem for path in made} == COUNTS.keys()
    for path in made:
        ours, theirs = load_sparse(path), load_sparse(program(path.stem))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert read_notes(path) == read_notes(program(path.stem))

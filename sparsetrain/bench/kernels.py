"""The benchmark of the kernels: each op is held to its definition first, then timed against what torch offers.

A row is one timed case: op, sizes, type, case (ours or a rival), its seconds in each round, and the least time the
machine could take for the same work (its floor).
"""

import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.bench.timing import copy_seconds, interleaved, multiply_adds_per_second
from sparsetrain.kernels import choice, costs, cpu, layout, ops, reference
from sparsetrain.kernels.sparse_weight import Order, SparseWeight

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of ||ours - float64|| / ||float64||
NAMES = {torch.float32: "dense fp32", torch.bfloat16: "dense bf16"}
SAMPLE = 64  # lines and nonzeros whose whole sums are taken in float64 before anything is timed
CSR_DENSEST = 0.05  # torch.sparse is not asked about denser weights, which would take most of the time
CHOICE_DENSITIES, CHOICE_ROUNDS = (0.01, 0.1, 0.5), 5
TOO_SLOW = 5  # a rival this many times slower than dense fp32 at one width is not asked again at a larger one


class BenchError(RuntimeError):
    """An op gave a wrong result, so it was not timed."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        widths: d of square weights (d, d), ascending.
        densities: shares of nonzeros.
        tokens: N for each width.
        rounds: times each case is timed, for each width.
        choices: (d, N) of the products that `backend="auto"` is timed on, beside what it chooses from.
    """

    widths: tuple[int, ...]
    densities: tuple[float, ...]
    tokens: dict[int, int]
    rounds: dict[int, int]
    choices: tuple[tuple[int, int], ...]


def plan(device: torch.device, quick: bool) -> Plan:
    """The sizes for a device; `quick` takes seconds rather than minutes."""
    densities = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
    if quick:
        n = 65536 if device.type == "cuda" else 1024
        return Plan((512,), (0.01, 0.05), {512: n}, {512: 3}, ((512, 128), (512, n)))
    if device.type == "cuda":
        tokens = {512: 65536, 1024: 65536, 2048: 65536, 4096: 65536, 8192: 16384}
        choices = tuple((d, n) for d in (1024, 4096) for n in (1024, 16384, 65536))
        return Plan(tuple(tokens), densities, tokens, dict.fromkeys(tokens, 11), choices)
    tokens = {128: 4096, 256: 4096, 512: 4096, 1024: 4096, 2048: 4096, 4096: 1024, 8192: 512}
    rounds = {128: 11, 256: 11, 512: 11, 1024: 15, 2048: 5, 4096: 3, 8192: 3}
    choices = tuple((d, n) for d in (256, 1024, 2048) for n in (128, 1024, 4096) if d * n <= 1 << 22)
    return Plan(tuple(tokens), (*densities, 0.2), tokens, rounds, choices)


def measure(device: torch.device, quick: bool, show: Callable[[str], None]) -> list[dict]:
    """Check and time every op on a device; `show` gets a line of progress for each group of cases.

    Raises:
        BenchError: an op's result is wrong.
    """
    chosen = plan(device, quick)
    rate = multiply_adds_per_second(device)
    rows: list[dict] = []
    for dtype in (torch.float32, torch.bfloat16):
        skipped: set[str] = set()
        for width in chosen.widths:
            show(f"sparse_linear, {width} x {width}, {chosen.tokens[width]} tokens, {str(dtype)[6:]}")
            for training in (False, True):
                found = list(_sparse_linear(width, training, chosen, dtype, device, rate, skipped))
                rows += found
                skipped |= _hopeless(found)
        for width, n in chosen.choices:
            show(f"sparse_linear, the choice of backend, {width} x {width}, {n} tokens, {str(dtype)[6:]}")
            rows += _choices(width, n, dtype, device, NAMES[dtype] not in skipped)
    for dtype in (torch.float32, torch.bfloat16):
        for width in chosen.widths:
            show(f"abs_topk, {chosen.tokens[width]} x {width}, {str(dtype)[6:]}")
            rows += _abs_topk(width, chosen, dtype, device)
    for width in chosen.widths:
        show(f"project_, {width} x {width}")
        rows += _project(width, chosen, device)
    return rows


def _sparse_linear(
    width: int, training: bool, chosen: Plan, dtype: torch.dtype, device: torch.device, rate: float, skipped: set[str]
) -> Iterator[dict]:
    """Forward, or forward with both gradients, at every density, beside one dense product."""
    n = chosen.tokens[width]
    generator = torch.Generator(device).manual_seed(width)
    x, grad = _activations(width, n, dtype, generator)
    cases: dict[str, Callable[[], object]] = {}
    for density in chosen.densities:
        weight = sparse_matrix(width, density, generator)
        for backend in _backends(x, weight):
            _check_linear(weight, x, grad, backend)
        cases |= _ours(weight, x, grad, training)
        if density <= CSR_DENSEST:
            cases |= _csr(weight, x, grad, training)
        if training:
            cases |= _by_hand(weight, x, grad)
    for kind, name in NAMES.items():
        if name not in skipped:
            cases[name] = _dense(weight, x, grad, kind, training)
    products = 3 if training else 1
    cases["copy"] = copy_seconds(products * 2 * width * n * x.element_size(), device)
    taken = interleaved(cases, chosen.rounds[width], device)
    copy = statistics.median(taken.pop("copy"))
    for name, seconds in taken.items():
        case, _, density = name.partition(" at ")
        nnz = int(float(density) * width * width) if density else width * width
        yield {
            "op": "sparse_linear", "pass": "training" if training else "forward", "dtype": str(dtype)[6:],
            "m": width, "k": width, "n": n, "nnz": nnz, "density": float(density) if density else 1.0,
            "case": case, "backend": _backend_of(case), "seconds": seconds,
            "floor": max(copy, products * nnz * n / rate) if density else None,
        }  # fmt: skip


def _backend_of(case: str) -> str | None:
    """The backend of `ops` whose cost a case measures, or None for what no backend does."""
    return case.removeprefix("ours (").removesuffix(")") if case.startswith("ours (") else None


def _activations(width: int, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random x and a gradient of y for square weights, both (B, K, T)."""
    device, block = generator.device, min(n, layout.BLOCK[generator.device.type])
    x, grad = (torch.randn(n // block, width, block, device=device, generator=generator).to(dtype) for _ in range(2))
    return x, grad


def _choices(width: int, n: int, dtype: torch.dtype, device: torch.device, dense: bool) -> Iterator[dict]:
    """Backend "auto" beside each backend it chooses from, in both layouts; the cost model is fitted to these too."""
    generator = torch.Generator(device).manual_seed(width)
    x, grad = _activations(width, n, dtype, generator)
    for density in CHOICE_DENSITIES:
        weight = sparse_matrix(width, density, generator)
        backends = [*_backends(x, weight), *([costs.DENSE] if dense else []), "auto"]
        for token_major in (False, True):
            y, x_now = (_token_major(t) if token_major else t.mT for t in (grad, x))
            for training in (False, True):
                cases = {name: _linear(weight, x_now, y, training, name) for name in backends}
                for name, seconds in interleaved(cases, CHOICE_ROUNDS, device).items():
                    yield {
                        "op": "choice", "pass": "training" if training else "forward", "dtype": str(dtype)[6:],
                        "m": width, "k": width, "n": n, "nnz": weight.n_nonzero, "density": density,
                        "token_major": token_major, "case": name, "seconds": seconds,
                    }  # fmt: skip


def _hopeless(rows: list[dict]) -> set[str]:
    """Rivals that are so slow here that larger sizes would take hours: bf16 products on a CPU without bf16 units."""
    median = {row["case"]: statistics.median(row["seconds"]) for row in rows if row["density"] == 1}
    return {case for case in median if median[case] > TOO_SLOW * median.get("dense fp32", math.inf)}


def sparse_matrix(width: int, density: float, generator: torch.Generator) -> SparseWeight:
    """A square weight with exactly its share of nonzeros, anywhere."""
    n = int(density * width * width)
    dense = torch.zeros(width * width, device=generator.device)
    places = torch.randperm(width * width, device=generator.device, generator=generator)[:n]
    dense[places] = torch.randn(n, device=generator.device, generator=generator)
    return SparseWeight.from_dense(dense.view(width, width))


def _ours(weight: SparseWeight, x: Tensor, grad: Tensor, training: bool) -> dict[str, Callable[[], object]]:
    density = f"{weight.density:.2g}"
    tokens, token_grad = _token_major(x), _token_major(grad)
    cases = {
        f"ours ({backend}) at {density}": _linear(weight, x.mT, grad.mT, training, backend)
        for backend in _backends(x, weight)
    }
    backend = "cpu" if x.device.type == "cpu" else "triton"
    return cases | {f"ours, token-major at {density}": _linear(weight, tokens, token_grad, training, backend)}


def _token_major(x: Tensor) -> Tensor:
    """(B, K, T) as (B T, K)."""
    return x.mT.reshape(-1, x.shape[1]).contiguous()


def _backends(x: Tensor, weight: SparseWeight) -> list[str]:
    return ["cpu"] if x.device.type == "cpu" else choice.designs(x.mT, weight)


def _linear(weight: SparseWeight, x: Tensor, grad: Tensor, training: bool, backend: str) -> Callable[[], object]:
    if not training:
        return lambda: ops.sparse_linear(x, weight, backend=backend)
    x = x.detach().requires_grad_()
    learnt = weight.with_values(weight.values.clone().requires_grad_())

    def step() -> None:
        y = ops.sparse_linear(x, learnt, backend=backend)
        torch.autograd.grad(y, (x, learnt.values), grad)

    return step


def _dense(weight: SparseWeight, x: Tensor, grad: Tensor, dtype: torch.dtype, training: bool) -> Callable[[], object]:
    """A dense layer of the same shape on token-major activations, torch's own layout."""
    x, grad = (_token_major(t).to(dtype) for t in (x, grad))
    dense = weight.to_dense().to(dtype)
    if not training:
        return lambda: F.linear(x, dense)
    x.requires_grad_()
    dense.requires_grad_()
    return lambda: torch.autograd.grad(F.linear(x, dense), (x, dense), grad)


def _csr(weight: SparseWeight, x: Tensor, grad: Tensor, training: bool) -> dict[str, Callable[[], object]]:
    """torch.sparse (MKL, cuSPARSE) on the (K, N) activations that it likes best: as users call it, with autograd.

    In training also its three kernels by hand, with a transpose of the weight kept, beside ours called alike.
    """
    x, grad = (t.transpose(0, 1).reshape(t.shape[1], -1).contiguous() for t in (x, grad))
    warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
    by_row = _csr_tensor(weight.rows, weight.values.to(x.dtype), weight.shape)
    by_column = _csr_tensor(weight.columns, weight.values[weight.to_column_major].to(x.dtype), weight.shape[::-1])
    support = _csr_tensor(weight.rows, torch.zeros_like(weight.values).to(x.dtype), weight.shape)

    def by_hand() -> None:
        torch.mm(by_row, x)
        torch.mm(by_column, grad)
        torch.sparse.sampled_addmm(support, grad, x.t(), beta=0)

    def with_autograd() -> None:
        torch.autograd.grad(torch.sparse.mm(learnt, leaf), (leaf, learnt), grad)

    learnt, leaf = by_row.clone().requires_grad_(training), x.clone().requires_grad_(training)
    cases = {"torch.sparse CSR": with_autograd, "torch.sparse CSR, by hand": by_hand}
    if not training:
        cases = {"torch.sparse CSR": lambda: torch.mm(by_row, x)}
    return {f"{name} at {weight.density:.2g}": case for name, case in cases.items() if _runs(name, case, x)}


def _runs(name: str, case: Callable[[], object], x: Tensor) -> bool:
    """Whether torch has what a case needs; it says so where it does not."""
    try:
        case()
    except (NotImplementedError, RuntimeError) as error:  # torch raises one or the other for a type it lacks
        log.info("%s has no %s product on %s: %s", name, x.dtype, x.device.type, str(error).splitlines()[0])
        return False
    return True


def _csr_tensor(order: Order, values: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.sparse_csr_tensor(order.offsets, order.indices, values, size)


def _by_hand(weight: SparseWeight, x: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    """Our three kernels without autograd."""
    kernels = cpu if x.device.type == "cpu" else import_module("sparsetrain.kernels.sparse_linear")
    by_column = weight.values[weight.to_column_major]

    def step() -> None:
        kernels.matmul(x, weight.values, weight.rows)
        kernels.matmul(grad, by_column, weight.columns)
        kernels.sampled_matmul(grad, x, weight.rows)

    return {f"ours, by hand at {weight.density:.2g}": step}


def _check_linear(weight: SparseWeight, x: Tensor, grad: Tensor, backend: str) -> None:
    """Hold sampled outputs and gradients of the very tensors that are timed to sums in float64."""
    learnt = weight.with_values(weight.values.clone().requires_grad_())
    x = x.detach().requires_grad_()
    y = ops.sparse_linear(x.mT, learnt, backend=backend).mT  # (B, M, T)
    x_grad, values_grad = torch.autograd.grad(y, (x, learnt.values), grad)
    dense = weight.to_dense().double()
    lines = torch.linspace(0, weight.shape[0] - 1, min(SAMPLE, weight.shape[0]), device=x.device).long()
    chosen = torch.linspace(0, weight.n_nonzero - 1, min(SAMPLE, weight.n_nonzero), device=x.device).long()
    row, column = weight.row_of_each()[chosen], weight.rows.indices[chosen].long()
    for what, ours, exact in (
        ("y", y[:, lines], dense[lines] @ x.detach().double()),
        ("the gradient of x", x_grad[:, lines], dense[:, lines].T @ grad.double()),
        ("the gradient of the values", values_grad[chosen], (grad[:, row].double() * x[:, column]).sum((0, 2))),
    ):
        hold(f"sparse_linear {weight!r} on {x.dtype}, {backend}: {what}", ours, exact, TOLERANCE[x.dtype])
    for what, whole in (("y", y), ("the gradient of x", x_grad), ("the gradient of the values", values_grad)):
        if not bool(whole.isfinite().all()):
            raise BenchError(
                f"sparse_linear {weight!r} on {x.dtype}, {backend}: {what} must be finite; it is not timed"
            )


def hold(what: str, ours: Tensor, exact: Tensor, tolerance: float) -> None:
    error = float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())
    if not error <= tolerance:
        raise BenchError(f"{what} must be within {tolerance} of its float64 value, got {error:.3g}; it is not timed")


def _abs_topk(width: int, chosen: Plan, dtype: torch.dtype, device: torch.device) -> list[dict]:
    n, k = chosen.tokens[width], width // 4
    generator = torch.Generator(device).manual_seed(width)
    x = torch.randn(n, width, device=device, generator=generator).to(dtype)
    by_channel = x.view(-1, min(n, layout.BLOCK[device.type]), width).mT.contiguous().mT
    some = x[:: max(1, n // 256)]
    if not all(torch.equal(ops.abs_topk(few, k), reference.abs_topk(few, k)) for few in (some, by_channel[:2])):
        raise BenchError(f"abs_topk of {n} x {width}, k {k}, {dtype} is not its definition; it is not timed")
    cases = {
        "ours": lambda: ops.abs_topk(x, k),
        "topk + scatter": lambda: _topk_scatter(x, k),
        "ours, channel-major": lambda: ops.abs_topk(by_channel, k),
        "copy": copy_seconds(2 * x.numel() * x.element_size(), device),
    }
    work = {"op": "abs_topk", "dtype": str(dtype)[6:], "m": n, "k": width, "n": n, "kept": k}
    return _rows(work, interleaved(cases, chosen.rounds[width], device))


def _project(width: int, chosen: Plan, device: torch.device) -> list[dict]:
    k = width * width // 100
    generator = torch.Generator(device).manual_seed(width)
    weight = torch.randn(width, width, device=device, generator=generator)
    for floor in (0, 4):
        small = weight[:256].clone()
        expected = reference.project(small, small.numel() // 4, floor, floor)
        if not torch.equal(ops.project_(small.clone(), small.numel() // 4, floor, floor), expected):
            raise BenchError(f"project_ with floors of {floor} is not its definition; it is not timed")
    cases = {
        "ours": lambda: ops.project_(weight.clone(), k),
        "ours, rows of 4": lambda: ops.project_(weight.clone(), k, 4, 0),
        "ours, columns of 4": lambda: ops.project_(weight.clone(), k, 0, 4),
        "topk + scatter": lambda: _topk_scatter(weight.flatten(), k),
        "copy": copy_seconds(2 * 4 * weight.numel(), device),
    }
    work = {"op": "project_", "dtype": "float32", "m": width, "k": width, "n": 1, "kept": k}
    return _rows(work, interleaved(cases, chosen.rounds[width], device))


def _topk_scatter(x: Tensor, k: int) -> Tensor:
    index = x.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))


def _rows(work: dict, taken: dict[str, list[float]]) -> list[dict]:
    floor = statistics.median(taken.pop("copy"))
    return [work | {"case": case, "seconds": seconds, "floor": floor} for case, seconds in taken.items()]

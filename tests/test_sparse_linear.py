"""The sparse products on every backend: forward and gradients against float64, in every layout and at the edges."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.kernels import choice, costs, cpu, ops, reference, slabs
from sparsetrain.kernels.sparse_weight import SparseWeight

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BACKENDS = ["triton"] if CUDA else ["cpu", "triton"]  # without a GPU Triton's interpreter runs the kernels
# ||ours - float64|| over the norm of the sums of magnitudes. A bf16 result is rounded once; its operands are exact.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-14}
if os.environ.get("TRITON_INTERPRET") == "1":
    TOLERANCE[torch.bfloat16] = 8e-3  # the interpreter truncates
SHAPES = [(3, 5), (1, 1), (16, 33), (130, 5), (2, 3, 20), (2, 64, 5), (7,), (2, 2, 9, 6)]


def masked(m: int, k: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator) * (torch.rand(m, k, generator=generator) < density)


def skewed(m: int, k: int) -> torch.Tensor:
    """One full row, one full column, the rest almost empty."""
    dense = masked(m, k, 0.02, seed=5)
    dense[m // 2], dense[:, k // 2] = 1.5, -0.5
    return dense


def random(shape, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def channel_major(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x


def step(dense, x, grad, bias, backend):
    """Output and gradients of x, values and bias."""
    weight = SparseWeight.from_dense(dense)
    weight = weight.with_values(weight.values.detach().clone().requires_grad_())
    x, bias = x.detach().requires_grad_(), bias.detach().clone().requires_grad_()
    y = ops.sparse_linear(x, weight, bias, backend=backend)
    return y, *torch.autograd.grad(y, (x, weight.values, bias), grad)


def assert_equal_to_float64(dense, x, backend, dtype):
    dense = dense.to(DEVICE)
    bias, grad = random(dense.shape[0], seed=8), random((*x.shape[:-1], dense.shape[0]), dtype, seed=9)
    exact = step(dense.double(), x.double(), grad.double(), bias.double(), "reference")
    whole = step(*(t.double().abs() for t in (dense, x, grad, bias)), "reference")  # where nothing cancels
    names, found = ("y", "x", "values", "bias"), step(dense, x, grad, bias, backend)
    for what, ours, truth, most in zip(names, found, exact, whole, strict=True):
        assert ours.shape == truth.shape
        assert ours.dtype == (dtype if what in "yx" else torch.float32)
        error = (ours.double() - truth).norm() / most.norm().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], f"{what}: {error}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channel_major])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_equal_float64(shape, layout, dtype, backend):
    x = layout(random(shape, dtype))
    assert_equal_to_float64(masked(11, shape[-1], 0.3), x, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dense",
    [torch.zeros(6, 5), torch.ones(6, 5), skewed(24, 17), torch.eye(5)[:1], torch.eye(5)[:, :1] * torch.ones(1, 1)],
    ids=["empty", "full", "skewed", "one row", "one column"],
)
def test_any_mask_equals_float64(dense, backend):
    assert_equal_to_float64(dense, channel_major(random((33, dense.shape[1]))), backend, torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40), k=st.integers(1, 40), n=st.integers(1, 200), blocks=st.integers(1, 3),
    density=st.sampled_from([0, 0.05, 0.5, 1]), bf16=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_masks_and_sizes_on_a_cpu(m, k, n, blocks, density, bf16, seed):
    if CUDA:
        return
    dtype = torch.bfloat16 if bf16 else torch.float32
    x = random((blocks, k, n), dtype, seed).mT
    assert_equal_to_float64(masked(m, k, density, seed), x, "cpu", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5)])
def test_no_tokens_give_no_output(shape, backend):
    y, x_grad, values_grad, bias_grad = step(
        masked(4, 5, 0.5).to(DEVICE), random(shape), random((*shape[:-1], 4)), random(4), backend
    )
    assert y.shape == (*shape[:-1], 4) and x_grad.shape == shape
    assert not values_grad.any() and not bias_grad.any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("shape", [(40, 6), (3, 40, 6), (2, 3, 8, 6)])
def test_the_result_has_the_layout_of_the_input(shape, backend):
    weight = SparseWeight.from_dense(masked(4, 6, 0.5).to(DEVICE))
    x = random(shape)
    assert ops.sparse_linear(x, weight, backend=backend).is_contiguous()
    assert ops.sparse_linear(channel_major(x), weight, backend=backend).mT.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_activations_are_read_right(backend):
    dense = masked(4, 6, 0.5)
    wide = random((2, 30, 12))
    assert_equal_to_float64(dense, wide[:, ::3, ::2], backend, torch.float32)
    expanded = random((1, 6)).expand(7, 6)
    assert_equal_to_float64(dense, expanded, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_values_and_biases_are_read_right(backend):
    weight = SparseWeight.from_dense(masked(6, 5, 0.5).to(DEVICE))
    many, x = random((2 * weight.n_nonzero,)), random((33, 5))
    for values, bias in ((many[::2], random((12,))[::2]), (many[:1].expand(weight.n_nonzero), many[:1].expand(6))):
        ours = ops.sparse_linear(x, weight.with_values(values), bias, backend=backend)
        exact = ops.sparse_linear(x, weight.with_values(values.contiguous()), bias.contiguous(), backend="reference")
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_weight_without_columns_gives_the_bias(backend):
    weight = SparseWeight.from_dense(torch.zeros(3, 0, device=DEVICE))
    assert torch.equal(
        ops.sparse_linear(torch.zeros(2, 0, device=DEVICE), weight, random(3), backend), random(3).expand(2, 3)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_is_written(backend, monkeypatch):
    """What a kernel leaves unwritten stays NaN."""
    real = torch.empty

    def poisoned(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poisoned(*a, dtype=self.dtype, **k))
    if backend == "cpu":
        monkeypatch.setattr(cpu, "SMALL", 0)  # all threads
    x = channel_major(random((77, 20)))
    for found in step(skewed(13, 20).to(DEVICE), x, random((77, 13)), random(13), backend):
        assert found.isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "triton slabs"])
def test_offsets_beyond_two_to_the_31_are_right(backend):
    """The last channel of a plane of 2^31 entries and more; the memory between is never touched."""
    channels, tokens = 2**15 + 8, 2**16
    x = torch.empty(1, channels, tokens, dtype=torch.bfloat16, device=DEVICE)
    x[0, -1] = random((tokens,), torch.bfloat16)
    x[0, 5] = random((tokens,), torch.bfloat16, seed=1)
    weight = SparseWeight.from_rows(
        (1, channels), torch.tensor([2.0, -1.0], device=DEVICE), torch.tensor([5, channels - 1], device=DEVICE),
        torch.tensor([0, 2], device=DEVICE),
    )  # fmt: skip
    if backend == "triton slabs" and not CUDA:
        y = slabs.matmul(x, weight.values, weight.rows, slab=4096, warps=64)[0, 0]  # fewer programs to interpret
    else:
        y = ops.sparse_linear(x.mT, weight, backend=backend)[0, :, 0]
    torch.testing.assert_close(y, 2 * x[0, 5] - x[0, -1], rtol=2**-7, atol=2**-7)


def test_half_precision_on_triton():
    assert_equal_to_float64(masked(9, 20, 0.3), channel_major(random((33, 20), torch.float16)), "triton", torch.float16)


def test_gradcheck_through_triton():
    """Finite differences in float64 through the kernels themselves."""
    if CUDA:
        pytest.skip("float64 runs in the interpreter alone")
    weight = SparseWeight.from_dense(masked(4, 5, 0.4).double())
    x = torch.randn(1, 5, 3, dtype=torch.float64).mT.requires_grad_()
    values, bias = weight.values.clone().requires_grad_(), torch.randn(4, dtype=torch.float64, requires_grad=True)

    def function(x, values, bias):
        return ops.sparse_linear(x, weight.with_values(values), bias, backend="triton")

    assert torch.autograd.gradcheck(function, (x, values, bias))


@pytest.mark.filterwarnings("ignore:Input #")  # gradcheck wants float64; differences of a bilinear map are exact
def test_gradcheck_through_the_cpu_path():
    if CUDA:
        pytest.skip("a CPU path")
    weight = SparseWeight.from_dense(masked(4, 5, 0.4))
    x = random((1, 5, 19)).mT.requires_grad_()
    values, bias = weight.values.clone().requires_grad_(), random(4).requires_grad_()

    def function(x, values, bias):
        return ops.sparse_linear(x, weight.with_values(values), bias, backend="cpu")

    assert torch.autograd.gradcheck(function, (x, values, bias), eps=0.5, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_are_adjoint(backend):
    """<Wx, g> = <x, W'g> = sum of values times their gradient."""
    weight = SparseWeight.from_dense(masked(19, 23, 0.2).to(DEVICE))
    learnt = weight.with_values(weight.values.clone().requires_grad_())
    x, grad = random((40, 23)).requires_grad_(), random((40, 19), seed=1)
    y = ops.sparse_linear(x, learnt, backend=backend)
    x_grad, values_grad = torch.autograd.grad(y, (x, learnt.values), grad)
    inner = (y * grad).sum()
    close = {"rtol": 1e-5, "atol": 1e-4}  # hundreds of terms, which cancel
    torch.testing.assert_close((x * x_grad).sum(), inner, **close)
    torch.testing.assert_close((weight.values * values_grad).sum(), inner, **close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bitwise_and_rows_do_not_meet(backend):
    dense = masked(19, 23, 0.2).to(DEVICE)
    x, grad, bias = random((100, 23)), random((100, 19), seed=1), random(19)
    first, second = (step(dense, x, grad, bias, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    shuffled = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    moved = step(dense[shuffled], x, grad[:, shuffled], bias[shuffled], backend)
    assert torch.equal(moved[0], first[0][:, shuffled])


def test_the_number_of_threads_does_not_change_the_bits(monkeypatch):
    if CUDA:
        pytest.skip("a CPU path")
    monkeypatch.setattr(cpu, "SMALL", 0)
    dense, x, grad = masked(600, 70, 0.05), random((3, 70, 200)).mT, random((3, 200, 600), seed=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(step(dense, x, grad, random(600), "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0][:3], other[:3], strict=True))


def test_the_path_without_a_compiler_equals_float64(monkeypatch):
    if CUDA:
        pytest.skip("a CPU path")
    monkeypatch.setattr(cpu, "library", lambda: None)
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setitem(TOLERANCE, dtype, 2 * TOLERANCE[dtype])  # it rounds the weight too
        assert_equal_to_float64(skewed(24, 17), random((2, 17, 33), dtype).mT, "cpu", dtype)
        assert_equal_to_float64(skewed(24, 17), random((1, 17), dtype), "cpu", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_outputs_that_read_it_alone(backend):
    dense = torch.zeros(3, 4)
    dense[0, 1], dense[1, 2], dense[2] = 1.0, 1.0, 0.0
    x = random((20, 4))
    x[5, 1] = torch.nan
    y = ops.sparse_linear(x, SparseWeight.from_dense(dense.to(DEVICE)), backend=backend)
    assert y.isnan().nonzero().tolist() == [[5, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_keeps_infinities_and_rounds_to_nearest_even(backend):
    if os.environ.get("TRITON_INTERPRET") == "1" and backend == "triton":
        pytest.skip("the interpreter truncates")
    x = torch.tensor([[torch.inf, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -torch.inf]] * 17, device=DEVICE)
    y = ops.sparse_linear(x.to(torch.bfloat16), SparseWeight.from_dense(torch.eye(4, device=DEVICE)), backend=backend)
    assert torch.equal(y, x.to(torch.bfloat16))


def test_autocast_rules_the_type_as_for_a_dense_layer():
    weight = SparseWeight.from_dense(masked(4, 6, 0.5).to(DEVICE))
    x = random((8, 6)).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = ops.sparse_linear(x, weight, random(4))
    assert y.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ops_pass_torchs_own_checks(backend):
    weight = SparseWeight.from_dense(masked(5, 6, 0.4).to(DEVICE))
    order = (weight.rows.offsets, weight.rows.indices, weight.rows.by_length)
    x, y, bias = random((2, 6, 9)), random((2, 5, 9)), random(5)
    checked = torch.ops.sparsetrain
    torch.library.opcheck(checked.sparse_matmul.default, (x, weight.values, bias, *order, backend))
    torch.library.opcheck(checked.sampled_matmul.default, (y, x, *order, backend))
    if backend == "cpu":
        torch.library.opcheck(checked.transposed.default, (x.requires_grad_(),))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, as it traces a Function
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channel_major])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_it_compiles_whole_with_its_gradients(backend, layout):
    """The choice of backend, AbsTopK and, from the second size on, symbols in place of sizes, too."""
    weight = SparseWeight.from_dense(masked(5, 6, 0.4).to(DEVICE))
    weight = weight.with_values(weight.values.clone().requires_grad_())

    def function(x):
        return ops.abs_topk(ops.sparse_linear(x, weight, backend=backend), 2, backend=backend) * 2

    torch._dynamo.reset()
    costs.table.cache_clear()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for n in (9, 10, 17):
        x = layout(random((2, n, 6))).requires_grad_()
        found, expected = compiled(x), function(x)
        assert torch.equal(found, expected)
        inputs, grad = (x, weight.values), random((2, n, 5), seed=3)
        for ours, eager in zip(*(torch.autograd.grad(y, inputs, grad) for y in (found, expected)), strict=True):
            assert torch.equal(ours, eager)


def test_bad_input_is_told_what_was_expected():
    weight = SparseWeight.from_dense(torch.eye(4))
    with pytest.raises(ValueError, match=r"x must have 4 channels last, the columns of the weight, got shape \(2, 5\)"):
        ops.sparse_linear(torch.zeros(2, 5), weight)
    with pytest.raises(
        ValueError, match=r"x must hold floats, got torch.int64; bias must have shape \(4,\) on cpu, got \(3,\)"
    ):
        ops.sparse_linear(torch.zeros(2, 4, dtype=torch.int64), weight, torch.zeros(3))
    with pytest.raises(ValueError, match="x must be on cpu, where the weight is, got meta"):
        ops.sparse_linear(torch.zeros(2, 4, device="meta"), weight)
    with pytest.raises(TypeError, match="weight must be a SparseWeight, got Tensor; build one with from_dense"):
        ops.sparse_linear(torch.zeros(2, 4), torch.eye(4))


def test_a_backend_that_cannot_run_is_an_error(monkeypatch):
    weight = SparseWeight.from_dense(torch.eye(4))
    with pytest.raises(
        ValueError, match="backend must be one of auto, reference, cpu, triton, triton rows, triton slabs, got 'fast'"
    ):
        ops.sparse_linear(torch.zeros(2, 4), weight, backend="fast")
    with pytest.raises(
        ValueError, match="backend 'cpu' cannot run here: it takes float32 and bfloat16 on the CPU, got torch.float64"
    ):
        ops.abs_topk(torch.zeros(2, 4, dtype=torch.float64), 2, backend="cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: it takes CUDA tensors, got one on cpu"):
        ops.sparse_linear(torch.zeros(2, 4), weight, backend="triton")
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        ops.project_(torch.zeros(2, 4), 2, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_auto_takes_the_dense_product_for_types_without_a_fast_path(dtype):
    dense = masked(5, 6, 0.4)
    x = torch.randn(3, 6).to(dtype)
    y = ops.sparse_linear(x, SparseWeight.from_dense(dense))
    assert torch.equal(y, reference.sparse_linear(x, SparseWeight.from_dense(dense)))


def test_auto_takes_the_cheaper_product_and_says_so_once(caplog):
    if CUDA:
        pytest.skip("the CPU's cost model")
    caplog.set_level("INFO")
    choice._taken.clear()
    x = torch.randn(512, 256)
    for _ in range(2):
        ops.sparse_linear(x, SparseWeight.from_dense(masked(256, 256, 0.01)))
    assert len(caplog.messages) == 1 and "takes backend 'cpu' for" in caplog.messages[0]
    ops.sparse_linear(x, SparseWeight.from_dense(torch.randn(256, 256)))
    assert len(caplog.messages) == 2 and "takes the dense product for" in caplog.messages[1]
    assert "predicted" in caplog.messages[0] and "fitted to" in caplog.messages[0]

"""The fused pieces of a training step against their definitions: values, gradients, layouts, threads."""

import pytest
import torch
import torch.nn.functional as F

from sparsetrain.kernels import cpu, fused, ops, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [((2, 1, 8), 3), ((1, 17, 33), 8), ((2, 63, 20), 1), ((3, 500, 48), 12), ((2, 2, 16, 130), 100), ((40,), 10)]
LAYOUTS = [torch.Tensor.contiguous, lambda x: x.mT.contiguous().mT if x.dim() > 1 else x]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["token-major", "channel-major"])
paths = pytest.mark.parametrize("compiled", [True, False], ids=["C", "without a compiler"])


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """What is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def choose_path(monkeypatch, compiled):
    if compiled:
        assert cpu.library(), "the tests need a C compiler"
    else:
        monkeypatch.setattr(cpu, "library", lambda: None)


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def gradients(function, inputs, grad):
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return out, torch.autograd.grad(out, inputs, grad.to(out.dtype))


def assert_as_in_float64(ours, theirs, inputs, grad):
    """Output and gradients of two functions, the second in float64; the layout of the first input is kept."""
    out, found = gradients(ours, inputs, grad)
    exact, expected = gradients(theirs, [t.double() for t in inputs], grad)
    assert out.stride() == inputs[0].stride()
    assert torch.equal(out != 0, exact != 0)
    for a, b in zip((out, *found), (exact, *expected), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-6 * max(1, b.abs().max())


@paths
@layouts
@pytest.mark.parametrize("shape, k", SHAPES)
def test_norm_and_its_gradients_equal_float64(shape, k, layout, compiled, monkeypatch):
    choose_path(monkeypatch, compiled)
    x, gain = layout(random(*shape, scale=3)), random(shape[-1], seed=1).exp()
    for kept in (k, shape[-1]):
        assert_as_in_float64(
            lambda x, g, kept=kept: ops.norm_abs_topk(x, g, 1e-5, kept),
            lambda x, g, kept=kept: reference.norm_abs_topk(x, g, 1e-5, kept),
            (x, gain), layout(random(*shape, seed=2)),
        )  # fmt: skip


@paths
@layouts
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("shape, k", SHAPES)
def test_activation_and_its_gradient_equal_float64(shape, k, activation, layout, compiled, monkeypatch):
    choose_path(monkeypatch, compiled)
    x, grad = layout(random(*shape)), layout(random(*shape, seed=2))
    for kept in (0, k, shape[-1]):
        assert_as_in_float64(
            lambda x, kept=kept: ops.act_abs_topk(x, kept, activation),
            lambda x, kept=kept: reference.act_abs_topk(x, kept, activation), (x,), grad,
        )  # fmt: skip


def test_gelu_and_its_slope_are_exact_to_a_millionth():
    x = torch.linspace(-15, 15, 300001).view(-1, 1)
    padded = torch.cat([x, torch.zeros_like(x)], -1)  # keeps x itself, whose gelu is never exactly zero up to -13
    out, (slope,) = gradients(lambda x: ops.act_abs_topk(x, 1, "gelu"), (padded,), torch.ones_like(padded))
    exact, (exact_slope,) = gradients(F.gelu, (x.double(),), torch.ones_like(x))
    assert (out[:, :1] - exact).abs().max() < 1e-6
    assert (slope[:, :1] - exact_slope).abs().max() < 1e-6
    for value in (torch.inf, torch.nan, -1e30, 1e30):
        found = ops.act_abs_topk(torch.tensor([[value, 0.0]]), 1, "gelu")[0, 0]
        torch.testing.assert_close(found, F.gelu(torch.tensor(value)), equal_nan=True)


@layouts
@pytest.mark.parametrize("fill", [torch.round, torch.zeros_like, torch.ones_like, torch.relu, torch.exp])
def test_what_is_kept_is_what_abs_topk_keeps_of_the_same_numbers(fill, layout):
    x, gain = layout(fill(random(3, 70, 300, scale=2))), torch.ones(300)
    whole = ops.norm_abs_topk(x, gain, 1e-5, 300)
    for k in (0, 1, 75, 299):
        assert torch.equal(ops.norm_abs_topk(x, gain, 1e-5, k), reference.abs_topk(whole, k))
        assert torch.equal(ops.act_abs_topk(x, k, "relu"), reference.abs_topk(x.relu(), k))


def test_a_search_does_not_depend_on_the_tile_before():
    """Each tile starts from the last one's threshold: sizes that leap by 60 orders of magnitude must not matter."""
    x = random(4, 160, 64) * 10.0 ** torch.randint(-30, 30, (4, 160, 1), generator=torch.Generator().manual_seed(1))
    x = LAYOUTS[1](x)
    assert torch.equal(ops.abs_topk(x, 16), reference.abs_topk(x, 16))


def loss_inputs(b=3, t=17, v=37, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    tokens, targets = (torch.randint(v - 2, (b, t), generator=generator) for _ in range(2))
    return random(b, t, v, scale=scale), random(v, v, seed=6), tokens, targets


@paths
@layouts
@pytest.mark.parametrize("with_table", [True, False])
@pytest.mark.parametrize("sizes", [(2, 1, 5), (1, 63, 40), (3, 17, 37), (2, 500, 64)])
def test_the_loss_and_its_gradients_equal_float64(sizes, with_table, layout, compiled, monkeypatch):
    choose_path(monkeypatch, compiled)
    logits, table, tokens, targets = loss_inputs(*sizes)
    inputs = (layout(logits), table)[: 1 + with_table]
    for scale in (1.0, 0.25):
        results = [
            gradients(
                lambda logits, table=None, f=f: f(logits, table, tokens, targets),
                [i.to(dtype) for i in inputs],
                torch.tensor(scale),
            )
            for f, dtype in ((ops.next_token_loss, torch.float32), (reference.next_token_loss, torch.float64))
        ]
        (loss, found), (exact, expected) = results
        assert loss.dtype == torch.float32 and loss.shape == ()
        assert found[0].stride() == inputs[0].stride()
        assert abs(loss - exact) < 1e-6 * max(1, exact)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()
        if with_table:
            assert not found[1][-2:].any(), "rows of tokens that do not occur"


@layouts
def test_the_loss_is_right_for_logits_of_ten_thousand(layout):
    logits, table, tokens, targets = loss_inputs(scale=5e3)
    logits[0, 0], logits[0, 1] = 1e4, -1e4
    logits[0, 2, 0], logits[0, 2, 1:] = 1e4, -1e4
    logits[0, 3, 4] = -torch.inf
    loss, (grad,) = gradients(
        lambda x: ops.next_token_loss(x, table, tokens, targets), (layout(logits),), torch.ones(())
    )
    exact, (expected,) = gradients(
        lambda x: reference.next_token_loss(x, table.double(), tokens, targets), (logits.double(),), torch.ones(())
    )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert (grad - expected).abs().max() < 1e-6 * 1e3 / tokens.numel()  # fp32 logits of 1e4 are 1e-3 apart


def test_a_loss_that_is_not_finite_says_so():
    for bad in (torch.nan, torch.inf):
        logits, table, tokens, targets = loss_inputs()
        logits[1, 5, 7] = bad
        assert not ops.next_token_loss(logits, table, tokens, targets).isfinite()
        assert not ops.next_token_loss(LAYOUTS[1](logits), table, tokens, targets).isfinite()


def test_the_loss_of_bfloat16_logits_is_computed_in_float32_whatever_autocast_says():
    logits, table, tokens, targets = loss_inputs()
    low = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, (grad,) = gradients(lambda x: ops.next_token_loss(x, table, tokens, targets), (low,), torch.ones(()))
    exact = reference.next_token_loss(low.double(), table.double(), tokens, targets)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_the_loss_keeps_one_tensor_of_the_logits_size():
    logits, table, tokens, targets = loss_inputs()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        ops.next_token_loss(logits.requires_grad_(), table.requires_grad_(), tokens, targets)
    assert sorted(sizes) == [tokens.numel(), logits.numel()]
    with torch.no_grad():
        _, gradient = fused.next_token_loss(logits, table, tokens, targets, False)
    assert gradient.numel() == 0, "nothing is written that no gradient needs"


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", 0)
    x, gain = LAYOUTS[1](random(3, 150, 70)), random(70, seed=1)
    logits, table, tokens, targets = loss_inputs(3, 150, 70)
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 3):
            torch.set_num_threads(n)
            normed = gradients(lambda x, g: ops.norm_abs_topk(x, g, 1e-5, 20), (x, gain), x)
            acted = gradients(lambda x: ops.act_abs_topk(x, 20, "gelu"), (x,), x)
            lost = gradients(lambda l, t: ops.next_token_loss(l, t, tokens, targets), (logits, table), torch.ones(()))
            results.append([t for out, grads in (normed, acted, lost) for t in (out, *grads)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_definitions_have_the_gradients_of_their_values():
    x, gain = random(2, 3, 6).double().requires_grad_(), random(6, seed=1).double().requires_grad_()
    for k in (3, 6):
        torch.autograd.gradcheck(lambda x, g, k=k: reference.norm_abs_topk(x, g, 1e-5, k), (x, gain))
        for activation in ("gelu", "relu"):
            torch.autograd.gradcheck(lambda x, k=k, a=activation: reference.act_abs_topk(x, k, a), (x,))
    logits, table, tokens, targets = loss_inputs(2, 3, 6)
    inputs = [t.double().requires_grad_() for t in (logits, table)]
    torch.autograd.gradcheck(lambda l, t: reference.next_token_loss(l, t, tokens, targets), inputs)


def test_other_types_and_backends_take_the_same_road_in_parts():
    x, gain = random(2, 9, 12).double(), random(12, seed=1).double()
    assert torch.equal(ops.norm_abs_topk(x, gain, 1e-5, 4), ops.norm_abs_topk(x, gain, 1e-5, 4, backend="reference"))
    low = x.bfloat16()
    assert torch.equal(ops.act_abs_topk(low, 4, "gelu"), reference.act_abs_topk(low, 4, "gelu"))
    some, whole = low.float().to(DEVICE), gain.float().to(DEVICE)  # without a GPU Triton's interpreter selects
    assert torch.equal(ops.act_abs_topk(some, 4, "relu", backend="triton"), reference.act_abs_topk(some, 4, "relu"))
    parts = ops.norm_abs_topk(some, whole, 1e-5, 4, backend="triton")
    torch.testing.assert_close(parts, reference.norm_abs_topk(some, whole, 1e-5, 4))


def test_the_fused_ops_pass_torchs_own_checks_of_custom_ops():
    x, gain = LAYOUTS[1](random(2, 9, 12)), random(12, seed=1)
    logits, table, tokens, targets = loss_inputs(2, 9, 12)
    checked = torch.ops.sparsetrain
    out, scales = checked.norm_abs_topk(x, gain, 1e-5, 4)
    for op, arguments in {
        checked.norm_abs_topk: (x, gain, 1e-5, 4),
        checked.norm_abs_topk_backward: (x, x, gain, scales, out),
        checked.act_abs_topk: (x, 4, "gelu"),
        checked.gelu_abs_topk_backward: (x, x, out),
        checked.next_token_loss: (logits, table, tokens, targets, True),
        checked.table_gradient: (logits, tokens),
    }.items():
        torch.library.opcheck(op.default, arguments)


def test_wrong_arguments_are_refused_by_name():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"gain must have shape \(4,\) on cpu, as the channels of x, got \(3,\)"):
        ops.norm_abs_topk(x, torch.ones(3), 1e-5, 2)
    with pytest.raises(ValueError, match=r"k must be in \[0, 4\], the width of x, got 5"):
        ops.act_abs_topk(x, 5, "gelu")
    with pytest.raises(ValueError, match="activation must be one of gelu, gelu_tanh, relu, got 'silu'"):
        ops.act_abs_topk(x, 2, "silu")
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"table must have shape \(4, 4\).*got \(4, 5\).*; tokens must be int64"):
        ops.next_token_loss(x, torch.zeros(4, 5), tokens.int(), tokens)
    with pytest.raises(ValueError, match=r"logits must hold floats \(B, T, V\), got torch.float32 of shape \(3, 4\)"):
        ops.next_token_loss(x[0], None, tokens[0], tokens[0])
    for bad in (-100, 4):
        with pytest.raises(
            ValueError, match=rf"targets must be in \[0, 4\), the width of the logits, got 0 to 4|{bad}"
        ):
            ops.next_token_loss(x, None, tokens, tokens.index_fill(1, torch.tensor(1), bad))
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, got 'triton'"):
        ops.next_token_loss(x, None, tokens, tokens, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_type_keeps_its_layout_through_a_layer(dtype):
    """What runs on a GPU too: a layer whose norm or attention turned token-major would be transposed in every block."""
    x = random(2, 9, 16).to(dtype)
    gain = random(16, seed=1).to(dtype)
    for layout in LAYOUTS:
        kept = layout(x)
        for y in (
            ops.norm_abs_topk(kept, gain, 1e-6, 4), ops.act_abs_topk(kept, 4, "gelu"), ops.abs_topk(kept, 4),
            ops.attend(kept, kept, kept, None, 4), ops.linear(kept, random(8, 16).to(dtype)),
        ):  # fmt: skip
            assert reference.is_channel_major(y) == reference.is_channel_major(kept)
            assert y.dtype == dtype
    normed = [ops.norm_abs_topk(layout(x), gain, 1e-6, 16) for layout in LAYOUTS]
    torch.testing.assert_close(*normed)

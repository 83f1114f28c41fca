"""Attention on every backend: forward and gradients against a softmax written out in float64, and at the edges."""

import math

import pytest
import torch

from sparsetrain.kernels import cpu, native, ops, reference

SHAPES = [  # B, T, H, d_head
    (2, 1, 3, 4), (1, 17, 2, 1), (2, 63, 1, 5), (2, 64, 2, 16), (1, 65, 3, 33), (2, 130, 2, 16), (1, 500, 2, 8),
    (1, 96, 1, 64), (1, 40, 2, 128),
]  # fmt: skip
NAMES = ("z", "q", "k", "v", "sink")
TOLERANCE = 2e-6  # ||ours - float64|| / ||float64||; torch's own attention in float32 is held to the same


def written_out(q, k, v, sink, d_head):
    """The definition, with a T x T matrix."""
    q, k, v = (x.unflatten(-1, (-1, d_head)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT / math.sqrt(d_head)
    logits = logits.masked_fill(~torch.ones(logits.shape[-2:]).tril().bool(), -torch.inf)
    if sink is not None:
        logits = torch.cat([logits, sink[None, :, None, None].expand(*logits.shape[:-1], 1)], dim=-1)
    return (logits.softmax(-1)[..., : k.shape[-2]] @ v).transpose(1, 2).flatten(-2)


def token_major(x):
    return x.contiguous()


def channel_major(x):
    return x.mT.contiguous().mT


def inputs(shape, share=1.0, size=1.0, seed=0):
    """q, k, v, a sink and the gradient of z, of which `share` of the entries of q, k, v are not zero."""
    b, t, h, d_head = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(b, t, h * d_head, generator=generator) for _ in range(4))
    q, k, v = (size * x * (torch.rand(x.shape, generator=generator) < share) for x in (q, k, v))
    return q, k, v, torch.randn(h, generator=generator), grad


def step(function, q, k, v, sink, grad, *rest, **options):
    """z and the gradients of q, k, v and, if there is one, the sink."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)] + (
        [] if sink is None else [sink.detach().requires_grad_()]
    )
    z = function(*leaves[:3], None if sink is None else leaves[3], *rest, **options)
    return z, *torch.autograd.grad(z, leaves, grad)


def assert_near(ours, exact, tolerance=TOLERANCE):
    for name, a, b in zip(NAMES, ours, exact, strict=False):
        assert a.shape == b.shape and a.dtype == torch.float32
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-6)
        assert error <= tolerance, f"{name}: {error}"


def doubled(*tensors):
    return [None if x is None else x.double() for x in tensors]


@pytest.fixture(params=["poisoned", "threads"])
def hard_conditions(request, monkeypatch):
    """Fresh memory full of NaN, or more threads than heads."""
    if request.param == "poisoned":
        empty = torch.Tensor.new_empty
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *arguments: empty(*arguments).fill_(torch.nan))
        return
    monkeypatch.setattr(cpu, "SMALL", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    request.addfinalizer(lambda: torch.set_num_threads(before))


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("layout", [token_major, channel_major])
def test_the_reference_is_exact_in_float64(layout, with_sink):
    q, k, v, sink, grad = doubled(*inputs((2, 9, 3, 5)))
    sink = sink if with_sink else None
    exact = step(written_out, q, k, v, sink, grad, 5)
    ours = step(reference.attend, *map(layout, (q, k, v)), sink, grad, 5)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    small = [x[:1, :3].requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: reference.attend(*x, sink, 5), small)


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("layout", [token_major, channel_major])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_every_gradient_equal_float64(shape, layout, share, with_sink, hard_conditions):
    q, k, v, sink, grad = inputs(shape, share)
    sink = sink if with_sink else None
    ours = step(ops.attend, *map(layout, (q, k, v)), sink, grad, shape[-1], backend="cpu")
    assert_near(ours, step(written_out, *doubled(q, k, v, sink, grad), shape[-1]))


@pytest.mark.parametrize("sparse", ["q", "k", "v"])
def test_zeros_in_one_of_them_alone_change_nothing(sparse):
    shape = (2, 150, 2, 33)
    few, all_of_them = inputs(shape, 0.2), inputs(shape)
    mixed = [few[i] if name == sparse else all_of_them[i] for i, name in enumerate("qkv")]
    ours = step(ops.attend, *map(channel_major, mixed), *all_of_them[3:], 33)
    assert_near(ours, step(written_out, *doubled(*mixed, *all_of_them[3:]), 33))


def test_a_sink_of_another_type_is_taken():
    q, k, v, sink, grad = inputs((1, 20, 2, 4))
    ours = step(ops.attend, q, k, v, sink.double(), grad, 4)
    assert ours[4].dtype == torch.float64
    assert_near(ours[:4], step(written_out, *doubled(q, k, v, sink, grad), 4))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", [token_major, channel_major])
def test_slices_of_one_buffer_are_read_in_place_and_the_layout_is_kept(layout, backend):
    shape = (2, 37, 3, 8)
    q, k, v, sink, grad = inputs(shape, 0.5)
    exact = step(written_out, *doubled(q, k, v, sink, grad), 8)
    slices = layout(torch.cat([q, k, v], dim=-1)).chunk(3, dim=-1)
    z = ops.attend(*slices, sink, 8, backend=backend)
    assert z.stride() == layout(z).stride()
    wide = layout(torch.cat([q, k, v], dim=-1)).requires_grad_()
    ours = torch.autograd.grad(ops.attend(*wide.chunk(3, dim=-1), sink, 8, backend=backend), wide, layout(grad))
    assert_near((z, *ours[0].chunk(3, dim=-1)), exact[:4])


@pytest.mark.skipif(native.library() is None, reason="no C compiler")
def test_channel_major_activations_are_not_copied(monkeypatch):
    q, k, v, sink, grad = inputs((1, 20, 2, 4))
    monkeypatch.setattr(ops, "swapped", None)
    step(ops.attend, *map(channel_major, (q, k, v)), sink, channel_major(grad), 4)


def test_channels_that_lie_further_apart_are_read_right():
    q, k, v, sink, grad = inputs((2, 20, 2, 4))
    apart = [channel_major(x.repeat_interleave(n, dim=-1))[..., ::n] for x, n in ((q, 1), (k, 2), (v, 3), (grad, 4))]
    assert [x.stride(-1) for x in apart] == [20, 40, 60, 80]
    ours = step(ops.attend, *apart[:3], sink, apart[3], 4)
    assert_near(ours, step(written_out, *doubled(q, k, v, sink, grad), 4))


def test_gradients_that_are_expanded_or_of_mixed_layouts_are_read_right():
    q, k, v, sink, grad = inputs((2, 20, 2, 4))
    mixed = channel_major(q), token_major(k), v.repeat_interleave(2, dim=1)[:, ::2]
    expanded = grad[:1, :1, :1].expand(grad.shape)
    ours = step(ops.attend, *mixed, sink, expanded, 4)
    assert_near(ours, step(written_out, *doubled(q, k, v, sink, expanded), 4))


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", 0)
    q, k, v, sink, grad = inputs((2, 200, 3, 16), 0.25)
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(step(ops.attend, q, k, v, sink, grad, 16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("sink", [None, -1e4, 0.0, 1e4])
def test_logits_of_ten_thousand_are_stable(sink):
    """Such a softmax takes one key, or the sink; an exponential of 1e4 would overflow."""
    q, k, v, _, grad = inputs((2, 130, 2, 16), size=50)
    logits = (q.unflatten(-1, (2, 16)).transpose(1, 2) @ k.unflatten(-1, (2, 16)).permute(0, 2, 3, 1)) / 4
    assert logits.abs().max() > 1e4
    sink = None if sink is None else torch.full((2,), sink)
    exact = step(written_out, *doubled(q, k, v, sink, grad), 16)
    assert_near(step(ops.attend, q, k, v, sink, grad, 16)[:4], exact, 2e-3)  # fp32 rounds logits of 1e4 by 1e-3
    if sink is not None and sink[0] == -1e4:
        assert_near(
            step(ops.attend, q, k, v, sink, grad, 16)[:1], step(written_out, *doubled(q, k, v, None, grad), 16), 2e-3
        )


def test_a_sink_far_above_every_key_takes_all_and_one_far_below_takes_nothing():
    q, k, v, _, grad = inputs((1, 70, 2, 4))
    everything = step(ops.attend, q, k, v, torch.full((2,), 200.0), grad, 4)
    assert not any(x.any() for x in everything)
    nothing = step(ops.attend, q, k, v, torch.full((2,), -torch.inf), grad, 4)
    assert not nothing[-1].any()
    assert all(torch.equal(a, b) for a, b in zip(nothing, step(ops.attend, q, k, v, None, grad, 4), strict=False))


def test_the_exponential_is_within_a_millionth_of_the_true_one():
    """Two keys, one of them at logit 0 and value 0: z = e^x / (e^x + 1), which for x far below 0 is e^x."""
    x = torch.linspace(-87, -17, 4000)
    q = torch.ones(4000, 2, 1)
    k = torch.stack([x, torch.zeros(4000)], dim=1)[..., None]
    v = torch.tensor([1.0, 0.0]).expand(4000, 2)[..., None]
    ours = ops.attend(q, k, v, None, 1)[:, 1, 0].double()
    exact = (x * 1.44269504088896).double().exp2()  # the logit in powers of two is rounded once
    assert ((ours / exact) - 1).abs().max() < 1e-6
    far = ops.attend(q, torch.stack([torch.full((4000,), -1e30), torch.zeros(4000)], dim=1)[..., None], v, None, 1)
    assert not far[:, 1].any()


def test_a_nan_reaches_the_queries_that_see_it_and_no_others():
    q, k, v, sink, _ = inputs((1, 100, 2, 16))
    k[0, 70, 3] = torch.nan  # the first head
    z = ops.attend(q, k, v, sink, 16)
    expected = torch.zeros(1, 100, 32, dtype=torch.bool)
    expected[:, 70:, :16] = True
    assert torch.equal(z.isnan(), expected)


def test_attention_runs_on_the_reference_without_a_compiler_and_for_other_types(monkeypatch):
    q, k, v, sink, grad = inputs((2, 20, 2, 4))
    assert ops.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), sink, 4).dtype == torch.bfloat16
    assert ops.attend(*doubled(q, k, v, sink), 4).dtype == torch.float64
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert_near(step(ops.attend, q, k, v, sink, grad, 4), step(written_out, *doubled(q, k, v, sink, grad), 4))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_no_tokens_give_no_output(shape):
    q, sink = torch.zeros(shape, requires_grad=True), torch.zeros(2, requires_grad=True)
    z = ops.attend(q, q, q, sink, 4)
    assert z.shape == shape
    z.sum().backward()
    assert not sink.grad.any()


@pytest.mark.parametrize("with_sink", [False, True])
def test_attention_passes_torchs_own_checks_of_custom_ops(with_sink):
    q, k, v, sink, grad = inputs((2, 20, 2, 4))
    rows = [x.mT.contiguous().requires_grad_() for x in (q, k, v)]
    sink = sink.requires_grad_() if with_sink else None
    torch.library.opcheck(torch.ops.sparsetrain.attend.default, (*rows, sink, 4))
    z, norm = torch.ops.sparsetrain.attend(*rows, sink, 4)
    saved = [x.detach() for x in (grad.mT.contiguous(), *rows)]
    sink = None if sink is None else sink.detach()
    torch.library.opcheck(torch.ops.sparsetrain.attend_backward.default, (*saved, sink, z.detach(), norm, 4))


def test_what_does_not_fit_is_refused_all_at_once():
    q, k, v, sink, _ = inputs((2, 20, 2, 4))
    with pytest.raises(
        ValueError, match=r"k must be like q, torch.float32 of shape \(2, 20, 8\) on cpu, got .*\(2, 9, 8\)"
    ):
        ops.attend(q, k[:, :9], v, sink, 4)
    with pytest.raises(
        ValueError, match=r"v must be like q, .* got torch.float64 .*; sink must have shape \(2,\), a logit"
    ):
        ops.attend(q, k, v.double(), sink[:1], 4)
    with pytest.raises(ValueError, match=r"d_head must divide 8, the channels of q, got 3"):
        ops.attend(q, k, v, sink, 3)
    with pytest.raises(ValueError, match=r"q must be \(B, T, D\) floats, got torch.float32 of shape \(20, 8\)"):
        ops.attend(q[0], k[0], v[0], sink, 4)
    with pytest.raises(
        ValueError, match=r"backend 'cpu' cannot run here: it takes float32 on the CPU, got torch.float64"
    ):
        ops.attend(*doubled(q, k, v, sink), 4, backend="cpu")
    with pytest.raises(ValueError, match=r"backend must be one of auto, reference, cpu, got 'triton'"):
        ops.attend(q, k, v, sink, 4, backend="triton")
    wide = torch.zeros(1, 2, 130)
    with pytest.raises(ValueError, match=r"d_head must be at most 128 and causal True for backend 'cpu', got 130 and"):
        ops.attend(wide, wide, wide, None, 130, backend="cpu")
    assert ops.attend(wide, wide, wide, None, 130).shape == wide.shape
    with pytest.raises(ValueError, match=r"causal True for backend 'cpu', got 4 and causal=False"):
        ops.attend(q, k, v, sink, 4, causal=False, backend="cpu")


@pytest.mark.parametrize("with_sink", [False, True])
def test_attention_that_sees_all_positions(with_sink):
    q, k, v, sink, _ = doubled(*inputs((2, 9, 3, 5)))
    heads = [x.view(2, 9, 3, 5).transpose(1, 2) for x in (q, k, v)]
    scores = heads[0] @ heads[1].mT / 5**0.5
    if with_sink:
        scores = torch.cat([scores, sink[:, None, None].expand(2, 3, 9, 1)], dim=-1)
    expected = (scores.softmax(-1)[..., :9] @ heads[2]).transpose(1, 2).flatten(2)
    ours = ops.attend(q, k, v, sink if with_sink else None, 5, causal=False)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)

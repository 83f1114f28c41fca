"""AbsTopK and the projection in Triton against their definitions; without a GPU, in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from sparsetrain.kernels import reference

pytest.importorskip("triton")
import triton
import triton.language as tl

from sparsetrain.kernels import abs_topk as kernels
from sparsetrain.kernels import project as projection
from sparsetrain.kernels.abs_topk import abs_topk, abs_topk_backward
from sparsetrain.kernels.project import project

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {"token-major": lambda x: x.contiguous(), "channel-major": lambda x: x.mT.contiguous().mT}
uninitialised = torch.empty


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill fresh memory, so that an entry which is never written is seen."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def rows(width: int, dtype: torch.dtype, n_each: int = 2, seed: int = 0) -> Tensor:
    """Rows of every kind: normal, ties, almost all zero, zeros of both signs, equal, all exponents, not finite."""
    g = torch.Generator().manual_seed(seed)
    shape = (n_each, width)
    normal = torch.randn(shape, generator=g)
    extreme = normal * 10.0 ** torch.randint(-44, 38, shape, generator=g)
    largest = torch.finfo(dtype).max
    odd = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, largest, -largest, 1.0, 0.0, -0.0, 1e-44])
    zeros = torch.zeros(shape)
    kinds = [
        normal, normal.round(), normal * (torch.rand(shape, generator=g) < 0.1), zeros.copysign(normal), zeros - 1.5,
        extreme, odd[torch.randint(len(odd), shape, generator=g)],
    ]  # fmt: skip
    return torch.cat(kinds).to(DEVICE, dtype)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def assert_is_abs_topk(x: Tensor, k: int) -> None:
    found = abs_topk(x, k)
    assert_same(found, reference.abs_topk(x, k))
    assert not (found.signbit() & (found == 0)).any(), "a negative zero"
    if x.is_contiguous() or x.mT.is_contiguous():
        assert found.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 2, 33, 128, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_abs_topk_equals_its_definition(dtype, width, layout):
    x = LAYOUTS[layout](rows(width, dtype))
    for k in {0, 1, width // 3, width - 1, width}:
        assert_is_abs_topk(x, k)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_abs_topk_of_tensors_of_every_rank(layout):
    g = torch.Generator().manual_seed(1)
    for shape in [(2, 9, 20), (2, 3, 5, 12), (3, 1, 17), (1, 1, 1), (0, 5), (3, 0, 5), (4, 0)]:
        x = LAYOUTS[layout](torch.randn(shape, generator=g).to(DEVICE))
        assert_is_abs_topk(x, shape[-1] // 2)
    vector = torch.randn(40, generator=g).to(DEVICE)
    assert_same(abs_topk(vector, 9), reference.abs_topk(vector, 9))


def test_abs_topk_of_strided_views():
    x = torch.randn(6, 10, 24, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for view in (x[:, ::2], x[..., ::3], x.transpose(0, 1), x.transpose(0, 2), x[1], x[:, 3], x[:2, :, 5:6].mT):
        assert_is_abs_topk(view, view.shape[-1] // 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_abs_topk_of_rows_wider_than_a_warp_holds(dtype, layout):
    x = LAYOUTS[layout](rows(5000, dtype, n_each=1))
    assert_is_abs_topk(x, 1234)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_abs_topk_of_channels_too_many_for_their_layout_keeps_the_layout(dtype):
    x = torch.randn(2, 3, 16400, generator=torch.Generator().manual_seed(8)).to(DEVICE, dtype)
    assert_is_abs_topk(x.mT.contiguous().mT, 4100)


def test_abs_topk_of_its_greatest_width_and_not_above():
    x = torch.ones(1, 32768, dtype=torch.bfloat16, device=DEVICE)
    assert (abs_topk(x, 32767) != 0).sum() == 32767
    with pytest.raises(ValueError, match=r"x must have at most 32768 channels for the Triton kernels, got 32769"):
        abs_topk(torch.ones(1, 32769, device=DEVICE), 3)


@pytest.mark.parametrize("along", ["planes", "tokens", "channels"])
def test_abs_topk_offsets_beyond_two_to_the_31(along):
    """Strides that fit in 32 bits and offsets that do not; the memory between is never touched."""
    apart, width, k = 2**30 + 8, 16, 1
    memory = uninitialised(2 * apart + width, dtype=torch.bfloat16, device=DEVICE)
    view = memory.as_strided((3, width), (apart, 1))
    view.copy_(torch.randn(3, width, generator=torch.Generator().manual_seed(3)))
    n_planes, n_tokens, n_channels, *strides = {
        "planes": (3, 1, width, apart, width, 1),
        "tokens": (1, 3, width, 0, apart, 1),
        "channels": (1, width, 3, 0, 1, apart),
    }[along]
    expected = reference.abs_topk(view.t() if along == "channels" else view, k)
    bits = memory.view(torch.int16)
    kernels._abs_topk[(n_planes * triton.cdiv(n_tokens, 4),)](
        bits, bits, n_tokens, k, *strides, INFINITY=0x7F80, D=n_channels, BT=4, DP=16, VECTOR=1
    )
    assert_same(view.t() if along == "channels" else view, expected)


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_abs_topk_backward_is_the_gradient_of_the_definition(dtype, layout, grad_layout):
    x = LAYOUTS[layout](rows(67, dtype)).requires_grad_()
    grad = LAYOUTS[grad_layout](torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(x))
    (expected,) = torch.autograd.grad(reference.abs_topk(x, 20), x, grad)
    out = abs_topk(x.detach(), 20)
    found = abs_topk_backward(grad, out)
    assert_same(found, expected)
    assert found.stride() == out.stride()


def test_abs_topk_backward_of_many_blocks_and_of_none():
    out = torch.tensor([0.0, -0.0, 2.0, torch.nan], device=DEVICE).repeat(3000)
    assert_same(abs_topk_backward(torch.ones_like(out), out), ((out != 0) | out.isnan()).float())
    assert abs_topk_backward(out[:0].view(0, 3), out[:0].view(0, 3)).shape == (0, 3)


FLOORS = [(0, 0), (3, 2), (2, 0), (0, 2), (100, 0), (1, 100)]


@pytest.fixture
def small_programs(monkeypatch):
    """Few entries a program, so that small weights have several programs of several blocks."""
    monkeypatch.setattr(projection, "BLOCK", 64)
    monkeypatch.setattr(projection, "MAX_PROGRAMS", 4)


def assert_is_projected(weight: Tensor, k: int, *floors: int) -> None:
    assert_same(project(weight, k, *floors), reference.project(weight.contiguous(), k, *floors))


@pytest.mark.parametrize(
    "dtype, floors", [(torch.float32, f) for f in FLOORS] + [(d, f) for d in DTYPES[1:] for f in FLOORS[:2]]
)
def test_project_equals_its_definition(dtype, floors, small_programs):
    """With budgets that the floors leave room in, fill and exceed."""
    weight = rows(29, dtype)[torch.randperm(14, generator=torch.Generator().manual_seed(5)).to(DEVICE)]
    for k in (1, 150, 14 * 29 - 1):
        assert_is_projected(weight, k, *floors)


@pytest.mark.parametrize("kind", range(7))
def test_project_of_each_kind_of_entry(kind, small_programs):
    weight = rows(300, torch.float32, n_each=1)[kind].view(12, 25)
    for k, floors in ((7, (0, 0)), (100, (2, 1))):
        assert_is_projected(weight, k, *floors)


@pytest.mark.parametrize("shape", [(1,), (5,), (300,), (1, 1), (1, 40), (40, 1), (0, 3), (3, 0), (0,)])
def test_project_of_vectors_and_edges(shape, small_programs):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(6)).round(decimals=1).to(DEVICE)
    n = weight.numel()
    for k in {0, n // 2, n}:
        for floors in ((0, 0), (2, 1)):
            assert_is_projected(weight, k, *floors)


def test_project_of_strided_weights_and_of_whole_blocks():
    weight = torch.randn(90, 120, generator=torch.Generator().manual_seed(7)).round(decimals=2).to(DEVICE)
    assert_is_projected(weight, 1000, 4, 0)
    assert_is_projected(weight.t(), 1000, 4, 0)
    assert_is_projected(weight[:, ::2], 1000, 0, 4)


def test_project_refuses_a_floor_of_too_long_rows():
    weight = torch.ones(2, 32769, device=DEVICE)
    with pytest.raises(ValueError, match="at most 32768 channels"):
        project(weight, 5, min_per_row=1)
    assert project(weight, 5).sum() == 5


def test_project_offsets_beyond_two_to_the_31():
    out = torch.zeros(16, dtype=torch.int64, device=DEVICE)
    _write_block[(1,)](out, 2**20, 3, BLOCK=16, N_BLOCKS=1024)
    assert out.tolist() == list(range((2**30 + 3) * 16, (2**30 + 4) * 16))


@triton.jit
def _write_block(out, program, i, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), projection._block(program, i, BLOCK, N_BLOCKS))

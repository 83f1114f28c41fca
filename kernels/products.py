"""Products of activations in blocks (B, K, T) with a sparse or a dense weight, and their gradients."""

import torch
from torch import Tensor

from sparsetrain.kernels import choice, cpu
from sparsetrain.kernels.sparse_weight import Order


class SparseLinear(torch.autograd.Function):
    """x (B, K, T) to (B, M, T); the gradient of the weight goes to `learnt`, at the nonzeros of `wanted` or everywhere.

    Less overhead than one op with a registered gradient.
    """

    @staticmethod
    def forward(ctx, x, learnt, values, bias, to_column_major, rows, columns, wanted, backend):
        ctx.types = learnt.dtype, None if bias is None else bias.dtype
        ctx.columns, ctx.wanted, ctx.backend = columns, wanted, backend
        ctx.save_for_backward(x, values, to_column_major)
        return _sparse_matmul(x, values, bias, rows.offsets, rows.indices, rows.by_length, backend)

    @staticmethod
    def backward(ctx, grad):
        x, values, to_column_major = ctx.saved_tensors
        columns, wanted = ctx.columns, ctx.wanted
        grad = grad.contiguous()
        grads: list[Tensor | None] = [None] * 9
        if ctx.needs_input_grad[0]:
            by_column = (columns.offsets, columns.indices, columns.by_length)
            grads[0] = _sparse_matmul(grad, values.index_select(0, to_column_major), None, *by_column, ctx.backend)
        if ctx.needs_input_grad[1]:
            if wanted is None:
                learnt = dense_gradient(grad, x)
            else:
                learnt = _sampled_matmul(grad, x, wanted.offsets, wanted.indices, wanted.by_length, ctx.backend)
            grads[1] = learnt.to(ctx.types[0])
        if ctx.needs_input_grad[3]:
            grads[3] = _sum_of_tokens(grad).to(ctx.types[1])
        return tuple(grads)


class DenseLinear(torch.autograd.Function):
    """x (B, K, T) to (B, M, T) by a dense weight."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias_type = None if bias is None else bias.dtype
        spread = weight.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.bmm(spread, x) if bias is None else torch.baddbmm(bias.to(x.dtype)[:, None], spread, x)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        in_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            in_grad = torch.bmm(weight.to(x.dtype).t().expand(x.shape[0], -1, -1), grad)
        if ctx.needs_input_grad[1]:
            weight_grad = dense_gradient(grad, x).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            bias_grad = _sum_of_tokens(grad).to(ctx.bias_type)
        return in_grad, weight_grad, bias_grad


def _sum_of_tokens(grad: Tensor) -> Tensor:
    return grad.sum((0, 2), dtype=_sum_type(grad.dtype))


def autocast(x: Tensor) -> Tensor:
    """x in the type of autocast, where it is on; doubles stay, as in a dense layer."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


# Registered as custom ops so that torch.compile keeps them whole instead of tracing into ctypes or a launch.
@torch.library.custom_op("sparsetrain::sparse_matmul", mutates_args=())
def _sparse_matmul(
    x: Tensor, values: Tensor, bias: Tensor | None, offsets: Tensor, indices: Tensor, by_length: Tensor, backend: str
) -> Tensor:
    return choice.module(backend, "sparse_linear").matmul(x, values, Order(offsets, indices, by_length), bias)


@torch.library.custom_op("sparsetrain::sampled_matmul", mutates_args=())
def _sampled_matmul(y: Tensor, x: Tensor, offsets: Tensor, indices: Tensor, by_length: Tensor, backend: str) -> Tensor:
    return choice.module(backend, "sparse_linear").sampled_matmul(y, x, Order(offsets, indices, by_length))


@_sparse_matmul.register_fake
def _(x, values, bias, offsets, indices, by_length, backend):
    return x.new_empty(x.shape[0], by_length.shape[0], x.shape[2])


@_sampled_matmul.register_fake
def _(y, x, offsets, indices, by_length, backend):
    return x.new_empty(indices.shape[0], dtype=_sum_type(x.dtype))


@torch.library.custom_op("sparsetrain::dense_gradient", mutates_args=())
def dense_gradient(y: Tensor, x: Tensor) -> Tensor:
    if y.device.type == "cpu" and y.dtype in cpu.NAMES:
        return cpu.dense_gradient(y, x)
    y, x = (t.transpose(0, 1).flatten(1) for t in (y, x))  # one product over all tokens, as a dense layer has it
    return (y @ x.t()).to(_sum_type(y.dtype))


@dense_gradient.register_fake
def _(y, x):
    return y.new_empty(y.shape[1], x.shape[1], dtype=_sum_type(y.dtype))


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

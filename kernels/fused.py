"""AbsTopK, what is fused with it, the loss and attention: ops that torch.compile keeps whole, and their gradients."""

import torch
from torch import Tensor

from sparsetrain.kernels import choice, cpu
from sparsetrain.kernels.layout import empty_laid_out_as


@torch.library.custom_op("sparsetrain::abs_topk", mutates_args=())
def abs_topk(x: Tensor, k: int, backend: str) -> Tensor:
    return choice.module(backend, "abs_topk").abs_topk(x, k)


@torch.library.custom_op("sparsetrain::abs_topk_backward", mutates_args=())
def _abs_topk_backward(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    return choice.module(backend, "abs_topk").abs_topk_backward(grad, out)


@abs_topk.register_fake
def _(x: Tensor, k: int, backend: str) -> Tensor:
    return empty_laid_out_as(x)


@_abs_topk_backward.register_fake
def _(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    return empty_laid_out_as(out)


def _keep_output(ctx, inputs, output) -> None:
    ctx.backend = inputs[-1]
    ctx.save_for_backward(output)


def _topk_backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return _abs_topk_backward(grad, ctx.saved_tensors[0], ctx.backend), None, None


abs_topk.register_autograd(_topk_backward, setup_context=_keep_output)


class NormAbsTopk(torch.autograd.Function):
    """Keeps x, a number per token, and its output, which what follows keeps anyway: no tensor of its own."""

    @staticmethod
    def forward(ctx, x, gain, eps, k):
        out, scales = _norm_abs_topk(x, gain, eps, k)
        ctx.save_for_backward(x, gain, scales, out if k < x.shape[-1] else None)
        return out

    @staticmethod
    def backward(ctx, grad):
        return *_norm_abs_topk_backward(grad, *ctx.saved_tensors), None, None


class ActAbsTopk(torch.autograd.Function):
    """Keeps its output, and for gelu x."""

    @staticmethod
    def forward(ctx, x, k, activation):
        out = _act_abs_topk(x, k, activation)
        ctx.save_for_backward(out, x if activation == "gelu" else None)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, x = ctx.saved_tensors
        if x is None:
            return _abs_topk_backward(grad, out, "cpu"), None, None
        return _gelu_abs_topk_backward(grad, x, out), None, None


class NextTokenLoss(torch.autograd.Function):
    """Keeps the gradient of the logits, written when the loss was computed, and not the logits."""

    @staticmethod
    def forward(ctx, logits, table, tokens, targets):
        loss, gradient = next_token_loss(logits, table, tokens, targets, True)
        ctx.save_for_backward(gradient, tokens)
        return loss

    @staticmethod
    def backward(ctx, grad):
        gradient, tokens = ctx.saved_tensors
        table_grad = _table_gradient(gradient, tokens) if ctx.needs_input_grad[1] else None
        # Most often the loss is what backward starts from: no pass over the logits then.
        if torch.compiler.is_compiling() or grad != 1:
            gradient, table_grad = gradient * grad, None if table_grad is None else table_grad * grad
        return gradient, table_grad, None, None


@torch.library.custom_op("sparsetrain::norm_abs_topk", mutates_args=())
def _norm_abs_topk(x: Tensor, gain: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor]:
    return cpu.norm_abs_topk(x, gain, eps, k)


@_norm_abs_topk.register_fake
def _(x, gain, eps, k):
    return empty_laid_out_as(x), x.new_empty(x.shape[:-1])


@torch.library.custom_op("sparsetrain::norm_abs_topk_backward", mutates_args=())
def _norm_abs_topk_backward(
    grad: Tensor, x: Tensor, gain: Tensor, scales: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    return cpu.norm_abs_topk_backward(grad, x, gain, scales, out)


@_norm_abs_topk_backward.register_fake
def _(grad, x, gain, scales, out):
    return empty_laid_out_as(x), torch.empty_like(gain)


@torch.library.custom_op("sparsetrain::act_abs_topk", mutates_args=())
def _act_abs_topk(x: Tensor, k: int, activation: str) -> Tensor:
    return cpu.act_abs_topk(x, k, activation)


@_act_abs_topk.register_fake
def _(x, k, activation):
    return empty_laid_out_as(x)


@torch.library.custom_op("sparsetrain::gelu_abs_topk_backward", mutates_args=())
def _gelu_abs_topk_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return cpu.gelu_abs_topk_backward(grad, x, out)


@_gelu_abs_topk_backward.register_fake
def _(grad, x, out):
    return empty_laid_out_as(out)


@torch.library.custom_op("sparsetrain::next_token_loss", mutates_args=())
def next_token_loss(
    logits: Tensor, table: Tensor | None, tokens: Tensor, targets: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    return cpu.next_token_loss(logits, table, tokens, targets, with_gradient)


@next_token_loss.register_fake
def _(logits, table, tokens, targets, with_gradient):
    return logits.new_empty(()), empty_laid_out_as(logits) if with_gradient else logits.new_empty(0)


@torch.library.custom_op("sparsetrain::table_gradient", mutates_args=())
def _table_gradient(gradient: Tensor, tokens: Tensor) -> Tensor:
    return cpu.table_gradient(gradient, tokens)


@_table_gradient.register_fake
def _(gradient, tokens):
    return gradient.new_empty(gradient.shape[-1], gradient.shape[-1])


@torch.library.custom_op("sparsetrain::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, d_head: int) -> tuple[Tensor, Tensor]:
    return cpu.attend(q, k, v, sink, d_head)


@torch.library.custom_op("sparsetrain::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, z: Tensor, norm: Tensor, d_head: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpu.attend_backward(grad, q, k, v, sink, z, norm, d_head)


@attend.register_fake
def _(q, k, v, sink, d_head):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[1] // d_head, 2, q.shape[2])


@_attend_backward.register_fake
def _(grad, q, k, v, sink, z, norm, d_head):
    return *(q.new_empty(q.shape) for _ in range(3)), q.new_empty(q.shape[0], q.shape[1] // d_head)


def _keep_attended(ctx, inputs, output) -> None:
    *tensors, ctx.d_head = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _attended_backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    *grads, sink_grad = _attend_backward(grad, *ctx.saved_tensors, ctx.d_head)
    return *grads, sink_grad.sum(0) if ctx.needs_input_grad[3] else None, None


attend.register_autograd(_attended_backward, setup_context=_keep_attended)

"""Training's kernels on a CPU: RMSNorm, SwiGLU, the rotation and attention in C (native.c), fp32,
forward and backward in one pass each.

torch takes up to nine passes over memory for what one does here, and its attention on a CPU keeps
all scores where heads are grouped. The same bits with any number of threads. The references: torch
in layers.py, and model.PaddedSegments.
"""

import ctypes

import torch

from kernels import native
from kernels.native import addresses

PART = 64  # rows whose parts of a weight's gradient are added up on their own, as in native.c


class RmsNorm(torch.autograd.Function):
    """layers.rms_norm."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        out, _, scales = _norm(x.contiguous(), None, weight, eps)
        ctx.save_for_backward(x.contiguous(), weight, scales)
        return out

    @staticmethod
    def backward(ctx, grad):
        return *_norm_backward(grad, None, *ctx.saved_tensors), None


class AddRmsNorm(torch.autograd.Function):
    """layers.add_rms_norm."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        out, total, scales = _norm(x.contiguous(), residual.contiguous(), weight, eps)
        ctx.save_for_backward(total, weight, scales)
        # The sum after the last layer has no user: None, not a tensor of zeros to read.
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    def backward(ctx, grad, grad_total):
        if grad is None:
            return grad_total, grad_total, None, None
        for_both, for_weight = _norm_backward(grad, grad_total, *ctx.saved_tensors)
        return for_both, for_both, for_weight, None


def _norm(x, residual, weight, eps):
    """(norm of the sum [T, D], the sum, what it was multiplied by [T])."""
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    scales = x.new_empty(len(x))
    tensors = addresses(x, residual, weight, total, out, scales)
    native.library(native.TARGET).rms_norm(*tensors, *x.shape, eps)
    return out, total, scales


def _norm_backward(grad, grad_total, total, weight, scales):
    """(gradient of the sum [T, D], of the weight [D])."""
    grad = grad.contiguous()
    if grad_total is not None:
        grad_total = grad_total.contiguous()
    out = torch.empty_like(total)
    parts = _parts(total)
    tensors = addresses(grad, grad_total, total, weight, scales, out, parts)
    native.library(native.TARGET).rms_norm_backward(*tensors, *total.shape)
    return out, parts.sum(0)


class Swiglu(torch.autograd.Function):
    """layers.swiglu."""

    @staticmethod
    def forward(ctx, gate_up):
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return native.swiglu(gate_up)

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        grad = grad.contiguous()
        out = torch.empty_like(gate_up)
        tensors = addresses(gate_up, grad, out)
        native.library(native.TARGET).swiglu_backward(*tensors, *grad.shape)
        return out


class RotatedQkv(torch.autograd.Function):
    """layers.rotated_qkv."""

    @staticmethod
    def forward(ctx, qkv, bias, cos, sin, num_heads, kv_heads):
        ctx.save_for_backward(cos, sin)
        qkv = qkv.contiguous()
        counts = (num_heads, kv_heads, kv_heads)
        head_dim = qkv.shape[1] // sum(counts)
        q, k, v = (qkv.new_empty(len(qkv), count, head_dim) for count in counts)
        tensors = addresses(qkv, bias, cos, sin, q, k, v)
        sizes = (len(qkv), num_heads, kv_heads, head_dim)
        native.library(native.TARGET).rotate(*tensors, *sizes)
        return q, k, v

    @staticmethod
    def backward(ctx, *gradients):
        grad_q, grad_k, grad_v = (gradient.contiguous() for gradient in gradients)
        tokens, num_heads, head_dim = grad_q.shape
        kv_heads = grad_k.shape[1]
        grad_qkv = grad_q.new_empty(tokens, (num_heads + 2 * kv_heads) * head_dim)
        parts = _parts(grad_qkv) if ctx.needs_input_grad[1] else None
        tensors = addresses(grad_q, grad_k, grad_v, *ctx.saved_tensors, grad_qkv, parts)
        sizes = (tokens, num_heads, kv_heads, head_dim)
        native.library(native.TARGET).rotate_backward(*tensors, *sizes)
        grad_bias = None if parts is None else parts.sum(0)
        return grad_qkv, grad_bias, None, None, None, None


class Packed(ctypes.Structure):
    """native.c's Packed."""

    _fields_ = [
        ("first", ctypes.c_void_p),
        ("length", ctypes.c_void_p),
        ("parent", ctypes.c_void_p),
        ("segments", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


def attend_segments(q, k, v, cut):
    """Causal attention of packed segments. Differentiable.

    q [T, H, hd], k and v [T, K, hd] -> [T, H, hd].
    cut [3, S] int64: first row, length and parent of each segment; -1 is none. A row sees those
        before it in its segment, and all of the parent, which comes before its children.
    Three rows in segments 0-1 and, as its child, 2: row 0 sees 0, row 1 sees 0-1, row 2 sees 0-2.
    """
    return _Attention.apply(q, k, v, cut)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cut):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2])
        tensors = addresses(q, k, v, out, lse)
        native.library(native.TARGET).attend_segments(_packed(q, k, cut), *tensors)
        ctx.save_for_backward(q, k, v, out, lse, cut)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, cut = ctx.saved_tensors
        grad = grad.contiguous()
        grads = (torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v))
        tensors = addresses(grad, q, k, v, out, lse, *grads)
        native.library(native.TARGET).attend_segments_backward(_packed(q, k, cut), *tensors)
        return *grads, None


def _packed(q, k, cut):
    sizes = (cut.shape[1], q.shape[1], k.shape[1], q.shape[2])
    return ctypes.byref(Packed(*addresses(*cut), *sizes, q.shape[2] ** -0.5))


def _parts(x):
    """Room for the parts of the gradient of a weight that every row of x [T, D] was given."""
    return x.new_empty(-(-len(x) // PART), x.shape[1])

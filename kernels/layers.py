"""RMSNorm, RoPE, SwiGLU and the decode step's "bias + RoPE + page write", as row kernels.

Rounding rule, the same in sampler and trainer: arithmetic in fp32 (float64 stays float64), rounded where Hugging Face Qwen2 rounds: after the residual
sum, the bias, the norm (*before* its weight) and the rotation. One difference: cos and sin stay fp32 here, theirs are rounded to bf16.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kernels import jit, tl, triton, use_triton, wide

# torch references


def rms_norm_reference(x, weight, eps):
    value = wide(x)
    return weight * (value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm_reference(x, residual, weight, eps):
    total = residual + x
    return rms_norm_reference(total, weight, eps), total


def swiglu_reference(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(wide(gate)) * wide(up)).to(gate_up.dtype)


def apply_rope_reference(x, cos, sin):
    first, second = wide(x).chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def qkv_rope_write_reference(qkv, bias, cos, sin, k_pages, v_pages, slots, num_heads):
    kv_heads, page_size, head_dim = k_pages.shape[1:]
    heads = (qkv if bias is None else qkv + bias).view(len(qkv), -1, head_dim)
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    written = slots >= 0
    page, offset = slots[written] // page_size, slots[written] % page_size
    k_pages[page, :, offset] = apply_rope_reference(k, cos, sin)[written].to(k_pages.dtype)
    v_pages[page, :, offset] = v[written].to(v_pages.dtype)
    return apply_rope_reference(q, cos, sin)


# Triton kernels


@jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    y,
    total,
    rstd,
    D,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    at = row.to(tl.int64) * D + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value = (value + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(
            total.dtype.element_ty
        )
        tl.store(total + at, value, mask=inside)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + EPS)
    normed = (value * scale).to(y.dtype.element_ty).to(tl.float32)
    tl.store(
        y + at,
        normed * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32),
        mask=inside,
    )
    tl.store(rstd + row, scale)


@jit
def _rms_norm_backward_kernel(
    grad_y,
    grad_total,
    total,
    weight,
    rstd,
    grad_x,
    grad_weight,
    T,
    D,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    first_row = program.to(tl.int64) * ROWS
    for i in tl.range(0, tl.minimum(ROWS, T - program * ROWS), num_stages=3):
        row = first_row + i
        at = row * D + column
        scale = tl.load(rstd + row)
        normed = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) * scale
        grad = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
        weight_sum += grad * normed
        grad *= gain
        grad = scale * (grad - normed * (tl.sum(grad * normed, 0) / D))
        if ADD:
            grad += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, grad, mask=inside)
    # One partial sum per program, added up afterwards in a fixed order: no atomics, so two runs agree bit for bit.
    tl.store(grad_weight + program.to(tl.int64) * D + column, weight_sum, mask=inside)


@jit
def _swiglu_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


@jit
def _swiglu_backward_kernel(gate_up, grad, grad_gate_up, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(
        grad_gate_up + at, upstream * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=inside
    )
    tl.store(grad_gate_up + at + width, upstream * gate * sigmoid, mask=inside)


@jit
def _rope_kernel(
    x,
    cos,
    sin,
    out,
    token_stride,
    head_stride,
    H,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SIGN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + token * HALF + column)
    s = tl.load(sin + token * HALF + column) * SIGN
    at = x + token * token_stride + head * head_stride + column
    first = tl.load(at, mask=head < H, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=head < H, other=0.0).to(tl.float32)
    to = out + token * H * 2 * HALF + head * 2 * HALF + column
    tl.store(to, first * c - second * s, mask=head < H)
    tl.store(to + HALF, second * c + first * s, mask=head < H)


@jit
def _qkv_rope_write_kernel(
    qkv,
    bias,
    cos,
    sin,
    k_pages,
    v_pages,
    slots,
    q,
    H,
    K,
    page_size,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One program per token, all its heads: q heads 0..H-1, k heads H..H+K-1, v heads H+K..H+2K-1."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = head < H + 2 * K
    at = head * 2 * HALF + column
    first = tl.load(qkv + token * (H + 2 * K) * 2 * HALF + at, mask=inside, other=0.0).to(
        tl.float32
    )
    second = tl.load(qkv + token * (H + 2 * K) * 2 * HALF + at + HALF, mask=inside, other=0.0).to(
        tl.float32
    )
    if BIAS:
        first = (
            (first + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32))
            .to(q.dtype.element_ty)
            .to(tl.float32)
        )
        second = (
            (second + tl.load(bias + at + HALF, mask=inside, other=0.0).to(tl.float32))
            .to(q.dtype.element_ty)
            .to(tl.float32)
        )
    rotated = head < H + K
    c = tl.where(rotated, tl.load(cos + token * HALF + column), 1.0)
    s = tl.where(rotated, tl.load(sin + token * HALF + column), 0.0)
    low, high = first * c - second * s, second * c + first * s
    tl.store(q + token * H * 2 * HALF + at, low, mask=head < H)
    tl.store(q + token * H * 2 * HALF + at + HALF, high, mask=head < H)
    slot = tl.load(slots + token)
    row = (slot // page_size) * K * page_size + slot % page_size
    k_at = (row + (head - H) * page_size) * 2 * HALF + column
    is_key = (head >= H) & rotated & (slot >= 0)
    tl.store(k_pages + k_at, low, mask=is_key)
    tl.store(k_pages + k_at + HALF, high, mask=is_key)
    v_at = (row + (head - H - K) * page_size) * 2 * HALF + column
    is_value = (head >= H + K) & inside & (slot >= 0)
    tl.store(v_pages + v_at, low, mask=is_value)
    tl.store(v_pages + v_at + HALF, high, mask=is_value)


# Launchers. Static choices: 4 warps per row up to a block of 2048 (16 values a thread), 8 above.

BACKWARD_ROWS = 16  # rows per program of the norm's backward: 512 programs at 8192 tokens; their partial sums are 1/16 of the traffic of one input
SWIGLU_BLOCK = 1024


def _warps(block):
    return 4 if block <= 2048 else 8


def _rms_norm_forward(x, residual, weight, eps):
    """(y, total, rstd [T]); total is x itself when there is no residual."""
    x = x.contiguous()
    total = x if residual is None else torch.empty_like(x)
    residual = x if residual is None else residual.contiguous()
    y, rstd = torch.empty_like(x), torch.empty(len(x), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    added = total is not x
    _rms_norm_kernel[(len(x),)](
        x,
        residual,
        weight,
        y,
        total,
        rstd,
        x.shape[1],
        EPS=eps,
        BLOCK=block,
        ADD=added,
        num_warps=_warps(block),
    )
    return y, total, rstd


def _rms_norm_backward(grad_y, grad_total, total, weight, rstd):
    """(gradient of the normalised sum [T, D], gradient of the weight [D])."""
    tokens, width = total.shape
    programs = triton.cdiv(tokens, BACKWARD_ROWS)
    grad_x = torch.empty_like(total)
    partial = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    added = grad_total is not None
    grad_total = grad_total.contiguous() if added else total
    block = triton.next_power_of_2(width)
    arguments = (
        grad_y.contiguous(),
        grad_total,
        total,
        weight,
        rstd,
        grad_x,
        partial,
        tokens,
        width,
    )
    _rms_norm_backward_kernel[(programs,)](
        *arguments, ROWS=BACKWARD_ROWS, BLOCK=block, ADD=added, num_warps=_warps(block)
    )
    return grad_x, partial.sum(0).to(weight.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, total, rstd = _rms_norm_forward(x, None, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return *_rms_norm_backward(grad_y, None, *ctx.saved_tensors), None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        y, total, rstd = _rms_norm_forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(
            False
        )  # the sum after the last layer has no user: None, not a tensor of zeros to read
        return y, total

    @staticmethod
    def backward(ctx, grad_y, grad_total):
        if grad_y is None:
            return grad_total, grad_total, None, None
        grad, grad_weight = _rms_norm_backward(grad_y, grad_total, *ctx.saved_tensors)
        return grad, grad, grad_weight, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return _swiglu_forward(gate_up)

    @staticmethod
    def backward(ctx, grad):
        return _swiglu_backward(*ctx.saved_tensors, grad.contiguous())


def _swiglu_forward(gate_up):
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    _swiglu_kernel[(tokens, triton.cdiv(width, SWIGLU_BLOCK))](
        gate_up, out, width, BLOCK=SWIGLU_BLOCK, num_warps=4
    )
    return out


def _swiglu_backward(gate_up, grad):
    tokens, width = grad.shape
    out = torch.empty_like(gate_up)
    _swiglu_backward_kernel[(tokens, triton.cdiv(width, SWIGLU_BLOCK))](
        gate_up, grad, out, width, BLOCK=SWIGLU_BLOCK, num_warps=4
    )
    return out


def _rotate(x, cos, sin, sign):
    tokens, heads, head_dim = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(tokens, heads, head_dim, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(heads)
    _rope_kernel[(tokens,)](
        x,
        cos,
        sin,
        out,
        x.stride(0),
        x.stride(1),
        heads,
        HEADS=padded,
        HALF=head_dim // 2,
        SIGN=sign,
        num_warps=4,
    )
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        return _rotate(grad, *ctx.saved_tensors, -1), None, None  # the inverse rotation


def _qkv_rope_write(qkv, bias, cos, sin, k_pages, v_pages, slots, num_heads):
    kv_heads, page_size, head_dim = k_pages.shape[1:]
    q = torch.empty(len(qkv), num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    padded = triton.next_power_of_2(num_heads + 2 * kv_heads)
    arguments = (
        qkv.contiguous(),
        qkv if bias is None else bias,
        cos,
        sin,
        k_pages,
        v_pages,
        slots,
        q,
        num_heads,
        kv_heads,
        page_size,
    )
    _qkv_rope_write_kernel[(len(qkv),)](
        *arguments, HEADS=padded, HALF=head_dim // 2, BIAS=bias is not None, num_warps=4
    )
    return q


def _fits(x, head_dim):
    return use_triton(x) and head_dim >= 2 and head_dim & (head_dim - 1) == 0


# Public functions


def rope_tables(positions, head_dim, theta):
    """Cosines and sines of the rotary embedding (RoFormer, arXiv 2104.09864, half-rotation as in Qwen2): two fp32 tensors [T, head_dim / 2].

    Angle j of position p is p * theta ** (-2 j / head_dim): position 1, head_dim 4, theta 10000 gives angles 1 and 0.01.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)[None, :]
    return angles.cos(), angles.sin()


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467). x [T, D], weight [D] -> [T, D]. Differentiable."""
    return _RmsNorm.apply(x, weight, eps) if use_triton(x) else rms_norm_reference(x, weight, eps)


def add_rms_norm(x, residual, weight, eps):
    """(rms_norm(residual + x), residual + x), both [T, D], in one pass over memory. Differentiable."""
    return (
        _AddRmsNorm.apply(x, residual, weight, eps)
        if use_triton(x)
        else add_rms_norm_reference(x, residual, weight, eps)
    )


def swiglu(gate_up):
    """silu(gate) * up (arXiv 2002.05202) of the fused projection [T, 2 I] (gate first) -> [T, I]. Differentiable."""
    return _Swiglu.apply(gate_up) if use_triton(gate_up) else swiglu_reference(gate_up)


def apply_rope(x, cos, sin):
    """Rotate x [T, H, hd] by tables cos, sin [T, hd / 2] (see `rope_tables`): halves (a, b) -> (a cos - b sin, b cos + a sin). Differentiable."""
    return _Rope.apply(x, cos, sin) if _fits(x, x.shape[2]) else apply_rope_reference(x, cos, sin)


def qkv_rope_write(qkv, bias, cos, sin, k_pages, v_pages, slots, num_heads):
    """Add bias, rotate q and k, write k and v into the cache, return q: the decode step between two matrix products. Not differentiable.

    qkv [T, (H + 2K) hd], bias the same width or None, cos and sin [T, hd / 2], k_pages and v_pages [pages, K, page_size, hd] (written in place),
    slots [T] int64: token t goes to page slots[t] // page_size, offset slots[t] % page_size; a negative slot writes nothing. Returns q [T, H, hd].
    """
    run = _qkv_rope_write if _fits(qkv, k_pages.shape[3]) else qkv_rope_write_reference
    return run(qkv, bias, cos, sin, k_pages, v_pages, slots, num_heads)

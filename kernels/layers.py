"""RMSNorm, "bias + RoPE", SwiGLU and the decode step's "bias + RoPE + page write", as row kernels.

In Triton on a GPU; on a CPU in C (native_layers.py), where there is a compiler.

Rounding rule, the same in sampler and trainer: arithmetic in fp32 (float64 stays float64), rounded
where Hugging Face Qwen2 rounds: after the residual sum, the bias, the norm (*before* its weight)
and the rotation. One difference: cos and sin stay fp32 here, theirs are rounded to bf16.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kernels import jit, native, native_layers, tl, triton, use_triton, wide
from kernels.rope import apply_rope_reference

# Rows per program of the norm's backward: 512 programs at 8192 tokens. Their partial sums are 1/16
# of the traffic of one input.
BACKWARD_ROWS = 16
SWIGLU_BLOCK = 1024  # columns per program, 8 values a thread


# ---- public functions ----


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467). Differentiable.

    x [T, D], weight [D] -> [T, D]. A row 3, 4 with weight 1: 0.849, 1.131.
    """
    if use_triton(x):
        return _RmsNorm.apply(x, weight, eps)
    if native.usable(x, x.shape[1]):
        return native_layers.RmsNorm.apply(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x, residual, weight, eps):
    """(rms_norm(residual + x), residual + x), both [T, D], in one pass. Differentiable."""
    if use_triton(x):
        return _AddRmsNorm.apply(x, residual, weight, eps)
    if native.usable(x, x.shape[1]):
        return native_layers.AddRmsNorm.apply(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def swiglu(gate_up):
    """silu(gate) * up (arXiv 2002.05202) of the fused projection. Differentiable.

    gate_up [T, 2 I], gate first -> [T, I]. Gate 1, up 2: 1.462.
    """
    if use_triton(gate_up):
        return _Swiglu.apply(gate_up)
    if native.usable(gate_up, gate_up.shape[1] // 2):
        return native_layers.Swiglu.apply(gate_up)
    return swiglu_reference(gate_up)


def rotated_qkv(qkv, bias, cos, sin, num_heads, kv_heads):
    """Add the bias, then rotate halves (a, b) of each head of q and k to (a cos - b sin, b cos + a
    sin). Differentiable.

    qkv [T, (H + 2K) hd]; bias of the same width, or None; cos, sin [T, hd / 2] of `rope_tables`.
    Returns q [T, H, hd], k [T, K, hd] and v [T, K, hd], tensors of their own.
    """
    arguments = (qkv, bias, cos, sin, num_heads, kv_heads)
    head_dim = qkv.shape[1] // (num_heads + 2 * kv_heads)
    if _fits(qkv, head_dim):
        return _RotatedQkv.apply(*arguments)
    if native.usable(qkv, head_dim):
        return native_layers.RotatedQkv.apply(*arguments)
    return rotated_qkv_reference(*arguments)


def qkv_rope_write(
    qkv,
    bias,
    cos,
    sin,
    k_pages,
    v_pages,
    slots,
    num_heads,
):
    """Add bias, rotate q and k, write k and v into the cache, return q. Not differentiable.

    The decode step between two matrix products.
    qkv [T, (H + 2K) hd]; bias of the same width, or None
    cos, sin [T, hd / 2]
    k_pages, v_pages [pages, K, page_size, hd], written in place
    slots [T] int64: token t goes to page slots[t] // page_size, offset slots[t] % page_size;
        a negative slot writes nothing
    Returns q [T, H, hd].
    """
    arguments = (qkv, bias, cos, sin, k_pages, v_pages, slots, num_heads)
    if not _fits(qkv, k_pages.shape[3]):
        return qkv_rope_write_reference(*arguments)
    return _qkv_rope_write(*arguments)


def _fits(x, head_dim):
    is_power_of_two = head_dim >= 2 and head_dim & (head_dim - 1) == 0
    return use_triton(x) and is_power_of_two


# ---- torch references ----


def rms_norm_reference(x, weight, eps):
    """`rms_norm` in torch."""
    value = wide(x)
    mean_square = value.pow(2).mean(-1, keepdim=True)
    normed = value * torch.rsqrt(mean_square + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm_reference(x, residual, weight, eps):
    """`add_rms_norm` in torch."""
    total = residual + x
    return rms_norm_reference(total, weight, eps), total


def swiglu_reference(gate_up):
    """`swiglu` in torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(wide(gate)) * wide(up)).to(gate_up.dtype)


def rotated_qkv_reference(qkv, bias, cos, sin, num_heads, kv_heads):
    """`rotated_qkv` in torch."""
    if bias is not None:
        qkv = qkv + bias
    by_head = qkv.view(len(qkv), num_heads + 2 * kv_heads, -1)
    q, k, v = by_head.split((num_heads, kv_heads, kv_heads), dim=1)
    return apply_rope_reference(q, cos, sin), apply_rope_reference(k, cos, sin), v


def qkv_rope_write_reference(
    qkv,
    bias,
    cos,
    sin,
    k_pages,
    v_pages,
    slots,
    num_heads,
):
    """`qkv_rope_write` in torch."""
    kv_heads, page_size, head_dim = k_pages.shape[1:]
    if bias is not None:
        qkv = qkv + bias
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)

    written = slots >= 0
    page = slots[written] // page_size
    offset = slots[written] % page_size
    k_pages[page, :, offset] = apply_rope_reference(k, cos, sin)[written].to(k_pages.dtype)
    v_pages[page, :, offset] = v[written].to(v_pages.dtype)
    return apply_rope_reference(q, cos, sin)


# ---- RMSNorm on Triton ----


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, total, rstd = _rms_norm_forward(x, None, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        grad_x, grad_weight = _rms_norm_backward(grad_y, None, *ctx.saved_tensors)
        return grad_x, grad_weight, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        y, total, rstd = _rms_norm_forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        # The sum after the last layer has no user: None, not a tensor of zeros to read.
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx, grad_y, grad_total):
        if grad_y is None:
            return grad_total, grad_total, None, None
        grad, grad_weight = _rms_norm_backward(grad_y, grad_total, *ctx.saved_tensors)
        return grad, grad, grad_weight, None


def _rms_norm_forward(x, residual, weight, eps):
    """(y [T, D], total [T, D], rstd [T]); total is x itself when there is no residual."""
    x = x.contiguous()
    tokens, width = x.shape
    added = residual is not None
    total = torch.empty_like(x) if added else x
    residual = residual.contiguous() if added else x
    y = torch.empty_like(x)
    rstd = torch.empty(tokens, dtype=torch.float32, device=x.device)

    grid = (tokens,)
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[grid](
        x,
        residual,
        weight,
        y,
        total,
        rstd,
        width,
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

    grid = (programs,)
    block = triton.next_power_of_2(width)
    _rms_norm_backward_kernel[grid](
        grad_y.contiguous(),
        grad_total.contiguous() if added else total,
        total,
        weight,
        rstd,
        grad_x,
        partial,
        tokens,
        width,
        ROWS=BACKWARD_ROWS,
        BLOCK=block,
        ADD=added,
        num_warps=_warps(block),
    )
    return grad_x, partial.sum(0).to(weight.dtype)


def _warps(block):
    """4 warps per row up to a block of 2048 (16 values a thread), 8 above."""
    return 4 if block <= 2048 else 8


@jit
def _rms_norm_kernel(
    x,  # [T, D]
    residual,  # [T, D], read only if ADD
    weight,  # [D]
    y,  # [T, D]
    total,  # [T, D], written only if ADD
    rstd,  # [T], for the backward
    D,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    at = row.to(tl.int64) * D + column

    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        other = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        value = (value + other).to(total.dtype.element_ty)
        tl.store(total + at, value, mask=inside)
        value = value.to(tl.float32)

    mean_square = tl.sum(value * value, 0) / D
    scale = tl.rsqrt(mean_square + EPS)
    normed = (value * scale).to(y.dtype.element_ty).to(tl.float32)

    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, normed * gain, mask=inside)
    tl.store(rstd + row, scale)


@jit
def _rms_norm_backward_kernel(
    grad_y,  # [T, D]
    grad_total,  # [T, D], read only if ADD
    total,  # [T, D]
    weight,  # [D]
    rstd,  # [T]
    grad_x,  # [T, D]
    grad_weight,  # [programs, D]
    T,
    D,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """ROWS rows, one after the other, with their part of the weight's gradient."""
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
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        normed = value * scale
        grad = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)

        weight_sum += grad * normed
        grad *= gain
        projection = tl.sum(grad * normed, 0) / D
        grad = scale * (grad - normed * projection)
        if ADD:
            grad += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, grad, mask=inside)

    # One partial sum per program, added up afterwards in a fixed order: no atomics, so two runs
    # agree bit for bit.
    tl.store(grad_weight + program.to(tl.int64) * D + column, weight_sum, mask=inside)


# ---- SwiGLU on Triton ----


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return _swiglu_forward(gate_up)

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        return _swiglu_backward(gate_up, grad.contiguous())


def _swiglu_forward(gate_up):
    tokens = len(gate_up)
    width = gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (tokens, triton.cdiv(width, SWIGLU_BLOCK))
    _swiglu_kernel[grid](gate_up, out, width, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return out


def _swiglu_backward(gate_up, grad):
    tokens, width = grad.shape
    out = torch.empty_like(gate_up)
    grid = (tokens, triton.cdiv(width, SWIGLU_BLOCK))
    _swiglu_backward_kernel[grid](gate_up, grad, out, width, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return out


@jit
def _swiglu_kernel(
    gate_up,  # [T, 2 * width]
    out,  # [T, width]
    width,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column

    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + column, result, mask=inside)


@jit
def _swiglu_backward_kernel(
    gate_up,  # [T, 2 * width]
    grad,  # [T, width]
    grad_gate_up,  # [T, 2 * width]
    width,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column

    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)

    sigmoid = tl.sigmoid(gate)
    grad_gate = upstream * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = upstream * gate * sigmoid
    tl.store(grad_gate_up + at, grad_gate, mask=inside)
    tl.store(grad_gate_up + at + width, grad_up, mask=inside)


# ---- Bias and RoPE on Triton ----


class _RotatedQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias, cos, sin, num_heads, kv_heads):
        ctx.save_for_backward(cos, sin)
        return _rotated_qkv(qkv.contiguous(), bias, cos, sin, num_heads, kv_heads)

    @staticmethod
    def backward(ctx, *gradients):
        gradients = [gradient.contiguous() for gradient in gradients]
        trains_bias = ctx.needs_input_grad[1]
        grad_qkv, grad_bias = _rotated_qkv_backward(*gradients, *ctx.saved_tensors, trains_bias)
        return grad_qkv, grad_bias, None, None, None, None


def _rotated_qkv(qkv, bias, cos, sin, num_heads, kv_heads):
    tokens = len(qkv)
    heads = num_heads + 2 * kv_heads
    head_dim = qkv.shape[1] // heads
    q, k, v = (qkv.new_empty(tokens, count, head_dim) for count in (num_heads, kv_heads, kv_heads))

    grid = (tokens,)
    _rotated_qkv_kernel[grid](
        qkv,
        qkv if bias is None else bias,
        cos,
        sin,
        q,
        k,
        v,
        num_heads,
        kv_heads,
        HEADS=triton.next_power_of_2(heads),
        HALF=head_dim // 2,
        BIAS=bias is not None,
        num_warps=4,
    )
    return q, k, v


def _rotated_qkv_backward(grad_q, grad_k, grad_v, cos, sin, trains_bias):
    """(gradient of qkv [T, (H + 2K) hd], of the bias or None)."""
    tokens, num_heads, head_dim = grad_q.shape
    kv_heads = grad_k.shape[1]
    heads = num_heads + 2 * kv_heads
    block = triton.next_power_of_2(heads)
    programs = triton.cdiv(tokens, BACKWARD_ROWS)
    grad_qkv = grad_q.new_empty(tokens, heads * head_dim)
    partial = grad_q.new_empty(programs, heads * head_dim, dtype=torch.float32)

    grid = (programs,)
    _rotated_qkv_backward_kernel[grid](
        grad_q,
        grad_k,
        grad_v,
        cos,
        sin,
        grad_qkv,
        partial,
        tokens,
        num_heads,
        kv_heads,
        ROWS=BACKWARD_ROWS,
        HEADS=block,
        HALF=head_dim // 2,
        BIAS=trains_bias,
        num_warps=_warps(block * head_dim),
    )
    grad_bias = partial.sum(0).to(grad_q.dtype) if trains_bias else None
    return grad_qkv, grad_bias


@jit
def _rotated_heads(
    qkv,  # [T, H + 2K, 2 * HALF]
    bias,  # [H + 2K, 2 * HALF], read only if BIAS
    cos,  # [T, HALF]
    sin,
    q,  # of the dtype to which the sum is rounded
    token,
    H,
    K,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Both halves of a token's heads after bias and rotation, [HEADS, HALF] each.

    q heads are 0..H-1, k heads H..H+K-1, v heads the rest.
    """
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = head < H + 2 * K
    at = head * 2 * HALF + column

    source = qkv + token * (H + 2 * K) * 2 * HALF
    first = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        # Rounded after the sum, as Hugging Face does.
        first += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
        first = first.to(q.dtype.element_ty).to(tl.float32)
        second += tl.load(bias + at + HALF, mask=inside, other=0.0).to(tl.float32)
        second = second.to(q.dtype.element_ty).to(tl.float32)

    # v is turned by an angle of 0.
    rotated = head < H + K
    c = tl.where(rotated, tl.load(cos + token * HALF + column), 1.0)
    s = tl.where(rotated, tl.load(sin + token * HALF + column), 0.0)
    return first * c - second * s, second * c + first * s


@jit
def _rotated_qkv_kernel(
    qkv,  # [T, H + 2K, 2 * HALF]
    bias,  # [H + 2K, 2 * HALF], read only if BIAS
    cos,  # [T, HALF]
    sin,
    q,  # [T, H, 2 * HALF]
    k,  # [T, K, 2 * HALF]
    v,
    H,
    K,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One program per token, all its heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    at = head * 2 * HALF + column
    low, high = _rotated_heads(qkv, bias, cos, sin, q, token, H, K, HEADS, HALF, BIAS)

    q_at = q + token * H * 2 * HALF + at
    tl.store(q_at, low, mask=head < H)
    tl.store(q_at + HALF, high, mask=head < H)

    k_at = k + token * K * 2 * HALF + at - H * 2 * HALF
    is_key = (head >= H) & (head < H + K)
    tl.store(k_at, low, mask=is_key)
    tl.store(k_at + HALF, high, mask=is_key)

    v_at = v + token * K * 2 * HALF + at - (H + K) * 2 * HALF
    is_value = (head >= H + K) & (head < H + 2 * K)
    tl.store(v_at, low, mask=is_value)
    tl.store(v_at + HALF, high, mask=is_value)


@jit
def _rotated_qkv_backward_kernel(
    grad_q,  # [T, H, 2 * HALF]
    grad_k,  # [T, K, 2 * HALF]
    grad_v,
    cos,  # [T, HALF]
    sin,
    grad_qkv,  # [T, H + 2K, 2 * HALF]
    grad_bias,  # [programs, H + 2K, 2 * HALF], written only if BIAS
    T,
    H,
    K,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BIAS: tl.constexpr,
):
    """ROWS tokens, one after the other: the inverse rotation, and their part of the bias's."""
    program = tl.program_id(0)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = head < H + 2 * K
    rotated = head < H + K
    at = head * 2 * HALF + column
    low_sum = tl.zeros((HEADS, HALF), dtype=tl.float32)
    high_sum = tl.zeros((HEADS, HALF), dtype=tl.float32)
    first_row = program.to(tl.int64) * ROWS

    for i in range(0, tl.minimum(ROWS, T - program * ROWS)):
        token = first_row + i
        # Where this head's gradient lies: each of the three is its own tensor.
        q_at = grad_q + token * H * 2 * HALF + at
        k_at = grad_k + token * K * 2 * HALF + at - H * 2 * HALF
        v_at = grad_v + token * K * 2 * HALF + at - (H + K) * 2 * HALF
        source = tl.where(head < H, q_at, tl.where(rotated, k_at, v_at))
        low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)

        c = tl.where(rotated, tl.load(cos + token * HALF + column), 1.0)
        s = tl.where(rotated, tl.load(sin + token * HALF + column), 0.0)
        first = low * c + high * s
        second = high * c - low * s
        target = grad_qkv + token * (H + 2 * K) * 2 * HALF + at
        tl.store(target, first, mask=inside)
        tl.store(target + HALF, second, mask=inside)
        if BIAS:
            low_sum += first
            high_sum += second

    # One partial sum per program, added up afterwards in a fixed order, as the norm's.
    if BIAS:
        target = grad_bias + program.to(tl.int64) * (H + 2 * K) * 2 * HALF + at
        tl.store(target, low_sum, mask=inside)
        tl.store(target + HALF, high_sum, mask=inside)


# ---- Bias, RoPE and page write on Triton ----


def _qkv_rope_write(
    qkv,
    bias,
    cos,
    sin,
    k_pages,
    v_pages,
    slots,
    num_heads,
):
    tokens = len(qkv)
    kv_heads, page_size, head_dim = k_pages.shape[1:]
    q = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)

    grid = (tokens,)
    _qkv_rope_write_kernel[grid](
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
        HEADS=triton.next_power_of_2(num_heads + 2 * kv_heads),
        HALF=head_dim // 2,
        BIAS=bias is not None,
        num_warps=4,
    )
    return q


@jit
def _qkv_rope_write_kernel(
    qkv,  # [T, H + 2K, 2 * HALF]
    bias,  # [H + 2K, 2 * HALF], read only if BIAS
    cos,  # [T, HALF]
    sin,
    k_pages,  # [pages, K, page_size, 2 * HALF]
    v_pages,
    slots,  # [T]
    q,  # [T, H, 2 * HALF]
    H,
    K,
    page_size,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One program per token, all its heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    at = head * 2 * HALF + column
    low, high = _rotated_heads(qkv, bias, cos, sin, q, token, H, K, HEADS, HALF, BIAS)

    q_at = q + token * H * 2 * HALF + at
    tl.store(q_at, low, mask=head < H)
    tl.store(q_at + HALF, high, mask=head < H)

    # Row of the pages, of KV head 0; those of one page are page_size apart.
    slot = tl.load(slots + token)
    row = (slot // page_size) * K * page_size + slot % page_size
    k_at = (row + (head - H) * page_size) * 2 * HALF + column
    is_key = (head >= H) & (head < H + K) & (slot >= 0)
    tl.store(k_pages + k_at, low, mask=is_key)
    tl.store(k_pages + k_at + HALF, high, mask=is_key)

    v_at = (row + (head - H - K) * page_size) * 2 * HALF + column
    is_value = (head >= H + K) & (head < H + 2 * K) & (slot >= 0)
    tl.store(v_pages + v_at, low, mask=is_value)
    tl.store(v_pages + v_at + HALF, high, mask=is_value)

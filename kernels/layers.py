"""RMSNorm, RoPE, SwiGLU and the decode step's "bias + RoPE + page write", as row kernels.

Rounding rule, the same in sampler and trainer: arithmetic in fp32 (float64 stays float64), one rounding at the end; RMSNorm rounds *before* the
weight, as Hugging Face Qwen2 does. In fp32 this is Hugging Face's arithmetic; in bf16 it keeps more bits than theirs (fp32 cos and sin).
"""

import torch
from torch.nn import functional as F


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_reference(x, weight, eps):
    wide = _wide(x)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm_reference(x, residual, weight, eps):
    total = residual + x
    return rms_norm_reference(total, weight, eps), total


def swiglu_reference(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(_wide(gate)) * _wide(up)).to(gate_up.dtype)


def apply_rope_reference(x, cos, sin):
    first, second = _wide(x).chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def qkv_rope_write_reference(qkv, bias, cos, sin, k_pages, v_pages, slots, num_heads):
    kv_heads, page_size, head_dim = k_pages.shape[1:]
    heads = (_wide(qkv) if bias is None else _wide(qkv) + _wide(bias)).view(len(qkv), -1, head_dim)
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    written = slots >= 0
    page, offset = slots[written] // page_size, slots[written] % page_size
    k_pages[page, :, offset] = apply_rope_reference(k, cos, sin)[written].to(k_pages.dtype)
    v_pages[page, :, offset] = v[written].to(v_pages.dtype)
    return apply_rope_reference(q, cos, sin).to(qkv.dtype)


def rope_tables(positions, head_dim, theta):
    """Cosines and sines of the rotary embedding (RoFormer, arXiv 2104.09864, half-rotation as in Qwen2): two fp32 tensors [T, head_dim / 2].

    Angle j of position p is p * theta ** (-2 j / head_dim): position 1, head_dim 4, theta 10000 gives angles 1 and 0.01.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)[None, :]
    return angles.cos(), angles.sin()


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467). x [T, D], weight [D] -> [T, D]. Differentiable."""
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x, residual, weight, eps):
    """(rms_norm(residual + x), residual + x), both [T, D], in one pass over memory. Differentiable."""
    return add_rms_norm_reference(x, residual, weight, eps)


def swiglu(gate_up):
    """silu(gate) * up (arXiv 2002.05202) of the fused projection [T, 2 I] (gate first) -> [T, I]. Differentiable."""
    return swiglu_reference(gate_up)


def apply_rope(x, cos, sin):
    """Rotate x [T, H, hd] by tables cos, sin [T, hd / 2] (see `rope_tables`): halves (a, b) -> (a cos - b sin, b cos + a sin). Differentiable."""
    return apply_rope_reference(x, cos, sin)


def qkv_rope_write(qkv, bias, cos, sin, k_pages, v_pages, slots, num_heads):
    """Add bias, rotate q and k, write k and v into the cache, return q: the decode step between two matrix products. Not differentiable.

    qkv [T, (H + 2K) hd], bias the same width or None, cos and sin [T, hd / 2], k_pages and v_pages [pages, K, page_size, hd] (written in place),
    slots [T] int64: token t goes to page slots[t] // page_size, offset slots[t] % page_size; a negative slot writes nothing. Returns q [T, H, hd].
    """
    return qkv_rope_write_reference(qkv, bias, cos, sin, k_pages, v_pages, slots, num_heads)

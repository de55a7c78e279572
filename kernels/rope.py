"""The rotary embedding (RoFormer, arXiv 2104.09864; halves as in Qwen2)."""

import torch

from kernels import wide


def rope_tables(positions, head_dim, theta):
    """Cosines and sines of the rotary embedding.

    positions [T]. Returns two fp32 tensors [T, head_dim / 2].
    Angle j of position p is p * theta ** (-2 j / head_dim): position 1, head_dim 4, theta 10000
    gives angles 1 and 0.01.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = 1.0 / theta**exponents
    angles = positions.float()[:, None] * frequencies[None, :]
    return angles.cos(), angles.sin()


def apply_rope_reference(x, cos, sin):
    """Each head of x [T, H, hd] rotated by its token's angles, cos and sin [T, hd / 2]."""
    first, second = wide(x).chunk(2, dim=-1)
    cos = cos[:, None, :]
    sin = sin[:, None, :]
    low = first * cos - second * sin
    high = second * cos + first * sin
    return torch.cat((low, high), dim=-1).to(x.dtype)

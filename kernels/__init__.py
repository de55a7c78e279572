"""Five kernel families. Each file: the torch reference (the definition of right), the Triton kernel, one public function that picks by device."""

import os

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # macOS, Windows: the torch references are all there is
    triton = tl = TensorDescriptor = None

jit = triton.jit if triton else lambda function: function


def use_triton(x):
    """True for a CUDA tensor, unless the environment says RARECODE_TRITON=0 (then the torch references run; turn CUDA graphs off with it)."""
    return x.is_cuda and triton is not None and os.environ.get("RARECODE_TRITON", "1") != "0"


def architecture(x):
    """90 where tensor descriptors become TMA (Hopper and later; the interpreter too), else 80."""
    return 90 if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] >= 9 else 80


def wide(x):
    """fp32, or float64 for float64: the precision every kernel and reference computes in."""
    return x if x.dtype == torch.float64 else x.float()

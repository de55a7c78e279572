"""Kernel families. Each file: its public functions, which pick by device; the torch references,
which define what is right; the launchers of the Triton kernels; and the kernels.
"""

import os
from functools import partial

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # macOS, Windows: the torch references are all there is
    triton = tl = TensorDescriptor = None


def jit(function=None, **options):
    """triton.jit, or the function itself where there is no Triton.

    Triton compiles a kernel anew for an integer that is 1 or a multiple of 16 and for a pointer
    that is not aligned to 16 bytes, and each form may sum in another order. Where a row's bits may
    not depend on its batch (runtime/exact.py), the integers that follow the batch are named in
    `do_not_specialize`, pointers into the middle of one in `do_not_specialize_on_alignment`.
    """
    if function is None:
        return partial(jit, **options)
    return triton.jit(function, **options) if triton else function


def use_triton(x):
    """True for a CUDA tensor.

    With RARECODE_TRITON=0 in the environment the torch references run instead; they look at
    lengths on the host, so turn CUDA graphs off as well.
    """
    return x.is_cuda and triton is not None and os.environ.get("RARECODE_TRITON", "1") != "0"


def architecture(x):
    """90 where tensor descriptors become TMA (Hopper and later; the interpreter too), else 80."""
    if not x.is_cuda:
        return 90
    major, _minor = torch.cuda.get_device_capability(x.device)
    return 90 if major >= 9 else 80


def wide(x):
    """fp32, or float64 for float64: the precision every kernel and reference computes in."""
    return x if x.dtype == torch.float64 else x.float()

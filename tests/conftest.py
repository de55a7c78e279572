"""Shared set-up: the repository on the path, Triton in its interpreter where there is no GPU."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import runtime.cpu  # noqa: F401 (before torch)

# A judge that fails on a sample is a bug to see here, in the programs that tests start too.
os.environ.setdefault("RARECODE_FAULTS", "raise")

# isort: split

import pytest
import torch

if not torch.cuda.is_available():
    # The @triton.jit decorator reads this at import time, so it must be set before any kernel
    # module is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """Folder of a run of four steps that nothing interrupts."""
    from runs import SMALL, whole_run

    return whole_run(tmp_path_factory.mktemp("straight"), *SMALL, name="straight")


@pytest.fixture
def poisoned():
    """What torch.empty hands out is NaN (floats) or the maximum (integers): a kernel that leaves a
    hole, or reads one, fails."""
    torch.manual_seed(0)
    was = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # a run in this process unsets it
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)
    torch.utils.deterministic.fill_uninitialized_memory = filled

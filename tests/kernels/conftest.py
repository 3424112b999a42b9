"""Kernel tests: on the GPU where there is one, else in Triton's interpreter (chosen in `tests/conftest.py`)."""

from __future__ import annotations

import pytest
import torch

from cosmos_kernels import triton_support

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# These modules import Triton where they begin, so without it they cannot even be collected.
WHY_NO_TRITON = triton_support.why_missing()
collect_ignore_glob = [] if WHY_NO_TRITON is None else ["test_*_triton.py"]


def pytest_report_header() -> str:
    if WHY_NO_TRITON is not None:
        return f"Triton kernels: NOT tested: {WHY_NO_TRITON}"
    return f"Triton kernels: {'interpreted' if triton_support.INTERPRETED else 'compiled'}, on {DEVICE}"


@pytest.fixture
def device() -> str:
    """Where kernel tests put their tensors: "cuda", or "cpu" under the interpreter."""
    return DEVICE

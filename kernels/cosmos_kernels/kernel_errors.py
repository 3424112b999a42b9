"""A kernel that Triton cannot make for the GPU at hand, told on one line.

It shows at the first launch, for a shape, a dtype and a GPU that nobody has tried: the compiler gives up, the assembler
does not know the GPU, a block wants more shared memory than there is, the machine has no C compiler for the host side.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands know this error without loading torch
    import torch

COMPILER_MODULES = ("triton.compiler", "triton.backends.nvidia.compiler", "triton.runtime.build")
DRIVER_ERROR = "Triton Error [CUDA]"  # of a launch, or of an earlier one: no fault of the compiler
MAX_REASON = 300  # characters


class KernelError(ValueError):
    """A Triton kernel that cannot be made for this GPU; another backend can take its place."""


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Launches kernels on `device`; those that cannot be made raise KernelError instead of what Triton raises."""
    try:
        yield
    except Exception as error:
        reason = why_not_made(error)
        if reason is None:
            raise
        raise KernelError(f"Triton makes no kernel for {_name(device)}: {reason}; ask for another backend") from error


def why_not_made(error: BaseException) -> str | None:
    """What Triton's compiler has against a kernel, on one line; None where `error` is of something else."""
    from triton.errors import TritonError

    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    compiling = any(module.startswith(COMPILER_MODULES) for module in modules)
    if not isinstance(error, TritonError) and (not compiling or str(error).startswith(DRIVER_ERROR)):
        return None
    while error.__cause__ is not None:  # of a function in a kernel, the caller's error says where, the last one what
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"[:MAX_REASON]


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"

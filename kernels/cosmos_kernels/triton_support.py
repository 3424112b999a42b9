"""What every Triton module of this package needs: can Triton run here, on these tensors, and how bf16 must be treated.

Imports no Triton itself, so that asking costs nothing on a machine without a GPU.

Triton runs a kernel on a GPU, or, with TRITON_INTERPRET=1 set before it is imported, in its interpreter on CPU
tensors: slow (0.7 ms a program), for tests only. The interpreter keeps bf16 as raw 16-bit integers, so arithmetic on
it is meaningless, and it truncates where it stores bf16. Kernels therefore take `UPCAST: tl.constexpr` and convert
what they load to fp32 where it is set; launchers pass `upcast(dtype)`, which is False on a GPU.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cosmos_kernels.kernel_errors import compiling

MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)
BLACKWELL, BLACKWELL_TRITON = 10, (3, 9)  # major compute capability, and the first Triton known to compile all for it
INTERPRETER_TRITON, NEW_NUMPY = (3, 7), (2, 4)  # from this Triton on, the interpreter takes this numpy too
ARCHITECTURES = (80, 90, 100)  # compute capability times ten: A100, H100/H200, B200
# Dynamic shared memory a block may ask for, in bytes. A10, L4, L40S and RTX 4090 (86, 89) have the least.
MAX_SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}

# As Triton reads the variable; it looks when a kernel is decorated, hence at the import of the module that holds it.
INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")

# Fused multiply-add, with which the kernels were compiled ahead: Triton 3.9 warns that it will ask, 3.10 leaves it out.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@dataclass(frozen=True, kw_only=True)
class AheadCase:
    """One specialisation of a kernel that is compiled without a GPU, for its registers, shared memory and spills.

    Choose what the launcher really passes for a large input of the published model: a specialisation nobody launches
    measures nothing.

    name: unique in its module, for people and for the table of resources, such as "backward/D512/fp16".
    kernel: the `@triton.jit` function.
    signature: Triton type of every argument that is not a constexpr: "*fp16", "*fp32", "i32", "i64", "fp32", ...
    constexprs: value of every `tl.constexpr` argument (and of arguments that are None or 1 at launch).
    divisible_by_16: integer arguments that are multiples of 16 at launch (strides, sizes); pointers always are.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible_by_16: tuple[str, ...] = ()
    archs: tuple[int, ...] = ARCHITECTURES


@functools.cache
def why_missing() -> str | None:
    """None where Triton kernels can run on this machine, else the reason."""
    if not INTERPRETED:
        if not torch.cuda.is_available():
            return "no CUDA device"
        capability = torch.cuda.get_device_capability()
        if capability < MIN_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]}, it needs 8.0 or newer"
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'cosmos-fast[triton]')"
    try:
        import triton
    except Exception as error:  # a broken installation raises anything
        return f"triton does not import: {type(error).__name__}: {error}"
    if _release(triton.__version__) < MIN_TRITON:
        return f"triton {triton.__version__} is too old, it needs {MIN_TRITON[0]}.{MIN_TRITON[1]} or newer"
    return _why_no_interpreter(triton.__version__) if INTERPRETED else why_no_compiler()


def _why_no_interpreter(triton_version: str) -> str | None:
    """The interpreter computes with numpy; that of Triton 3.6 makes integers of arrays, which numpy 2.4 refuses."""
    numpy_version = version("numpy")
    if _release(triton_version) < INTERPRETER_TRITON and _release(numpy_version) >= NEW_NUMPY:
        return f"triton {triton_version} interprets kernels with numpy before 2.4 only, here is {numpy_version}"
    return None


def why_no_compiler() -> str | None:
    """What Triton misses to build the host side of its kernels, at the first launch of each; None for nothing."""
    if named := os.environ.get("CC"):  # it tries no other one then
        return None if shutil.which(named) else f"the C compiler CC={named} is not found"
    if shutil.which("gcc") or shutil.which("clang"):
        return None
    return "no C compiler to build the host side of its kernels (gcc or clang; CC names another one)"


@functools.cache
def why_missing_on_blackwell() -> str | None:
    """`why_missing`, for kernels that not every Triton from MIN_TRITON on compiles for compute capability 10.

    Triton 3.6 fails there on some of the products whose results stay in registers (docs/kernel_resources.md); it would
    show at the first launch, in the middle of a step.
    """
    reason = why_missing()
    if reason is not None or INTERPRETED or torch.cuda.get_device_capability()[0] != BLACKWELL:
        return reason
    import triton

    if _release(triton.__version__) >= BLACKWELL_TRITON:
        return None
    wanted = "{}.{}".format(*BLACKWELL_TRITON)
    return f"triton {triton.__version__} does not compile it for compute capability 10, it needs {wanted} or newer"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def why_not_on(*tensors: Tensor) -> str | None:
    """None where Triton can reach these tensors: all on one CUDA device, or on the CPU if interpreted."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"its tensors lie on several devices: {', '.join(sorted(str(device) for device in devices))}"
    wanted = "cpu" if INTERPRETED else "cuda"
    for device in devices:
        if device.type != wanted and not (INTERPRETED and device.type == "cuda"):
            return f"it runs on {wanted} tensors, these are on {device}"
    return None


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Dynamic shared memory that a block may ask for on this device; as on Hopper in the interpreter."""
    if device.type != "cuda":
        return MAX_SHARED_BYTES[90]
    properties = torch.cuda.get_device_properties(device)
    known = MAX_SHARED_BYTES.get(10 * properties.major + properties.minor, min(MAX_SHARED_BYTES.values()))
    return int(getattr(properties, "shared_memory_per_block_optin", known))  # torch 2.6 does not tell


def upcast(dtype: torch.dtype) -> bool:
    """Whether a kernel must convert this dtype to fp32 right after loading, and store fp32 for torch to round."""
    return INTERPRETED and dtype == torch.bfloat16


@contextmanager
def launch_device(tensor: Tensor) -> Iterator[None]:
    """Makes the tensor's device current while a kernel is launched: Triton launches on the current one.

    Raises:
        KernelError: Triton cannot make the kernel for this device.
    """
    current = torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()
    with current, nullcontext() if INTERPRETED else compiling(tensor.device):
        yield

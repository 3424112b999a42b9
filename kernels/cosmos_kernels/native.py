"""Loader of the C++/CUDA libraries of csrc/, through ctypes.

Libraries lie in `_lib/` beside this file, where setup.py puts them; one that is missing, stale or broken is a reason
in words (`why_missing`), never an exception at import. Each operation's launchers stand in a module of their own
(`<operation>_native.py`, `<operation>_cuda.py`) and take their C functions from `function`. A call costs a few
microseconds.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch  # before the libraries: they then share the OpenMP runtime, and its threads, with torch
from torch import Tensor

ABI_VERSION = 8  # COSMOS_ABI_VERSION of csrc/cosmos.h
LIBRARY_DIR = Path(__file__).parent / "_lib"
LIBRARIES = {"cpu": "libcosmos_cpu.so", "cuda": "libcosmos_cuda.so"}
_MEND = "reinstall with `pip install -e .`"


@functools.cache
def _load(kind: str) -> ctypes.CDLL | str:
    """The library of that kind, or the reason why there is none."""
    path = LIBRARY_DIR / LIBRARIES[kind]
    if not path.exists():
        return _build_note(kind)
    try:
        library = ctypes.CDLL(str(path))
        library.cosmos_abi_version.restype = ctypes.c_int32
        found = library.cosmos_abi_version()
    except (OSError, AttributeError) as error:
        return f"{path.name} does not load ({error}): {_MEND}"
    if found != ABI_VERSION:
        return f"{path.name} has interface version {found}, this code wants {ABI_VERSION}: {_MEND}"
    return library


def _build_note(kind: str) -> str:
    """Why the build left the library out, as setup.py wrote it down."""
    try:
        note = json.loads((LIBRARY_DIR / "build.json").read_text())[kind]
    except (OSError, ValueError, KeyError):
        return f"not built: {_MEND}"
    return (
        f"not built: {note}; to change that, {_MEND}"
        if note != "built"
        else f"built, but {LIBRARIES[kind]} is gone: {_MEND}"
    )


def why_missing(kind: str) -> str | None:
    """None where the library ("cpu" or "cuda") is loaded, else why it is not."""
    found = _load(kind)
    return found if isinstance(found, str) else None


@functools.cache
def why_no_gpu() -> str | None:
    """None where the CUDA library is loaded and holds code for this machine's GPU, else why its kernels cannot run."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    reason = why_missing("cuda")
    if reason is not None:
        return reason
    major, minor = torch.cuda.get_device_capability()
    held = cuda_architectures()
    # Code for 8.0 runs on 8.6; from 9.0 on it uses what one capability alone has (sm_90a).
    if any(arch == (major, minor) or (arch[0] == major < 9 and arch[1] <= minor) for arch in held):
        return None
    names = " and ".join(f"{arch[0]}.{arch[1]}" for arch in held)
    return f"compute capability {major}.{minor}, {LIBRARIES['cuda']} has code for {names}"


def cuda_architectures() -> list[tuple[int, int]]:
    """Compute capabilities that the loaded CUDA library has machine code for."""
    text = function("cuda", "cosmos_cuda_architectures", [], ctypes.c_char_p)().decode()
    return [divmod(int(number) // 10, 10) for number in text.split(",")]


def function(kind: str, name: str, argtypes: Sequence[Any], restype: Any) -> Callable[..., Any]:
    """The C function of that name in the library "cpu" or "cuda", with its signature set.

    The library keeps what it has looked up: later calls cost 0.3 us. Raises RuntimeError where the library is missing
    (with the reason of `why_missing`) or has no such function.
    """
    library = _load(kind)
    if isinstance(library, str):
        raise RuntimeError(f"native library {kind!r}: {library}")
    try:
        found = getattr(library, name)
    except AttributeError as error:
        raise RuntimeError(f"native library {kind!r}: {error}: {_MEND}") from None
    if found.argtypes is None:
        found.argtypes, found.restype = list(argtypes), restype
    return found


def cpu_features() -> str:
    """What the loaded CPU library uses, for people: instruction set and threading."""
    openmp = function("cpu", "cosmos_cpu_openmp", [], ctypes.c_int32)()
    isa = function("cpu", "cosmos_cpu_isa", [], ctypes.c_char_p)()
    return f"{isa.decode()}, {'OpenMP' if openmp else 'one thread: built without OpenMP'}"


def cuda_error(status: int) -> str:
    """A status of the CUDA library in words: its own negative codes, or the CUDA runtime's."""
    return function("cuda", "cosmos_cuda_error", [ctypes.c_int32], ctypes.c_char_p)(status).decode()


def run_on_stream(call: Callable[..., int], tensor: Tensor, *arguments: Any) -> None:
    """`call(*arguments, stream)` on the device and the current stream of `tensor`.

    Raises RuntimeError with the CUDA library's words for any status but 0. (CPU tensors reach this with the emulated
    library of the tests alone; they have no stream.)
    """
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            status = call(*arguments, torch.cuda.current_stream(tensor.device).cuda_stream)
    else:
        status = call(*arguments, None)
    if status != 0:
        raise RuntimeError(f"{call.__name__}: {cuda_error(status)}")

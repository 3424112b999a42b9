"""The CUDA sources of csrc/ compiled for the host (csrc/emulation) in place of the CUDA library, and guarded memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_kernels import native

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(path.name for path in CSRC.glob("*.cu"))
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
MARGIN = 4096  # bytes before and behind every allocation
FLAGS = (
    "-std=c++17",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-DCOSMOS_EMULATE",
    "-fPIC",
)


def compile_emulated(folder: Path) -> None:
    """libcosmos_cuda.so for the host, in `folder`."""
    assert COMPILER is not None
    objects = []
    for source in SOURCES:
        objects.append(folder / f"{source}.o")
        subprocess.run([COMPILER, *FLAGS, "-x", "c++", "-c", CSRC / source, "-o", objects[-1]], check=True)
    subprocess.run([COMPILER, "-shared", "-o", folder / native.LIBRARIES["cuda"], *objects], check=True)


@pytest.fixture(scope="session")
def emulated_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all modules that import this fixture, and for all processes that share out the tests."""
    if COMPILER is None:
        pytest.skip("no C++ compiler: CUDA sources not run in the emulation")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / native.LIBRARIES["cuda"]).exists():
            compile_emulated(folder)
    return folder


@pytest.fixture
def emulated(emulated_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`native.function("cuda", ...)` finds the emulated library; memory that nobody wrote is NaN."""
    monkeypatch.setattr(native, "LIBRARY_DIR", emulated_folder)
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@contextlib.contextmanager
def guarded_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty, empty_like and the features given to `guarded` lie between margins of NaN that must stay so."""
    margins: list[Tensor] = []

    def allocate(shape: Any, dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.full((2 * MARGIN + count + -count % 16,), 0xFF, dtype=torch.uint8)
        margins.extend((raw[:MARGIN], raw[MARGIN + count :]))
        return raw[MARGIN : MARGIN + count].view(dtype).view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape, dtype=torch.float32, device=None: allocate(_flat(shape), dtype))
        patch.setattr(torch, "empty_like", lambda like, dtype=None: allocate(like.shape, dtype or like.dtype))
        yield
    assert all((margin == 0xFF).all() for margin in margins), "a kernel wrote outside its outputs"


def guarded(tensor: Tensor) -> Tensor:
    """A copy between margins of NaN: what a kernel reads outside shows in its results."""
    count = tensor.numel()
    raw = torch.full((count + 2 * MARGIN,), torch.nan, dtype=tensor.dtype)
    raw[MARGIN : MARGIN + count] = tensor.reshape(-1)
    return raw[MARGIN : MARGIN + count].view(tensor.shape)


def _flat(shape: tuple[Any, ...]) -> Any:
    return shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape

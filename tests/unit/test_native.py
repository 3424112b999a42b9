"""The loader of the native libraries: a missing, stale or broken library is a reason in words, never a crash."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import cosmos_fast.ops  # noqa: F401
from cosmos_fast.ops.backends import resolve
from cosmos_kernels import adamw_ema_native, native

ROOT = Path(__file__).parents[2]


@pytest.fixture
def library_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    native._load.cache_clear()
    yield tmp_path
    native._load.cache_clear()


def test_interface_versions_agree():
    header = (ROOT / "csrc" / "cosmos.h").read_text()
    found = re.search(r"#define COSMOS_ABI_VERSION (\d+)", header)
    assert found is not None
    assert int(found[1]) == native.ABI_VERSION


def test_not_built_at_all(library_dir):
    assert native.why_missing("cpu") == "not built: reinstall with `pip install -e .`"
    with pytest.raises(RuntimeError, match="native library 'cpu': not built"):
        adamw_ema_native.sum_of_squares_cpu([])


def test_the_reason_of_the_build_is_passed_on(library_dir):
    (library_dir / "build.json").write_text(json.dumps({"cpu": "no C++ compiler found", "cuda": "built"}))
    assert (
        native.why_missing("cpu")
        == "not built: no C++ compiler found; to change that, reinstall with `pip install -e .`"
    )
    assert "libcosmos_cuda.so is gone" in native.why_missing("cuda")


def test_broken_library(library_dir):
    (library_dir / "libcosmos_cpu.so").write_text("not a shared library")
    (library_dir / "build.json").write_text("{broken")
    assert "libcosmos_cpu.so does not load" in native.why_missing("cpu")
    assert native.why_missing("cuda").startswith("not built")


def _compile(folder: Path, source: str, kind: str = "cpu") -> None:
    (folder / "stale.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / native.LIBRARIES[kind], folder / "stale.c"], check=True)


needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("int cosmos_abi_version(void) { return 0; }", "interface version 0, this code wants"),
        ("int something_else(void) { return 0; }", "does not load .*cosmos_abi_version"),
    ],
)
def test_stale_library(library_dir, source, reason):
    _compile(library_dir, source)
    assert re.search(reason, native.why_missing("cpu"))


@needs_compiler
def test_function_missing_from_a_library(library_dir):
    _compile(library_dir, f"int cosmos_abi_version(void) {{ return {native.ABI_VERSION}; }}")
    assert native.why_missing("cpu") is None
    with pytest.raises(RuntimeError, match=r"native library 'cpu': .*cosmos_cpu_openmp.*reinstall"):
        native.cpu_features()


@needs_compiler
def test_signature_of_a_function_is_set(library_dir):
    version = f"int cosmos_abi_version(void) {{ return {native.ABI_VERSION}; }}"
    _compile(library_dir, version + " double half(double x) { return x / 2; }")
    half = native.function("cpu", "half", [ctypes.c_double], ctypes.c_double)
    assert half(3) == 1.5
    assert native.function("cpu", "half", [ctypes.c_double], ctypes.c_double) is half


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to a GPU of this capability; None: no GPU."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        native.why_no_gpu.cache_clear()

    yield pretend
    native.why_no_gpu.cache_clear()


@needs_compiler
def test_a_gpu_that_the_cuda_library_has_no_code_for_is_named(library_dir, gpu):
    """An A100's code runs on its generation, Hopper's on Hopper alone; no launch has to fail first."""
    version = f"int cosmos_abi_version(void) {{ return {native.ABI_VERSION}; }}"
    _compile(library_dir, version + 'const char* cosmos_cuda_architectures(void) { return "800,900"; }', "cuda")
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0)):
        gpu(capability)
        assert native.why_no_gpu() is None, capability
    for capability in ((7, 5), (9, 1), (10, 0), (12, 0)):
        gpu(capability)
        found = "compute capability {}.{}, libcosmos_cuda.so has code for 8.0 and 9.0".format(*capability)
        assert native.why_no_gpu() == found
        for op in ("adamw_ema", "grad_norm", "cross_attention_pool", "multiview_infonce"):
            with pytest.raises(ValueError, match=f"'cuda' was asked for but cannot run: {found}"):
                resolve(op, "cuda", torch.ones(1, 2, 8))


def test_without_a_gpu_or_a_library_the_kernels_cannot_run(library_dir, gpu):
    gpu(None)
    assert native.why_no_gpu() == "no CUDA device"
    gpu((9, 0))
    assert native.why_no_gpu() == "not built: reinstall with `pip install -e .`"


@pytest.mark.skipif(native.why_missing("cuda") is not None, reason="CUDA library not built")
def test_the_built_library_knows_its_architectures():
    assert min(native.cuda_architectures()) >= (8, 0)


@pytest.mark.skipif(native.why_missing("cpu") is not None, reason="CPU library not built")
def test_loaded_library_names_its_instruction_set():
    assert re.match(r"(baseline|avx2|avx512f), (OpenMP|one thread)", native.cpu_features())

"""The loader of the native libraries: a missing, stale or broken library is a reason in words, never a crash."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

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


def _compile(folder: Path, source: str) -> None:
    (folder / "stale.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libcosmos_cpu.so", folder / "stale.c"], check=True)


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


@pytest.mark.skipif(native.why_missing("cpu") is not None, reason="CPU library not built")
def test_loaded_library_names_its_instruction_set():
    assert re.match(r"(baseline|avx2|avx512f), (OpenMP|one thread)", native.cpu_features())

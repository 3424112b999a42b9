"""What holds for the sources of the kernels: what is launched is compiled ahead, and what has not run says so."""

from __future__ import annotations

import ast
import re
from importlib import import_module

import pytest

from cosmos_fast.ops import attention, backends, layer_norm
from cosmos_kernels import compile_ahead, triton_support
from tests.architecture.source_tree import ROOT, tree

KERNELS, CSRC = ROOT / "kernels" / "cosmos_kernels", ROOT / "csrc"
HOST = r"cstdint|cstring|cmath|new|vector|algorithm|math\.h|omp\.h|cuda_runtime\.h|cuda_fp16\.h|cuda_bf16\.h"
NOT_RUN = "ot yet run on hardware"
# Beginnings of the modules that an operation's GPU backends live in.
MODULES = {
    "multiview_infonce": ("infonce_triton", "infonce_cuda"),
    "distillation_cross_entropy": ("distill_triton",),
    "dense_distillation_cross_entropy": ("distill_dense_triton",),
    "cross_attention_pool": ("pool_triton", "pool_backward_triton", "pool_cuda"),
    "adamw_ema": ("adamw_ema_triton",),
    "grad_norm": ("adamw_ema_triton",),
    "attention": ("attention_triton", "attention_backward_triton"),
    "add_layer_norm": ("layer_norm_triton",),
}


def launched(module: str) -> set[str]:
    """Functions of the module that it launches: `name[grid](...)`."""
    calls = (node for node in ast.walk(tree(KERNELS / f"{module}.py")) if isinstance(node, ast.Call))
    subscripts = (call.func.value for call in calls if isinstance(call.func, ast.Subscript))
    return {value.id for value in subscripts if isinstance(value, ast.Name)}


@pytest.mark.skipif(triton_support.why_missing() is not None, reason="Triton is not here, or there is no GPU")
def test_every_kernel_that_is_launched_is_compiled_ahead_for_three_gpus() -> None:
    everything = {path.stem for path in KERNELS.glob("*.py") if "@triton.jit" in path.read_text()}
    assert {name for name in everything if launched(name)} <= set(compile_ahead.triton_modules())
    for module in compile_ahead.triton_modules():
        cases = import_module(f"cosmos_kernels.{module}").COMPILE_AHEAD
        names = {case.kernel.fn.__name__ for case in cases}
        assert names == launched(module), module
        for name in names:
            archs = {arch for case in cases if case.kernel.fn.__name__ == name for arch in case.archs}
            assert archs - {89} == {80, 90, 100}, (module, name)  # 89 where a GPU with little shared memory differs


def test_no_kernel_adds_in_an_order_that_is_not_fixed_or_needs_what_the_interpreter_lacks() -> None:
    """No atomics in any kernel; none of Triton's uses assembly or a library of the device."""
    for path in [*KERNELS.glob("*.py"), *CSRC.glob("*.cu"), *CSRC.glob("*.h")]:
        assert not re.search(r"\batomic\w*\s*\(|\bred\.global", path.read_text()), path.name
    for path in KERNELS.glob("*triton*.py"):
        assert not re.search(r"inline_asm|libdevice|tl\.extra", path.read_text()), path.name


def test_native_sources_include_the_standard_library_and_cuda_only() -> None:
    """A plain C interface: no headers of torch or Python, and `extern "C"` names with raw pointers."""
    for path in [*CSRC.glob("*.cu"), *CSRC.glob("*.cpp"), *CSRC.glob("*.h")]:
        for header in re.findall(r"^\s*#\s*include\s*<([^>]+)>", path.read_text(), re.MULTILINE):
            assert re.fullmatch(HOST, header), f"{path.name} includes <{header}>"
    assert re.search(r'#define COSMOS_EXPORT extern "C"', (CSRC / "cosmos.h").read_text())


def test_the_cuda_library_is_built_for_an_a100_and_for_hopper_with_what_only_hopper_has() -> None:
    assert "set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real)" in (ROOT / "CMakeLists.txt").read_text()


def test_what_has_not_run_on_hardware_says_so_and_what_has_does_not() -> None:
    """As `measured.json` has it; the pages speak of all of them while none has run."""
    assert {attention.OP, layer_norm.OP} <= MODULES.keys()  # registered where they are imported
    rows = [row for row in backends.table() if row["backend"] in backends.GPU_BACKENDS]
    assert {row["op"] for row in rows} == MODULES.keys()
    for row in rows:
        for module in (name for name in MODULES[row["op"]] if name.endswith(row["backend"])):
            words = " ".join((ast.get_docstring(tree(KERNELS / f"{module}.py")) or "").split())
            assert (NOT_RUN in words) == (NOT_RUN in row["hardware"]), f"{module}.py: {row['hardware']}"
    if all(NOT_RUN in row["hardware"] for row in rows):
        kernels, readme = ((ROOT / name).read_text() for name in ("docs/kernels.md", "README.md"))
        assert f"where nothing else is said they have n{NOT_RUN}" in " ".join(kernels.split())
        (line,) = [line for line in readme.splitlines() if line.startswith("| not run on hardware |")]
        assert "everything on a GPU" in line
        assert "No GPU figure is quoted" in line

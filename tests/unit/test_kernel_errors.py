"""Kernels that Triton cannot make, told on one line; everything else as it was raised."""

from __future__ import annotations

import os

import click
import pytest
import torch

from cosmos_fast.cli import main
from cosmos_kernels import triton_support
from cosmos_kernels.kernel_errors import KernelError

pytest.importorskip("triton")
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

HERE = torch.ones(1)


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setattr(triton_support, "INTERPRETED", False)


def launch(raise_error) -> str:
    """What comes out of a launch in which this is raised."""
    with pytest.raises(KernelError) as caught, triton_support.launch_device(HERE):
        raise_error()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def raises(error):
    def function():
        raise error

    return function


def within(module: str, error: Exception):
    """Raises it in a function of that module."""
    scope = {"__name__": module, "error": error}
    exec("def function():\n    raise error", scope)
    return scope["function"]


def test_too_much_shared_memory():
    told = launch(raises(OutOfResources(200_000, 101_376, "shared memory")))
    assert told.startswith(
        "Triton makes no kernel for cpu: OutOfResources: out of resource: shared memory, Required: 2"
    )
    assert told.endswith("; ask for another backend")


def test_a_gpu_that_the_assembler_does_not_know():
    error = PTXASError(
        "Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas fatal: Value 'sm_130' is not defined\n"
    )
    assert "PTXASError: Internal Triton PTX codegen error `ptxas` stderr: ptxas fatal: Value 'sm_130'" in launch(
        raises(error)
    )


def test_a_function_inside_a_kernel():
    """The outer error has the source that calls, only the last has the reason."""

    def nested():
        try:
            raise CompilationError("def inner(): ...", "node", "tl.dot: 8 is too small")
        except CompilationError as inner:
            raise CompilationError("def outer(): ...\n    inner()", "node") from inner

    assert "CompilationError: tl.dot: 8 is too small; ask" in launch(nested)


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("triton.backends.nvidia.compiler", RuntimeError("PassManager::run failed")),
        ("triton.runtime.build", RuntimeError("Failed to find C compiler.\nPlease specify via CC")),
        ("triton.compiler.compiler", OSError(28, "No space left on device")),
    ],
)
def test_a_compiler_that_gives_up(module, error):
    assert f"{type(error).__name__}: " in launch(within(module, error))


@pytest.mark.parametrize(
    "function",
    [
        raises(RuntimeError("PassManager::run failed")),  # of somebody else
        raises(torch.OutOfMemoryError("CUDA out of memory")),
        raises(ValueError("a shape that does not fit")),
        within("triton.compiler.compiler", RuntimeError("Triton Error [CUDA]: an illegal memory access")),
        within("triton.backends.nvidia.driver", RuntimeError("Triton Error [CUDA]: misaligned address")),
    ],
)
def test_other_errors_stay_what_they_are(function):
    expected = pytest.raises(Exception, match=r"PassManager|out of memory|fit|Triton Error")
    with expected as caught, triton_support.launch_device(HERE):
        function()
    assert not isinstance(caught.value, KernelError)


def test_an_interpreted_kernel_fails_as_it_is(monkeypatch):
    monkeypatch.setattr(triton_support, "INTERPRETED", True)
    with pytest.raises(CompilationError), triton_support.launch_device(HERE):
        raise CompilationError("source", "node", "reason")


def test_a_machine_without_a_compiler(monkeypatch):
    """Known before the first launch, so that `auto` takes another backend."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton_support.shutil, "which", {"/opt/some/cc": "/opt/some/cc"}.get)
    assert triton_support.why_missing.__wrapped__().startswith("no C compiler to build the host side of its kernels")
    monkeypatch.setenv("CC", "/opt/some/cc")
    assert triton_support.why_missing.__wrapped__() is None
    monkeypatch.setenv("CC", "/opt/other/cc")  # Triton takes it, whatever else is there
    assert triton_support.why_missing.__wrapped__() == "the C compiler CC=/opt/other/cc is not found"


def test_a_command_tells_it_on_one_line(capsys):
    @click.command()
    def command() -> None:
        raise KernelError("Triton makes no kernel for this")

    assert main.run(command, []) == main.EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: Triton makes no kernel for this\n"


def test_kernels_keep_fused_multiply_add_whatever_the_default_of_triton():
    """Read by Triton from 3.9 on; who has set it keeps it."""
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] in ("0", "1")

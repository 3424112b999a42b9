"""What decides whether a Triton kernel may run: the machine, the tensors, and the dtype."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import cosmos_fast.ops  # noqa: F401
from cosmos_fast.ops.backends import resolve
from cosmos_kernels import native, triton_support
from tests.kernels import resources


@pytest.fixture
def machine(monkeypatch):
    """Pretend to a GPU of this capability (None: no GPU) and interpretation on or off; caches forgotten around it."""

    def pretend(capability, interpreted):
        monkeypatch.setattr(triton_support, "INTERPRETED", interpreted)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        forget()

    def forget():
        triton_support.why_missing.cache_clear()
        triton_support.why_missing_on_blackwell.cache_clear()
        native.why_no_gpu.cache_clear()

    yield pretend
    forget()


def test_a_machine_without_gpu_says_so(machine):
    machine(None, interpreted=False)
    assert triton_support.why_missing() == "no CUDA device"


def test_an_old_gpu_is_named(machine):
    machine((7, 5), interpreted=False)
    assert triton_support.why_missing() == "compute capability 7.5, it needs 8.0 or newer"


@pytest.fixture
def fake_triton(monkeypatch, tmp_path):
    """Put a module with this source in Triton's place, as if Triton had never been imported."""
    real = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "triton"}
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a cached one would outlive the next source

    def put(source):
        for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
            del sys.modules[name]
        (tmp_path / "triton.py").write_text(source)

    yield put
    sys.modules.pop("triton", None)
    sys.modules.update(real)


def test_triton_that_is_old_or_broken(machine, fake_triton):
    for source, words in (("__version__ = '3.5.1'", "too old"), ("raise OSError('libcuda')", "OSError: libcuda")):
        machine((9, 0), interpreted=False)
        fake_triton(source)
        assert words in triton_support.why_missing()
    machine((9, 0), interpreted=False)
    fake_triton("__version__ = '3.6.0'")
    assert triton_support.why_missing() is None


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"), [("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True), ("3.7.0", "2.4.6", True)]
)
def test_an_interpreter_that_this_numpy_breaks(machine, fake_triton, monkeypatch, triton, numpy, runs):
    monkeypatch.setattr(triton_support, "version", lambda package: numpy)
    machine(None, interpreted=True)
    fake_triton(f"__version__ = {triton!r}")
    words = f"triton {triton} interprets kernels with numpy before 2.4 only, here is {numpy}"
    assert triton_support.why_missing() == (None if runs else words)
    machine((9, 0), interpreted=False)  # compiled kernels need no numpy
    assert triton_support.why_missing() is None


TOO_OLD = "triton 3.6.0 does not compile it for compute capability 10, it needs 3.9 or newer"


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((10, 0), "3.6.0", TOO_OLD),
        ((10, 3), "3.6.0", TOO_OLD),
        ((10, 0), "3.9.0", None),
        ((10, 0), "3.10.1", None),
        ((9, 0), "3.6.0", None),
        ((12, 0), "3.6.0", None),
        ((7, 5), "3.6.0", "compute capability 7.5, it needs 8.0 or newer"),
    ],
)
def test_blackwell_needs_a_newer_triton_for_some_kernels(machine, fake_triton, capability, version, reason):
    machine(capability, interpreted=False)
    fake_triton(f"__version__ = '{version}'")
    assert triton_support.why_missing_on_blackwell() == reason


def test_operations_whose_kernels_it_fails_to_compile_run_on_another_backend_and_say_so(machine, fake_triton):
    """On a B200 with Triton 3.6: `auto` passes Triton over, in words; asked for by name it is an error."""
    machine((10, 0), interpreted=False)
    fake_triton("__version__ = '3.6.0'")
    for op in ("multiview_infonce", "cross_attention_pool"):
        tensors = torch.ones(1, 2, 8, dtype=torch.float16), torch.ones(1, 2, 8, dtype=torch.float16)
        backend, reason = resolve(op, "auto", *tensors)
        assert backend.name == "tiled"
        assert f"triton: {TOO_OLD}" in reason
        with pytest.raises(ValueError, match=f"{op}: backend 'triton' was asked for but cannot run: {TOO_OLD}"):
            resolve(op, "triton", *tensors)
    assert triton_support.why_missing() is None  # what it does compile, it runs


def test_every_kernel_that_some_triton_fails_to_compile_belongs_to_such_an_operation():
    failed = {
        (row["module"], row["arch"], tuple(int(number) for number in part.split()[1].split(".")))
        for part, rows in resources.load().items()
        for row in rows
        if "error" in row
    }
    assert {module for module, _, _ in failed} <= {"infonce_triton", "pool_backward_triton"}
    for _, arch, release in failed:
        assert arch == 10 * triton_support.BLACKWELL
        assert release < triton_support.BLACKWELL_TRITON


def test_triton_that_is_absent(machine, monkeypatch):
    machine((9, 0), interpreted=False)
    monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    assert "not installed" in triton_support.why_missing()


@pytest.mark.parametrize(
    ("version", "release"), [("3.6.0", (3, 6)), ("3.10.0+git1234", (3, 10)), ("3.9.0.post1", (3, 9))]
)
def test_versions_are_compared_as_numbers(version, release):
    assert triton_support._release(version) == release


def test_tensors_must_lie_where_triton_reaches_them(machine):
    cpu = torch.ones(1)
    machine(None, interpreted=True)
    assert triton_support.why_not_on(cpu, cpu) is None
    machine((9, 0), interpreted=False)
    assert triton_support.why_not_on(cpu) == "it runs on cuda tensors, these are on cpu"
    assert "several devices: cpu, meta" in triton_support.why_not_on(cpu, torch.ones(1, device="meta"))
    assert triton_support.why_not_on() is None


def test_bf16_is_converted_only_where_interpreted(machine):
    machine(None, interpreted=True)
    assert triton_support.upcast(torch.bfloat16)
    assert not triton_support.upcast(torch.float16)
    machine((9, 0), interpreted=False)
    assert not triton_support.upcast(torch.bfloat16)


def test_cpu_tensors_need_no_device_switch():
    with triton_support.launch_device(torch.ones(1)):
        pass


def test_asking_does_not_import_triton():
    code = "import sys, cosmos_fast.ops; from cosmos_kernels import triton_support as t; t.why_missing()"
    code += "; print('triton' in sys.modules)"
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"

"""What decides whether a Triton kernel may run: the machine, the tensors, and the dtype."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cosmos_kernels import triton_support


@pytest.fixture
def machine(monkeypatch):
    """Pretend to a GPU of this capability (None: no GPU) and interpretation on or off; caches forgotten around it."""

    def pretend(capability, interpreted):
        monkeypatch.setattr(triton_support, "INTERPRETED", interpreted)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        triton_support.why_missing.cache_clear()

    yield pretend
    triton_support.why_missing.cache_clear()


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

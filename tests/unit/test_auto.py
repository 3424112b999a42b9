"""What `auto` takes: in a training step on a CPU, and for tensors of an H100, which is played by fake ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos_fast.ops import backends
from cosmos_kernels import native, triton_support
from tests.tiny_run import make_trainer, tiny_config


@pytest.mark.skipif(torch.cuda.is_available(), reason="the trainer takes the GPU")
def test_a_training_step_on_a_cpu_takes_the_tiled_and_the_native_backends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, pooling and optimizer are the operations, none is asked for by name, and the oracle runs nowhere."""
    taken: set[tuple[str, str, str]] = set()
    choose = backends.choose

    def recorded(op: str, request: str, *tensors: torch.Tensor) -> backends.Backend:
        chosen = choose(op, request, *tensors)
        taken.add((op, request, chosen.name))
        return chosen

    monkeypatch.setattr(backends, "choose", recorded)
    make_trainer(tiny_config(tmp_path, "run.max_steps=1")).fit()
    native_or = "eager" if native.why_missing("cpu") else "native"
    expected = {("multiview_infonce", "tiled"), ("cross_attention_pool", "tiled")}
    expected |= {("adamw_ema", native_or), ("grad_norm", native_or)}
    assert {(op, "auto", name) for op, name in expected} == {row for row in taken if row[0] != "attention"}


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As far as the choice looks; nothing could run."""

    def forget() -> None:
        triton_support.why_missing.cache_clear()
        triton_support.why_missing_on_blackwell.cache_clear()
        native.why_no_gpu.cache_clear()

    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 that nobody has measured")
    monkeypatch.setattr(triton_support, "why_no_compiler", lambda: None)
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.mark.skipif(triton_support.why_missing() is not None, reason="Triton is not here")
@pytest.mark.usefixtures("h100")
def test_on_a_gpu_it_takes_triton_or_cuda_and_what_they_cannot_take_goes_to_pytorch() -> None:
    def taken(op: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> str:
        with FakeTensorMode():
            tensors = [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]
        backend, reason = backends.resolve(op, "auto", *tensors)
        assert reason.endswith(f"{backend.name}: first choice that runs here")
        return backend.name

    half, double = torch.float16, torch.float64
    features, logits = [(8, 64, 512), (2, 64, 512)], [(64, 512)] * 2
    assert taken("multiview_infonce", half, *features) == "triton"
    assert taken("distillation_cross_entropy", half, *features) == "triton"
    assert taken("dense_distillation_cross_entropy", half, *logits) == "triton"
    assert taken("cross_attention_pool", half, (4, 196, 512), (4, 8, 512)) == "triton"
    assert taken("cross_attention_pool", half, (4, 257, 512), (4, 8, 512)) == "tiled"
    assert taken("adamw_ema", torch.float32, *logits) in backends.GPU_BACKENDS
    assert taken("grad_norm", torch.float32, *logits) in backends.GPU_BACKENDS
    for op in ("multiview_infonce", "distillation_cross_entropy", "cross_attention_pool"):
        assert taken(op, double, *features) == "tiled"
    assert taken("adamw_ema", double, *logits) == "eager"

"""Every saving of the step computes what the original computed, alone and together with the others.

Pruning and packing are part of every run. What needs a package or a GPU runs on stand-ins, kernels in Triton's
interpreter. Of the compiler the front end alone: PyTorch runs what it hands on, which spares building C++ code. 8-bit
layers are no part of this: they compute something near.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from cosmos_fast import CosmosLoss
from cosmos_fast.config import ComputeConfig
from cosmos_fast.engine import optimizer
from cosmos_fast.model import cross_pool, savings
from cosmos_fast.model.vision_graphs import use_vision_graphs
from cosmos_fast.ops import adamw_ema, backends
from cosmos_kernels import triton_support
from tests import attention_fakes
from tests.fake_apex import nvidia_apex
from tests.golden import GOLDEN_FILES, Golden, assert_close_to_max
from tests.golden_runs import (
    FEATURES,
    FORWARD_RTOL,
    blocks_of,
    check_features,
    check_losses_and_gradients,
    check_trajectory,
    forward,
    golden_features,
    model,
    pair,
    trainer,
)

__all__ = ["nvidia_apex"]

IN_INTERPRETER = pytest.mark.skipif(
    not triton_support.INTERPRETED or triton_support.why_missing() is not None,
    reason=triton_support.why_missing() or "not in the interpreter: on a GPU the kernels take half precision",
)
CUDA = torch.device("cuda")


compiled_calls: list[object] = []


def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """One for all tests, which therefore share what it has made."""

    def call(*arguments: Any) -> Any:
        compiled_calls.append(graph)
        return graph.forward(*arguments)

    return call


@dataclass
class Seen:
    """What was really switched on. compiled: calls of graphs. checkpointed: parts made anew. captured: CUDA graphs.
    apex: calls. chosen: (operation, backend) that ran."""

    apex: list[str]
    compiled: list[object] = field(default_factory=list)
    checkpointed: list[str] = field(default_factory=list)
    captured: list[object] = field(default_factory=list)
    chosen: set[tuple[str, str]] = field(default_factory=set)


@pytest.fixture(scope="module", params=GOLDEN_FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.read(request.param)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, nvidia_apex: list[str]) -> Seen:
    """Stand-ins for what this machine lacks, which list their use."""
    compiled_calls.clear()
    found = Seen(nvidia_apex, compiled=compiled_calls)

    def checkpointed(part: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        found.checkpointed.append(part.__name__)
        return checkpoint(part, *arguments, **options)

    def capture(module: torch.nn.Module, samples: tuple[Any, ...], allow_unused_input: bool) -> torch.nn.Module:
        found.captured.append(module)
        return module

    checkpoint = savings.checkpoint
    monkeypatch.setattr(savings, "checkpoint", checkpointed)
    monkeypatch.setattr("cosmos_fast.model.compute.COMPILER", compiler)
    monkeypatch.setattr("cosmos_fast.model.compute.why_no_compiler", lambda device: None)
    monkeypatch.setattr("cosmos_fast.model.compute.use_vision_graphs", lambda tower, _: use_vision_graphs(tower, CUDA))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(backends, "_announced", found.chosen)
    return found


def settings(**chosen: Any) -> ComputeConfig:
    return ComputeConfig(**chosen)


ALONE: dict[str, tuple[ComputeConfig, Callable[[Seen], bool]]] = {
    "checkpoint mlp": (
        settings(checkpoint_activations="mlp"),
        lambda seen: set(seen.checkpointed) == {"_feed_forward"},
    ),
    "checkpoint blocks": (
        settings(checkpoint_activations="blocks"),
        lambda seen: set(seen.checkpointed) == {"_all_rows", "_kept_rows"},
    ),
    "compile": (settings(compile=True), lambda seen: len(seen.compiled) > 0),
    "cuda graphs": (settings(cuda_graphs=True), lambda seen: len(seen.captured) == 2),
    "apex layer norm": (settings(layer_norm="apex"), lambda seen: "FusedLayerNorm" in seen.apex),
}


@pytest.mark.parametrize("name", ALONE)
def test_each_alone(golden: Golden, name: str, seen: Seen) -> None:
    """Twice, as CUDA graphs are captured at the second call; then dense features, for segmentation."""
    compute, is_used = ALONE[name]
    student, teacher = pair(golden, compute)
    for _ in range(2):
        features = forward(golden, student, teacher)
        check_features(golden, *features)
        check_losses_and_gradients(golden, student, CosmosLoss()(*features))
    assert is_used(seen), seen
    for name, csa in (("out.dense", False), ("out.dense_csa", True)):
        found = student.encode_image_dense(golden.images("input.")[0], csa=csa)
        assert_close_to_max(found, golden.tensors[name], FORWARD_RTOL, name)


@IN_INTERPRETER
def test_triton_attention_alone(golden: Golden, seen: Seen) -> None:
    student, _ = pair(golden, settings(attention="triton"))
    features = forward(golden, student, model(golden, "teacher."))
    check_features(golden, *features)
    check_losses_and_gradients(golden, student, CosmosLoss()(*features))
    assert ("attention", "triton") in seen.chosen


@pytest.mark.parametrize("name", ["torch", "apex"])
def test_other_optimizers(golden: Golden, name: str, seen: Seen, tmp_path) -> None:
    run = trainer(golden, str(tmp_path), settings(optimizer=name))
    check_trajectory(golden, run)
    assert ("FusedAdam" in seen.apex) == (name == "apex")
    assert "adamw_ema" not in {op for op, _ in seen.chosen}


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_with_all_negatives(golden: Golden, parts: int, tmp_path) -> None:
    check_trajectory(golden, trainer(golden, str(tmp_path), parts=parts))


@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_every_backend_of_losses_and_pooling(golden: Golden, backend: str, seen: Seen, monkeypatch) -> None:
    pool = partial(cross_pool.cross_attention_pool, backend=backend)
    monkeypatch.setattr(cross_pool, "cross_attention_pool", pool)
    student, teacher = pair(golden)
    features = forward(golden, student, teacher)
    check_features(golden, *features)
    check_losses_and_gradients(golden, student, CosmosLoss(backend=backend)(*features))
    chosen = {(op, name) for op, name in seen.chosen if op != "attention"}
    expected = {("multiview_infonce", backend), ("cross_attention_pool", backend)}
    assert chosen == (expected if backend != "eager" else set())  # the oracles are called past the choice


@IN_INTERPRETER
def test_every_triton_kernel_forward(golden: Golden, seen: Seen, monkeypatch) -> None:
    """Losses on everything; towers and pooling on the first sample and three views, which the interpreter does in
    seconds."""
    pool = partial(cross_pool.cross_attention_pool, backend="triton")
    monkeypatch.setattr(cross_pool, "cross_attention_pool", pool)
    student, teacher = pair(golden, settings(attention="triton", layer_norm="triton"))
    images = [view[:1] for view in golden.images("input.")[:3]]
    texts = golden.tensors["input.text"][:3, :1]
    with torch.no_grad():
        found = student(images, texts)
        of_teacher = teacher.encode_views(images[:2], texts[:2])
    expected, expected_of_teacher = golden_features(golden)
    for name in FEATURES:
        assert_close_to_max(getattr(found, name), getattr(expected, name)[:3, :1], FORWARD_RTOL, name)
    for name in ("image", "text"):
        expected_VBD = getattr(expected_of_teacher, name)
        assert_close_to_max(getattr(of_teacher, name), expected_VBD[:, :1], FORWARD_RTOL, f"teacher {name}")
    losses = CosmosLoss(backend="triton")(expected, expected_of_teacher)
    assert_close_to_max(losses.clip, golden.tensors["out.clip_loss"], FORWARD_RTOL, "clip_loss")
    assert_close_to_max(losses.distill, golden.tensors["out.distill_loss"], FORWARD_RTOL, "distill_loss")
    expected_ops = {"attention", "add_layer_norm", "cross_attention_pool", "multiview_infonce"}
    assert seen.chosen == {(op, "triton") for op in expected_ops}


def test_together_compiled_packed_exactly_made_anew(golden: Golden, seen: Seen, tmp_path, monkeypatch) -> None:
    attention = attention_fakes.use("varlen", monkeypatch)
    compute = settings(attention=attention, compile=True, checkpoint_activations="blocks")
    run = trainer(golden, str(tmp_path), compute, parts=2)
    savings_of_blocks = {block.savings for block in blocks_of(run.student, run.teacher)}
    assert {(one.recompute, one.compiler is None) for one in savings_of_blocks} == {("blocks", False)}
    check_trajectory(golden, run)
    assert seen.compiled
    assert "_kept_rows" in seen.checkpointed
    assert {name for op, name in seen.chosen if op == "attention"} == {"varlen"}


def test_together_apex(golden: Golden, seen: Seen, tmp_path, monkeypatch) -> None:
    attention = attention_fakes.use("xformers", monkeypatch)
    compute = settings(
        attention=attention, layer_norm="apex", optimizer="apex", checkpoint_activations="mlp", cuda_graphs=True
    )
    check_trajectory(golden, trainer(golden, str(tmp_path), compute))
    assert {"FusedAdam", "FusedLayerNorm"} <= set(seen.apex)
    assert "_feed_forward" in seen.checkpointed
    assert len(seen.captured) == 2


@IN_INTERPRETER
@pytest.mark.long  # minutes in the interpreter
def test_together_every_triton_kernel(golden: Golden, seen: Seen, tmp_path, monkeypatch) -> None:
    """Attention, norms, pooling, losses and the optimizer, blocks made anew, all negatives."""
    compute = settings(attention="triton", layer_norm="triton", checkpoint_activations="blocks")
    run = trainer(golden, str(tmp_path), compute, parts=2)
    run.gradients.objective = CosmosLoss(backend="triton")
    pool = partial(cross_pool.cross_attention_pool, backend="triton")
    monkeypatch.setattr(cross_pool, "cross_attention_pool", pool)
    for name in ("adamw_ema_", "grad_norm"):
        monkeypatch.setattr(optimizer, name, partial(getattr(adamw_ema, name), backend="triton"))
    check_trajectory(golden, run)
    expected = {"attention", "add_layer_norm", "cross_attention_pool", "multiview_infonce", "adamw_ema", "grad_norm"}
    assert seen.chosen == {(op, "triton") for op in expected}

"""What every operation promises with every backend: one table of operations, and the same questions to each.

Backends that run here are those that take CPU tensors: eager, tiled, native, and Triton's kernels in its interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cosmos_fast.ops import backends
from tests.unit.operations import DIFFERENTIABLE, OPS, Inputs, Op, each, runs_here


@pytest.fixture
def here(op: Op, backend: str) -> None:
    if reason := runs_here(op, backend):
        pytest.skip(reason)


def values(op: Op, backend: str, inputs: Inputs, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """The result, and the gradients of what is learned."""
    leaves = {name: x.detach().clone().requires_grad_(name in op.learned) for name, x in inputs.items()}
    result = (run or op.run)(**leaves, backend=backend)
    if not op.learned:
        return [result]
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view(result.shape)  # of a sum not constant
    return [result, *torch.autograd.grad((result * weights).sum(), [leaves[name] for name in op.learned])]


def test_the_table_has_every_operation_of_the_losses_the_pooling_and_the_optimizer() -> None:
    others = {"attention", "add_layer_norm", "recolor"}
    assert {op.name for op in OPS} == {row["op"] for row in backends.table()} - others


@each(OPS)
@pytest.mark.usefixtures("here")
def test_nan_in_gives_nan_out(op: Op, backend: str) -> None:
    """In any input: in the result, and in every gradient."""
    for name, x in op.inputs(torch.float32).items():
        if (op.name, backend) == ("cross_attention_pool", "eager") and name.startswith("ln_q"):
            continue  # PyTorch's own attention answers zeros to a query whose scores are all NaN
        spoiled = x.clone()
        spoiled.view(-1)[-1] = torch.nan
        found = values(op, backend, {**op.inputs(torch.float32), name: spoiled})
        for label, tensor in zip(("result", *op.learned), found, strict=True):
            assert tensor.isnan().any(), f"{label}, with NaN in {name}"


@each([op for op in OPS if op.name == "cross_attention_pool"], "tiled", "triton")
@pytest.mark.usefixtures("here")
def test_the_key_bias_is_the_one_number_that_is_not_read(op: Op, backend: str) -> None:
    """It shifts all scores of a query alike."""
    inputs = op.inputs(torch.float32)
    inputs["in_proj_bias"][8:16] = torch.nan
    assert op.run(**inputs, backend=backend).isfinite().all()


@each(OPS, "tiled", "triton", "native")
@pytest.mark.usefixtures("here")
def test_compiles_without_graph_breaks_to_the_same_bits(op: Op, backend: str) -> None:
    inputs = op.inputs(torch.float32)
    compiled = torch.compile(op.run, fullgraph=True, backend="aot_eager")
    for found, expected in zip(values(op, backend, inputs, compiled), values(op, backend, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each(OPS)
@pytest.mark.usefixtures("here")
def test_autocast_changes_nothing(op: Op, backend: str) -> None:
    """Forward and backward; of the oracles, whose backward is PyTorch's own, the forward.

    The oracle of the pooling follows autocast: it is what a trainer's products would do.
    """
    inputs = op.inputs(torch.float32)
    expected = values(op, backend, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = [op.run(**inputs, backend=backend)] if backend == "eager" else values(op, backend, inputs)
    follows = (op.name, backend) == ("cross_attention_pool", "eager")
    for ours, theirs in zip(found, expected, strict=backend != "eager"):
        assert ours.dtype == theirs.dtype
        if not follows:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@each(DIFFERENTIABLE, "eager", "tiled")
def test_gradcheck(op: Op, backend: str) -> None:
    inputs = op.inputs(torch.float64)

    def run(*leaves: Tensor) -> Tensor:
        return op.run(**{**inputs, **dict(zip(op.learned, leaves, strict=True))}, backend=backend)

    assert torch.autograd.gradcheck(run, [inputs[name].requires_grad_() for name in op.learned], eps=1e-7)

"""csrc/pool_forward_cuda.cu and csrc/pool_backward_cuda.cu, compiled for the host, against fp64 truth."""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_kernels import pool_cuda, triton_support
from tests.kernels.emulated_library import (
    COMPILER,
    CSRC,
    emulated,  # noqa: F401
    emulated_folder,  # noqa: F401
    guarded,
    guarded_allocations,
)
from tests.kernels.truth import assert_tensors_no_worse, error

pytestmark = pytest.mark.usefixtures("emulated")

HALF, BFLOAT16 = torch.float16, torch.bfloat16
ERROR = {HALF: 1e-3, BFLOAT16: 8e-3}


class Case(NamedTuple):
    batch: int
    length: int
    rows: int
    dim: int
    dtype: torch.dtype = HALF


CASES = [
    Case(1, 1, 1, 8),
    Case(2, 12, 64, 48, BFLOAT16),
    Case(1, 77, 16, 104),
    Case(1, 77, 130, 32, BFLOAT16),
    Case(2, 65, 7, 72),
    Case(1, 196, 64, 96),
    Case(1, 256, 8, 64, BFLOAT16),
    Case(1, 40, 64, 512),
]


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.length)
    tokens = torch.randn(case.batch, case.length, case.dim, generator=generator) + 0.3
    queries = torch.randn(case.batch, case.rows, case.dim, generator=generator) / case.dim**0.5 * 2
    return tokens.to(case.dtype), queries.to(case.dtype)


def definition(tokens: Tensor, queries: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    normed = F.layer_norm(tokens.to(dtype), tokens.shape[2:])
    scores = queries.to(dtype) @ normed.mT
    return {"attended": scores.softmax(-1) @ normed, "lse": scores.logsumexp(-1)}


def kernel(tokens: Tensor, queries: Tensor) -> dict[str, Tensor]:
    attended, lse = pool_cuda.attend(tokens, queries)
    return {"attended": attended, "lse": lse}


def check(tokens: Tensor, queries: Tensor, found: dict[str, Tensor]) -> None:
    truth = definition(tokens, queries, torch.float64)
    assert_tensors_no_worse(found, definition(tokens, queries, tokens.dtype), truth, factor=2.0)
    errors = {name: error(found[name], truth[name]) for name in truth}
    assert errors["attended"] <= ERROR[tokens.dtype], errors
    assert errors["lse"] <= 1e-5, errors


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend(case, monkeypatch):
    tokens, queries = (guarded(side) for side in inputs(case))
    with guarded_allocations(monkeypatch):
        found = kernel(tokens, queries)
    check(tokens, queries, found)


def backward_definition(tokens: Tensor, queries: Tensor, grad: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = [side.detach().to(dtype).requires_grad_() for side in (tokens, queries)]
    attended = definition(*leaves, dtype)["attended"]
    grad_tokens, grad_queries = torch.autograd.grad(attended, leaves, grad.to(dtype))
    return {"attended": attended.detach(), "queries": grad_queries, "tokens": grad_tokens}


def backward_kernel(tokens: Tensor, queries: Tensor, grad: Tensor) -> dict[str, Tensor]:
    lse = definition(tokens, queries, torch.float64)["lse"].float()
    attended, grad_queries, grad_tokens = pool_cuda.attend_backward(tokens, queries, lse, grad)
    return {"attended": attended, "queries": grad_queries, "tokens": grad_tokens}


def gradient(queries: Tensor, size: float = 1.0) -> Tensor:
    drawn = torch.randn(queries.shape, generator=torch.Generator().manual_seed(7))
    return (drawn * size).to(queries.dtype)


def check_backward(tokens: Tensor, queries: Tensor, grad: Tensor, found: dict[str, Tensor]) -> None:
    truth = backward_definition(tokens, queries, grad, torch.float64)
    eager = backward_definition(tokens, queries, grad, tokens.dtype)
    assert_tensors_no_worse(found, eager, truth, factor=3.0)
    errors = {name: error(found[name], truth[name]) for name in truth}
    if tokens.shape[1] > 1:  # a single token's weight is 1: its gradients are zero
        assert max(errors.values()) <= 2 * ERROR[tokens.dtype], errors


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_backward(case, monkeypatch):
    tokens, queries = (guarded(side) for side in inputs(case))
    grad = guarded(gradient(queries))
    with guarded_allocations(monkeypatch):
        found = backward_kernel(tokens, queries, grad)
    check_backward(tokens, queries, grad, found)


@pytest.mark.parametrize("order", ["late", "reverse", "late,reverse"])
@pytest.mark.parametrize("length", [20, 77, 150])
def test_orders_of_the_backward(order, length, monkeypatch):
    monkeypatch.setenv("COSMOS_EMULATION", order)
    tokens, queries = inputs(Case(1, length, 64, 136))
    grad = gradient(queries)
    found = backward_kernel(tokens, queries, grad)
    check_backward(tokens, queries, grad, found)
    again = backward_kernel(tokens, queries, grad)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_gradients_that_fp16_barely_holds():
    """Factors keep dS within fp16's range; the smallest results are its subnormal numbers."""
    tokens, queries = inputs(Case(1, 30, 16, 64))
    check_backward(tokens, queries, gradient(queries, 1e-3), backward_kernel(tokens, queries, gradient(queries, 1e-3)))
    zero = backward_kernel(tokens, queries, torch.zeros_like(queries))
    assert not zero["queries"].any()
    assert not zero["tokens"].any()
    assert zero["attended"].any()


@pytest.mark.parametrize("order", ["late", "reverse", "late,reverse"])
@pytest.mark.parametrize("length", [77, 150])
def test_orders(order, length, monkeypatch):
    monkeypatch.setenv("COSMOS_EMULATION", order)
    tokens, queries = inputs(Case(1, length, 64, 136))
    found = kernel(tokens, queries)
    check(tokens, queries, found)
    again = kernel(tokens, queries)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16])
def test_tokens_far_from_zero_and_of_very_different_size(dtype):
    """The mean is 30 times the deviation, and deviations span four orders of magnitude."""
    tokens, queries = inputs(Case(1, 20, 16, 64))
    sizes = torch.logspace(-2, 2, 20).unsqueeze(1)
    tokens = ((tokens.float() + 30) * sizes).to(dtype)
    truth = definition(tokens, queries, torch.float64)
    found = kernel(tokens, queries.to(dtype))
    eager = definition(tokens, queries.to(dtype), dtype)
    assert_tensors_no_worse(found, eager, truth, factor=2.0)


def test_sharp_scores():
    """Scores of several hundred: one token takes all."""
    tokens, queries = inputs(Case(1, 30, 16, 64))
    queries *= 100
    found = kernel(tokens, queries)
    truth = definition(tokens, queries, torch.float64)
    assert truth["lse"].max() > 200
    assert error(found["attended"], truth["attended"]) < 2e-3
    assert error(found["lse"], truth["lse"]) < 1e-5


def test_nan_stays_in_its_sample():
    tokens, queries = inputs(Case(2, 12, 8, 48))
    tokens[1, 3, 5] = torch.nan
    found = kernel(tokens, queries)
    assert found["attended"][0].isfinite().all()
    assert found["lse"][0].isfinite().all()
    assert found["attended"][1].isnan().all()
    assert found["lse"][1].isnan().all()
    grads = pool_cuda.attend_backward(tokens, queries, found["lse"], gradient(queries))
    assert all(grad[0].isfinite().all() and grad[1].isnan().all() for grad in grads)


def test_strided_tokens():
    tokens, queries = inputs(Case(2, 24, 8, 48))
    wide = torch.full((2, 30, 64), torch.nan, dtype=HALF)
    wide[:, 3:27, 8:56] = tokens
    misaligned = torch.full((2, 24, 52), torch.nan, dtype=HALF)
    misaligned[:, :, 1:49] = tokens
    straight = kernel(tokens, queries)
    for view in (wide[:, 3:27, 8:56], misaligned[:, :, 1:49], tokens.transpose(1, 2).contiguous().transpose(1, 2)):
        assert all(torch.equal(straight[name], other) for name, other in kernel(view, queries).items())


def test_bad_arguments_are_refused_in_words():
    tokens, queries = inputs(Case(1, 257, 8, 16))
    with pytest.raises(RuntimeError, match="cosmos_pool_forward: an argument is out of range"):
        kernel(tokens, queries)
    assert "257 tokens" in pool_cuda.why_unsupported(tokens)
    assert "float16 or bfloat16" in pool_cuda.why_unsupported(tokens.float())
    assert "multiples of 8" in pool_cuda.why_unsupported(tokens[:, :9, :12])
    assert "needs CUDA tensors" in pool_cuda.why_unsupported(tokens[:, :9])


def test_the_shared_memory_that_is_asked_about_is_that_of_the_kernels(tmp_path):
    sizes = {}
    for direction in ("forward", "backward"):
        wrong = [
            f"template <int> struct Size; Size<sizeof(Shared<{tokens}>)> of_{tokens};" for tokens in (64, 128, 256)
        ]
        source = tmp_path / f"{direction}.cpp"
        body = "\n".join(wrong)
        source.write_text(f'#include "pool_{direction}_cuda.cu"\nnamespace cosmos {{ namespace {{ {body} }} }}\n')
        command = [COMPILER, "-std=c++17", "-DCOSMOS_EMULATE", "-fsyntax-only", "-I", CSRC, source]
        told = subprocess.run(command, capture_output=True, text=True).stderr
        found = dict.fromkeys(re.findall(r"Size<(\d+)>[^\n]*of_(\d+)", told))
        sizes[direction] = {int(tokens): int(size) for size, tokens in found}
    assert {
        tokens: max(found[tokens] for found in sizes.values()) for tokens in (64, 128, 256)
    } == pool_cuda.SHARED_BYTES


@pytest.mark.parametrize(
    ("length", "limit", "reason"),
    [
        (64, 101_376, None),
        (65, 101_376, "65 tokens take 104000 bytes of shared memory, a block has 101376 on this GPU"),
        (196, 101_376, "196 tokens take 160000 bytes of shared memory, a block has 101376 on this GPU"),
        (196, 166_912, None),
    ],
)
def test_tokens_that_do_not_fit_the_shared_memory_are_refused(length, limit, reason, monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(triton_support, "shared_bytes", lambda _: limit)
    tokens = torch.zeros(1, length, 16, dtype=HALF).as_subclass(OnGpu)
    assert pool_cuda.why_unsupported(tokens) == reason

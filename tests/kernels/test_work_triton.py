"""What the Triton kernels of the loss, distillation and pooling do an element: products and exponentials, counted.

The interpreter is asked, so this is about the kernels as they are written, not about what a compiler makes of them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from cosmos_kernels import distill_triton, infonce_backward_triton, infonce_triton, pool_triton, triton_support

pytestmark = pytest.mark.skipif(
    not triton_support.INTERPRETED or not hasattr(interpreter, "InterpreterBuilder"),
    reason="counted by Triton's interpreter",
)
SIZE, DIM = 64, 32  # whole tiles of fp32 features


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """multiply_adds and exps of every kernel since it was cleared."""
    counted: Counter[str] = Counter()
    builder = interpreter.InterpreterBuilder
    dot, exp = builder.create_dot, builder.create_exp

    def counting_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        counted["multiply_adds"] += a.data.size * b.data.shape[-1]
        return dot(self, a, b, *others)

    def counting_exp(self: Any, x: Any) -> Any:
        counted["exps"] += x.data.size
        return exp(self, x)

    monkeypatch.setattr(builder, "create_dot", counting_dot)
    monkeypatch.setattr(builder, "create_exp", counting_exp)
    return counted


def unit(views: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(views, SIZE, DIM, generator=generator), dim=-1)


@pytest.mark.parametrize(("scale", "exps"), [(14.3, 1), (1000.0, 2)])
def test_infonce_makes_every_similarity_once_a_pass_for_both_directions(
    scale: float, exps: int, work: Counter[str]
) -> None:
    """With one exponential where the range of the tile allows; the products with G are the library's."""
    rows, columns, logits = unit(2, 0), unit(1, 1), 2 * SIZE * SIZE
    row_lse, col_lse, _ = infonce_triton.log_sum_exps(rows, columns, torch.tensor(scale), 0)
    assert work["multiply_adds"] == logits * DIM
    assert exps * logits <= work["exps"] <= (exps + 0.1) * logits  # and those that merge tiles
    work.clear()
    infonce_triton.feature_gradients(rows, columns, torch.tensor(scale), row_lse, col_lse, 0, True)
    assert work["multiply_adds"] == logits * DIM
    assert exps * logits <= work["exps"] <= (exps + 0.1) * logits


def test_distillation_makes_every_similarity_once_a_pass_for_both_directions(work: Counter[str]) -> None:
    features = unit(2, 0), unit(1, 1), unit(2, 2), unit(1, 3)
    scales = torch.tensor(14.3), torch.tensor(13.0)
    states = distill_triton.statistics(*features, *scales)
    assert work["multiply_adds"] == 2 * 2 * SIZE * SIZE * DIM  # student's and teacher's
    work.clear()
    distill_triton.feature_gradients(*features, *scales, *states, 1.0, 1.0, True, True)
    assert work["multiply_adds"] == 2 * 2 * SIZE * SIZE * DIM


def test_pooling_meets_the_tokens_twice_forward_and_six_times_backward_with_one_exponential(
    work: Counter[str],
) -> None:
    """Scores and sums; then scores, their gradient, the sums once more, and the gradients of queries and tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens, queries = (torch.randn(2, SIZE, DIM, generator=generator).half() for _ in range(2))
    meeting = 2 * SIZE * SIZE * DIM
    _, lse = pool_triton.attend(tokens, queries)
    assert work == {"multiply_adds": 2 * meeting, "exps": 2 * SIZE * SIZE}
    work.clear()
    pool_triton.attend_backward(tokens, queries, lse, queries)
    assert work == {"multiply_adds": 6 * meeting, "exps": 2 * SIZE * SIZE}


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made; the interpreter has copies of some as bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.nbytes = max(self.nbytes, out.nbytes if isinstance(out, Tensor) else 0)
        return out


def test_infonce_works_within_its_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial log-sum-exps of one pair of views at a time, and the gradient of a part of the 2 x 3 pairs."""
    rows, columns, scale = unit(2, 0), unit(3, 1), torch.tensor(14.3)
    monkeypatch.setattr(infonce_triton, "PARTIALS_BYTES", 4 * 2 * SIZE)
    monkeypatch.setattr(infonce_backward_triton, "GRADIENT_BYTES", 4 * 2 * SIZE * SIZE)
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(infonce_triton, "_log_sum_exps_kernel", Recorded(infonce_triton._log_sum_exps_kernel, grids))
    row_lse, col_lse, _ = infonce_triton.log_sum_exps(rows, columns, scale, 0)
    assert grids == [(1,)] * 2 * 3
    with Largest() as made:
        infonce_triton.feature_gradients(rows, columns, scale, row_lse, col_lse, 0, True)
    assert made.nbytes <= 4 * 2 * SIZE * SIZE


def test_distillation_works_within_its_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of pieces, and the gradient's matrix, of 4 x 3 views one or two at a time."""
    features = unit(4, 0), unit(3, 1), unit(4, 2), unit(3, 3)
    scales = torch.tensor(14.3), torch.tensor(13.0)
    pieces = 5 * 3 * SIZE  # of one row tile and view
    monkeypatch.setattr(distill_triton, "STATE_BYTES", 4 * 2 * pieces)
    monkeypatch.setattr(distill_triton, "MIN_PROGRAMS", 1)
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(distill_triton, "_statistics_kernel", Recorded(distill_triton._statistics_kernel, grids))
    states = distill_triton.statistics(*features, *scales)
    assert [tiles * pairs for tiles, _, pairs in grids] == [2 * 3, 2 * 3]
    monkeypatch.setattr(distill_triton, "CHUNK_ROWS", SIZE)
    monkeypatch.setattr(distill_triton, "CHUNK_BYTES", 4 * SIZE * SIZE)
    with Largest() as made:
        distill_triton.feature_gradients(*features, *scales, *states, 1.0, 1.0, True, True)
    assert made.nbytes <= 4 * max(SIZE * SIZE, 4 * SIZE * DIM)


class Recorded:
    """A kernel whose grids are kept."""

    def __init__(self, kernel: Any, grids: list[tuple[int, ...]]) -> None:
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]

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
from triton.runtime import interpreter

from cosmos_kernels import distill_triton, infonce_triton, pool_triton, triton_support

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

"""The shapes that the Triton kernels must be held to fp64 at: every one of them is in a list that a test goes through.

What no list shows has a test of its own name in the same modules: identical features, strides, norms far from one.
"""

from __future__ import annotations

from tests.kernels import test_distill_dense_triton as dense
from tests.kernels import test_distill_triton as distill
from tests.kernels import test_infonce_triton as infonce
from tests.kernels import test_pool_triton as pool

VIEWS, BATCHES, DIMS, TOKENS = set(range(1, 9)), {1, 7, 64, 130}, {32, 48, 100, 512}, {1, 12, 77, 196}


def test_infonce_is_tested_at_all_of_them() -> None:
    views_a, views_b, batches, dims, scales, dtypes = (set(column) for column in zip(*infonce.CASES, strict=True))
    assert views_a | views_b >= VIEWS
    assert batches >= BATCHES
    assert dims >= DIMS
    assert {1.0, 100.0} <= scales
    assert {infonce.FLOAT, infonce.HALF, infonce.BFLOAT16} == dtypes
    assert {batch for batch, columns, _ in infonce.COLUMNS if columns > batch} >= BATCHES - {1}
    assert any(0 < offset < columns - batch for batch, columns, offset in infonce.COLUMNS)
    assert {"tiny", "huge", "one column"} <= set(infonce.EXTREMES)


def test_distillation_is_tested_at_all_of_them() -> None:
    views_a, views_b, teacher_a, teacher_b, rows, columns, dims, _ = zip(*distill.SHAPES, strict=True)
    assert {*views_a, *views_b} >= VIEWS
    assert set(rows) >= BATCHES
    assert set(dims) >= DIMS
    assert any(wide > high for high, wide in zip(rows, columns, strict=True))
    assert any(one == 1 < many for one, many in zip(teacher_a + teacher_b, views_a + views_b, strict=True))
    assert {1.0, 100.0} <= set(distill.SCALES)
    assert len(set(distill.DTYPES)) == len(set(dense.DTYPES)) == 3


def test_pooling_is_tested_at_all_of_them() -> None:
    shapes = [*pool.SHAPES, *pool.MANY]
    batches, views, tokens, dims, _ = (set(column) for column in zip(*shapes, strict=True))
    assert views >= VIEWS
    assert batches >= BATCHES
    assert dims >= DIMS
    assert tokens >= TOKENS
    assert len(pool.DTYPES) == 3

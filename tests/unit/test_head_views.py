"""Heads as views of a projection, and their gradients as views of one matrix."""

from __future__ import annotations

import pytest
import torch

from cosmos_fast.ops.head_views import head_views, joined


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_same_views_and_gradients_as_unbind(parts):
    packed = torch.randn(5, parts * 6, dtype=torch.float64, requires_grad=True)
    found, expected = head_views(packed, parts, 2), packed.unflatten(1, (parts, 2, 3)).unbind(1)
    assert all(view.data_ptr() == other.data_ptr() for view, other in zip(found, expected, strict=True))
    weights = [torch.randn(5, 2, 3, dtype=torch.float64) for _ in range(parts)]
    gradients = [torch.autograd.grad(views, packed, weights)[0] for views in (found, expected)]
    assert torch.equal(*gradients)


def test_a_part_that_nothing_reads():
    packed = torch.randn(5, 18, requires_grad=True)
    _, keys, _ = head_views(packed, 3, 2)
    (gradient,) = torch.autograd.grad(keys.sum(), packed)
    assert gradient.unflatten(1, (3, 6)).sum((0, 2)).tolist() == [0, 30, 0]


def test_gradients_that_lie_in_one_matrix_are_not_copied():
    matrix = torch.randn(4, 3, 2, 5)
    whole = joined(matrix.unbind(1))
    assert whole.data_ptr() == matrix.data_ptr()
    assert torch.equal(whole, matrix.flatten(1))
    # Views in another order, of another width, or of a matrix with more rows in between are stacked.
    for other in (matrix.unbind(1)[::-1], matrix.unbind(1)[:2], matrix[..., :3].unbind(1), matrix[::2].unbind(1)):
        found = joined(other)
        assert torch.equal(found, torch.stack(other, 1).flatten(1))
        assert found.untyped_storage().data_ptr() != matrix.untyped_storage().data_ptr()

"""Which part of the similarities is in the workspace at a time.

Axes: Va, Vb views, B rows, G columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple


class Rectangle(NamedTuple):
    """Part of the similarities: whole views of a side, or a part of one view."""

    row_views: slice
    rows: slice
    column_views: slice
    columns: slice


def pairs(row_views: int, column_views: int, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Cover all pairs of views by chunks of at most `most` (at least one): first row view, how many, columns alike."""
    views_b = min(column_views, max(1, most))
    views_a = max(1, most // column_views)
    for first_a in range(0, row_views, views_a):
        for first_b in range(0, column_views, views_b):
            yield first_a, min(views_a, row_views - first_a), first_b, min(views_b, column_views - first_b)


def rectangles(
    row_views: int, batch: int, column_views: int, total: int, elements: int, square: bool
) -> Iterator[Rectangle]:
    """Cover the similarities by rectangles of at most `elements`, pitch included.

    Where both sides want a gradient, square ones: every product then adds to an output much smaller than the
    rectangle. Else as many columns as leave 1024 rows: fewer additions to the rows' gradient.
    """
    height = min(row_views * batch, math.isqrt(elements) if square else 1024)
    columns = list(_parts(column_views, total, max(64, elements // height // 128 * 128)))
    widest = max(_length(*side) for side in columns)
    for views_a, part_a in _parts(row_views, batch, max(1, elements // padded_width(widest))):
        for views_b, part_b in columns:
            yield Rectangle(views_a, part_a, views_b, part_b)


def _parts(views: int, size: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Cover views of `size` samples by pieces of at most `most`: several whole views, or a part of one."""
    if size <= most:
        count = most // size
        yield from ((slice(v, min(v + count, views)), slice(0, size)) for v in range(0, views, count))
        return
    step = most // 128 * 128 or most
    for view in range(views):
        yield from ((slice(view, view + 1), slice(i, min(i + step, size))) for i in range(0, size, step))


def _length(views: slice, part: slice) -> int:
    """Rows or columns in these views."""
    return (views.stop - views.start) * (part.stop - part.start)


def padded_width(columns: int) -> int:
    """Elements from row to row of the workspace: all rows aligned, as the library's products like them."""
    return (columns + 15) // 16 * 16


def workspace_elements(part: Rectangle) -> int:
    """Of the workspace, for G of this rectangle."""
    return _length(part.row_views, part.rows) * padded_width(_length(part.column_views, part.columns))

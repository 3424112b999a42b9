"""Soft-target distillation tile by tile in PyTorch: the stages of both forms, no logits stored.

Workspace is a handful of tiles, whatever the batch: `TILE_ELEMENTS` student and as many teacher logits at a time.

Axes: Va, Vb views, B rows, G columns, D embedding, M rows and K classes of dense logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_kernels import distill_state
from cosmos_kernels.distill_state import TEACHER_PEAK

TILE_ELEMENTS = 1 << 19  # logits held at a time: 2 MiB in fp32
SAFE_EXPONENT_RANGE = 80.0  # exp(-80) is still a normal fp32 number


class Similarities(NamedTuple):
    """What logits are computed from, in the dtype of the computation: features [V, B or G, D], scale a scalar."""

    a_VBD: Tensor
    b_VGD: Tensor
    scale: Tensor

    @classmethod
    def of(cls, a_VBD: Tensor, b_VGD: Tensor, scale: Tensor) -> Similarities:
        dtype = torch.promote_types(a_VBD.dtype, torch.float32)
        return cls(a_VBD.to(dtype), b_VGD.to(dtype), scale.to(dtype))

    def bound(self) -> float:
        """An upper bound of all |logits| from the largest norms (Cauchy-Schwarz)."""
        norms = [torch.linalg.vector_norm(features, dim=2).amax() for features in (self.a_VBD, self.b_VGD)]
        return float(self.scale.abs() * norms[0] * norms[1])

    def logits(self, tile: Tile) -> Tensor:
        """[rows, columns] of the tile, freshly allocated. Views are counted modulo: one view serves all."""
        a_BD = self.a_VBD[tile.row_view % self.a_VBD.shape[0], tile.rows]
        b_GD = self.b_VGD[tile.column_view % self.b_VGD.shape[0], tile.columns]
        return (a_BD * self.scale) @ b_GD.T


class Tile(NamedTuple):
    row_view: int
    rows: slice
    column_view: int
    columns: slice


def statistics(
    student_a_VBD: Tensor,
    student_b_VGD: Tensor,
    teacher_a_VBD: Tensor,
    teacher_b_VGD: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """States (see `distill_state`) of every row [5, Va, B, Vb] and of every column [5, Va, Vb, G]."""
    student = Similarities.of(student_a_VBD, student_b_VGD, student_scale)
    teacher = Similarities.of(teacher_a_VBD, teacher_b_VGD, teacher_scale)
    (row_views, batch, _), (column_views, total, _) = student.a_VBD.shape, student.b_VGD.shape
    dtype = torch.promote_types(student.a_VBD.dtype, teacher.a_VBD.dtype)
    row_states = student.a_VBD.new_empty((distill_state.SIZE, row_views, batch, column_views), dtype=dtype)
    column_states = row_states.new_empty(distill_state.SIZE, row_views, column_views, total)
    bounds = student.bound(), teacher.bound()
    for tile in _tiles(row_views, batch, column_views, total):
        rows, columns = _tile_states(student.logits(tile).to(dtype), teacher.logits(tile).to(dtype), bounds)
        _put(row_states[:, tile.row_view, tile.rows, tile.column_view], rows, first=tile.columns.start == 0)
        _put(column_states[:, tile.row_view, tile.column_view, tile.columns], columns, first=tile.rows.start == 0)
    return row_states, column_states


def feature_gradients(
    student_a_VBD: Tensor,
    student_b_VGD: Tensor,
    teacher_a_VBD: Tensor,
    teacher_b_VGD: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    row_states: Tensor,
    column_states: Tensor,
    row_weight: float,
    column_weight: float,
    want_a: bool,
    want_b: bool,
) -> tuple[Tensor, Tensor]:
    """Sums of row_weight (q_r - p_r) + column_weight (q_c - p_c) times the other side: [Va, B, D] and [Vb, G, D].

    q and p are the student's and the teacher's softmax over the columns (r) and over the rows (c). A side that is not
    wanted comes back as an empty tensor.
    """
    student = Similarities.of(student_a_VBD, student_b_VGD, student_scale)
    teacher = Similarities.of(teacher_a_VBD, teacher_b_VGD, teacher_scale)
    grad_a = torch.zeros_like(student.a_VBD) if want_a else student.a_VBD.new_empty(0)
    grad_b = torch.zeros_like(student.b_VGD) if want_b else student.b_VGD.new_empty(0)
    bounds = student.bound(), teacher.bound()
    (row_views, batch, _), (column_views, total, _) = student.a_VBD.shape, student.b_VGD.shape
    for tile in _tiles(row_views, batch, column_views, total):
        rows = row_states[:, tile.row_view, tile.rows, tile.column_view].unsqueeze(2)
        columns = column_states[:, tile.row_view, tile.column_view, tile.columns].unsqueeze(1)
        student_logits, teacher_logits = student.logits(tile).to(rows.dtype), teacher.logits(tile).to(rows.dtype)
        weights = row_weight, column_weight
        grad = _softmaxes(student_logits, rows[:TEACHER_PEAK], columns[:TEACHER_PEAK], weights, bounds[0])
        grad -= _softmaxes(teacher_logits, rows[TEACHER_PEAK:], columns[TEACHER_PEAK:], weights, bounds[1])
        grad = grad.to(student.a_VBD.dtype)
        if want_a:
            grad_a[tile.row_view, tile.rows].addmm_(grad, student.b_VGD[tile.column_view, tile.columns])
        if want_b:
            grad_b[tile.column_view, tile.columns].addmm_(grad.T, student.a_VBD[tile.row_view, tile.rows])
    return grad_a, grad_b


def dense_statistics(
    student_MK: Tensor, teacher_MK: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """States (see `distill_state`) of the rows of the logits over their temperatures: [5, M].

    PyTorch's softmaxes read a chunk fewer times than the sums of a state taken one by one; the state follows from them.
    """
    dtype = _dense_dtype(student_MK, teacher_MK)
    states = []
    for student, teacher in _row_chunks(student_MK, teacher_MK):
        student, teacher = student.to(dtype) / student_temperature, teacher.to(dtype) / teacher_temperature
        peaks = student.amax(1), teacher.amax(1)
        log_odds, targets = student.log_softmax(1), teacher.softmax(1)
        log_sum, teacher_sum = -log_odds.amax(1), 1 / targets.amax(1)
        expected = teacher_sum * (targets.mul_(log_odds).sum(1) + log_sum)
        states.append(torch.stack((peaks[0], log_sum.exp(), peaks[1], teacher_sum, expected)))
    return torch.cat(states, dim=1)


def dense_gradient(
    student_MK: Tensor,
    teacher_MK: Tensor,
    row_states: Tensor,
    weight: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """weight (softmax(student) - softmax(teacher)) of the logits over their temperatures: [M, K], student's dtype.

    The states are not needed: PyTorch's softmax of a chunk costs no more than exponentials with known sums.
    """
    grad_MK = torch.empty_like(student_MK, memory_format=torch.contiguous_format)
    start = 0
    for student, teacher in _row_chunks(student_MK, teacher_MK):
        rows = slice(start, start := start + student.shape[0])
        grad = (student.to(row_states.dtype) / student_temperature).softmax(1)
        grad -= (teacher.to(row_states.dtype) / teacher_temperature).softmax(1)
        grad_MK[rows] = grad.mul_(weight)
    return grad_MK


def _dense_dtype(student_MK: Tensor, teacher_MK: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student_MK.dtype, teacher_MK.dtype), torch.float32)


def _row_chunks(student_MK: Tensor, teacher_MK: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same rows of both, at most TILE_ELEMENTS logits (one row at least)."""
    rows = max(1, TILE_ELEMENTS // student_MK.shape[1])
    yield from zip(student_MK.split(rows), teacher_MK.split(rows), strict=True)


def _tiles(row_views: int, batch: int, column_views: int, total: int) -> Iterator[Tile]:
    """Cover every pair of views with tiles of at most TILE_ELEMENTS."""
    width = min(total, max(1, TILE_ELEMENTS // min(batch, 128)))
    height = min(batch, max(1, TILE_ELEMENTS // width))
    for row_view in range(row_views):
        for first_row in range(0, batch, height):
            rows = slice(first_row, min(first_row + height, batch))
            for column_view in range(column_views):
                for first_column in range(0, total, width):
                    yield Tile(row_view, rows, column_view, slice(first_column, min(first_column + width, total)))


def _put(target: Tensor, state: Tensor, *, first: bool) -> None:
    """The first piece of a row stands alone; later ones are merged into it."""
    target.copy_(state if first else distill_state.merge(torch.stack((target, state))))


def _tile_states(student: Tensor, teacher: Tensor, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """States of a tile's rows [5, rows] and columns [5, columns]; may overwrite the logits."""
    student_shift, teacher_shift = _shared_shift(student, bounds[0]), _shared_shift(teacher, bounds[1])
    if student_shift is None or teacher_shift is None:
        return distill_state.of_logits(student, teacher, 1), distill_state.of_logits(student, teacher, 0)
    # One exponential a logit serves both directions.
    student_weights, teacher_weights = _minus(student, student_shift).exp(), _minus(teacher, teacher_shift).exp_()
    expected = student.mul_(teacher_weights)
    states = []
    for dim in (1, 0):
        student_sum = student_weights.sum(dim)
        student_peak, teacher_peak = (torch.full_like(student_sum, shift) for shift in (student_shift, teacher_shift))
        states.append(
            torch.stack((student_peak, student_sum, teacher_peak, teacher_weights.sum(dim), expected.sum(dim)))
        )
    return states[0], states[1]


def _softmaxes(logits: Tensor, rows: Tensor, columns: Tensor, weights: tuple[float, float], bound: float) -> Tensor:
    """weights[0] softmax over the columns + weights[1] softmax over the rows; overwrites the logits.

    rows, columns: [2 or more, rows, 1] and [2 or more, 1, columns], peaks and sums in front.
    """
    (row_peak, row_sum), (column_peak, column_sum) = rows[:2], columns[:2]
    shift = _shared_shift(logits, bound)
    if shift is None:
        over_columns = (logits - row_peak).exp_().mul_(weights[0] / row_sum)
        return over_columns.addcmul_(logits.sub_(column_peak).exp_(), weights[1] / column_sum)
    factors = (shift - row_peak).exp_().mul_(weights[0]) / row_sum
    factors = factors + (shift - column_peak).exp_().mul_(weights[1]) / column_sum
    return _minus(logits, shift).exp_().mul_(factors)


def _minus(logits: Tensor, shift: float) -> Tensor:
    """In place; a pass over memory less where there is nothing to subtract."""
    return logits.sub_(shift) if shift else logits


def _shared_shift(logits: Tensor, bound: float) -> float | None:
    """A shift under which one exponential serves rows and columns without underflow; None if there is none."""
    if 2 * bound < SAFE_EXPONENT_RANGE:
        return 0.0
    low, high = (float(value) for value in torch.aminmax(logits))
    return high if high - low < SAFE_EXPONENT_RANGE else None

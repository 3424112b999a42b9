"""Cross-entropy of a teacher's and a student's softmax that are seen in pieces: the state of the online computation.

Of a piece of a row (or column) of student logits s and teacher logits t five numbers are kept, stacked in front:

    student_peak, student_sum = sum exp(s - student_peak)
    teacher_peak, teacher_sum = sum exp(t - teacher_peak)
    expected = sum exp(t - teacher_peak) (s - student_peak)

A peak is any number near the largest logit. States of pieces merge by addition once their peaks are made equal, in any
order and on any rank. Of a whole row, `cross_entropy` = log student_sum - expected / teacher_sum: nothing cancels,
however large the logits; and softmax(s) = exp(s - student_peak) / student_sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

STUDENT_PEAK, STUDENT_SUM, TEACHER_PEAK, TEACHER_SUM, EXPECTED = range(5)
SIZE = 5


def of_logits(student_MK: Tensor, teacher_MK: Tensor, dim: int) -> Tensor:
    """States of whole rows (dim 1) or columns (dim 0) of logits in memory: [5, M] or [5, K]."""
    student_peak, teacher_peak = student_MK.amax(dim), teacher_MK.amax(dim)
    shifted_MK = student_MK - student_peak.unsqueeze(dim)
    weights_MK = (teacher_MK - teacher_peak.unsqueeze(dim)).exp_()
    teacher_sum, expected = weights_MK.sum(dim), weights_MK.mul_(shifted_MK).sum(dim)
    return torch.stack((student_peak, shifted_MK.exp_().sum(dim), teacher_peak, teacher_sum, expected))


def merge(pieces_N5: Tensor) -> Tensor:
    """States [N, 5, ...] of pieces of the same rows put together: [5, ...]."""
    if pieces_N5.shape[0] == 1:
        return pieces_N5[0]
    student_peak, teacher_peak = pieces_N5[:, STUDENT_PEAK].amax(0), pieces_N5[:, TEACHER_PEAK].amax(0)
    student_shift = pieces_N5[:, STUDENT_PEAK] - student_peak
    student_factor, teacher_factor = student_shift.exp(), (pieces_N5[:, TEACHER_PEAK] - teacher_peak).exp_()
    student_sum = (student_factor * pieces_N5[:, STUDENT_SUM]).sum(0)
    teacher_sums = teacher_factor * pieces_N5[:, TEACHER_SUM]
    expected = (teacher_factor * pieces_N5[:, EXPECTED] + teacher_sums * student_shift).sum(0)
    return torch.stack((student_peak, student_sum, teacher_peak, teacher_sums.sum(0), expected))


def cross_entropy(state_5: Tensor) -> Tensor:
    """Cross-entropy of every row whose whole state [5, ...] this is."""
    return state_5[STUDENT_SUM].log() - state_5[EXPECTED] / state_5[TEACHER_SUM]

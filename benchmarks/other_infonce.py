"""Contrastive losses of other libraries, of one pair of views. Axes: B batch, D embedding."""

from __future__ import annotations

import math

from torch import Tensor


def inf_cl_pair(a_BD: Tensor, b_BD: Tensor, scale: Tensor) -> Tensor:
    """Both directions of Inf-CL's single-GPU loss, which returns one direction, a number a row. D: a multiple of 16.

    It reads features as heads of a power of two of channels, 256 by its own choice.
    """
    from inf_cl import cal_flash_loss

    head_dim = math.gcd(a_BD.shape[1], 256)
    return sum(cal_flash_loss(x, y, scale=scale, head_dim=head_dim).mean() for x, y in ((a_BD, b_BD), (b_BD, a_BD))) / 2

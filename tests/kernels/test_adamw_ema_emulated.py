"""csrc/adamw_ema_cuda.cu and grad_norm_cuda.cu, their own sources compiled for the host, against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cosmos_kernels.adamw_ema_native import adamw_ema_cuda_, grad_norm_cuda
from tests.kernels import adamw_ema_cases as cases
from tests.kernels.emulated_library import emulated, emulated_folder  # noqa: F401

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize(("average", "copies", "shift"), cases.KINDS)
def test_a_step_equals_fp64(average: bool, copies: bool, shift: int) -> None:
    cases.assert_step_equals_fp64(adamw_ema_cuda_, average=average, copies=copies, shift=shift)


def test_a_norm_that_is_not_finite_stops_the_step_or_goes_through() -> None:
    cases.assert_nonfinite_norm_is_heeded(adamw_ema_cuda_)


def test_nan_stays_where_it_is() -> None:
    cases.assert_nan_stays_where_it_is(adamw_ema_cuda_)


def test_clipping_without_a_norm_is_refused() -> None:
    without = replace(cases.make([5]), norm=None)
    with pytest.raises(RuntimeError, match="out of range"):
        adamw_ema_cuda_(without, cases.OPTIONS)


@pytest.mark.parametrize("shift", [0, 1])
def test_norm_equals_fp64(shift: int) -> None:
    cases.assert_norm_equals_fp64(grad_norm_cuda, shift=shift)

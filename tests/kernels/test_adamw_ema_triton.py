"""The optimizer step in Triton against fp64; in the interpreter where there is no GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cosmos_fast.ops.adamw_ema import adamw_ema_
from cosmos_kernels.adamw_ema_triton import _norm_kernel, _programs, _table, grad_norm
from cosmos_kernels.adamw_ema_triton import adamw_ema_ as step_
from tests.kernels import adamw_ema_cases as cases


@pytest.mark.parametrize(("average", "copies", "shift"), cases.KINDS)
def test_a_step_equals_fp64(device: str, average: bool, copies: bool, shift: int) -> None:
    cases.assert_step_equals_fp64(step_, average=average, copies=copies, shift=shift, device=device)


def test_a_norm_that_is_not_finite_stops_the_step_or_goes_through(device: str) -> None:
    cases.assert_nonfinite_norm_is_heeded(step_, device)


def test_nan_stays_where_it_is(device: str) -> None:
    cases.assert_nan_stays_where_it_is(step_, device)


@pytest.mark.parametrize("shift", [0, 1])
def test_norm_equals_fp64(device: str, shift: int) -> None:
    cases.assert_norm_equals_fp64(grad_norm, shift=shift, device=device, sizes=[1, 63, 2048, 0, 2049, 9000, 5, 17])


def test_programs_are_those_of_the_tensors_in_order() -> None:
    owner, first = _programs((1, 0, 4096, 2049, 0), torch.device("cpu"))
    assert owner.tolist() == [0, 2, 2, 3, 3]
    assert first.tolist() == [0, 1, 1, 3, 5]


@pytest.mark.parametrize("shift", [0, 1])
def test_wide_loads_only_where_every_address_allows(device: str, shift: int) -> None:
    """On a GPU an address that is no multiple of 16 bytes would be a fault."""
    tensors = cases.make([64, 5], device=device)
    assert _table(tensors, [64, 5])[1]
    moved = replace(tensors, exp_avgs=[torch.zeros(64 + shift, device=device)[shift:], tensors.exp_avgs[1]])
    assert _table(moved, [64, 5])[1] == (shift == 0)


def test_partial_sums_are_added_in_double_precision(device: str) -> None:
    """In single precision ones would be lost beside the first, those that each lane begins with."""
    partial, norm = torch.ones(40_000, device=device), torch.zeros((), device=device)
    partial[:1024] = 2.0**24
    _norm_kernel[(1,)](partial, norm, len(partial), 1024, num_warps=4)
    assert math.isclose(float(norm), math.sqrt(float(partial.double().sum())), rel_tol=1.5e-7)


def test_flat_buffers_through_the_operation(device: str) -> None:
    """One tensor a buffer, norm and clipping inside, one step number for all."""
    tensors = cases.make([5000], device=device)
    flat = [group[0] for group in (tensors.params, tensors.grads, tensors.exp_avgs, tensors.exp_avg_sqs)]
    assert tensors.ema_params is not None
    doubled = [x.double() for x in (*flat, tensors.ema_params[0])]
    hyper = {"step": 3, "lr": 1e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.2, "ema_decay": 0.9}
    norm = adamw_ema_(*flat, tensors.ema_params[0], **hyper, clip_norm=0.3, backend="triton")
    adamw_ema_(*doubled, **hyper, clip_norm=0.3, backend="eager")
    assert norm is not None
    assert math.isclose(float(norm), cases.norm_in_fp64(tensors.grads), rel_tol=1e-6)
    for got, want in zip((*flat, tensors.ema_params[0]), doubled, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-7)


def test_no_elements_at_all(device: str) -> None:
    step_(cases.make([0, 0], device=device), cases.OPTIONS)

"""The CUDA optimizer step against the eager one in fp64; needs a GPU and the library of csrc/."""

from __future__ import annotations

import pytest
import torch

from cosmos_fast.ops.adamw_ema import adamw_ema_
from cosmos_kernels import native
from cosmos_kernels.adamw_ema_native import adamw_ema_cuda_, grad_norm_cuda
from tests.kernels import adamw_ema_cases as cases

WHY_NOT = native.why_no_gpu()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.5, "ema_decay": 0.99}


@pytest.mark.parametrize(("average", "copies", "shift"), cases.KINDS)
def test_a_step_equals_fp64(average: bool, copies: bool, shift: int) -> None:
    cases.assert_step_equals_fp64(adamw_ema_cuda_, average=average, copies=copies, shift=shift, device="cuda")


def test_a_norm_that_is_not_finite_stops_the_step_or_goes_through() -> None:
    cases.assert_nonfinite_norm_is_heeded(adamw_ema_cuda_, "cuda")


def test_nan_stays_where_it_is() -> None:
    cases.assert_nan_stays_where_it_is(adamw_ema_cuda_, "cuda")


@pytest.mark.parametrize("shift", [0, 1])
def test_norm_equals_fp64(shift: int) -> None:
    cases.assert_norm_equals_fp64(grad_norm_cuda, shift=shift, device="cuda")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_runs_on_the_current_stream_and_waits_for_nothing(backend: str) -> None:
    tensors = cases.make([2**20], device="cuda")
    lists = [list(group) for group in (tensors.params, tensors.grads, tensors.exp_avgs, tensors.exp_avg_sqs)]
    doubled = [[x.double() for x in group] for group in lists]
    doubled[1][0] *= 2
    adamw_ema_(*doubled, step=1, clip_norm=1.0, **HYPER, backend="eager")
    warm_up = [[x.clone() for x in group] for group in lists]
    adamw_ema_(*warm_up, step=1, clip_norm=1.0, **HYPER, backend=backend)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        lists[1][0].mul_(2)  # on this stream, behind the sleep: another stream would read the old gradient
        adamw_ema_(*lists, step=1, clip_norm=1.0, skip_nonfinite=True, **HYPER, backend=backend)
        done.record()
        assert not done.query(), "the host waited for the device"
    torch.cuda.synchronize()
    torch.testing.assert_close(lists[0][0].double(), doubled[0][0], rtol=1e-6, atol=2e-7)

"""The CUDA optimizer step against the eager one in fp64; needs a GPU and the library of csrc/."""

from __future__ import annotations

import pytest
import torch

from cosmos_fast.ops.adamw_ema import adamw_ema_
from cosmos_kernels import native

WHY_NOT = "no CUDA device" if not torch.cuda.is_available() else native.why_missing("cuda")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.5, "ema_decay": 0.99}
# More tensors than one launch carries, empty ones between, several chunks, ragged ends.
SIZES = [1, 7, 1023, 2**16 + 3, 0, 5, 2**14, 2**14 + 1, *range(3, 60), 0, 3 * 2**20 + 1]


def random_lists(sizes, offset=0):
    """Tensors on the GPU; offset 1 puts them off the 16-byte grid."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda n: torch.randn(n + offset, device="cuda", generator=generator)[offset:]  # noqa: E731
    params, grads, ema = ([draw(n) for n in sizes] for _ in range(3))
    exp_avgs = [0.1 * draw(n) for n in sizes]
    return params, grads, exp_avgs, [draw(n).square() for n in sizes], ema


def assert_equal_to_fp64(sizes, offset=0, with_ema=True, scale=1.0, steps=3):
    *lists, ema = random_lists(sizes, offset)
    truth = [[tensor.double() for tensor in group] for group in (*lists, ema)]
    for step in range(1, steps + 1):
        given = ema if with_ema else None
        adamw_ema_(*lists, given, step=step, **HYPER, grad_scale=scale, backend="cuda")
        wanted = truth[4] if with_ema else None
        adamw_ema_(*truth[:4], wanted, step=step, **HYPER, grad_scale=float(scale), backend="eager")
    for got_group, want_group in zip((*lists, ema), truth, strict=True):
        for got, want in zip(got_group, want_group, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("with_ema", [True, False])
def test_many_ragged_tensors(offset, with_ema):
    assert_equal_to_fp64(SIZES, offset=offset, with_ema=with_ema)


def test_gradient_scale_on_the_device():
    assert_equal_to_fp64(SIZES[:6], scale=torch.tensor(0.25, device="cuda"))
    assert_equal_to_fp64(SIZES[:6], scale=0.25)


def test_no_tensors_and_only_empty_tensors():
    assert_equal_to_fp64([])
    assert_equal_to_fp64([0] * 50)


def test_runs_on_the_current_stream():
    params, grads, exp_avgs, exp_avg_sqs, _ = random_lists([2**20])
    want = [params[0].clone()]
    state = [exp_avgs[0].clone()], [exp_avg_sqs[0].clone()]
    adamw_ema_(want, [grads[0] * 2], *state, None, step=1, **HYPER, backend="eager")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        grads[0].mul_(2)  # on this stream, behind the sleep: another stream would read the old gradient
        adamw_ema_(params, grads, exp_avgs, exp_avg_sqs, None, step=1, **HYPER, backend="cuda")
    torch.cuda.synchronize()
    torch.testing.assert_close(params[0], want[0], rtol=1e-5, atol=1e-6)


def test_nan_stays_where_it_is():
    params, grads, exp_avgs, exp_avg_sqs, ema = random_lists([1000])
    grads[0][997] = float("nan")
    adamw_ema_(params, grads, exp_avgs, exp_avg_sqs, ema, step=1, **HYPER, backend="cuda")
    assert params[0].isnan().nonzero().flatten().tolist() == [997]
    assert not ema[0].isnan().any()

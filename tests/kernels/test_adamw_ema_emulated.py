"""csrc/adamw_ema_cuda.cu and grad_norm_cuda.cu, their own sources compiled for the host, against fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cosmos_fast.ops.adamw_ema_eager import adamw_ema_eager_
from cosmos_kernels.adamw_ema_call import AdamwEmaOptions, AdamwEmaTensors
from cosmos_kernels.adamw_ema_native import adamw_ema_cuda_, grad_norm_cuda
from tests.kernels.emulated_library import emulated, emulated_folder, guarded  # noqa: F401

pytestmark = pytest.mark.usefixtures("emulated")

OPTIONS = AdamwEmaOptions(
    lr=3e-3,
    beta1=0.9,
    beta2=0.98,
    eps=1e-8,
    ema_decay=0.99,
    grad_scale=0.5,
    clip_norm=1.0,
    low=0.0,
    high=math.log(100.0),
    skip_nonfinite=True,
)
# More tensors than one launch carries, empty ones between, several chunks, ragged ends.
SIZES = [1, 7, 1023, 0, 4096, 4097, 9000, *range(3, 45), 0, 16390]


def make(sizes: list[int], *, average: bool = True, copies: bool = True, shift: int = 0) -> AdamwEmaTensors:
    """Random tensors between margins of NaN; shift 1 puts them off the 16-byte grid."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float = 1.0) -> list[Tensor]:
        return [guarded(scale * torch.randn(n + shift, generator=generator))[shift:] for n in sizes]

    def halves() -> list[Tensor]:
        return [torch.zeros(n + shift, dtype=torch.bfloat16)[shift:] for n in sizes]

    params, grads, exp_avgs, ema = draw(), draw(), draw(0.1), draw()
    return AdamwEmaTensors(
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=[x.square_() for x in draw()],
        ema_params=ema if average else None,
        param_copies=halves() if copies else None,
        ema_copies=halves() if copies and average else None,
        steps=[1 + i % 3 for i in range(len(sizes))],
        weight_decays=[0.5 * (i % 2) for i in range(len(sizes))],
        clamped=[int(i % 5 == 0) for i in range(len(sizes))],
        grad_scale=torch.tensor(0.5),
        norm=torch.tensor(math.sqrt(sum(float(g.double().square().sum()) for g in grads))),
    )


def in_fp64(t: AdamwEmaTensors) -> AdamwEmaTensors:
    doubled = {
        name: [x.double() for x in group]
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "ema_params")
        if (group := getattr(t, name)) is not None
    }
    return replace(t, **doubled, param_copies=None, ema_copies=None)


def groups_of(t: AdamwEmaTensors) -> list[list[Tensor]]:
    return [list(g) for g in (t.params, t.exp_avgs, t.exp_avg_sqs, t.ema_params, t.param_copies, t.ema_copies) if g]


@pytest.mark.parametrize(
    ("average", "copies", "shift"), [(True, True, 0), (True, True, 1), (False, True, 0), (True, False, 0)]
)
def test_a_step_equals_fp64(average: bool, copies: bool, shift: int) -> None:
    found = make(SIZES, average=average, copies=copies, shift=shift)
    truth = in_fp64(found)
    adamw_ema_cuda_(found, OPTIONS)
    adamw_ema_eager_(truth, OPTIONS)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "ema_params"):
        if getattr(truth, name) is None:
            continue
        for got, want in zip(getattr(found, name), getattr(truth, name), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
    for copied, group in ((found.param_copies, found.params), (found.ema_copies, found.ema_params)):
        for got, source in zip(copied or (), group or () if copied else (), strict=True):
            assert torch.equal(got, source.bfloat16())


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_stops_the_step_or_goes_through(norm: float) -> None:
    tensors = replace(make([5, 4100]), norm=torch.tensor(norm))
    before = [[x.clone() for x in group] for group in groups_of(tensors)]
    adamw_ema_cuda_(tensors, OPTIONS)
    for old, new in zip(before, groups_of(tensors), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    adamw_ema_cuda_(tensors, replace(OPTIONS, skip_nonfinite=False))
    expected = math.isnan(norm)  # infinity: a factor of zero, as torch.nn.utils.clip_grad_norm_ has it
    assert bool(tensors.exp_avgs[1].isnan().all()) == expected


def test_clipping_without_a_norm_is_refused() -> None:
    with pytest.raises(RuntimeError, match="out of range"):
        adamw_ema_cuda_(replace(make([5]), norm=None), OPTIONS)
    adamw_ema_cuda_(replace(make([5]), norm=None), replace(OPTIONS, clip_norm=None, skip_nonfinite=False))


@pytest.mark.parametrize("shift", [0, 1])
def test_norm_equals_fp64(shift: int) -> None:
    sizes = [1, 63, 4097, 0, 16384, 16385, 40000, *range(1, 170)]  # more than one launch carries
    grads = make(sizes, shift=shift, copies=False, average=False).grads
    truth = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    norm = grad_norm_cuda(grads)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert abs(float(norm) - truth) / truth < 1e-6
    assert torch.equal(norm, grad_norm_cuda(grads))
    grads[4][16000] = math.nan
    assert torch.isnan(grad_norm_cuda(grads))
    assert float(grad_norm_cuda([torch.zeros(0)])) == 0.0

"""Inputs for every kernel of the optimizer step, and what they must do, whichever way the kernel is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cosmos_fast.ops.adamw_ema_eager import adamw_ema_eager_
from cosmos_kernels.adamw_ema_call import AdamwEmaOptions, AdamwEmaTensors
from tests.kernels.emulated_library import guarded

Step = Callable[[AdamwEmaTensors, AdamwEmaOptions], None]
Norm = Callable[[Sequence[Tensor]], Tensor]

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
# More tensors than one launch of the CUDA kernel carries, empty ones between, several chunks, ragged ends.
SIZES = [1, 7, 1023, 0, 4096, 4097, 9000, *range(3, 45), 0, 5]
# As many for the norm.
NORM_SIZES = [1, 63, 4097, 0, 16384, 16385, 40000, *range(1, 170)]
# (teacher's average, copies, elements off the 16-byte grid)
KINDS = [(True, True, 0), (True, True, 1), (False, True, 0), (True, False, 0)]


def make(
    sizes: list[int], *, average: bool = True, copies: bool = True, shift: int = 0, device: str = "cpu"
) -> AdamwEmaTensors:
    """Random tensors between margins of NaN, each with its own step, decay and clamp."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float = 1.0) -> list[Tensor]:
        drawn = (scale * torch.randn(n + shift, generator=generator) for n in sizes)
        return [(guarded(x) if device == "cpu" else x.to(device))[shift:] for x in drawn]

    def halves() -> list[Tensor]:
        return [torch.zeros(n + shift, dtype=torch.bfloat16, device=device)[shift:] for n in sizes]

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
        grad_scale=torch.tensor(0.5, device=device),
        norm=torch.tensor(norm_in_fp64(grads), device=device),
    )


def norm_in_fp64(grads: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


def state(t: AdamwEmaTensors) -> list[list[Tensor]]:
    """Everything that a step may write."""
    return [list(g) for g in (t.params, t.exp_avgs, t.exp_avg_sqs, t.ema_params, t.param_copies, t.ema_copies) if g]


def assert_step_equals_fp64(step_: Step, *, average: bool, copies: bool, shift: int, device: str = "cpu") -> None:
    found = make(SIZES, average=average, copies=copies, shift=shift, device=device)
    doubled = {
        name: [x.double() for x in group]
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "ema_params")
        if (group := getattr(found, name)) is not None
    }
    truth = replace(found, **doubled, param_copies=None, ema_copies=None)
    step_(found, OPTIONS)
    adamw_ema_eager_(truth, OPTIONS)
    for name in ("params", "exp_avgs", "exp_avg_sqs", *(["ema_params"] if average else [])):
        for got, want in zip(getattr(found, name), getattr(truth, name), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-7)
    for copied, group in ((found.param_copies, found.params), (found.ema_copies, found.ema_params)):
        if copied is not None:
            assert group is not None
            assert all(torch.equal(got, source.bfloat16()) for got, source in zip(copied, group, strict=True))


def assert_nonfinite_norm_is_heeded(step_: Step, device: str = "cpu") -> None:
    """The step is left out where asked for; else NaN reaches everything, and infinity makes the gradients' factor 0."""
    for norm in (math.nan, math.inf):
        tensors = replace(make([5, 4100], device=device), norm=torch.tensor(norm, device=device))
        before = [[x.clone() for x in group] for group in state(tensors)]
        step_(tensors, OPTIONS)
        for old, new in zip(before, state(tensors), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
        step_(tensors, replace(OPTIONS, skip_nonfinite=False))
        assert bool(tensors.exp_avgs[1].isnan().all()) == math.isnan(norm)
        assert bool(tensors.exp_avgs[1].isfinite().all()) == math.isinf(norm)


def assert_nan_stays_where_it_is(step_: Step, device: str = "cpu") -> None:
    """Without clipping one bad gradient spoils one element; the copy shows it, the clamp does not hide it."""
    tensors = replace(make([1000], device=device), norm=None)
    tensors.grads[0][997] = math.nan
    step_(tensors, replace(OPTIONS, clip_norm=None, skip_nonfinite=False))
    assert tensors.param_copies is not None
    assert tensors.ema_params is not None
    for group in (tensors.params, tensors.param_copies, tensors.exp_avgs):
        assert group[0].isnan().nonzero().flatten().tolist() == [997]
    assert not tensors.ema_params[0].isnan().any()


def assert_norm_equals_fp64(norm_of: Norm, *, shift: int, device: str = "cpu", sizes: list[int] = NORM_SIZES) -> None:
    grads = make(sizes, shift=shift, copies=False, average=False, device=device).grads
    truth = norm_in_fp64(grads)
    norm = norm_of(grads)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert abs(float(norm) - truth) / truth < 1e-6
    assert torch.equal(norm, norm_of(grads)), "the order of additions is not fixed"
    largest = max(range(len(sizes)), key=lambda i: sizes[i])
    grads[largest][-1] = math.nan
    assert torch.isnan(norm_of(grads))
    assert float(norm_of([torch.zeros(0, device=device)])) == 0.0

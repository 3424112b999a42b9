"""What adamw_ema_ does besides the plain step: norm, clipping, skipping, clamps, copies, compilation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cosmos_fast.ops import adamw_ema_stages
from cosmos_fast.ops.adamw_ema import adamw_ema_, grad_norm
from cosmos_kernels import native

BACKENDS = [
    "eager",
    pytest.param(
        "native", marks=pytest.mark.skipif(native.why_missing("cpu") is not None, reason="CPU library not built")
    ),
]
HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "ema_decay": 0.99}
SIZES = [(5, 7), (), (4097,), (3,), ()]
LOG_SCALES = (1, 4)


def make(dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """params, grads, exp_avgs, exp_avg_sqs, ema_params."""
    generator = torch.Generator().manual_seed(0)
    params, grads, ema = ([torch.randn(size, generator=generator).to(dtype) for size in SIZES] for _ in range(3))
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    return [params, grads, *zeros, ema]


def torch_steps(count: int, clip_norm: float) -> list[list[Tensor]]:
    """clip_grad_norm_, a loop of averages, torch.optim.AdamW, clamps; in fp64. Params, averages and both moments."""
    params, grads, _, _, ema = make(torch.float64)
    leaves = [p.requires_grad_() for p in params]
    groups = [{"params": leaves[:2], "weight_decay": 0.5}, {"params": leaves[2:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=HYPER["lr"], betas=(0.9, 0.98), eps=1e-8)
    for _ in range(count):
        for average, leaf, grad in zip(ema, leaves, grads, strict=True):
            average.mul_(HYPER["ema_decay"]).add_(leaf.detach(), alpha=1 - HYPER["ema_decay"])
            leaf.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(leaves, clip_norm)
        optimizer.step()
        with torch.no_grad():
            for i in LOG_SCALES:
                leaves[i].clamp_(0, math.log(100))
                ema[i].clamp_(0, math.log(100))
    moments = [[optimizer.state[leaf][name] for leaf in leaves] for name in ("exp_avg", "exp_avg_sq")]
    return [[leaf.detach() for leaf in leaves], ema, *moments]


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_call_is_clipping_average_adamw_and_clamp(backend: str, clip_norm: float) -> None:
    params, grads, exp_avgs, exp_avg_sqs, ema = make()
    copies = [[torch.zeros_like(p, dtype=torch.bfloat16) for p in params] for _ in range(2)]
    norms = [
        adamw_ema_(
            *(params, grads, exp_avgs, exp_avg_sqs, ema),
            step=step,
            weight_decay=[0.5, 0.5, 0.0, 0.0, 0.0],
            **HYPER,
            clip_norm=clip_norm,
            log_scales=LOG_SCALES,
            param_copies=copies[0],
            ema_copies=copies[1],
            backend=backend,
        )
        for step in range(1, 5)
    ]
    truth = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert all(norm is not None and math.isclose(float(norm), truth, rel_tol=1e-6) for norm in norms)
    for found, wanted in zip((params, ema, exp_avgs, exp_avg_sqs), torch_steps(4, clip_norm), strict=True):
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
    for copy, group in zip(copies, (params, ema), strict=True):
        assert all(torch.equal(got, want.bfloat16()) for got, want in zip(copy, group, strict=True))


@pytest.mark.parametrize("norm", [None, torch.tensor(math.inf)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_norm_leaves_every_bit(backend: str, norm: Tensor | None) -> None:
    lists = make()
    if norm is None:
        lists[1][2][9] = math.nan
    before = [[x.clone() for x in group] for group in lists]
    found = adamw_ema_(*lists, step=1, weight_decay=0.1, **HYPER, norm=norm, skip_nonfinite=True, backend=backend)
    assert found is not None
    assert not math.isfinite(float(found))
    for old, new in zip(before, lists, strict=True):
        assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_still_needs_the_old_parameters_fails(backend: str) -> None:
    params, *others = make()
    leaf = torch.nn.Parameter(params[0])
    loss = leaf.square().sum()
    adamw_ema_([leaf, *params[1:]], *others, step=1, weight_decay=0.1, **HYPER, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_of_their_own(backend: str) -> None:
    """Bias corrections by tensor: the same as one call a tensor."""
    together, apart = make(), make()
    adamw_ema_(*together, step=[1, 2, 3, 4, 5], weight_decay=0.1, **HYPER, backend=backend)
    for i in range(5):
        adamw_ema_(*([group[i]] for group in apart), step=i + 1, weight_decay=0.1, **HYPER, backend=backend)
    for ours, theirs in zip(together, apart, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flat_buffer_is_a_list_of_one(backend: str) -> None:
    lists = make()
    flat = [torch.cat([x.reshape(-1) for x in group]) for group in lists]
    adamw_ema_(*lists, step=2, weight_decay=0.1, **HYPER, clip_norm=1.0, backend=backend)
    adamw_ema_(*flat, step=2, weight_decay=0.1, **HYPER, clip_norm=1.0, backend=backend)
    for group, buffer in zip(lists, flat, strict=True):
        torch.testing.assert_close(torch.cat([x.reshape(-1) for x in group]), buffer, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_copies_of_special_values(backend: str) -> None:
    """Ties to even, overflow to infinity, NaN; with lr 0 the parameter itself is what is copied."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF, 0x00000001, 0x80000000], dtype=torch.int64)
    values = torch.cat([bits.to(torch.int32).view(torch.float32), torch.tensor([math.nan, math.inf, -math.inf])])
    zeros = [torch.zeros(9) for _ in range(3)]
    copy = torch.zeros(9, dtype=torch.bfloat16)
    hyper = {**HYPER, "lr": 0.0}
    adamw_ema_(values.clone(), *zeros, step=1, weight_decay=0.0, **hyper, param_copies=copy, backend=backend)
    torch.testing.assert_close(copy, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_decay": [0.1]}, "weight_decay has 1 entries, params has 5"),
        ({"step": [1, 1, 1, 1, 0]}, r"step is \[1, 1, 1, 1, 0\]"),
        ({"log_scales": (5,)}, "log_scales names tensor 5, params has 5"),
        ({"norm": torch.ones(2)}, r"norm has shape \(2,\), expected a scalar"),
        ({"param_copies": [torch.zeros(s) for s in SIZES]}, r"param_copies\[0\] has dtype torch.float32, expected"),
        ({"ema_params": None, "ema_copies": [torch.zeros(s).bfloat16() for s in SIZES]}, "ema_copies without"),
        ({"ema_params": []}, "ema_params has 0 tensors, params has 5"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    params, grads, exp_avgs, exp_avg_sqs, ema = make()
    arguments = {"ema_params": ema, "step": 1, "weight_decay": 0.1, **HYPER, **change}
    with pytest.raises(ValueError, match=message):
        adamw_ema_(params, grads, exp_avgs, exp_avg_sqs, **arguments)


def test_ops_are_sound() -> None:
    params, grads, exp_avgs, exp_avg_sqs, ema = make()
    torch.library.opcheck(adamw_ema_stages.norm, (grads, "eager"))
    lists = (params, grads, exp_avgs, exp_avg_sqs, ema, [], [])
    hyper = [1e-3, 0.9, 0.98, 1e-8, 0.99, 1.0]
    rest = (None, torch.tensor(2.0), [1] * 5, [0.1] * 5, [0] * 5, hyper, 1.0, True, "eager")
    torch.library.opcheck(adamw_ema_stages.step_, (*lists, *rest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_stands_in_a_compiled_step(backend: str) -> None:
    def step(lists: list[list[Tensor]], number: int) -> Tensor:
        lists[1] = [grad * 2.0 for grad in lists[1]]
        norm = adamw_ema_(*lists, step=number, weight_decay=0.1, **HYPER, clip_norm=1.0, backend=backend)
        assert norm is not None
        return norm + 1.0

    plain, compiled = make(), make()
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for number in (1, 2, 3):
        assert torch.equal(step(plain, number), run(compiled, number))
    for ours, theirs in zip(plain, compiled, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_no_gradients_have_no_norm() -> None:
    assert float(grad_norm([])) == 0.0
    assert adamw_ema_([], [], [], [], step=1, weight_decay=0.0, **HYPER) is None

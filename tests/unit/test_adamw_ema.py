"""adamw_ema_ against torch.optim.AdamW in fp64 with a separate EMA, on every CPU backend; grad_norm against fp64."""

from __future__ import annotations

import pytest
import torch

from cosmos_fast.ops import adamw_ema_stages
from cosmos_fast.ops.adamw_ema import adamw_ema_, grad_norm
from cosmos_kernels import native

needs_native = pytest.mark.skipif(native.why_missing("cpu") is not None, reason="CPU library not built")
BACKENDS = ["eager", pytest.param("native", marks=needs_native)]
SIZES = [(1,), (7,), (1023,), (2**16 + 3,), (33, 5), ()]
HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.5, "ema_decay": 0.99}


def make_lists(sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(size, generator=generator) for size in sizes]
    grads = [torch.randn(size, generator=generator) for size in sizes]
    return params, grads, [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]


def assert_close_lists(got, want, name):
    """Errors below 1e-6 of the largest value in the list: a single mean near zero has lost its digits."""
    scale = max(w.abs().max().item() for w in want)
    for size, g, w in zip(SIZES, got, want, strict=True):
        assert (g.double() - w.detach()).abs().max().item() < 1e-6 * scale, (name, size)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_equal_torch_adamw_and_lerp(backend, weight_decay):
    params, grads, exp_avgs, exp_avg_sqs = make_lists()
    ema = [p.clone() + 0.1 for p in params]
    truth = [p.double().requires_grad_() for p in params]
    truth_ema = [e.double() for e in ema]
    hyper = {**HYPER, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW(truth, lr=HYPER["lr"], betas=(0.9, 0.98), eps=1e-8, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 21):
        for g in grads:
            g.copy_(torch.randn(g.shape, generator=generator) * 10.0 ** (step % 5 - 3))
        for t, g, e in zip(truth, grads, truth_ema, strict=True):
            e.lerp_(t.detach(), 1 - HYPER["ema_decay"])
            t.grad = g.double() * 0.25
        optimizer.step()
        adamw_ema_(params, grads, exp_avgs, exp_avg_sqs, ema, step=step, **hyper, grad_scale=0.25, backend=backend)
    states = [optimizer.state[t] for t in truth]
    assert_close_lists(params, truth, "params")
    assert_close_lists(ema, truth_ema, "ema_params")
    assert_close_lists(exp_avgs, [state["exp_avg"] for state in states], "exp_avgs")
    assert_close_lists(exp_avg_sqs, [state["exp_avg_sq"] for state in states], "exp_avg_sqs")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_average_takes_the_parameter_from_before_the_step(backend):
    params, grads, exp_avgs, exp_avg_sqs = make_lists([(9,)])
    old, ema = params[0].clone(), [torch.zeros(9)]
    adamw_ema_(params, grads, exp_avgs, exp_avg_sqs, ema, step=1, **HYPER | {"ema_decay": 0.0}, backend=backend)
    torch.testing.assert_close(ema[0], old, rtol=1e-6, atol=0)
    assert not torch.allclose(params[0], old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_average_the_step_is_the_same_and_gradients_are_untouched(backend):
    a, b = make_lists(), make_lists()
    before = [g.clone() for g in a[1]]
    adamw_ema_(*a, [p.clone() for p in a[0]], step=3, **HYPER, grad_scale=0.5, backend=backend)
    adamw_ema_(*b, None, step=3, **HYPER, grad_scale=torch.tensor(0.5), backend=backend)
    for ours, other in zip(a[0], b[0], strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0)
    assert all(torch.equal(g, saved) for g, saved in zip(a[1], before, strict=True))


@needs_native
def test_native_result_does_not_depend_on_the_number_of_threads():
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            lists = make_lists([(2**17 + 5,), (3,), (40000,)])
            ema = [p.clone() for p in lists[0]]
            adamw_ema_(*lists, ema, step=2, **HYPER, backend="native")
            results.append([*lists[0], *ema, grad_norm(lists[1], backend="native")])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradient_reaches_its_parameter_only(backend, bad):
    params, grads, exp_avgs, exp_avg_sqs = make_lists([(100,), (5,)])
    grads[0][17] = bad
    ema = [p.clone() for p in params]
    adamw_ema_(params, grads, exp_avgs, exp_avg_sqs, ema, step=1, **HYPER, backend=backend)
    broken = ~torch.isfinite(params[0])
    assert broken.nonzero().flatten().tolist() == [17]
    assert torch.isfinite(params[1]).all()
    assert torch.isfinite(ema[0]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_lists_and_empty_tensors(backend):
    adamw_ema_([], [], [], [], [], step=1, **HYPER, backend=backend)
    params, grads, exp_avgs, exp_avg_sqs = make_lists([(0,), (4,)])
    old = params[1].clone()
    adamw_ema_(params, grads, exp_avgs, exp_avg_sqs, [p.clone() for p in params], step=1, **HYPER, backend=backend)
    assert not torch.equal(params[1], old)
    assert grad_norm([]).item() == 0.0


def test_auto_takes_non_contiguous_tensors_and_native_refuses_them():
    params, grads, exp_avgs, exp_avg_sqs = make_lists([(6, 4)])
    want = [params[0].clone()]
    adamw_ema_(want, grads, [exp_avgs[0].clone()], [exp_avg_sqs[0].clone()], None, step=1, **HYPER, backend="eager")
    strided = [params[0].t().contiguous().t()]
    if native.why_missing("cpu") is None:
        with pytest.raises(ValueError, match=r"contiguous.*\(6, 4\).*strides"):
            adamw_ema_(strided, grads, exp_avgs, exp_avg_sqs, None, step=1, **HYPER, backend="native")
    adamw_ema_(strided, grads, exp_avgs, exp_avg_sqs, None, step=1, **HYPER, backend="auto")
    torch.testing.assert_close(strided[0], want[0], rtol=0, atol=0)


def test_half_precision_teacher_goes_to_eager():
    params, grads, exp_avgs, exp_avg_sqs = make_lists([(64,)])
    ema = [params[0].bfloat16()]
    want = torch.lerp(ema[0], params[0].bfloat16(), 1 - HYPER["ema_decay"])
    adamw_ema_(params, grads, exp_avgs, exp_avg_sqs, ema, step=1, **HYPER)
    assert torch.equal(ema[0], want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, g, m, v, e: g.pop(), "grads has 1 tensors, params has 2"),
        (lambda p, g, m, v, e: m.__setitem__(1, torch.zeros(3)), r"exp_avgs\[1\] has shape \(3,\), expected \(4,\)"),
        (lambda p, g, m, v, e: v.__setitem__(0, v[0].double()), r"exp_avg_sqs\[0\] has dtype torch.float64"),
        (lambda p, g, m, v, e: e.__setitem__(0, torch.zeros(5, 1)), r"ema_params\[0\] has shape \(5, 1\)"),
        (lambda p, g, m, v, e: g.__setitem__(1, torch.zeros(4, device="meta")), r"grads\[1\] is on meta"),
    ],
)
def test_mismatched_lists_are_named(change, message):
    lists = make_lists([(5,), (4,)])
    ema = [p.clone() for p in lists[0]]
    change(*lists, ema)
    with pytest.raises(ValueError, match=message):
        adamw_ema_(*lists, ema, step=1, **HYPER)


def test_step_counts_from_one():
    with pytest.raises(ValueError, match="step is 0"):
        adamw_ema_([], [], [], [], [], step=0, **HYPER)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_norm_equals_fp64(backend):
    grads = make_lists([(1,), (7,), (63,), (64,), (65,), (4097,), (2**16 + 3,), (0,)], seed=3)[1]
    truth = torch.cat([g.double() for g in grads]).norm().item()
    norm = grad_norm(grads, backend=backend)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert abs(norm.item() - truth) / truth < 1e-6
    grads[4][64] = float("nan")
    assert torch.isnan(grad_norm(grads, backend=backend))


@needs_native
def test_grad_norm_native_is_does_not_stall_on_many_small_parts():
    """A running sum in single precision would be off by 1e-3 here."""
    ones = torch.full((2**22 + 11,), 1e-3)
    want = 1e-3 * (2**22 + 11) ** 0.5
    assert abs(grad_norm([ones], backend="native").item() - want) / want < 1e-6


def test_whole_numbers_reach_a_backend_as_floats(monkeypatch):
    """A compiled kernel has another type for them, or takes 0 and 1 for constants."""
    taken = []
    monkeypatch.setattr(
        adamw_ema_stages, "stages_for", lambda *_: lambda tensors, options: taken.append((tensors, options))
    )
    hyper = {"lr": 1, "beta1": 0, "beta2": 0, "eps": 1, "ema_decay": 1, "weight_decay": 1}
    adamw_ema_(*make_lists(), step=1, **hyper, grad_scale=2, clip_norm=5, norm=torch.tensor(1.0))
    ((tensors, options),) = taken
    named = vars(options) if hasattr(options, "__dict__") else options._asdict()
    numbers = {name: value for name, value in named.items() if name != "skip_nonfinite"}
    assert {name for name, value in numbers.items() if not isinstance(value, float)} == set()
    assert (options.lr, options.eps, options.grad_scale, options.clip_norm) == (1.0, 1.0, 2.0, 5.0)
    assert tensors.weight_decays == [1.0] * len(SIZES)
    assert {type(decay) for decay in tensors.weight_decays} == {float}

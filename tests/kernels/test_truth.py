"""The rule that kernels are judged by: what it lets pass, and what not."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels import truth as rule
from tests.kernels.truth import assert_no_worse, error, mean_error, outcome, tf32x3_rounding


def softmax_product(x, y):
    return (x @ y.T).softmax(-1), (x * x).sum()


def draw(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return {name: (scale * torch.randn(6, 5, generator=generator)).to(dtype) for name in ("x", "y")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_passes_its_own_rule_and_a_coarse_kernel_does_not(dtype):
    inputs = draw(dtype)
    truth, eager = outcome(softmax_product, inputs, torch.float64), outcome(softmax_product, inputs)
    assert truth.outputs["output 0"].dtype == torch.float64
    assert eager.gradients.keys() == {"x", "y"}
    assert_no_worse(eager, eager, truth)
    coarse = outcome(lambda x, y: [out * 1.05 for out in softmax_product(x, y)], inputs)
    with pytest.raises(AssertionError, match=r"output 0: mean error 0\.0.*; output 0: error 0\.0"):
        assert_no_worse(coarse, eager, truth)


def test_gradients_are_judged_too():
    inputs = draw()
    truth, eager = outcome(softmax_product, inputs, torch.float64), outcome(softmax_product, inputs)
    eager.gradients["x"][0, 0] += 1e-3
    fresh = outcome(softmax_product, inputs)
    with pytest.raises(AssertionError, match="x: mean error"):
        assert_no_worse(eager, fresh, truth)


def test_one_wrong_element_among_many_shows_in_the_largest_deviation():
    """A row of a tile that nobody wrote: too few elements to count in the mean."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    truth, eager = outcome(torch.sin, {"input": x}, torch.float64), outcome(torch.sin, {"input": x})
    found = outcome(torch.sin, {"input": x})
    found.outputs["output 0"][0] += 1e-5
    assert mean_error(found.outputs["output 0"], truth.outputs["output 0"]) < 1e-7
    with pytest.raises(AssertionError, match=r"^output 0: error 1e-05"):
        assert_no_worse(found, eager, truth)
    assert_no_worse(found, eager, truth, extra_floor=1e-5)


def test_a_drift_of_all_elements_shows_in_the_mean_and_only_luck_excuses_it():
    x = {"x": torch.linspace(1.0, 2.0, 1000)}
    truth = outcome(lambda x: x.clone(), x, torch.float64)
    eager, found = outcome(lambda x: x.clone(), x), outcome(lambda x: x * (1 + 1e-6), x)
    with pytest.raises(AssertionError, match=r"^output 0: mean error 9\.\S+, allowed \S+ \(eager 0\)$"):
        assert_no_worse(found, eager, truth, extra_floor=1e-6)
    assert_no_worse(found, eager, truth, extra_floor=1e-6, lucky=("output 0", "x"))


@pytest.mark.parametrize("measure", [error, mean_error])
def test_a_small_tensor_is_held_to_its_own_size(measure):
    for size in (1e-9, 1e-300, 1e300):
        truth = torch.full((3,), size, dtype=torch.float64)
        assert measure(truth * 1.001, truth) == pytest.approx(1e-3)
    assert measure(torch.zeros(2), torch.zeros(2)) == 0.0
    assert measure(torch.full((2,), 0.5), torch.zeros(2)) == 0.5
    assert measure(torch.zeros(0), torch.zeros(0)) == 0.0


@pytest.mark.parametrize("error", [error, mean_error])
def test_what_is_not_finite_must_be_so_in_the_truth(error):
    nan, inf = math.nan, math.inf
    truth = torch.tensor([1.0, nan, inf])
    assert error(torch.tensor([1.0, nan, inf]), truth) == 0.0
    assert error(torch.tensor([1.0, 2.0, inf]), truth) == inf
    assert error(torch.tensor([1.0, nan, -inf]), truth) == inf
    assert error(torch.tensor([nan, nan, inf]), truth) == inf
    with pytest.raises(AssertionError, match=r"shape \(2,\)"):
        error(torch.zeros(2), torch.zeros(3))


def test_inputs_stay_as_they_are_and_may_be_without_gradient():
    inputs = {**draw(), "index": torch.arange(6)}
    found = outcome(lambda x, y, index: x[index] + y, inputs, torch.float64, without_gradient=("y",))
    assert found.gradients.keys() == {"x"}
    assert inputs["x"].grad is None
    assert not inputs["x"].requires_grad


def cut_to_tf32(x):
    """As tensor cores do it: the last 13 bits of the mantissa are dropped."""
    return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)


@pytest.mark.parametrize("dim", [16, 48, 512])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_three_tf32_products_stay_within_their_rounding_and_one_does_not(dim, scale, monkeypatch):
    """Logits of unit features, the products emulated: a softmax differs by no more than differences of logits do."""
    monkeypatch.setattr(rule, "COMPILED", True)
    generator = torch.Generator().manual_seed(dim)
    x, y = torch.nn.functional.normalize(torch.randn(2, 200, dim, generator=generator), dim=-1)
    (x_big, y_big), exact = (cut_to_tf32(x), cut_to_tf32(y)), scale * (x.double() @ y.double().T)
    x_small, y_small = cut_to_tf32(x - x_big), cut_to_tf32(y - y_big)
    pairs = ((x_big, y_big), (x_big, y_small), (x_small, y_big))
    one, *corrections = (scale * (a.double() @ b.double().T) for a, b in pairs)
    allowed = tf32x3_rounding(exact.abs().max().item(), torch.float32)
    truth = exact.softmax(-1)
    assert error((one + sum(corrections)).softmax(-1), truth) <= allowed
    assert mean_error(one.softmax(-1), truth) > 20 * allowed


def test_only_compiled_products_of_fp32_are_allowed_a_rounding_of_their_own(monkeypatch):
    for compiled, allowed in ((True, 100 * 2.0**-21), (False, 0.0)):
        monkeypatch.setattr(rule, "COMPILED", compiled)
        assert tf32x3_rounding(100.0, torch.bfloat16, torch.float32) == allowed
        assert tf32x3_rounding(100.0, torch.bfloat16, torch.float16) == 0.0
    truth, eager = (outcome(torch.clone, {"input": torch.ones(9)}, dtype) for dtype in (torch.float64, None))
    found = outcome(lambda input: input * (1 + 1e-6), {"input": torch.ones(9)})
    with pytest.raises(AssertionError, match="output 0: mean error"):
        assert_no_worse(found, eager, truth, extra_floor=1e-6)
    assert_no_worse(found, eager, truth, rounding=1e-6)

"""How exact must a kernel be: no worse than a small multiple of what plain PyTorch loses in the same dtype.

    truth = outcome(reference.op, inputs, torch.float64)
    eager = outcome(reference.op, inputs)             # the oracle in the inputs' own dtypes
    found = outcome(partial(op, backend="triton"), inputs)
    assert_no_worse(found, eager, truth)

An error is the root mean square of the deviations from the truth over that of the truth, so that a tensor of tiny
gradients is held to its own size. Beside it the same rule holds for the largest deviation over the truth's largest
entry, which shows a single wrong element; as that is a matter of chance, some tests allow it a few roundings more. NaN
and infinity count as an infinite error, unless the truth has the same one there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_kernels import triton_support

OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
COMPILED = not triton_support.INTERPRETED


class Outcome(NamedTuple):
    """Outputs by position ("output 0", ...), and gradients by the name of the input."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def outcome(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    *,
    without_gradient: tuple[str, ...] = (),
) -> Outcome:
    """Call `function(**inputs)` on detached inputs, in `dtype` if given, and back-propagate a fixed random gradient.

    The gradient of output i is the same for every dtype (up to its rounding), so outcomes can be compared. Strides of
    the inputs are kept where the dtype is. Inputs of integer dtype pass unchanged.
    """
    leaves = {name: _leaf(tensor, dtype, name not in without_gradient) for name, tensor in inputs.items()}
    returned = function(**leaves)
    outputs = (returned,) if isinstance(returned, Tensor) else tuple(returned)
    differentiable = [output for output in outputs if output.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [_gradient_for(output, i) for i, output in enumerate(differentiable)])
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Outcome({f"output {i}": output.detach() for i, output in enumerate(outputs)}, gradients)


def _leaf(tensor: Tensor, dtype: torch.dtype | None, with_gradient: bool) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    leaf = tensor.detach() if dtype is None else tensor.detach().to(dtype)
    return leaf.requires_grad_(with_gradient)


def _gradient_for(output: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = torch.rand(output.shape, generator=generator, dtype=torch.float64) + 0.5
    signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
    return (drawn * signs).to(output.device, output.dtype) if output.dim() else torch.ones_like(output)


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest deviation over the truth's largest finite entry (absolute where the truth is zero everywhere)."""
    deviation, finite = _deviation(actual, truth)
    return _largest(deviation) / (_largest(finite) or 1.0)


def mean_error(actual: Tensor, truth: Tensor) -> float:
    """Root mean square of the deviations over that of the truth's finite entries; absolute where that is zero."""
    deviation, finite = _deviation(actual, truth)
    return _root_mean_square(deviation) / (_root_mean_square(finite) or 1.0)


def _deviation(actual: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(actual - truth, truth) where the truth is finite, in fp64; infinite where only one of them is not."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    special = ~truth.isfinite()
    same_special = (actual == truth) | (actual.isnan() & truth.isnan())
    if not same_special[special].all() or not actual[~special].isfinite().all():
        return torch.tensor([math.inf]), torch.tensor([1.0])
    return actual[~special] - truth[~special], truth[~special]


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    """Of what it is when scaled to the largest entry: squares of tiny and huge ones leave the range of doubles."""
    largest = _largest(x)
    return largest * (x / largest).square().mean().sqrt().item() if 0.0 < largest < math.inf else largest


def floor(*dtypes: torch.dtype) -> float:
    """Error that is always allowed: a few roundings of the coarsest dtype, where eager happened to be lucky."""
    return max((4.0 if dtype in (torch.float32, torch.float64) else 1.0) * torch.finfo(dtype).eps for dtype in dtypes)


def tf32x3_rounding(largest_logit: float, *dtypes: torch.dtype) -> float:
    """Relative error that three TF32 products leave in exponentials of logits, and in gradients made of them.

    Of features in fp32, compiled; nothing in the interpreter, which multiplies fp32 as it is.

    An operand x is split into two parts of 11 bits, each cut off: x = big + small + rest, |small| < 2^-10 |x|. The rest
    of both operands and small * small are left out, always towards zero. On average over mantissas each rest is 0.64 *
    2^-23 of its product, and small * small 2^-23 of it: logits shrink by 1.15 * 2^-22 of themselves, and scatter by
    about as much of the largest. A softmax sees differences of two of them: 2^-21 of the largest.
    """
    return 2.0**-21 * largest_logit if COMPILED and torch.float32 in dtypes else 0.0


def assert_no_worse(
    found: Outcome,
    eager: Outcome,
    truth: Outcome,
    *,
    output_factor: float = OUTPUT_FACTOR,
    gradient_factor: float = GRADIENT_FACTOR,
    extra_floor: float = 0.0,
    rounding: float = 0.0,
    lucky: Container[str] = (),
) -> None:
    """Every output and gradient within `factor` times eager's error, or the floor of its dtype, whichever is larger.

    extra_floor: relative error that the largest deviation is allowed on top of the floor. rounding: the same, of the
    mean error too; see `tf32x3_rounding`. lucky: tensors that eager gets all but exact by chance or symmetry; of these
    the mean error is allowed `extra_floor` too.
    """
    rule = partial(assert_tensors_no_worse, extra_floor=extra_floor, rounding=rounding, lucky=lucky)
    rule(found.outputs, eager.outputs, truth.outputs, factor=output_factor)
    rule(found.gradients, eager.gradients, truth.gradients, factor=gradient_factor)


def assert_tensors_no_worse(
    found: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    *,
    factor: float,
    extra_floor: float = 0.0,
    rounding: float = 0.0,
    lucky: Container[str] = (),
) -> None:
    """The rule of `assert_no_worse` for named tensors; names every tensor that breaks it."""
    assert found.keys() == truth.keys() == eager.keys(), f"{sorted(found)}, expected {sorted(truth)}"
    broken = []
    for name, expected in truth.items():
        least = floor(found[name].dtype)
        for kind, measure, extra in (
            ("mean error", mean_error, extra_floor if name in lucky else 0.0),
            ("error", error, extra_floor),
        ):
            ours, theirs = measure(found[name], expected), measure(eager[name], expected)
            allowed = max(factor * theirs, least) + extra + rounding
            if not ours <= allowed:
                broken.append(f"{name}: {kind} {ours:.3g}, allowed {allowed:.3g} (eager {theirs:.3g})")
    assert not broken, "; ".join(broken)

"""For backward passes that autograd cannot differentiate: a second derivative raises instead of being wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the `backward` of an autograd function one whose results raise RuntimeError where they are differentiated.

    They then depend on the saved tensors, of which the function's inputs must be some. torch's `once_differentiable`
    ties them to the incoming gradient alone: where that is a constant, as a loss's is, or where `torch.autograd.grad`
    asks for an input, a second derivative loses their share without a word.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        sources = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        return tuple(None if grad is None else _Refusing.apply(grad, *sources) for grad in found)

    return guarded


class _Refusing(torch.autograd.Function):
    """The identity on a gradient, as a function of what it came from."""

    @staticmethod
    def forward(_: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Any:
        raise RuntimeError("a second derivative of an operation that is once_differentiable")

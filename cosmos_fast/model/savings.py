"""How a block runs its parts: kept for the backward pass or made anew there, eagerly or compiled.

What is around the attention works row by row on packed tokens [T, D], whose number T differs from step to step. A
compiled part therefore takes T as a variable, and its parameters as inputs, so that all blocks of one width share its
graphs: one for each of a few kinds of use (student or teacher, all rows or those that are read), however long the
sequences are. The attention itself stays outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Graphs of one part. torch's own limit, past which it goes on uncompiled, is 8, which a run in bf16 that evaluates and
# takes all negatives reaches without 8-bit layers or CUDA graphs.
MOST_GRAPHS = 32


@dataclass(frozen=True)
class Savings:
    """recompute: what the backward pass makes anew, "none", "mlp" or "blocks". compiler: of the parts, a backend of
    torch.compile such as "inductor", or None."""

    recompute: str = "none"
    compiler: str | Callable[..., Any] | None = None

    def run(self, part: Callable[..., Any], block: torch.nn.Module, *tensors: Tensor) -> Any:
        """`part(block, *tensors)`; every tensor has its rows, whose number varies, in front."""
        if self.compiler is None:
            return part(block, *tensors)
        inputs = [_NoView.apply(tensor) if tensor._is_view() else tensor for tensor in tensors]
        for tensor in inputs:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return _compiled(part, self.compiler)(block, *inputs)


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, of which autograd keeps the arguments only. The function draws no random numbers."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class _NoView(torch.autograd.Function):
    """The same memory as a tensor of its own: the compiler makes a graph for every shape that a view was cut out of."""

    @staticmethod
    def forward(_: Any, view: Tensor) -> Tensor:
        return view.new_empty(0).set_(view)  # type: ignore[call-overload]

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


@cache
def _compiled(part: Callable[..., Any], compiler: str | Callable[..., Any]) -> Callable[..., Any]:
    limits = torch._dynamo.config
    name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # as older versions call it
    setattr(limits, name, max(getattr(limits, name), MOST_GRAPHS))
    return torch.compile(part, backend=compiler)

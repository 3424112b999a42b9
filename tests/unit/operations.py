"""The operations of the losses, the pooling and the optimizer with small inputs: one table for what all must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast.ops import (
    PoolWeights,
    adamw_ema_,
    backends,
    cross_attention_pool,
    dense_distillation_cross_entropy,
    distillation_cross_entropy,
    grad_norm,
    multiview_infonce,
)

Inputs = dict[str, Tensor]
HYPER = {"step": 2, "lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.1, "ema_decay": 0.9}
HYPER |= {"clip_norm": 1.0}
STATE = ("params", "grads", "exp_avgs", "exp_avg_sqs", "ema_params")


def pool(*, backend: str, heads: int = 2, **inputs: Tensor) -> Tensor:
    tokens, queries, *_ = inputs.values()
    weights = {name: x for name, x in inputs.items() if name not in ("tokens_BLD", "queries_BVD")}
    return cross_attention_pool(tokens, queries, PoolWeights(**weights, heads=heads), backend=backend)


def step(*, backend: str, **inputs: Any) -> Tensor:
    """The optimizer's results as one tensor; the inputs stay as they are."""
    state = [inputs.pop(name).clone() for name in STATE]
    norm = adamw_ema_(*state, **{**HYPER, **inputs}, backend=backend)
    return torch.stack([state[0], state[2], state[3], state[4], norm.expand(state[0].shape)])


def norm(*, backend: str, first: Tensor, second: Tensor) -> Tensor:
    return grad_norm([first, second], backend=backend)


def unit(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1).to(dtype)


def infonce_inputs(dtype: torch.dtype) -> Inputs:
    a, b = unit(3, 5, 8, seed=0, dtype=dtype), unit(2, 5, 8, seed=1, dtype=dtype)
    return {"a_VBD": a, "b_VBD": b, "scale": torch.tensor(9.0, dtype=dtype)}


def distill_inputs(dtype: torch.dtype) -> Inputs:
    names = ("student_a", "student_b", "teacher_a", "teacher_b")
    features = {name: unit(2, 5 + (name[-1] == "b"), 8, seed=i, dtype=dtype) for i, name in enumerate(names)}
    return features | {f"{side}_scale": torch.tensor(9.0, dtype=dtype) for side in ("student", "teacher")}


def dense_inputs(dtype: torch.dtype) -> Inputs:
    return {f"{side}_logits_MK": 9 * unit(4, 7, seed=i, dtype=dtype) for i, side in enumerate(("student", "teacher"))}


def pool_inputs(dtype: torch.dtype) -> Inputs:
    shapes = {"tokens_BLD": (2, 5, 8), "queries_BVD": (2, 3, 8), "ln_q_weight": (8,), "ln_q_bias": (8,)}
    shapes |= {"ln_k_weight": (8,), "ln_k_bias": (8,), "in_proj_weight": (24, 8), "in_proj_bias": (24,)}
    shapes |= {"out_proj_weight": (8, 8), "out_proj_bias": (8,)}
    return {name: 2 * unit(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


def step_inputs(dtype: torch.dtype) -> Inputs:
    inputs = {name: unit(70, seed=i, dtype=dtype) for i, name in enumerate(STATE)}
    return inputs | {"exp_avg_sqs": inputs["exp_avg_sqs"].abs()}


def norm_inputs(dtype: torch.dtype) -> Inputs:
    return {name: unit(70, seed=i, dtype=dtype) for i, name in enumerate(("first", "second"))}


class Op(NamedTuple):
    """run(**inputs, backend=...); `learned`: the inputs that get a gradient."""

    name: str
    run: Callable[..., Tensor]
    inputs: Callable[[torch.dtype], Inputs]
    learned: tuple[str, ...] = ()


POOL_INPUTS = tuple(pool_inputs(torch.float32))
OPS = [
    Op("multiview_infonce", multiview_infonce, infonce_inputs, ("a_VBD", "b_VBD", "scale")),
    Op(
        "distillation_cross_entropy",
        distillation_cross_entropy,
        distill_inputs,
        ("student_a", "student_b", "student_scale"),
    ),
    Op("dense_distillation_cross_entropy", dense_distillation_cross_entropy, dense_inputs, ("student_logits_MK",)),
    Op("cross_attention_pool", pool, pool_inputs, POOL_INPUTS),
    Op("adamw_ema", step, step_inputs),
    Op("grad_norm", norm, norm_inputs),
]
DIFFERENTIABLE = [op for op in OPS if op.learned]


def runs_here(op: Op, backend: str) -> str | None:
    """None where the backend takes this operation's CPU tensors."""
    try:
        op.run(**op.inputs(torch.float32), backend=backend)
    except ValueError as error:
        return str(error)
    return None


def each(ops: list[Op], *only: str) -> pytest.MarkDecorator:
    """Parameters `op` and `backend`: every registered backend, or those named."""
    names = [(op, row["backend"]) for op in ops for row in backends.table() if row["op"] == op.name]
    chosen = [(op, backend) for op, backend in names if not only or backend in only]
    return pytest.mark.parametrize(
        ("op", "backend"), [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in chosen]
    )

"""Wrong arguments and backends that cannot run: every operation refuses them in words, whatever the backend."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cosmos_fast.ops import backends
from cosmos_kernels import triton_support
from tests.unit.operations import OPS, Op, each

Change = Callable[[Any], Any]
Wrong = tuple[str, str, Change, str]
META, LONG, DOUBLE = (lambda x: x.to("meta")), (lambda x: x.long()), (lambda x: x.double())
VECTOR, PAIR = (lambda x: x.view(1)), (lambda x: torch.stack([x, x]))

# operation, argument, what is done to it, the error
WRONG: list[Wrong] = [
    ("multiview_infonce", "a_VBD", lambda x: x[0], r"a_VBD has shape (5, 8), expected non-empty [views, batch, D]"),
    ("multiview_infonce", "b_VBD", lambda x: x[:, :4], r"b_VBD has shape (2, 4, 8), expected [views, 5 or more, 8]"),
    ("multiview_infonce", "b_VBD", lambda x: x[..., :7], r"b_VBD has shape (2, 5, 7), expected [views, 5 or more, 8]"),
    ("multiview_infonce", "b_VBD", META, "b_VBD is torch.float32 on meta, expected torch.float32 on cpu"),
    ("multiview_infonce", "b_VBD", DOUBLE, "b_VBD is torch.float64 on cpu, expected torch.float32 on cpu"),
    ("multiview_infonce", "a_VBD", LONG, "a_VBD has dtype torch.int64, expected a floating-point dtype"),
    ("multiview_infonce", "scale", VECTOR, "scale has shape (1,), expected a scalar tensor"),
    ("multiview_infonce", "scale", META, "scale is torch.float32 on meta, expected a float on cpu"),
    ("multiview_infonce", "scale", LONG, "scale is torch.int64 on cpu, expected a float on cpu"),
    ("multiview_infonce", "offset", lambda _: 1, "offset is 1, expected 0 to 0: b_VBD has 5 columns, a_VBD 5 rows"),
    ("multiview_infonce", "offset", lambda _: -1, "offset is -1, expected 0 to 0"),
    ("multiview_infonce", "operand_dtype", lambda _: torch.int8, "operand_dtype is torch.int8, expected a floating"),
    ("distillation_cross_entropy", "student_a", lambda x: x[:0], "student_a has shape (0, 5, 8), expected non-empty"),
    ("distillation_cross_entropy", "student_b", lambda x: x[..., :7], "student_b has shape (2, 6, 7) and is torch"),
    ("distillation_cross_entropy", "teacher_b", lambda x: x[:, :4], "teacher_b has shape (2, 4, 8), expected [1 or 2"),
    ("distillation_cross_entropy", "student_b", DOUBLE, "student_b has shape (2, 6, 8) and is torch.float64, expected"),
    ("distillation_cross_entropy", "teacher_a", META, "teacher_a is on meta, expected cpu like student_a"),
    ("distillation_cross_entropy", "teacher_a", LONG, "teacher_a has dtype torch.int64, expected a floating-point"),
    ("distillation_cross_entropy", "student_scale", PAIR, "student_scale has shape (2,), expected a scalar tensor"),
    ("distillation_cross_entropy", "teacher_scale", META, "teacher_scale is torch.float32 on meta, expected a float"),
    ("distillation_cross_entropy", "student_scale", LONG, "student_scale is torch.int64 on cpu, expected a float"),
    ("dense_distillation_cross_entropy", "student_logits_MK", lambda x: x[0], "student_logits_MK has shape (7,)"),
    ("dense_distillation_cross_entropy", "teacher_logits_MK", lambda x: x[:3], "teacher_logits_MK has shape (3, 7)"),
    ("dense_distillation_cross_entropy", "teacher_logits_MK", META, "teacher_logits_MK is on meta, student_logits_MK"),
    ("dense_distillation_cross_entropy", "student_logits_MK", LONG, "student_logits_MK has dtype torch.int64"),
    ("dense_distillation_cross_entropy", "teacher_logits_MK", LONG, "teacher_logits_MK has dtype torch.int64"),
    ("dense_distillation_cross_entropy", "student_temperature", lambda _: 0.0, "student_temperature is 0.0, expected"),
    ("cross_attention_pool", "tokens_BLD", lambda x: x[0], "tokens_BLD has shape (5, 8), expected non-empty"),
    ("cross_attention_pool", "tokens_BLD", lambda x: x[:1], "tokens_BLD has shape (1, 5, 8), expected [2, L, 8]"),
    ("cross_attention_pool", "queries_BVD", lambda x: x[:, :0], "queries_BVD has shape (2, 0, 8), expected non-empty"),
    ("cross_attention_pool", "queries_BVD", META, "tokens_BLD is on cpu, queries_BVD on meta"),
    ("cross_attention_pool", "tokens_BLD", LONG, "tokens_BLD has dtype torch.int64, expected a floating-point dtype"),
    ("cross_attention_pool", "queries_BVD", DOUBLE, "queries_BVD is torch.float64, which does not go with tokens_BLD"),
    ("cross_attention_pool", "ln_k_bias", lambda x: x[:7], "ln_k_bias has shape (7,), expected (8,) for features of 8"),
    ("cross_attention_pool", "out_proj_weight", META, "tokens_BLD is on cpu, out_proj_weight on meta"),
    ("cross_attention_pool", "heads", lambda _: 3, "heads = 3 does not divide D = 8"),
    ("cross_attention_pool", "heads", lambda _: 0, "heads = 0 does not divide D = 8"),
    ("cross_attention_pool", "out_proj_bias", LONG, "out_proj_bias is torch.int64, which does not go with tokens_BLD"),
    ("adamw_ema", "params", LONG, "params[0] has dtype torch.int64, expected a floating-point dtype"),
    ("adamw_ema", "grads", lambda x: x[:9], "grads[0] has shape (9,), expected (70,) as params[0]"),
    ("adamw_ema", "exp_avgs", DOUBLE, "exp_avgs[0] has dtype torch.float64, expected torch.float32 as params[0]"),
    ("adamw_ema", "ema_params", META, "ema_params[0] is on meta, params[0] on cpu"),
    ("adamw_ema", "grad_scale", lambda _: torch.ones(2), "grad_scale has shape (2,), expected a scalar"),
    ("adamw_ema", "norm", lambda _: torch.ones(3), "norm has shape (3,), expected a scalar"),
    ("adamw_ema", "beta1", lambda _: 1.0, "beta1 is 1.0, expected 0 to below 1"),
    ("adamw_ema", "beta2", lambda _: -0.1, "beta2 is -0.1, expected 0 to below 1"),
    ("adamw_ema", "ema_decay", lambda _: 1.1, "ema_decay is 1.1, expected 0 to 1"),
    ("adamw_ema", "lr", lambda _: float("nan"), "lr is nan, expected 0 or more"),
    ("adamw_ema", "clip_norm", lambda _: -1.0, "clip_norm is -1.0, expected a positive number"),
    ("adamw_ema", "step", lambda _: 0, "step is 0; the first update has step 1"),
    ("grad_norm", "second", LONG, "grads[1] has dtype torch.int64, expected a floating-point dtype"),
]


@each(OPS)
def test_what_does_not_fit_is_refused_in_words_whatever_the_backend(op: Op, backend: str) -> None:
    """The argument, what it is, and what was expected; a backend that cannot run here does not come first."""
    asked = [(name, change, message) for of, name, change, message in WRONG if of == op.name]
    assert asked
    for name, change, message in asked:
        inputs = op.inputs(torch.float32)
        with pytest.raises(ValueError, match=re.escape(message)):
            op.run(**{**inputs, name: change(inputs.get(name))}, backend=backend)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_an_unknown_backend_is_refused_with_the_names_of_the_known(op: Op) -> None:
    known = ", ".join(["auto", *(row["backend"] for row in backends.table() if row["op"] == op.name)])
    with pytest.raises(ValueError, match=rf": unknown backend 'fast'; choose one of {known}$"):
        op.run(**op.inputs(torch.float32), backend="fast")


@each(OPS, "cuda")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_backend_is_refused_where_there_is_no_gpu(op: Op, backend: str) -> None:
    with pytest.raises(ValueError, match=r": backend 'cuda' was asked for but cannot run: no CUDA device$"):
        op.run(**op.inputs(torch.float32), backend=backend)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_auto_on_a_cpu_takes_no_kernel_of_a_gpu_and_says_why(op: Op) -> None:
    tensors = [x for name, x in op.inputs(torch.float32).items() if name in ("tokens_BLD", "queries_BVD")]
    tensors = tensors or [x for x in op.inputs(torch.float32).values() if x.dim()]
    if op.name == "multiview_infonce":
        tensors = tensors[:2]
    backend, reason = backends.resolve(op.name, "auto", *tensors)
    assert backend.name in ("tiled", "native", "eager")
    if triton_support.INTERPRETED:
        assert "triton: Triton's interpreter runs on request only; " in reason
    assert reason.endswith(f"{backend.name}: first choice that runs here")
    again = backends.resolve(op.name, "auto", *tensors)
    assert (again.backend, again.reason) == (backend, reason)

"""Cross-attention pooling with shared, absorbed keys and values.

The V queries of a sample attend to the same tokens, so keys and values belong to the sample. With one head's
projections W_q, W_k, W_v and x^ = (x - mean) / std (LayerNorm without its affine part gamma, beta):

    score  = (W_q LN(q) + b_q) . (W_k (gamma x^ + beta) + b_k)  =  ((W_q LN(q) + b_q)^T W_k gamma) . x^  + const
    pooled = sum_l P_l W_v (gamma x^_l + beta) + b_v            =  W_v gamma (P x^) + W_v beta + b_v

The constant (key bias and beta) is the same for every token and cancels in the softmax; value bias and beta come out
whole because P sums to 1. Neither K nor V is ever formed: two products against the tokens, [V H, D] x [D, L] and back.

A backend gives what meets the tokens, two stage functions with the contract of `cross_pool_tiled`: `attend` and
`attend_backward`. Projections, residual and normalisation (`cross_pool_products`) are the library's matrix products for
all of them. Saved for backward: the inputs, the output, its norms, and the log-sum-exps of the scores.

Axes: B batch, V views, L tokens, D embedding, H heads, M = V H.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast.ops import cross_pool_products as products
from cosmos_fast.ops import cross_pool_tiled
from cosmos_fast.ops.backends import Backend, register, stages_for
from cosmos_kernels import native, pool_cuda, pool_parts, reference, triton_support

OP = "cross_attention_pool"


@dataclass(frozen=True, kw_only=True)
class PoolWeights:
    """Parameters of one pooling: two LayerNorms [D], `nn.MultiheadAttention` projections [3D, D], [3D], [D, D], [D]."""

    ln_q_weight: Tensor
    ln_q_bias: Tensor
    ln_k_weight: Tensor
    ln_k_bias: Tensor
    in_proj_weight: Tensor
    in_proj_bias: Tensor
    out_proj_weight: Tensor
    out_proj_bias: Tensor
    heads: int

    @property
    def parameters(self) -> products.Parameters:
        return products.Parameters(
            ln_q_weight=self.ln_q_weight,
            ln_q_bias=self.ln_q_bias,
            ln_k_weight=self.ln_k_weight,
            ln_k_bias=self.ln_k_bias,
            in_proj_weight=self.in_proj_weight,
            in_proj_bias=self.in_proj_bias,
            out_proj_weight=self.out_proj_weight,
            out_proj_bias=self.out_proj_bias,
        )


def cross_attention_pool(
    tokens_BLD: Tensor, queries_BVD: Tensor, weights: PoolWeights, *, backend: str = "auto"
) -> Tensor:
    """normalize(query + attention(LN(query), LN(tokens))), one query a view, all tokens attended to.

    Matrix products run in the dtype of the tokens, under autocast too; softmax, norms and residual in fp32 (fp64 for
    fp64 input).

    Args:
        tokens_BLD: [B, L, D] tokens of each sample; fp64, fp32, bf16 or fp16.
        queries_BVD: [B, V, D] un-normalised features, one a view; fp64 with fp64 tokens, else any of the others.
        weights: the pooling's parameters; fp64 with fp64 tokens, else any of the others. The key bias cancels: it is
            not read, and its gradient is zero.
        backend: "auto", "tiled" (PyTorch), "triton", "cuda", or "eager" (the oracle, which repeats keys and values for
            every view).

    Returns:
        [B, V, D] cross-modal features, L2-normalised, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a backend that cannot run.
    """
    _check_arguments(tokens_BLD, queries_BVD, weights)
    if backend == "eager":
        return _run_eager(tokens_BLD, queries_BVD, weights)
    output_BVD, _, _ = _pool(tokens_BLD, queries_BVD, list(weights.parameters), weights.heads, backend)
    return output_BVD


def attention_weights(tokens_BLD: Tensor, queries_BVD: Tensor, weights: PoolWeights) -> Tensor:
    """The softmax weights of the pooling over the tokens: [B, V, H, L], each summing to 1; no gradient."""
    _check_arguments(tokens_BLD, queries_BVD, weights)
    batch, views, dim = queries_BVD.shape
    with torch.no_grad(), _own_dtypes(tokens_BLD):
        folded = products.fold(weights.parameters, weights.heads, tokens_BLD.dtype)
        absorbed_BMD = products.absorb(queries_BVD, folded, weights.heads).queries_BMD
        normed_BLD = F.layer_norm(tokens_BLD, (dim,), eps=products.LAYER_NORM_EPS)
        scores_BML = torch.bmm(absorbed_BMD, normed_BLD.mT).to(products.wide(tokens_BLD.dtype))
        return scores_BML.softmax(-1).view(batch, views, weights.heads, -1)


@torch.library.custom_op("cosmos_fast::cross_attention_pool", mutates_args=())
def _pool(
    tokens: Tensor, queries: Tensor, parameters: Sequence[Tensor], heads: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, V, D], its norms before normalisation [B, V, 1], log-sum-exps of the scores [B, M]."""
    stages = stages_for(OP, backend, tokens, queries)
    with _own_dtypes(tokens):
        return products.forward(tokens, queries, products.Parameters(*parameters), heads, stages.attend)


@_pool.register_fake
def _(
    tokens: Tensor, queries: Tensor, parameters: Sequence[Tensor], heads: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch, views, dim = queries.shape
    shapes = (batch, views, dim), (batch, views, 1), (batch, views * heads)
    output, norms, lse = (queries.new_empty(shape, dtype=products.wide(tokens.dtype)) for shape in shapes)
    return output, norms, lse


@torch.library.custom_op("cosmos_fast::cross_attention_pool_backward", mutates_args=())
def _pool_backward(
    grad: Tensor,
    output: Tensor,
    norms: Tensor,
    lse: Tensor,
    tokens: Tensor,
    queries: Tensor,
    parameters: Sequence[Tensor],
    heads: int,
    backend: str,
) -> list[Tensor]:
    """Gradients of tokens, queries and the parameters in their order."""
    stages = stages_for(OP, backend, tokens, queries)
    with _own_dtypes(tokens):
        return products.backward(
            grad,
            output,
            norms,
            lse,
            tokens,
            queries,
            products.Parameters(*parameters),
            heads,
            stages.attend_backward,
        )


@_pool_backward.register_fake
def _(
    grad: Tensor,
    output: Tensor,
    norms: Tensor,
    lse: Tensor,
    tokens: Tensor,
    queries: Tensor,
    parameters: Sequence[Tensor],
    heads: int,
    backend: str,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (tokens, queries, *parameters)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, queries, parameters, ctx.heads, ctx.backend = inputs
    ctx.save_for_backward(*output, tokens, queries, *parameters)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, [None] * len(products.Parameters._fields), None, None
    output, norms, lse, tokens, queries, *parameters = ctx.saved_tensors
    grad_tokens, grad_queries, *grad_parameters = _pool_backward(
        grad, output, norms, lse, tokens, queries, parameters, ctx.heads, ctx.backend
    )
    return grad_tokens, grad_queries, grad_parameters, None, None


_pool.register_autograd(_gradients, setup_context=_save)


def _run_eager(tokens_BLD: Tensor, queries_BVD: Tensor, weights: PoolWeights) -> Tensor:
    """The oracle in fp32 (fp64 for fp64 input), or in what autocast makes of that."""
    dtype = products.wide(tokens_BLD.dtype)
    parameters = {name: parameter.to(dtype) for name, parameter in weights.parameters._asdict().items()}
    pooled_BVD = reference.cross_attention_pool(
        tokens_BLD.to(dtype), queries_BVD.to(dtype), **parameters, heads=weights.heads
    )
    return pooled_BVD.to(dtype)


def _own_dtypes(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(tensor.device.type, enabled=False)


def _check_arguments(tokens_BLD: Tensor, queries_BVD: Tensor, weights: PoolWeights) -> None:
    for label, tensor in (("tokens_BLD", tokens_BLD), ("queries_BVD", queries_BVD)):
        if tensor.dim() != 3 or 0 in tensor.shape:
            raise ValueError(f"{OP}: {label} has shape {tuple(tensor.shape)}, expected non-empty [B, L or V, D]")
        if not tensor.is_floating_point():
            raise ValueError(f"{OP}: {label} has dtype {tensor.dtype}, expected a floating-point dtype")
    batch, _, dim = queries_BVD.shape
    if tokens_BLD.shape[0] != batch or tokens_BLD.shape[2] != dim:
        raise ValueError(f"{OP}: tokens_BLD has shape {tuple(tokens_BLD.shape)}, expected [{batch}, L, {dim}]")
    shapes = (dim,), (dim,), (dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)
    for (label, tensor), expected in zip(weights.parameters._asdict().items(), shapes, strict=True):
        if tensor.shape != expected:
            raise ValueError(
                f"{OP}: {label} has shape {tuple(tensor.shape)}, expected {expected} for features of {dim}"
            )
    if weights.heads < 1 or dim % weights.heads:
        raise ValueError(f"{OP}: heads = {weights.heads} does not divide D = {dim}")
    for label, tensor in (("queries_BVD", queries_BVD), *weights.parameters._asdict().items()):
        if tensor.device != tokens_BLD.device:
            raise ValueError(f"{OP}: tokens_BLD is on {tokens_BLD.device}, {label} on {tensor.device}")
        if (tensor.dtype == torch.float64) != (tokens_BLD.dtype == torch.float64) or not tensor.is_floating_point():
            raise ValueError(
                f"{OP}: {label} is {tensor.dtype}, which does not go with tokens_BLD of {tokens_BLD.dtype}"
            )


register(
    Backend(
        OP,
        "triton",
        load=partial(import_module, "cosmos_kernels.pool_triton"),
        summary="bf16 and fp16 tokens, at most 256 a sample; LayerNorm applied to the scores",
        why_unavailable=triton_support.why_missing_on_blackwell,
        why_unsupported=pool_parts.why_unsupported,
    ),
    Backend(
        OP,
        "cuda",
        pool_cuda,
        summary="CUDA C++ for fp16 and bf16 tokens, at most 256 a sample; forward and backward in one launch each",
        why_unavailable=native.why_no_gpu,
        why_unsupported=pool_cuda.why_unsupported,
        automatic=False,  # until it has been measured against the other
    ),
    Backend(OP, "tiled", cross_pool_tiled, "PyTorch, a tile of samples at a time; keys and values never formed"),
    Backend(OP, "eager", _run_eager, "the oracle: K and V once per view", automatic=False),
)

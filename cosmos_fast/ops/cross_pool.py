"""Cross-attention pooling with shared, absorbed keys and values.

The V queries of a sample attend to the same tokens, so keys and values belong to the sample. With one head's
projections W_q, W_k, W_v and x^ = (x - mean) / std (LayerNorm without its affine part gamma, beta):

    score  = (W_q LN(q) + b_q) . (W_k (gamma x^ + beta) + b_k)  =  ((W_q LN(q) + b_q)^T W_k gamma) . x^  + const
    pooled = sum_l P_l W_v (gamma x^_l + beta) + b_v            =  W_v (gamma (P x^) + beta) + b_v

The constant (key bias and beta) is the same for every token and cancels in the softmax; value bias and beta come out
whole because P sums to 1. Neither K nor V is ever formed: two products against the tokens, [V H, D] x [D, L] and back.

Axes: B batch, V views, L tokens, D embedding, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast.ops.backends import Backend, register, resolve
from cosmos_kernels import reference

LAYER_NORM_EPS = 1e-5


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


def cross_attention_pool(
    tokens_BLD: Tensor, queries_BVD: Tensor, weights: PoolWeights, *, backend: str = "auto"
) -> Tensor:
    """normalize(query + attention(LN(query), LN(tokens))), one query a view, all tokens attended to.

    Args:
        tokens_BLD: [B, L, D] tokens of each sample; fp64, fp32, or what autocast makes of them.
        queries_BVD: [B, V, D] un-normalised features, one a view.
        weights: the pooling's parameters.
        backend: "auto", "absorbed" or "eager" (the oracle, which repeats keys and values for every view).

    Returns:
        [B, V, D] cross-modal features, L2-normalised, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run.
    """
    _check_arguments(tokens_BLD, queries_BVD, weights)
    chosen, _ = resolve("cross_attention_pool", backend, tokens_BLD, queries_BVD)
    return chosen.run(tokens_BLD, queries_BVD, weights)


def attention_weights(tokens_BLD: Tensor, queries_BVD: Tensor, weights: PoolWeights) -> Tensor:
    """The softmax weights of the pooling over the tokens: [B, V, H, L], each summing to 1."""
    scores, _ = _absorbed_scores(tokens_BLD, queries_BVD, weights)
    batch, views, _ = queries_BVD.shape
    return scores.softmax(-1).view(batch, views, weights.heads, -1)


def _absorbed_scores(tokens_BLD: Tensor, queries_BVD: Tensor, weights: PoolWeights) -> tuple[Tensor, Tensor]:
    """Scores [B, V*H, L] before the softmax, and the normalised tokens x^ [B, L, D]."""
    batch, views, dim = queries_BVD.shape
    heads, head_dim = weights.heads, dim // weights.heads
    normed_BLD = F.layer_norm(tokens_BLD, (dim,), eps=LAYER_NORM_EPS)
    queries = F.layer_norm(queries_BVD, (dim,), weights.ln_q_weight, weights.ln_q_bias, LAYER_NORM_EPS)
    queries = F.linear(queries, weights.in_proj_weight[:dim], weights.in_proj_bias[:dim]) * head_dim**-0.5
    key_proj_HdD = (weights.in_proj_weight[dim : 2 * dim] * weights.ln_k_weight).view(heads, head_dim, dim)
    queries_HNd = queries.view(batch * views, heads, head_dim).transpose(0, 1)
    absorbed = torch.bmm(queries_HNd, key_proj_HdD).transpose(0, 1).reshape(batch, views * heads, dim)
    return torch.bmm(absorbed, normed_BLD.to(absorbed.dtype).transpose(1, 2)), normed_BLD


def _run_absorbed(tokens_BLD: Tensor, queries_BVD: Tensor, weights: PoolWeights) -> Tensor:
    batch, views, dim = queries_BVD.shape
    heads, head_dim = weights.heads, dim // weights.heads
    scores, normed_BLD = _absorbed_scores(tokens_BLD, queries_BVD, weights)
    attended = torch.bmm(scores.softmax(-1).to(normed_BLD.dtype), normed_BLD)
    attended = attended * weights.ln_k_weight + weights.ln_k_bias
    attended_HND = attended.view(batch * views, heads, dim).transpose(0, 1)
    value_proj_HDd = weights.in_proj_weight[2 * dim :].view(heads, head_dim, dim).transpose(1, 2)
    values = torch.bmm(attended_HND, value_proj_HDd.to(attended_HND.dtype)).transpose(0, 1).reshape(batch, views, dim)
    pooled = F.linear(values + weights.in_proj_bias[2 * dim :], weights.out_proj_weight, weights.out_proj_bias)
    return F.normalize(_at_least_fp32(queries_BVD) + pooled, dim=-1)


def _run_eager(tokens_BLD: Tensor, queries_BVD: Tensor, weights: PoolWeights) -> Tensor:
    return reference.cross_attention_pool(tokens_BLD, _at_least_fp32(queries_BVD), **vars(weights))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_arguments(tokens_BLD: Tensor, queries_BVD: Tensor, weights: PoolWeights) -> None:
    name = "cross_attention_pool"
    for label, tensor in (("tokens_BLD", tokens_BLD), ("queries_BVD", queries_BVD)):
        if tensor.dim() != 3 or 0 in tensor.shape:
            raise ValueError(f"{name}: {label} has shape {tuple(tensor.shape)}, expected non-empty [B, L or V, D]")
    batch, _, dim = queries_BVD.shape
    if tokens_BLD.shape[0] != batch or tokens_BLD.shape[2] != dim:
        raise ValueError(f"{name}: tokens_BLD has shape {tuple(tokens_BLD.shape)}, expected [{batch}, L, {dim}]")
    if tokens_BLD.device != queries_BVD.device:
        raise ValueError(f"{name}: tokens_BLD is on {tokens_BLD.device}, queries_BVD on {queries_BVD.device}")
    if weights.in_proj_weight.shape != (3 * dim, dim):
        shape = tuple(weights.in_proj_weight.shape)
        raise ValueError(f"{name}: in_proj_weight has shape {shape}, expected {(3 * dim, dim)} for features of {dim}")
    if dim % weights.heads:
        raise ValueError(f"{name}: heads = {weights.heads} does not divide D = {dim}")


register(
    Backend("cross_attention_pool", "absorbed", _run_absorbed, "PyTorch; keys and values never formed"),
    Backend("cross_attention_pool", "eager", _run_eager, "the oracle: K and V once per view", automatic=False),
)

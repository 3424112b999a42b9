"""Attention of a sample's queries to its LayerNormed tokens in PyTorch, a tile of samples at a time.

    x^ = (x - mean) / std      S = q x^T      P = softmax(S)      Z = P x^

Forward keeps the log-sum-exps of S; backward recomputes P = exp(S - lse) and never needs Z, because
rowsum(dZ * Z) = rowsum(P * dP). No more than one tile's x^, S and P exist at a time.

Axes: B batch, L tokens, M rows of a sample (views times heads), D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5
TILE_BYTES = {"cpu": 2**21, "cuda": 2**26}  # normalised tokens held at a time: what stays in a core's cache, or in HBM


def attend(tokens_BLD: Tensor, queries_BMD: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted means of the normalised tokens.

    Args:
        tokens_BLD: [B, L, D], floating point.
        queries_BMD: [B, M, D] of the same dtype, scaled.

    Returns:
        attended [B, M, D] in that dtype, and the log-sum-exps of the scores [B, M] in fp32 (fp64 for fp64 input).
    """
    attended_BMD = torch.empty_like(queries_BMD, memory_format=torch.contiguous_format)
    lse_BM = queries_BMD.new_empty(queries_BMD.shape[:2], dtype=_wide(queries_BMD))
    for part in _tiles(tokens_BLD):
        normed_BLD = F.layer_norm(tokens_BLD[part], tokens_BLD.shape[2:], eps=LAYER_NORM_EPS)
        scores_BML = torch.bmm(queries_BMD[part], normed_BLD.mT).to(lse_BM.dtype)
        peak_BM1 = scores_BML.amax(-1, keepdim=True)
        weights_BML = scores_BML.sub_(peak_BM1).exp_()
        total_BM1 = weights_BML.sum(-1, keepdim=True)
        lse_BM[part] = (peak_BM1 + total_BM1.log()).squeeze(-1)
        torch.bmm(weights_BML.div_(total_BM1).to(normed_BLD.dtype), normed_BLD, out=attended_BMD[part])
    return attended_BMD, lse_BM


def attend_backward(
    tokens_BLD: Tensor, queries_BMD: Tensor, lse_BM: Tensor, grad_attended_BMD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` from its inputs and log-sum-exps.

    Args:
        tokens_BLD, queries_BMD: as in the forward pass. lse_BM: what it returned.
        grad_attended_BMD: gradient of `attended`, in its dtype.

    Returns:
        attended [B, M, D] once more, grad_queries [B, M, D] and grad_tokens [B, L, D], all in the tokens' dtype.
    """
    dim = tokens_BLD.shape[2]
    attended_BMD, grad_queries_BMD = (
        torch.empty_like(queries_BMD, memory_format=torch.contiguous_format) for _ in range(2)
    )
    grad_tokens_BLD = torch.empty_like(tokens_BLD, memory_format=torch.contiguous_format)
    for part in _tiles(tokens_BLD):
        tokens, queries, grad_attended = tokens_BLD[part], queries_BMD[part], grad_attended_BMD[part]
        normed, mean, rstd = torch.native_layer_norm(tokens, (dim,), None, None, LAYER_NORM_EPS)
        weights = torch.bmm(queries, normed.mT).to(lse_BM.dtype).sub_(lse_BM[part].unsqueeze(-1)).exp_()
        grad_weights = torch.bmm(grad_attended, normed.mT).to(lse_BM.dtype)
        inner_BM1 = (weights * grad_weights).sum(-1, keepdim=True)
        grad_scores = grad_weights.sub_(inner_BM1).mul_(weights).to(normed.dtype)
        weights = weights.to(normed.dtype)
        torch.bmm(weights, normed, out=attended_BMD[part])
        torch.bmm(grad_scores, normed, out=grad_queries_BMD[part])
        grad_normed = torch.bmm(weights.mT, grad_attended).baddbmm_(grad_scores.mT, queries)
        grad_tokens_BLD[part] = torch.ops.aten.native_layer_norm_backward(
            grad_normed, tokens, (dim,), mean, rstd, None, None, [True, False, False]
        )[0]
    return attended_BMD, grad_queries_BMD, grad_tokens_BLD


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of softmax and norms: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def _tiles(tokens_BLD: Tensor) -> Iterator[slice]:
    """Slices of samples whose tokens fill a tile; at least one sample."""
    batch, length, dim = tokens_BLD.shape
    budget = TILE_BYTES.get(tokens_BLD.device.type, TILE_BYTES["cuda"])
    samples = max(1, budget // (length * dim * tokens_BLD.element_size()))
    return (slice(start, start + samples) for start in range(0, batch, samples))

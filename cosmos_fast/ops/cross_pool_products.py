"""The products around the attention of the cross-attention pooling, and their gradients.

LayerNorm's affine part and the head scaling are folded into the projections, W' = W diag(scale) and b' = b + W shift:

    Q' = LN0(q) W_q'^T + b_q'            LN0: LayerNorm without affine part
    q~ = Q'_h W_k',h                     [V H, D] queries of a sample against its normalised tokens; attention gives Z
    u  = Z_h W_v',h^T + b_v'             b_v' whole, because the attention weights sum to 1
    y  = q + u W_o^T + b_o,  out = y / |y|

The key bias, and beta in the keys, shift all scores of a query alike and cancel in the softmax: their gradient is zero.
Plain functions on tensors without autograd, in the dtype of the tokens; norms, sums and the residual in fp32 or wider.

Axes: B batch, V views, N = B V, L tokens, D embedding, H heads, d head width, M = V H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5
NORM_EPS = 1e-12

Attend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
AttendBackward = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Parameters(NamedTuple):
    """LayerNorms [D], `nn.MultiheadAttention` projections [3D, D], [3D], [D, D], [D]."""

    ln_q_weight: Tensor
    ln_q_bias: Tensor
    ln_k_weight: Tensor
    ln_k_bias: Tensor
    in_proj_weight: Tensor
    in_proj_bias: Tensor
    out_proj_weight: Tensor
    out_proj_bias: Tensor


class Folded(NamedTuple):
    """Projections with the LayerNorms' affine parts inside: `weight_3DD` and `out_DD` in the dtype of the products,
    what the gradients of the parts need in fp32 or wider (`scale_3D`, `shift_3D`, `in_proj_3DD`)."""

    weight_3DD: Tensor
    query_bias_D: Tensor
    value_bias_D: Tensor
    out_DD: Tensor
    scale_3D: Tensor
    shift_3D: Tensor
    in_proj_3DD: Tensor


class Absorbed(NamedTuple):
    """Queries on their way to the tokens: LN0 [N, D] with its mean and 1/std [N, 1], Q' [N, D], q~ [B, M, D]."""

    normed_ND: Tensor
    mean_N1: Tensor
    rstd_N1: Tensor
    projected_ND: Tensor
    queries_BMD: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def fold(parameters: Parameters, heads: int, dtype: torch.dtype) -> Folded:
    dim = parameters.ln_q_weight.shape[0]
    scaling = (dim // heads) ** -0.5
    ln_q_weight, ln_q_bias, ln_k_weight, ln_k_bias, in_proj, in_bias, out_proj, _ = (
        parameter.detach().to(wide(dtype)) for parameter in parameters
    )
    scale_3D = torch.stack([ln_q_weight * scaling, ln_k_weight, ln_k_weight])
    shift_3D = torch.stack([ln_q_bias * scaling, torch.zeros_like(ln_k_bias), ln_k_bias])
    in_proj_3DD = in_proj.reshape(3, dim, dim)
    shifted_3D = torch.bmm(in_proj_3DD, shift_3D.unsqueeze(2)).squeeze(2)
    return Folded(
        weight_3DD=(in_proj_3DD * scale_3D.unsqueeze(1)).to(dtype),
        query_bias_D=(in_bias[:dim] * scaling + shifted_3D[0]).to(dtype),
        value_bias_D=(in_bias[2 * dim :] + shifted_3D[2]).to(dtype),
        out_DD=out_proj.to(dtype),
        scale_3D=scale_3D,
        shift_3D=shift_3D,
        in_proj_3DD=in_proj_3DD,
    )


def absorb(queries_BVD: Tensor, folded: Folded, heads: int) -> Absorbed:
    """From the features [B, V, D] to the rows that meet the tokens."""
    batch, views, dim = queries_BVD.shape
    dtype = folded.weight_3DD.dtype
    flat_ND = queries_BVD.to(wide(dtype)).reshape(-1, dim)
    normed_ND, mean_N1, rstd_N1 = torch.native_layer_norm(flat_ND, (dim,), None, None, LAYER_NORM_EPS)
    normed_ND = normed_ND.to(dtype)
    projected_ND = torch.addmm(folded.query_bias_D, normed_ND, folded.weight_3DD[0].T)
    queries_NHD = _by_head(_split(projected_ND, heads), _rows(folded.weight_3DD[1], heads))
    return Absorbed(normed_ND, mean_N1, rstd_N1, projected_ND, queries_NHD.view(batch, views * heads, dim))


def forward(
    tokens_BLD: Tensor, queries_BVD: Tensor, parameters: Parameters, heads: int, attend: Attend
) -> tuple[Tensor, Tensor, Tensor]:
    """The pooled features [B, V, D], their norms before normalisation [B, V, 1], log-sum-exps of the scores [B, M]."""
    dtype = tokens_BLD.dtype
    folded = fold(parameters, heads, dtype)
    attended_BMD, lse_BM = attend(tokens_BLD, absorb(queries_BVD, folded, heads).queries_BMD)
    values_ND = _values(attended_BMD, folded, heads)
    pooled_ND = torch.addmm(parameters.out_proj_bias.to(dtype), values_ND, folded.out_DD.T)
    sums_BVD = queries_BVD.to(wide(dtype)) + pooled_ND.view(queries_BVD.shape)
    norms_BV1 = torch.linalg.vector_norm(sums_BVD, dim=-1, keepdim=True).clamp_min_(NORM_EPS)
    return sums_BVD.div_(norms_BV1), norms_BV1, lse_BM


def backward(
    grad_BVD: Tensor,
    output_BVD: Tensor,
    norms_BV1: Tensor,
    lse_BM: Tensor,
    tokens_BLD: Tensor,
    queries_BVD: Tensor,
    parameters: Parameters,
    heads: int,
    attend_backward: AttendBackward,
) -> list[Tensor]:
    """Gradients of tokens, queries and the eight parameters, in their dtypes."""
    dim, dtype = tokens_BLD.shape[2], tokens_BLD.dtype
    folded = fold(parameters, heads, dtype)
    absorbed = absorb(queries_BVD, folded, heads)

    grad_sums_BVD = _through_norm(grad_BVD.to(wide(dtype)), output_BVD, norms_BV1)
    grad_pooled_ND = grad_sums_BVD.to(dtype).reshape(-1, dim)
    grad_values_ND = torch.mm(grad_pooled_ND, folded.out_DD)
    value_HdD = _rows(folded.weight_3DD[2], heads)
    grad_values_HNd = _split(grad_values_ND, heads)
    grad_attended_BMD = _by_head(grad_values_HNd, value_HdD).view(absorbed.queries_BMD.shape)

    attended_BMD, grad_absorbed_BMD, grad_tokens_BLD = attend_backward(
        tokens_BLD, absorbed.queries_BMD, lse_BM, grad_attended_BMD
    )
    grad_absorbed_HND = grad_absorbed_BMD.view(-1, heads, dim).transpose(0, 1)
    attended_HND = attended_BMD.view(-1, heads, dim).transpose(0, 1)
    grad_projected_ND = _by_head(grad_absorbed_HND, _rows(folded.weight_3DD[1], heads).mT).flatten(1)
    grad_normed_ND = torch.mm(grad_projected_ND, folded.weight_3DD[0])
    grad_folded_3DD = torch.stack(
        [
            torch.mm(grad_projected_ND.T, absorbed.normed_ND),
            torch.bmm(_split(absorbed.projected_ND, heads).mT, grad_absorbed_HND).flatten(0, 1),
            torch.bmm(grad_values_HNd.mT, attended_HND).flatten(0, 1),
        ]
    ).to(wide(dtype))
    grad_queries_BVD = _through_layer_norm(grad_normed_ND, queries_BVD, absorbed).add_(grad_sums_BVD)
    gradients = _parameter_gradients(
        folded,
        heads,
        grad_folded_3DD,
        grad_query_bias_D=grad_projected_ND.sum(0, dtype=wide(dtype)),
        grad_value_bias_D=grad_values_ND.sum(0, dtype=wide(dtype)),
        grad_out_DD=torch.mm(grad_pooled_ND.T, _values(attended_BMD, folded, heads)),
        grad_out_bias_D=grad_sums_BVD.sum((0, 1)),
    )
    matched = (grad.to(parameter.dtype) for grad, parameter in zip(gradients, parameters, strict=True))
    return [grad_tokens_BLD, grad_queries_BVD.to(queries_BVD.dtype), *matched]


def _parameter_gradients(
    folded: Folded,
    heads: int,
    grad_folded_3DD: Tensor,
    *,
    grad_query_bias_D: Tensor,
    grad_value_bias_D: Tensor,
    grad_out_DD: Tensor,
    grad_out_bias_D: Tensor,
) -> Sequence[Tensor]:
    """From the gradients of W' and b' to those of W, b and the LayerNorms' scale and shift."""
    dim = folded.scale_3D.shape[1]
    scaling = (dim // heads) ** -0.5
    grad_bias_3D = torch.stack([grad_query_bias_D, torch.zeros_like(grad_query_bias_D), grad_value_bias_D])
    grad_scale_3D = (grad_folded_3DD * folded.in_proj_3DD).sum(1)
    grad_shift_3D = torch.bmm(grad_bias_3D.unsqueeze(1), folded.in_proj_3DD).squeeze(1)
    grad_in_proj_3DD = torch.baddbmm(
        grad_folded_3DD.mul_(folded.scale_3D.unsqueeze(1)), grad_bias_3D.unsqueeze(2), folded.shift_3D.unsqueeze(1)
    )
    return Parameters(
        ln_q_weight=grad_scale_3D[0] * scaling,
        ln_q_bias=grad_shift_3D[0] * scaling,
        ln_k_weight=grad_scale_3D[1] + grad_scale_3D[2],
        ln_k_bias=grad_shift_3D[2].clone(),  # an operation's outputs share no storage
        in_proj_weight=grad_in_proj_3DD.flatten(0, 1),
        in_proj_bias=torch.cat([grad_query_bias_D * scaling, torch.zeros_like(grad_query_bias_D), grad_value_bias_D]),
        out_proj_weight=grad_out_DD,
        out_proj_bias=grad_out_bias_D,
    )


def _through_layer_norm(grad_normed_ND: Tensor, queries_BVD: Tensor, absorbed: Absorbed) -> Tensor:
    """Gradient of the queries [B, V, D] from that of LN0(q), in fp32 or wider."""
    dtype = wide(grad_normed_ND.dtype)
    gradient_ND = torch.ops.aten.native_layer_norm_backward(
        grad_normed_ND.to(dtype),
        queries_BVD.to(dtype).reshape(grad_normed_ND.shape),
        grad_normed_ND.shape[1:],
        absorbed.mean_N1,
        absorbed.rstd_N1,
        None,
        None,
        [True, False, False],
    )[0]
    return gradient_ND.view(queries_BVD.shape)


def _through_norm(grad_BVD: Tensor, output_BVD: Tensor, norms_BV1: Tensor) -> Tensor:
    """Gradient of y from that of y / max(|y|, eps)."""
    inner_BV1 = (grad_BVD * output_BVD).sum(-1, keepdim=True)
    inner_BV1 = torch.where(norms_BV1 > NORM_EPS, inner_BV1, 0)  # below eps the divisor is a constant
    return (grad_BVD - output_BVD * inner_BV1) / norms_BV1


def _values(attended_BMD: Tensor, folded: Folded, heads: int) -> Tensor:
    """u [N, D]: every head's values from what it attended to."""
    attended_HND = attended_BMD.view(-1, heads, attended_BMD.shape[2]).transpose(0, 1)
    values_NHd = _by_head(attended_HND, _rows(folded.weight_3DD[2], heads).mT)
    return values_NHd.flatten(1).add_(folded.value_bias_D)


def _by_head(left_HNx: Tensor, right_Hxy: Tensor) -> Tensor:
    """left @ right of every head, as a contiguous [N, H, y]: the product is written where it is wanted, not copied."""
    heads, count, _ = left_HNx.shape
    product_NHy = left_HNx.new_empty(count, heads, right_Hxy.shape[2])
    torch.bmm(left_HNx, right_Hxy, out=product_NHy.transpose(0, 1))
    return product_NHy


def _split(x_ND: Tensor, heads: int) -> Tensor:
    """[N, D] -> [H, N, d]."""
    return x_ND.view(x_ND.shape[0], heads, -1).transpose(0, 1)


def _rows(weight_DD: Tensor, heads: int) -> Tensor:
    """[D, D] -> [H, d, D]: the rows that make a head's channels."""
    return weight_DD.view(heads, -1, weight_DD.shape[1])

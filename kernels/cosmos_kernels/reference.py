"""The eager oracle: what every kernel must compute, written as the formulas read.

Slow and memory-hungry on purpose. Every faster implementation is tested against these functions; nothing is tuned
here, and nothing is written a second time elsewhere.

Axes: B batch, G columns (the other side's batch), V views, L tokens, D embedding, H heads, M rows and K classes of
dense logits, T packed queries, S packed keys, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def infonce(a_BD: Tensor, b_BD: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of two views: half of CE(scale a b^T, diagonal) plus half of CE(scale b a^T, diagonal)."""
    labels_B = torch.arange(a_BD.shape[0], device=a_BD.device)
    a_to_b = F.cross_entropy(scale * a_BD @ b_BD.T, labels_B)
    b_to_a = F.cross_entropy(scale * b_BD @ a_BD.T, labels_B)
    return (a_to_b + b_to_a) / 2


def multiview_infonce(a_VBD: Tensor, b_VBD: Tensor, scale: Tensor) -> Tensor:
    """Mean of `infonce` over every pair of a view of `a` [Va, B, D] and a view of `b` [Vb, B, D]."""
    total = a_VBD.new_zeros(())
    for a_BD in a_VBD:
        for b_BD in b_VBD:
            total = total + infonce(a_BD, b_BD, scale)
    return total / (a_VBD.shape[0] * b_VBD.shape[0])


def cosmos_losses(
    student_image_VBD: Tensor,
    student_text_VBD: Tensor,
    student_image_crossmodal_VBD: Tensor,
    student_text_crossmodal_VBD: Tensor,
    teacher_image_VBD: Tensor,
    teacher_text_VBD: Tensor,
    logit_scale: Tensor,
    distill_logit_scale: Tensor,
    global_image_views: int = 2,
) -> tuple[Tensor, Tensor]:
    """The two terms of the COSMOS objective (arXiv 2412.01814): contrastive, and cross-modal self-distillation.

    The contrastive term pairs the global image views with every caption view; the distillation term pairs every
    cross-modal student view with every teacher view, on its own scale, the teacher detached.

    Returns:
        (clip, distill), two scalars.
    """
    clip = multiview_infonce(student_image_VBD[:global_image_views], student_text_VBD, logit_scale)
    distill = clip.new_zeros(())
    for student_VBD in (student_image_crossmodal_VBD, student_text_crossmodal_VBD):
        for teacher_VBD in (teacher_image_VBD, teacher_text_VBD):
            distill = distill + multiview_infonce(student_VBD, teacher_VBD.detach(), distill_logit_scale)
    return clip, distill / 4


def soft_cross_entropy(student_logits_MK: Tensor, teacher_logits_MK: Tensor) -> Tensor:
    """Mean over the rows of the cross-entropy of softmax(teacher) and softmax(student); the teacher is detached."""
    targets_MK = teacher_logits_MK.detach().softmax(dim=1)
    return -(targets_MK * student_logits_MK.log_softmax(dim=1)).sum(dim=1).mean()


def distillation_cross_entropy(
    student_a_VBD: Tensor,
    student_b_VGD: Tensor,
    teacher_a_VBD: Tensor,
    teacher_b_VGD: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
) -> Tensor:
    """Soft-target distillation between two similarity matrices, both directions, averaged over all pairs of views.

    A pair's student logits are student_scale a b^T, its targets the softmax of teacher_scale a' b'^T, over the columns
    and over the rows. A teacher with one view serves every view of the student.
    """
    teacher_a_VBD = teacher_a_VBD.expand(student_a_VBD.shape[0], -1, -1)
    teacher_b_VGD = teacher_b_VGD.expand(student_b_VGD.shape[0], -1, -1)
    total = student_a_VBD.new_zeros(())
    for a_BD, teacher_a_BD in zip(student_a_VBD, teacher_a_VBD, strict=True):
        for b_GD, teacher_b_GD in zip(student_b_VGD, teacher_b_VGD, strict=True):
            student_BG = student_scale * a_BD @ b_GD.T
            teacher_BG = teacher_scale * teacher_a_BD @ teacher_b_GD.T
            rows, columns = soft_cross_entropy(student_BG, teacher_BG), soft_cross_entropy(student_BG.T, teacher_BG.T)
            total = total + (rows + columns) / 2
    return total / (student_a_VBD.shape[0] * student_b_VGD.shape[0])


def dense_distillation_cross_entropy(
    student_logits_MK: Tensor,
    teacher_logits_MK: Tensor,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """Cross-entropy of softmax(teacher / its temperature) and softmax(student / its temperature), mean of the rows."""
    return soft_cross_entropy(student_logits_MK / student_temperature, teacher_logits_MK / teacher_temperature)


def cross_attention_pool(
    tokens_BLD: Tensor,
    queries_BVD: Tensor,
    *,
    ln_q_weight: Tensor,
    ln_q_bias: Tensor,
    ln_k_weight: Tensor,
    ln_k_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    heads: int,
) -> Tensor:
    """Cross-attention pooling with one query a view: normalize(query + MHA(LN(query), LN(tokens), LN(tokens))).

    Tokens are repeated for every view and projected again each time, as in the original.

    Returns:
        [B, V, D], L2-normalised.
    """
    batch, views, dim = queries_BVD.shape
    keys_NLD = F.layer_norm(tokens_BLD, (dim,), ln_k_weight, ln_k_bias).repeat_interleave(views, dim=0)
    queries_N1D = F.layer_norm(queries_BVD, (dim,), ln_q_weight, ln_q_bias).reshape(batch * views, 1, dim)
    pooled_1ND, _ = F.multi_head_attention_forward(
        queries_N1D.transpose(0, 1),
        keys_NLD.transpose(0, 1),
        keys_NLD.transpose(0, 1),
        embed_dim_to_check=dim,
        num_heads=heads,
        in_proj_weight=in_proj_weight,
        in_proj_bias=in_proj_bias,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=out_proj_weight,
        out_proj_bias=out_proj_bias,
        need_weights=False,
    )
    return F.normalize(queries_BVD + pooled_1ND.view(batch, views, dim), dim=-1)


def packed_attention(
    q_THd: Tensor,
    k_SHd: Tensor,
    v_SHd: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of every sequence to itself, one after the other.

    Args:
        q_THd: [T, H, d], the queries of all sequences one behind the other; k_SHd, v_SHd: [S, H, d] likewise.
        causal: query i of n sees the first m - n + i + 1 of m keys.

    Returns:
        [T, H, d] softmax-weighted sums of values, and the log-sum-exps of the scores [H, T].
    """
    outputs, lses = [], []
    parts = (
        x.split(list(lengths)) for x, lengths in ((q_THd, query_lengths), (k_SHd, key_lengths), (v_SHd, key_lengths))
    )
    for q_nHd, k_mHd, v_mHd in zip(*parts, strict=True):
        scores_Hnm = torch.einsum("nhd,mhd->hnm", q_nHd, k_mHd) / q_nHd.shape[-1] ** 0.5
        if causal:
            seen_nm = torch.ones(scores_Hnm.shape[1:], dtype=torch.bool, device=scores_Hnm.device)
            seen_nm = seen_nm.tril(len(k_mHd) - len(q_nHd))
            scores_Hnm = scores_Hnm.masked_fill(~seen_nm, -float("inf"))
        outputs.append(torch.einsum("hnm,mhd->nhd", scores_Hnm.softmax(-1), v_mHd))
        lses.append(scores_Hnm.logsumexp(-1))
    return torch.cat(outputs), torch.cat(lses, 1)


def add_layer_norm(
    x_TD: Tensor, update_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x + update, and its LayerNorm, both in the wider dtype of x and update."""
    y_TD = x_TD + update_TD
    return y_TD, F.layer_norm(y_TD, y_TD.shape[1:], weight_D.to(y_TD.dtype), bias_D.to(y_TD.dtype), eps)

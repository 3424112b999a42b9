"""Image-caption retrieval: ranks, R@k, mean and median rank, in both directions.

Axis legend: N images, M captions, D embed. Every caption belongs to one image; an image may own several captions.

Protocol: features are L2-normalised, the score is their cosine. Image -> text counts the best placed of an image's own
captions; text -> image looks for the one image of a caption. Ranks start at 1. **Ties count against the model**: an
item of another owner with exactly the same score is placed ahead, so features that collapse to a point score 0, not
100. For the same reason the comparisons below count what is `not (score < own)`: NaN features come last. Items with the
same features have the same score, to the last bit, wherever they stand.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
# A block of scores holds at most this many floats (16 MiB), however large the gallery is.
BLOCK_ELEMENTS = 4 * 1024 * 1024


def image_to_text_ranks(image_ND: Tensor, text_MD: Tensor, owner_M: Tensor) -> Tensor:
    """Rank of the best own caption of each image among all M captions.

    Args:
        image_ND: float features, normalised.
        text_MD: float features, normalised.
        owner_M: int64, the image index of each caption; every image owns at least one.

    Returns:
        int64 [N], 1 = a caption of the image's own comes first.
    """
    _check_owners(len(image_ND), text_MD, owner_M)
    step = max(1, BLOCK_ELEMENTS // len(text_MD))
    # Captions in the order of their images: those of a block of images are a slice.
    owner_sorted_M, caption_M = owner_M.sort(stable=True)
    starts = range(0, len(image_ND), step)
    edges = torch.tensor([*starts, len(image_ND)], device=owner_M.device)
    slices = torch.searchsorted(owner_sorted_M, edges).tolist()
    ranks = []
    for block, (start, scores_BM) in enumerate(score_blocks(image_ND, text_MD, step)):
        own = slice(slices[block], slices[block + 1])
        ranks.append(_best_own_ranks(scores_BM, owner_sorted_M[own] - start, caption_M[own]))
    return torch.cat(ranks)


def _best_own_ranks(scores_BM: Tensor, row_K: Tensor, column_K: Tensor) -> Tensor:
    """Rank of the best of a row's own columns, int64 [B]. Overwrites the scores.

    row_K, column_K: int64, all places (K) of own scores.
    """
    own_K = scores_BM[row_K, column_K]
    best_B = scores_BM.new_full((len(scores_BM),), -torch.inf).scatter_reduce_(0, row_K, own_K, "amax")
    # Other captions that are not below the best own one: all that are not, without the own ones that are not.
    not_below_B = _not_below(scores_BM, best_B)
    own_not_below_B = torch.zeros_like(not_below_B).index_add_(0, row_K, (~(own_K < best_B[row_K])).long())
    return not_below_B - own_not_below_B + 1


def text_to_image_ranks(text_MD: Tensor, image_ND: Tensor, owner_M: Tensor) -> Tensor:
    """Rank of each caption's image among all N images; int64 [M], 1 = first. Arguments as `image_to_text_ranks`."""
    _check_owners(len(image_ND), text_MD, owner_M)
    step = max(1, BLOCK_ELEMENTS // len(image_ND))
    ranks = [
        ranks_of_targets(scores_BN, owner_M[start : start + step])
        for start, scores_BN in score_blocks(text_MD, image_ND, step)
    ]
    return torch.cat(ranks)


def score_blocks(query_ND: Tensor, other_MD: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    """Scores of `step` queries at a time: where they begin, and [B, M], which the next ones overwrite.

    One piece of memory serves all blocks: pieces taken anew leave gaps, which made a peak of 100 MiB one of 350.
    """
    room_BM = query_ND.new_empty(min(step, len(query_ND)), len(other_MD))
    again_K, first_K = equal_rows(other_MD.detach())
    for start in range(0, len(query_ND), step):
        queries_BD = query_ND[start : start + step].detach()
        scores_BM = torch.mm(queries_BD, other_MD.detach().T, out=room_BM[: len(queries_BD)])
        if len(again_K):
            # Where a column of a product stands may decide its last bits; taken from one, equal ones tie.
            scores_BM.index_copy_(1, again_K, scores_BM.index_select(1, first_K))
        yield start, scores_BM


def equal_rows(rows_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the rows that an earlier one equals bit by bit, and of the first such: int64 [K] each."""
    # Doubles as two numbers each: what ends in many zero bits leaves few to the digest.
    bits_MD = rows_MD.contiguous().view(torch.int16 if rows_MD.element_size() == 2 else torch.int32)
    count, dim = bits_MD.shape
    step = max(1, BLOCK_ELEMENTS // (16 * dim))  # rows at a time, so that little memory is taken
    # Sums of whole numbers, which wrap around, do not depend on an order as those of floats do.
    generator = torch.Generator().manual_seed(0)
    weight_D = torch.randint(-(2**63), 2**63 - 1, (dim,), generator=generator).to(rows_MD.device)
    digest_M, room_BD = weight_D.new_empty(count), weight_D.new_empty(min(step, count), dim)
    for part_BD, digest_B in zip(bits_MD.split(step), digest_M.split(step), strict=True):
        torch.sum(torch.mul(part_BD, weight_D, out=room_BD[: len(part_BD)]), dim=1, out=digest_B)
    digest_G, group_M = digest_M.unique(return_inverse=True)
    number_M = torch.arange(count, device=rows_MD.device)
    first_G = torch.full_like(digest_G, count).scatter_reduce_(0, group_M, number_M, "amin")
    again_K = (first_G[group_M] < number_M).nonzero()[:, 0]
    first_K = first_G[group_M[again_K]]
    pairs = zip(again_K.split(step), first_K.split(step), strict=True)
    same_K = torch.cat([(bits_MD[again_B] == bits_MD[first_B]).all(dim=1) for again_B, first_B in pairs])
    return again_K[same_K], first_K[same_K]


def ranks_of_targets(scores_BC: Tensor, target_B: Tensor) -> Tensor:
    """Rank (1 = first) of column `target_B` in each row; columns that tie with it are placed ahead of it.

    Overwrites the scores.
    """
    # Not below it are those ahead, ties, NaN, and itself, which makes the count start at 1.
    return _not_below(scores_BC, scores_BC.gather(1, target_B[:, None])[:, 0])


def _not_below(scores_BC: Tensor, least_B: Tensor) -> Tensor:
    """How many scores of each row are not below a number, int64 [B]; overwrites the scores.

    In place, and summed as floats: torch would sum bools as a copy in int64. Such a sum is exact up to 2^24 columns.
    """
    assert scores_BC.shape[1] <= 2**24
    below_B = scores_BC.lt_(least_B[:, None]).sum(dim=1, dtype=torch.float32)
    return scores_BC.shape[1] - below_B.long()


def rank_metrics(ranks: Tensor, prefix: str) -> dict[str, float]:
    """`{prefix}_r1`, `_r5`, `_r10` in percent, `{prefix}_mean_rank`, `{prefix}_median_rank` (midpoint when even)."""
    ranks = ranks.double()
    metrics = {f"{prefix}_r{k}": 100.0 * (ranks <= k).double().mean().item() for k in RECALL_AT}
    metrics[f"{prefix}_mean_rank"] = ranks.mean().item()
    metrics[f"{prefix}_median_rank"] = ranks.quantile(0.5).item() if len(ranks) < 1_000_000 else ranks.median().item()
    return metrics


def retrieval_metrics(image_ND: Tensor, text_MD: Tensor, owner_M: Tensor) -> dict[str, float]:
    """All retrieval numbers of one feature set: keys `i2t_r1`, ..., `t2i_median_rank`."""
    return {
        **rank_metrics(image_to_text_ranks(image_ND, text_MD, owner_M), "i2t"),
        **rank_metrics(text_to_image_ranks(text_MD, image_ND, owner_M), "t2i"),
    }


def _check_owners(images: int, text_MD: Tensor, owner_M: Tensor) -> None:
    if len(owner_M) != len(text_MD):
        raise ValueError(f"{len(text_MD)} captions but {len(owner_M)} owners: give one image index per caption")
    if images == 0 or len(torch.unique(owner_M)) != images or int(owner_M.min()) < 0 or int(owner_M.max()) >= images:
        raise ValueError(
            f"every one of the {images} images must own at least one caption, and no other index may occur"
        )

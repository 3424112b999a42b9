"""Pre-LayerNorm transformer blocks over packed sequences; the last block only makes the rows that are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.model.attention import PackedSelfAttention
from cosmos_fast.model.packing import PackedLayout
from cosmos_fast.model.savings import Savings, recomputed
from cosmos_fast.ops.attention import choose_attention
from cosmos_fast.ops.layer_norm import add_layer_norm


class Mlp(nn.Module):
    """Linear, exact GELU, linear; hidden width four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_TD)))


class ResidualBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)). `savings` says how its parts run."""

    savings = Savings()
    residual_norm: str | None = None  # of `add_layer_norm`, for the addition and the norm before the MLP in one pass

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = PackedSelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        return self._keeping(self._all_rows, x_TD, layout)

    def forward_kept(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        """The same on the rows that are read afterwards: [T, D] -> [kept rows, D]."""
        return self._keeping(self._kept_rows, x_TD, layout)

    def forward_csa(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        """The same with correlative self-attention."""
        qkv_T3D = self.savings.run(ResidualBlock.project, self, x_TD)
        return self.savings.run(ResidualBlock.finish, self, x_TD, self.attn.attend_csa(qkv_T3D, layout))

    def project(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, 3 D]: what the attention takes."""
        return self.attn.project(self.ln_1(x_TD))

    def project_kept(self, x_TD: Tensor, kept_rows_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> [K, D], [T, 2 D], [K, D]: what the attention takes, and the rows of x that are read."""
        return *self.attn.project_kept(self.ln_1(x_TD), kept_rows_K), x_TD.index_select(0, kept_rows_K)

    def finish(self, x_TD: Tensor, mixed_TD: Tensor) -> Tensor:
        """The rest of the block, from its input and what the attention gave."""
        update_TD = self.attn.out_proj(mixed_TD)
        if self.residual_norm is not None:
            weight_D, bias_D, eps = self.ln_2.weight, self.ln_2.bias, self.ln_2.eps
            x_TD, normed_TD = add_layer_norm(x_TD, update_TD, weight_D, bias_D, eps, backend=self.residual_norm)
            return x_TD + self.mlp(normed_TD)
        x_TD = x_TD + update_TD
        return recomputed(self._feed_forward, x_TD) if self.savings.recompute == "mlp" else self._feed_forward(x_TD)

    def _feed_forward(self, x_TD: Tensor) -> Tensor:
        return x_TD + self.mlp(self.ln_2(x_TD))

    def _keeping(self, run: Callable[[Tensor, PackedLayout], Tensor], x_TD: Tensor, layout: PackedLayout) -> Tensor:
        return recomputed(run, x_TD, layout) if self.savings.recompute == "blocks" else run(x_TD, layout)

    def _all_rows(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        qkv_T3D = self.savings.run(ResidualBlock.project, self, x_TD)
        return self.savings.run(ResidualBlock.finish, self, x_TD, self.attn.attend(qkv_T3D, layout))

    def _kept_rows(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        q_KD, kv_T2D, x_KD = self.savings.run(ResidualBlock.project_kept, self, x_TD, layout.kept_rows)
        return self.savings.run(ResidualBlock.finish, self, x_KD, self.attn.attend_kept(q_KD, kv_T2D, layout))


class Transformer(nn.Module):
    """A stack of residual blocks.

    attention: backend of its self-attention, "auto" or a name.
    """

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.attention = "auto"
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads) for _ in range(layers))

    @property
    def blocks(self) -> list[ResidualBlock]:
        return cast("list[ResidualBlock]", list(self.resblocks))

    def forward(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        """[T, D] -> [kept rows, D] of the layout: the last block makes no others."""
        *blocks, last = self.blocks
        for block in blocks:
            x_TD = block(x_TD, layout)
        return last.forward_kept(x_TD, layout)

    def forward_csa(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        """[T, D] -> [T, D], correlative self-attention in the last block."""
        *blocks, last = self.blocks
        for block in blocks:
            x_TD = block(x_TD, layout)
        return last.forward_csa(x_TD, layout)

    def attention_backend(
        self,
        tokens: int,
        longest: int,
        *,
        request: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> str:
        """The backend that runs on about so many tokens in sequences of at most `longest`.

        request: other than `self.attention`. dtype, device: of the queries, if not those of the weights under autocast.

        Raises:
            UserError: the backend asked for cannot run.
        """
        weight = self.blocks[0].attn.in_proj_weight
        return choose_attention(
            request or self.attention,
            tokens=tokens,
            longest=longest,
            heads=self.heads,
            width=self.head_width,
            dtype=dtype or product_dtype(weight),
            device=device or weight.device,
        )


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a matrix product with this weight, as autocast has it."""
    device = weight.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts and weight.dtype != torch.float64 else weight.dtype

"""The text tower: causal transformer over packed captions, feature read at EOT.

Axes: N captions, L context, T packed tokens, W width, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.config import TextConfig
from cosmos_fast.model.packing import pack_text
from cosmos_fast.model.transformer import Transformer


@dataclass(frozen=True)
class TextOutput:
    """`features_ND` [N, D] projected EOT features in the order of the captions; `tokens_MLW` [M, L, W] all positions
    (padding too) after `ln_final` of the first M captions, those asked to be kept, or None."""

    features_ND: Tensor
    tokens_MLW: Tensor | None


class TextTower(nn.Module):
    """CLIP's text transformer with the original's parameter names.

    In the original these parameters stand at the top level of the model, so the model derives from this class.
    """

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        width, layers = config.width, config.layers
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(width, layers, config.heads)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self._init_text(width, layers)

    def run_text(self, token_ids_NL: Tensor, keep_tokens: int = 0) -> TextOutput:
        """Encode captions [N, L]; the first `keep_tokens` also return all their tokens.

        Captions may stay on the host: they are trimmed and packed there, and only what is left moves to the model's
        device. Those that lie on a GPU are fetched first, which waits for it.
        """
        context, length = self.positional_embedding.shape[0], token_ids_NL.shape[1]
        if length > context:
            raise ValueError(
                f"captions of {length} tokens do not fit a context of {context}: tokenize them with "
                f"context_length={context}, or use a model with a longer one"
            )
        backend = self.transformer.attention_backend(tokens=token_ids_NL.numel(), longest=length)
        text = pack_text(token_ids_NL, keep_tokens, backend=backend, device=self.positional_embedding.device)
        # embedding() rather than indexing: the same, with a backward pass that is three times as fast on a CPU.
        x_TW = self.token_embedding(text.token_ids) + F.embedding(text.positions, self.positional_embedding)
        kept_KW = self.transformer(x_TW, text.layout)
        features_ND = self.ln_final(kept_KW.index_select(0, text.layout.pooled_in_kept)) @ self.text_projection
        if not keep_tokens:
            return TextOutput(features_ND, None)
        first = text.layout.groups[0]
        tokens_MLW = self.ln_final(kept_KW[: first.tokens].view(first.count, first.length, -1))
        return TextOutput(features_ND, tokens_MLW)

    def _init_text(self, width: int, layers: int) -> None:
        """CLIP's initialisation: residual projections shrink with depth."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        residual_std = width**-0.5 * (2 * layers) ** -0.5
        for block in self.transformer.blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

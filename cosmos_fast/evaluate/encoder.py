"""What evaluation asks of a model. A protocol, so that tests can put in models whose answers are known by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn


class Encoder(Protocol):
    """A dual encoder: the part of CosmosModel that the metrics use. B batch, L tokens, P patches, D embed."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def encode_image(self, images_BCHW: Tensor, /, normalize: bool = True) -> Tensor:
        """[B, D]"""

    def encode_text(self, tokens_BL: Tensor, /, normalize: bool = True) -> Tensor:
        """[B, D]"""

    def encode_image_dense(self, images_BCHW: Tensor, /, csa: bool = False) -> Tensor:
        """[B, P, D], not normalised"""

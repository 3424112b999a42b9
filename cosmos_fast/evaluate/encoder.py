"""What evaluation asks of a model. A protocol, so that tests can put in models whose answers are known by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosmos_fast.config.model import ModelConfig


class Encoder(Protocol):
    """A dual encoder: the part of CosmosModel that the metrics use. B batch, L tokens, P patches, D embed."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def encode_image(self, images_BCHW: Tensor, /, normalize: bool = True) -> Tensor:
        """[B, D]"""

    def encode_text(self, tokens_BL: Tensor, /, normalize: bool = True) -> Tensor:
        """[B, D]"""

    def encode_image_dense(self, images_BCHW: Tensor, /, csa: bool = False) -> Tensor:
        """[B, P, D], not normalised"""


class Model(Encoder, Protocol):
    """An encoder that says its sizes."""

    @property
    def config(self) -> ModelConfig: ...


class InBf16(nn.Module):
    """A model whose matrix products are bf16; features come out as float32, for what compares them."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def _bf16(self) -> AbstractContextManager[object]:
        return torch.autocast(next(self.parameters()).device.type, dtype=torch.bfloat16)

    def encode_image(self, images_BCHW: Tensor, /, normalize: bool = True) -> Tensor:
        with self._bf16():
            return self._features(self.model.encode_image(images_BCHW, normalize=False), normalize)

    def encode_text(self, tokens_BL: Tensor, /, normalize: bool = True) -> Tensor:
        with self._bf16():
            return self._features(self.model.encode_text(tokens_BL, normalize=False), normalize)

    def encode_image_dense(self, images_BCHW: Tensor, /, csa: bool = False) -> Tensor:
        with self._bf16():
            return self.model.encode_image_dense(images_BCHW, csa=csa).float()

    @staticmethod
    def _features(features_BD: Tensor, normalize: bool) -> Tensor:
        return functional.normalize(features_BD.float(), dim=-1) if normalize else features_BD.float()


def in_precision(model: Model, precision: str) -> Model:
    """The model as it is evaluated: "bf16" by InBf16, "fp32" as it stands."""
    return InBf16(model) if precision == "bf16" else model

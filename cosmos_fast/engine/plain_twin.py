"""The student as a plain model, for passes that only some ranks make.

In ZeRO stage 3 DeepSpeed's hooks sit in the student's modules: behind each they put its weights away, and before the
next pass they gather them again from all ranks, of which some may have nothing left to compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cosmos_fast.config import TrainConfig
from cosmos_fast.model import CosmosModel, create_model
from cosmos_fast.model.compute import apply_compute


class PlainTwin:
    """A model of the same architecture without weights of its own."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._model = create_model(config.model).to(device).requires_grad_(False).eval()
        apply_compute(self._model, config.compute, device)
        self._put_away()

    @contextmanager
    def of(self, student: CosmosModel) -> Iterator[CosmosModel]:
        """In the block it has the student's weights, which are whole here: the same memory."""
        whole = dict(student.named_parameters())
        for name, parameter in self._model.named_parameters():
            parameter.data = whole[name].data
        try:
            yield self._model
        finally:
            self._put_away()

    def _put_away(self) -> None:
        for parameter in self._model.parameters():
            parameter.data = parameter.data.new_empty(0)

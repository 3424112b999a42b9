"""Held-out retrieval during training: what the trainer calls every run.evaluate_every_steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from cosmos_fast.config.train import TrainConfig
from cosmos_fast.data.images import eval_crop, normalize
from cosmos_fast.data.storage import Storage
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate.chance import retrieval_chance
from cosmos_fast.evaluate.encoder import Encoder
from cosmos_fast.evaluate.retrieval import retrieval_metrics
from cosmos_fast.evaluate.scenes import SceneSet

Validator = Callable[[int, nn.Module, nn.Module], dict[str, float]]
KEPT = ("r1", "r5", "r10", "median_rank")


def build_validators(config: TrainConfig) -> list[Validator]:
    """Validators for a run: held-out retrieval if evaluate.data names shards, else none.

    The shards are read here, remote ones as `data.remote` says, so that a missing or empty one stops the run before its
    first step. UserError.
    """
    if not config.evaluate.data:
        return []
    scenes = SceneSet(config.evaluate.data, config.evaluate.max_samples, Storage.of(config.data))
    return [RetrievalValidator(config, scenes)]


class RetrievalValidator:
    """Callable (step, student, teacher) -> `student_i2t_r1`, ..., `teacher_t2i_median_rank`, `chance_i2t_r1`, ...

    Pixels (as bytes) and token ids are made once and kept, so that a call only runs the two models.
    """

    def __init__(self, config: TrainConfig, scenes: SceneSet) -> None:
        self.batch_size = config.evaluate.batch_size
        size = config.model.vision.image_size
        pixels: list[Tensor] = []
        texts: list[str] = []
        owner: list[int] = []
        for i, scene in enumerate(scenes):
            pixels.append(torch.from_numpy(np.array(eval_crop(scene.image, size))).permute(2, 0, 1))
            texts.extend(scene.captions)
            owner.extend([i] * len(scene.captions))
        self.pixels_N3HW = torch.stack(pixels)
        # Captions of similar length stand together, so that packed text towers do no work on padding.
        order = sorted(range(len(texts)), key=lambda j: len(texts[j]))
        self.tokens_ML = tokenize([texts[j] for j in order], config.model.text.context_length)
        self.owner_M = torch.tensor([owner[j] for j in order])
        self.chance = retrieval_chance(torch.bincount(self.owner_M).tolist())

    def __call__(self, step: int, student: nn.Module, teacher: nn.Module) -> dict[str, float]:
        metrics = {f"chance_{key}": self.chance[key] for key in ("i2t_r1", "t2i_r1")}
        for name, model in (("student", student), ("teacher", teacher)):
            for key, value in self._retrieval(model).items():
                if key.split("_", 1)[1] in KEPT:
                    metrics[f"{name}_{key}"] = value
        return metrics

    @torch.no_grad()
    def _retrieval(self, model: Encoder | nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        image = [
            model.encode_image(normalize(part.to(device))).float()  # type: ignore[operator]
            for part in self.pixels_N3HW.split(self.batch_size)
        ]
        text = [
            model.encode_text(part.to(device)).float()  # type: ignore[operator]
            for part in self.tokens_ML.split(self.batch_size)
        ]
        return retrieval_metrics(torch.cat(image), torch.cat(text), self.owner_M.to(device))

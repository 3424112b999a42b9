"""Evaluation during training: what the trainer calls every run.evaluate_every_steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from cosmos_fast.config.train import TrainConfig
from cosmos_fast.data.images import eval_crop, normalize
from cosmos_fast.data.storage import Storage
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate.chance import retrieval_chance
from cosmos_fast.evaluate.division import ALONE, Division
from cosmos_fast.evaluate.during_training import BenchmarkValidator
from cosmos_fast.evaluate.encoder import Model, in_precision
from cosmos_fast.evaluate.retrieval import retrieval_metrics
from cosmos_fast.evaluate.scenes import Scene, SceneSet
from cosmos_fast.utils.bf16 import bf16_if_fast

Validator = Callable[[int, nn.Module, nn.Module], dict[str, Any]]
KEPT = ("r1", "r5", "r10", "median_rank")


def build_validators(config: TrainConfig, division: Division = ALONE) -> list[Validator]:
    """Validators for a run: held-out retrieval if evaluate.data names shards, published sets if evaluate.benchmarks
    does; called by every rank.

    The shards are read here, remote ones as `data.remote` says, and the sets opened, so that a missing or empty one
    stops the run before its first step. UserError.
    """
    validators: list[Validator] = [BenchmarkValidator(config, division)] if config.evaluate.benchmarks else []
    return [RetrievalValidator(config, division), *validators] if config.evaluate.data else validators


class RetrievalValidator:
    """Callable (step, student, teacher) -> `student_i2t_r1`, ..., `teacher_t2i_median_rank`, `chance_i2t_r1`, ...

    Every rank calls it, and gets the numbers of one process; `precision` is what the models ran in. Pixels (as bytes)
    and token ids of the rank's own batches are made once and kept, so that a call only runs the two models.
    """

    def __init__(self, config: TrainConfig, division: Division = ALONE) -> None:
        assert config.evaluate.data is not None
        self.division, self.precision = division, config.evaluate.precision
        batch_size, self.image_size = config.evaluate.batch_size, config.model.vision.image_size
        self.pixels: list[Tensor] = []  # of an own block: uint8 [n, 3, size, size]
        captions: list[list[list[str]]] = []
        with division.together():
            data = config.evaluate
            scenes = SceneSet(data.data or (), data.max_samples, Storage.of(config.data), block_size=batch_size)
            for number in division.own(scenes.blocks):
                found = [(self._pixels(scene), list(scene.captions)) for scene in scenes.block(number)]
                captions.append([texts for _, texts in found])
                empty = torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
                self.pixels.append(torch.stack([pixels for pixels, _ in found]) if found else empty)
        self.blocks = scenes.blocks
        of_scenes = [texts for block in division.join(captions) for texts in block]
        scenes.check_usable(len(of_scenes))
        # Equal captions are encoded once, so that they tie. Those of similar length stand together: packed text towers
        # do no work on padding then.
        texts = sorted(dict.fromkeys(text for one in of_scenes for text in one), key=len)
        row = {text: number for number, text in enumerate(texts)}
        self.row_M = torch.tensor([row[text] for one in of_scenes for text in one])
        self.owner_M = torch.tensor([owner for owner, one in enumerate(of_scenes) for _ in one])
        self.text_blocks = -(-len(texts) // batch_size)
        self.tokens = [
            tokenize(texts[k * batch_size : (k + 1) * batch_size], self._length(config))
            for k in division.own(self.text_blocks)
        ]
        self.chance = retrieval_chance(torch.bincount(self.owner_M).tolist())

    def __call__(self, step: int, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
        precision = bf16_if_fast(self.precision, next(student.parameters()).device)
        metrics: dict[str, Any] = {f"chance_{key}": self.chance[key] for key in ("i2t_r1", "t2i_r1")}
        metrics["precision"] = precision
        for name, model in (("student", student), ("teacher", teacher)):
            for key, value in self._retrieval(in_precision(cast(Any, model), precision)).items():
                if key.split("_", 1)[1] in KEPT:
                    metrics[f"{name}_{key}"] = value
        return metrics

    def _pixels(self, scene: Scene) -> Tensor:
        return torch.from_numpy(np.array(eval_crop(scene.image, self.image_size))).permute(2, 0, 1)

    @staticmethod
    def _length(config: TrainConfig) -> int:
        return config.model.text.context_length

    @torch.no_grad()
    def _retrieval(self, model: Model) -> dict[str, float]:
        device = next(model.parameters()).device
        with self.division.together():
            image = [
                model.encode_image(normalize(part.to(device))).float() if len(part) else torch.empty(0, device=device)
                for part in self.pixels
            ]
            text = [model.encode_text(part.to(device)).float() for part in self.tokens]
        image_ND, text_SD = self.division.cat(image), self.division.cat(text)
        text_MD = text_SD[self.row_M.to(text_SD.device)]
        return retrieval_metrics(image_ND, text_MD, self.owner_M.to(image_ND.device))

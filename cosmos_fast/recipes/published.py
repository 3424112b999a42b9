"""The ten published settings: five data sets, two patch sizes (CVPR 2025, arXiv 2412.01814)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cosmos_fast.config import DataConfig, EmaConfig, RunConfig, TrainConfig, named_model


@dataclass(frozen=True, kw_only=True)
class _Dataset:
    """samples: image-caption pairs. gpus: ranks of the published run. batch_size: samples a rank. ema_decay: a step."""

    samples: int
    gpus: int
    batch_size: int
    ema_decay: float


# Global batch 1024 goes with decay 0.999, 4096 with 0.99.
_DATASETS = {
    "cc3m": _Dataset(samples=2_823_019, gpus=16, batch_size=64, ema_decay=0.999),
    "cc12m": _Dataset(samples=10_010_225, gpus=128, batch_size=32, ema_decay=0.99),
    "yfcc15m": _Dataset(samples=14_065_827, gpus=128, batch_size=32, ema_decay=0.99),
    "merged30m": _Dataset(samples=26_899_071, gpus=128, batch_size=32, ema_decay=0.99),
    "pixelprose": _Dataset(samples=15_037_386, gpus=128, batch_size=32, ema_decay=0.99),
}
_MODELS = {"vit_b_16": "ViT-B-16", "vit_b_32": "ViT-B-32"}


def _setting(name: str, dataset: _Dataset, model: str) -> Callable[[], TrainConfig]:
    def recipe() -> TrainConfig:
        return TrainConfig(
            name=name,
            model=named_model(model),
            data=DataConfig(samples_per_epoch=dataset.samples, workers=6),
            ema=EmaConfig(decay=dataset.ema_decay),
            run=RunConfig(
                epochs=32,
                batch_size=dataset.batch_size,
                world_size_hint=dataset.gpus,
                published_batch=dataset.gpus * dataset.batch_size,
            ),
        )

    recipe.__doc__ = f"{model} on {dataset.samples:,} samples, {dataset.gpus} ranks x {dataset.batch_size}, 32 epochs."
    return recipe


PUBLISHED: dict[str, Callable[[], TrainConfig]] = {
    f"{data}_{suffix}": _setting(f"{data}_{suffix}", dataset, model)
    for data, dataset in _DATASETS.items()
    for suffix, model in _MODELS.items()
}

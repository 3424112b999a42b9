"""What `bench loader` measures: shards made for it, and sources of batches over them, generators to be closed.

Nothing here is imported before it is needed: a GPU check reads `bench_loader.py` on machines without Pillow too.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import rows
from benchmarks.rows import Row
from benchmarks.sides import Make

ORIGINAL = "original's PIL order of operations"
SEED = 0
CONTEXT_LENGTH = 77


@dataclass(frozen=True, kw_only=True)
class Setting:
    """folder: of the shards, whose pictures are width x height pixels. device: where batches go, "cpu" or "cuda".
    machine: the device that rows name, where it is another one.

    image_px, local_px: sides of global and local crops. batch: samples. threads: of DALI on the host.
    """

    folder: str
    samples: int
    width: int
    height: int
    batch: int
    image_px: int = 224
    local_px: int = 96
    device: str = "cpu"
    machine: str = ""
    threads: int = 1

    def config(self, loader: str, workers: int) -> Any:
        """DataConfig of a loader: "pil", "dali" or "auto"."""
        from cosmos_fast.config import DaliConfig, DataConfig, SourceConfig, ViewsConfig

        return DataConfig(
            train=(SourceConfig(path=self.folder),),
            views=ViewsConfig(local_image_size=self.local_px),
            loader=loader,  # type: ignore[arg-type]
            dali=DaliConfig(threads=self.threads),
            workers=workers,
        )

    def source(self, name: str, workers: int) -> Make:
        """Batches of "original", or of one of the product's loaders."""
        return partial(original_batches if name == "original" else product_batches, self, name, workers)

    def row(self, metric: str, value: float, unit: str, **more: Any) -> Row:
        shapes = {
            "batch": self.batch,
            "image_px": [self.width, self.height],
            "crop_px": [self.image_px, self.local_px],
            "views": [2, 6],
            "samples": self.samples,
        }
        return Row(
            name="loader",
            device=rows.device_name(self.machine or self.device),
            shapes={**shapes, **more.pop("shapes", {})},
            metric=metric,
            value=value,
            unit=unit,
            **more,
        )


def product_batches(setting: Setting, loader: str, workers: int) -> Generator[Any, None, None]:
    """Batches of the product, on the setting's device."""
    opened = open_loader(setting, loader, workers)
    try:
        yield from opened
    finally:
        opened.close()


def open_loader(setting: Setting, loader: str, workers: int) -> Any:
    """The product's Loader, to be closed by the caller."""
    from cosmos_fast.data.loader import build_loader

    return build_loader(
        setting.config(loader, workers),
        image_size=setting.image_px,
        context_length=CONTEXT_LENGTH,
        seed=SEED,
        batch_size=setting.batch,
        device=torch.device(setting.device),
    )


def original_batches(setting: Setting, _: str, workers: int) -> Generator[Any, None, None]:
    """Batches of the baseline, on the host."""
    from benchmarks.original_input import OriginalInput

    source = OriginalInput(
        setting.config("pil", 0), image_size=setting.image_px, context_length=CONTEXT_LENGTH, seed=SEED
    )
    yield from source.batches(setting.batch, workers)


def missing_loaders(device: str) -> dict[str, str]:
    """Loaders that cannot run here, and why."""
    from cosmos_fast.data.dali_loader import choose_loader
    from cosmos_fast.utils.errors import UserError

    try:
        choose_loader("dali", torch.device(device))
    except UserError as error:
        return {"dali": str(error)}
    return {}

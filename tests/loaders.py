"""Both loaders for the tests that hold them to one contract, and what such tests say about batches."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast.config import DaliConfig, DataConfig, SourceConfig, ViewsConfig
from cosmos_fast.data.batch import Batch
from cosmos_fast.data.loader import Loader, build_loader
from cosmos_fast.utils import capabilities

needs_dali = pytest.mark.skipif(
    capabilities.why_unusable("dali") is not None, reason=f"{capabilities.why_unusable('dali')}"
)
LOADERS = ["pil", pytest.param("dali", marks=needs_dali)]
VIEWS = ViewsConfig(local_crops=3, local_captions=4, local_image_size=12)
_OF_DATA = ("workers", "prefetch", "views", "max_bad_share", "max_pixels", "max_member_bytes", "dali")


class Opener:
    """Makes loaders of one kind over the shards of a folder, and closes them."""

    def __init__(self, kind: str, shards: Path | None = None) -> None:
        self.kind = kind
        self.shards = shards
        self._made: list[Loader] = []

    def __call__(self, *sources: SourceConfig | Path, **changes: Any) -> Loader:
        """changes: of DataConfig or of build_loader()."""
        data = {name: changes.pop(name) for name in _OF_DATA if name in changes}
        config = DataConfig(
            train=tuple(
                source if isinstance(source, SourceConfig) else SourceConfig(path=str(source))
                for source in sources or (self.shards,)
            ),
            loader=self.kind,
            **{"workers": 0, "views": VIEWS, "dali": DaliConfig(threads=1), **data},
        )
        settings = {"image_size": 20, "context_length": 24, "seed": 3, "batch_size": 4}
        self._made.append(build_loader(config, **{**settings, **changes}))
        return self._made[-1]

    def close(self) -> None:
        for loader in self._made:
            loader.close()


def kill_workers_at_the_next_batch(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 for all of them while the loader waits for one: torch raises wherever the news of a death finds it, and
    a test's own lines are no place for that."""
    batches = type(loader._batches)
    wait = batches.__next__

    def wait_for_the_dead(self: Any) -> Any:
        for worker in self._workers:
            worker.kill()
        return wait(self)

    monkeypatch.setattr(batches, "__next__", wait_for_the_dead)


def take(loader: Loader, count: int) -> list[Batch]:
    return list(islice(iter(loader), count))


def same(a: Batch, b: Batch) -> bool:
    """To the last bit."""
    return (
        same_but_images(a, b)
        and len(a.images) == len(b.images)
        and all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    )


def same_but_images(a: Batch, b: Batch) -> bool:
    return (
        a.keys == b.keys
        and (a.position, a.next_position) == (b.position, b.next_position)
        and torch.equal(a.texts, b.texts)
    )


def joined(parts: list[Batch]) -> Batch:
    """The global batch of one step, from its ranks."""
    return Batch(
        images=[torch.cat(views) for views in zip(*(part.images for part in parts), strict=True)],
        texts=torch.cat([part.texts for part in parts], dim=1),
        keys=[key for part in parts for key in part.keys],
        position=parts[0].position,
        next_position=parts[0].next_position,
    )

"""What the loader hands to the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch. V views, B samples a rank, L tokens; views stand globals first.

    images: V tensors [B, 3, H, W], float32 or bfloat16, normalised; global and local crops differ in H and W. texts:
    int64 [V, B, L], on the host: the model packs them there, so that no step waits for a GPU to tell their lengths.
    keys: the B sample keys. position: global sample number of the first sample of the *global* batch. next_position:
    that of the batch after it; saving it is all that a resume needs. caption_tokens: mean tokens up to EOT of each
    caption view, counted on the host; empty where nobody counted.
    """

    images: list[torch.Tensor]
    texts: torch.Tensor
    keys: list[str]
    position: int
    next_position: int
    caption_tokens: tuple[float, ...] = ()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with its images on `device`."""
        return replace(self, images=[image.to(device, non_blocking=non_blocking) for image in self.images])


class BatchSource(Protocol):
    """Batches of one rank without end, such as data.Loader.

    samples_per_epoch: over all ranks. identity: names the samples that positions count; equal for equal data.
    """

    samples_per_epoch: int
    identity: str

    @property
    def stats(self) -> Mapping[str, int]:
        """Skipped samples by cause."""

    def __iter__(self) -> Iterator[Batch]: ...

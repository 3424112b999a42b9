"""Images of a batch on their way to a decoder in the training process: whole files in one buffer, and what to cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from cosmos_fast.data.augment import ViewNumbers

_BYTES_A_PIXEL = 3
_HEADER_BYTES = 4096


class EncodedImages(NamedTuple):
    """R of the B samples of a batch, undecoded; the others were cut in the worker.

    rows: where they stand in the batch, ascending. data: uint8, one file after the other: a plain JPEG or a PPM each.
    edges: R + 1 offsets into `data`. boxes: float32 [R, V, 4], top, left, bottom, right of each view in source pixels.
    origins: (position, attempt) of each, from which a substitute is found should the decoder fail.
    """

    rows: list[int]
    data: torch.Tensor
    edges: list[int]
    boxes: np.ndarray
    origins: list[tuple[int, int]]

    def file(self, i: int) -> np.ndarray:
        """uint8, the bytes of the i-th image; a view."""
        view: np.ndarray = self.data.numpy()[self.edges[i] : self.edges[i + 1]]
        return view


def fits(file: bytes, width: int, height: int, max_pixels: int) -> bool:
    """Whether an image is small enough to travel undecoded, as a file and in pixels."""
    return width * height <= max_pixels and len(file) <= max_pixels * _BYTES_A_PIXEL + _HEADER_BYTES


def pack(
    rows: Sequence[int],
    files: Sequence[bytes],
    views: Sequence[Sequence[ViewNumbers]],
    origins: Sequence[tuple[int, int]],
) -> EncodedImages:
    """views: of each file, in view order. All sequences are of the same length, at least 1."""
    edges = np.cumsum([0, *map(len, files)]).tolist()
    boxes = np.array([[_corners(view) for view in of_one] for of_one in views], dtype=np.float32)
    data = torch.frombuffer(bytearray().join(files), dtype=torch.uint8)
    return EncodedImages(list(rows), data, edges, boxes, list(origins))


def _corners(view: ViewNumbers) -> tuple[int, int, int, int]:
    left, top, right, bottom = view.box
    return top, left, bottom, right

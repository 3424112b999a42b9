"""NVIDIA DALI, and nothing else imports it: a pipeline that decodes each image once and cuts all its views.

Files and boxes come from the host, so the pipeline draws no numbers and has no state: what comes out depends on what is
fed alone. On a GPU the JPEG engine and the resizing kernels work. Without one DALI decodes only: its operators need
several times the processor time of torch's 8-bit kernel, which cuts then, as in the PIL loader.
"""

from __future__ import annotations

import functools
import importlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from cosmos_fast.config import CropConfig
from cosmos_fast.data.encoded import EncodedImages
from cosmos_fast.data.images import cut_box
from cosmos_fast.utils import capabilities

_FILES, _BOXES = "files", "boxes"


class DaliError(RuntimeError):
    """DALI failed. It does not recover: the pipeline is of no use any more."""


@functools.cache
def why_unusable(device_type: str) -> str | None:
    """None where DALI works for batches on "cpu" or "cuda", else the reason, for a message."""
    if device_type not in ("cpu", "cuda"):
        return f"DALI has no operators for {device_type}"
    reason = capabilities.why_unusable("dali")
    if reason is not None:
        return reason
    try:
        gpus = importlib.import_module("nvidia.dali.backend").GetCUDADeviceCount()
    except Exception as error:  # a library of another CUDA release, say
        return f"dali does not import: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if device_type == "cuda" and gpus == 0:
        return "dali sees no CUDA device: there is none, or its driver is older than the build of dali"
    return None


class DaliPipeline:
    """Batches of images in, batches of crops out, in order. R images, V views.

    crops: size of each view, in view order. device: of the crops. depth: batches that are worked on at once; the first
    crops come after so many submits. batch_size: the largest there will be. threads: of DALI on the CPU. dali_cuts:
    whether DALI cuts, else collect() does; None: on a GPU. Raises DaliError where it cannot be built.
    """

    def __init__(
        self,
        crops: Sequence[CropConfig],
        batch_size: int,
        device: torch.device,
        *,
        threads: int,
        depth: int,
        dali_cuts: bool | None = None,
    ) -> None:
        self.device = device
        self.depth = depth
        self._waiting = 0  # fed, not yet started: the first start takes `depth` batches at once
        self._started = False
        self._sizes = [crop.size for crop in crops]
        self._boxes: deque[np.ndarray] = deque()  # of batches that are cut here
        self._dali_cuts = device.type == "cuda" if dali_cuts is None else dali_cuts
        with _in_one_line():
            self._pipeline = _build(self._sizes if self._dali_cuts else None, batch_size, device, threads, depth)

    def submit(self, images: EncodedImages) -> None:
        """Feed one batch; its bytes are copied."""
        with _in_one_line():
            self._pipeline.feed_input(_FILES, [images.file(i) for i in range(len(images.rows))])
            if self._dali_cuts:
                self._pipeline.feed_input(_BOXES, images.boxes)
            else:
                self._boxes.append(images.boxes)
            self._waiting += 1
            if self._started or self._waiting == self.depth:
                self._pipeline.schedule_run()
                self._started, self._waiting = True, 0

    def collect(self) -> list[torch.Tensor]:
        """The oldest batch: uint8 [R, 3, S, S] a view on the device, in memory that may be DALI's: copy, do not
        change."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        with _in_one_line():
            outputs = self._pipeline.outputs(stream)
            if self._dali_cuts:
                return [torch.from_dlpack(output.as_tensor()) for output in outputs]
            images = [torch.from_dlpack(outputs[0][i]).permute(2, 0, 1) for i in range(len(outputs[0]))]
        return self._cut(images, self._boxes.popleft().astype(np.int64).tolist())

    def _cut(self, images: list[torch.Tensor], boxes: list[list[list[int]]]) -> list[torch.Tensor]:
        """uint8 [3, H, W] each, DALI's until the next batch -> uint8 [R, 3, S, S] a view."""
        crops = [torch.empty(len(images), 3, size, size, dtype=torch.uint8) for size in self._sizes]
        for i, (pixels, of_image) in enumerate(zip(images, boxes, strict=True)):
            height, width = pixels.shape[1:]
            for view, (top, left, bottom, right) in zip(crops, of_image, strict=True):
                if bottom > height or right > width:
                    raise DaliError(f"an image of {width} x {height} pixels, its boxes are of a larger one")
                view[i] = cut_box(pixels, (left, top, right, bottom), view.shape[-1])
        return crops

    def close(self) -> None:
        """Stop its threads and free its memory."""
        self._pipeline = None


@contextmanager
def _in_one_line() -> Iterator[None]:
    """DALI's errors are RuntimeErrors of many lines; so is a signal handler's word of a dead worker, which passes."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = lines[lines.index("encountered:") + 1 :] if "encountered:" in lines[:-1] else lines  # behind a traceback
        raise DaliError(told[0].rstrip(" :") if told else type(error).__name__) from error


def _build(sizes: Sequence[int] | None, batch_size: int, device: torch.device, threads: int, depth: int) -> Any:
    """sizes: of the views to cut; None: decode only."""
    dali: Any = importlib.import_module("nvidia.dali")  # untyped: its stubs do not know what `types` is made of
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"
    index = (device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None
    pipeline = dali.Pipeline(batch_size, num_threads=threads, device_id=index, prefetch_queue_depth=depth)
    with pipeline:
        files = fn.external_source(name=_FILES, dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(
            files,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # as PIL, and the original
            jpeg_fancy_upsampling=True,  # libjpeg's chroma, also on a GPU
        )
        pipeline.set_outputs(*([images] if sizes is None else _views(fn, types, images, sizes)))
    pipeline.build()
    return pipeline


def _views(fn: Any, types: Any, images: Any, sizes: Sequence[int]) -> list[Any]:
    boxes = fn.external_source(name=_BOXES, dtype=types.FLOAT, ndim=2)
    views = []
    for view, size in enumerate(sizes):
        start, end = boxes[view, 0:2], boxes[view, 2:4]
        # Cut first: a resize with a region of interest would read pixels around it too.
        cut = fn.slice(images, start, end - start, axis_names="HW", normalized_anchor=False, normalized_shape=False)
        cut = fn.resize(cut, size=[size, size], interp_type=types.INTERP_CUBIC)  # antialiased where it shrinks
        views.append(fn.transpose(cut, perm=[2, 0, 1]))
    return views

"""The half of the DALI loader that runs in the training process: undecoded batches in, crops out, a few batches ahead.

A file that DALI dies of, although the workers' check let it pass, costs its batch one decoding by PIL and the run
nothing: the pipeline is built anew, and what PIL cannot decode either gets the substitute it would have had before.
"""

from __future__ import annotations

import copy
import functools
import io
from collections import deque
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from PIL import Image

from cosmos_fast.data import dali_pipeline, encoded
from cosmos_fast.data.augment import ViewNumbers
from cosmos_fast.data.dali_pipeline import DaliError, DaliPipeline
from cosmos_fast.data.encoded import EncodedImages
from cosmos_fast.data.faults import Fault, SampleFault
from cosmos_fast.data.images import crop_and_resize, decode, to_pixels
from cosmos_fast.data.recolor import color_numbers
from cosmos_fast.data.sample import CropStack, RawBatch, Sample, SampleStream
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.logging import get_logger

_log = get_logger(__name__)

_HOW_TO_INSTALL = "pip install 'cosmos-fast[dali-cuda13]' (dali-cuda12 for a driver of CUDA 12), or set data.loader=pil"
_MOST_FAILURES = 3  # in a row, of batches in which PIL finds nothing wrong
_PIXEL = b"P6\n1 1\n255\n\0\0\0"


def choose_loader(request: str, device: torch.device) -> Literal["pil", "dali"]:
    """Who decodes; the reason is logged once. UserError: DALI is asked for and cannot work here."""
    choice, words = explain_choice(request, device)
    _say_once(f"images are decoded by {words}")
    return choice


def explain_choice(request: str, device: torch.device) -> tuple[Literal["pil", "dali"], str]:
    """The same without a line in the log: the choice, and in words. UserError as choose_loader()."""
    objection = None if request == "pil" else dali_pipeline.why_unusable(device.type)
    if request == "dali" and objection is not None:
        raise UserError(f"data.loader=dali: {objection}; {_HOW_TO_INSTALL}")
    if request == "auto" and device.type != "cuda":
        objection = "no GPU"
    if request == "pil" or objection is not None:
        because = "" if objection is None else f": {objection}"
        return "pil", f"PIL in the loader's workers (data.loader={request}{because})"
    return "dali", f"DALI on the {'GPU' if device.type == 'cuda' else 'CPU'} (data.loader={request})"


@functools.cache
def _say_once(text: str) -> None:
    _log.info(text)


class DaliImages:
    """Cuts the batches of a loader with DALI; they come out in the order they went in.

    Of `data.dali.ahead` + 1 batches, the files and what DALI decoded from them are held at any time.
    """

    def __init__(self, stream: SampleStream, batch_size: int, device: torch.device) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.device = device
        self.ahead = stream.config.dali.ahead
        self._pipeline: DaliPipeline | None = None
        self._broken: DaliError | None = None
        self._waiting: deque[RawBatch] = deque()
        self._failures = 0

    def next(self, pull: Callable[[], RawBatch]) -> RawBatch:
        """The next batch with all its crops on the device, not recoloured; `pull` gets an undecoded one."""
        while len(self._waiting) <= self.ahead:
            self._waiting.append(pull())
            self._submit(self._waiting[-1])
        raw = self._waiting.popleft()
        try:
            views = self._collect()
        except DaliError as error:
            _log.warning("DALI failed (%s): its pipeline is built anew", error)
            return self._start_again(raw, error)
        self._failures = 0
        return raw if raw.encoded is None else with_crops(raw, raw.encoded, views)

    def close(self) -> None:
        """Forget the batches that were not handed out, stop DALI's threads."""
        self._waiting.clear()
        self._drop_pipeline()

    def _new_pipeline(self, depth: int) -> DaliPipeline:
        threads = self.stream.config.dali.threads
        return DaliPipeline(self.stream.crops, self.batch_size, self.device, threads=threads, depth=depth)

    def _drop_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
        self._pipeline = self._broken = None

    def _submit(self, raw: RawBatch) -> None:
        """Each batch is one run of the pipeline, those without a file too: runs and batches never get out of step."""
        if self._broken is not None:
            return
        try:
            if self._pipeline is None:
                self._pipeline = self._new_pipeline(self.ahead + 1)
            self._pipeline.submit(raw.encoded or _one_pixel(len(self.stream.crops)))
        except DaliError as error:  # perhaps of an earlier batch; each is told when its turn comes
            self._broken = error

    def _collect(self) -> list[torch.Tensor]:
        if self._broken is not None:
            raise self._broken
        assert self._pipeline is not None
        return self._pipeline.collect()

    def _start_again(self, raw: RawBatch, error: DaliError) -> RawBatch:
        """`raw` once more, by itself; by PIL if DALI dies of it. Then the batches behind it."""
        self._drop_pipeline()
        done = raw
        if raw.encoded is not None:
            alone: DaliPipeline | None = None
            try:
                alone = self._new_pipeline(1)
                alone.submit(raw.encoded)
                done = with_crops(raw, raw.encoded, alone.collect())
            except DaliError as again:
                done = cut_by_pil(self.stream, raw, raw.encoded)
                self._count_failure(done.faults == raw.faults, again)
            finally:
                if alone is not None:
                    alone.close()
        for batch in self._waiting:
            self._submit(batch)
        return done

    def _count_failure(self, in_vain: bool, error: DaliError) -> None:
        self._failures = self._failures + 1 if in_vain else 0
        if self._failures == _MOST_FAILURES:
            raise UserError(
                f"DALI failed at {_MOST_FAILURES} batches in a row that PIL decodes without a fault ({error}); "
                "set data.loader=pil, or less memory: data.dali.ahead=0, a smaller data.dali.max_pixels or batch"
            )


@functools.cache
def _one_pixel(views: int) -> EncodedImages:
    whole = ViewNumbers((0, 0, 1, 1), 1, False, (), False, 0.0, None)
    return encoded.pack([0], [_PIXEL], [[whole] * views], [(0, 0)])


def with_crops(raw: RawBatch, images: EncodedImages, views: list[torch.Tensor]) -> RawBatch:
    """`raw` with these crops of its undecoded images, uint8 [R, 3, S, S] a view, beside those it brought along."""
    device, count = views[0].device, len(raw.keys)
    others = sorted(set(range(count)) - set(images.rows))
    stacks = []
    for stack in raw.stacks:
        mine, views = views[: len(stack.pixels)], views[len(stack.pixels) :]
        if others:
            pixels = torch.empty(len(mine), count, *mine[0].shape[1:], dtype=torch.uint8, device=device)
            pixels[:, others] = stack.pixels.to(device)
            for view, crops in enumerate(mine):
                pixels[view, images.rows] = crops
        else:
            pixels = torch.stack(mine)
        stacks.append(CropStack(pixels, stack.colors))
    return raw._replace(stacks=stacks, encoded=None)


def cut_by_pil(stream: SampleStream, raw: RawBatch, images: EncodedImages) -> RawBatch:
    """The batch without DALI; a sample that PIL cannot decode either is replaced, as a worker would have done it."""
    stream = copy.copy(stream)
    stream.encoded_pixels = 0
    met: list[Fault] = []
    cut: list[list[torch.Tensor]] = []
    for i in range(len(images.rows)):
        try:
            cut.append(_crops(images, i, stream))
        except SampleFault as fault:
            position, attempt = images.origins[i]
            met.append(Fault(fault.cause, stream.name(stream.place(position, attempt)), fault.detail))
            found = stream.find(position, met, attempt + 1)
            if found is None:
                return raw._replace(stacks=[], faults=[*raw.faults, *met], exhausted=position, encoded=None)
            cut.append(found[0].crops)
            raw = _with_sample(raw, images.rows[i], found[0], stream)
    views = [torch.stack(crops) for crops in zip(*cut, strict=True)]
    return with_crops(raw._replace(faults=[*raw.faults, *met]), images, views)


def _crops(images: EncodedImages, i: int, stream: SampleStream) -> list[torch.Tensor]:
    data = images.file(i).tobytes()
    ours = data.startswith(b"P6")  # made by the workers' check
    image = Image.open(io.BytesIO(data), formats=("PPM",)) if ours else decode(data, stream.config.max_pixels)
    pixels = to_pixels(image)
    crops = []
    for crop, box in zip(stream.crops, images.boxes[i].astype(int).tolist(), strict=True):
        top, left, bottom, right = box
        view = ViewNumbers((left, top, right, bottom), crop.size, False, (), False, 0.0, None)
        crops.append(crop_and_resize(pixels, view))
    return crops


def _with_sample(raw: RawBatch, row: int, sample: Sample, stream: SampleStream) -> RawBatch:
    """Another sample's numbers, captions and key in this row."""
    first, count = 0, len(raw.keys)
    for stack in raw.stacks:
        mine = color_numbers(sample.views[first : first + len(stack.pixels)])
        first += len(stack.pixels)
        assert stack.colors is not None
        for column, numbers in zip(stack.colors, mine, strict=True):
            column[row + count * np.arange(len(numbers))] = numbers
    raw.texts[:, row] = stream.tokens([sample])[:, 0]
    return raw._replace(keys=[*raw.keys[:row], sample.key, *raw.keys[row + 1 :]])

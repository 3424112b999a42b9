"""The loader: worker processes turn positions into batches, this process normalises and counts.

Where DALI decodes, the workers hand over whole images and this process cuts them too (dali_loader.py).
"""

from __future__ import annotations

import atexit
import os
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from cosmos_fast.config import DataConfig
from cosmos_fast.data import faults
from cosmos_fast.data.batch import Batch
from cosmos_fast.data.dali_loader import DaliImages, choose_loader
from cosmos_fast.data.faults import FaultAccount
from cosmos_fast.data.identity import data_identity
from cosmos_fast.data.images import normalize
from cosmos_fast.data.mixture import open_mixture
from cosmos_fast.data.order import rank_positions
from cosmos_fast.data.recolor import recolor_
from cosmos_fast.data.sample import MAX_ATTEMPTS, CropStack, RawBatch, SampleStream
from cosmos_fast.ops import recolor
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.processes import end_with_parent


def build_loader(
    config: DataConfig,
    *,
    image_size: int,
    context_length: int,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_position: int = 0,
    device: torch.device | str = "cpu",
    image_dtype: torch.dtype = torch.float32,
) -> Loader:
    """Open the sources and return the loader of one rank, at `start_position`.

    image_size: side of a global crop, pixels. batch_size: per rank. device: where images are put; they travel there
    as bytes, and a GPU also recolours them. image_dtype: of normalised images, float32 or bfloat16. UserError: no
    source, a missing shard, a source without samples, data.loader=dali where DALI does not work.
    """
    if not config.train:
        raise UserError("data.train is empty: name the shards, e.g. --set data.train='shards/*.tar'")
    indexes, order = open_mixture(config, seed)
    device = torch.device(device)
    with_dali = choose_loader(config.loader, device) == "dali"
    recolor.announce(device)  # here, or every worker would log it
    stream = SampleStream(
        config,
        indexes,
        order,
        image_size=image_size,
        context_length=context_length,
        recolor=device.type == "cpu" and not with_dali,
        encoded_pixels=config.dali.max_pixels if with_dali else 0,
    )
    loader = Loader(stream, batch_size, rank, world_size, start_position, device, image_dtype)
    for index in indexes:
        loader.account.note(index.faults)
    return loader


class Loader:
    """Batches of one rank without end. Iterating again continues after the last batch handed out.

    samples_per_epoch: samples of an epoch over all ranks. identity: of the data, see data_identity(). position: where
    the next batch starts. stats: how many samples were skipped, by cause.
    """

    def __init__(
        self,
        stream: SampleStream,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_position: int = 0,
        device: torch.device | None = None,
        image_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.position = start_position
        self.device = device or torch.device("cpu")
        self.image_dtype = image_dtype
        self._dali = DaliImages(stream, batch_size, self.device) if stream.encoded_pixels else None
        self.samples_per_epoch = stream.config.samples_per_epoch or stream.order.samples_per_epoch
        self.identity = data_identity(stream.indexes, stream.order.windows)
        self.account = FaultAccount(stream.config.max_bad_share)
        self._batches: Any = None

    @property
    def stats(self) -> dict[str, int]:
        """Skipped samples by cause, in this process's part of the run."""
        return dict(self.account.counts)

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is None:
            self._batches = iter(self._workers())
            # The workers ignore SIGTERM, by which multiprocessing would end them; exit would wait for ever.
            atexit.register(_close_at_exit, weakref.ref(self))
        while True:
            with self._dead_workers_explained():
                batch = self._finish(self._next_raw() if self._dali is None else self._dali.next(self._next_raw))
            yield batch

    def close(self) -> None:
        """Stop the workers and close the shards; iterating again starts them anew."""
        batches, self._batches = self._batches, None
        shutdown = getattr(batches, "_shutdown_workers", None)  # torch has no public call for it
        if shutdown is not None:
            shutdown()
            for worker in batches._workers:
                worker.kill()  # one stuck in a read; the others have ended
        if self._dali is not None:
            self._dali.close()
        for index in self.stream.indexes:
            index.close()

    def _workers(self) -> DataLoader[RawBatch]:
        config = self.stream.config
        return DataLoader(
            self.stream,
            batch_sampler=_RankPositions(self.position, self.batch_size, self.rank, self.world_size),
            collate_fn=_as_is,
            num_workers=config.workers,
            prefetch_factor=config.prefetch if config.workers else None,
            worker_init_fn=_start_worker if config.workers else None,
            pin_memory=self.device.type == "cuda" and self._dali is None,  # DALI copies files to the GPU itself
        )

    @contextmanager
    def _dead_workers_explained(self) -> Iterator[None]:
        """UserError for torch's word of a dead worker, which a signal may bring at any point in here."""
        try:
            yield
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) and "shared memory" not in str(error):
                raise
            self.close()
            raise UserError(
                f"a data loader worker died ({str(error).splitlines()[0]}): it was killed, or memory or /dev/shm ran "
                "out; lower data.workers, data.prefetch or run.batch_size and resume from the last checkpoint"
            ) from error

    def _next_raw(self) -> RawBatch:
        try:
            return next(self._batches)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            self._blame_a_dead_worker(error)
            raise

    def _blame_a_dead_worker(self, error: Exception) -> None:
        """A worker that dies while it hands a batch over breaks its connection before torch notices the death.

        Raises:
            RuntimeError: in torch's words, if a worker is dead or dies in the next moment; else nothing.
        """
        for worker in getattr(self._batches, "_workers", ()):
            worker.join(0.2)
            if worker.exitcode is not None:
                raise RuntimeError(f"DataLoader worker (pid {worker.pid}) exited with {worker.exitcode}") from error

    def _finish(self, raw: RawBatch) -> Batch:
        self.account.settle(len(raw.keys), raw.faults)
        if raw.exhausted is not None and raw.faults[-1].cause == faults.UNREACHABLE_SHARD:
            raise UserError(f"{raw.faults[-1]}; resume from the last checkpoint once it can be read: nothing is lost")
        if raw.exhausted is not None:
            raise UserError(
                f"no usable sample for position {raw.exhausted} in {MAX_ATTEMPTS} tries; the last one: "
                f"{raw.faults[-1]}; run `cosmos-fast data inspect` on the shards"
            )
        position = self.position
        self.position = position + self.world_size * self.batch_size
        images = [normalize(view, self.image_dtype) for stack in raw.stacks for view in self._recolored(stack)]
        return Batch(
            images=images,
            texts=raw.texts,
            keys=raw.keys,
            position=position,
            next_position=self.position,
            caption_tokens=tuple((raw.texts.argmax(dim=2) + 1).double().mean(dim=1).tolist()),
        )

    def _recolored(self, stack: CropStack) -> torch.Tensor:
        """uint8 [V, B, 3, S, S] on the device of the batches."""
        pixels = stack.pixels.to(self.device, non_blocking=True)
        if stack.colors is not None:
            recolor_(pixels.view(-1, *pixels.shape[2:]), stack.colors)
        return pixels


class _RankPositions:
    """Batch sampler: the positions of this rank's batches, for ever."""

    def __init__(self, position: int, batch_size: int, rank: int, world_size: int) -> None:
        self.position, self.batch_size, self.rank, self.world_size = position, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        position = self.position
        while True:
            yield list(rank_positions(position, self.batch_size, self.rank))
            position += self.world_size * self.batch_size


def _close_at_exit(reference: weakref.ref[Loader]) -> None:
    loader = reference()
    if loader is not None:
        loader.close()


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """One thread a worker, and no signals meant for the trainer: it finishes its step and stops the workers itself.

    Where it is killed, they end at once: the next run on this machine needs the memory.
    """
    end_with_parent()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

"""Memory that runs out, in one line that says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cosmos_fast.config import TrainConfig
from cosmos_fast.engine.batch_size import split_of
from cosmos_fast.utils.errors import UserError

# How the allocators of CUDA's libraries and of the CPU put it.
_PHRASES = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


class OutOfMemory(UserError):
    """A step did not fit memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, explained or not."""
    if isinstance(error, (OutOfMemory, torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


def ways_to_need_less(config: TrainConfig) -> str:
    """Settings that make this run smaller, the gentlest first."""
    ways = []
    if config.compute.checkpoint_activations != "blocks":
        ways.append("set compute.checkpoint_activations=blocks")
    ways.append("take a smaller model or fewer views")
    return ", ".join(ways)


@contextmanager
def out_of_memory_explained(config: TrainConfig) -> Iterator[None]:
    """Around work that allocates.

    Raises:
        OutOfMemory: instead of an error by which an allocator says that memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise OutOfMemory(
            f"memory ran out with run.batch_size={config.run.batch_size} ({first_line[:160]}): "
            f"{_smaller_batch(config)}; --find-batch-size measures what fits"
        ) from None


def _smaller_batch(config: TrainConfig) -> str:
    run = config.run
    if run.batch_size == 1:
        return ways_to_need_less(config)
    smaller, steps = split_of(run.batch_size * run.accumulate_steps, run.batch_size // 2)
    one_batch = run.accumulate_steps == 1 or run.negatives == "all"
    saving = "" if config.compute.checkpoint_activations == "blocks" else ", or compute.checkpoint_activations=blocks"
    return (
        f"set run.batch_size={smaller} run.accumulate_steps={steps} run.negatives=all"
        f"{', the same loss in less memory' if one_batch else ''}{saving}"
    )

"""What a number of ranks and loader workers see of the data: exact, from the order of the stream alone.

The stream has no gaps: a step takes the next positions, ranks take runs of them, workers take a rank's batches in turn.
So nothing depends on how samples lie in shards, and a sample is left out only where the run itself ends. W ranks, N
workers a rank, B samples a rank and micro-batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cosmos_fast.data.index import Index
from cosmos_fast.data.order import SampleOrder, rank_positions
from cosmos_fast.data.transport import shown

_REPORT_EVERY = 4096


@dataclass(frozen=True)
class Split:
    """How the stream is divided. batch_size: samples a rank and micro-batch. workers: a rank, 0 counts as one.

    accumulate_steps: micro-batches an optimizer step.
    """

    ranks: int
    workers: int
    batch_size: int
    accumulate_steps: int = 1

    @property
    def samples_a_batch(self) -> int:
        """Of all ranks together, in one micro-batch."""
        return self.ranks * self.batch_size

    @property
    def samples_a_step(self) -> int:
        """Of all ranks together, in one optimizer step."""
        return self.samples_a_batch * self.accumulate_steps


@dataclass(frozen=True)
class Seen:
    """How often the samples of one source come up: `more` of them `times` + 1 times, the others `times` times."""

    samples: int
    times: int
    more: int

    @property
    def draws(self) -> int:
        """How often any sample of the source comes up."""
        return self.samples * self.times + self.more


def seen_by(order: SampleOrder, position: int) -> list[Seen]:
    """How often each source's samples come up before `position`, exactly; a source walks whole permutations."""
    counts = zip(order.sizes, order.draws(position), strict=True)
    return [Seen(size, *divmod(draws, size)) for size, draws in counts]


def samples_of_workers(samples: int, split: Split) -> np.ndarray:
    """int64 [W, N]: how many of the first `samples` positions each worker of each rank makes; they add up to all."""
    workers = max(1, split.workers)
    whole, rest = divmod(samples, split.samples_a_batch)
    batches = (whole - np.arange(workers) + workers - 1) // workers  # worker w makes batches w, w + N, ...
    made = np.tile(batches * split.batch_size, (split.ranks, 1))
    made[:, whole % workers] += np.clip(rest - np.arange(split.ranks) * split.batch_size, 0, split.batch_size)
    return made


def unseen_with_whole_shards(shard_sizes: np.ndarray, split: Split) -> int:
    """Samples that nobody sees in an epoch if whole shards are dealt out to workers that all stop at the same count.

    The way of webdataset with split_by_node and split_by_worker, and of the original, for comparison.
    """
    workers = max(1, split.workers)
    batches = -(-int(shard_sizes.sum()) // split.samples_a_batch)
    each = -(-batches // workers) * split.batch_size
    ranks = [shard_sizes[rank :: split.ranks] for rank in range(split.ranks)]
    dealt = [int(shards[worker::workers].sum()) for shards in ranks for worker in range(workers)]
    return sum(max(0, own - each) for own in dealt)


@dataclass
class Walk:
    """What walking one epoch found. times: a source each, {how often: number of samples}. made: int64 [W, N]."""

    times: list[Counter[int]]
    made: np.ndarray


def walk(
    order: SampleOrder,
    samples_per_epoch: int,
    split: Split,
    epoch: int = 0,
    progress: Callable[[int], None] = lambda positions: None,
) -> Walk:
    """Go through the positions of one epoch as the ranks and workers do, and count every sample.

    progress(positions): called now and then with how many were walked since.
    """
    first, last = epoch * samples_per_epoch, (epoch + 1) * samples_per_epoch
    workers = max(1, split.workers)
    seen = [np.zeros(size, dtype=np.int32) for size in order.sizes]
    made = np.zeros((split.ranks, workers), dtype=np.int64)
    walked = 0
    for batch in range(first // split.samples_a_batch, -(-last // split.samples_a_batch)):
        for rank in range(split.ranks):
            for position in rank_positions(batch * split.samples_a_batch, split.batch_size, rank):
                if first <= position < last:
                    place = order.locate(position)
                    seen[place.source][place.sample] += 1
                    made[rank, batch % workers] += 1
                    walked += 1
        if walked >= _REPORT_EVERY:
            progress(walked)
            walked = 0
    progress(walked)
    counted = [zip(*np.unique(counts, return_counts=True), strict=True) for counts in seen]
    return Walk([Counter({int(times): int(samples) for times, samples in pairs}) for pairs in counted], made)


def describe(indexes: Sequence[Index], order: SampleOrder, samples_per_epoch: int, steps: int, split: Split) -> str:
    """The coverage of a run of `steps` optimizer steps, as text."""
    reached = steps * split.samples_a_step
    lines = []
    for index, seen in zip(indexes, seen_by(order, reached), strict=True):
        sizes = np.bincount(index.tables.sample_shard, minlength=len(index.shards))
        lines.append(
            f"{shown(index.source.path)}: {len(index):,} samples in {len(index.shards):,} shards of {_range(sizes)}, "
            f"weight {index.source.weight:g}" + (f"; {index.left_out:,} in quarantine" if index.left_out else "")
        )
        lines.append(f"  in the run {_times(seen)}")
    whole, rest = divmod(samples_per_epoch, split.samples_a_step)
    last = reached % samples_per_epoch
    end = f"the last epoch ends after {last:,} of its samples" if last else "it ends with an epoch"
    made = samples_of_workers(samples_per_epoch, split)
    lines += [
        f"an epoch: {samples_per_epoch:,} samples; {_times_of_an_epoch(order, samples_per_epoch)}",
        f"a step: {_step(split)}; an epoch is {whole:,} steps"
        + (f" and {rest:,} samples of the next, which takes the others from the next epoch" if rest else ""),
        f"the run: {steps:,} steps, {reached:,} samples, {reached / samples_per_epoch:.4g} epochs; {end}",
        f"a rank makes {_range(made.sum(axis=1))} samples of the first epoch, a worker {_range(made)}",
    ]
    lines += _whole_shards(indexes, split)
    lines += [
        "samples found broken while training are replaced by others of their source, which come up once more",
        "a run that is killed and resumed sees the same samples, on any number of ranks and workers",
    ]
    return "\n".join(lines)


def describe_walk(found: Walk, order: SampleOrder, samples_per_epoch: int) -> str:
    """What a walk over the first epoch found, and whether it is what describe() says."""
    computed = seen_by(order, samples_per_epoch)
    expected = [Counter({one.times: one.samples - one.more, one.times + 1: one.more}) for one in computed]
    as_computed = all(+wanted == times for wanted, times in zip(expected, found.times, strict=True))
    counts = "; ".join(
        ", ".join(f"{samples:,} {_often(times)}" for times, samples in sorted(source.items())) for source in found.times
    )
    verdict = "as computed" if as_computed else "NOT AS COMPUTED"
    return f"walked the first epoch, position by position: {counts}: {verdict}"


def _step(split: Split) -> str:
    parts = [f"{split.ranks} rank{'s' if split.ranks > 1 else ''}", f"{split.batch_size} samples"]
    parts += [f"{split.accumulate_steps} micro-batches"] if split.accumulate_steps > 1 else []
    return f"{split.samples_a_step:,} samples ({' x '.join(parts)})"


def _times(seen: Seen) -> str:
    if not seen.more:
        return f"every sample comes up {_often(seen.times)}"
    if not seen.times:
        return f"{seen.more:,} samples come up once, {seen.samples - seen.more:,} never"
    return f"every sample comes up {_often(seen.times)}, {seen.more:,} of them once more"


def _times_of_an_epoch(order: SampleOrder, samples_per_epoch: int) -> str:
    seen = seen_by(order, samples_per_epoch)
    if all(source.times == 1 and not source.more for source in seen):
        return "every sample exactly once"
    return "; ".join(f"source {number}: {_times(source)}" for number, source in enumerate(seen, start=1))


def _whole_shards(indexes: Sequence[Index], split: Split) -> list[str]:
    sizes = np.concatenate([np.bincount(index.tables.sample_shard, minlength=len(index.shards)) for index in indexes])
    unseen, all_workers = unseen_with_whole_shards(sizes, split), split.ranks * max(1, split.workers)
    return [
        f"for comparison, whole shards dealt out to {all_workers:,} workers would leave {unseen:,} samples of an epoch "
        f"unseen ({100 * unseen / sizes.sum():.2g} %)"
    ]


def _often(times: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(times, f"{times:,} times")


def _range(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"

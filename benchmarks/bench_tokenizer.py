"""The tokenizer against a plain Python one: captions of a batch to ids, one thread each.

Captions as training draws them: two long ones and six single sentences a sample, of words as frequent as in the
vocabulary. `batch_ms`: fresh captions every time, by tokenizers that have seen thousands of others before, as in a run.
`first_batch_ms`: by tokenizers that have seen none. Ids are equal, or nothing is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import parts, rows
from benchmarks.harness import MIN_REPEATS, Timing, interleave
from benchmarks.rows import Row
from cosmos_fast.cli.main import run

BAR = 1 / 3
SEEN_SAMPLES = 1500  # before the clock starts: what a worker has seen after a minute
CAPTIONS_A_SAMPLE = 8
CHECKED_SEEDS = (900, 901)
BASELINE = "plain Python"


class Sides:
    """Both tokenizers, and captions for them. Imports what they need, which a benchmark's help need not wait for."""

    def __init__(self, samples: int, context_length: int) -> None:
        from benchmarks import input_shards, plain_tokenizer
        from cosmos_fast.data import tokenizer

        self._samples, self._length = samples, context_length
        self._shards, self._product = input_shards, tokenizer
        self._make_plain = plain_tokenizer.PlainTokenizer
        self.plain = self._make_plain()

    def captions(self, seed: int) -> list[str]:
        return self._shards.training_captions(self._samples, seed=seed)

    def baseline(self, captions: list[str]) -> torch.Tensor:
        return self.plain(captions, self._length)

    def candidate(self, captions: list[str]) -> torch.Tensor:
        return self._product.tokenize(captions, self._length)

    def check(self) -> None:
        for seed in CHECKED_SEEDS:
            captions = self.captions(seed)
            wrong = [
                text
                for text, ours, theirs in zip(captions, self.candidate(captions), self.baseline(captions), strict=True)
                if not torch.equal(ours, theirs)
            ]
            assert not wrong, f"{len(wrong)} of {len(captions)} captions have other ids, the first: {wrong[0]!r}"

    def warm_up(self) -> None:
        for seed in range(1000, 1000 + -(-SEEN_SAMPLES // self._samples)):
            captions = self.captions(seed)
            self.baseline(captions)
            self.candidate(captions)

    def forget(self) -> None:
        """As a new process would begin, the vocabulary already read."""
        self.plain.forget()
        self._product.word_ids.cache_clear()
        self._product.tokenizer.cache_clear()
        self._product.tokenizer()

    def mean_tokens(self) -> float:
        return float((self.candidate(self.captions(0)) != 0).sum(dim=1).double().mean())


def measure(sides: Sides, row: Any, repeats: int) -> Iterator[Row]:
    sides.check()
    sides.warm_up()
    timing = interleave(sides.baseline, sides.candidate, sides.captions, check=sides.check, repeats=repeats)
    yield from told(row, "batch_ms", timing, BAR)


def measure_first(sides: Sides, row: Any, repeats: int) -> Iterator[Row]:
    def captions(seed: int) -> list[str]:
        found = sides.captions(seed)
        sides.forget()
        return found

    timing = interleave(sides.baseline, sides.candidate, captions, check=sides.check, repeats=repeats)
    yield from told(row, "first_batch_ms", timing, None)


def told(row: Any, metric: str, timing: Timing, bar: float | None) -> Iterator[Row]:
    ours_ms, captions = timing.candidate_median_ms, row.keywords["shapes"]["captions"]
    yield row(metric=f"plain_{metric}", value=timing.baseline_median_ms, unit="ms")
    yield row(metric=metric, value=ours_ms, unit="ms", baseline=BASELINE, ratio=timing.ratio, bar=bar)
    if metric == "batch_ms":
        yield row(metric="plain_captions_per_s", value=1e3 * captions / timing.baseline_median_ms, unit="1/s")
        yield row(metric="captions_per_s", value=1e3 * captions / ours_ms, unit="1/s")


@click.command(name="tokenizer", help=__doc__, context_settings={"show_default": True})
@click.option("--batch", type=click.IntRange(1), default=64, help="Samples; each has eight captions.")
@click.option("--context-length", type=click.IntRange(2), default=77, help="Tokens.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Of the results; all runs on the CPU."
)
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(batch: int, context_length: int, device: str, repeats: int, out: Path | None) -> None:
    sides = Sides(batch, context_length)
    shapes: dict[str, object] = {"captions": batch * CAPTIONS_A_SAMPLE, "context_length": context_length}
    shapes["mean_tokens"] = round(sides.mean_tokens(), 1)
    row = partial(Row, name="tokenizer", device=rows.device_name(device), shapes=shapes)
    parts.measure(
        [("seen", partial(measure, sides, row, repeats)), ("first", partial(measure_first, sides, row, repeats))], out
    )


if __name__ == "__main__":
    sys.exit(run(command, name="bench tokenizer"))

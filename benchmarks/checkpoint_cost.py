"""What a checkpoint costs a run: steps among which one is saved, waiting for it or in the background, against none.

Times are of a window of some optimizer steps of the real trainer on noise, with or without one save in it, and with all
that a save is: copies, hashes, forced to disk, renamed. A window ends when its save has: a background save that lasts
longer than the steps is waited for. First both ways have to leave the same bytes behind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch

from benchmarks import parts, rows
from benchmarks.harness import MIN_REPEATS, interleave
from benchmarks.memory import MIB
from benchmarks.rows import Row
from cosmos_fast.config import RunConfig, TrainConfig
from cosmos_fast.data.random_batch import RandomLoader
from cosmos_fast.engine import checkpoint
from cosmos_fast.engine.precision import resolve_precision
from cosmos_fast.engine.run_folder import RunPlan
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.recipes import get_recipe

WAYS = ("none", "waiting", "background")
DESCRIPTIONS = {"none": "no save", "waiting": "training waits for the save"}
STEPS = {"cpu": 8, "cuda": 40}
BATCH = {"cpu": 16, "cuda": 128}


class Setting(NamedTuple):
    """The published model on a GPU, the demo's on a CPU."""

    steps: int
    batch: int
    device: str
    folder: Path

    def config(self, way: str) -> TrainConfig:
        base = get_recipe("cc3m_vit_b_16" if self.device == "cuda" else "demo")
        run = RunConfig(
            out_dir=str(self.folder),
            device=self.device,
            batch_size=self.batch,
            max_steps=10**6,
            checkpoint_every_steps=0,  # saves are asked for
            keep_checkpoints=1,
        )
        return replace(base, name=way, run=run, data=replace(base.data, samples_per_epoch=10**6))

    def row(self, metric: str, value: float, unit: str, bytes_saved: int, **more: object) -> Row:
        shapes = {"steps": self.steps, "batch": self.batch, "saved_mib": bytes_saved / MIB}
        device = rows.device_name(self.device)
        return Row(name="checkpoint", device=device, shapes=shapes, metric=metric, value=value, unit=unit, **more)  # type: ignore[arg-type]


class Run:
    """A trainer that goes on from window to window."""

    def __init__(self, setting: Setting, way: str) -> None:
        config = setting.config(way)
        device = torch.device(setting.device)
        loader = RandomLoader(config, device=device, image_dtype=resolve_precision("auto", device).image_dtype)
        self.trainer = Trainer(config, loader, plan=RunPlan(Path(tempfile.mkdtemp(prefix=way, dir=setting.folder))))
        self.steps, self.way = setting.steps, way
        self.batches = iter(loader)

    def window(self, _: int) -> None:
        """So many steps, with a save after the first, which is over when this ends."""
        checkpointer = self.trainer.checkpointer
        for number in range(self.steps):
            outcome = self.trainer.train_step([next(self.batches)])
            if number == 0 and self.way != "none":
                checkpointer.save(self.trainer, wait=self.way == "waiting")
            else:
                checkpointer.after_step(self.trainer, outcome)
        checkpointer.close(self.trainer)

    def saved(self) -> Path:
        """The last checkpoint."""
        return checkpoint.list_checkpoints(self.trainer.plan.checkpoints)[-1]


def check(setting: Setting) -> None:
    """One window of both ways: equal weights, moments and positions on the disk."""
    found = []
    for way in WAYS[1:]:
        run = Run(setting, way)
        run.window(0)
        found.append(checkpoint.load(run.saved()))
    for name in ("student", "teacher", "optimizer"):
        waiting, background = (getattr(one, name) for one in found)
        assert waiting.keys() == background.keys(), name
        different = [key for key in waiting if not torch.equal(waiting[key], background[key])]
        assert not different, f"{name} differs in {different[:3]}"
    assert found[0].state == found[1].state


def measure(setting: Setting, baseline: str, candidate: str, repeats: int) -> Iterator[Row]:
    """Windows of one way against windows of another."""
    theirs, ours = Run(setting, baseline), Run(setting, candidate)
    timing = interleave(
        theirs.window,
        ours.window,
        int,
        check=partial(check, setting),
        device=setting.device,
        repeats=repeats,
    )
    size = sum(path.stat().st_size for path in ours.saved().iterdir())
    against = {"baseline": DESCRIPTIONS[baseline], "ratio": timing.ratio}
    steps_ms = {baseline: timing.baseline_median_ms, candidate: timing.candidate_median_ms}
    yield setting.row(f"{baseline}_ms/against_{candidate}", steps_ms[baseline], "ms", size)
    yield setting.row(f"{candidate}_ms/against_{baseline}", steps_ms[candidate], "ms", size, **against)


@click.command(name="checkpoint", help=__doc__, context_settings={"show_default": True})
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="cuda: ViT-B/16 under bf16 autocast.")
@click.option("--steps", type=click.IntRange(1), help="Of a window; default: 8 on a CPU, 40 on a GPU.")
@click.option("--batch", type=click.IntRange(1), help="Samples; default: 16 on a CPU, 128 on a GPU.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed windows.")
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), help="On the disk to write to; default: temporary."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(
    device: str, steps: int | None, batch: int | None, repeats: int, folder: Path | None, out: Path | None
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        setting = Setting(steps or STEPS[device], batch or BATCH[device], device, Path(place))
        pairs = (("none", "waiting"), ("none", "background"), ("waiting", "background"))
        parts.measure(
            [(f"{two} against {one}", partial(measure, setting, one, two, repeats)) for one, two in pairs], out
        )


if __name__ == "__main__":
    command()

"""A few steps of a real run under the microscope: where the time goes, what the hardware could do, what holds memory.

Three parts, each on steps of its own, because watching slows what is watched: the ledger is taken with the phase clock
alone; then come a few steps under torch's profiler; on CUDA the last part records every allocation.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from cosmos_fast.data.batch import Batch
from cosmos_fast.engine.estimate import step_flops
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import write_atomic
from cosmos_fast.utils.logging import get_logger
from cosmos_fast.utils.memory import MIB, peak_bytes, reset_peak
from cosmos_fast.utils.peak_rates import PeakRate, measured_rate
from cosmos_fast.utils.phases import Ledger, PhaseTimer

_log = get_logger(__name__)

WARMUP_STEPS = 3  # compilation, autotuning, the loader's first batches, the optimizer's state
TRACE_STEPS = 2
MEMORY_EVENTS = 200_000
TOP_OPERATORS = 20
LARGE_BYTES = 20 * MIB  # traces above this are compressed
FILES = ("trace.json", "trace.json.gz", "ledger.json", "memory_snapshot.pickle")


@dataclass(frozen=True)
class Operator:
    """Time inside one operator itself, without those that it calls, over the traced steps. device_ms: of its kernels,
    0 without a GPU."""

    name: str
    calls: int
    cpu_ms: float
    device_ms: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was found. ledger: of the one process, or the mean of `ranks`, which has each one's where there are several.
    samples, flops: of a step, over all ranks; flops of the work that the result needs, and flops_unpruned with every
    row of the last blocks. peak: of one rank's hardware, None where no rate of it is known. peak_memory_mib: of the
    rank with the most. files: names in the folder."""

    device: str
    precision: str
    ledger: Ledger
    samples: float
    flops: float
    flops_unpruned: float
    peak: PeakRate | None
    peak_memory_mib: float
    operators: list[Operator]
    files: dict[str, str] = field(default_factory=dict)
    ranks: list[Ledger] = field(default_factory=list)

    @property
    def samples_per_s(self) -> float:
        return 1e3 * self.samples / self.ledger.wall_ms

    @property
    def data_stall_pct(self) -> float:
        return self.ledger.share_pct("data")

    def tflops_per_s(self, pruned: bool = True) -> float:
        """Useful FLOP/s, in units of 1e12."""
        return (self.flops if pruned else self.flops_unpruned) / (self.ledger.wall_ms / 1e3) / 1e12

    def mfu_pct(self, pruned: bool = True) -> float | None:
        """Model FLOPs utilisation, percent."""
        if self.peak is None:
            return None
        return 100 * self.tflops_per_s(pruned) / (max(1, len(self.ranks)) * self.peak.flops_per_s / 1e12)

    def to_json(self) -> dict[str, Any]:
        """Plain values, derived ones included."""
        derived = {
            "samples_per_s": self.samples_per_s,
            "data_stall_pct": self.data_stall_pct,
            "tflops_per_s": self.tflops_per_s(),
            "tflops_per_s_unpruned": self.tflops_per_s(pruned=False),
            "mfu_pct": self.mfu_pct(),
            "mfu_unpruned_pct": self.mfu_pct(pruned=False),
        }
        return {**asdict(self), **derived, "torch": torch.__version__}


def profile_run(trainer: Trainer, timer: PhaseTimer, steps: int, folder: Path) -> Profile:
    """Train `steps` steps and a few more, and write what was seen into `folder`.

    Nothing else is written: no checkpoint, no metrics, no configuration. timer: the trainer's clock. Every rank of the
    trainer calls it, and gets the same but for the operators: these, and the files, are rank 0's.

    Raises:
        UserError: the folder cannot be written.
    """
    ranks = trainer.ranks
    with ranks.together():
        if ranks.first:
            _prepare(folder)
    stepper = _Stepper(trainer, timer)
    _log.info("profiling: %d steps to warm up, %d timed, %d traced", WARMUP_STEPS, steps, TRACE_STEPS)
    stepper.run(WARMUP_STEPS)
    reset_peak(trainer.device)
    stepper.forget()
    ranks.barrier()  # nobody's first step waits for another's warm-up
    timer.start()
    stepper.run(steps)
    ledger = timer.stop(steps)
    peak_memory_mib = ranks.spread({"peak": peak_bytes(trainer.device) / MIB})["peak"][1]
    ledgers = [Ledger(**found) for found in ranks.gather(asdict(ledger))]
    # Every rank has counted its own captions as if all were like them: the mean is the truth.
    mean = ranks.mean({"flops": stepper.flops / steps, "unpruned": stepper.flops_unpruned / steps})
    samples = stepper.samples / steps
    files: dict[str, str] = {}
    operators = _trace(stepper, folder, files)
    if trainer.device.type == "cuda":
        _snapshot(stepper, folder, files)
    with ranks.together():  # while the others wait, so that they do not disturb the measurement
        peak = trainer.peak_rate or (_measured_on_cpu(trainer) if ranks.first else None)
    found = Profile(
        device=_name(trainer.device),
        precision=trainer.precision.name,
        ledger=Ledger.mean_of(ledgers),
        samples=samples,
        flops=mean["flops"],
        flops_unpruned=mean["unpruned"],
        peak=peak,
        peak_memory_mib=peak_memory_mib,
        operators=operators,
        files={**files, "ledger": "ledger.json"},
        ranks=ledgers if len(ledgers) > 1 else [],
    )
    with ranks.together(), _writing(folder):
        if ranks.first:
            write_atomic(folder / "ledger.json", json.dumps(found.to_json(), indent=1) + "\n")
    return found


class _Stepper:
    """Runs steps of the trainer on its own loader, and counts what went through."""

    def __init__(self, trainer: Trainer, timer: PhaseTimer) -> None:
        self.trainer = trainer
        self._timer = timer
        self._batches: Iterator[Batch] = iter(trainer.loader)
        self.forget()

    def forget(self) -> None:
        """Count from zero."""
        self.samples, self.flops, self.flops_unpruned = 0, 0.0, 0.0

    def run(self, steps: int) -> None:
        """Take this many optimizer steps."""
        trainer = self.trainer
        for _ in range(steps):
            with self._timer("data"):
                batches = list(islice(self._batches, trainer.config.run.accumulate_steps))
            outcome = trainer.train_step(batches)
            self.samples += outcome.samples
            self.flops += outcome.flops
            self.flops_unpruned += step_flops(trainer.config, batches, trainer.world_size, pruned=False)


def _trace(stepper: _Stepper, folder: Path, files: dict[str, str]) -> list[Operator]:
    """Chrome trace of a few steps with shapes and allocations; returns the operators that took longest. The other ranks
    take the steps only."""
    if not stepper.trainer.ranks.first:
        stepper.run(TRACE_STEPS)
        with stepper.trainer.ranks.together():
            return []
    cuda = stepper.trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch_profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        stepper.run(TRACE_STEPS)
    path = folder / "trace.json"
    with stepper.trainer.ranks.together(), _writing(folder):
        profiler.export_chrome_trace(str(path))
        if path.stat().st_size > LARGE_BYTES:
            path = _compress(path)
    files["trace"] = path.name
    operators = [
        Operator(event.key, event.count, event.self_cpu_time_total / 1e3, event.self_device_time_total / 1e3)
        for event in profiler.key_averages()
        if not event.key.startswith("phase: ")
    ]
    return sorted(operators, key=lambda one: one.device_ms if cuda else one.cpu_ms, reverse=True)[:TOP_OPERATORS]


def _snapshot(stepper: _Stepper, folder: Path, files: dict[str, str]) -> None:
    """Every allocation of one step with its stack, for https://pytorch.org/memory_viz. Not yet run on hardware."""
    ranks = stepper.trainer.ranks
    if not ranks.first:
        stepper.run(1)
        with ranks.together():
            return
    torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
    try:
        stepper.run(1)
        with ranks.together(), _writing(folder):
            torch.cuda.memory._dump_snapshot(str(folder / "memory_snapshot.pickle"))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    files["memory_snapshot"] = "memory_snapshot.pickle"


def _measured_on_cpu(trainer: Trainer) -> PeakRate | None:
    """A CPU's rate is taken here and now; that of a GPU without a data sheet is left open."""
    return measured_rate(trainer.device, trainer.precision.name) if trainer.device.type == "cpu" else None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _compress(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    with path.open("rb") as plain, gzip.open(packed, "wb", compresslevel=5) as out:
        shutil.copyfileobj(plain, out)
    path.unlink()
    return packed


def _prepare(folder: Path) -> None:
    """Make the folder, without what a former profile left."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(f"the profile cannot be written to {folder} ({error}): free space or set run.out_dir") from None

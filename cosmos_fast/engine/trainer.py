"""The training loop: one fixed order, the same for a laptop and a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch

from cosmos_fast.config import TrainConfig
from cosmos_fast.data.batch import Batch, BatchSource
from cosmos_fast.engine.announce import announce
from cosmos_fast.engine.build import build_models, build_updates
from cosmos_fast.engine.checkpoint import load_unchecked
from cosmos_fast.engine.checkpointer import Checkpointer
from cosmos_fast.engine.communication import CommunicationClock
from cosmos_fast.engine.estimate import step_flops
from cosmos_fast.engine.gradients import Gradients
from cosmos_fast.engine.hooks import Hook, NonfiniteGuard, StepOutcome, Validation, Validator
from cosmos_fast.engine.loss_scale import LossScaler
from cosmos_fast.engine.metrics import JsonlSink, Metrics, Sink
from cosmos_fast.engine.optimizer import AdamWEma
from cosmos_fast.engine.out_of_memory import out_of_memory_explained
from cosmos_fast.engine.precision import Precision, resolve_device, resolve_precision
from cosmos_fast.engine.progress import Progress
from cosmos_fast.engine.run_folder import RunPlan, note_batch, plan_run
from cosmos_fast.engine.schedules import ema_decay, learning_rate, total_steps
from cosmos_fast.engine.state import TrainState
from cosmos_fast.loss import build_objective
from cosmos_fast.model import CosmosModel
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.logging import get_logger, log_step
from cosmos_fast.utils.peak_rates import PeakRate, peak_rate
from cosmos_fast.utils.phases import PhaseClock, no_clock
from cosmos_fast.utils.ranks import Ranks, device_of_rank
from cosmos_fast.utils.signals import StopRequest
from cosmos_fast.utils.timing import Stopwatch

if TYPE_CHECKING:
    from cosmos_fast.engine.deepspeed_engine import ZeroRun

_log = get_logger(__name__)


class Trainer:
    """Owns student, teacher, optimizer and state; `fit()` runs to the end or to a stop signal.

    Args:
        config: the run.
        loader: batches of this rank from plan.state.position on, without end.
        validators: called every run.evaluate_every_steps with (step, student, teacher).
        plan: from plan_run(); None starts from scratch.
        ranks: of the run; with several, or with run.engine=deepspeed, DeepSpeed divides the work among them. Every rank
            makes the same calls.
        clock: told of every phase of a step.

    Raises:
        UserError: a run folder in use, a checkpoint that cannot be written, too many steps with NaN or Inf.
    """

    # the run
    config: TrainConfig
    plan: RunPlan
    loader: BatchSource
    total_steps: int
    state: TrainState
    ranks: Ranks
    # what is trained
    device: torch.device
    precision: Precision
    peak_rate: PeakRate | None
    scaler: LossScaler
    student: CosmosModel
    teacher: CosmosModel
    gradients: Gradients
    optimizer: AdamWEma | ZeroRun
    zero: ZeroRun | None
    clock: CommunicationClock
    # what happens after a step
    metrics: Metrics
    stop: StopRequest
    checkpointer: Checkpointer
    hooks: list[Hook]

    def __init__(
        self,
        config: TrainConfig,
        loader: BatchSource,
        validators: Sequence[Validator] = (),
        *,
        plan: RunPlan | None = None,
        ranks: Ranks | None = None,
        clock: PhaseClock = no_clock,
    ) -> None:
        self.config = config
        self.plan = plan or plan_run(config)
        self.loader = loader
        self.ranks = ranks = ranks or Ranks()
        self.total_steps = total_steps(config, loader.samples_per_epoch, ranks.world_size)
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        self.device = resolve_device(device_of_rank(config.run.device, ranks))
        self.precision = resolve_precision(config.run.precision, self.device)
        self.peak_rate = peak_rate(self.device, "fp8" if config.compute.linear == "fp8" else self.precision.name)
        self.state = replace(self.plan.state)
        self._note_data()
        note_batch(self.state, config.run, ranks)
        self.scaler = LossScaler(self.precision, self.state)
        self.student, self.teacher = build_models(config, self.device)
        self.clock = CommunicationClock(self.device, clock)
        with ranks.together():
            stored = None if self.plan.checkpoint is None else load_unchecked(self.plan.checkpoint)
        self.optimizer = build_updates(config, self.student, self.teacher, self.precision, ranks, stored, self.clock)
        self.zero = None if isinstance(self.optimizer, AdamWEma) else self.optimizer
        objective = build_objective(config, ranks.group, self.clock)
        self.gradients = Gradients(
            *(self.student, self.teacher, objective, config.data.views, self.precision),
            negatives=config.run.negatives,
            clock=self.clock,
            scaler=self.scaler,
            passes=self.zero,
        )
        self.metrics = Metrics([])
        self.stop = StopRequest(interrupts=ranks.world_size == 1)
        run = config.run
        self.checkpointer = Checkpointer(run, self.device)
        self.hooks = [
            NonfiniteGuard(run.max_nonfinite_steps),
            Progress(run.log_every_steps),
            Validation(validators, run.evaluate_every_steps),
            self.checkpointer,
        ]

    @property
    def world_size(self) -> int:
        """Ranks that share a step."""
        return self.ranks.world_size

    @property
    def finished(self) -> bool:
        """Whether the last step of the schedule is done."""
        return self.state.step >= self.total_steps

    def fit(self) -> TrainState:
        """Train to the end, or to the first step after SIGTERM or SIGUSR1 (`self.stop.signal_name` tells which).

        Raises:
            KeyboardInterrupt: on one process, after SIGINT and a save.
        """
        with self._running():
            batches = iter(self.loader)
            watch = Stopwatch()
            while not self.finished:
                with self._keeping_steps():
                    micro_batches = self._fetch(batches)
                    data_ms = watch.lap_ms()
                    outcome = self.train_step(micro_batches, data_ms)
                for hook in self.hooks:
                    hook.after_step(self, outcome)
                # A signal that arrives after the checkpointer's turn is answered one step later.
                if self.checkpointer.stopping and self.checkpointer.saved_step == self.state.step:
                    _log.info("stopped by %s at step %d", self.stop.signal_name or "another rank", self.state.step)
                    break
                watch.lap_ms()
        if self.stop.signal_name == "SIGINT":
            raise KeyboardInterrupt
        return self.state

    def train_step(self, micro_batches: Sequence[Batch], data_ms: float = 0.0) -> StepOutcome:
        """One optimizer step over micro-batches; see `Gradients` for what their loss is."""
        watch = Stopwatch()
        assert micro_batches, "the loader has ended"
        assert micro_batches[0].position == self.state.position, "the loader is not where the run is"
        lr = learning_rate(self.config, self.state.step, self.total_steps)
        decay = ema_decay(self.config, self.state.step, self.total_steps)
        self.clock.begin_step()
        self.optimizer.zero_grad()
        with out_of_memory_explained(self.config):
            losses = self.gradients.accumulate(micro_batches)
        with self.clock("optimizer"):
            result = self.optimizer.step(lr=lr, ema_decay=decay, loss=losses[2], loss_scale=self.scaler.scale)
        self.clock.end_step()
        overflow = self.scaler.update(result)
        samples = sum(len(batch.keys) for batch in micro_batches) * self.world_size
        flops = step_flops(self.config, micro_batches, self.world_size)
        self._count_step(samples, flops, micro_batches[-1].next_position, result.applied, overflow)
        return StepOutcome(
            loss=losses[2],
            clip_loss=losses[0],
            distill_loss=losses[1],
            lr=lr,
            ema_decay=decay,
            grad_norm=result.grad_norm,
            applied=result.applied,
            overflow=overflow,
            samples=samples,
            flops=flops,
            data_ms=data_ms,
            step_ms=watch.lap_ms(),
            keys=[key for batch in micro_batches for key in batch.keys],
        )

    def _fetch(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of one step."""
        with self.clock("data"):
            return list(islice(batches, self.config.run.accumulate_steps))

    @contextmanager
    def _keeping_steps(self) -> Iterator[None]:
        """Bad data, or memory that runs out, is no reason to lose the steps since the last save.

        Where one of several ranks fails the others cannot take part in a save: they go back to the last one.
        """
        try:
            yield
        except UserError:
            if self.state.step > self.plan.state.step and self.ranks.group is None:
                self.checkpointer.save(self)
            raise

    def scales(self) -> dict[str, float]:
        """The temperatures of the losses, exponentiated."""
        parameters = dict(self.student.named_parameters())
        names = [name for name in ("logit_scale", "distill_logit_scale") if name in parameters]
        with nullcontext() if self.zero is None else self.zero.whole_student(names):
            return {name: float(parameters[name].detach().exp()) for name in names}

    def whole_models(self) -> AbstractContextManager[object]:
        """In the block all of student and teacher is on this rank; called by every rank."""
        return nullcontext() if self.zero is None else self.zero.whole_models()

    def _count_step(self, samples: int, flops: float, next_position: int, applied: bool, overflow: bool) -> None:
        state = self.state
        state.step += 1
        log_step(state.step)
        state.position = next_position
        state.epoch = next_position / self.loader.samples_per_epoch
        state.samples_seen += samples
        state.flops += flops
        failed = not (applied or overflow)
        state.skipped += failed
        state.nonfinite_in_a_row = 0 if applied else state.nonfinite_in_a_row + failed

    def _note_data(self) -> None:
        """A position stands for the same sample only in the same data."""
        before, self.state.data = self.state.data, self.loader.identity
        if before not in (None, self.state.data):
            _log.warning(
                "the data has changed since the checkpoint (%s, now %s): in this epoch some samples come once more and "
                "others not at all",
                *(before, self.state.data),
            )

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Stop signals caught; on rank 0 the run folder held and metrics open."""
        with ExitStack() as held:
            with self.ranks.together():
                if self.ranks.first:
                    held.enter_context(self.plan.begin(self.config))
                    self.metrics = Metrics(self._sinks())
                    held.callback(self.metrics.close)
            held.enter_context(self.stop)
            held.callback(log_step, None)
            log_step(self.state.step)
            held.callback(self.checkpointer.close, self)
            announce(self)
            yield

    def _sinks(self) -> list[Sink]:
        folder = self.plan.folder
        sinks: list[Sink] = [JsonlSink(self.plan.metrics_file)]
        if self.config.run.tensorboard:
            from cosmos_fast.engine.tensorboard_sink import TensorBoardSink

            sinks.append(TensorBoardSink(folder / "tensorboard", self.state.step))
        if self.config.run.wandb:
            from cosmos_fast.engine.wandb_sink import WandbSink

            sinks.append(WandbSink(folder, self.config.name, asdict(self.config)))
        return sinks

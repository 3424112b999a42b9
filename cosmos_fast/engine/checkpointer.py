"""When a run saves, and how its ranks do it together.

Each rank writes its own files; nothing is gathered. Rank 0 begins the folder and makes it visible. With
run.checkpoint_async the state is copied to the host's memory and written by a thread while training goes on. Threads
send nothing: ranks agree on "all have written" in the collective that asks for a stop after every step anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosmos_fast.config import RunConfig
from cosmos_fast.engine import checkpoint
from cosmos_fast.engine.checkpoint import Part, Snapshot
from cosmos_fast.engine.hooks import StepOutcome, due
from cosmos_fast.engine.optimizer import AdamWEma
from cosmos_fast.engine.retention import Retention
from cosmos_fast.engine.rng import rng_state
from cosmos_fast.engine.zero_state import whole_tensors
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.logging import get_logger

if TYPE_CHECKING:
    from cosmos_fast.engine.trainer import Trainer

_log = get_logger(__name__)


class _Saving:
    """One save on its way: this rank's files, written by a thread. error: what went wrong in it."""

    def __init__(self, aside: Path, content: Snapshot | Part) -> None:
        self.aside = aside
        self.step = content.state.step
        self.error: Exception | None = None
        self._content: Snapshot | Part | None = content
        self._thread = threading.Thread(target=self._write, name=f"save of step {self.step}")

    @property
    def is_writing(self) -> bool:
        """Whether the thread has not ended yet."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Go on in the background."""
        self._thread.start()

    def wait(self) -> None:
        """Until the files are written; raises what went wrong."""
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _write(self) -> None:
        assert self._content is not None
        try:
            checkpoint.write(self.aside, self._content)
        except Exception as error:
            self.error = error
        self._content = None  # the copy is not needed any longer


class Checkpointer:
    """Saves every so many steps, at the end, and when a stop is requested.

    saved_step: of the last save that is whole. stopping: whether a stop is requested on any rank, as all ranks have
    agreed after the last step.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._every_steps = config.checkpoint_every_steps
        self._retention = Retention(config.keep_checkpoints, config.keep_every_steps, config.keep_best)
        # On a CPU the thread would take its time from training, and a second copy of the state its memory.
        self._asynchronous = device.type == "cuda" if config.checkpoint_async == "auto" else config.checkpoint_async
        self._saving: _Saving | None = None
        self.saved_step: int | None = None
        self.stopping = False

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        """Finish the save that all ranks have written; begin one when it is time."""
        own = {
            "stop": trainer.stop.requested,
            "writing": self._saving is not None and self._saving.is_writing,
            "failed": self._saving is not None and self._saving.error is not None,
        }
        told = {name: high > 0 for name, (_, high) in trainer.ranks.spread(own).items()}
        self.stopping = told["stop"]
        if self._saving is not None and (told["failed"] or not told["writing"]):
            self._finish(trainer)
        last = trainer.finished or self.stopping
        if due(trainer.state.step, self._every_steps, last):
            self.save(trainer, wait=last or not self._asynchronous)

    def save(self, trainer: Trainer, *, wait: bool = True) -> None:
        """Save the trainer, which must be between two steps; called by all ranks.

        wait: until the checkpoint is there, else until the state has been copied. A save that is on its way is
        finished first.
        """
        if self._saving is not None:
            self._finish(trainer)
        root, step = trainer.plan.checkpoints, trainer.state.step
        aside = Path(trainer.ranks.on_first(lambda: str(checkpoint.begin(root, step))))
        with trainer.ranks.together():  # a copy may be more than the host has memory for
            self._saving = _Saving(aside, contribution(trainer, copy=not wait))
        self._saving.start()
        if wait:
            self._finish(trainer)

    def close(self, trainer: Trainer) -> None:
        """Where training ends by an error: keep a save on its way if all ranks have written theirs. Not collective."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.wait()
            if trainer.ranks.first:
                _log.info("saved %s", checkpoint.publish(saving.aside, trainer.ranks.world_size))
        except Exception as error:
            _log.warning("the save of step %d was not finished: %s", saving.step, error)

    def _finish(self, trainer: Trainer) -> None:
        """Wait for all ranks' files, then make the checkpoint visible; where one has failed, all raise."""
        saving, self._saving = self._saving, None
        assert saving is not None
        try:
            with trainer.ranks.together():
                saving.wait()
            with trainer.ranks.together():
                if trainer.ranks.first:
                    folder = checkpoint.publish(saving.aside, trainer.ranks.world_size)
                    self._retention.apply(trainer.plan.checkpoints, trainer.plan.metrics_file)
                    _log.info("saved %s", folder)
        except UserError:
            if trainer.ranks.first:
                checkpoint.abandon(saving.aside)
            raise
        self.saved_step = saving.step


def contribution(trainer: Trainer, *, copy: bool) -> Snapshot | Part:
    """What this rank has to write: everything on a run of one process, else its part.

    copy: on the host, and it stays as it is while training goes on.
    """
    rank, count = trainer.ranks.rank, trainer.ranks.world_size
    state, model, rng = replace(trainer.state), trainer.config.model.to_openclip(), rng_state()
    if isinstance(trainer.optimizer, AdamWEma):
        whole = {"student": trainer.student.state_dict(), "teacher": trainer.teacher.state_dict()}
        whole["optimizer"] = trainer.optimizer.state_dict()
        if copy:
            whole = {name: _copied(tensors) for name, tensors in whole.items()}
    else:
        slices = trainer.optimizer.slices(copy=copy)
        if count > 1:
            return Part(rank, count, slices, state, model, rng)
        whole = {name: whole_tensors(slices, name) for name in ("student", "teacher", "optimizer")}
    return Snapshot(**whole, state=state, model=model, rng=rng)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

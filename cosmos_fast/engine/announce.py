"""The first lines of a run's log: what it is, where its ranks are, and what looks unintended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosmos_fast.utils.logging import get_logger
from cosmos_fast.utils.topology import topology

if TYPE_CHECKING:
    from cosmos_fast.engine.trainer import Trainer

_log = get_logger(__name__)


def announce(trainer: Trainer) -> None:
    """Say what begins; called by every rank, as the topology is theirs, and said by rank 0."""
    config, run, warmup = trainer.config, trainer.config.run, trainer.config.schedule.warmup_steps
    batch = run.batch_size * run.accumulate_steps * trainer.world_size
    _log.info(
        "%s: steps %d to %d, %d samples a step, %s on %s, in %s",
        *(config.name, trainer.state.step, trainer.total_steps, batch),
        *(trainer.precision.name, trainer.device, trainer.plan.folder),
    )
    if trainer.zero is not None:
        _log.info("%s; %s", topology(trainer.ranks), trainer.zero.described)
    if config.compute.changes():
        _log.info("compute: %s", config.compute.changes())
    if not trainer.ranks.first:  # the warnings of the others would be shown too
        return
    if warmup >= trainer.total_steps:
        _log.warning("schedule.warmup_steps=%d spans all %d steps: the rate never peaks", warmup, trainer.total_steps)
    if run.published_batch not in (0, batch):
        steps = max(1, run.published_batch // (run.batch_size * trainer.world_size))
        _log.warning(
            "this recipe was published with a global batch of %d, this run has %d: run.accumulate_steps=%d with "
            "run.negatives=all comes to %d",
            *(run.published_batch, batch, steps, steps * run.batch_size * trainer.world_size),
        )

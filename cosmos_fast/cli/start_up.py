"""What stands around a training run of the command: that all ranks run the same, their batches, and the watchdog."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import cosmos_fast
import cosmos_kernels
from cosmos_fast.config import TrainConfig
from cosmos_fast.config.load import flatten_config
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.versions import versions

if TYPE_CHECKING:
    import torch

    from cosmos_fast.data.loader import Loader
    from cosmos_fast.engine.hooks import Hook, StepOutcome
    from cosmos_fast.engine.trainer import Trainer
    from cosmos_fast.utils.ranks import Ranks
    from cosmos_fast.utils.watchdog import Watchdog

_PACKAGES = ("torch", "deepspeed")
_SHOWN = 4


def check_equal(ranks: Ranks, what: dict[str, str], mend: str) -> None:
    """Whether every rank holds what rank 0 does; called by all.

    Raises:
        UserError: on every rank, the lowest rank that differs, in what, and `mend`.
    """
    first = ranks.on_first(lambda: what)
    with ranks.together():
        differing = [name for name in {**first, **what} if first.get(name) != what.get(name)]
        if differing:
            shown = [f"{name} is {what.get(name)} instead of {first.get(name)}" for name in differing[:_SHOWN]]
            more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            raise UserError(f"rank {ranks.rank} differs from rank 0: {', '.join(shown)}{more}: {mend}")


def check_command(ranks: Ranks, config: TrainConfig) -> None:
    """All ranks have the same settings and run the same program."""
    if ranks.world_size == 1:
        return
    settings = {name: str(value) for name, value in flatten_config(config).items()}
    check_equal(ranks, settings, "start all ranks with the same command and the same --config file")
    check_equal(ranks, program(), "install the same versions on every host")


def check_data(ranks: Ranks, identity: str, samples_per_epoch: int) -> None:
    """All ranks see the same samples."""
    found = {"the data": identity, "samples an epoch": str(samples_per_epoch)}
    check_equal(ranks, found, "data.train has to name the same shards, with the same index, on every host")


@cache
def program() -> dict[str, str]:
    """Which program this is: versions, and a digest of the sources, which change without a version."""
    digest = hashlib.sha256()
    for package in (cosmos_fast, cosmos_kernels):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return {"cosmos-fast's code": digest.hexdigest()[:12], **versions(_PACKAGES)}


def open_loader(config: TrainConfig, device: torch.device, ranks: Ranks, position: int = 0) -> Loader:
    """The batches of this rank, from a position in the data on."""
    from cosmos_fast.data.loader import build_loader
    from cosmos_fast.engine.precision import resolve_precision

    return build_loader(
        config.data,
        image_size=config.model.vision.image_size,
        context_length=config.model.text.context_length,
        seed=config.seed,
        batch_size=config.run.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_position=position,
        device=device,
        image_dtype=resolve_precision(config.run.precision, device).image_dtype,
    )


def watch_hooks(trainer: Trainer, watchdog: Watchdog) -> None:
    """Tell the watchdog of every step, and of what is done after it."""
    from cosmos_fast.engine.checkpointer import Checkpointer
    from cosmos_fast.engine.hooks import Validation

    slow = {Validation: "evaluation", Checkpointer: "saving"}
    trainer.hooks = [_Watched(hook, watchdog, slow.get(type(hook))) for hook in trainer.hooks]


class _Watched:
    """A hook that the watchdog knows of. slow: what to call it where it may take long."""

    def __init__(self, hook: Hook, watchdog: Watchdog, slow: str | None) -> None:
        self._hook, self._watchdog, self._slow = hook, watchdog, slow

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        """As the hook itself."""
        self._watchdog.step_done(trainer.state.step)
        watched = self._watchdog(type(self._hook).__name__) if self._slow is None else self._watchdog.slow(self._slow)
        with watched:
            self._hook.after_step(trainer, outcome)

"""The folder of a run: config.yaml, metrics.jsonl, log.txt, checkpoints/. What may be started or continued in it."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cosmos_fast.config import RunConfig, TrainConfig, dump_config, load_config
from cosmos_fast.config.load import flatten_config
from cosmos_fast.engine import checkpoint
from cosmos_fast.engine.metrics import drop_rows_after
from cosmos_fast.engine.state import TrainState
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import FolderLock, write_atomic
from cosmos_fast.utils.logging import get_logger, log_to_file, stop_logging_to
from cosmos_fast.utils.ranks import Ranks

_log = get_logger(__name__)

# These change what a run shows or keeps, not what it computes.
_HARMLESS = (
    *("run.log_", "run.checkpoint_", "run.keep_", "run.evaluate_", "run.tensorboard", "run.wandb", "run.threads"),
    *("run.out_dir", "run.world_size_hint", "run.published_batch", "run.engine", "run.teacher_copy"),
    "run.max_nonfinite_steps",
    *("data.workers", "data.prefetch", "data.dali.threads", "data.dali.ahead"),
    *("name", "evaluate.", "deepspeed", "run.watchdog_s", "run.collective_timeout_s"),
)
# Here it is the product with the number of ranks that counts, which note_batch() compares.
_OF_THE_BATCH = ("run.batch_size", "run.accumulate_steps")


@dataclass(frozen=True)
class RunPlan:
    """A run that may begin. checkpoint: the folder it continues from, None for a start from scratch. state: where it
    stands. newest: name of the newest checkpoint that the folder held then, "" for none."""

    folder: Path
    checkpoint: Path | None = None
    state: TrainState = field(default_factory=TrainState)
    overwrite: bool = False
    newest: str = ""

    @property
    def checkpoints(self) -> Path:
        """Parent of the checkpoint folders."""
        return self.folder / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """Rows of engine.metrics."""
        return self.folder / "metrics.jsonl"

    def to_json(self) -> dict[str, Any]:
        """For the other ranks."""
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        return {**asdict(self), "folder": str(self.folder), "checkpoint": checkpoint}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunPlan:
        """The reverse of to_json()."""
        found = None if values["checkpoint"] is None else Path(values["checkpoint"])
        return cls(Path(values["folder"]), found, TrainState(**values["state"]), values["overwrite"], values["newest"])

    @contextmanager
    def begin(self, config: TrainConfig) -> Iterator[None]:
        """Make the folder ready and hold it; the first thing that writes to disk."""
        with ExitStack() as held:
            with _one_line(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(FolderLock(self.folder))
                self._check_unchanged()
                if self.overwrite:
                    _clear(self.folder)
                checkpoint.supersede_after(self.checkpoints, self.state.step)
                drop_rows_after(self.metrics_file, self.state.step)
                write_atomic(self.folder / "config.yaml", dump_config(config))
                handler = log_to_file(self.folder / "log.txt")
            try:
                yield
            except BaseException as error:
                _log_reason(handler, error)
                raise
            finally:
                stop_logging_to(handler)

    def _check_unchanged(self) -> None:
        """UserError where another run has saved since this one was planned: its results would be set aside."""
        now = _newest(checkpoint.list_checkpoints(self.checkpoints))
        if now != self.newest:
            raise UserError(
                f"another run has changed {self.checkpoints} since this one was started (newest was "
                f"{self.newest or 'none'}, now {now or 'none'}): start again, with --resume to continue that one"
            )


def plan_run(
    config: TrainConfig, resume: str | None = None, overwrite: bool = False, config_file: str | None = None
) -> RunPlan:
    """Decide where a run starts, reading only.

    resume: None starts from scratch; "auto" takes the newest undamaged checkpoint of the run folder and starts from
    scratch where there is none; else the path of a checkpoint folder, or of a run folder. config_file: where `config`
    was read from.

    Raises UserError for a folder whose path is no UTF-8, for one that already holds checkpoints without `resume` or
    `overwrite`, for a checkpoint that is damaged or of another architecture, and where "auto" would not continue the
    run that `config_file` is of.
    """
    folder = Path(config.run.out_dir) / config.name
    if any("\ud800" <= letter <= "\udfff" for letter in str(folder)):
        # safetensors writes to such a path, and cannot open it again.
        raise UserError(f"run folder {str(folder)!r} has bytes that are no UTF-8: choose another run.out_dir or name")
    if resume is not None and overwrite:
        raise UserError("--resume continues a run, --overwrite removes it: give one of them")
    held = checkpoint.list_checkpoints(folder / "checkpoints")
    if resume is None:
        if held and not overwrite:
            raise UserError(
                f"{folder} already holds checkpoints up to {held[-1].name}: continue with --resume, "
                "choose another folder with --set name=..., or remove them with --overwrite"
            )
        return RunPlan(folder, overwrite=overwrite, newest=_newest(held))
    if resume == "auto" and config_file is not None:
        _check_same_run(folder, config_file)
    found = _find_checkpoint(folder, resume)
    if found is None:
        _log.info("no checkpoint in %s yet: starting from scratch", folder)
        return RunPlan(folder, newest=_newest(held))
    if held and found.parent.resolve() != (folder / "checkpoints").resolve():
        raise UserError(f"{folder} holds checkpoints of its own: to start it from {found}, set another name=...")
    stored = checkpoint.load_unchecked(found)
    if stored.model != config.model.to_openclip():
        raise UserError(f"checkpoint {found} is of another architecture than model.*: resume with the same model")
    told_later = () if stored.state.step_samples is None else _OF_THE_BATCH
    _warn_of_changes(found.parent.parent / "config.yaml", config, (*_HARMLESS, *told_later))
    _log.info("continuing from %s", found)
    return RunPlan(folder, found, stored.state, newest=_newest(held))


def _newest(held: list[Path]) -> str:
    return held[-1].name if held else ""


def _check_same_run(folder: Path, config_file: str) -> None:
    """UserError where the file lies in a run folder and its settings, such as a relative run.out_dir, name another."""
    own = Path(config_file).resolve().parent
    if (folder.is_dir() and folder.samefile(own)) or not checkpoint.list_checkpoints(own / "checkpoints"):
        return
    stored = load_config(config_file)
    if (Path(stored.run.out_dir) / stored.name).resolve() == folder.resolve():  # nobody asked for another run
        name = "" if own.name == stored.name else f" --set name={shlex.quote(own.name)}"
        raise UserError(
            f"{config_file} is of the run in {own}, but from here its settings name {folder.resolve()}: give "
            f"--set run.out_dir={shlex.quote(str(own.parent))}{name}"
        )


def _find_checkpoint(folder: Path, resume: str) -> Path | None:
    """A checkpoint of which every byte has been checked."""
    if resume == "auto":
        return checkpoint.newest_valid(folder / "checkpoints", otherwise=", or start anew with --overwrite")
    path = Path(resume)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist: give a checkpoint folder, a run folder, or plain --resume")
    if not (path / "checkpoints").is_dir():
        checkpoint.read_state(path)
        return path
    found = checkpoint.newest_valid(path / "checkpoints")
    if found is None:
        raise UserError(f"run folder {path} holds no checkpoint")
    return found


def note_batch(state: TrainState, run: RunConfig, ranks: Ranks) -> None:
    """Write the samples of a step into `state`; rank 0 warns where its checkpoint was trained with others."""
    before = {"samples a step": state.step_samples, "samples in a loss": state.loss_samples}
    together = run.batch_size * ranks.world_size
    state.step_samples = together * run.accumulate_steps
    state.loss_samples = state.step_samples if run.negatives == "all" else together
    after = dict(zip(before, (state.step_samples, state.loss_samples), strict=True))
    changed = [f"{name}: {before[name]} -> {after[name]}" for name in after if before[name] not in (None, after[name])]
    if changed and ranks.first:
        _log.warning(
            "the batch has changed since the checkpoint, the run will not be the same: %s "
            "(run.batch_size=%d, run.accumulate_steps=%d, run.negatives=%s, ranks: %d)",
            *(", ".join(changed), run.batch_size, run.accumulate_steps, run.negatives, ranks.world_size),
        )


def _warn_of_changes(stored: Path, config: TrainConfig, left_out: tuple[str, ...]) -> None:
    if not stored.is_file():
        return
    try:
        before = flatten_config(load_config(stored))
    except UserError as error:
        _log.warning("%s", error)
        return
    after = flatten_config(config)
    changed = [key for key in after if before.get(key) != after[key] and not key.startswith(left_out)]
    if changed:
        described = ", ".join(f"{key}: {before.get(key)} -> {after[key]}" for key in changed)
        _log.warning("settings changed since the checkpoint, the run will not be the same: %s", described)


def _log_reason(handler: logging.Handler, error: BaseException) -> None:
    """Leave the end of a run in log.txt only: on the terminal the command reports it."""
    message = f"{type(error).__name__}: {error}"
    handler.handle(logging.LogRecord(__name__, logging.ERROR, __file__, 0, message, None, None))


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"run folder {folder} cannot be written ({error}): make room, or set run.out_dir") from None


def _clear(folder: Path) -> None:
    """Remove what a former run wrote, and nothing else."""
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (
        folder / "metrics.jsonl",
        folder / "log.txt",
        folder / "wandb_id",
        *folder.glob("nonfinite_step_*.json"),
    ):
        path.unlink(missing_ok=True)

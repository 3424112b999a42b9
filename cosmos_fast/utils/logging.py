"""One logger for the package: lines on stderr, and in a run's log.txt.

Every line of log.txt says which rank speaks and how many optimizer steps are done; so does every line on stderr where
there are several ranks, because a launcher mixes theirs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

_ROOT = "cosmos_fast"


@dataclass
class _Place:
    """Of this process. step: optimizer steps done, None outside of a training."""

    rank: int = 0
    world_size: int = 1
    step: int | None = None

    def __str__(self) -> str:
        step = "" if self.step is None else f" step {self.step}"
        return f"rank {self.rank}{step}"


_place = _Place()


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (pass `__name__`)."""
    return logging.getLogger(name)


def setup_logging(rank: int = 0, world_size: int = 1, level: int = logging.INFO) -> None:
    """Show the package's messages on stderr: everything on rank 0, warnings on the others."""
    _place.rank, _place.world_size = rank, world_size
    logger = logging.getLogger(_ROOT)
    logger.setLevel(level if rank == 0 else logging.WARNING)
    logger.propagate = False
    if not any(type(handler) is logging.StreamHandler for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(_LevelFormatter())
        logger.addHandler(handler)


def log_step(step: int | None) -> None:
    """Optimizer steps done, for the lines from now on; None when the training is over."""
    _place.step = step


def log_to_file(path: Path) -> logging.Handler:
    """Append the package's messages to `path`, with times; close with stop_logging_to()."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_FileFormatter())
    logger = logging.getLogger(_ROOT)
    if logger.level == logging.NOTSET:  # a trainer used as a library, without setup_logging()
        logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return handler


def stop_logging_to(handler: logging.Handler) -> None:
    """Close a handler of log_to_file()."""
    logging.getLogger(_ROOT).removeHandler(handler)
    handler.close()


class _LevelFormatter(logging.Formatter):
    """Plain text for information, "warning:" and "error:" in front of the rest."""

    def format(self, record: logging.LogRecord) -> str:
        place = f"[{_place}] " if _place.world_size > 1 else ""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{place}{level}{super().format(record)}"


class _FileFormatter(logging.Formatter):
    """Time, level, place, message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s [%(place)s] %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.place = str(_place)
        return super().formatMessage(record)

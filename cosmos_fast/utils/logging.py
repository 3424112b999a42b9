"""One logger for the package: lines on stderr, and in a run's log.txt."""

from __future__ import annotations

import logging
from pathlib import Path

_ROOT = "cosmos_fast"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (pass `__name__`)."""
    return logging.getLogger(name)


def setup_logging(rank: int = 0, level: int = logging.INFO) -> None:
    """Show the package's messages on stderr: everything on rank 0, warnings on the others."""
    logger = logging.getLogger(_ROOT)
    logger.setLevel(level if rank == 0 else logging.WARNING)
    logger.propagate = False
    if not any(type(handler) is logging.StreamHandler for handler in logger.handlers):
        handler = logging.StreamHandler()
        prefix = "" if rank == 0 else f"[rank {rank}] "
        handler.setFormatter(_LevelFormatter(prefix))
        logger.addHandler(handler)


def log_to_file(path: Path) -> logging.Handler:
    """Append the package's messages to `path`, with times; close with stop_logging_to()."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
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

    def __init__(self, prefix: str) -> None:
        super().__init__("%(message)s")
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{self._prefix}{level}{super().format(record)}"

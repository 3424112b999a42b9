"""Processes that a command starts for a part of its work."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """In a process of multiprocessing: from now on it ends when its parent does, however that ends.

    A parent that is killed cleans up no more; its processes would go on, and hold memory or write beside the next run.
    """
    threading.Thread(target=_wait_and_exit, daemon=True).start()


def _wait_and_exit() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

"""What ranks under DeepSpeed import for two seconds each, imported once by the process that they are forks of.

Quietly, and for a CPU: what a rank asks for otherwise it gets as it would without this.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import warnings
from contextlib import suppress

import pytest

with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch, suppress(ImportError):
    warnings.simplefilter("ignore")
    patch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
    for name in ("setuptools", "deepspeed", "torch._functorch.aot_autograd", "torch._inductor.compile_fx"):
        importlib.import_module(name)
gc.collect()
gc.freeze()  # a million objects that no fork looks through, as DeepSpeed has each of them do
atexit.register(gc.unfreeze)  # of this process alone: bindings count what is left

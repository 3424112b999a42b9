"""What ranks and runs import for seconds each, DeepSpeed and DALI, imported once by the process that they are forks of.

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

MODULES = ("setuptools", "deepspeed", "torch._functorch.aot_autograd", "torch._inductor.compile_fx", "nvidia.dali.fn")

with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
    warnings.simplefilter("ignore")
    patch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
    for name in MODULES:
        with suppress(ImportError):
            importlib.import_module(name)
gc.collect()
gc.freeze()  # a million objects that no fork looks through, as DeepSpeed has each of them do
atexit.register(gc.unfreeze)  # of this process alone: bindings count what is left

"""Other programs' libraries, for tests that hand models to them; each skips the test where it is missing."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

_kept: list[torch.library.Library] = []  # a library's operators end with it


def imported(name: str) -> ModuleType:
    """A library that may import torchvision, which lacks operators where it is built for another torch; none of them is
    used here. COSMOS_FOREIGN: a folder with libraries that are in no environment, as they would bring another torch."""
    folder = os.environ.get("COSMOS_FOREIGN")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    if find_spec("torchvision") is not None and not _kept:
        _kept.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in ("nms", "qnms"):
            _kept[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip(name, exc_type=ImportError)

"""Other programs' libraries, for tests that hand models to them; each skips the test where it is missing."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

_kept: list[torch.library.Library] = []  # a library's operators end with it


def open_clip() -> ModuleType:
    """OpenCLIP. It imports torchvision, which, built for another torch, lacks operators; none of them is used here."""
    for package in ("open_clip", "torchvision"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if not _kept:
        _kept.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _kept[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("open_clip", exc_type=ImportError)

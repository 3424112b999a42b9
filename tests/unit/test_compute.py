"""What a run may ask of the model's arithmetic, and what it gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos_fast.utils.errors import UserError
from tests.tiny_run import make_trainer, tiny_config


@pytest.mark.parametrize("setting", ["cuda_graphs=true", "optimizer=torch", "linear=fp8"])
def test_what_is_missing_is_refused_in_one_line(setting: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=setting.partition("=")[0]):
        make_trainer(tiny_config(tmp_path, f"compute.{setting}"))

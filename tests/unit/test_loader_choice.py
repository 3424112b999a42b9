"""Who decodes images: chosen by device and by what is installed, said once, refused in one line."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cosmos_fast.cli import train
from cosmos_fast.config import DaliConfig, DataConfig
from cosmos_fast.data import dali_loader, dali_pipeline
from cosmos_fast.utils.errors import UserError
from tests.loaders import needs_dali


def test_auto_is_pil_without_a_gpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    dali_loader._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        assert [dali_loader.choose_loader("auto", torch.device("cpu")) for _ in range(3)] == ["pil"] * 3
    assert len(caplog.messages) == 1
    assert "PIL" in caplog.messages[0]


def test_auto_takes_dali_on_a_gpu_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_pipeline, "why_unusable", lambda device_type: None)
    assert dali_loader.choose_loader("auto", torch.device("cuda")) == "dali"
    assert dali_loader.choose_loader("pil", torch.device("cuda")) == "pil"
    monkeypatch.setattr(dali_pipeline, "why_unusable", lambda device_type: "dali is not installed")
    assert dali_loader.choose_loader("auto", torch.device("cuda")) == "pil"


def test_dali_by_name_is_refused_in_one_line_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_pipeline, "why_unusable", lambda device_type: "dali is not installed")
    with pytest.raises(UserError, match=r"dali is not installed.*dali-cuda13") as error:
        dali_loader.choose_loader("dali", torch.device("cpu"))
    assert "\n" not in str(error.value)


@needs_dali
def test_dali_does_not_work_for_devices_it_has_no_operators_for() -> None:
    assert dali_pipeline.why_unusable("cpu") is None
    assert "mps" in str(dali_pipeline.why_unusable("mps"))
    if not torch.cuda.is_available():
        assert "no CUDA device" in str(dali_pipeline.why_unusable("cuda"))


@pytest.mark.parametrize(
    "wrong", [{"loader": "nvidia"}, {"dali": {"threads": 0}}, {"dali": {"ahead": -1}}, {"dali": {"max_pixels": 0}}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\."):
        DataConfig(**{name: DaliConfig(**value) if name == "dali" else value for name, value in wrong.items()})


def test_a_dry_run_says_who_decodes_and_does_not_stop_at_what_is_missing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--recipe", "demo", "--set", "run.device=cpu", "--dry-run"]
    result = CliRunner().invoke(train.command, arguments)
    assert "# images               decoded by PIL" in result.output
    assert "data.loader=auto: no GPU" in result.output
    monkeypatch.setattr(dali_pipeline, "why_unusable", lambda device_type: "dali is not installed")
    result = CliRunner().invoke(train.command, [*arguments, "--set", "data.loader=dali"])
    assert result.exit_code == 0
    assert "DALI, not on this machine: data.loader=dali: dali is not installed" in result.output

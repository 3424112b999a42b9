"""Four ranks under DeepSpeed, every ZeRO stage, against the trainer of one process at the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast.utils.ranks import Ranks
from tests.distributed.deepspeed_runs import run_case, run_cases
from tests.distributed.test_deepspeed import assert_same_run
from tests.ranks import run_ranks

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.long]  # four processes, where `make test` counts on two cores

STAGES = [f"stage{stage}" for stage in range(4)]
OTHERS = ["parts_stage1", "parts_stage3", "all_stage3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("four")
    run_ranks(run_cases, 4, str(made), [*STAGES, *OTHERS])
    return made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process without DeepSpeed makes of it; stages do not matter to it."""
    made = tmp_path_factory.mktemp("alone")
    return {
        name: run_case(name, made, Ranks(), "run.engine=plain", "deepspeed={}") for name in ("stage0", "all_stage3")
    }


@pytest.mark.parametrize("name", [*STAGES, *OTHERS])
def test_steps_of_four_ranks_are_those_of_one_process(name: str, folder: Path, alone: dict[str, Any]) -> None:
    """Teachers in parts among them: their shares of a block are uneven in stage 1, even in stage 3."""
    assert_same_run(torch.load(folder / f"{name}.pt"), alone["all_stage3" if name == "all_stage3" else "stage0"])

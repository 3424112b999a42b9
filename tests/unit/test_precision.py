"""In which mode and type each part of a training step computes, and in which type the run keeps what it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast.config import RunConfig
from cosmos_fast.loss import CosmosLossOutput
from tests.tiny_run import losses_of, make_trainer, tiny_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("name", DTYPES)
def test_products_have_the_precision_of_the_run_and_what_it_keeps_has_fp32(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("run.max_steps=3", "run.accumulate_steps=2", "run.negatives=all", f"run.precision={name}")
    trainer = make_trainer(tiny_config(tmp_path, *settings))
    seen: dict[str, set[tuple[object, bool]]] = {"student": set(), "teacher": set(), "loss": set()}

    def note(of: str, dtype: torch.dtype) -> None:
        seen[of].add((dtype, torch.is_inference_mode_enabled()))

    for of in ("student", "teacher"):
        model = getattr(trainer, of)
        for tower in (model.visual.transformer, model.transformer):
            for block in tower.blocks:
                block.mlp.register_forward_hook(lambda module, args, out, of=of: note(of, out.dtype))
    kind = type(trainer.gradients.objective)
    compute = kind.__call__

    def watched(self: Any, *features: Any) -> CosmosLossOutput:
        note("loss", torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return compute(self, *features)

    monkeypatch.setattr(kind, "__call__", watched)
    trainer.fit()
    dtype = DTYPES[name]
    # The teacher leaves nothing for a backward pass, not even the versions of its tensors.
    assert seen == {"student": {(dtype, False)}, "teacher": {(dtype, True)}, "loss": {(dtype, False)}}
    assert len(losses_of(trainer)) == 3
    weights = [*trainer.student.parameters(), *trainer.teacher.parameters()]
    state = [value for value in trainer.optimizer.state_dict().values() if value.is_floating_point()]
    assert state
    assert {tensor.dtype for tensor in (*weights, *state)} == {torch.float32}


def test_a_run_takes_what_its_device_does_best_unless_told() -> None:
    """bf16 on a GPU that has it: `test_compute.py`."""
    assert RunConfig().precision == "auto"

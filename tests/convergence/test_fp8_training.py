"""Training with 8-bit linear layers, emulated, comes down as training in fp32 does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosmos_fast.data.batch import Batch
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.model.fp8 import use_fp8_linear
from tests.tiny_run import losses_of, make_batch, make_trainer, tiny_config

pytest.importorskip("torchao.float8", reason="torchao is not installed: its emulation of fp8 is what this trains with")


def trained(out_dir: Path, name: str, *, emulate: bool) -> Trainer:
    config = tiny_config(out_dir, f"name={name}", "run.max_steps=40", "optimizer.lr=3e-3")
    few = [make_batch(config, position) for position in (0, 4)]

    def again(batch: Batch) -> None:
        seen = few[batch.position // 4 % 2]
        for view, image in zip(batch.images, seen.images, strict=True):
            view.copy_(image)
        batch.texts.copy_(seen.texts)

    trainer = make_trainer(config, poison=again)
    for model in (trainer.student, trainer.teacher) if emulate else ():
        blocks = [*model.transformer.blocks, *model.visual.transformer.blocks]
        use_fp8_linear(blocks, "torchao", torch.device("cpu"), emulate=True)
    trainer.fit()
    return trainer


def test_loss_comes_down_as_in_fp32(tmp_path: Path) -> None:
    plain, eight_bit = (trained(tmp_path, name, emulate=name == "fp8") for name in ("fp32", "fp8"))
    expected, found = torch.tensor(losses_of(plain)), torch.tensor(losses_of(eight_bit))
    assert not torch.equal(expected, found)
    assert (eight_bit.state.skipped, len(found)) == (0, 40)
    torch.testing.assert_close(found[:10].mean(), expected[:10].mean(), rtol=0.05, atol=0.0)
    assert found[-4:].mean() < 0.5 * found[:4].mean()
    torch.testing.assert_close(found[-4:].mean(), expected[-4:].mean(), rtol=0.3, atol=0.1)

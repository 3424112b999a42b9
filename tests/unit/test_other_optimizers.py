"""AdamW of torch and apex in the place of the fused step: one trajectory, one state, one behaviour on NaN."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import pytest
import torch

from cosmos_fast.config import OptimizerConfig
from cosmos_fast.engine.optimizer import AdamWEma
from cosmos_fast.engine.other_optimizers import ApexAdamWEma, TorchAdamWEma
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.utils import capabilities
from cosmos_fast.utils.errors import UserError
from tests.fake_apex import nvidia_apex
from tests.tiny_run import flat, losses_of, make_trainer, tiny_config
from tests.unit.test_optimizer import Toy, fill_gradients, make, weights

__all__ = ["nvidia_apex"]
OTHERS = {"torch": TorchAdamWEma, "apex": ApexAdamWEma}


def twin_of(optimizer: AdamWEma, name: str) -> tuple[AdamWEma, torch.nn.Module, torch.nn.Module]:
    plain, student, teacher = make(optimizer.config.clip_norm)
    return OTHERS[name](plain.config, student, teacher), student, teacher


@pytest.mark.usefixtures("nvidia_apex")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_same_trajectory_as_the_fused_step(name: str, clip_norm: float | None) -> None:
    """Six steps, one parameter without a gradient on some; steps with NaN and with a loss scale among them."""
    ours, student, teacher = make(clip_norm)
    other, other_student, other_teacher = twin_of(ours, name)
    for step in range(6):
        scale = 1024.0 if step == 2 else 1.0
        for model in (student, other_student):
            fill_gradients(model, step, ("spare",) if step % 3 == 1 else (), size=scale)
            if step == 3:
                model.proj.bias.grad[1] = math.nan
        results = [
            optimizer.step(lr=0.02 * (step + 1), ema_decay=0.8, loss=torch.ones(()), loss_scale=scale)
            for optimizer in (ours, other)
        ]
        assert [result.applied for result in results] == [step != 3] * 2
        if step != 3:
            assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-6)
    for mine, others in ((student, other_student), (teacher, other_teacher)):
        for key, value in weights(mine).items():
            torch.testing.assert_close(weights(others)[key], value, rtol=1e-5, atol=1e-6)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("nvidia_apex")
@pytest.mark.parametrize("name", OTHERS)
def test_skipped_step_leaves_every_bit_and_scales_are_clamped(name: str) -> None:
    other, student, teacher = twin_of(make()[0], name)
    fill_gradients(student, 0)
    with torch.no_grad():
        student.logit_scale.fill_(50.0)
        teacher.logit_scale.fill_(50.0)
    other.step(lr=0.1, ema_decay=0.9)
    assert float(student.logit_scale.detach()) == pytest.approx(math.log(100.0))
    assert float(teacher.logit_scale) == pytest.approx(math.log(100.0))
    before = (weights(student), weights(teacher), {key: value.clone() for key, value in other.state_dict().items()})
    fill_gradients(student, 1)
    assert not other.step(lr=0.1, ema_decay=0.9, loss=torch.tensor(math.inf)).applied
    for old, new in zip(before, (weights(student), weights(teacher), other.state_dict()), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_run_moves_between_optimizers(nvidia_apex: list[str], tmp_path: Path) -> None:
    settings = ("run.max_steps=6", "run.checkpoint_every_steps=2", "run.keep_checkpoints=9", "optimizer.clip_norm=1.0")
    whole = make_trainer(tiny_config(tmp_path, *settings, "name=whole"))
    whole.fit()
    folder, start = whole.plan.checkpoints / "step_00000002", 2
    for name in ("torch", "apex"):
        config = tiny_config(tmp_path, *settings, f"name={name}", f"compute.optimizer={name}")
        trainer = make_trainer(config, plan=plan_run(config, str(folder)))
        assert isinstance(trainer.optimizer, OTHERS[name])
        trainer.fit()
        assert losses_of(trainer) == pytest.approx(losses_of(whole)[start:], rel=1e-4)
        torch.testing.assert_close(flat(trainer.teacher), flat(whole.teacher), rtol=1e-4, atol=1e-5)
        folder, start = trainer.plan.checkpoints / "step_00000004", 4  # from torch's to apex's
    assert nvidia_apex.count("FusedAdam") == 2


def test_apex_is_refused_in_one_line_where_it_cannot_be(tmp_path: Path, monkeypatch) -> None:
    for field, instead in (("optimizer", "use fused"), ("layer_norm", "use torch")):
        with pytest.raises(UserError, match=f"compute.{field}=apex: apex is not installed; {instead}"):
            make_trainer(tiny_config(tmp_path, f"compute.{field}=apex"))
    monkeypatch.setattr("cosmos_fast.utils.nvidia_apex.why_unusable", lambda name: None)
    with pytest.raises(UserError, match="apex runs on CUDA only, this run is on cpu"):
        make_trainer(tiny_config(tmp_path, "compute.optimizer=apex"))


@pytest.mark.parametrize("field", ["optimizer", "layer_norm"])
def test_an_apex_without_its_cuda_part_is_one_line(field: str, nvidia_apex: list[str], tmp_path, monkeypatch) -> None:
    """It imports, and raises when an object is made."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("requires cuda extensions")

    module, name = {
        "optimizer": ("apex.optimizers", "FusedAdam"),
        "layer_norm": ("apex.normalization", "FusedLayerNorm"),
    }[field]
    monkeypatch.setattr(sys.modules[module], name, refuse)
    with pytest.raises(UserError, match=f"compute.{field}=apex: this apex has no {module}.{name} that works"):
        make_trainer(tiny_config(tmp_path, f"compute.{field}=apex"))


def test_the_apex_of_the_package_index_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    capabilities.why_unusable.cache_clear()
    try:
        with pytest.raises(UserError, match=r"compute\.optimizer=apex: apex: not NVIDIA's apex") as caught:
            make_trainer(tiny_config(tmp_path, "compute.optimizer=apex"))
    finally:
        capabilities.why_unusable.cache_clear()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OTHERS)
def test_on_a_gpu(name: str) -> None:
    if name == "apex" and (reason := capabilities.why_unusable("apex")) is not None:
        pytest.skip(reason)
    config = OptimizerConfig(weight_decay=0.3, clip_norm=0.5)
    sides = []
    for make_optimizer in (AdamWEma, OTHERS[name]):
        torch.manual_seed(0)
        student = Toy().cuda()
        teacher = copy.deepcopy(student).requires_grad_(False)
        optimizer = make_optimizer(config, student, teacher)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for parameter in student.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
            assert optimizer.step(lr=0.01, ema_decay=0.8, loss=torch.ones((), device="cuda")).applied
        sides.append((*weights(student).values(), *weights(teacher).values(), *optimizer.state_dict().values()))
    for expected, found in zip(*sides, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

"""The optimizer that DeepSpeed drives against the one of a single process: the same step, on whole or flat masters."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from cosmos_fast.config import OptimizerConfig
from cosmos_fast.engine.optimizer import AdamWEma
from cosmos_fast.engine.zero_optimizer import ZeroAdamWEma

CONFIG = OptimizerConfig(lr=0.1, weight_decay=0.3, clip_norm=0.5)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(7, 5)
        self.ln_1 = nn.LayerNorm(7)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0) - 0.05))


def fill_gradients(model: nn.Module, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = scale * (-gradient.abs() if name == "logit_scale" else gradient)


def zero(student: Toy, teacher: Toy) -> ZeroAdamWEma:
    """As for stage 0: masters are the parameters, their teachers those of the other model."""
    made, teachers = ZeroAdamWEma(CONFIG, student), dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        made.start_state(parameter, teachers[name].data)
    return made


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_steps_are_those_of_the_single_process() -> None:
    student = Toy()
    teacher = copy.deepcopy(student)
    twin, twin_teacher = copy.deepcopy(student), copy.deepcopy(student)
    ours, reference = zero(student, teacher), AdamWEma(CONFIG, twin, twin_teacher)
    for step in range(4):
        scale = 2.0**step
        for model in (student, twin):
            fill_gradients(model, step, scale)
        ours.prepare(lr=0.1, ema_decay=0.9, loss_scale=scale, loss_finite=True)
        ours.step()
        expected = reference.step(lr=0.1, ema_decay=0.9, loss_scale=scale)
        assert ours.result is not None
        assert ours.result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
        torch.testing.assert_close(flat(student), flat(twin), rtol=1e-6, atol=0.0)
        torch.testing.assert_close(flat(teacher), flat(twin_teacher), rtol=1e-6, atol=0.0)
    assert ours.steps == 4
    assert float(student.logit_scale.detach()) == pytest.approx(math.log(100.0))  # its gradient pushed it further


def test_groups_one_by_one_with_the_norm_of_all_ranks() -> None:
    """As for stages 1 to 3: step() is called for one group after the other, and the norm comes from elsewhere."""
    student = Toy()
    whole = copy.deepcopy(student)
    teacher, whole_teacher = copy.deepcopy(student), copy.deepcopy(student)
    ours, reference = zero(student, teacher), zero(whole, whole_teacher)
    for model in (student, whole):
        fill_gradients(model, 1, 1.0)
    ours.norm_of = lambda: torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm()
    for made in (ours, reference):
        made.prepare(lr=0.1, ema_decay=0.9, loss_scale=1.0, loss_finite=True)
    reference.step()
    groups = ours.param_groups
    assert len(groups) == 3
    for group in groups:
        ours.param_groups = [group]
        ours.step()
    torch.testing.assert_close(flat(student), flat(whole), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(flat(teacher), flat(whole_teacher), rtol=1e-6, atol=0.0)
    assert ours.steps == 1


@pytest.mark.parametrize(("norm", "loss_finite"), [(math.nan, True), (math.inf, True), (1.0, False)])
def test_nothing_moves_where_the_norm_or_the_loss_is_not_finite(norm: float, loss_finite: bool) -> None:
    student = Toy()
    teacher, before = copy.deepcopy(student), flat(student)
    ours = zero(student, teacher)
    fill_gradients(student, 1, 1.0)
    ours.norm_of = lambda: norm
    ours.prepare(lr=0.1, ema_decay=0.9, loss_scale=1.0, loss_finite=loss_finite)
    ours.step()
    assert ours.result is not None
    assert (ours.result.applied, ours.result.loss_finite, ours.steps) == (False, loss_finite, 0)
    assert torch.equal(flat(student), before)
    assert torch.equal(flat(teacher), before)
    assert all(float(ours.state[p]["exp_avg"].abs().sum()) == 0.0 for p in student.parameters())

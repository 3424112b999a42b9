"""The fused step against torch's AdamW and a teacher averaged by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from cosmos_fast.config import ModelConfig, OptimizerConfig, TextConfig, TrainConfig, VisionConfig
from cosmos_fast.engine.optimizer import AdamWEma, build_optimizer, has_weight_decay
from cosmos_fast.model import create_model
from cosmos_fast.utils.errors import UserError


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(7, 5)
        self.ln_1 = nn.LayerNorm(7)
        self.spare = nn.Parameter(torch.randn(3, 3))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.distill_logit_scale = nn.Parameter(torch.tensor(2.0))


def make(clip_norm: float | None = None) -> tuple[AdamWEma, Toy, Toy]:
    torch.manual_seed(0)
    student = Toy()
    teacher = copy.deepcopy(student).requires_grad_(False)
    config = TrainConfig(name="x", optimizer=OptimizerConfig(lr=1.0, weight_decay=0.3, clip_norm=clip_norm))
    return build_optimizer(config, student, teacher), student, teacher


def fill_gradients(model: nn.Module, seed: int, without: tuple[str, ...] = (), size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        gradient = size * torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name in without else gradient


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_matches_torch_adamw_and_average_of_former_weights(clip_norm: float | None) -> None:
    """Six steps; `spare` has a gradient on some only, so its bias correction lags behind the others'."""
    ours, student, teacher = make(clip_norm)
    twin = copy.deepcopy(student)
    expected_teacher = weights(twin)
    named = list(twin.named_parameters())
    decayed, others = (
        [p for n, p in named if n in ("proj.weight", "spare")],
        [p for n, p in named if n not in ("proj.weight", "spare")],
    )
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-8)
    for step in range(6):
        lr, decay = 0.02 * (step + 1), 0.8 + 0.02 * step
        without = ("spare",) if step % 3 == 1 else ()
        fill_gradients(student, step, without)
        fill_gradients(twin, step, without)
        for name, parameter in named:
            expected_teacher[name] = decay * expected_teacher[name] + (1 - decay) * parameter.detach()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip_norm or math.inf)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        result = ours.step(lr=lr, ema_decay=decay)
        assert result.applied
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for name, parameter in named:
        torch.testing.assert_close(dict(student.named_parameters())[name], parameter, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(
            dict(teacher.named_parameters())[name].data, expected_teacher[name], rtol=2e-6, atol=1e-7
        )


def test_teacher_takes_the_weights_from_before_the_step() -> None:
    optimizer, student, teacher = make()
    before = weights(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()
    fill_gradients(student, 1, without=("spare",))
    optimizer.step(lr=0.1, ema_decay=0.0)
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter.data, before[name], rtol=0, atol=0)
    assert not torch.equal(student.proj.weight, before["proj.weight"])
    assert torch.equal(student.spare, before["spare"])  # no gradient: no decay either


def test_scales_are_clamped_in_both_models() -> None:
    optimizer, student, teacher = make()
    fill_gradients(student, 0)
    with torch.no_grad():
        student.logit_scale.fill_(50.0)
        teacher.logit_scale.fill_(60.0)
        student.distill_logit_scale.fill_(-3.0)
        teacher.distill_logit_scale.fill_(-3.0)
    optimizer.step(lr=1e-3, ema_decay=0.9)
    for model in (student, teacher):
        assert float(model.logit_scale.detach()) == pytest.approx(math.log(100.0))
        assert float(model.distill_logit_scale.detach()) == 0.0


@pytest.mark.parametrize("bad", ["nan gradient", "inf gradient", "nan loss", "inf loss"])
def test_a_step_with_nan_or_inf_leaves_every_bit_as_it_was(bad: str) -> None:
    optimizer, student, teacher = make()
    fill_gradients(student, 0)
    optimizer.step(lr=0.1, ema_decay=0.9)
    before = (weights(student), weights(teacher), {k: v.clone() for k, v in optimizer.state_dict().items()})
    fill_gradients(student, 1)
    value = math.nan if "nan" in bad else math.inf
    loss = torch.tensor(1.0)
    if "gradient" in bad:
        assert student.ln_1.bias.grad is not None
        student.ln_1.bias.grad[3] = value
    else:
        loss = torch.tensor(value)
    result = optimizer.step(lr=0.1, ema_decay=0.9, loss=loss)
    assert not result.applied
    after = (weights(student), weights(teacher), optimizer.state_dict())
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_huge_gradients_that_are_finite_are_clipped_not_skipped() -> None:
    optimizer, student, _ = make(clip_norm=1.0)
    fill_gradients(student, 0, size=1e15)
    result = optimizer.step(lr=1e-3, ema_decay=0.9)
    assert result.applied
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_state_dict_continues_the_same_trajectory() -> None:
    optimizer, student, teacher = make()
    for step in range(3):
        fill_gradients(student, step, without=("spare",) if step == 0 else ())
        optimizer.step(lr=0.1, ema_decay=0.9)
    student2, teacher2 = copy.deepcopy(student), copy.deepcopy(teacher)
    resumed = AdamWEma(optimizer.config, student2, teacher2)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in optimizer.state_dict().items()})
    for step in range(3, 5):
        for one, model in ((optimizer, student), (resumed, student2)):
            fill_gradients(model, step)
            one.step(lr=0.1, ema_decay=0.9)
    for a, b in ((student, student2), (teacher, teacher2)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_state_of_another_model_is_refused() -> None:
    optimizer, _, _ = make()
    state = optimizer.state_dict()
    with pytest.raises(UserError, match="exp_avg/extra"):
        optimizer.load_state_dict({**state, "exp_avg/extra": torch.zeros(1)})
    with pytest.raises(UserError, match="exp_avg/spare"):
        optimizer.load_state_dict({**state, "exp_avg/spare": torch.zeros(4, 4)})


def test_decay_groups_of_the_model() -> None:
    model = create_model(
        ModelConfig(
            embed_dim=16,
            pool_heads=2,
            vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=1, head_width=8),
            text=TextConfig(context_length=8, vocab_size=64, width=16, heads=2, layers=1),
        )
    )
    decayed = {name for name, p in model.named_parameters() if has_weight_decay(name, p)}
    for name in ("positional_embedding", "visual.positional_embedding", "token_embedding.weight", "visual.proj"):
        assert name in decayed
    for name in ("text_projection", "image_token_mapping.weight", "text_token_mapping.weight", "visual.conv1.weight"):
        assert name in decayed
    kept = {name for name, _ in model.named_parameters()} - decayed
    assert {"visual.class_embedding", "logit_scale", "distill_logit_scale"} <= kept
    assert all(
        p.ndim < 2 or any(part in n for part in ("ln", "bias")) for n, p in model.named_parameters() if n in kept
    )

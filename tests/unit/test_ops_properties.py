"""What holds for the contrastive loss and for distillation at every shape, and what every wrong argument gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosmos_fast.ops import dense_distillation_cross_entropy, distillation_cross_entropy, multiview_infonce
from cosmos_kernels import reference

VIEWS, BATCHES, DIMS = st.integers(1, 8), st.integers(1, 9), st.integers(1, 9)
SCALES = st.sampled_from([0.0, 1e-3, 1.0, 14.3, 100.0, 5000.0])
SEEDS = st.integers(0, 2**32 - 1)
STUDENT = ("student_a", "student_b", "student_scale")
checked = settings(max_examples=40, deadline=None)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def values(run: Callable[..., Tensor], inputs: dict[str, Tensor], wanted: tuple[str, ...]) -> list[Tensor]:
    """The loss, and the gradients of the wanted inputs."""
    leaves = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in inputs.items()}
    loss = run(**leaves)
    return [loss, *torch.autograd.grad(loss, [leaves[name] for name in wanted])]


def assert_same(actual: list[Tensor], expected: list[Tensor], scale: float = 1.0) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10 * max(scale, 1.0))


@st.composite
def contrastive(draw: st.DrawFn) -> dict[str, Tensor]:
    views_a, views_b, batch, dim = draw(VIEWS), draw(VIEWS), draw(BATCHES), draw(DIMS)
    generator = torch.Generator().manual_seed(draw(SEEDS))
    a, b = (torch.randn(views, batch, dim, generator=generator, dtype=torch.float64) for views in (views_a, views_b))
    return {"a_VBD": F.normalize(a, dim=-1), "b_VBD": F.normalize(b, dim=-1), "scale": scalar(draw(SCALES))}


@st.composite
def distillation(draw: st.DrawFn) -> dict[str, Tensor]:
    views_a, views_b, rows, columns = draw(VIEWS), draw(VIEWS), draw(BATCHES), draw(BATCHES)
    generator = torch.Generator().manual_seed(draw(SEEDS))

    def unit(views: int, batch: int, dim: int) -> Tensor:
        return F.normalize(torch.randn(views, batch, dim, generator=generator, dtype=torch.float64), dim=-1)

    dim, teacher_dim = draw(DIMS), draw(DIMS)
    return {
        "student_a": unit(views_a, rows, dim),
        "student_b": unit(views_b, columns, dim),
        "teacher_a": unit(draw(st.sampled_from([1, views_a])), rows, teacher_dim),
        "teacher_b": unit(draw(st.sampled_from([1, views_b])), columns, teacher_dim),
        "student_scale": scalar(draw(SCALES)),
        "teacher_scale": scalar(draw(SCALES)),
    }


@st.composite
def dense_logits(draw: st.DrawFn) -> dict[str, Tensor]:
    shape = draw(BATCHES), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    spread = draw(st.sampled_from([0.0, 1.0, 300.0]))
    student, teacher = (spread * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return {"student_logits_MK": student, "teacher_logits_MK": teacher}


@checked
@given(contrastive())
def test_infonce_equals_the_pair_loop(inputs):
    wanted = tuple(inputs)
    expected = values(reference.multiview_infonce, inputs, wanted)
    assert_same(values(multiview_infonce, inputs, wanted), expected, inputs["scale"].item())


@checked
@given(contrastive(), SEEDS)
def test_infonce_knows_no_order_of_samples_views_or_sides(inputs, seed):
    a, b, scale = inputs.values()
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randperm(a.shape[1], generator=generator)
    shuffled_a, shuffled_b = (x[torch.randperm(x.shape[0], generator=generator)][:, samples] for x in (a, b))
    loss = multiview_infonce(a, b, scale)
    assert_same([multiview_infonce(shuffled_b, shuffled_a, scale)], [loss], scale.item())
    assert loss >= -1e-9 * max(scale.item(), 1.0)


@checked
@given(contrastive(), st.integers(1, 5), st.data())
def test_infonce_with_more_columns_than_rows(inputs, more, data):
    """Rows against all columns; columns of other samples are negatives and no rows."""
    a, b, scale = inputs.values()
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    others = torch.randn(b.shape[0], more, b.shape[2], generator=generator, dtype=torch.float64)
    offset = data.draw(st.integers(0, more))
    columns = torch.cat([others[:, :offset], b, others[:, offset:]], dim=1)
    arguments = {"a_VBD": a, "b_VBD": columns, "scale": scale}

    def run(**leaves: Tensor) -> Tensor:
        return multiview_infonce(**leaves, offset=offset)

    def oracle(a_VBD: Tensor, b_VBD: Tensor, scale: Tensor) -> Tensor:
        return multiview_infonce(a_VBD, b_VBD, scale, offset=offset, backend="eager")

    tolerance = scale.item() * max(others.norm(dim=2).max().item(), 1.0)
    assert_same(values(run, arguments, tuple(arguments)), values(oracle, arguments, tuple(arguments)), tolerance)


@checked
@given(distillation())
def test_distillation_equals_the_pair_loop(inputs):
    expected = values(lambda **x: reference.distillation_cross_entropy(*x.values()), inputs, STUDENT)
    assert_same(values(distillation_cross_entropy, inputs, STUDENT), expected, inputs["student_scale"].item())


@checked
@given(distillation(), SEEDS)
def test_distillation_knows_no_order_and_both_sides_alike(inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    loss = distillation_cross_entropy(**inputs)
    orders = {side: torch.randperm(inputs[f"student_{side}"].shape[1], generator=generator) for side in "ab"}
    moved = {name: x[:, orders[name[-1]]] if x.dim() else x for name, x in inputs.items()}
    swapped = {**moved, "student_a": moved["student_b"], "student_b": moved["student_a"]}
    swapped |= {"teacher_a": moved["teacher_b"], "teacher_b": moved["teacher_a"]}
    for other in (moved, swapped):
        assert_same([distillation_cross_entropy(**other)], [loss], inputs["student_scale"].item())


@checked
@given(distillation())
def test_no_student_beats_the_teacher_itself(inputs):
    """Cross-entropy is least, with no gradient, where the student is the teacher."""
    views = {"a": inputs["student_a"].shape[0], "b": inputs["student_b"].shape[0]}
    own = {f"student_{side}": inputs[f"teacher_{side}"].expand(count, -1, -1) for side, count in views.items()}
    least, *gradients = values(
        distillation_cross_entropy, {**inputs, **own, "student_scale": inputs["teacher_scale"]}, STUDENT
    )
    size = max(inputs["student_scale"].item(), inputs["teacher_scale"].item(), 1.0)
    assert distillation_cross_entropy(**inputs) >= least - 1e-10 * size
    for gradient in gradients:
        assert gradient.abs().max() <= 1e-10 * size


@checked
@given(dense_logits(), st.floats(0.05, 20), st.floats(0.05, 20))
def test_dense_distillation(inputs, student_temperature, teacher_temperature):
    temperatures = student_temperature, teacher_temperature
    loss, gradient = values(
        lambda **x: dense_distillation_cross_entropy(*x.values(), *temperatures), inputs, ("student_logits_MK",)
    )
    expected = values(
        lambda **x: reference.dense_distillation_cross_entropy(*x.values(), *temperatures),
        inputs,
        ("student_logits_MK",),
    )
    size = max(x.abs().max().item() for x in inputs.values()) / min(temperatures)
    assert_same([loss, gradient], expected, size)
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(len(gradient), dtype=torch.float64), rtol=0, atol=1e-9)
    student, teacher = inputs.values()
    shifted = dense_distillation_cross_entropy(student + 7.0, teacher - 3.0, *temperatures)
    assert_same([shifted], [loss], size + 10 / min(temperatures))


# A wrong argument: what is done to it, in words and in code.
WRONG = {
    "a vector": lambda x: x.flatten(),
    "no entries": lambda x: x[:0],
    "whole numbers": lambda x: x.long(),
    "another dtype": lambda x: x.to(torch.float32),
    "another device": lambda x: x.to("meta"),
    "fewer channels": lambda x: x[..., :-1],
    "five dimensions": lambda x: x[None, None],
}


def refused(function: Callable[..., Tensor], inputs: dict[str, Tensor], name: str, how: str) -> None:
    with pytest.raises(ValueError, match=rf"^{function.__name__}: .*{name.split('_')[0]}"):
        function(**{**inputs, name: WRONG[how](inputs[name])})


@checked
@given(contrastive(), st.sampled_from(["a_VBD", "b_VBD"]), st.sampled_from(sorted(WRONG)))
def test_infonce_refuses_what_does_not_fit(inputs, name, how):
    refused(multiview_infonce, inputs, name, how)


@checked
@given(
    distillation(),
    st.sampled_from(["student_a", "student_b", "teacher_a", "teacher_b"]),
    st.sampled_from(sorted(WRONG)),
)
def test_distillation_refuses_what_does_not_fit(inputs, name, how):
    refused(distillation_cross_entropy, inputs, name, how)


@checked
@given(
    dense_logits(), st.sampled_from(["student", "teacher"]), st.sampled_from(sorted(WRONG.keys() - {"another dtype"}))
)
def test_dense_distillation_refuses_what_does_not_fit(inputs, side, how):
    refused(dense_distillation_cross_entropy, inputs, f"{side}_logits_MK", how)


@checked
@given(distillation(), st.sampled_from(["student_scale", "teacher_scale"]), st.sampled_from([(1,), (1, 1), (2,)]))
def test_scales_are_scalars(inputs, name, shape):
    for function, arguments, wrong in (
        (distillation_cross_entropy, inputs, name),
        (
            multiview_infonce,
            {"a_VBD": inputs["student_a"], "b_VBD": inputs["student_a"], "scale": inputs["student_scale"]},
            "scale",
        ),
    ):
        with pytest.raises(ValueError, match=f"{wrong} has shape .*, expected a scalar"):
            function(**{**arguments, wrong: torch.ones(shape, dtype=torch.float64)})

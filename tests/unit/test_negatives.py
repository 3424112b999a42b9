"""run.negatives=all: the gradients of one large batch at the memory of a micro-batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_fast.data.batch import Batch
from cosmos_fast.engine.announce import announce
from cosmos_fast.engine.gradients import Gradients
from cosmos_fast.engine.loss_scale import LossScaler
from cosmos_fast.engine.precision import Precision
from cosmos_fast.engine.state import TrainState
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.loss import CosmosLossOutput
from cosmos_fast.model import CosmosFeatures, TeacherFeatures
from tests.tiny_run import flat, losses_of, make_batch, make_trainer, rows_of, tiny_config

SIZES = [(6,), (6, 6), (3, 3, 3, 3), (1, 6, 5)]


def make_gradients(tmp_path: Path, recipe: str = "demo", precision: str = "fp32") -> tuple[Trainer, Gradients]:
    """A trainer whose teacher differs from its student, and its gradients with all negatives."""
    config = tiny_config(tmp_path, f"run.precision={precision}", "run.negatives=all", recipe=recipe)
    trainer = make_trainer(config)
    with torch.no_grad():
        for parameter in trainer.teacher.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return trainer, trainer.gradients


def make_batches(trainer: Trainer, sizes: Sequence[int]) -> list[Batch]:
    """Batches of these sizes with captions of different lengths."""
    config = trainer.config
    whole = make_batch(replace(config, run=replace(config.run, batch_size=sum(sizes))), 0)
    eot = config.model.text.vocab_size - 1
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, whole.texts.shape[2], whole.texts.shape[:2], generator=generator)
    whole.texts.scatter_(2, lengths.unsqueeze(2), eot)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [cut(whole, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def cut(batch: Batch, part: slice) -> Batch:
    return replace(
        batch, images=[view[part] for view in batch.images], texts=batch.texts[:, part], keys=batch.keys[part]
    )


def join(batches: Sequence[Batch]) -> Batch:
    views = zip(*(batch.images for batch in batches), strict=True)
    keys = [key for batch in batches for key in batch.keys]
    texts = torch.cat([batch.texts for batch in batches], dim=1)
    return replace(batches[0], images=[torch.cat(view) for view in views], texts=texts, keys=keys)


def run(gradients: Gradients, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    gradients.student.zero_grad(set_to_none=True)
    losses = gradients.accumulate(batches)
    named = gradients.student.named_parameters()
    return losses, {name: p.grad.clone() for name, p in named if p.grad is not None}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest deviation of any gradient, as a share of that gradient's norm."""
    return max(float((found[name] - grad).norm() / grad.norm()) for name, grad in expected.items())


def watch_objective(gradients: Gradients, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Whatever features the objective gets from now on, by name."""
    seen: list[dict[str, Tensor]] = []
    kind = type(gradients.objective)
    compute = kind.__call__

    def watching(self: Any, student: CosmosFeatures, teacher: TeacherFeatures | None) -> CosmosLossOutput:
        named = vars(student) | ({} if teacher is None else {f"teacher {name}": f for name, f in vars(teacher).items()})
        seen.append({name: tensor.detach().clone() for name, tensor in named.items() if tensor is not None})
        return compute(self, student, teacher)

    monkeypatch.setattr(kind, "__call__", watching)
    return seen


def features_off(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """Largest deviation of any feature, which have unit norm, or of a scale."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in expected.items())


@pytest.mark.parametrize("recipe", ["demo", "demo_clip"])
@pytest.mark.parametrize("sizes", SIZES)
def test_features_losses_and_gradients_are_those_of_the_large_batch(
    sizes: tuple[int, ...], recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, gradients = make_gradients(tmp_path, recipe)
    batches = make_batches(trainer, sizes)
    seen = watch_objective(gradients, monkeypatch)
    expected_losses, expected = run(gradients, [join(batches)])
    losses, found = run(gradients, batches)
    assert features_off(*seen) < 1e-5
    assert set(found) == set(expected) == {name for name, _ in trainer.student.named_parameters()}
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    assert error(found, expected) < 1e-5
    for name in ("logit_scale", "distill_logit_scale"):
        if name in expected:
            assert abs(float(expected[name])) > 1e-3
            assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    if len(sizes) > 1:
        gradients.negatives = "micro"
        assert error(run(gradients, batches)[1], expected) > 1e-2  # the strategies do differ


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_within_the_error_of_the_large_batch(precision: str, tmp_path: Path) -> None:
    exact_trainer, exact = make_gradients(tmp_path)
    batches = make_batches(exact_trainer, (4, 4, 4))
    expected_losses, expected = run(exact, [join(batches)])
    trainer, gradients = make_gradients(tmp_path, precision=precision)
    large_losses, large = run(gradients, [join(batches)])
    losses, found = run(gradients, batches)
    scaled = {name: trainer.scaler.scale * grad for name, grad in expected.items()}
    assert error(found, scaled) < 2 * error(large, scaled)
    torch.testing.assert_close(losses, expected_losses, rtol=0.02, atol=0.0)
    assert not torch.equal(large_losses, expected_losses)


def test_the_loss_scale_reaches_every_gradient_once(tmp_path: Path) -> None:
    trainer, gradients = make_gradients(tmp_path)
    batches = make_batches(trainer, (3, 3))
    losses, plain = run(gradients, batches)
    gradients.scaler = LossScaler(Precision("fp16", "cpu"), TrainState(loss_scale=1024.0))
    scaled_losses, scaled = run(gradients, batches)
    assert torch.equal(scaled_losses, losses)
    assert all(torch.equal(scaled[name], 1024 * grad) for name, grad in plain.items())  # a power of two: exactly


def test_gradients_add_to_those_that_are_there(tmp_path: Path) -> None:
    trainer, gradients = make_gradients(tmp_path)
    batches = make_batches(trainer, (3, 3))
    _, once = run(gradients, batches)
    gradients.accumulate(batches)
    twice = {name: p.grad for name, p in trainer.student.named_parameters() if p.grad is not None}
    assert error(twice, {name: 2 * grad for name, grad in once.items()}) < 1e-6


@pytest.mark.parametrize(("count", "student_runs"), [(1, 1), (2, 3), (4, 7)])
def test_only_what_has_to_be_is_run_twice(count: int, student_runs: int, tmp_path: Path, monkeypatch) -> None:
    trainer, gradients = make_gradients(tmp_path)
    batches = make_batches(trainer, (3,) * count)
    calls = {"student": 0, "teacher": 0}
    forward, encode_views = trainer.student.forward, trainer.teacher.encode_views

    def student(*inputs):
        calls["student"] += 1
        return forward(*inputs)

    def teacher(*inputs):
        calls["teacher"] += 1
        return encode_views(*inputs)

    monkeypatch.setattr(trainer.student, "forward", student)
    monkeypatch.setattr(trainer.teacher, "encode_views", teacher)
    gradients.accumulate(batches)
    assert calls == {"student": student_runs, "teacher": count}


class SavedBytes:
    """Counts bytes that autograd holds for backward, and their peak. A storage saved twice counts twice."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> Saved:
        return Saved(self, tensor)


class Saved:
    """A tensor on the books as long as this lives."""

    def __init__(self, books: SavedBytes, tensor: Tensor) -> None:
        self.books, self.tensor = books, tensor.detach()  # a saved output would hold its own graph
        books.now += tensor.nbytes
        books.peak = max(books.peak, books.now)

    def __del__(self) -> None:
        self.books.now -= self.tensor.nbytes


def peak_saved_bytes(gradients: Gradients, batches: Sequence[Batch]) -> int:
    books = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(books.pack, lambda saved: saved.tensor):
        gradients.accumulate(batches)
    assert books.now == 0
    return books.peak


def test_activations_are_those_of_one_micro_batch(tmp_path: Path) -> None:
    trainer, gradients = make_gradients(tmp_path)
    batches = make_batches(trainer, (8,) * 4)
    one = max(peak_saved_bytes(gradients, [batch]) for batch in batches)
    large = peak_saved_bytes(gradients, [join(batches)])
    accumulated = peak_saved_bytes(gradients, batches)
    features = 4 * 32 * trainer.config.model.embed_dim * (4 * 2 + 6)  # what the loss keeps of 32 samples
    assert large > 3 * one
    assert accumulated < 1.05 * one + 4 * features


@pytest.mark.parametrize("recipe", ["demo", "demo_clip"])
@pytest.mark.parametrize(
    ("precision", "loss_scale", "close", "near"),
    [("fp32", None, 1e-5, 1e-3), ("fp32", 2.0**12, 1e-5, 1e-3), ("fp16", 2.0**8, 1e-2, 0.2)],
)
def test_a_run_is_that_of_the_large_batch(
    precision: str, loss_scale: float | None, close: float, near: float, recipe: str, tmp_path: Path
) -> None:
    """Three steps with clipping. A loss scale in fp32 shows its way through both without the error of fp16."""
    common = ("optimizer.clip_norm=0.5", "ema.decay=0.9", f"run.precision={precision}")
    split = ("run.batch_size=2", "run.accumulate_steps=4", "run.negatives=all")
    large = make_trainer(tiny_config(tmp_path, "name=large", "run.batch_size=8", *common, recipe=recipe))
    small = make_trainer(tiny_config(tmp_path, "name=small", *split, *common, recipe=recipe))
    start = {name: flat(getattr(large, name)).clone() for name in ("student", "teacher")}
    large.state.loss_scale = small.state.loss_scale = loss_scale

    def micro_batches(trainer: Trainer) -> list[Batch]:
        whole = make_batch(large.config, trainer.state.position)
        size = trainer.config.run.batch_size
        parts = [cut(whole, slice(start, start + size)) for start in range(0, 8, size)]
        return [replace(part, next_position=whole.next_position) for part in parts]

    for _ in range(3):
        outcomes = [trainer.train_step(micro_batches(trainer)) for trainer in (large, small)]
        assert outcomes[0].samples == outcomes[1].samples == 8
        assert outcomes[0].applied
        assert outcomes[0].grad_norm > 0.5  # clipped
        for name in ("loss", "clip_loss", "distill_loss", "grad_norm"):
            assert float(getattr(outcomes[1], name)) == pytest.approx(float(getattr(outcomes[0], name)), rel=close)
    for name, origin in start.items():
        moved, expected = (flat(getattr(trainer, name)) - origin for trainer in (small, large))
        assert float(expected.norm()) > 0
        assert float((moved - expected).norm() / expected.norm()) < near, name
    assert small.scales() == pytest.approx(large.scales(), rel=close)
    assert small.state.flops == pytest.approx(large.state.flops, rel=1e-12)  # useful work only
    assert replace(small.state, flops=large.state.flops) == large.state


def test_fit_with_all_negatives_logs_and_resumes_like_any_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "run.accumulate_steps=2", "run.negatives=all", "run.max_steps=3")
    trainer = make_trainer(config)
    trainer.fit()
    assert len(losses_of(trainer)) == 3
    assert rows_of(trainer)[-1]["samples_seen"] == 24
    twin = make_trainer(replace(config, name="twin"))
    twin.fit()
    assert losses_of(twin) == losses_of(trainer)


def test_a_run_says_how_to_have_the_published_batch(tmp_path: Path, caplog) -> None:
    hint = ("run.published_batch=12", "run.max_steps=1")
    with caplog.at_level("WARNING", logger="cosmos_fast"):
        make_trainer(tiny_config(tmp_path, *hint)).fit()
        assert "global batch of 12, this run has 4: run.accumulate_steps=3 with run.negatives=all" in caplog.text
        caplog.clear()
        all_of_it = ("name=whole", "run.accumulate_steps=3", "run.negatives=all")
        make_trainer(tiny_config(tmp_path, *hint, *all_of_it)).fit()
        assert "published" not in caplog.text
        make_trainer(tiny_config(tmp_path, *hint, "name=large", "run.batch_size=12")).fit()
        assert "published" not in caplog.text
        make_trainer(tiny_config(tmp_path, *hint, "name=small", "run.batch_size=2")).fit()
        assert "global batch of 12, this run has 2: run.accumulate_steps=6 with run.negatives=all" in caplog.text


def test_rank_0_alone_warns_of_the_whole_run(tmp_path: Path, caplog) -> None:
    trainer = make_trainer(tiny_config(tmp_path, "run.published_batch=12", "schedule.warmup_steps=99"))
    for rank, warnings in ((1, 0), (0, 2)):
        trainer.ranks = replace(trainer.ranks, rank=rank)
        with caplog.at_level("WARNING", logger="cosmos_fast"):
            announce(trainer)
        assert len(caplog.records) == warnings


def test_graphs_do_not_outlive_the_step(tmp_path: Path) -> None:
    trainer, gradients = make_gradients(tmp_path)
    kept: list[CosmosFeatures] = []
    forward = trainer.student.forward
    trainer.student.forward = lambda *inputs: kept.append(forward(*inputs)) or kept[-1]  # type: ignore[method-assign]
    batches = make_batches(trainer, (2, 2, 2))
    before = copy.deepcopy([batch.texts for batch in batches])
    gradients.accumulate(batches)
    assert [features.image.requires_grad for features in kept] == [False, False, True, True, True]
    assert all(torch.equal(batch.texts, texts) for batch, texts in zip(batches, before, strict=True))

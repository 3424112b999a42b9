"""`bench step`: recipes, made-up global batches, both ledgers, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import bench_step, step_setting
from benchmarks.compiled_port import CompiledTrainer
from benchmarks.eager_cosmos import EagerCosmos, EagerTrainer
from benchmarks.other_ranks import AmongOtherRanks, OtherRanks
from benchmarks.rows import Row
from benchmarks.shapes import GLOBAL_VIEWS, mini_step, recipe_step, vit_b_16_step
from benchmarks.step_setting import Bars, Setting
from cosmos_fast.cli import bench
from cosmos_fast.cli.main import run
from cosmos_fast.config import ModelConfig
from cosmos_fast.loss import CosmosLoss
from cosmos_fast.recipes import RECIPES, get_recipe
from cosmos_fast.utils.peak_rates import PeakRate

SHAPE = mini_step(width=64, layers=1, batch=2)


@pytest.fixture(autouse=True)
def _rate(monkeypatch) -> None:
    monkeypatch.setattr(bench_step, "matmul_flops_per_s", lambda device, dtype: 1e11)


def test_a_recipe_among_other_ranks_is_measured_with_the_ledger_of_both_sides(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    small = "model.vision={image_size: 48, patch_size: 8, width: 32, layers: 1, head_width: 32}"
    arguments = ["step", "--recipe", "demo", "--batch", "2", "--global-batch", "6", "--device", "cpu", "--no-memory"]
    arguments += ["--set", small, "--set", "model.text={context_length: 48, width: 32, heads: 1, layers: 1}"]
    result = CliRunner().invoke(bench.command, [*arguments, "--profile", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = {row["metric"]: row for row in json.loads(out.read_text())}
    row = found["step_ms"]
    assert (row["name"], row["shapes"]["batch"], row["shapes"]["global_batch"]) == ("step_demo_n6", 2, 6)
    assert row["shapes"]["crop_px"] == [48, 24]
    assert row["bar"] == 0.5
    for side in ("", "eager_"):
        parts = [found[f"{side}phase_ms/{name}"]["value"] for name in ("teacher", "student", "loss", "backward")]
        parts += [found[f"{side}phase_ms/{name}"]["value"] for name in ("optimizer", "other")]
        assert sum(parts) == pytest.approx(found[f"{side}phase_ms/wall"]["value"], rel=1e-3)
    assert found["tflops_per_s"]["value"] > 0
    assert "mfu_pct" not in found  # no published rate of a CPU


def test_every_cosmos_recipe_has_a_shape() -> None:
    for name in RECIPES:
        config = get_recipe(name)
        if config.objective == "cosmos":
            shape = recipe_step(config, 3)
            assert ModelConfig.from_openclip(shape.model.to_openclip()) == config.model
            assert shape.local_px == config.data.views.local_image_size
            texts = shape.texts(0)
            assert texts.shape == (8, 3, config.model.text.context_length)
    assert recipe_step(get_recipe("cc3m_vit_b_16"), 256) == vit_b_16_step(256)


def test_local_samples_among_others_have_the_loss_of_the_oracle() -> None:
    setting = Setting("toy", replace(SHAPE, global_batch=7), "cpu", "fp32")
    bench_step.check_agreement(setting)


def test_the_check_of_a_step_is_free_of_tf32_and_the_timing_is_not(monkeypatch) -> None:
    """By default cuDNN's convolutions round to TF32, which puts two of three gradients out of the tolerance."""
    seen: list[tuple[bool, str]] = []
    make_port = bench_step.make_port

    def look(*arguments: object) -> EagerTrainer:
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return make_port(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_step, "make_port", look)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    bench_step.measure_time(Setting("toy", SHAPE, "cpu", "fp32"), 7)
    as_it_was = (True, torch.get_float32_matmul_precision())
    assert seen == [as_it_was, (False, "highest")]  # the port that is timed is made first
    assert torch.backends.cudnn.allow_tf32


def test_the_port_sees_the_whole_global_batch_and_the_product_only_its_columns() -> None:
    """With the others' features those of a real global batch, both give the losses that one rank of it would see."""
    torch.manual_seed(0)
    setting = Setting("toy", replace(SHAPE, global_batch=5), "cpu", "fp32")
    eager = step_setting.make_port(setting)
    images, texts = setting.inputs(0)
    teacher, student = eager.forward_teacher(images, texts), eager.forward_student(images, texts)
    wide_student, wide_teacher, total = eager.gather(student, teacher, 2)  # type: ignore[misc]
    assert total == 5
    assert wide_student.text.shape == (8 * 5, 64)
    assert wide_teacher.image.shape == (GLOBAL_VIEWS * 5, 64)
    own = wide_student.text.unflatten(0, (8, 5))[:, :2]
    assert torch.equal(own, student.text.unflatten(0, (8, 2)))
    norms = torch.linalg.vector_norm(wide_student.image_crossmodal, dim=-1)  # type: ignore[arg-type]
    torch.testing.assert_close(norms, torch.ones_like(norms))
    product = step_setting.make_product(setting, eager.student.state_dict())
    assert isinstance(product.criterion, AmongOtherRanks)
    # No others: the plain loss.
    features = product.student(images, texts)
    targets = product.teacher.encode_views(images[:2], texts[:2])
    alone = AmongOtherRanks(OtherRanks(0, 64, "cpu"))(features, targets)
    assert alone.total.item() == pytest.approx(CosmosLoss()(features, targets).total.item(), rel=1e-6)


def test_flops_count_the_columns_of_the_global_batch_and_the_pruning() -> None:
    texts = SHAPE.texts(0)
    wide = replace(SHAPE, global_batch=512)
    assert wide.flops(texts) > SHAPE.flops(texts)
    assert SHAPE.flops(texts, pruned=False) > SHAPE.flops(texts)


def test_the_port_compiled_computes_what_the_port_computes(monkeypatch) -> None:
    """All but the compiler: which is stood in for, because it takes a minute."""
    compiled: list[object] = []
    monkeypatch.setattr("benchmarks.compiled_port.torch.compile", lambda what: compiled.append(what) or what)
    sides: list[EagerTrainer] = []
    for kind in (EagerTrainer, CompiledTrainer):
        torch.manual_seed(0)
        trainer = kind(EagerCosmos(SHAPE.model))
        trainer.ema_decay = 0.5
        for seed in range(3):
            trainer.step(SHAPE.images(seed), SHAPE.texts(seed), lr=1e-4)
        sides.append(trainer)
    assert len(compiled) == 3
    eager, other = (trainer.losses for trainer in sides)
    assert other.total.item() == pytest.approx(eager.total.item(), rel=1e-5)  # type: ignore[union-attr]


def test_without_a_compiler_that_baseline_is_left_out_and_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)

    def measure_time(setting: Setting, repeats: int) -> list[Row]:
        return [setting.row("step_ms", 1.0, "ms", ratio=0.5)]

    monkeypatch.setattr(bench_step, "measure_time", measure_time)
    arguments = ["step", "--width", "64", "--layers", "1", "--batch", "2", "--device", "cpu", "--no-memory"]
    result = CliRunner().invoke(bench.command, [*arguments, "--compiled", "--out", str(tmp_path / "step.json")])
    assert result.exit_code == 0, result.output
    assert "left out: the port compiled (" in result.output


def test_on_a_gpu_mfu_and_rates_are_held_against_the_bars(monkeypatch) -> None:
    monkeypatch.setattr(bench_step, "peak_rate", lambda device, precision: PeakRate(1e12, "made up"))
    monkeypatch.setattr(Setting, "bars", Bars(eager=0.6, samples_per_s=1e9, mfu_pct=1e-9))
    monkeypatch.setattr(bench_step, "check_agreement", lambda setting: None)
    found = {row.metric: row for row in bench_step.measure_time(Setting("toy", SHAPE, "cpu", "fp32"), 7)}
    assert found["samples_per_s"].meets_bar is False
    assert found["mfu_pct"].meets_bar is True
    assert found["mfu_unpruned_pct"].value > found["mfu_pct"].value
    seconds = found["step_ms"].value / 1e3
    assert found["mfu_pct"].value == pytest.approx(100 * SHAPE.flops(SHAPE.texts(0)) / seconds / 1e12, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--recipe", "demo_clip"], "trains plain CLIP"),
        (["--recipe", "nothing"], "does not exist: did you mean"),
        (["--set", "model.embed_dim=64"], "give --recipe as well"),
        (["--recipe", "demo", "--set", "data.views.local_crops=2"], "leave data.views' counts alone"),
        (["--batch", "8", "--global-batch", "4"], "--global-batch 4 is smaller than the batch of 8"),
        (["--width", "100"], "multiple of 64"),
        (["--recipe", "demo", "--layers", "2"], "leave out --layers"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "no CUDA device")]),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], told: str, capsys) -> None:
    assert run(bench.command, ["step", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1

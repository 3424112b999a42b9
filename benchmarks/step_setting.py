"""What `bench step` measures: a shape, a device, a precision, and the trainers of both sides made for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.compiled_port import CompiledTrainer
from benchmarks.eager_cosmos import EagerCosmos, EagerTrainer
from benchmarks.other_ranks import AmongOtherRanks, OtherRanks
from benchmarks.product import ProductTrainer, made_on
from benchmarks.rows import Row
from benchmarks.shapes import StepShape, mini_step, recipe_step, vit_b_16_step
from cosmos_fast.config import ComputeConfig, load_config
from cosmos_fast.recipes import get_recipe
from cosmos_fast.utils.errors import UserError

Trainer = EagerTrainer | ProductTrainer


@dataclass(frozen=True)
class Bars:
    """Largest ratios asked for, and least rates; None where nothing is."""

    eager: float | None = None
    compiled: float | None = None
    memory: float | None = None
    samples_per_s: float | None = None
    mfu_pct: float | None = None


@dataclass(frozen=True)
class Setting:
    """What is measured, and how. compute: of the product's side."""

    name: str
    shape: StepShape
    device: str
    precision: str
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    @property
    def bars(self) -> Bars:
        """By shape and kind of device: the small step on a CPU, the published model on a GPU."""
        emulated = self.shape.samples_in_loss > self.shape.batch
        if self.device == "cpu":
            return {"step_mini": Bars(0.65, None, 0.7), "step_demo": Bars(0.5)}.get(self.name.split("_n")[0], Bars())
        if self.shape == vit_b_16_step(256):
            return Bars(1 / 1.6, 1 / 1.2, 0.6, 900, 41)
        return Bars(1 / 2.5) if emulated else Bars()

    @property
    def dtype(self) -> torch.dtype:
        """Of the operands of matrix products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def others(self) -> OtherRanks | None:
        """Features of the rest of the global batch."""
        count = self.shape.samples_in_loss - self.shape.batch
        return OtherRanks(count, self.shape.model.embed_dim, self.device) if count else None

    def inputs(self, seed: int) -> tuple[list[Tensor], Tensor]:
        """Images on the device; captions on the host, where loaders leave them."""
        return self.shape.images(seed, self.device), self.shape.texts(seed)

    def row(
        self,
        metric: str,
        value: float,
        unit: str,
        *,
        ratio: float | None = None,
        bar: float | None = None,
        floor_pct: float | None = None,
        baseline: str = "eager port",
    ) -> Row:
        """A figure. ratio: over the baseline's, less is better."""
        changed = self.compute.changed()
        shapes = {**self.shape.describe(), "precision": self.precision, **({"compute": changed} if changed else {})}
        return Row(
            name=self.name,
            device=rows.device_name(self.device),
            shapes=shapes,
            metric=metric,
            value=value,
            unit=unit,
            baseline=None if ratio is None else baseline,
            ratio=ratio,
            bar=bar,
            floor_pct=floor_pct,
        )

    def rate_row(self, metric: str, value: float, unit: str, least: float | None) -> Row:
        """A figure of which more is better; least: what is asked for, as the baseline of a ratio that is 1 at most."""
        if least is None:
            return self.row(metric, value, unit)
        return self.row(metric, value, unit, ratio=least / value, bar=1.0, baseline=f"{least:g} {unit}")


def make_port(setting: Setting, compiled: bool = False) -> EagerTrainer:
    """The eager port of the original, or that port compiled."""
    torch.manual_seed(0)
    kind = CompiledTrainer if compiled else EagerTrainer
    others = setting.others
    with made_on(setting.device):
        student = EagerCosmos(setting.shape.model)
    return kind(student, precision=setting.precision, gather=None if others is None else others.gather)


def make_product(setting: Setting, weights: dict[str, Tensor] | None = None) -> ProductTrainer:
    """weights: under the original's names; None draws fresh ones."""
    others = setting.others
    return ProductTrainer.create(
        setting.shape.model.to_openclip(),
        device=setting.device,
        precision=setting.precision,
        weights=weights,
        compute=setting.compute,
        criterion=None if others is None else AmongOtherRanks(others),
    )


def named_shape(model: str, width: int, layers: int, batch: int | None) -> StepShape:
    """model: "mini" or "ViT-B-16"; width and layers are of the first."""
    if width % 64:
        raise UserError(f"--width {width}: heads are 64 wide, give a multiple of 64")
    return mini_step(width, layers, batch or 16) if model == "mini" else vit_b_16_step(batch or 256)


def recipe_setting(recipe: str, overrides: tuple[str, ...], batch: int | None) -> tuple[StepShape, ComputeConfig]:
    """Shape and way of computing of a recipe, with overrides as in `train --set`."""
    config = load_config(get_recipe(recipe), overrides)
    if config.objective != "cosmos":
        raise UserError(f"recipe {recipe} trains plain CLIP: the baseline is a port of COSMOS, take another recipe")
    views = config.data.views
    if (views.image_views, views.text_views, views.global_crops, views.global_captions) != (8, 8, 2, 2):
        raise UserError("bench step has 2 global and 6 local views of either kind: leave data.views' counts alone")
    return recipe_step(config, batch or config.run.batch_size), config.compute


def widened(shape: StepShape, global_batch: int | None) -> StepShape:
    """The shape with the loss over `global_batch` samples."""
    if global_batch is None or global_batch == shape.batch:
        return shape
    if global_batch < shape.batch:
        raise UserError(f"--global-batch {global_batch} is smaller than the batch of {shape.batch}: give at least that")
    return replace(shape, global_batch=global_batch)

"""The text tower on packed captions against padded ones: time and peak memory of forward and backward.

Captions of 8 views; view 0 returns all its tokens, padding too, as the pooling needs them. Baseline: the eager port,
which pads every caption to the context and runs every block on every token.
Axes: V views, B samples, N = V * B captions, L tokens, M captions that return their tokens, D embedding.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from benchmarks import parts, rows
from benchmarks.eager_cosmos import EagerCosmos
from benchmarks.harness import MIN_REPEATS, assert_agree, exact_fp32, interleave
from benchmarks.memory import peak_mib
from benchmarks.rows import Row
from benchmarks.shapes import GLOBAL_VIEWS, LOCAL_VIEWS, VIT_B_16, StepShape
from cosmos_fast import create_model
from cosmos_fast.model import CosmosModel

VIEWS = GLOBAL_VIEWS + LOCAL_VIEWS
TIME_BAR = 0.6
CHECKED_SAMPLES = 2
Tower = EagerCosmos | CosmosModel


class Setting(NamedTuple):
    """What one run measures: `samples` x 8 captions."""

    samples: int
    layers: int
    device: str
    precision: str

    @property
    def shape(self) -> StepShape:
        """Captions of the published text tower; the vision tower, which does not run, is as small as it can be."""
        vision = {"image_size": 32, "patch_size": 32, "vision_width": 64, "vision_layers": 1}
        model = replace(VIT_B_16, text_layers=self.layers, **vision)  # type: ignore[arg-type]
        tokens = {"global_caption_tokens": (40, 77), "local_caption_tokens": (15, 45)}
        return StepShape(model=model, batch=self.samples, local_px=32, **tokens)  # type: ignore[arg-type]

    def captions(self, seed: int) -> Tensor:
        """On the host, where loaders leave them: each side packs or copies them within the clock."""
        return self.shape.texts(seed)

    def row(self, metric: str, value: float, unit: str, **more: float) -> Row:
        model = self.shape.model
        shapes = {
            "captions": VIEWS * self.samples,
            "text": [model.text_width, model.text_layers, model.text_heads],
            "embed_dim": model.embed_dim,
            "vocab_size": model.vocab_size,
            "context_length": model.context_length,
            "global_caption_tokens": list(self.shape.global_caption_tokens),
            "local_caption_tokens": list(self.shape.local_caption_tokens),
            "token_ratio": round(token_ratio(self), 3),
            "precision": self.precision,
        }
        device, baseline = rows.device_name(self.device), "padded captions, eager port" if more else None
        return Row(
            name="packed_text",
            device=device,
            shapes=shapes,
            metric=metric,
            value=value,
            unit=unit,
            baseline=baseline,
            **more,  # type: ignore[arg-type]
        )


def token_ratio(setting: Setting) -> float:
    """Tokens that are needed (all of view 0, the others up to EOT) over those of the padded run; median of the inputs.

    Of the packed run it is a little more: captions of nearly the same length share a group on a CPU.
    """

    def ratio(seed: int) -> float:
        texts_VBL = setting.shape.texts(seed)
        needed = texts_VBL[0].numel() + int((texts_VBL[1:].argmax(dim=-1) + 1).sum())
        return needed / texts_VBL.numel()

    return statistics.median(ratio(seed) for seed in range(MIN_REPEATS))


def make_eager(setting: Setting) -> EagerCosmos:
    torch.manual_seed(0)
    return EagerCosmos(setting.shape.model).to(setting.device)


def make_product(setting: Setting, weights: Mapping[str, Tensor] | None = None) -> CosmosModel:
    product = create_model(setting.shape.model.to_openclip())
    if weights is not None:
        product.load_reference_state_dict(weights)
    return product.to(setting.device)


def encode(tower: Tower, texts_VBL: Tensor) -> dict[str, Tensor]:
    """Features of all captions and mapped tokens of view 0; the eager port maps the tokens of every caption.

    As in a step: the port gets the padded captions on its device, the product packs them on the host.
    """
    samples = texts_VBL.shape[1]
    if isinstance(tower, EagerCosmos):
        device = tower.logit_scale.device
        features_ND, tokens_NLD = tower.encode_texts(texts_VBL.to(device, non_blocking=True).flatten(0, 1))
        return {"features": features_ND, "tokens": tokens_NLD[:samples]}
    text = tower.run_text(texts_VBL.flatten(0, 1), keep_tokens=samples)
    assert text.tokens_MLW is not None
    return {"features": text.features_ND, "tokens": tower.text_token_mapping(text.tokens_MLW)}


def forward_backward(tower: Tower, precision: str, texts_VBL: Tensor) -> Mapping[str, Tensor]:
    """A fixed direction stands for the gradient of a loss, so that no channel's gradient vanishes."""
    tower.zero_grad()
    with torch.autocast(tower.logit_scale.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        outputs = encode(tower, texts_VBL)
    directions = [
        torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view_as(output)
        for output in outputs.values()
    ]
    torch.autograd.backward(list(outputs.values()), directions)
    return outputs


@exact_fp32()
def check(setting: Setting) -> None:
    """Features, tokens and all gradients, in fp32, against the eager port in fp64."""
    small = setting._replace(samples=CHECKED_SAMPLES, precision="fp32")
    eager = make_eager(small)
    product = make_product(small, eager.state_dict())
    outputs = forward_backward(product, small.precision, small.captions(0))
    expected = forward_backward(eager.double(), small.precision, small.captions(0))
    assert_agree(outputs, expected, rtol=1e-5)
    gradients, expected_gradients = (
        {name: p.grad for name, p in tower.named_parameters() if p.grad is not None} for tower in (product, eager)
    )
    # A key's bias cancels in the softmax: what is left of its gradient is rounding.
    assert_agree(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def measure_time(setting: Setting, repeats: int) -> list[Row]:
    eager = make_eager(setting)
    product = make_product(setting, eager.state_dict())
    timing = interleave(
        partial(forward_backward, eager, setting.precision),
        partial(forward_backward, product, setting.precision),
        setting.captions,
        check=partial(check, setting),
        device=setting.device,
        repeats=repeats,
    )
    return [
        setting.row("eager_forward_backward_ms", timing.baseline_median_ms, "ms"),
        setting.row("forward_backward_ms", timing.candidate_median_ms, "ms", ratio=timing.ratio, bar=TIME_BAR),
    ]


def measure_memory(setting: Setting) -> list[Row]:
    eager_peak, peak = (
        peak_mib(
            partial(run_side, setting, side),
            device=setting.device,
            settle=partial(run_side, setting._replace(samples=1, layers=1), side),
        )
        for side in ("eager", "product")
    )
    return [
        setting.row("eager_peak_mib", eager_peak, "MiB"),
        setting.row("peak_mib", peak, "MiB", ratio=peak / eager_peak),
    ]


def run_side(setting: Setting, side: str) -> None:
    """Build one side and run it: what peak memory is taken of."""
    tower = make_eager(setting) if side == "eager" else make_product(setting)
    forward_backward(tower, setting.precision, setting.captions(0))


@click.command(name="packed_text", help=__doc__, context_settings={"show_default": True})
@click.option("--samples", type=click.IntRange(1), default=16, help="Samples of 8 captions each.")
@click.option("--layers", type=click.IntRange(1), default=4, help="Blocks of the tower.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="cuda: bf16 autocast.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(samples: int, layers: int, device: str, repeats: int, out: Path | None) -> None:
    precision = "bf16" if device == "cuda" else "fp32"
    setting = Setting(samples, layers, device, precision)
    planned = [("time", partial(measure_time, setting, repeats)), ("memory", partial(measure_memory, setting))]
    parts.measure(planned, out)


if __name__ == "__main__":
    command()

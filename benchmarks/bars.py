"""The figures that are asked for, so that a report can say which of them nobody has measured yet.

Whether one is met is decided by the rows themselves, which carry the bar they were measured against. Imports nothing
beyond Python: a GPU check reads this where nothing may hang.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

MET, MISSED, OPEN = "met", "missed", "not measured"


class Figure(Protocol):
    """What is read of a row: `rows.Row` is one."""

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def baseline(self) -> str | None: ...
    @property
    def ratio(self) -> float | None: ...
    @property
    def bar(self) -> float | None: ...


AFigure = TypeVar("AFigure", bound=Figure)


def meets(figure: Figure) -> bool | None:
    """None where there is nothing to meet. A ratio that is not a number meets nothing."""
    return None if figure.ratio is None or figure.bar is None else figure.ratio <= figure.bar


@dataclass(frozen=True)
class Bar:
    """device: "cpu" or "gpu". name, metric, baseline: patterns of rows. limit: the largest ratio, for showing."""

    what: str
    device: str
    name: str
    metric: str
    limit: float
    baseline: str = "*"

    def rows(self, rows: Iterable[AFigure]) -> list[AFigure]:
        """Those that this bar is about, and that were measured where it holds."""
        return [
            row
            for row in rows
            if meets(row) is not None
            and kind_of(row.device) == self.device
            and fnmatchcase(row.name, self.name)
            and fnmatchcase(row.metric, self.metric)
            and fnmatchcase(row.baseline or "", self.baseline)
        ]

    def verdict(self, rows: Iterable[Figure]) -> str:
        """MET where all of its rows are."""
        found = self.rows(rows)
        return OPEN if not found else MET if all(meets(row) for row in found) else MISSED

    def ratios(self, rows: Iterable[Figure]) -> list[float]:
        """What was measured against it."""
        return [row.ratio for row in self.rows(rows) if row.ratio is not None]


def kind_of(device: str) -> str:
    """ "cpu" or "gpu", by the device's name in a row."""
    return "cpu" if device.endswith("threads") else "gpu"


REPEATED, SHARED = "keys and values repeated*", "keys and values once*"
BARS = (
    Bar("whole step, small model, 16 samples", "cpu", "step_mini", "step_ms", 0.65, "eager port"),
    Bar("whole step, small model, 16 samples against 512", "cpu", "step_mini_n512", "step_ms", 0.65, "eager port"),
    Bar("whole step of the demo", "cpu", "step_demo", "step_ms", 0.5, "eager port"),
    Bar("peak memory of the small model's step", "cpu", "step_mini", "peak_mib", 0.7, "eager port"),
    Bar("text tower on packed captions", "cpu", "packed_text", "forward_backward_ms", 0.6),
    Bar("80 pairwise losses, 512 samples", "cpu", "infonce*", "*ms/*512", 0.9, "eager*"),
    Bar("80 pairwise losses, 1024 samples", "cpu", "infonce*", "*ms/*1024", 0.9, "eager*"),
    Bar("their peak memory, 512 samples", "cpu", "infonce", "peak_mib/512", 0.3, "eager port"),
    Bar("their peak memory, 1024 samples", "cpu", "infonce", "peak_mib/1024", 0.2, "eager port"),
    Bar("what they keep for the backward pass", "cpu", "infonce", "saved_mib/*", 0.03, "eager port"),
    Bar("cross-attention pooling", "cpu", "pool", "forward_backward_ms/*", 0.08, REPEATED),
    Bar("cross-attention pooling, shared keys", "cpu", "pool", "forward_backward_ms/*", 0.6, SHARED),
    Bar("what pooling keeps for the backward pass", "cpu", "pool", "saved_mib/*", 0.1, REPEATED),
    Bar("AdamW, average, clipping", "cpu", "optimizer", "step time*", 0.2, "*loop*"),
    Bar("AdamW, average, clipping, fused baseline", "cpu", "optimizer", "step time*", 0.85, "*fused*"),
    Bar("JPEGs to batches, a core", "cpu", "loader", "cpu_ms_per_sample/*", 1 / 1.3),
    Bar("collectives of the losses, ranks", "cpu", "ranks", "loss_collectives/*", 8 / 160, "the original's gathers"),
    Bar("bytes of the losses, ranks", "cpu", "ranks", "loss_received_kib/*", 1 / 20, "the original's gathers"),
    Bar("captions to ids", "cpu", "tokenizer", "batch_ms", 1 / 3),
    Bar("evaluation: images to features, towers alone", "cpu", "eval", "image_ms", 1 / 0.9),
    Bar("evaluation: captions to features, towers alone", "cpu", "eval", "caption_ms", 1 / 0.9),
    Bar("retrieval metrics, 5,000 x 25,000", "cpu", "eval", "retrieval_ms", 1 / 3),
    Bar("their peak memory", "cpu", "eval", "retrieval_peak_mib", 0.1),
    Bar("segmentation windows of several images", "cpu", "eval", "segmentation_ms", 1.0),
    Bar("texts of classes, 80 prompts each", "cpu", "eval", "class_texts_ms", 0.5),
    Bar("whole step, ViT-B/16, 256 samples", "gpu", "step_vit_b_16", "step_ms", 1 / 1.6, "eager port"),
    Bar("whole step against the port compiled", "gpu", "step_vit_b_16", "step_ms/compiled", 1 / 1.2),
    Bar("at least 900 samples a second", "gpu", "step_vit_b_16", "samples_per_s", 1.0),
    Bar("at least 41 % MFU, pruned FLOPs", "gpu", "step_vit_b_16", "mfu_pct", 1.0),
    Bar("peak memory of the whole step", "gpu", "step_vit_b_16", "peak_mib", 0.6, "eager port"),
    Bar("whole step, 32 samples against 4096", "gpu", "step_vit_b_16_n4096", "step_ms", 1 / 2.5, "eager port"),
    Bar("80 pairwise losses, 1024 samples", "gpu", "infonce", "forward_backward_ms/1024", 1 / 10, "eager port"),
    Bar("80 pairwise losses, 4096 samples", "gpu", "infonce", "forward_backward_ms/4096", 1 / 3, "eager port"),
    Bar("80 pairwise losses, 8192 samples", "gpu", "infonce", "forward_backward_ms/8192", 1 / 3, "eager port"),
    Bar("80 pairwise losses, compiled", "gpu", "infonce", "forward_backward_ms/*", 1 / 1.5, "pairs compiled"),
    Bar("80 pairwise losses, Inf-CL", "gpu", "infonce", "forward_backward_ms/*", 1 / 5, "Inf-CL"),
    Bar("one rank's part of a large batch, limit", "gpu", "infonce", "rank_ms/*", 1 / 0.55),
    Bar("losses beyond inputs and gradients", "gpu", "infonce", "peak_mib_beyond*/8192", 0.01),
    Bar("pooling, forward", "gpu", "pool", "forward_us/*", 1.0, "* us"),
    Bar("pooling, backward", "gpu", "pool", "backward_us/*", 1.0, "* us"),
    Bar("pooling, forward, against repeated keys", "gpu", "pool", "forward_us/*", 1 / 15, REPEATED),
    Bar("pooling, forward, shared keys compiled", "gpu", "pool", "forward_us/*", 1 / 1.5, SHARED),
    Bar("attention, padded with a mask", "gpu", "attention", "*ward_us/*", 1 / 1.3, "SDPA on padded*"),
    Bar("attention, FlashAttention's varlen", "gpu", "attention", "*ward_us/*", 1.0, "flash"),
    Bar("attention, PyTorch's varlen", "gpu", "attention", "*ward_us/*", 1.0, "varlen"),
    Bar("LayerNorm with residual, forward, limit", "gpu", "layer_norm", "forward_us/*", 1 / 0.85, "copy rate"),
    Bar("LayerNorm with residual, backward, limit", "gpu", "layer_norm", "backward_us/*", 1 / 0.75, "copy rate"),
    Bar("LayerNorm with residual, all others", "gpu", "layer_norm", "*ward_us/*", 1.0, "[PLq]*"),
    Bar("AdamW, average, norm, copies, time", "gpu", "optimizer", "step time*", 1.0, "* ms"),
    Bar("AdamW, average, norm, copies", "gpu", "optimizer", "step time*", 1 / 3, "*loop*"),
    Bar("AdamW, average, norm, copies, fused baseline", "gpu", "optimizer", "step time*", 1 / 1.15, "*fused*"),
    Bar("cross-entropy of dense logits", "gpu", "distill", "dense_ms/*", 1 / 3, "oracle"),
    Bar("cross-entropy of dense logits, Liger", "gpu", "distill", "dense_ms/*", 1 / 1.3, "Liger KL"),
    Bar("decoded, eight augmented crops: 4,000 samples a second", "gpu", "loader", "samples_per_s/dali", 1.0),
    Bar("data stall of at most 5 %", "gpu", "loader", "stall_pct/dali", 1.0),
    Bar("evaluation: images to features, towers alone", "gpu", "eval", "image_ms", 1 / 0.9),
    Bar("evaluation: captions to features, towers alone", "gpu", "eval", "caption_ms", 1 / 0.9),
    Bar("retrieval metrics, 5,000 x 25,000", "gpu", "eval", "retrieval_ms", 1 / 3),
    Bar("segmentation windows of several images", "gpu", "eval", "segmentation_ms", 1.0),
    Bar("texts of classes, 80 prompts each", "gpu", "eval", "class_texts_ms", 0.5),
    Bar("whole step on real input", "gpu", "loader", "fed_step_ms/dali", 1 / 0.95),
)

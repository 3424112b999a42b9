"""What `bench loader` measures on the host: processor time of a sample, samples a second of all cores, stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import sides
from benchmarks.loader_setting import ORIGINAL, Setting
from benchmarks.rows import Row
from benchmarks.stages import OTHER, watching

BAR = 1 / 1.3  # of the original's processor time
LAP_BATCHES = 2
RATE_BATCHES = 3  # a core
STAGE_BATCHES = 3
CHECKED_SAMPLES = 6
LEVELS = 1.5  # mean difference of pixels, of 255: decoders, resizing and roundings differ, boxes and colours do not
STAGES = {
    "read": ("cosmos_fast.data.index:Index.read", "benchmarks.original_input:OriginalInput.read"),
    "captions": ("cosmos_fast.data.records:parse_record", "cosmos_fast.data.captions:draw_captions"),
    "tokenize": ("cosmos_fast.data.tokenizer:tokenize", "benchmarks.plain_tokenizer:PlainTokenizer.__call__"),
    "check": ("cosmos_fast.data.image_check:checked_image",),
    "draw": ("cosmos_fast.data.augment:draw_views",),
    "decode": ("cosmos_fast.data.images:decode", "benchmarks.original_input:decode"),
    "cut": (
        "cosmos_fast.data.images:to_pixels",
        "cosmos_fast.data.images:cut_box",
        "benchmarks.original_input:cut",
    ),
    "DALI": (  # decodes, and on a GPU it cuts too
        "cosmos_fast.data.dali_pipeline:DaliPipeline.submit",
        "cosmos_fast.data.dali_pipeline:DaliPipeline.collect",
    ),
    "colour": ("cosmos_fast.data.recolor:recolor_", "benchmarks.original_input:recolor"),
    "normalise": (
        "cosmos_fast.data.images:normalize",
        "benchmarks.original_input:to_tensor",
        "benchmarks.original_input:normalize",
    ),
    "collate": ("benchmarks.original_input:collate",),
}


def check(setting: Setting, loaders: Sequence[str]) -> None:
    """Every loader makes the crops and ids of the original, but for the roundings of decoders and resizing."""
    from cosmos_fast.data.images import denormalize

    small = replace(setting, batch=CHECKED_SAMPLES, device="cpu")
    original, *found = (_first(small.source(name, 0)()) for name in ("original", *loaders))
    for name, batch in zip(loaders, found, strict=True):
        assert batch.keys == original.keys, f"{name}: other samples"
        assert torch.equal(batch.texts, original.texts), f"{name}: other ids"
        for view, (ours, theirs) in enumerate(zip(batch.images, original.images, strict=True)):
            error = (denormalize(ours).int() - denormalize(theirs).int()).abs().float().mean().item()
            assert error < LEVELS, f"{name}: view {view} is {error:.2f} levels away from the original's"


def _first(batches: Any) -> Any:
    try:
        return next(batches)
    finally:
        batches.close()


def measure_cores(setting: Setting, loaders: Sequence[str], repeats: int) -> Iterator[Row]:
    """Processor time of a sample; each side is one process, with one thread of each kind."""
    check(setting, loaders)
    makes = {name: setting.source(name, 0) for name in ("original", *loaders)}
    laps = sides.take_turns(makes, batches=LAP_BATCHES, repeats=repeats)
    samples = LAP_BATCHES * setting.batch
    for name in loaders:
        timing = sides.cpu_timing(laps, "original", name)
        ours_ms, theirs_ms = timing.candidate_median_ms / samples, timing.baseline_median_ms / samples
        if name == loaders[0]:
            yield setting.row("original_cpu_ms_per_sample", theirs_ms, "ms")
            yield setting.row("original_samples_per_s_per_core", 1e3 / theirs_ms, "1/s")
        asked: dict[str, Any] = {"baseline": ORIGINAL, "ratio": timing.ratio, "bar": BAR}
        yield setting.row(f"cpu_ms_per_sample/{name}", ours_ms, "ms", **asked)
        yield setting.row(f"samples_per_s_per_core/{name}", 1e3 / ours_ms, "1/s")


def measure_rates(setting: Setting, loaders: Sequence[str], cores: int, repeats: int) -> Iterator[Row]:
    """Samples a second with all cores at work; what was made ahead is taken away before the clock starts.

    Workers decode for the original and the PIL loader; DALI decodes in threads of the training process, and needs but
    few workers to read and tokenize.
    """
    makes = {name: setting.source(name, cores) for name in ("original", *loaders)}
    if "dali" in makes:
        makes["dali"] = replace(setting, threads=max(1, cores - 1)).source("dali", max(1, cores // 8))
    laps = sides.take_turns(makes, batches=RATE_BATCHES * cores, repeats=repeats, ahead=2 * cores + 2, threads=cores)
    samples, shapes = RATE_BATCHES * cores * setting.batch, {"cores": cores}
    for name in loaders:
        timing = sides.wall_timing(laps, "original", name)
        ours, theirs = (1e3 * samples / ms for ms in (timing.candidate_median_ms, timing.baseline_median_ms))
        if name == loaders[0]:
            yield setting.row("original_samples_per_s", theirs, "1/s", shapes=shapes)
        yield setting.row(f"samples_per_s/{name}", ours, "1/s", shapes=shapes)
        ours_ms = timing.candidate_median_ms / samples
        more: dict[str, Any] = {"baseline": ORIGINAL, "ratio": timing.ratio, "shapes": shapes}
        yield setting.row(f"wall_ms_per_sample/{name}", ours_ms, "ms", **more)


def measure_stages(setting: Setting, name: str) -> Iterator[Row]:
    """Milliseconds of a sample by stage, in one process; the stages and "other" sum to "wall"."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batches = setting.source(name, 0)()
    try:
        next(batches)  # imports what it needs
        with watching(STAGES) as stages:
            stages.start()
            for _ in range(STAGE_BATCHES):
                next(batches)
            stages.stop()
    finally:
        batches.close()
        torch.set_num_threads(threads)
    per_sample = 1e3 / (STAGE_BATCHES * setting.batch)
    for stage in (*STAGES, OTHER):
        if stages.seconds[stage] > 0:
            yield setting.row(f"stage_ms/{name}/{stage}", per_sample * stages.seconds[stage], "ms")
    yield setting.row(f"stage_ms/{name}/wall", per_sample * sum(stages.seconds.values()), "ms")

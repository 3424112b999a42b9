"""Figures in the documents are those of the committed results: no table goes stale when a benchmark is run again."""

from __future__ import annotations

import functools
import json
import re
from functools import partial
from pathlib import Path

import pytest

from cosmos_fast.model.flops import sample_flops
from cosmos_fast.recipes import get_recipe

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-threads"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
REPEATED, ONCE = "keys and values repeated per view", "keys and values once a sample"
LOOP, FUSED = "torch AdamW + loop of averages + clip_grad_norm_", "torch AdamW(fused) + foreach lerp + clip_grad_norm_"


@functools.cache
def rows(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def get(name, metric, field="value", baseline=None):
    """One field of the one row of this metric, and of this baseline where several have the metric."""
    found = [row for row in rows(name) if row["metric"] == metric and baseline in (None, row["baseline"])]
    assert len(found) == 1, (name, metric, baseline, len(found))
    return found[0][field]


def phase(name, share=True):
    """Cells of a phase of the demo's step."""
    eager, ours = get("step_demo", f"eager_phase_ms/{name}"), get("step_demo", f"phase_ms/{name}")
    cells = [eager, ours, ours / eager]
    return [*cells, 100 * ours / get("step_demo", "phase_ms/wall")] if share else cells


def ratio(name, metric, baseline=None):
    return get(name, metric, "ratio", baseline)


def against_bar(name, metric, *others):
    """Cells "ratio | bar | ratio of another metric"."""
    return [ratio(name, metric), get(name, metric, "bar"), *(ratio(name, other) for other in others)]


def distilled(form, size):
    pair = [ratio("distill", f"{form}_ms/{size}", name) for name in ("oracle", "oracle, compiled")]
    return [*pair, ratio("distill", f"{form}_peak_mib/{size}")]


def saved(setting):
    """Cells "time | memory" of an option that saves memory."""
    return [ratio("savings", f"{metric}/{setting}") for metric in ("forward_backward_ms", "saved_mib")]


def attention(case):
    metric = f"forward_backward_ms/{case}"
    return [ratio("attention", metric, name) for name in ("sdpa", "SDPA on padded sequences")]


def losses(batch):
    time = [ratio("infonce", f"forward_backward_ms/{batch}"), get("infonce", f"forward_backward_ms/{batch}", "bar")]
    return [*time, ratio("infonce", f"peak_mib/{batch}"), ratio("infonce", f"saved_mib/{batch}")]


def pooling(length):
    metric = f"forward_backward_ms/{length}"
    times = [ratio("pool", metric, name) for name in (REPEATED, ONCE)]
    bars = [get("pool", metric, "bar", name) for name in (REPEATED, ONCE)]
    return [*times, *bars, ratio("pool", f"peak_mib/{length}"), ratio("pool", f"saved_mib/{length}")]


def optimizer():
    metric = "step time, native"
    return [get("optimizer", metric, field, name) for field in ("ratio", "bar") for name in (LOOP, FUSED)]


def loader(kind):
    metric = f"cpu_ms_per_sample/{kind}"
    return [get("loader", "original_cpu_ms_per_sample"), get("loader", metric), *against_bar("loader", metric)]


def tokenizer():
    return [get("tokenizer", "plain_batch_ms"), get("tokenizer", "batch_ms"), *against_bar("tokenizer", "batch_ms")]


def evaluated(metric):
    """Cells "straightforward | here | ratio | bar"."""
    return [get("eval", f"{metric}/baseline"), get("eval", metric), *against_bar("eval", metric)]


def ranks(world, stage):
    """Cells "step | teacher in parts | peak memory | in parts | the plan's step": ms and MiB, the others ratios."""
    case = f"{world} ranks, stage {stage}"
    whole, in_parts = (f"{case}, teacher {copy}" if stage else case for copy in ("whole", "parts"))
    step, peak = (get("ranks", f"{name}/{whole}") for name in ("step_ms", "peak_mib"))
    planned = ratio("ranks", f"plan_step_ms/{whole}")
    if stage == 0:
        return [step, peak, planned]
    return [step, ratio("ranks", f"step_ms/{in_parts}"), peak, ratio("ranks", f"peak_mib/{in_parts}"), planned]


def gathers(world):
    """Cells "collectives | bytes | bytes in bf16 | time" of the losses; but the first, shares of the original's."""
    case = f"{world} ranks"
    shares = [f"loss_received_kib/{case}", f"loss_received_kib/{case}, bf16", f"loss_ms/{case}"]
    return [get("ranks", f"loss_collectives/{case}"), *(ratio("ranks", name) for name in shares)]


PERFORMANCE, KERNELS, DATA, README = "docs/performance.md", "docs/kernels.md", "docs/data.md", "README.md"
SCALE = "docs/scale.md"
RANKED = re.findall(r"^\| (?:(losses) of )?(\d) ranks(?:, stage (\d))? \|", (ROOT / SCALE).read_text(), re.M)
SAVED = {
    "waiting_ms/against_none": "training waits for the save, against no save",
    "background_ms/against_none": "saved in the background, against no save",
    "background_ms/against_waiting": "saved in the background, against waiting",
}
EVALUATED = {
    "image_ms": "JPEGs to features, ViT-B/16, against its tower on pixels in memory, an image",
    "caption_ms": "captions to features, against its tower on ids in memory, a caption",
    "retrieval_ms": "retrieval metrics of 5,000 images and 25,000 captions, against sorting all scores",
    "segmentation_ms": "segmentation into 150 classes, ViT-B/16's width, two blocks, against image by image",
    "class_texts_ms": "80 prompts a class, width 512, two blocks, against class by class with all padding, a class",
    "retrieval_peak_mib": "peak memory of those retrieval metrics, features included, MiB",
}
# Document, how a line begins, the numbers that follow on it.
QUOTED = [
    (PERFORMANCE, "| teacher |", lambda: phase("teacher")),
    (PERFORMANCE, "| student |", lambda: phase("student")),
    (PERFORMANCE, "| loss |", lambda: phase("loss")),
    (PERFORMANCE, "| backward |", lambda: phase("backward")),
    (PERFORMANCE, "| optimizer, teacher's average |", lambda: phase("optimizer")),
    (PERFORMANCE, "| sum |", lambda: phase("wall", share=False)),
    (
        PERFORMANCE,
        "Timed as a whole, both sides in turn, a step takes",
        lambda: [get("step_demo", "step_ms"), get("step_demo", "eager_step_ms"), *against_bar("step_demo", "step_ms")],
    ),
    (
        PERFORMANCE,
        "| whole step, towers of width 192 with 4 blocks, 16 samples (`step_mini.json`) |",
        lambda: against_bar("step_mini", "step_ms", "peak_mib"),
    ),
    (
        PERFORMANCE,
        "| the same with losses against 512 samples, 496 of them made up (`step_mini_n512.json`) |",
        lambda: against_bar("step_mini_n512", "step_ms", "peak_mib"),
    ),
    (
        PERFORMANCE,
        "| whole step of the demo, 64 samples (`step_demo.json`) |",
        lambda: against_bar("step_demo", "step_ms"),
    ),
    (
        PERFORMANCE,
        "| text tower of width 512 with 4 blocks, 128 captions whose tokens fill 51 % of the padded batch, forward and "
        "backward (`packed_text.json`) |",
        lambda: against_bar("packed_text", "forward_backward_ms", "peak_mib"),
    ),
    (PERFORMANCE, "| `checkpoint_activations=mlp` |", lambda: saved("checkpoint_activations=mlp")),
    (PERFORMANCE, "| `checkpoint_activations=blocks` |", lambda: saved("checkpoint_activations=blocks")),
    (PERFORMANCE, "| `compile=true` |", lambda: saved("compile=True")),
    (PERFORMANCE, "| both `compile=true` and `mlp` |", lambda: saved("compile=True, checkpoint_activations=mlp")),
    *((SCALE, f"| {what} |", partial(lambda name: [ratio("checkpoint", name)], name)) for name, what in SAVED.items()),
    *((PERFORMANCE, f"| {what} |", partial(evaluated, metric)) for metric, what in EVALUATED.items()),
    (KERNELS, "| 16 crops of 197 tokens |", lambda: attention("global crops")),
    (KERNELS, "| 48 crops of 37 tokens |", lambda: attention("local crops")),
    (KERNELS, "| 56 captions of 12 to 66 tokens, causal |", lambda: attention("captions")),
    (KERNELS, "| the captions, one query each |", lambda: attention("captions, one query")),
    (KERNELS, "| similarity, 2 x 2 views, B = 512, D = 512 |", lambda: distilled("similarity", "512")),
    (KERNELS, "| similarity, 2 x 2 views, B = 1024, D = 512 |", lambda: distilled("similarity", "1024")),
    (KERNELS, "| dense, M = 256, K = 16384 |", lambda: distilled("dense", "256x16384")),
    (KERNELS, "| InfoNCE, 80 pairs, B = 512, against the original's way |", lambda: losses(512)),
    (KERNELS, "| the same, B = 1024 |", lambda: losses(1024)),
    (
        KERNELS,
        "| InfoNCE against the original's loss compiled pair by pair, B = 512; 1024 |",
        lambda: [ratio("infonce", f"forward_backward_ms/{batch}/pairs_compiled") for batch in (512, 1024)],
    ),
    (KERNELS, "| pooling, B = 32, L = 77, against keys and values repeated; once a sample |", lambda: pooling(77)),
    (KERNELS, "| the same, L = 196 |", lambda: pooling(196)),
    (
        KERNELS,
        "| AdamW + EMA + clipping, 41 M parameters, against torch's AdamW and a loop; fused AdamW and foreach |",
        optimizer,
    ),
    (DATA, "| processor time a sample, PIL loader, ms |", lambda: loader("pil")),
    (DATA, "| the same, DALI loader |", lambda: loader("dali")),
    (DATA, "| captions to ids, 512 captions, against plain Python, ms |", tokenizer),
    (
        DATA,
        "A step of 1.5 s that such a loader feeds on the same two cores took",
        lambda: [ratio("loader", "fed_step_ms/pil")],
    ),
    (DATA, "it waited for", lambda: [get("loader", f"stall_pct/{kind}") for kind in ("pil", "dali")]),
    *(
        (SCALE, f"| losses of {world} ranks |", partial(gathers, world))
        if kind
        else (SCALE, f"| {world} ranks, stage {stage} |", partial(ranks, world, int(stage)))
        for kind, world, stage in RANKED
    ),
    (README, "| JPEGs to batches, processor time a sample |", lambda: loader("pil")[:3]),
    (
        README,
        "| training step, width 192, 4 + 4 blocks, 16 samples of 8 + 8 views |",
        lambda: [get("step_mini", "eager_step_ms"), get("step_mini", "step_ms"), ratio("step_mini", "step_ms")],
    ),
    (
        README,
        "| its peak memory |",
        lambda: [get("step_mini", "eager_peak_mib"), get("step_mini", "peak_mib"), ratio("step_mini", "peak_mib")],
    ),
    (
        README,
        "| pooling, 77 tokens, 8 queries, forward and backward |",
        lambda: [get("pool", "forward_backward_ms/77", name, REPEATED) for name in ("value", "ratio")],
    ),
    (
        README,
        "| text tower, 128 captions, half of the padded batch are tokens |",
        lambda: [ratio("packed_text", "forward_backward_ms")],
    ),
    (
        README,
        "| AdamW, average and clipping, 41 M parameters: against torch's AdamW + a loop of averages |",
        lambda: [get("optimizer", "step time, native", name, LOOP) for name in ("value", "ratio")],
    ),
    (
        README,
        "| the same against torch's fused AdamW + foreach |",
        lambda: [get("optimizer", "step time, native", name, FUSED) for name in ("value", "ratio")],
    ),
]


def shown(document, start):
    """Numbers on the one line that begins so and goes on with one, as text."""
    found = [line.removeprefix(start) for line in (ROOT / document).read_text().splitlines() if line.startswith(start)]
    found = [rest for rest in found if NUMBER.match(rest.lstrip(" |"))]
    assert len(found) == 1, f"{document}: figures follow on {len(found)} lines that begin with {start!r}"
    return NUMBER.findall(found[0])


def agrees(text, value):
    """Rounded as it is shown; results are kept to five digits."""
    digits = len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - value) <= 0.5 * 10**-digits * 1.001 + 1e-4 * abs(value)


@pytest.mark.parametrize(("document", "start", "expected"), QUOTED, ids=[start[:60] for _, start, _ in QUOTED])
def test_a_quoted_figure_is_the_one_in_the_results(document, start, expected):
    found, values = shown(document, start), expected()
    assert len(found) == len(values), (found, values)
    wrong = [(text, value) for text, value in zip(found, values, strict=True) if not agrees(text, value)]
    assert not wrong, f"{document}, {start!r}: shown and measured: {wrong}"


def test_tables_of_ranks_are_found():
    assert {("", "2", str(stage)) for stage in range(4)} | {("losses", "2", ""), ("losses", "4", "")} <= set(RANKED)


def test_rounding():
    assert agrees("1,031", 1031.1)
    assert agrees("0.42", 0.4235)
    assert not agrees("0.42", 0.4271)
    assert not agrees("0.052", 0.053)


@pytest.mark.parametrize(
    ("start", "recipe", "tokens", "samples"),
    [
        ("| ViT-B/16, full captions, global batch 1,024 |", "cc3m_vit_b_16", (77, 77), 1024),
        ("| ViT-B/16, captions of 54 and 30 tokens |", "cc3m_vit_b_16", (54, 30), 1024),
        ("| ViT-B/32, captions of 54 and 30 tokens |", "cc3m_vit_b_32", (54, 30), 1024),
        ("| demo, captions of 33 and 19 tokens |", "demo", (33, 19), 64),
    ],
)
def test_counted_operations_are_those_that_are_quoted(start, recipe, tokens, samples):
    config = get_recipe(recipe)
    lengths = [float(tokens[0])] * 2 + [float(tokens[1])] * 6
    pruned, unpruned = (
        sample_flops(config.model, config.data.views, caption_tokens=lengths, global_batch=samples, pruned=value)
        for value in (True, False)
    )
    student = pruned.student_forward + pruned.student_backward
    values = [pruned.training, unpruned.training, student, pruned.teacher_forward, pruned.loss]
    found = shown(PERFORMANCE, start)
    assert len(found) == len(values)
    assert all(agrees(text, value / 1e9) for text, value in zip(found, values, strict=True)), (found, values)

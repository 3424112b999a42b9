"""From evaluated models and two run folders to the files of a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from cosmos_fast.config.load import dump_config
from cosmos_fast.config.train import TrainConfig
from cosmos_fast.evaluate import record
from cosmos_fast.evaluate.report import examples, findings, page, plots
from cosmos_fast.evaluate.report.runs import Run
from cosmos_fast.evaluate.scenes import SceneSet
from cosmos_fast.evaluate.tasks import TaskResult, pair_features
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.utils.timing import format_duration

Results = Mapping[str, Mapping[str, TaskResult]]


@dataclass(frozen=True)
class Inputs:
    """What a report is made of. results: entity (findings.TEACHER, ...) -> task -> result. checkpoints: its sha256."""

    cosmos: Run
    clip: Run | None
    teacher: CosmosModel
    scenes: SceneSet
    results: Results
    checkpoints: Mapping[str, str]


def flat_results(results: Results) -> dict[str, dict[str, float]]:
    """entity -> all its metrics, with the chance levels as one more entity."""
    flat: dict[str, dict[str, float]] = {}
    chance: dict[str, float] = {}
    for name, tasks in results.items():
        flat[name] = {key: value for task in tasks.values() for key, value in task.metrics.items()}
        for task in tasks.values():
            chance |= task.chance
    flat[findings.CHANCE] = chance
    return flat


def chance_multiple(results: Results) -> float:
    """Image -> text R@1 of the COSMOS teacher over its chance level."""
    retrieval = results[findings.TEACHER]["retrieval"]
    return retrieval.metrics["i2t_r1"] / retrieval.chance["i2t_r1"]


def build_files(inputs: Inputs) -> dict[str, bytes]:
    """Relative name -> bytes: report.html, results.json, plots/*.png."""
    flat = flat_results(inputs.results)
    drawn = plots.training_plots(inputs.cosmos, inputs.clip)
    files = {f"plots/{plot.key}.png": plot.png["light"] for plot in drawn}
    files["results.json"] = record.to_json(results_record(inputs, flat)).encode()
    files["report.html"] = page.render(page_content(inputs, flat, drawn)).encode()
    return files


def page_content(inputs: Inputs, flat: Mapping[str, Mapping[str, float]], drawn: list[plots.Plot]) -> dict[str, Any]:
    """Every name the template uses."""
    scenes = list(inputs.scenes)
    pairs = pair_features(inputs.teacher, inputs.scenes)
    meta = inputs.scenes.meta()
    has_masks = meta is not None and any(scene.mask_HW is not None for scene in scenes)
    teacher = inputs.results[findings.TEACHER]
    return {
        "reading": findings.reading(flat, len(scenes), compute_ratio(inputs)),
        "csa_sentence": findings.csa_sentence(flat),
        "stats": headline_stats(inputs),
        "samples": len(scenes),
        "entities": list(flat),
        "lines": findings.table(flat),
        "protocol": {task: result.protocol for task, result in teacher.items()},
        "plots": drawn,
        "image_queries": examples.image_queries(pairs, scenes),
        "caption_queries": examples.caption_queries(pairs, scenes),
        "attended": examples.attention_examples(inputs.teacher, scenes),
        "segmented": examples.segmentation_examples(inputs.teacher, scenes, meta, "colour")
        if meta and has_masks
        else [],
        "segment_classes": meta.colours.classes if meta else (),
        "views": examples.view_examples(inputs.cosmos.config, inputs.scenes),
        "runs": [run_facts(name, run) for name, run in (("COSMOS", inputs.cosmos), ("plain CLIP", inputs.clip)) if run],
        "machine": record.machine(),
        "versions": record.versions(),
        "data": record.data_record(inputs.scenes),
        "checkpoints": dict(inputs.checkpoints),
    }


def headline_stats(inputs: Inputs) -> list[tuple[str, str]]:
    """(value, what it is) of the tiles at the top."""
    retrieval = inputs.results[findings.TEACHER]["retrieval"].metrics
    cosmos = run_facts("COSMOS", inputs.cosmos)
    return [
        (f"{retrieval['i2t_r1']:.1f} %", "image → text R@1, COSMOS teacher"),
        (f"{chance_multiple(inputs.results):.0f}×", "chance"),
        (cosmos["wall"], f"training time on {record.machine()['cores']} cores"),
        (cosmos["flops"], "training compute"),
    ]


def compute_ratio(inputs: Inputs) -> float | None:
    """Training FLOPs of plain CLIP over those of COSMOS; None where either is unknown."""
    if inputs.clip is None or not inputs.cosmos.total_flops or not inputs.clip.total_flops:
        return None
    return inputs.clip.total_flops / inputs.cosmos.total_flops


def run_facts(name: str, run: Run) -> dict[str, Any]:
    """What it took to train, and its configuration without folders."""
    last = run.train[-1]
    size, unit = plots.flops_scale(run.total_flops)
    return {
        "name": name,
        "steps": last["step"],
        "samples": int(last["samples_seen"]),
        "epochs": f"{last['epoch']:.2f}",
        "wall": format_duration(training_seconds(run)),
        "flops": f"{run.total_flops / size:.3g} {unit}",
        "samples_per_s": f"{last['samples_seen'] / max(training_seconds(run), 1e-9):.1f}",
        "config": config_text(run.config),
    }


def training_seconds(run: Run) -> float:
    """Time in training steps and waiting for data, without evaluations and checkpoints."""
    seconds, before = 0.0, 0
    for row in run.train:
        seconds += (row["samples_seen"] - before) / max(row["samples_per_s"], 1e-9)
        before = row["samples_seen"]
    return seconds


def config_text(config: TrainConfig) -> str:
    """The configuration as YAML; of paths only the last part is shown, a report is made to be passed on."""
    tree = yaml.safe_load(dump_config(config))
    sources = [*(tree["data"].get("train") or []), *(tree["evaluate"].get("data") or [])]
    for source in sources:
        source["path"] = re.split(r"[\\/]", source["path"].rstrip("/\\"))[-1]
    tree["run"].pop("out_dir", None)
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100))


def results_record(inputs: Inputs, flat: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """results.json: all numbers, protocols, digests, versions."""
    runs = {"cosmos": inputs.cosmos, "clip": inputs.clip}
    return {
        "format": "cosmos-fast-report/1",
        "reading": findings.reading(flat, len(list(inputs.scenes)), compute_ratio(inputs)),
        "chance_multiple": chance_multiple(inputs.results),
        "results": {name: record.task_records(tasks) for name, tasks in inputs.results.items()},
        "checkpoints": dict(inputs.checkpoints),
        "data": record.data_record(inputs.scenes),
        "runs": {
            key: {
                "steps": run.train[-1]["step"],
                "samples_seen": run.train[-1]["samples_seen"],
                "flops": run.total_flops,
                "training_seconds": training_seconds(run),
                "model": asdict(run.config.model),
            }
            for key, run in runs.items()
            if run is not None
        },
        "machine": record.machine(),
        "versions": record.versions(),
    }

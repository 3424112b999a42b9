"""Results as a JSON-ready record that says what was measured, on what, with what, and how to read it."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cosmos_fast.evaluate.datasets.sets import EvalSet, task_of
from cosmos_fast.evaluate.scenes import SceneSet
from cosmos_fast.evaluate.tasks import TaskResult
from cosmos_fast.utils import versions as installed
from cosmos_fast.utils.ranks import ONE, Ranks

PACKAGES = ("cosmos-fast", "torch", "numpy", "pillow", "tokenizers")


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    return installed.versions(PACKAGES)


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory and accelerator. No host name, no paths."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_model(), "cores": cores, "memory_gib": memory, "gpu": gpu, "system": platform.system()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def data_record(scenes: SceneSet, ranks: Ranks = ONE) -> dict[str, Any]:
    """Names of the shards (no folders), their digest, and what had to be skipped on any rank; called by every rank,
    of use on the first."""
    skipped: Counter[str] = Counter()
    for counts in ranks.gather(dict(scenes.faults.counts)):
        skipped.update(counts)
    shards = [shard.name for index in scenes.indexes for shard in index.shards]
    digest = scenes.sha256() if ranks.first else ""  # reads every shard
    return {"shards": shards, "samples": len(scenes), "skipped": dict(skipped), "sha256": digest}


def task_records(results: Mapping[str, TaskResult]) -> dict[str, Any]:
    """Task -> metrics, chance, protocol."""
    return {
        task: {"metrics": result.metrics, "chance": result.chance, "protocol": result.protocol}
        for task, result in results.items()
    }


def benchmark_record(found: EvalSet, result: TaskResult) -> dict[str, Any]:
    """What was asked and what came out. sha256: of the questions and their answers, as the reader gives it."""
    return {
        "task": task_of(found),
        "split": found.split,
        "sha256": found.sha256,
        "metrics": result.metrics,
        "chance": result.chance,
        "protocol": result.protocol,
    }


def models_in(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """weights ("teacher", ...) -> what a file says of that model: its checkpoint, tasks, benchmarks."""
    if "models" in content:
        return dict(content["models"])
    return {content["checkpoint"]["weights"]: content}


def to_json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

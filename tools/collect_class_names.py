"""Collect class names and prompt templates of classification sets from wheels of clip-benchmark and timm.

    pip download --no-deps clip-benchmark timm
    python tools/collect_class_names.py clip_benchmark-*.whl timm-*.whl

writes cosmos_fast/evaluate/datasets/assets/classification.json. Nothing of the wheels is imported or run. Sets whose
archives name their classes themselves get templates only.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

ASSET = Path(__file__).parents[1] / "cosmos_fast" / "evaluate" / "datasets" / "assets" / "classification.json"
# Our names for sets -> those of clip-benchmark.
SETS = {
    "imagenet": "imagenet1k",
    "food101": "food101",
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "sun397": "sun397",
    "stanford_cars": "cars",
    "fgvc_aircraft": "fgvc_aircraft",
    "dtd": "dtd",
    "oxford_pets": "pets",
    "flowers102": "flowers",
    "caltech101": "caltech101",
}
NAMED_HERE = ("imagenet", "oxford_pets", "flowers102", "caltech101")


def read_wheels(clip_benchmark: str, timm: str) -> dict[str, dict[str, list[str]]]:
    """Set -> {"templates": with {} for the name, "classes": in the order of labels, "synsets": of ImageNet's}."""
    with zipfile.ZipFile(clip_benchmark) as wheel:
        folder = "clip_benchmark/datasets"
        names = json.loads(wheel.read(f"{folder}/en_classnames.json"))
        templates = json.loads(wheel.read(f"{folder}/en_zeroshot_classification_templates.json"))
    with zipfile.ZipFile(timm) as wheel:
        synsets = wheel.read("timm/data/_info/imagenet_synsets.txt").decode().split()
    found: dict[str, dict[str, list[str]]] = {}
    for ours, theirs in SETS.items():
        found[ours] = {"templates": [template.replace("{c}", "{}") for template in templates[theirs]]}
        if ours in NAMED_HERE:
            found[ours]["classes"] = [" ".join(name.split()) for name in names[theirs]]  # two spaces stand in one name
    found["imagenet"]["synsets"] = synsets
    return found


if __name__ == "__main__":
    ASSET.write_text(json.dumps(read_wheels(*sys.argv[1:]), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

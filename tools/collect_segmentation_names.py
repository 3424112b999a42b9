"""Collect class names and label numbers of segmentation sets from a wheel of mmsegmentation.

    pip download --no-deps mmsegmentation
    python tools/collect_segmentation_names.py mmsegmentation-*.whl

writes cosmos_fast/evaluate/datasets/assets/segmentation.json. Nothing of the wheel is imported or run.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

ASSET = Path(__file__).parents[1] / "cosmos_fast" / "evaluate" / "datasets" / "assets" / "segmentation.json"
# Our names for lists of classes -> functions of mmseg.utils.class_names that return them.
CLASSES = {
    "voc": "voc_classes",
    "context": "pcontext_classes",
    "coco_stuff": "cocostuff_classes",
    "cityscapes": "cityscapes_classes",
    "ade20k": "ade_classes",
}
CONVERTERS = "mmseg/.mim/tools/dataset_converters"


def read_wheel(path: str) -> dict[str, Any]:
    """ "classes": name -> list; "context_labels", "coco_stuff_labels": the original number of every class, in order;
    the first of Pascal Context is the background."""
    with zipfile.ZipFile(path) as wheel:
        names = ast.parse(wheel.read("mmseg/utils/class_names.py"))
        context = ast.parse(wheel.read(f"{CONVERTERS}/pascal_context.py"))
        stuff = ast.parse(wheel.read(f"{CONVERTERS}/coco_stuff164k.py"))
    lists = {
        node.name: ast.literal_eval(statement.value)
        for node in names.body
        if isinstance(node, ast.FunctionDef) and node.name in CLASSES.values()
        for statement in node.body
        if isinstance(statement, ast.Return) and statement.value is not None
    }
    numbers = next(node for node in ast.walk(_assigned(context, "_mapping")) if isinstance(node, ast.List))
    train_ids: dict[int, int] = ast.literal_eval(_assigned(stuff, "clsID_to_trID"))
    return {
        "classes": {ours: [name.strip() for name in lists[theirs]] for ours, theirs in CLASSES.items()},
        "context_labels": sorted(ast.literal_eval(numbers)),
        "coco_stuff_labels": [label for label, train_id in sorted(train_ids.items()) if train_id != 255],
    }


def _assigned(tree: ast.Module, name: str) -> ast.expr:
    """What a module gives to a name."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return node.value
    raise ValueError(f"the wheel has no {name}: it is of another version")


if __name__ == "__main__":
    ASSET.write_text(json.dumps(read_wheel(sys.argv[1]), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

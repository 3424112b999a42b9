"""From a GPU check to the table that `auto` and `cosmos-fast doctor` go by.

    python -m benchmarks.measured benchmarks/results/nvidia-h200/gpu_check.json
    python -m benchmarks.measured folder/gpu_check_tests.json folder/gpu_check_sweeps.json

replaces what `cosmos_fast/ops/measured.json` says of that device: the order of backends by the time of the sweeps, each
from the geometric mean of two neighbouring sizes on, and the backends whose kernel tests passed there, none failing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cosmos_fast.ops import measured

# test_<stem>_<backend>.py tests these operations.
OPERATIONS = {
    "infonce": ("multiview_infonce",),
    "distill": ("distillation_cross_entropy",),
    "distill_dense": ("dense_distillation_cross_entropy",),
    "pool": ("cross_attention_pool",),
    "adamw_ema": ("adamw_ema", "grad_norm"),
    "attention": ("attention",),
    "layer_norm": ("add_layer_norm",),
}

Json = dict[str, Any]


def orders(found: Sequence[Json], commit: str) -> list[Json]:
    """Entries of the table from the rows of sweeps; neighbouring sizes of one order become one entry."""
    times: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in found:
        if row["name"].endswith("_sweep") and row["metric"].startswith("ms/"):
            shapes = row["shapes"]
            sizes = times.setdefault((shapes["op"], row["device"]), {})
            sizes.setdefault(shapes["elements"], {})[shapes["backend"]] = row["value"]
    entries: list[Json] = []
    for (op, device), sizes in times.items():
        ranked = [(elements, sorted(ms, key=lambda name: ms[name])) for elements, ms in sorted(sizes.items())]
        for i, (elements, names) in enumerate(ranked):
            if i + 1 < len(ranked) and ranked[i + 1][1] == names:
                continue
            up_to = math.isqrt(elements * ranked[i + 1][0]) if i + 1 < len(ranked) else None
            entries.append({"op": op, "device": device, "up_to_elements": up_to, "backends": names, "commit": commit})
    return entries


def ran(tests: Mapping[str, Mapping[str, int]], device: str, commit: str) -> list[Json]:
    """Backends whose test module passed: something ran, nothing failed, and the run came to its end."""
    found = []
    for module, counts in tests.items():
        stem, _, backend = module.removeprefix("test_").rpartition("_")
        whole = counts["failed"] == 0 and not counts["unfinished"]
        if stem in OPERATIONS and counts["passed"] > 0 and whole:
            found += [{"op": op, "backend": backend, "device": device, "commit": commit} for op in OPERATIONS[stem]]
    return found


def together(reports: Sequence[Json]) -> Json:
    """The parts of one check as one; of what stands in two, the later counts."""
    first = reports[0]
    for other in reports[1:]:
        for name in ("device", "commit"):
            one, two = first["versions"][name], other["versions"][name]
            if one != two:
                raise click.UsageError(f"reports of {name} {one} and of {two}: give those of one check only")
    rows = [row for report in reports for row in report["rows"]]
    tests = {module: counts for report in reports for module, counts in report["tests"].items()}
    return {"versions": first["versions"], "rows": rows, "tests": tests}


def merge(table: Json, report: Json) -> Json:
    """The table with everything of the report's device replaced."""
    device, commit = report["versions"]["device"], report["versions"]["commit"]
    others = {part: [row for row in table[part] if row["device"] != device] for part in ("order", "ran")}
    return {
        "order": others["order"] + orders([row for row in report["rows"] if row["device"] == device], commit),
        "ran": others["ran"] + ran(report["tests"], device, commit),
    }


def text(table: Json) -> str:
    """JSON, one entry a line."""
    parts = [
        f'"{name}": [' + ",".join(f"\n  {json.dumps(row)}" for row in rows) + ("\n ]" if rows else "]")
        for name, rows in table.items()
    ]
    return "{\n " + ",\n ".join(parts) + "\n}\n"


@click.command(help=__doc__)
@click.argument("reports", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def command(reports: tuple[Path, ...]) -> None:
    report = together([json.loads(path.read_text()) for path in reports])
    table = merge(json.loads(measured.TABLE.read_text()), report)
    measured.TABLE.write_text(text(table))
    click.echo(f"wrote {measured.TABLE}: {len(table['order'])} orders, {len(table['ran'])} backends that ran")


if __name__ == "__main__":
    command()

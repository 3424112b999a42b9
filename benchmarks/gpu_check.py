"""Everything that only a GPU can tell, in one call of under nine minutes: build, kernel tests, benchmarks, sweeps.

    make gpu-check                                                or, which is the same:
    PYTHONPATH=.:kernels python3 benchmarks/gpu_check.py          results go to benchmarks/results/<device>/
    python3 benchmarks/gpu_check.py --out DIR                     two files only: gpu_check.json, gpu_check.tar.gz
    python3 benchmarks/gpu_check.py --only tests                  one part: tests, bench or sweeps; gpu_check_tests.json
    python3 benchmarks/gpu_check.py --dry-run                     what would run, and for how long; needs no GPU
    python3 benchmarks/gpu_check.py --rehearse --out DIR          all of it on a CPU, in small; its figures mean nothing

Needs torch with CUDA, Triton, numpy; pytest for the kernel tests, which pytest-xdist makes faster; click, PyYAML and
safetensors for the benchmarks, ftfy (with wcwidth) and braceexpand for those of loader, tokenizer and evaluation;
matplotlib for pictures; nvcc for the CUDA kernels. No installation: packages may lie in a folder on PYTHONPATH. What a
step lacks is written in its place, and the others run. `gpu_check.json` holds every step from the start ("not run: yet
to come") and is written anew after each, so that a run that is cut off has left what it found. Exit status: 0 all
passed, 1 something failed or did not run, 2 no GPU here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # as a file, Python looks for modules beside it only
    sys.path[0] = str(ROOT)

from benchmarks.gpu_plan import PARTS, Step, only, plan, rehearsed, told  # noqa: E402
from benchmarks.gpu_report import Place, Report  # noqa: E402
from benchmarks.gpu_run import Folders, Interrupted, interruptible, run_all, run_step  # noqa: E402

TOTAL_S = 520.0
PROBE, PROBE_S = ("-m", "benchmarks.machine"), 60.0
CUDA_BIN = "/usr/local/cuda/bin"  # where nvcc lies, on PATH or not
REHEARSAL = {"device": "rehearsal of NVIDIA H200"}


def probe(folders: Folders) -> dict[str, Any]:
    """What `machine.py` says of this machine; {"error": ...} too where it says nothing in time."""
    step = Step(name="machine", command=PROBE, limit_s=PROBE_S, least_s=PROBE_S)
    outcome = run_step(step, PROBE_S, folders)
    for line in reversed(outcome.output_tail.splitlines()):
        if line.startswith("{"):
            found = json.loads(line)
            assert isinstance(found, dict)
            return found
    return {"error": f"asking torch for the GPU {outcome.status}: {outcome.output_tail.strip()[-500:] or 'no word'}"}


def commit() -> str:
    """Of the checkout; else what COSMOS_COMMIT says of a tree that was copied without its history."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return os.environ.get("COSMOS_COMMIT", "unknown")
    return done.stdout.strip() or os.environ.get("COSMOS_COMMIT", "unknown")


def check(facts: dict[str, Any], steps: list[Step], folders: Folders, place: Place, total_s: float) -> int:
    """Run the steps, leave the report; returns the exit status."""
    report = Report({**facts, "commit": commit()}, steps, folders, place)
    path = report.write()
    try:
        run_all(steps, folders, report, total_s)
    except Interrupted as signal:
        report.interrupted()
        print(f"error: stopped by {signal}", file=sys.stderr)
    print(f"written to {path}; not passed: {json.dumps(report.not_passed, indent=1)}")
    return 1 if report.not_passed else 0


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the steps and their time")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in small; give --out")
    parser.add_argument("--out", type=Path, help="folder for one JSON and one archive instead of the results folder")
    parser.add_argument("--only", choices=PARTS, help="one part, for a check in several calls; all need the build")
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="seconds for everything")
    arguments = parser.parse_args()
    if arguments.rehearse and arguments.out is None:
        parser.error("--rehearse: its figures mean nothing, so give them a folder of their own with --out")
    steps = only(arguments.only, plan()) if arguments.only else plan()
    steps = rehearsed(steps) if arguments.rehearse else steps
    if arguments.dry_run:
        print(told(steps, arguments.total_s))
        return 0
    start_s = time.monotonic()
    if Path(CUDA_BIN).is_dir():
        os.environ["PATH"] += os.pathsep + CUDA_BIN
    if arguments.rehearse:
        os.environ["COSMOS_TALLY_FIRST"] = "2"
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder, interruptible():
        folders = Folders.below(Path(folder))
        facts = REHEARSAL if arguments.rehearse else probe(folders)
        if "error" in facts:
            print(f"error: {facts['error']}", file=sys.stderr)
            return 2
        print(json.dumps(facts, indent=1), flush=True)
        slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
        where = arguments.out or ROOT / "benchmarks" / "results" / slug
        place = Place(where, packed=arguments.out is not None, part=arguments.only)
        return check(facts, steps, folders, place, arguments.total_s - (time.monotonic() - start_s))


if __name__ == "__main__":
    sys.exit(main())

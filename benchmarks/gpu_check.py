"""Everything that only a GPU can tell, in one call of under nine minutes: build, kernel tests, sweeps, benchmarks.

    PYTHONPATH=.:kernels python3 benchmarks/gpu_check.py          (or: make gpu-check)
    python3 benchmarks/gpu_check.py --dry-run                     what would run, and for how long; needs no GPU

Needs torch with CUDA and nvcc; no installation. Steps whose packages are missing (pytest, matplotlib, ...) are left
out, and say so. `benchmarks/results/<device>/gpu_check.json` is written anew after every step, so that a run that is
cut off leaves what it found; rows and pictures of the benchmarks lie beside it. Exit status: 0 all passed, 1
something failed or was left out, 2 cannot run here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOTAL_S = 520.0
SHOWN = ("click", "rich", "matplotlib")
TOWER_TESTS = ("tests/kernels/test_attention", "tests/kernels/test_layer_norm")
TOWER_BENCHES = ("rates", "attention", "layer_norm")
VIT_B_16 = ("--model", "ViT-B-16")
PAPER_REGIME = ("--batch", "32", "--global-batch", "4096")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process. It gets `limit_s` if it can, and is left out where less than `least_s` is left for it.

    command: arguments after the Python interpreter; "{budget}" becomes two thirds of the seconds it gets, "{junit}" a
    file of its own for pytest's results. modules: packages it imports, beside torch.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    least_s: float
    modules: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Outcome:
    """status: "passed", "failed", "stopped" (the time was up) or "left out"; `output_tail` says why."""

    name: str
    status: str
    seconds: float
    output_tail: str = ""


def plan() -> list[Step]:
    """All steps, most telling first: a step in front may use what the later ones can spare, not what they need."""
    tests = [f"tests/kernels/{path.name}" for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))]
    tests = [path for path in tests if "emulated" not in path and "compile_ahead" not in path]
    of_towers = [path for path in tests if path.startswith(TOWER_TESTS)]
    others = [path for path in tests if path not in of_towers]
    steps = [
        Step(name="build", command=("benchmarks/build_cuda.py",), limit_s=150, least_s=20),
        *([_tests("kernel tests of the towers", of_towers, limit_s=120, least_s=30)] if of_towers else []),
        _tests("kernel tests", others, limit_s=160, least_s=40),
        _bench("step", *VIT_B_16, "--profile", limit_s=150, least_s=50),  # compiles the port last, for minutes
        _bench("step", *VIT_B_16, *PAPER_REGIME, "--profile", "--no-compiled", limit_s=60, least_s=25),
    ]
    found = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")} - {"step"}
    first = [name for name in TOWER_BENCHES if name in found]
    steps += [_bench(name) for name in first]
    for name in ("infonce", "pool", "optimizer", "distill", "attention", "layer_norm"):
        command = ("-m", "benchmarks.sweeps", name, "--device", "cuda", "--budget-s", "{budget}")
        steps.append(Step(name=f"sweep {name}", command=command, limit_s=50, least_s=15, modules=SHOWN))
    return steps + [_bench(name) for name in sorted(found.difference(first))]


def _tests(name: str, paths: Sequence[str], limit_s: float, least_s: float) -> Step:
    command = ("-m", "pytest", *paths, "-q", "-rs", "-p", "no:cacheprovider", "--junitxml={junit}")
    if importlib.util.find_spec("xdist"):
        command += ("-n", "4")  # four processes share the GPU and compile side by side
    return Step(name=name, command=command, limit_s=limit_s, least_s=least_s, modules=("pytest",))


def _bench(name: str, *options: str, limit_s: float = 50, least_s: float = 12) -> Step:
    command = ("-m", f"benchmarks.bench_{name}", "--device", "cuda", *options)
    return Step(
        name=" ".join(("bench", name, *options)), command=command, limit_s=limit_s, least_s=least_s, modules=SHOWN
    )


def allowance(step: Step, later: Sequence[Step], remaining_s: float) -> float:
    """Seconds the step may take: its limit, less if the later ones would not get their least; 0 to leave it out."""
    spare_s = remaining_s - sum(other.least_s for other in later)
    allowed_s = min(step.limit_s, max(spare_s, step.least_s), remaining_s)
    return allowed_s if allowed_s >= step.least_s else 0.0


def run_all(steps: Sequence[Step], report: dict[str, object], out: Path, total_s: float = TOTAL_S) -> list[Outcome]:
    """Run the steps within the total; `report` with their outcomes is written to `out` after each."""
    end = time.monotonic() + total_s
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, step in enumerate(steps):
            missing = [name for name in step.modules if importlib.util.find_spec(name) is None]
            allowed_s = allowance(step, steps[i + 1 :], end - time.monotonic())
            if missing:
                outcome = Outcome(name=step.name, status="left out", seconds=0, output_tail=f"no {', '.join(missing)}")
            elif allowed_s == 0:
                outcome = Outcome(name=step.name, status="left out", seconds=0, output_tail="no time left")
            else:
                outcome = run_step(step, allowed_s, Path(folder) / f"{i}.xml")
            print(f"== {outcome.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
            outcomes.append(outcome)
            report["steps"] = [asdict(done) for done in outcomes]
            report["tests"] = test_results(Path(folder))
            report["rows"] = rows_beside(out)
            write(report, out)
    return outcomes


def run_step(step: Step, allowed_s: float, junit: Path) -> Outcome:
    """Run one step in a process group of its own, which is ended as a whole when the time is up."""
    values = {"budget": f"{allowed_s * 2 / 3:.0f}", "junit": str(junit)}
    command = [sys.executable, *(part.format(**values) for part in step.command)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *_python_path()])}
    print(f"$ {' '.join(command)}   (at most {allowed_s:.0f} s)", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "passed" if process.wait(allowed_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "stopped"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        told = output.read()
    print(told[-12000:], flush=True)
    return Outcome(name=step.name, status=status, seconds=round(time.monotonic() - start, 1), output_tail=told[-6000:])


def _python_path() -> list[str]:
    """What the caller put there: packages carried along, perhaps."""
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def test_results(folder: Path) -> dict[str, dict[str, int]]:
    """Of each test module how many tests passed, failed and were skipped, from pytest's files in the folder.

    A run of pytest that was stopped has left none, or a part.
    """
    found: dict[str, dict[str, int]] = {}
    cases: list[ET.Element] = []
    for path in sorted(folder.glob("*.xml")):
        with contextlib.suppress(ET.ParseError):
            cases += ET.parse(path).iter("testcase")
    for case in cases:
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        module = re.sub(r"^tests\.\w+\.", "", case.get("classname", "")).split(".")[0]
        counts = found.setdefault(module, {"passed": 0, "failed": 0, "skipped": 0})
        counts[kind] += 1
    return found


def rows_beside(out: Path) -> list[object]:
    """The rows of every benchmark in the folder."""
    found: list[object] = []
    for path in sorted(out.parent.glob("*.json")):
        if path != out:
            found += json.loads(path.read_text())
    return found


def write(report: dict[str, object], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_suffix(".new")
    fresh.write_text(json.dumps(report, indent=1) + "\n")
    fresh.replace(out)


def versions() -> dict[str, object]:
    """What the figures depend on."""
    import torch

    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", nvcc)
    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    packages = ("triton", "numpy", "pytest", "matplotlib")
    from importlib import metadata

    return {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": release[1] if release else "unknown",
        "commit": git.stdout.strip() or "unknown",
        **{name: metadata.version(name) for name in packages if importlib.util.find_spec(name)},
    }


def why_not_here() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "no usable CUDA device: gpu-check needs an NVIDIA GPU and a CUDA build of torch"
    if shutil.which("nvcc") is None:
        return "no nvcc on PATH: install the CUDA toolkit, or add its bin folder to PATH"
    return None


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the steps and their time")
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="seconds for everything")
    arguments = parser.parse_args()
    steps = plan()
    if arguments.dry_run:
        for step in steps:
            print(f"{step.name:16} {step.least_s:4.0f} to {step.limit_s:4.0f} s   python {' '.join(step.command)}")
        print(f"{'at most':16} {arguments.total_s:12.0f} s; needs {sum(step.least_s for step in steps):.0f} s")
        return 0
    if reason := why_not_here():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    found = versions()
    print(json.dumps(found, indent=1), flush=True)
    slug = re.sub(r"[^a-z0-9]+", "-", str(found["device"]).lower()).strip("-")
    out = ROOT / "benchmarks" / "results" / slug / "gpu_check.json"
    outcomes = run_all(steps, {"versions": found}, out, arguments.total_s)
    wrong = {outcome.name: outcome.status for outcome in outcomes if outcome.status != "passed"}
    print(f"written to {out.relative_to(ROOT)}; not passed: {wrong or 'nothing'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a GPU check runs, in which order, and for how long. Imports nothing beyond Python, see `gpu_check.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What every benchmark imports, beside torch and numpy; rich and matplotlib where they are.
COMMANDS = ("click", "yaml", "safetensors")
INPUT = ("PIL", "tokenizers", "ftfy", "braceexpand")
VIT_B_16 = ("--model", "ViT-B-16")
PAPER_REGIME = ("--batch", "32", "--global-batch", "4096")
KERNEL_TESTS = "kernel tests"
PARTS = {"tests": KERNEL_TESTS, "bench": "bench ", "sweeps": "sweep "}  # of a check in several calls
# Compiling what they launch takes a core one to two minutes each, so their tests are spread over processes.
LARGE_MODULES, WORKERS = 4, 4
SWEPT = ("infonce", "pool", "optimizer", "distill", "attention", "layer_norm")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process. It gets `limit_s` if it can, and does not run where less than `least_s` is left for it.

    command: arguments after the Python interpreter, in which {out} is the folder for results and {budget} two thirds of
    the seconds that the step gets. modules: packages it imports, beside torch. programs: commands it calls.
    together: neighbours with the same word run side by side, within the limits of the first of them.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    least_s: float
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    together: str | None = None

    @property
    def slug(self) -> str:
        """A file name."""
        return "".join(letter if letter.isalnum() else "_" for letter in self.name).strip("_")


def plan() -> list[Step]:
    """Build, correctness of every kernel, whatever has a bar, and the rest."""
    build = ("benchmarks/build_cuda.py",)
    # Sources compile side by side; the slowest takes 16 s of a core, to which torch's import and a slow machine come.
    steps = [Step(name="build", command=build, limit_s=150, least_s=36, programs=("nvcc",)), *_kernel_tests()]
    steps += [
        _bench("infonce", limit_s=75, least_s=20),
        _bench("pool"),
        _bench("attention"),
        _bench("optimizer"),
        _bench("layer_norm"),
        _bench("step", *VIT_B_16, "--profile", out="step_vit_b_16", limit_s=150, least_s=65),  # compiles the port last
        _bench("step", *VIT_B_16, *PAPER_REGIME, "--profile", "--no-compiled", out="step_vit_b_16_n4096", least_s=25),
        _bench("distill"),
        _bench("loader", modules=INPUT, limit_s=120, least_s=40),
        _bench("tokenizer", modules=INPUT),
        _bench("eval", modules=INPUT, limit_s=90),
        _bench("rates"),
    ]
    for name in SWEPT:
        command = ("-m", "benchmarks.sweeps", name, "--device", "cuda", "--budget-s", "{budget}", "--folder", "{out}")
        steps.append(Step(name=f"sweep {name}", command=command, limit_s=50, least_s=6, modules=COMMANDS))
    found = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    placed = {step.name.split()[1] for step in steps if step.name.startswith("bench ")}
    steps += [_bench(name, least_s=10) for name in sorted(found - placed)]
    page = ("-m", "benchmarks.report", "--results", "{out}", "--out", "{out}/report.html")
    return [
        *steps,
        Step(name="report", command=page, limit_s=40, least_s=8, modules=(*COMMANDS, "jinja2", "matplotlib")),
    ]


def only(part: str, steps: list[Step]) -> list[Step]:
    """The steps of one of `PARTS`, with the build, which each call needs, and the page, which tests do not fill."""
    also = ("build",) if part == "tests" else ("build", "report")
    return [step for step in steps if step.name.startswith((PARTS[part], *also))]


def rehearsed(steps: list[Step]) -> list[Step]:
    """The same on a CPU, without a GPU: benchmarks see a CUDA device that is none, nothing is built."""
    return [replace(step, command=_rehearsed(step.command)) for step in steps if step.name != "build"]


def _rehearsed(command: tuple[str, ...]) -> tuple[str, ...]:
    module = command[1].removeprefix("benchmarks.")
    if command[0] == "-m" and (module == "sweeps" or module.startswith("bench_")):
        return ("-m", "benchmarks.rehearsal", module, *command[2:])
    return command


def groups(steps: list[Step]) -> list[list[Step]]:
    """Steps that run side by side, in order; most are alone."""
    numbered = enumerate(steps)
    keyed = groupby(numbered, key=lambda pair: pair[1].together or pair[0])
    return [[step for _, step in members] for _, members in keyed]


def _kernel_tests() -> list[Step]:
    """A process a module, because an illegal access ends what a process can do with the GPU; several for large ones,
    where pytest-xdist is there."""
    paths = (ROOT / "tests" / "kernels").glob("test_*.py")
    # What emulates a GPU, or compiles for several, needs none. Large modules first: they take longest.
    chosen = [path for path in paths if not any(word in path.stem for word in ("emulated", "compile_ahead"))]
    chosen.sort(key=lambda path: (-path.stat().st_size, path.name))
    options = ("-q", "-rs", "-p", "no:cacheprovider", "-p", "benchmarks.tally")
    spread = ("-n", str(WORKERS), "--dist", "load") if find_spec("xdist") else ()
    return [
        Step(
            name=f"{KERNEL_TESTS}: {path.stem}",
            command=("-m", "pytest", f"tests/kernels/{path.name}", *options, *(spread if i < LARGE_MODULES else ())),
            limit_s=300,
            least_s=90,
            modules=("pytest",),
            together=KERNEL_TESTS,
        )
        for i, path in enumerate(chosen)
    ]


def _bench(
    name: str,
    *options: str,
    out: str | None = None,
    limit_s: float = 50,
    least_s: float = 12,
    modules: tuple[str, ...] = (),
) -> Step:
    where = ("--out", f"{{out}}/{out or name}.json")
    return Step(
        name=" ".join(("bench", name, *options)),
        command=("-m", f"benchmarks.bench_{name}", "--device", "cuda", *options, *where),
        limit_s=limit_s,
        least_s=least_s,
        modules=(*COMMANDS, *modules),
    )


def told(steps: list[Step], total_s: float) -> str:
    """The plan for people."""
    lines = [
        f"{step.least_s:4.0f} to {step.limit_s:4.0f} s   {step.name}\n{'':17}{Path(sys.executable).name} "
        f"{' '.join(step.command)}"
        for step in steps
    ]
    needed_s = sum(members[0].least_s for members in groups(steps))
    return "\n".join([*lines, f"at most {total_s:.0f} s; needs {needed_s:.0f} s; '{KERNEL_TESTS}' run side by side"])

"""First run on a GPU: builds the CUDA library, runs the kernel tests and the GPU benchmarks, writes one JSON.

    PYTHONPATH=.:kernels python3 benchmarks/gpu_check.py          (or: make gpu-check)

Needs torch with CUDA, pytest and nvcc; no installation of this package. Exit status: 0 all passed, 1 something failed,
2 cannot run here.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LIBRARY_DIR = ROOT / "kernels" / "cosmos_kernels" / "_lib"
BENCHMARKS = (["benchmarks.bench_optimizer", "--device", "cuda"],)


def run(command: list[str], timeout_s: float = 500.0) -> dict[str, object]:
    """Run a command in the checkout, echo it; returns its name, status, seconds and the end of its output."""
    print("$", " ".join(command), flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = -1, f"{error.stdout or ''}\nstopped after {timeout_s:.0f} s"
    print(output, flush=True)
    seconds = round(time.perf_counter() - start, 2)
    return {"command": " ".join(command), "status": status, "seconds": seconds, "output_tail": output[-4000:]}


def build() -> dict[str, object]:
    """Compile csrc/ for this GPU's architecture with nvcc, warnings as errors, into the folder the loader looks in."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if major >= 9 else "")
    LIBRARY_DIR.mkdir(parents=True, exist_ok=True)
    command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-Werror=all-warnings", "-Xptxas=-v", "-shared"]
    command += ["-Xcompiler=-fPIC,-fvisibility=hidden", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-o", str(LIBRARY_DIR / "libcosmos_cuda.so"), "csrc/adamw_ema_cuda.cu"]
    return run(command)


def versions() -> dict[str, object]:
    """What the figures depend on."""
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", nvcc)
    return {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": release[1] if release else "unknown",
    }


def main() -> int:
    """Build, test, measure; see the module's docstring."""
    if not torch.cuda.is_available():
        print("error: no usable CUDA device: gpu-check needs an NVIDIA GPU and a CUDA build of torch", file=sys.stderr)
        return 2
    if shutil.which("nvcc") is None:
        print("error: no nvcc on PATH: install the CUDA toolkit, or add its bin folder to PATH", file=sys.stderr)
        return 2
    report: dict[str, object] = {"versions": versions()}
    print(json.dumps(report["versions"], indent=1), flush=True)
    steps = [build()]
    if steps[0]["status"] == 0:
        steps.append(run([sys.executable, "-m", "pytest", "tests/kernels", "-q", "-rs"]))
        steps += [run([sys.executable, "-m", *arguments]) for arguments in BENCHMARKS]
    report["steps"] = steps
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = ROOT / "benchmarks" / "results" / slug / "gpu_check.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [step["command"] for step in steps if step["status"] != 0]
    print(f"written to {out.relative_to(ROOT)}; failed: {failed or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

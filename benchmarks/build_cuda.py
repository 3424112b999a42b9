"""Builds the CUDA library of csrc/ with nvcc alone, for the GPU at hand: where neither pip nor CMake is to be used.

    python benchmarks/build_cuda.py                # for this machine's GPU, into the folder the loader looks in

The same sources as in CMakeLists.txt (every csrc/*.cu), compiled side by side, warnings as errors. Needs torch only to
ask for the GPU's architecture.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "kernels" / "cosmos_kernels" / "_lib" / "libcosmos_cuda.so"
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Werror=all-warnings", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden")


def sources() -> list[Path]:
    """What the library is made of; CMakeLists.txt takes the same."""
    return sorted((ROOT / "csrc").glob("*.cu"))


def architecture(major: int, minor: int) -> str:
    """nvcc's name of a compute capability; from 9.0 with the instructions that only this generation has."""
    return f"{major}{minor}" + ("a" if major >= 9 else "")


def compile_command(source: Path, target: Path, arch: str) -> list[str]:
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    return ["nvcc", *FLAGS, code, "-c", str(source.relative_to(ROOT)), "-o", str(target)]


def build(arch: str, library: Path = LIBRARY) -> None:
    """Compile and link; CalledProcessError with nvcc's words in its output if a source does not compile."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources()]
        list(pool.map(lambda pair: _run(compile_command(*pair, arch)), zip(sources(), objects, strict=True)))
        # Linked beside and renamed: a process that has the old library loaded keeps it whole.
        fresh = library.with_suffix(".new")
        _run(["nvcc", "-shared", f"-arch=sm_{arch}", "-o", str(fresh), *map(str, objects)])
        fresh.replace(library)


def _run(command: list[str]) -> None:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"$ {' '.join(command)}   ({time.perf_counter() - start:.1f} s)\n{done.stdout}", flush=True)
    done.check_returncode()


def main() -> int:
    import torch

    try:
        build(architecture(*torch.cuda.get_device_capability()))
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd)} failed", file=sys.stderr)
        return 1
    print(f"built {LIBRARY.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

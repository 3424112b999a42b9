"""Compiles every Triton kernel of this package for GPUs that are not here, and reads what it costs.

A module `*_triton.py` (or `*_triton_*.py`) names the specialisations that its launchers use in `COMPILE_AHEAD`. Each is
compiled with Triton's own compiler and assembler; registers, stack, shared memory and instructions are read from the
machine code. The CUDA kernels of csrc/ are read from the built library. No GPU and no driver is needed.

    python -m cosmos_kernels.compile_ahead               # one JSON row a kernel and architecture
    python -m cosmos_kernels.compile_ahead --only pool
    python -m cosmos_kernels.compile_ahead --known docs/kernel_resources.json   # compiles what is new to the table

`docs/kernel_resources.md` shows the rows; `tests/kernels/resources.py` keeps it and says what may not get worse.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import cosmos_kernels
from cosmos_kernels import native, triton_support
from cosmos_kernels.machine_code import Code, demangle, kernels_in
from cosmos_kernels.triton_support import MAX_SHARED_BYTES, AheadCase


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel uses.

    registers: per thread. stack_bytes, local_accesses (instructions that load or store thread-local memory): zero
    unless registers spill. shared_bytes: per block. mma: tensor-core instructions in the code, by name.
    """

    module: str
    case: str
    arch: int
    registers: int
    stack_bytes: int
    local_accesses: int
    shared_bytes: int
    mma: dict[str, int]

    @property
    def key(self) -> str:
        return f"{self.module}/{self.case}/sm_{self.arch}"

    @property
    def spills(self) -> bool:
        return self.stack_bytes > 0 or self.local_accesses > 0


def triton_modules() -> list[str]:
    """Names of the modules of this package that hold Triton kernels."""
    names = (module.name for module in pkgutil.iter_modules(cosmos_kernels.__path__))
    return sorted(name for name in names if re.search(r"_triton(_|$)", name))


def cases(only: str = "") -> Iterator[tuple[str, AheadCase]]:
    """Module and case of everything to compile; a name occurs once a module."""
    for module in triton_modules():
        if only not in module:
            continue
        listed: list[AheadCase] = import_module(f"cosmos_kernels.{module}").COMPILE_AHEAD
        names = [case.name for case in listed]
        assert len(set(names)) == len(names), f"{module}: a name occurs twice in COMPILE_AHEAD: {sorted(names)}"
        for case in listed:
            yield module, case


def compile_case(module: str, case: AheadCase, arch: int) -> Resources:
    """Compile one case for one architecture.

    Raises:
        RuntimeError: it does not compile, or asks for more shared memory than a block can have; says which and why.
    """
    where = f"{module}: {case.name} for sm_{arch}"
    try:
        compiled = _compile(case, arch)
    except Exception as error:
        raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error
    shared_bytes = compiled.metadata.shared
    if shared_bytes > MAX_SHARED_BYTES[arch]:
        raise RuntimeError(
            f"{where}: wants {shared_bytes} bytes of shared memory, a block has {MAX_SHARED_BYTES[arch]}"
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = kernels_in(Path(file.name))
    return _resources(code, module=module, case=case.name, arch=arch, shared_bytes=shared_bytes)


def inputs_of(module: str, case: AheadCase, arch: int) -> str:
    """Hash of all that the compiler is given, itself included: the same inputs make the same machine code.

    The kernel's source with all that it calls, as Triton hashes it for its cache; raises as the compiler would.
    """
    import triton

    arguments = sorted(map(str, (*case.signature.items(), *case.constexprs.items())))
    given = (triton.__version__, module, case.name, arch, arguments, _options(case), _source(case).hash())
    return sha256(repr(given).encode()).hexdigest()[:16]


def _compile(case: AheadCase, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(_source(case), target=GPUTarget("cuda", arch, 32), options=_options(case))


def _options(case: AheadCase) -> dict[str, Any]:
    return {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}


def _source(case: AheadCase) -> Any:
    from triton.compiler import ASTSource

    kernel = case.kernel
    while hasattr(kernel, "fn") and not hasattr(kernel, "arg_names"):
        kernel = kernel.fn  # heuristics, autotuning
    names = list(kernel.arg_names)
    wrong = set(names) ^ (case.signature.keys() | case.constexprs.keys())
    assert not wrong, f"arguments that only the kernel or only the case has: {sorted(wrong)}"
    divisible = [name for name, kind in case.signature.items() if kind.startswith("*") or name in case.divisible_by_16]
    return ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in case.constexprs else case.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )


def library_resources(path: Path) -> list[Resources]:
    """The CUDA kernels of a built library of csrc/, by source file; `shared_bytes` is what they declare statically."""
    codes = kernels_in(path)
    names = demangle([code.name for code in codes])
    return [
        _resources(code, module=f"csrc/{code.source}", case=name, arch=code.arch, shared_bytes=code.static_shared_bytes)
        for code, name in zip(codes, names, strict=True)
    ]


def _resources(code: Code, *, module: str, case: str, arch: int, shared_bytes: int) -> Resources:
    return Resources(
        module=module,
        case=case,
        arch=arch,
        registers=code.registers,
        stack_bytes=code.stack_bytes,
        local_accesses=code.local_accesses,
        shared_bytes=shared_bytes,
        mma=code.mma,
    )


def main() -> int:
    """Print one JSON row a kernel, with an "error" where it does not compile; exit status 2 under the interpreter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Triton modules whose name contains this; csrc/ is left out then")
    parser.add_argument("--triton", action="store_true", help="leave csrc/ out")
    parser.add_argument("--known", type=Path, help="a table of rows: what has the same inputs is not compiled again")
    only, file = (parsed := parser.parse_args()).only, parsed.known
    table = json.loads(file.read_text()) if file is not None and file.exists() else {}
    known = {row["inputs"]: row for rows in table.values() for row in rows if "inputs" in row}
    if triton_support.INTERPRETED:
        print("error: TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it", file=sys.stderr)
        return 2
    for module, case in cases(only):
        for arch in case.archs:
            inputs = ""
            try:
                inputs = inputs_of(module, case, arch)
                row = known.get(inputs) or {**asdict(compile_case(module, case, arch)), "inputs": inputs}
                print(json.dumps(row), flush=True)
            except RuntimeError as error:
                print(f"error: {error}", file=sys.stderr)
                row = {"module": module, "case": case.name, "arch": arch, "error": str(error).splitlines()[0]}
                print(json.dumps(row), flush=True)
    library = native.LIBRARY_DIR / native.LIBRARIES["cuda"]
    if not only and not parsed.triton and library.exists():
        for found in library_resources(library):
            print(json.dumps(asdict(found)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

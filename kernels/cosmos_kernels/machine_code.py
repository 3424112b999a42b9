"""What kernels cost, read from machine code (a cubin or a library) with the cuobjdump that Triton carries."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Tensor-core instructions by generation: mma.sync, wgmma, tcgen05.
MMA_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")


@dataclass(kw_only=True)
class Code:
    """One kernel for one architecture. `source`: the file it came from, where a library says so, else empty."""

    name: str
    arch: int
    source: str
    registers: int
    stack_bytes: int
    static_shared_bytes: int
    opcodes: dict[str, int] = field(default_factory=dict)

    @property
    def local_accesses(self) -> int:
        """Instructions that load or store thread-local memory: zero unless registers spill."""
        return self.opcodes.get("STL", 0) + self.opcodes.get("LDL", 0)

    @property
    def mma(self) -> dict[str, int]:
        return {name: self.opcodes[name] for name in MMA_INSTRUCTIONS if name in self.opcodes}


def kernels_in(path: Path) -> list[Code]:
    """Every kernel of a cubin or library, in the order of the file."""
    found: dict[tuple[int, str], Code] = {}
    for arch, source, line in _located(_cuobjdump("--dump-resource-usage", path)):
        if match := re.match(r"\s*Function (\S+):\s*$", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = (int(number) for number in match.groups())
            found[arch, name] = Code(
                name=name,
                arch=arch,
                source=source,
                registers=registers,
                stack_bytes=stack,
                static_shared_bytes=shared,
            )
    opcodes: dict[str, int] = {}
    for arch, _, line in _located(_cuobjdump("-sass", path)):
        if match := re.match(r"\s*Function : (\S+)", line):
            opcodes = found[arch, match[1]].opcodes
        # /*0040*/ @!P0 HMMA.16816.F32 R4, ...
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            opcodes[match[1]] = opcodes.get(match[1], 0) + 1
    return list(found.values())


def demangle(names: list[str]) -> list[str]:
    """Names as in C++, without arguments, `void` and the anonymous namespace; unchanged where there is no c++filt."""
    tool = shutil.which("c++filt") or shutil.which("llvm-cxxfilt")
    if tool is None or not names:
        return names
    text = subprocess.run([tool], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    return [_without_arguments(line) for line in text.splitlines()]


def _without_arguments(signature: str) -> str:
    """`void (anonymous namespace)::kernel<(Dtype)2, true>(float*)` -> `kernel<2, true>`: casts of constants go too."""
    name = re.sub(r"\(anonymous namespace\)::|^void |\([\w: ]+\)(?=-?\d)", "", signature)
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def _located(text: str) -> Iterator[tuple[int, str, str]]:
    """Lines with the architecture and source file of the part they stand in; (0, "") where the dump names none."""
    arch, source = 0, ""
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            arch, source = int(match[1]), ""
        elif match := re.match(r"identifier = (.+)", line):
            source = Path(match[1]).name
        yield arch, source, line


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, str(path)], check=True, capture_output=True, text=True).stdout

"""The committed table of what every kernel costs: made, shown, and compared with what the compiler gives now.

    python -m tests.kernels.resources --write      (or: make kernel-resources)

compiles everything and rewrites this compiler's part of `docs/kernel_resources.json`, and `docs/kernel_resources.md`
from it. Parts of other versions of Triton stay: registers differ between them, so a figure is compared with its own
version's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cosmos_kernels import native

ROOT = Path(__file__).parents[2]
TABLE, PAGE = ROOT / "docs" / "kernel_resources.json", ROOT / "docs" / "kernel_resources.md"
LIBRARY = native.LIBRARY_DIR / native.LIBRARIES["cuda"]

Row = dict[str, Any]
Table = dict[str, list[Row]]  # by compiler: "triton 3.9", "nvcc 13.0"

HEAD = """# Registers, shared memory and spills of every kernel

Read from the machine code that the compiler named above each table makes; nothing ran on a GPU for it. A cell:
registers a thread, shared memory a block (of CUDA sources the static part only), tensor-core instructions in the
code (HMMA: mma.sync, HGMMA: wgmma, UTCHMMA: tcgen05), and **spills**, in bytes of stack, where registers did not
suffice. `make kernel-resources` rewrites this page; `tests/kernels/test_compile_ahead.py` fails when a kernel
spills that did not, loses its tensor-core instructions, or is missing here.
"""


def compile_all(only: str = "", *, known: bool = False) -> list[Row]:
    """Rows of all kernels; one that does not compile has an "error".

    known: take the rows of kernels from the table whose inputs are those that it was made of.
    """
    options = [*(["--known", str(TABLE)] if known else []), *(["--triton"] if why_library_is_stale() else [])]
    told = run_without_interpreter(["-m", "cosmos_kernels.compile_ahead", "--only", only, *options])
    return [json.loads(line) for line in told.splitlines()]


def run_without_interpreter(arguments: list[str]) -> str:
    """Output of a Python process in which Triton compiles. RuntimeError with its messages if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=1500)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-4000:])
    return done.stdout


def triton_part() -> str:
    """The part of the table for the Triton that is installed."""
    return "triton " + ".".join(version("triton").split(".")[:2])


def compiler_of(row: Row) -> str | None:
    """Which part of the table a row belongs to; None for CUDA code of a compiler that is not here."""
    if not row["module"].startswith("csrc/"):
        return triton_part()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", told)
    return f"nvcc {found[1]}" if found else None


def by_compiler(rows: Sequence[Row]) -> Table:
    table: Table = {}
    names: dict[bool, str | None] = {}
    for row in rows:
        is_cuda = row["module"].startswith("csrc/")
        if is_cuda not in names:
            names[is_cuda] = compiler_of(row)
        if name := names[is_cuda]:
            table.setdefault(name, []).append(row)
    return table


def why_library_is_stale() -> str | None:
    """None where the built CUDA library is that of the sources here."""
    if not LIBRARY.exists():
        return "the CUDA library is not built"
    newest = max(path.stat().st_mtime for pattern in ("*.cu", "*.h", "*.cuh") for path in (ROOT / "csrc").glob(pattern))
    return "the CUDA library is older than its sources" if LIBRARY.stat().st_mtime < newest else None


def key(row: Row) -> str:
    return f"{row['module']}: {row['case']} on sm_{row['arch']}"


def complaints(found: Sequence[Row], expected: Sequence[Row]) -> list[str]:
    """What got worse, and where the two lists are not of the same kernels."""
    known, present = {key(row): row for row in expected}, {key(row): row for row in found}
    worse = [f"{name}: not in the table" for name in present.keys() - known.keys()]
    worse += [f"{name}: in the table, but gone" for name in known.keys() - present.keys()]
    for name in present.keys() & known.keys():
        now, before = present[name], known[name]
        if "error" in now or "error" in before:
            if "error" not in before:
                worse.append(f"{name}: does not compile: {now['error']}")
            continue
        if spills(now) and not spills(before):
            worse.append(f"{name}: spills {now['stack_bytes']} bytes, did not before")
        if before["mma"] and not now["mma"]:
            worse.append(f"{name}: no tensor-core instruction left, had {before['mma']}")
    return sorted(worse)


def spills(row: Row) -> bool:
    return row.get("stack_bytes", 0) > 0 or row.get("local_accesses", 0) > 0


def render(table: Mapping[str, Sequence[Row]]) -> str:
    """The Markdown page: one table a compiler, one line a kernel, one column an architecture."""
    parts = [HEAD]
    for compiler, rows in sorted(table.items()):
        archs = sorted({row["arch"] for row in rows})
        cells = {(row["module"], row["case"], row["arch"]): _cell(row) for row in rows}
        lines = [f"## {compiler}", "", "| kernel | " + " | ".join(f"sm_{arch}" for arch in archs) + " |"]
        lines.append("|---" * (len(archs) + 1) + "|")
        for module, case in dict.fromkeys((row["module"], row["case"]) for row in rows):
            shown = " | ".join(cells.get((module, case, arch), "") for arch in archs)
            lines.append(f"| {module} `{case}` | {shown} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _cell(row: Row) -> str:
    if "error" in row:
        return "**does not compile**"
    parts = [f"{row['registers']} regs"]
    if row["shared_bytes"]:
        kib, rest = divmod(row["shared_bytes"], 1024)
        parts.append(f"{kib + rest / 1024:.3g} KiB" if kib else f"{rest} B")
    parts += [f"{count} {name}" for name, count in row["mma"].items()]
    if spills(row):
        parts.append(f"**spills {row['stack_bytes']} B**")
    return ", ".join(parts)


def load() -> Table:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write(table: Mapping[str, Sequence[Row]]) -> None:
    """Both files; one row a line, so that a change shows as one line."""
    sections = [
        json.dumps(name) + ": [\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"
        for name, rows in sorted(table.items())
    ]
    TABLE.write_text("{\n" + ",\n".join(sections) + "\n}\n")
    PAGE.write_text(render(table))


def main() -> int:
    """Compile, print what changed for the worse, and with --write keep the new figures."""
    found = by_compiler(compile_all())
    if reason := why_library_is_stale():
        print(f"CUDA sources left as they are: {reason} (make setup builds it)")
        found = {name: rows for name, rows in found.items() if name.startswith("triton")}
    table = load()
    for name, rows in found.items():
        for line in complaints(rows, table.get(name, [])):
            print(f"{name}: {line}")
    if "--write" in sys.argv:
        write({**table, **found})
        print(f"wrote {TABLE.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

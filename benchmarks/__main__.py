"""Run every benchmark of this folder with its default settings, then make the report: `python -m benchmarks`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import click


def names() -> list[str]:
    """Names of the benchmarks: `bench_<name>.py` beside this file, each with a click command `command`."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main() -> int:
    """Returns 1 if any benchmark failed; the others still run."""
    failed = []
    for name in [*(f"bench_{name}" for name in names()), "report"]:
        command: click.Command = import_module(f"benchmarks.{name}").command
        try:
            command.main(args=[], prog_name=name, standalone_mode=False)
        except Exception as error:
            failed.append(name)
            print(f"error: benchmark {name}: {type(error).__name__}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

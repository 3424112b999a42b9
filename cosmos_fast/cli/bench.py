"""`cosmos-fast bench <name>`: runs `benchmarks/bench_<name>.py` of the checkout that this package stands in."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path

import click

import cosmos_fast
from cosmos_fast.utils.errors import UserError

ROOT = Path(cosmos_fast.__file__).parents[1]
REPORT = "report"  # reads what the benchmarks wrote


class BenchGroup(click.Group):
    """One sub-command a file `bench_*.py`, and `report`; a file is imported when its command is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [path.stem.removeprefix("bench_") for path in sorted(benchmark_folder().glob("bench_*.py"))] + [REPORT]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        root = str(benchmark_folder().parent)
        if root not in sys.path:
            sys.path.insert(0, root)
        module = f"benchmarks.{self._stem(cmd_name)}"
        found = import_module(module).command
        assert isinstance(found, click.Command), f"{module}.command is not a click command"
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Benchmarks"):
            formatter.write_dl([(name, self._summary(name)) for name in self.list_commands(ctx)])

    @staticmethod
    def _stem(name: str) -> str:
        """The file of a command."""
        return name if name == REPORT else f"bench_{name}"

    def _summary(self, name: str) -> str:
        """First line of the benchmark's docstring, read without importing torch."""
        source = (benchmark_folder() / f"{self._stem(name)}.py").read_text(encoding="utf-8")
        return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def benchmark_folder() -> Path:
    """The checkout's `benchmarks/`; an installed wheel does not carry it."""
    folder = ROOT / "benchmarks"
    if not (folder / "harness.py").exists():
        raise UserError(
            f"benchmarks are not part of the installed package ({ROOT} has none): clone the repository, "
            "`pip install -e .` there, and run this again"
        )
    return folder


command = BenchGroup(
    "bench",
    help="Measure an operation or a whole step against its baseline. Needs a checkout; results go to "
    "benchmarks/results/<device>/.",
)

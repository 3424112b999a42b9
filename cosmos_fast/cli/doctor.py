"""`cosmos-fast doctor`: what this machine can run, and why not the rest."""

from __future__ import annotations

import json
import pkgutil
from dataclasses import asdict
from importlib import import_module
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cosmos_fast import ops
from cosmos_fast.data import dali_pipeline
from cosmos_fast.ops import backends
from cosmos_fast.utils import capabilities
from cosmos_kernels import native

STATUS_STYLE = {"present": "green", "available": "green", "loaded": "green", "absent": "dim", "unusable": "red"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(as_json: bool) -> None:
    """Show what this machine can run: processor, GPU, native libraries, optional packages, and the backend of every
    operation. Always exits with status 0: a missing optional part is no error."""
    report = examine()
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        _print(report)


def examine() -> dict[str, Any]:
    """Everything doctor knows, as plain data."""
    backend_rows, faults = _backend_table()
    return {
        "system": capabilities.system(),
        "gpu": capabilities.gpu(),
        "build_tools": capabilities.build_tools(),
        "native": [_native_row(kind) for kind in native.LIBRARIES],
        "packages": [asdict(capabilities.package_status(package)) for package in capabilities.PACKAGES],
        "loaders": [_loader_row(*row) for row in (("pil", "cpu"), ("dali", "cpu"), ("dali", "cuda"))],
        "backends": backend_rows,
        "faults": faults,
    }


def _native_row(kind: str) -> dict[str, str]:
    reason = native.why_missing(kind)
    note = reason or (native.cpu_features() if kind == "cpu" else _gpus_of_the_library())
    return {"library": kind, "status": "absent" if reason else "loaded", "note": note}


def _loader_row(loader: str, device: str) -> dict[str, str]:
    """device: of the batches; PIL decodes on the CPU for any."""
    reason = dali_pipeline.why_unusable(device) if loader == "dali" else None
    return {"loader": loader, "device": device, "status": reason or "available"}


def _gpus_of_the_library() -> str:
    return f"compute capability {' and '.join('{}.{}'.format(*held) for held in native.cuda_architectures())}"


def _backend_table() -> tuple[list[dict[str, str]], list[str]]:
    """The registry after importing every operation, and what could not be imported."""
    faults = []
    for module in pkgutil.iter_modules(ops.__path__, "cosmos_fast.ops."):
        try:
            import_module(module.name)
        except Exception as error:
            faults.append(f"{module.name} does not import: {type(error).__name__}: {error}")
    return backends.table(), faults


def _print(report: dict[str, Any]) -> None:
    console = Console()
    gpus = {"GPU" if index == "none" else f"GPU {index}": text for index, text in report["gpu"].items()}
    facts = {**report["system"], **gpus, **report["build_tools"]}
    console.print(_table("This machine", ["", ""], [[name, escape(text)] for name, text in facts.items()]))
    rows = [[row["library"], _coloured(row["status"]), escape(row["note"])] for row in report["native"]]
    console.print(_table("Native libraries (csrc/)", ["library", "status", "remark"], rows))
    rows = [
        [row["name"], _coloured(row["status"]), row["version"] or "", escape(_package_remark(row))]
        for row in report["packages"]
    ]
    console.print(_table("Optional packages", ["package", "status", "version", "remark"], rows))
    rows = [[row["loader"], row["device"], _coloured(row["status"])] for row in report["loaders"]]
    console.print(_table("Image decoders (data.loader)", ["loader", "device", "available, or why not"], rows))
    rows = [
        [row["op"], row["backend"], _coloured(row["status"]), row["hardware"], escape(row["summary"])]
        for row in report["backends"]
    ]
    headings = ["operation", "backend", "available, or why not", "on a GPU", ""]
    console.print(_table("Backends, most preferred first", headings, rows))
    for fault in report["faults"]:
        console.print(f"[red]fault:[/red] {escape(fault)}")


def _package_remark(row: dict[str, str]) -> str:
    if row["status"] == "present":
        return ""
    return f"{row['note']}; without it: {row['without_it']}" if row["note"] else f"without it: {row['without_it']}"


def _coloured(status: str) -> str:
    style = STATUS_STYLE.get(status, "yellow")
    return f"[{style}]{escape(status)}[/{style}]"


def _table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(headings))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table

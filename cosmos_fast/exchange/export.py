"""Export: read what is asked for, write it aside, then let it appear under its name."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError

from cosmos_fast.exchange.formats import FORMATS, Format
from cosmos_fast.exchange.source import Source, Wanted, read_source
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import fsync_path

_FILE_SUFFIXES = (".pt", ".safetensors", ".onnx", ".pt2")


def export(
    checkpoint: Path,
    to: str,
    out: Path,
    *,
    weights: Wanted | None = None,
    overwrite: bool = False,
    step: Callable[[str], None] = lambda _: None,
) -> Source:
    """Write weights of a checkpoint in another format; returns what was written. Needs no GPU.

    Args:
        checkpoint: run folder, checkpoint folder or file.
        to: one of FORMATS.
        out: what to write; a killed process leaves nothing under this name, or what was there before.
        weights: None takes both where the format holds both, else the teacher.
        overwrite: replace an export that is there.
        step: told what is about to happen.

    Raises:
        UserError: `out` cannot be written or is there already, or the checkpoint cannot be read.
    """
    chosen = FORMATS[to]
    wanted: Wanted = weights or ("both" if chosen.both else "teacher")
    if wanted == "both" and not chosen.both:
        raise UserError(f"--to {to} holds one model: choose --weights student or teacher")
    missing = [package for package in chosen.needs if find_spec(package) is None]
    if missing:
        raise UserError(f"--to {to} needs {' and '.join(missing)}: pip install 'cosmos-fast[{to}]'")
    with _writing(out):
        check_target(out, to, chosen, overwrite)
    source = read_source(checkpoint, wanted, step)
    step(f"writing {out.name}")
    # What a symbolic link stands for is replaced, and the link stays.
    with appearing(Path(os.path.realpath(out)), folder=not chosen.suffix) as aside:
        chosen.write(source, aside)
        check_target(out, to, chosen, overwrite)
    return source


def check_target(out: Path, to: str, chosen: Format, overwrite: bool) -> None:
    """UserError where `out` is no place for a new file of this format."""
    if out.suffix != chosen.suffix and (chosen.suffix or out.suffix in _FILE_SUFFIXES):
        form = f"a {chosen.suffix} file: give it that ending" if chosen.suffix else "a folder: give it another name"
        raise UserError(f"--out {out}: --to {to} writes {form}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist: make it, or choose another path")
    if not os.path.lexists(out):
        return
    if out.is_dir() == bool(chosen.suffix):
        raise UserError(f"--out {out} is a {'folder' if chosen.suffix else 'file'}: choose another path")
    if out.samefile("."):
        raise UserError(f"--out {out} is the working directory, which cannot be replaced: choose another path")
    if not overwrite:
        raise UserError(f"--out {out} exists already: choose another path, or replace it with --overwrite")
    foreign = [] if chosen.suffix else sorted({path.name for path in out.iterdir()} - chosen.files)
    if foreign:
        raise UserError(
            f"--out {out} holds {foreign[0]}, so it is no former export and is not replaced: choose another"
        )


@contextmanager
def appearing(out: Path, folder: bool = False) -> Iterator[Path]:
    """A path to write a file to, or a new folder, which becomes `out` when the block ends without an exception.

    Otherwise it is removed. A killed process leaves `.{name}.{random}.tmp`.

    Raises:
        UserError: what the block wrote does not fit on the disk, or may not be written.
    """
    aside, former = (out.with_name(f".{out.name}.{secrets.token_hex(4)}.{kind}") for kind in ("tmp", "old"))
    try:
        with _writing(out):
            if folder:
                aside.mkdir()
            yield aside
            for path in [*aside.iterdir(), aside] if folder else [aside]:
                if not path.is_dir():  # safetensors makes files that only their owner reads
                    os.chmod(path, (out.parent.stat().st_mode & 0o666) | 0o200)
                fsync_path(path)
            _put(aside, out, former)
            fsync_path(out.parent)
    finally:
        for path in (aside, former):
            with suppress(OSError):  # a folder that may not be entered, a name that is too long
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} could not be written ({error}): make room, or choose another path") from error


def _put(aside: Path, out: Path, former: Path) -> None:
    """Rename over what is there; a folder with something in it has to go aside first."""
    if not out.is_dir():
        os.replace(aside, out)
        return
    out.rename(former)
    try:
        aside.rename(out)
    except OSError:
        former.rename(out)
        raise


def size_of(out: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(path.stat().st_size for path in (out.iterdir() if out.is_dir() else [out]))

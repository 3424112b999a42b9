"""Prepare a data set: captions into a store, then shard by shard; restartable, and byte-identical for an input.

OUT holds prepare.json (what the shards are made of), the shards, and in .prepare the reports of finished shards and,
while work is left, the caption store. What a killed run left behind is complete, or it is made again.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from cosmos_fast.data import faults
from cosmos_fast.data.pool import run_in_pool
from cosmos_fast.data.prepare.downloads import Unit, downloads, find_units
from cosmos_fast.data.prepare.layouts import Layout, Record
from cosmos_fast.data.prepare.shard import (
    PARTS,
    WORK,
    Join,
    ShardPlan,
    ShardReport,
    find_record,
    key_of,
    read_report,
    write_shard,
)
from cosmos_fast.data.prepare.store import CaptionStore, build_store, is_built, remove_store
from cosmos_fast.data.prepare.tables import TableReader
from cosmos_fast.data.shard_files import locked, write_error
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import write_atomic

PARAMETERS = "prepare.json"
FORMAT = "cosmos-fast-prepared/1"  # to be raised when the same input comes to give other bytes
_PROBED_UNITS = 20  # spread over the download: the tables may be of a part of it
_PROBED_SAMPLES = 20
_SHARD_ASIDE = re.compile(r"[0-9]+\.tar\.tmp")  # of a unit that may have gone since
_WRITTEN_ASIDE = re.compile(r"\..+\.(json|npy)\.[0-9a-f]{8}\.tmp")  # as utils.files names it
Begin = Callable[[str, int], Callable[[int], None]]  # (what, how much there is) -> advance(amount)


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """layout: of the caption tables; None takes the captions downloaded along. images: what find_units() takes.

    key_column: the tables' column of names, for join="key".
    """

    images: str
    out: Path
    layout: Layout | None = None
    tables: tuple[Path, ...] = ()
    join: Join = "url"
    key_column: str | None = None

    def parameters(self) -> dict[str, object]:
        """As they stand in prepare.json: all that decides the bytes of a shard, besides its input."""
        return {
            "format": FORMAT,
            "layout": self.layout.name if self.layout else "img2dataset",
            "captions": [[table.name, table.stat().st_size] for table in self.tables],
            "join": self.join,
            "key_column": self.key_column,
        }


@dataclass
class Summary:
    """Of all shards, those made before included. problems: rows of the caption tables that could not be used."""

    shards: int = 0
    samples: int = 0
    written_now: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    problems: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, report: ShardReport) -> None:
        """Count a shard's report; name: of the shard."""
        self.shards += report.samples > 0
        self.samples += report.samples
        self.left_out.update(report.left_out)
        for cause, key in report.examples.items():
            self.examples.setdefault(cause, f"{name}.tar:{key}")


def prepare(settings: PrepareSettings, workers: int, begin: Begin) -> Summary:
    """Write what is missing. begin() is called for every stage of the work and returns what counts its progress.

    Raises UserError: input that is missing or fits not together, OUT holding other shards, a disk that refuses.
    """
    units = find_units(settings.images)
    if settings.out.resolve() in {unit.folder.resolve() for unit in units}:
        raise UserError(f"--out {settings.out} is where the images are: choose another directory")
    summary = Summary()
    reader = _table_reader(settings, summary)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        with locked(settings.out):
            _check_parameters(settings)
            (settings.out / WORK).mkdir(exist_ok=True)
            if (settings.out / PARAMETERS).exists():  # else nothing there is of this command
                _remove_leftovers(settings.out, units)
            missing = [unit for unit in units if read_report(_plan(unit, settings, None)) is None]
            if missing:
                captions = _open_captions(settings, reader, begin)
                plans = [_plan(unit, settings, captions) for unit in missing]
                if len(missing) == len(units):
                    _check_they_fit(plans)
                write_atomic(settings.out / PARAMETERS, json.dumps(settings.parameters(), indent=1) + "\n")
                _write_missing(plans, workers, begin)
                summary.written_now = len(missing)
                remove_store(settings.out / WORK)
            _sum_up(units, settings, summary)
    except OSError as error:
        raise write_error(error.filename or settings.out, error) from error
    return summary


def _plan(unit: Unit, settings: PrepareSettings, captions: CaptionStore | None) -> ShardPlan:
    return ShardPlan(unit, settings.out, captions, settings.layout, settings.join)


def _sum_up(units: Sequence[Unit], settings: PrepareSettings, summary: Summary) -> None:
    changed = []
    for unit in units:
        report = read_report(_plan(unit, settings, None))
        if report is None:
            changed.append(str(unit.path))
        else:
            summary.add(unit.name, report)
    if changed:
        raise UserError(
            f"{len(changed)} shards changed while they were read (is the download still running?), {changed[0]} the "
            "first: run the same command again when it has ended"
        )


def _write_missing(plans: Sequence[ShardPlan], workers: int, begin: Begin) -> None:
    advance = begin("writing shards", PARTS * len(plans))
    try:
        run_in_pool(write_shard, plans, workers, advance)
    finally:
        for plan in plans:  # of workers stopped half-way; a full disk needs the room
            plan.aside.unlink(missing_ok=True)


def _remove_leftovers(out: Path, units: Sequence[Unit]) -> None:
    """What a killed run has not finished. Other files by names like these are not its own."""
    aside = [out / f"{unit.name}.tar.tmp" for unit in units]
    aside += [path for path in out.glob("*.tar.tmp") if _SHARD_ASIDE.fullmatch(path.name)]
    aside += [path for path in out.glob(f".{PARAMETERS}.*") if _WRITTEN_ASIDE.fullmatch(path.name)]
    aside += [path for path in (out / WORK).glob(".*") if _WRITTEN_ASIDE.fullmatch(path.name)]
    for leftover in aside:
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


def _table_reader(settings: PrepareSettings, summary: Summary) -> TableReader | None:
    """A reader whose tables have the columns it needs."""
    if settings.layout is None:
        return None
    column = (settings.key_column or settings.layout.key) if settings.join == "key" else None
    reader = TableReader(settings.tables, settings.layout, column, summary.problems)
    reader.check()
    return reader


def _open_captions(settings: PrepareSettings, reader: TableReader | None, begin: Begin) -> CaptionStore | None:
    """The store, built where it is not there yet."""
    if reader is None:
        return None
    folder, made_of = settings.out / WORK, settings.parameters()
    if is_built(folder, made_of):
        return CaptionStore(folder)
    advance = begin("reading captions", sum(table.stat().st_size for table in settings.tables))
    try:
        store, repeated = build_store(folder, _records(reader, settings.join, advance), made_of)
    except BaseException:
        remove_store(folder)  # a full disk needs the room
        raise
    if repeated:
        reader.problems["row for an image that had one before"] += repeated
    if store.example() is None:
        causes = ", ".join(f"{count:,} x {cause}" for cause, count in reader.problems.most_common())
        remove_store(folder)
        raise UserError(f"{settings.tables[0]}: no row has captions ({causes or 'it is empty'}); download it again")
    return store


def _records(reader: TableReader, join: Join, advance: Callable[[int], None]) -> Iterator[tuple[str, Record]]:
    """Texts as they stand in the table: the workers make sentences of those that are asked for."""
    for name, row in reader.rows(advance):
        texts = {column: value for column in reader.layout.columns if (value := row.get(column))}
        yield (key_of(name) if join == "key" else name), texts


def _check_they_fit(plans: Sequence[ShardPlan]) -> None:
    """Refuse captions of other images before hours go by: of the first samples of a few shards, one must match."""
    captions = plans[0].captions
    if captions is None:
        return
    met: list[str] = []
    example = captions.example()
    for plan in plans[:: max(1, len(plans) // _PROBED_UNITS)][:_PROBED_UNITS]:
        for download in islice(downloads(plan.unit, Counter()), _PROBED_SAMPLES):
            try:
                find_record(download, plan)
            except faults.SampleFault as fault:
                met.append(f"{fault.cause} {fault.detail}".strip())
            else:
                captions.close()
                return
    captions.close()
    remove_store(plans[0].out / WORK)
    with contextlib.suppress(OSError):  # it is not empty where there was something before
        (plans[0].out / WORK).rmdir()
        plans[0].out.rmdir()
    seen = f"the first: {met[0]}; the table has {example}" if met else "there is no image"
    raise UserError(
        f"none of {len(met)} images looked at has captions ({seen}): are they of the same data set, and are all "
        f"tables given? --join {'key' if plans[0].join == 'url' else 'url'} compares something else"
    )


def _check_parameters(settings: PrepareSettings) -> None:
    """Refuse to mix two data sets in one directory."""
    path, asked = settings.out / PARAMETERS, settings.parameters()
    if not path.exists():
        if any(settings.out.glob("*.tar")) or any(settings.out.glob("*.tar.tmp")):
            raise UserError(f"{settings.out} holds shards but no {PARAMETERS}: choose another --out")
        return
    try:
        there = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: delete {settings.out} and run again") from None
    differing = [name for name in asked if there.get(name) != asked[name]]
    if differing:
        changes = "; ".join(f"{name} {there.get(name)} there, {asked[name]} asked" for name in differing)
        raise UserError(
            f"{settings.out} holds shards made otherwise ({changes}): choose another --out, or delete that directory"
        )

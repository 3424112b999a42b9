"""One prepared shard: samples with captions written aside and renamed, and a report that says it is done."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from cosmos_fast.data import faults
from cosmos_fast.data.index import IMAGE_EXTENSIONS
from cosmos_fast.data.prepare.downloads import Download, Unit, downloads
from cosmos_fast.data.prepare.layouts import Layout, download_record
from cosmos_fast.data.prepare.store import CaptionStore
from cosmos_fast.data.shard_files import is_complete_tar, write_error
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import fsync_path, write_atomic

WORK = ".prepare"  # beside the shards: reports, and the captions while they are needed
NOT_IN_TABLE = "not in the caption table"
PARTS = 1000  # progress of a shard is counted in
Join = Literal["url", "key"]


@dataclass(frozen=True)
class ShardPlan:
    """A unit and where its shard goes. captions, in this layout: None takes those downloaded along."""

    unit: Unit
    out: Path
    captions: CaptionStore | None
    layout: Layout | None
    join: Join

    @property
    def path(self) -> Path:
        """The shard."""
        return self.out / f"{self.unit.name}.tar"

    @property
    def aside(self) -> Path:
        """Its name until it is complete."""
        return self.out / f"{self.unit.name}.tar.tmp"

    @property
    def report_path(self) -> Path:
        """Written after the shard: what is in it."""
        return self.out / WORK / f"{self.unit.name}.json"


@dataclass
class ShardReport:
    """samples: written. left_out: cause -> count; examples: cause -> the first key. input: stamp of the unit.

    source: path of the unit, "" in reports of earlier versions.
    """

    input: list[int]
    source: str = ""
    samples: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave_out(self, cause: str, key: str) -> None:
        """Count a sample that was not written."""
        self.left_out[cause] += 1
        self.examples.setdefault(cause, key)


def read_report(plan: ShardPlan) -> ShardReport | None:
    """The report of a shard that is done: of this input, and with the shard in place; else None.

    Raises UserError where the shard is of another input by the same name, which is to be kept.
    """
    try:
        raw = json.loads(plan.report_path.read_bytes())
        counts = int(raw["samples"]), Counter(raw["left_out"]), dict(raw["examples"])
        report = ShardReport(raw["input"], str(raw.get("source", "")), *counts)
        is_of_this = report.input == plan.unit.stamp
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not is_of_this and report.source not in ("", plan.unit.source):
        raise UserError(
            f"{plan.path} is made of {report.source}, not of {plan.unit.source}: choose another --out, or delete that "
            "directory"
        )
    return report if is_of_this and (report.samples == 0 or is_complete_tar(plan.path)) else None


def write_shard(plan: ShardPlan, progress: Callable[[int], None]) -> ShardReport:
    """Write one shard and its report; progress gets the parts passed, of PARTS. Raises UserError if the disk refuses.

    A unit without a single usable sample gives a report and no shard.
    """
    report = ShardReport(plan.unit.stamp, plan.unit.source)
    plan.report_path.unlink(missing_ok=True)  # of an earlier input
    try:
        with plan.aside.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                _fill(tar, plan, report, progress)
            file.flush()
            os.fsync(file.fileno())
        if report.samples:
            plan.aside.replace(plan.path)
        else:
            plan.aside.unlink()
            plan.path.unlink(missing_ok=True)
        fsync_path(plan.out)
        write_atomic(plan.report_path, json.dumps(vars(report)))
    except OSError as error:
        with contextlib.suppress(OSError):
            plan.aside.unlink(missing_ok=True)
        raise write_error(plan.path, error) from error
    return report


def _fill(tar: tarfile.TarFile, plan: ShardPlan, report: ShardReport, progress: Callable[[int], None]) -> None:
    passed = 0
    for download in downloads(plan.unit, report.left_out):
        try:
            record = find_record(download, plan)
            extension, image = download.read_image()
        except faults.SampleFault as fault:
            report.leave_out(fault.cause, download.key)
        else:
            _add(tar, f"{download.key}.{extension}", image)
            _add(tar, f"{download.key}.json", record)
            report.samples += 1
        if (now := int(download.passed * PARTS)) > passed:
            progress(now - passed)
            passed = now


def find_record(download: Download, plan: ShardPlan) -> bytes:
    """The json of a sample's captions. Raises faults.SampleFault: there are none, or no metadata to find them by."""
    if plan.captions is None or plan.layout is None:
        metadata = download.read_metadata()
        record, url = download_record(metadata, download.read_text()), metadata.get("url")
    else:
        name = join_name(download, plan.join)
        if (row := plan.captions.find(name)) is None:
            raise faults.SampleFault(NOT_IN_TABLE, name)
        record, url = plan.layout.record(json.loads(row)), name if plan.join == "url" else None
    if record is None:
        raise faults.SampleFault(faults.NO_CAPTION)
    return json.dumps(record | ({"url": url} if isinstance(url, str) else {})).encode()


def join_name(download: Download, join: Join) -> str:
    """What the caption table is asked for. Raises faults.SampleFault where the metadata lacks it."""
    if join == "key":
        return key_of(download.key)
    url = download.read_metadata().get("url")
    if not isinstance(url, str) or not url.strip():
        raise faults.SampleFault(faults.MISSING_RECORD, "no url in its metadata")
    return url.strip()


def key_of(name: str) -> str:
    """The last part of a path, without the extension of an image: `a/0000008.jpg` -> `0000008`."""
    last = PurePosixPath(name.strip())
    return last.stem if last.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS else last.name


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # time, owner and rights stay the defaults: the same input gives the same bytes
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))

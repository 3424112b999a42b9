"""Verifying one part of a shard: every sample read and decoded in full, and held to what training needs."""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_fast.data import faults
from cosmos_fast.data.faults import SampleFault
from cosmos_fast.data.images import decode
from cosmos_fast.data.index import RECORD_EXTENSION, Index, image_extension, is_used_in_training
from cosmos_fast.data.quarantine import BadSample, Rules
from cosmos_fast.data.records import parse_record
from cosmos_fast.utils.errors import UserError

_DETAIL_CHARACTERS = 200  # of an error message: some quote the data


@dataclass(frozen=True)
class Task:
    """Samples start..stop-1 of one shard, of which sample 0 is row `first` of the index."""

    shard: int
    first: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def find_bad(index: Index, rules: Rules, task: Task) -> list[BadSample]:
    """The bad samples of a part. UserError for a shard that cannot be read: that is no fault of its samples."""
    found = []
    for number in range(task.start, task.stop):
        row = task.first + number
        try:
            check_sample(index, row, rules)
        except SampleFault as fault:
            if fault.cause in (faults.UNREADABLE_SHARD, faults.UNREACHABLE_SHARD):
                raise UserError(
                    f"{index.name(row)}: {fault.cause} ({fault.detail}); once it can be read, run the command again: "
                    "it continues there"
                ) from fault
            found.append(BadSample(number, index.key(row), fault.cause, fault.detail[:_DETAIL_CHARACTERS]))
    return found


def check_sample(index: Index, i: int, rules: Rules) -> None:
    """Read and decode sample `i`. Raises SampleFault for whatever training would replace it for."""
    members = index.read(i, max_bytes=rules.max_member_bytes, only=is_used_in_training)
    extension = image_extension(members)
    if extension is None:
        raise SampleFault(faults.MISSING_IMAGE)
    if RECORD_EXTENSION not in members:
        raise SampleFault(faults.MISSING_RECORD)
    parse_record(members[RECORD_EXTENSION], rules.schema)
    decode(members[extension], rules.max_pixels)

"""What can be wrong with a sample or a shard, under one name each, and the account kept of it."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from cosmos_fast.utils.errors import UserError

log = logging.getLogger(__name__)

# Causes found while reading a sample.
MISSING_IMAGE = "missing image member"
MISSING_RECORD = "missing json member"
EMPTY_MEMBER = "empty member"
TOO_MANY_BYTES = "member over the byte cap"
TOO_MANY_PIXELS = "image over the pixel cap"
NOT_AN_IMAGE = "not an image"
BROKEN_IMAGE = "broken or truncated image"
BAD_JSON = "wrong json"
NO_CAPTION = "missing or empty caption"
UNREADABLE_SHARD = "shard changed or unreadable"
UNREACHABLE_SHARD = "remote shard out of reach"  # no fault of the sample: the run stops instead of replacing it
KILLS_READER = "kills the process that reads it"
# Mended while reading a sample: counted and named like a fault, but the sample is used.
MENDED_IMAGE = "mended image"
REPAIRS = frozenset({MENDED_IMAGE})
# Causes found while indexing a shard.
TRUNCATED_SHARD = "truncated shard"
CORRUPT_SHARD = "corrupt tar header"
NOT_A_TAR = "not a tar file"
DUPLICATE_MEMBER = "duplicate member"
UNUSABLE_MEMBER = "link or special file"

WINDOW_SAMPLES = 1000
_LINES_PER_CAUSE = 20


@dataclass(frozen=True)
class Fault:
    """One bad sample or shard: the cause (one of the names above), where (shard and key), and the details."""

    cause: str
    where: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.cause}: {self.where}" + (f" ({self.detail})" if self.detail else "")


class Repair(NamedTuple):
    """What was mended in a sample: the cause (one of REPAIRS) and the details."""

    cause: str
    detail: str


class SampleFault(Exception):
    """Raised by a stage that cannot use a sample; the stream turns it into a Fault and takes a substitute."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return self.cause + (f": {self.detail}" if self.detail else "")


def stop_where_out_of_reach(fault: SampleFault, where: str) -> None:
    """UserError for a remote shard out of reach: no fault of the sample, and results without it would be others."""
    if fault.cause == UNREACHABLE_SHARD:
        raise UserError(f"{where}: {fault.cause} ({fault.detail}); run the same command again once it can be read")


class FaultAccount:
    """Counts faults by cause, names each (cause, sample) once in the log, and stops the run past a share.

    The share is taken over the last WINDOW_SAMPLES samples tried (never over fewer), so one early bad sample does not
    stop a run that allows 5 %, and a data set that turns bad in the middle is noticed soon.
    """

    def __init__(self, max_bad_share: float) -> None:
        self.max_bad_share = max_bad_share
        self.counts: Counter[str] = Counter()
        self._named: set[tuple[str, str]] = set()
        self._lines: Counter[str] = Counter()
        self._window: deque[tuple[int, int]] = deque()  # (tried, bad) of each recent batch
        self._tried = 0
        self._bad = 0

    def note(self, faults: Iterable[Fault]) -> None:
        """Count and log without judging: for faults of the shards themselves."""
        for fault in faults:
            self.counts[fault.cause] += 1
            name = (fault.cause, fault.where)
            if name in self._named or self._lines[fault.cause] > _LINES_PER_CAUSE:
                continue
            self._named.add(name)
            self._lines[fault.cause] += 1
            if self._lines[fault.cause] > _LINES_PER_CAUSE:
                log.warning("%s: more of these are counted, not named", fault.cause)
            else:
                log.warning("%s, %s", "mended and used" if fault.cause in REPAIRS else "skipped", fault)

    def settle(self, good: int, faults: list[Fault]) -> None:
        """Add one batch: `good` usable samples and the faults met on the way. UserError past max_bad_share."""
        self.note(faults)
        bad = sum(fault.cause not in REPAIRS for fault in faults)
        self._window.append((good + bad, bad))
        self._tried += good + bad
        self._bad += bad
        while self._tried - self._window[0][0] >= WINDOW_SAMPLES:
            tried, bad = self._window.popleft()
            self._tried -= tried
            self._bad -= bad
        if self._bad > self.max_bad_share * max(self._tried, WINDOW_SAMPLES):
            raise UserError(
                f"{self._bad} of the last {self._tried} samples were unusable, more than data.max_bad_share="
                f"{self.max_bad_share:g} of {max(self._tried, WINDOW_SAMPLES)} allows ({self.summary()}); last one: "
                f"{faults[-1] if faults else 'see the log'}; mend the shards or raise data.max_bad_share"
            )

    def summary(self) -> str:
        """All counts on one line, most frequent first."""
        return ", ".join(f"{count} x {cause}" for cause, count in self.counts.most_common()) or "no bad samples"

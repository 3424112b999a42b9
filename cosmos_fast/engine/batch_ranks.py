"""The batch-size search on several ranks: what each has measured, told through the launcher's store.

The ranks that search form no process group: every size is run by a child of each, and those form one of their own,
which ends with them however they end. So a rank whose child is out of memory leaves nobody waiting.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.network import LostRanks
from cosmos_fast.utils.ranks import TIMEOUT_S, Ranks
from cosmos_fast.utils.rendezvous import keeps_store, store_of_this_try


class OthersFailed(Exception):
    """The child of another rank has not come through: there is nothing to be measured here."""


@dataclass
class SearchRanks:
    """The ranks of a search; every rank makes the same calls. Of one process there is no store, and all is its own."""

    place: Ranks = field(default_factory=Ranks)
    store: dist.Store | None = None
    name: str = ""  # of this search, unlike those of former tries that left their answers in the store
    rounds: int = 0

    @classmethod
    def of(cls, place: Ranks) -> SearchRanks:
        """Those of the launcher. UserError where they cannot meet."""
        if place.world_size == 1:
            return cls(place)
        try:
            if keeps_store():
                store = store_of_this_try(place.rank, place.world_size, TIMEOUT_S)
            else:
                store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=TIMEOUT_S)))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"rank {place.rank} of {place.world_size} cannot meet the others ({error})") from None
        ranks = cls(place, dist.PrefixStore("batch_size", store))
        ranks.name = ranks.gather(secrets.token_hex(8))[0]
        return ranks

    @property
    def meeting(self) -> str:
        """Where the children of this round meet."""
        return f"{self.name}_{self.rounds}" if self.store is not None else ""

    def someone_failed(self) -> bool:
        """Whether the child of another rank has not come through this round."""
        return self.store is not None and bool(self.store.check([f"{self.rounds}/failed"]))

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, by rank; ends a round. value: what JSON can hold."""
        if self.store is None:
            return [value]
        self.store.set(f"{self.rounds}/{self.place.rank}", json.dumps(value))
        found = [json.loads(self.store.get(f"{self.rounds}/{rank}")) for rank in range(self.place.world_size)]
        self.rounds += 1
        return found

    def largest(self, measure: Callable[[], int | None]) -> int | None:
        """The most that any rank needs; None where it does not fit one of them.

        Args:
            measure: of this rank; may raise OthersFailed.

        Raises:
            UserError: this rank's, or that of another. That ranks lost each other counts only where none of them says
                why.
        """
        if self.store is None:
            return measure()
        failure: Exception | None = None
        found: dict[str, Any] = {}  # peak, lost or failure; nothing where this rank gave up because another failed
        try:
            found["peak"] = measure()
        except OthersFailed:
            pass
        except LostRanks as error:  # what has ended a child elsewhere decides, and ranks may learn of it in any order
            found["lost"] = str(error)
        except Exception as error:
            failure = error
            found["failure"] = str(error) or type(error).__name__
        if found.get("peak") is None:
            self.store.set(f"{self.rounds}/failed", "1")
        everywhere = self.gather(found)
        if failure is not None:
            raise failure
        _raise_first(everywhere, "failure")
        peaks = [one.get("peak", 0) for one in everywhere]
        if None in peaks:
            return None
        _raise_first(everywhere, "lost")
        return max(peaks)

    def close(self) -> None:
        """Wait for the others; rank 0 goes last, whose process may keep the store."""
        self.gather("done")
        if self.store is None:
            return
        self.store.set(f"bye/{self.place.rank}", "")
        for rank in range(self.place.world_size) if self.place.first else ():
            self.store.get(f"bye/{rank}")


def _raise_first(everywhere: list[dict[str, Any]], what: str) -> None:
    for rank, one in enumerate(everywhere):
        if what in one:
            raise UserError(f"rank {rank}: {one[what]}")

"""What the tests of remote shards share: a quick storage, and the check of what was read."""

from __future__ import annotations

from typing import Any

from cosmos_fast.config import SourceConfig
from cosmos_fast.config.remote import RemoteConfig
from cosmos_fast.data.index import Index, open_source
from cosmos_fast.data.storage import Storage
from tests.shards import picture, record

SAMPLES = 9


def patient(**changes: Any) -> Storage:
    allow_pipe = changes.pop("allow_pipe", False)
    return Storage(RemoteConfig(**{"retry_s": 60.0, "timeout_s": 60.0, **changes}), allow_pipe=allow_pipe)


def opened(path: str, **changes: Any) -> Index:
    return open_source(SourceConfig(path=path), storage=patient(**changes))


def check(found: Index) -> None:
    """Every member of every sample is the one that was written."""
    assert [found.key(i) for i in range(len(found))] == [f"{i:06d}" for i in range(SAMPLES)]
    for i in range(SAMPLES):
        assert found.read(i) == {"jpg": picture(i), "json": record(i)}
    assert found.faults == []

"""Bad samples: each cause is counted, named, replaced by the same substitute everywhere, and stops the run in bulk."""

from __future__ import annotations

import json
import logging
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast.config import DataConfig, SourceConfig, ViewsConfig
from cosmos_fast.data import faults
from cosmos_fast.data.batch import Batch
from cosmos_fast.data.faults import Fault, FaultAccount
from cosmos_fast.data.loader import Loader, build_loader
from cosmos_fast.data.sample import MAX_ATTEMPTS
from cosmos_fast.utils.errors import UserError
from tests.shards import picture, record, sample, write_shards, write_tar

GOOD = 19
VIEWS = ViewsConfig(global_crops=1, local_crops=1, global_captions=1, local_captions=1, local_image_size=8)

BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "zero bytes": ({"bad.jpg": b"", "bad.json": record(0)}, faults.EMPTY_MEMBER),
    "truncated image": ({"bad.jpg": picture(1, 140, 140)[:2000], "bad.json": record(0)}, faults.BROKEN_IMAGE),
    "a web page": ({"bad.jpg": b"<html></html>", "bad.json": record(0)}, faults.NOT_AN_IMAGE),
    "too many pixels": ({"bad.jpg": picture(1, 200, 200), "bad.json": record(0)}, faults.TOO_MANY_PIXELS),
    "too many bytes": ({"bad.jpg": b"x" * 70_000, "bad.json": record(0)}, faults.TOO_MANY_BYTES),
    "no image": ({"bad.json": record(0), "bad.txt": b"x"}, faults.MISSING_IMAGE),
    "a mask only": ({"bad.mask.png": picture(1, file_format="PNG"), "bad.json": record(0)}, faults.MISSING_IMAGE),
    "no json": ({"bad.jpg": picture(1)}, faults.MISSING_RECORD),
    "empty json": ({"bad.jpg": picture(1), "bad.json": b""}, faults.EMPTY_MEMBER),
    "wrong json": ({"bad.jpg": picture(1), "bad.json": b'{"raw_caption": ['}, faults.BAD_JSON),
    "json of another kind": ({"bad.jpg": picture(1), "bad.json": b"[]"}, faults.BAD_JSON),
    "no caption": ({"bad.jpg": picture(1), "bad.json": b"{}"}, faults.NO_CAPTION),
    "empty caption": (
        {"bad.jpg": picture(1), "bad.json": json.dumps({"raw_caption": [" "]}).encode()},
        faults.NO_CAPTION,
    ),
}


def loader_of(folder: Path, **changes: Any) -> Loader:
    config = DataConfig(
        train=(SourceConfig(path=str(folder)),),
        views=changes.pop("views", VIEWS),
        workers=changes.pop("workers", 0),
        max_bad_share=changes.pop("max_bad_share", 0.05),
        max_pixels=20_000,
        max_member_bytes=60_000,
    )
    return build_loader(config, **{"image_size": 16, "context_length": 12, "seed": 0, "batch_size": 4, **changes})


def take(loader: Loader, count: int) -> list[Batch]:
    try:
        return list(islice(iter(loader), count))
    finally:
        loader.close()


def with_bad(folder: Path, bad: dict[str, bytes]) -> Path:
    members: dict[str, bytes] = {}
    for number in range(GOOD):
        members.update(sample(number))
    write_tar(folder / "00000.tar", {**members, **bad})
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_sample_is_counted_named_and_replaced(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad, cause = BAD[name]
    loader = loader_of(with_bad(tmp_path, bad))
    with caplog.at_level(logging.WARNING):
        batches = take(loader, 2 * (GOOD + 1) // 4)
    keys = [key for batch in batches for key in batch.keys]
    assert loader.stats == {cause: 2}  # two epochs
    assert len(keys) == 2 * (GOOD + 1)  # batches keep their size
    assert "bad" not in keys
    assert set(keys) == {f"{number:06d}" for number in range(GOOD)}
    named = [message for message in caplog.messages if "00000.tar:bad" in message]
    assert len(named) == 1  # once, not once an epoch
    assert cause in named[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "batch"), [(1, 10), (2, 5), (5, 2)])
def test_substitutes_are_the_same_for_every_split(tmp_path: Path, workers: int, world: int, batch: int) -> None:
    if world == 5 and workers:
        pytest.skip("ten processes say no more than four")
    folder = with_bad(tmp_path, {f"bad{n}.jpg": b"" for n in range(6)})
    whole = take(loader_of(folder, batch_size=10, max_bad_share=1.0), 4)
    ranks = [
        take(loader_of(folder, batch_size=batch, rank=r, world_size=world, workers=workers, max_bad_share=1.0), 4)
        for r in range(world)
    ]
    for step in range(4):
        assert [key for rank in ranks for key in rank[step].keys] == whole[step].keys
        for view in range(2):
            assert torch.equal(torch.cat([rank[step].images[view] for rank in ranks]), whole[step].images[view])
        assert torch.equal(torch.cat([rank[step].texts for rank in ranks], dim=1), whole[step].texts)


def test_counts_come_back_from_worker_processes(tmp_path: Path) -> None:
    loader = loader_of(with_bad(tmp_path, BAD["wrong json"][0]), workers=2)
    take(loader, 5)
    assert loader.stats == {faults.BAD_JSON: 1}


def test_truncated_shard_is_counted_and_the_rest_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_shards(tmp_path, (5, 5))
    os.truncate(folder / "00000.tar", 5000)
    with caplog.at_level(logging.WARNING):
        loader = loader_of(folder)
    assert loader.stats == {faults.TRUNCATED_SHARD: 1}
    assert "truncated shard: 00000.tar" in caplog.text
    assert 5 <= loader.samples_per_epoch < 10
    assert len(take(loader, 3)) == 3


def test_missing_shard_is_refused_before_any_work(tmp_path: Path) -> None:
    write_shards(tmp_path, (5, 5))
    with pytest.raises(UserError, match=r"00002\.tar is missing"):
        loader_of(tmp_path / "{00000..00002}.tar")


def test_run_stops_past_the_share(tmp_path: Path) -> None:
    folder = with_bad(tmp_path, {f"bad{n}.jpg": b"" for n in range(5)})  # 5 of 24 samples, no json, no bytes
    with pytest.raises(UserError) as error:
        take(loader_of(folder, max_bad_share=0.05), 1000)
    message = str(error.value)
    assert "\n" not in message
    assert "data.max_bad_share=0.05" in message
    assert "x missing json member" in message or "x empty member" in message
    assert "00000.tar:bad" in message
    assert len(take(loader_of(folder, max_bad_share=0.5), 60)) == 60


def test_hopeless_data_stops_at_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"", "b.jpg": b"x"})
    with pytest.raises(UserError, match=f"{MAX_ATTEMPTS} tries"):
        take(loader_of(tmp_path, max_bad_share=1.0), 1)
    with pytest.raises(UserError, match="max_bad_share"):
        take(loader_of(tmp_path, max_bad_share=0.001), 1)


def bad(count: int) -> list[Fault]:
    return [Fault(faults.BAD_JSON, f"a.tar:{number}") for number in range(count)]


def test_one_early_bad_sample_does_not_stop_a_run_but_none_allowed_means_none() -> None:
    FaultAccount(0.05).settle(1, bad(1))
    FaultAccount(0.0).settle(100, [])
    with pytest.raises(UserError):
        FaultAccount(0.0).settle(100, bad(1))


def test_share_is_taken_over_a_window() -> None:
    account = FaultAccount(0.05)
    account.settle(100, bad(50))
    for _ in range(30):
        account.settle(100, [])
    account.settle(100, bad(50))  # the first fifty have left the window
    with pytest.raises(UserError, match="100 of the last"):
        account.settle(100, bad(50))
    steady = FaultAccount(0.05)
    for _ in range(100):
        steady.settle(96, bad(4))
    assert steady.counts[faults.BAD_JSON] == 400
    late = FaultAccount(0.05)
    for _ in range(1000):
        late.settle(100, [])
    late.settle(100, bad(40))  # turns bad in the middle
    with pytest.raises(UserError):
        late.settle(100, bad(20))


def test_log_names_each_once_and_does_not_flood(caplog: pytest.LogCaptureFixture) -> None:
    account = FaultAccount(1.0)
    with caplog.at_level(logging.WARNING):
        account.note(bad(5) + bad(5))
        assert len(caplog.messages) == 5
        account.note(bad(500))
    assert len(caplog.messages) == 21
    assert "counted, not named" in caplog.messages[-1]
    assert account.counts[faults.BAD_JSON] == 510

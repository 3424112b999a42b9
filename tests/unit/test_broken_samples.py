"""The fault table: what each loader and `data verify` make of every kind of broken or odd sample and shard."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast.config import DataConfig, SourceConfig, ViewsConfig
from cosmos_fast.data import dali_pipeline, faults
from cosmos_fast.data.batch import Batch
from cosmos_fast.data.faults import Fault, FaultAccount
from cosmos_fast.data.images import denormalize
from cosmos_fast.data.index import open_source
from cosmos_fast.data.loader import build_loader
from cosmos_fast.data.quarantine import Rules
from cosmos_fast.data.verify import verify
from tests.fault_table import IMAGES, MAX_MEMBER_BYTES, MAX_PIXELS, ODDITIES, RECORDS, Oddity
from tests.shards import record, sample, write_shards, write_tar

GOOD = 7
NO_DALI = dali_pipeline.why_unusable("cpu")
LOADERS = ["pil", pytest.param("dali", marks=pytest.mark.skipif(NO_DALI is not None, reason=str(NO_DALI)))]
RULES = Rules("auto", MAX_PIXELS, MAX_MEMBER_BYTES)
PLAIN_VIEWS = ViewsConfig(
    global_crops=1,
    local_crops=1,
    global_captions=1,
    local_captions=1,
    local_image_size=16,
    jitter_p=0.0,
    gray_p=0.0,
    global_blur_p=(0.0,),
    local_blur_p=0.0,
    global_solarize_p=(0.0,),
)


def folder_with(folder: Path, members: dict[str, bytes]) -> Path:
    """A shard of seven good samples, and this one in the middle."""
    before: dict[str, bytes] = {}
    after: dict[str, bytes] = {}
    for number in range(GOOD):
        (before if number < 4 else after).update(sample(number))
    write_tar(folder / "00000.tar", {**before, **members, **after})
    return folder


def epoch_of(folder: Path, loader: str, batch_size: int = GOOD + 1) -> tuple[Batch, dict[str, int]]:
    """The first batch, which is an epoch, and the account."""
    config = DataConfig(
        train=(SourceConfig(path=str(folder)),),
        views=PLAIN_VIEWS,
        loader=loader,  # type: ignore[arg-type]
        workers=0,
        max_bad_share=1.0,
        max_pixels=MAX_PIXELS,
        max_member_bytes=MAX_MEMBER_BYTES,
    )
    made = build_loader(config, image_size=32, context_length=12, seed=1, batch_size=batch_size)
    try:
        return next(islice(iter(made), 1)), made.stats
    finally:
        made.close()


def levels(batch: Batch, key: str) -> list[torch.Tensor]:
    row = batch.keys.index(key)
    return [denormalize(view[row]).float() for view in batch.images]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", IMAGES)
def test_image(name: str, loader: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Unusable: counted and replaced, the batch keeps its size. Odd: the pixels of the picture it shows."""
    odd: Oddity = IMAGES[name]
    if odd.cause is not None:
        check_that_it_is_replaced(tmp_path, odd, loader)
        return
    batch, stats = epoch_of(folder_with(tmp_path / "odd", dict(odd.members)), loader)
    assert stats == odd.repairs
    assert set(batch.keys) == {"odd", *(f"{number:06d}" for number in range(GOOD))}
    plain = folder_with(tmp_path / "plain", {"odd.png": odd.like, "odd.json": record(0)})
    expected, _ = epoch_of(plain, loader)
    for ours, theirs in zip(levels(batch, "odd"), levels(expected, "odd"), strict=True):
        assert (ours - theirs).abs().mean() <= (odd.tolerance if loader == "dali" else 0.0)
    assert "DALI failed" not in caplog.text, "it must not see what it dies of"


@pytest.mark.parametrize("name", RECORDS)
def test_record(name: str, tmp_path: Path) -> None:
    check_that_it_is_replaced(tmp_path, RECORDS[name], "pil")


def check_that_it_is_replaced(folder: Path, odd: Oddity, loader: str) -> None:
    batch, stats = epoch_of(folder_with(folder, dict(odd.members)), loader)
    assert len(batch.keys) == GOOD + 1
    assert stats == {odd.cause: 1}
    assert set(batch.keys) == {f"{number:06d}" for number in range(GOOD)}


@pytest.mark.parametrize("name", ODDITIES)
def test_verify_and_training_after_it(name: str, tmp_path: Path) -> None:
    """Verify finds what the loader would replace, no more; then no position lands on it."""
    odd: Oddity = ODDITIES[name]
    folder = folder_with(tmp_path, dict(odd.members))
    before = (folder / "00000.tar").read_bytes()
    verdict = verify(open_source(SourceConfig(path=str(folder)), whole=True), RULES, workers=1)
    assert (verdict.samples, verdict.read) == (GOOD + 1, GOOD + 1)
    assert [(shard, bad.key, bad.cause) for shard, bad in verdict.bad] == (
        [] if odd.cause is None else [("00000.tar", "odd", odd.cause)]
    )
    assert (folder / "00000.tar").read_bytes() == before
    usable = GOOD + (odd.cause is None)
    assert len(open_source(SourceConfig(path=str(folder)))) == usable
    batch, stats = epoch_of(folder, "pil", batch_size=usable)
    assert stats == odd.repairs
    assert len(set(batch.keys)) == usable


# --- shards


def _cut(where: str) -> Callable[[Path], None]:
    def cut(shard: Path) -> None:
        with tarfile.open(shard) as archive:
            last = archive.getmember("000003.json")
        os.truncate(shard, {"header": last.offset + 100, "data": last.offset_data + 10, "between": last.offset}[where])

    return cut


def _damage_header(shard: Path) -> None:
    with tarfile.open(shard) as archive:
        where = archive.getmember("000003.jpg").offset
    with open(shard, "r+b") as file:
        file.seek(where)
        file.write(b"\xff" * 512)


def _append(*members: tuple[str, bytes]) -> Callable[[Path], None]:
    def append(shard: Path) -> None:
        with tarfile.open(shard, "a") as archive:
            for name, data in members:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))

    return append


def _empty(shard: Path) -> None:
    shard.write_bytes(b"")


def _link(shard: Path) -> None:
    with tarfile.open(shard, "a") as archive:
        entry = tarfile.TarInfo("000009.jpg")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)


TWICE = sample(8, key="000001")
SHARDS: dict[str, tuple[Callable[[Path], None], str, set[int]]] = {
    "cut in a header": (_cut("header"), faults.TRUNCATED_SHARD, {0, 1, 2}),
    "cut in the data": (_cut("data"), faults.TRUNCATED_SHARD, {0, 1, 2}),
    "cut between members": (_cut("between"), faults.TRUNCATED_SHARD, {0, 1, 2}),
    "damaged header": (_damage_header, faults.CORRUPT_SHARD, {0, 1, 2}),
    "no bytes": (_empty, faults.TRUNCATED_SHARD, set()),
    "a key twice": (_append(*TWICE.items()), faults.DUPLICATE_MEMBER, {0, 1, 2, 3}),
    "a member twice": (_append(("000001.jpg", b"no image")), faults.DUPLICATE_MEMBER, {0, 1, 2, 3}),
    "a link": (_link, faults.UNUSABLE_MEMBER, {0, 1, 2, 3}),
}


@pytest.mark.parametrize("reader", [*LOADERS, "verify"])
@pytest.mark.parametrize("name", SHARDS)
def test_shard(name: str, reader: Any, tmp_path: Path) -> None:
    """A damaged shard loses what the damage took, is counted once a kind of loss, and the other shards lose nothing."""
    damage, cause, left = SHARDS[name]
    folder = write_shards(tmp_path, (4, 3))
    damage(folder / "00000.tar")
    keys = {f"{number:06d}" for number in (*left, 4, 5, 6)}
    losses = 2 if name == "a key twice" else 1  # both of its members
    if reader == "verify":
        index = open_source(SourceConfig(path=str(folder)), whole=True)
        verdict = verify(index, RULES, workers=1)
        assert [fault.cause for fault in index.faults] == [cause] * losses
        assert (verdict.samples, verdict.bad) == (len(keys), [])
        return
    batch, stats = epoch_of(folder, reader, batch_size=len(keys))
    assert stats == {cause: losses}
    assert set(batch.keys) == keys


@pytest.mark.parametrize("loader", LOADERS)
def test_the_first_of_two_samples_with_one_key_is_used(loader: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "twice", (4, 3))
    _append(*TWICE.items())(folder / "00000.tar")
    once = write_shards(tmp_path / "once", (4, 3))
    ours, theirs = (epoch_of(source, loader, batch_size=7)[0] for source in (folder, once))
    assert ours.keys == theirs.keys
    assert all(torch.equal(a, b) for a, b in zip(ours.images, theirs.images, strict=True))
    assert torch.equal(ours.texts, theirs.texts)


@pytest.mark.parametrize("loader", LOADERS)
def test_everything_at_once_in_one_batch(loader: str, tmp_path: Path) -> None:
    """One bad sample does not take its neighbours along, however many there are."""
    members = {name.replace("odd.", f"odd{number:02d}."): data for number, odd in enumerate(ODDITIES.values())
               for name, data in odd.members.items()}  # fmt: skip
    folder = folder_with(tmp_path, members)
    total = GOOD + len(ODDITIES)
    batch, stats = epoch_of(folder, loader, batch_size=total)
    usable = {f"odd{number:02d}" for number, odd in enumerate(ODDITIES.values()) if odd.cause is None}
    assert usable < set(batch.keys)
    assert not {key for key in batch.keys if key.startswith("odd")} - usable
    assert len(batch.keys) == total
    causes = [odd.cause for odd in ODDITIES.values() if odd.cause is not None]
    assert all(stats[cause] >= causes.count(cause) for cause in causes)


def test_a_mended_sample_is_counted_but_not_bad() -> None:
    account = FaultAccount(0.0)
    account.settle(10, [Fault(faults.MENDED_IMAGE, "00000.tar:k")])
    assert account.counts == {faults.MENDED_IMAGE: 1}

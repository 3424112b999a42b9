"""What every loader keeps: the same samples for every split over ranks, workers and restarts, whoever decodes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmos_fast.config import SourceConfig, ViewsConfig
from cosmos_fast.data import faults
from cosmos_fast.data.images import denormalize
from cosmos_fast.data.sample import MAX_ATTEMPTS
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.utils.errors import UserError
from tests.loaders import LOADERS, Opener, joined, same, same_but_images, take
from tests.shards import picture, record, sample, write_shards, write_tar

SAMPLES = 23
# One local crop of every size that matters: the images are 40 x 32 pixels.
GEOMETRY = ViewsConfig(
    global_crops=2,
    local_crops=2,
    local_image_size=16,
    flip_p=0.5,
    jitter_p=0.0,
    gray_p=0.0,
    global_blur_p=(0.0,),
    local_blur_p=0.0,
    global_solarize_p=(0.0,),
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), (9, 1, 13))


@pytest.fixture(params=LOADERS)
def opened(request: pytest.FixtureRequest, shards: Path) -> Iterator[Opener]:
    opener = Opener(request.param, shards)
    yield opener
    opener.close()


@pytest.fixture
def by_pil(shards: Path) -> Iterator[Opener]:
    """The loader that the others are compared with."""
    opener = Opener("pil", shards)
    yield opener
    opener.close()


def levels(image: torch.Tensor) -> torch.Tensor:
    """Normalised image -> 0..255."""
    return denormalize(image).int()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within what two resamplers differ by; more at the edges of these pictures, where a bicubic overshoots 255."""
    difference = (levels(ours) - levels(theirs)).abs().float()
    assert difference.mean() < 0.4
    assert (difference > 2).float().mean() < 0.02


def test_a_batch_has_the_contract_of_its_fields(opened: Opener) -> None:
    batch = take(opened(), 1)[0]
    assert [tuple(image.shape) for image in batch.images] == [(4, 3, 20, 20)] * 2 + [(4, 3, 12, 12)] * 3
    assert all(image.dtype == torch.float32 and image.is_contiguous() for image in batch.images)
    assert all(-3 < float(image.min()) < float(image.max()) < 3 for image in batch.images)
    assert batch.texts.shape == (6, 4, 24)
    assert batch.texts.dtype == torch.int64
    assert (batch.texts[:, :, 0] == 49406).all()
    assert (batch.position, batch.next_position) == (0, 4)
    assert len(batch.caption_tokens) == 6


def test_bf16_images_are_the_rounded_fp32_ones(opened: Opener) -> None:
    half, full = take(opened(image_dtype=torch.bfloat16), 1)[0], take(opened(), 1)[0]
    for ours, theirs in zip(half.images, full.images, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs.bfloat16())


def test_views_belong_to_their_sample(opened: Opener, tmp_path: Path) -> None:
    """Images and captions stand in the row of their key, in every view."""
    batch = take(opened(context_length=77), 1)[0]
    for row, key in enumerate(batch.keys):
        number = tokenize([str(int(key))])[0, 1:].tolist()
        digits = number[: number.index(49407)]
        for view in range(6):
            ids = batch.texts[view, row].tolist()
            assert any(ids[at : at + len(digits)] == digits for at in range(70)), (key, view)
    write_tar(tmp_path / "a.tar", {**sample(0)})
    alone = take(opened(tmp_path, batch_size=3), 1)[0]
    assert alone.keys == ["000000"] * 3
    assert not torch.equal(alone.images[0][0], alone.images[0][1])  # another epoch, other numbers


def test_everything_but_rounding_is_that_of_the_pil_loader(opened: Opener, by_pil: Opener) -> None:
    """Same samples, captions, boxes, flips: pixels within what two resamplers differ by."""
    for ours, theirs in zip(take(opened(views=GEOMETRY), 4), take(by_pil(views=GEOMETRY), 4), strict=True):
        assert same_but_images(ours, theirs)
        for x, y in zip(ours.images, theirs.images, strict=True):
            assert_close(x, y)


def test_colours_are_those_of_the_pil_loader(opened: Opener, by_pil: Opener) -> None:
    views = replace(GEOMETRY, jitter_p=1.0, gray_p=0.3, local_blur_p=1.0)
    for ours, theirs in zip(take(opened(views=views), 2), take(by_pil(views=views), 2), strict=True):
        for x, y in zip(ours.images, theirs.images, strict=True):
            difference = (levels(x) - levels(y)).abs().float()
            assert difference.mean() < 1.0
            assert (difference > 6).float().mean() < 0.02  # a hue of 8 bits falls to the other side


def test_an_epoch_sees_every_sample_once(opened: Opener) -> None:
    loader = opened(batch_size=SAMPLES)
    assert loader.samples_per_epoch == SAMPLES
    first, second = take(loader, 2)
    assert sorted(first.keys) == sorted(second.keys) == [f"{i:06d}" for i in range(SAMPLES)]
    assert first.keys != second.keys


@pytest.mark.parametrize(("world", "batch"), [(2, 8), (4, 4), (16, 1)])
def test_every_split_over_ranks_gives_the_same_global_batches(opened: Opener, world: int, batch: int) -> None:
    whole = take(opened(batch_size=16), 3)
    ranks = [take(opened(batch_size=batch, rank=rank, world_size=world), 3) for rank in range(world)]
    for step in range(3):
        assert same(joined([rank[step] for rank in ranks]), whole[step])


def test_resume_continues_at_the_saved_position_on_another_number_of_ranks(opened: Opener) -> None:
    whole = take(opened(batch_size=16), 5)
    position = whole[2].next_position
    ranks = [take(opened(batch_size=4, rank=rank, world_size=4, start_position=position), 2) for rank in range(4)]
    for step in range(2):
        assert same(joined([rank[step] for rank in ranks]), whole[3 + step])


def test_a_run_goes_on_with_the_other_loader(opened: Opener, by_pil: Opener) -> None:
    """A position means the same to both."""
    whole = take(by_pil(), 6)
    position = take(opened(), 3)[-1].next_position
    for ours, theirs in zip(take(by_pil(start_position=position), 3), whole[3:], strict=True):
        assert same(ours, theirs)
    for ours, theirs in zip(take(opened(start_position=position), 3), whole[3:], strict=True):
        assert same_but_images(ours, theirs)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(opened: Opener, workers: int) -> None:
    for ours, theirs in zip(take(opened(workers=workers), 8), take(opened(), 8), strict=True):
        assert same(ours, theirs)


def test_iterating_again_goes_on_and_close_keeps_the_place(opened: Opener) -> None:
    """Batches that were prepared, but not handed out, are no part of the past."""
    whole = take(opened(), 6)
    loader = opened(workers=2)
    parts = take(loader, 2) + take(loader, 2)
    assert loader.position == parts[-1].next_position
    loader.close()
    parts += take(loader, 2)
    assert all(same(a, b) for a, b in zip(parts, whole, strict=True))


def test_seed_changes_order_and_views(opened: Opener) -> None:
    first, other = take(opened(), 1)[0], take(opened(seed=4), 1)[0]
    assert first.keys != other.keys
    assert not torch.equal(first.images[0], other.images[0])


def test_mixture_honours_weights_and_walks_each_source(opened: Opener, shards: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path, (5,), first=100)
    loader = opened(shards, SourceConfig(path=str(other), weight=2.0), batch_size=11)
    assert loader.samples_per_epoch == SAMPLES + 10
    keys = [key for batch in take(loader, 3) for key in batch.keys]
    assert sorted(key for key in keys if key < "000100") == [f"{i:06d}" for i in range(SAMPLES)]
    assert sorted(key for key in keys if key >= "000100") == sorted([f"{i:06d}" for i in range(100, 105)] * 2)


def test_plain_clip_views_cost_nothing_more(opened: Opener) -> None:
    views = ViewsConfig(global_crops=1, local_crops=0, global_captions=1, local_captions=0)
    batch = take(opened(views=views), 1)[0]
    assert [tuple(image.shape) for image in batch.images] == [(4, 3, 20, 20)]
    assert batch.texts.shape == (1, 4, 24)


FORMATS = {
    "a.jpg": picture(1),
    "b.jpeg": picture(2, 33, 47),
    "c.png": picture(3, file_format="PNG"),
    "d.webp": picture(4, file_format="WEBP"),
    "e.jpg": picture(5, mode="L"),
    "f.jpg": picture(6, mode="CMYK"),
    "g.png": picture(7, file_format="PNG", mode="RGBA"),
    "h.jpg": picture(8, 4, 300),
}


def test_every_format_and_shape_is_read(opened: Opener, by_pil: Opener, tmp_path: Path) -> None:
    """Also side by side in one batch, and in batches of one."""
    records = {f"{name[0]}.json": record(number) for number, name in enumerate(FORMATS)}
    write_tar(tmp_path / "a.tar", FORMATS | records)
    ours, theirs = (opener(tmp_path, batch_size=8, views=GEOMETRY) for opener in (opened, by_pil))
    for mine, other in zip(take(ours, 3), take(theirs, 3), strict=True):
        assert same_but_images(mine, other)
        for x, y in zip(mine.images, other.images, strict=True):
            assert_close(x, y)
    assert ours.stats == theirs.stats == {}
    alone = take(opened(tmp_path, batch_size=1, views=GEOMETRY), 8)
    first = take(opened(tmp_path, batch_size=8, views=GEOMETRY), 1)[0]
    assert same(replace(joined(alone), next_position=8), first)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_and_replaced_by_the_same_ones(
    opened: Opener, by_pil: Opener, tmp_path: Path, workers: int
) -> None:
    members: dict[str, bytes] = {}
    for number in range(SAMPLES):
        members.update(sample(number))
    bad = {"x.jpg": b"", "x.json": record(0), "y.jpg": picture(1, 140, 140)[:2000], "y.json": record(0)}
    write_tar(tmp_path / "00000.tar", members | bad | {"z.jpg": picture(1)})
    steps = {"batch_size": 5, "max_bad_share": 1.0, "workers": workers}
    ours, theirs = opened(tmp_path, **steps), by_pil(tmp_path, **steps)
    for mine, other in zip(take(ours, 10), take(theirs, 10), strict=True):
        assert same_but_images(mine, other)
        assert not {"x", "y", "z"} & set(mine.keys)
    assert ours.stats == theirs.stats
    assert ours.stats == {faults.EMPTY_MEMBER: 2, faults.BROKEN_IMAGE: 2, faults.MISSING_RECORD: 2}  # two epochs


def test_hopeless_data_ends_in_one_line(opened: Opener, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"", "b.jpg": b"x"})
    with pytest.raises(UserError, match=f"{MAX_ATTEMPTS} tries") as error:
        take(opened(tmp_path, max_bad_share=1.0), 1)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="max_bad_share"):
        take(opened(tmp_path, max_bad_share=0.001), 1)


def test_only_what_is_handed_out_counts_as_skipped(opened: Opener, by_pil: Opener, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {**sample(0), **sample(1), "x.jpg": picture(1)})
    loader = opened(tmp_path, batch_size=1, max_bad_share=1.0, workers=1, prefetch=4)
    reference = by_pil(tmp_path, batch_size=1, max_bad_share=1.0)
    for _ in range(9):
        take(loader, 1), take(reference, 1)
        assert loader.stats == reference.stats
    assert loader.stats[faults.MISSING_RECORD] >= 3

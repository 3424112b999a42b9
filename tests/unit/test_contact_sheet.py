"""The contact sheet and the page show what the model gets, and nothing in a shard reaches further than its pixels."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosmos_fast.cli.main import command, run
from cosmos_fast.config import DataConfig, SourceConfig, TrainConfig, ViewsConfig
from cosmos_fast.data import contact_sheet, inspect, inspect_page
from cosmos_fast.data.images import denormalize
from cosmos_fast.data.loader import build_loader
from cosmos_fast.data.token_texts import detokenize, token_counts
from cosmos_fast.data.tokenizer import tokenize
from tests.shards import picture, sample, write_shards, write_tar

CONFIG = TrainConfig(name="x", seed=7)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder / "train", (4, 5))
    write_shards(folder / "heldout", (5,), first=100)
    return folder


def test_cards_are_what_the_loader_hands_out(shards: Path) -> None:
    """Pixels and words of the first samples of a run with the same settings."""
    views = ViewsConfig()
    config = DataConfig(train=(SourceConfig(path=str(shards / "train")),), views=views, loader="pil", workers=0)
    loader = build_loader(config, image_size=224, context_length=77, seed=7, batch_size=3)
    (batch,) = islice(loader, 1)
    loader.close()
    cards = contact_sheet.pick_cards(inspect.open_sources(str(shards / "train")), CONFIG, 3)
    assert [card.key for card in cards] == batch.keys
    for row, card in enumerate(cards):
        assert len(card.crops) == len(card.boxes) == len(batch.images) == 8
        for view, crop in enumerate(card.crops):
            pixels = denormalize(batch.images[view][row]).permute(1, 2, 0).numpy()
            assert np.array_equal(np.asarray(crop), pixels)
        assert [caption.text for caption in card.captions] == [detokenize(ids) for ids in batch.texts[:, row].tolist()]
        assert [caption.tokens for caption in card.captions] == (batch.texts[:, row].argmax(dim=1) + 1).tolist()
        assert not any(caption.cut for caption in card.captions)
        assert "raw" in " ".join(caption.text for caption in card.captions) or "ib" in card.captions[0].text
        left, top, right, bottom = card.boxes[0]
        assert 0 <= left < right <= card.size[0] == 40
        assert 0 <= top < bottom <= card.size[1] == 32


def test_sources_share_the_sheet_and_bad_samples_give_their_place(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", (6,))
    bad = {"z.jpg": b"no picture", "z.json": b"{}", "y.jpg": picture(1), "y.json": b"{}"}
    write_tar(tmp_path / "heldout" / "0.tar", {**bad, **sample(100), **sample(101)})
    cards = contact_sheet.pick_cards(inspect.open_sources(str(tmp_path)), CONFIG, 5)
    keys = [card.key for card in cards]
    assert all(key < "000100" for key in keys[:3])
    assert sorted(keys[3:]) == ["000100", "000101"]


def test_the_sheet_has_pictures_with_boxes_crops_in_frames_and_text(shards: Path, tmp_path: Path) -> None:
    sheet_path = tmp_path / "deep" / "sheet.png"
    assert run(command, ["data", "inspect", str(shards), "--samples", "3", "--out", str(sheet_path)]) == 0
    sheet = np.asarray(Image.open(sheet_path).convert("RGB")).astype(np.int16)
    cards = contact_sheet.pick_cards(inspect.open_sources(str(shards)), TrainConfig(name="x"), 3)
    strips = [contact_sheet.strip(card) for card in cards]
    text_left = strips[0].width + 14
    top = 14
    for card, pictures in zip(cards, strips, strict=True):
        shown = sheet[top : top + pictures.height, 14 : 14 + pictures.width]
        assert np.array_equal(shown, np.asarray(pictures))
        colours = {tuple(pixel) for pixel in np.asarray(pictures).reshape(-1, 3).tolist()}
        assert set(contact_sheet._COLOURS) <= colours
        crop = np.asarray(card.crops[0].resize((150, 150), Image.Resampling.LANCZOS))
        assert np.array_equal(np.asarray(pictures)[3:153, 300 + 14 + 3 : 300 + 14 + 153], crop)
        letters = sheet[top : top + pictures.height, text_left:].min(axis=2)
        assert (letters < 100).sum() > 400
        top += max(pictures.height, (1 + len(card.captions)) * 17) + 14


def test_any_number_of_views_and_any_shape_of_image(tmp_path: Path) -> None:
    wide = {"w.jpg": picture(1, 300, 2), "w.json": sample(1)["000001.json"]}
    write_tar(tmp_path / "0.tar", wide)
    views = ViewsConfig(global_crops=1, local_crops=0, global_captions=1, local_captions=0)
    plain = TrainConfig(name="x", data=DataConfig(views=views))
    many = TrainConfig(name="x", data=DataConfig(views=ViewsConfig(global_crops=4, local_crops=9)))
    for config, count in ((plain, 1), (many, 13)):
        (card,) = contact_sheet.pick_cards(inspect.open_sources(str(tmp_path)), config, 2)
        assert len(card.crops) == count
        assert contact_sheet.contact_sheet([card]).height < 400


def test_the_page_stands_alone_and_escapes_what_shards_say(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    members = {f"{evil[:7]}.jpg": picture(1), f"{evil[:7]}.json": json.dumps({"raw_caption": [evil]}).encode()}
    write_tar(tmp_path / "0.tar", {**members, **sample(2), "<b>bad.json": b"{"})
    indexes = inspect.open_sources(str(tmp_path))
    surveys = [inspect.survey(index, CONFIG, 10) for index in indexes]
    page = inspect_page.render(surveys, contact_sheet.pick_cards(indexes, CONFIG, 2), CONFIG)
    assert evil not in page
    assert "&lt; script &gt;" in page  # as the tokenizer left it
    assert "<b>bad" not in page
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert "http" not in page
    assert "tokens a global caption" in page
    assert "missing image member: 1" in page


def test_control_characters_are_drawn_as_spaces() -> None:
    assert contact_sheet.printable("a\x1b[31m red\ncircle") == "a [31m red circle"


@pytest.mark.parametrize("text", ["a red circle", "Café 12 œufs, l'été!", "日本 & 한국", "it's 2.5 m", "a!!", ""])
def test_ids_turn_back_into_what_the_model_reads(text: str) -> None:
    ids = tokenize(text)[0].tolist()
    assert tokenize(detokenize(ids))[0].tolist() == ids
    assert token_counts([text]) == [ids.index(49407) + 1]
    letters = detokenize(ids).replace(" ", "")
    assert letters == text.lower().replace(" ", "")


def test_a_text_over_the_context_length_is_shown_cut() -> None:
    ids = tokenize("one two three four five", context_length=5)[0].tolist()
    assert detokenize(ids) == "one two three"
    assert token_counts(["one two three four five", ""]) == [7, 2]

"""`bench eval`: both sides of every part come to the same numbers, and one that does not is found out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_eval, eval_parts
from benchmarks.bars import BARS, OPEN
from benchmarks.eval_parts import Gallery
from benchmarks.rows import Row

TINY = bench_eval.tiny("cpu")
PARTS = {
    "encoding": bench_eval.measure_encoding,
    "retrieval": bench_eval.measure_retrieval,
    "segmentation": bench_eval.measure_segmentation,
    "class texts": bench_eval.measure_class_texts,
}


@pytest.fixture(autouse=True)
def memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes: what they measure is not looked at here."""

    def peak_mib(work, *, device, settle):
        settle()
        work()
        return 3.0

    monkeypatch.setattr(bench_eval, "peak_mib", peak_mib)
    monkeypatch.setitem(bench_eval.SETTINGS, "cpu", TINY)


def test_every_part_is_measured_and_every_bar_is_of_a_row(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    bench_eval.command.main(args=["--out", str(out)], standalone_mode=False)
    rows = [Row(**row) for row in json.loads(out.read_text())]
    names = {"image_ms", "caption_ms", "retrieval_ms", "retrieval_peak_mib", "segmentation_ms", "class_texts_ms"}
    assert {row.metric for row in rows} == names | {f"{name}/baseline" for name in names}
    for bar in BARS:
        if (bar.device, bar.name) == ("cpu", "eval"):
            assert bar.verdict(rows) != OPEN, bar.what
            assert [row.bar for row in bar.rows(rows)] == [pytest.approx(bar.limit, rel=1e-3)]


WRONG = {
    "encoding": (eval_parts.Pairs, "images_ready", lambda self, _: torch.ones(3, 16)),
    "retrieval": (bench_eval, "metrics_in_blocks", lambda gallery: {"i2t_r1": 1.0}),
    "segmentation": (
        eval_parts.Segmented,
        "across_images",
        lambda self, scenes: [torch.full(shape, 200, dtype=torch.uint8) for _, shape in scenes],
    ),
    "class texts": (eval_parts.ClassTexts, "class_by_class", lambda self, _: torch.ones(2, 16)),
}


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_timed_where_the_sides_disagree(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*WRONG[part])
    with pytest.raises(AssertionError):
        list(PARTS[part](TINY, 7))


def test_sorting_the_whole_matrix_gives_the_ranks_that_are_expected() -> None:
    text_MD = torch.tensor([[3, 2, 1], [2.5, 1, 2], [1, 2.5, 3], [2, 1.5, 3.5]])
    found = eval_parts.metrics_by_sorting(Gallery(torch.eye(3), text_MD, torch.tensor([0, 1, 2, 0])))
    # The images' captions stand in the order 0 1 3 2, 2 0 3 1, 3 2 1 0; the best own ones are 0, 1, 2.
    assert found["i2t_r1"] == pytest.approx(100 / 3)
    assert found["i2t_mean_rank"] == pytest.approx((1 + 4 + 2) / 3)
    assert found["t2i_r1"] == 50.0
    assert found["t2i_mean_rank"] == (1 + 3 + 1 + 2) / 4


def test_made_galleries_are_normalised_and_captions_resemble_their_image() -> None:
    gallery = Gallery.made(30, 150, 64, seed=3)
    assert torch.allclose(gallery.text_MD.norm(dim=1), torch.ones(150))
    assert torch.bincount(gallery.owner_M).tolist() == [5] * 30
    own = (gallery.image_ND[gallery.owner_M] * gallery.text_MD).sum(dim=1).mean()
    assert own > 0.1 > (gallery.image_ND @ gallery.text_MD.T).mean().abs()

"""The report's sentences, table, curves and files, on made-up numbers."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from cosmos_fast.config import TrainConfig, dump_config, load_config
from cosmos_fast.evaluate.report import build, findings, page, plots
from cosmos_fast.evaluate.report.findings import CHANCE, CLIP, STUDENT, TEACHER
from cosmos_fast.evaluate.report.runs import Run, read_run
from cosmos_fast.recipes import get_recipe
from cosmos_fast.utils.errors import UserError


def metrics(level: float) -> dict[str, float]:
    return {measure.key: level for measure in findings.MEASURES}


def results(teacher: float, clip: float) -> dict[str, dict[str, float]]:
    return {TEACHER: metrics(teacher), STUDENT: metrics(teacher - 1), CLIP: metrics(clip), CHANCE: metrics(0.2)}


def test_reading_says_who_wins_either_way_and_when_it_is_close() -> None:
    won = findings.reading(results(60, 40), 500, 1.01)
    assert "60.0 % of images (300× chance)" in won
    assert "plain CLIP of equal compute reaches 40.0 %" in won
    assert won.endswith("COSMOS is ahead in all 9 measures.")
    assert findings.reading(results(40, 60), 500, 2.0).endswith("plain CLIP is ahead in all 9 measures.")
    assert "2.00× the compute" in findings.reading(results(40, 60), 500, 2.0)
    assert "too close to call in all 9" in findings.reading(results(40, 42), 500, None)


def test_reading_of_a_mixed_outcome_names_the_losses() -> None:
    mixed = results(60, 40)
    mixed[CLIP] |= {"shape_miou": 70.0, "colour_top1": 90.0, "t2i_r1": 59.0}
    sentence = findings.reading(mixed, 500, 1.0)
    assert "plain CLIP wins classification by colour and mIoU of shapes" in sentence
    assert "COSMOS wins image → text R@1, classification by shape" in sentence
    assert sentence.endswith("too close to call in text → image R@1.")


def test_reading_without_clip_compares_with_chance_only() -> None:
    alone = results(60, 0)
    del alone[CLIP]
    assert "CLIP" not in findings.reading(alone, 500, None)


def test_differences_need_two_standard_errors() -> None:
    measure = findings.MEASURES[0]
    # 500 scenes, 50 %: one standard error of a difference is 100 * sqrt(2 * 0.25 / 500) = 3.16 points.
    assert findings.margin(measure, 50, 50, 500) == pytest.approx(6.32, abs=0.01)
    assert findings.margin(measure, 0, 0, 500) > 0


def test_table_stars_the_best_model_never_chance_and_ranks_count_downwards() -> None:
    values = results(10, 30)
    values[CHANCE]["i2t_r1"] = 99.0
    lines = {(line.group, line.label): line.cells for line in findings.table(values)}
    best = lines["Image → text", "R@1"]
    assert [entity for entity, cell in best.items() if cell.best] == [CLIP]
    rank = lines["Image → text", "median rank"]
    assert [entity for entity, cell in rank.items() if cell.best] == [STUDENT]
    assert rank[STUDENT].share == 0.0


def test_table_stars_all_that_look_equal() -> None:
    values = results(10, 30)
    values[TEACHER]["shape_miou"], values[CLIP]["shape_miou"] = 30.04, 30.01
    cells = next(line.cells for line in findings.table(values) if line.label == "mIoU of shapes")
    assert cells[TEACHER].best
    assert cells[CLIP].best


def make_run(folder: Path, objective: str, steps: int = 40, flops_a_step: float = 2e9) -> Run:
    config: TrainConfig = load_config(get_recipe("demo" if objective == "cosmos" else "demo_clip"))
    rows = []
    for step in range(10, steps + 1, 10):
        rows.append(
            {
                "kind": "train",
                "step": step,
                "epoch": step / 10,
                "samples_seen": step * 64,
                "loss": 5.0,
                "clip_loss": 4.0 - step / 20,
                "distill_loss": 1.0 if objective == "cosmos" else None,
                "lr": 1e-3,
                "logit_scale": 14.3,
                "distill_logit_scale": 14.4,
                "samples_per_s": 64.0,
                "data_stall_pct": 1.0,
                "flops": flops_a_step * step,
            }
        )
        evaluated = {"student_i2t_r1": step, "teacher_i2t_r1": step / 2, "chance_i2t_r1": 0.2}
        rows.append({"kind": "eval", "step": step, **evaluated})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "st')
    return read_run(folder)


def test_run_folder_is_read_past_a_cut_line_and_repeated_steps_count_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "cosmos")
    assert [row["step"] for row in run.train] == [10, 20, 30, 40]
    assert len(run.evals) == 4
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write('\n{"kind": "train", "step": 20, "clip_loss": 9.5, "samples_seen": 1, "samples_per_s": 1}\n')
    assert read_run(tmp_path / "a").series("clip_loss") == ([10, 20, 30, 40], [3.5, 9.5, 2.5, 2.0])


def test_compute_axis_interpolates_between_logged_rows_from_zero(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "cosmos")
    assert run.flops_at([0, 5, 15, 40, 50]) == [0.0, 1e10, 3e10, 8e10, 1e11]
    assert run.total_flops == 8e10


def test_training_seconds_add_up_samples_over_throughput(tmp_path: Path) -> None:
    assert build.training_seconds(make_run(tmp_path / "a", "cosmos")) == pytest.approx(40.0)


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    make_run(tmp_path / "a", "cosmos")
    (tmp_path / "a" / missing).unlink()
    with pytest.raises(UserError, match=re.escape(missing)):
        read_run(tmp_path / "a")
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "b")


def test_a_run_without_training_rows_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "cosmos")
    (tmp_path / "a/metrics.jsonl").write_text('{"kind": "eval", "step": 1}\n')
    with pytest.raises(UserError, match="no training rows"):
        read_run(tmp_path / "a")


def test_plots_come_in_two_themes_and_those_without_data_are_left_out(tmp_path: Path) -> None:
    drawn = {plot.key: plot for plot in plots.training_plots(make_run(tmp_path / "a", "cosmos"), None)}
    assert "retrieval_i2t" in drawn
    assert "retrieval_t2i" not in drawn  # no such numbers in the rows
    sizes = {name: Image.open(io.BytesIO(data)).size for name, data in drawn["loss_clip"].png.items()}
    assert sizes.keys() == {"light", "dark"}
    assert len(set(sizes.values())) == 1
    light, dark = (Image.open(io.BytesIO(drawn["lr"].png[name])).convert("L") for name in ("light", "dark"))
    assert light.getpixel((2, 2)) > 200 > 100 > dark.getpixel((2, 2))


def test_retrieval_curves_of_unequal_steps_end_at_their_own_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[plots.Curve]] = []
    monkeypatch.setattr(plots, "draw", lambda curves, *_, **__: seen.append(list(curves)) or {})
    cosmos = make_run(tmp_path / "a", "cosmos", flops_a_step=8e9)
    clip = make_run(tmp_path / "b", "clip", steps=80, flops_a_step=4e9)
    plots.training_plots(cosmos, clip)
    ends = {curve.label: (curve.x[-1], curve.y[-1]) for curve in seen[0]}
    assert ends["COSMOS teacher"] == (320.0, 20.0)
    assert ends["plain CLIP"] == (320.0, 80.0)  # twice the steps at half the cost
    assert ends["chance"] == (320.0, 0.2)


def test_configuration_shows_no_folders(tmp_path: Path) -> None:
    overrides = ["data.train=/secret/place/train", "run.out_dir=/secret/out", "evaluate.data=/secret/place/heldout"]
    text = build.config_text(load_config(get_recipe("demo"), overrides))
    assert "secret" not in text
    assert "path: train" in text


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    page.write_files(tmp_path / "out", {"a.html": b"1", "plots/b.png": b"2"})
    assert (tmp_path / "out/plots/b.png").read_bytes() == b"2"
    # "a.html/x" cannot be written once a.html is a file in the same report: nothing of it may show.
    with pytest.raises(UserError, match="cannot be written"):
        page.write_files(tmp_path / "out", {"a.html": b"new", "a.html/x": b"bad"})
    assert (tmp_path / "out/a.html").read_bytes() == b"1"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.html", "plots"]


def test_page_escapes_captions_and_refuses_missing_names() -> None:
    template = "{{ caption }}"
    assert "<script>" not in page.environment().from_string(template).render(caption="<script>")
    with pytest.raises(Exception, match="undefined"):
        page.environment().from_string(template).render()

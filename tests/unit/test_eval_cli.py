"""`cosmos-fast eval run` and `eval report`, end to end on tiny models, and every mistake in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cosmos_fast.cli.eval import command
from cosmos_fast.cli.main import run as run_command
from cosmos_fast.config import SourceConfig, TrainConfig, dump_config, load_config
from cosmos_fast.data.synthetic.writer import DatasetSettings, write_dataset
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate.scenes import SceneSet
from cosmos_fast.evaluate.tasks import evaluate
from cosmos_fast.evaluate.validators import RetrievalValidator, build_validators
from cosmos_fast.model.checkpoints import load_checkpoint
from cosmos_fast.model.cosmos import create_model
from cosmos_fast.recipes import get_recipe
from tests.shards import sample, write_tar
from tests.web import serve

TINY = (
    "model.embed_dim=16",
    "model.vision.image_size=16",
    "model.vision.width=16",
    "model.vision.head_width=8",
    "model.vision.layers=1",
    "model.text.width=16",
    "model.text.heads=2",
    "model.text.layers=1",
    "data.views.local_image_size=8",
    "run.batch_size=4",
)


def tiny_config(recipe: str, data: Path) -> TrainConfig:
    paths = (f"data.train={data / 'train'}", f"evaluate.data={data / 'heldout'}")
    return load_config(get_recipe(recipe), [*TINY, *paths])


def write_run(folder: Path, config: TrainConfig) -> None:
    """A run folder as the trainer leaves it, with random weights."""
    step = folder / "checkpoints/step_00000010"
    step.mkdir(parents=True)
    for seed, weights in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        model = create_model(config.model)
        metadata = {"format": "cosmos-fast/1", "model": json.dumps(config.model.to_openclip()), "weights": weights}
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, step / f"{weights}.safetensors", metadata)
    (step / "manifest.json").write_text("{}")
    (folder / "config.yaml").write_text(dump_config(config))
    row = {"kind": "train", "step": 10, "epoch": 1.0, "samples_seen": 40, "samples_per_s": 8.0, "clip_loss": 1.0}
    row |= {"distill_loss": 1.0, "lr": 1e-3, "logit_scale": 14.0, "flops": 1e9, "data_stall_pct": 0.0}
    evaluated = {"kind": "eval", "step": 10, "student_i2t_r1": 10.0, "teacher_i2t_r1": 12.0, "chance_i2t_r1": 8.3}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(evaluated)}\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    write_dataset(folder / "data", DatasetSettings(train=4, heldout=12), workers=1)
    write_run(folder / "cosmos", tiny_config("demo", folder / "data"))
    write_run(folder / "clip", tiny_config("demo_clip", folder / "data"))
    return folder


def run_arguments(place: Path, result: Path, **changes: str) -> list[str]:
    options = {"checkpoint": str(place / "cosmos"), "data": str(place / "data/heldout"), "out": str(result)} | changes
    return ["run", *(part for name, value in options.items() for part in (f"--{name}", value))]


def test_run_writes_what_the_tasks_measure_with_chance_and_digests(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert run_command(command, run_arguments(place, out, weights="student")) == 0
    content = json.loads(out.read_text())
    model = load_checkpoint(place / "cosmos", "student")
    scenes = SceneSet((SourceConfig(path=str(place / "data/heldout")),))
    for task in ("retrieval", "classification", "segmentation"):
        expected = evaluate(model, scenes, task)
        assert content["tasks"][task]["metrics"] == pytest.approx(expected.metrics, nan_ok=True)
        assert content["tasks"][task]["chance"] == pytest.approx(expected.chance)
    assert content["tasks"]["retrieval"]["chance"]["i2t_r1"] == pytest.approx(100 / 12)
    assert content["checkpoint"]["name"] == "student.safetensors"
    assert re.fullmatch("[0-9a-f]{64}", content["checkpoint"]["sha256"])
    assert content["data"]["sha256"] == scenes.sha256()
    assert str(place) not in out.read_text()


def test_run_prints_a_table_beside_chance(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = run_arguments(place, tmp_path / "r.json", tasks="retrieval")
    assert run_command(command, [*arguments, "--max-samples", "5"]) == 0
    shown = capsys.readouterr().out
    assert "chance" in shown
    assert "20.0" in shown  # R@1 among five
    assert "mIoU" not in shown


MISTAKES = {
    "no such checkpoint": ({"checkpoint": "{place}/nowhere"}, "nowhere does not exist"),
    "a checkpoint that is something else": ({"checkpoint": "{place}/data/meta.json"}, "meta.json"),
    "no such data": ({"data": "{place}/nowhere"}, "nowhere"),
    "a folder without shards": ({"data": "{place}/cosmos"}, "no .tar"),
    "an empty shard": ({"data": "{place}/empty.tar"}, "holds no sample"),
    "no meta.json": ({"data": "{place}/lonely/a"}, "meta.json"),
    "no folder for the result": ({"out": "{place}/nowhere/r.json"}, "does not exist"),
    "an unknown task": ({"tasks": "retrieval,detection"}, "detection"),
    "a setting that evaluation has not": ({"set": "run.batch_size=4"}, "data.remote.*"),
    "a setting that nothing has": ({"set": "data.remote.retry=4"}, "data.remote.retry_s"),
    "an unknown device": ({"device": "abacus"}, "abacus"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line_and_leave_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    (place / "empty.tar").write_bytes(bytes(10240))
    (place / "lonely/a").mkdir(parents=True, exist_ok=True)
    shutil.copy(place / "data/heldout/00000.tar", place / "lonely/a/00000.tar")
    changes, message = MISTAKES[mistake]
    out = tmp_path / "r.json"
    arguments = run_arguments(place, out, **{name: value.format(place=place) for name, value in changes.items()})
    assert run_command(command, arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith(("error:", "Error:"))]) == 1
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_remote_shards_are_read_as_the_settings_say(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(tmp_path / "cache"))
    folder, files = tmp_path / "mine", [tmp_path / "local.json", tmp_path / "remote.json"]
    with serve(place / "data/heldout") as web:
        local = run_arguments(place, files[0], tasks="retrieval")
        remote = run_arguments(place, files[1], tasks="retrieval", data=f"{web.url}/00000.tar")
        assert run_command(command, local) == 0
        assert run_command(command, [*remote, "--set", f"data.remote.cache_dir={folder}"]) == 0
        assert [path for path in folder.rglob("*") if path.is_file()]
        found = [json.loads(file.read_text())["tasks"] for file in files]
        assert found[0] == found[1]
        web.fail = 1_000_000
        settings = ("--set", "data.remote.retry_s=0.01", "--set", "data.remote.cache_gib=0")
        capsys.readouterr()
        assert run_command(command, [*remote, *settings]) == 2
        assert "503" in capsys.readouterr().err


def report_arguments(place: Path, out: Path, *more: str) -> list[str]:
    runs = ["--cosmos", str(place / "cosmos"), "--clip", str(place / "clip")]
    return ["report", *runs, "--data", str(place / "data/heldout"), "--out", str(out), *more]


def test_report_is_one_page_that_loads_nothing(place: Path, tmp_path: Path) -> None:
    assert run_command(command, report_arguments(place, tmp_path / "out")) == 0
    html = (tmp_path / "out/report.html").read_text()
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,12})', html)
    assert len(sources) > 30
    assert all(source.startswith("data:image/") for source in sources)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert str(place) not in html
    titles = ("Results", "Training", "best captions", "Where attention goes", "Segmentation", "What the model sees")
    assert [title for title in titles if title not in html] == []
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results["results"]) == {"teacher", "student", "clip"}
    assert results["runs"]["cosmos"]["training_seconds"] == 5.0
    assert (tmp_path / "out/plots/loss_clip.png").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "results.json", "plots"}


def test_report_without_clip_compares_with_chance(place: Path, tmp_path: Path) -> None:
    arguments = ["report", "--cosmos", str(place / "cosmos"), "--data", str(place / "data/heldout")]
    assert run_command(command, [*arguments, "--out", str(tmp_path / "out"), "--max-samples", "6"]) == 0
    assert "plain CLIP" not in (tmp_path / "out/report.html").read_text()


def test_report_fails_loudly_below_the_required_multiple_of_chance_and_segments_as_many_scenes_as_asked_for(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ("--require-chance-multiple", "50", "--max-samples", "6", "--segmentation-samples", "3")
    assert run_command(command, report_arguments(place, tmp_path / "out", *changes)) == 1
    assert re.search(r"FAILED: .*below the required 50 times", capsys.readouterr().err)
    page = (tmp_path / "out/report.html").read_text()  # what went wrong can be looked at
    assert "Segmentation is measured on 3 of the scenes." in page
    tasks = json.loads((tmp_path / "out/results.json").read_text())["results"]["teacher"]
    assert tasks["segmentation"]["protocol"]["images"] == 3
    assert tasks["retrieval"]["protocol"]["images"] == 6


def test_report_refuses_a_clip_run_that_is_no_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = report_arguments(place, tmp_path / "out")
    arguments[arguments.index("--clip") + 1] = str(place / "data")
    assert run_command(command, arguments) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_validator_reports_what_retrieval_measures_for_both_models(place: Path) -> None:
    config = tiny_config("demo", place / "data")
    (validator,) = build_validators(config)
    student, teacher = (load_checkpoint(place / "cosmos", weights) for weights in ("student", "teacher"))
    row = validator(10, student, teacher)
    scenes = SceneSet((SourceConfig(path=str(place / "data/heldout")),))
    for name, model in (("student", student), ("teacher", teacher)):
        expected = evaluate(model, scenes, "retrieval").metrics
        assert row[f"{name}_i2t_r5"] == pytest.approx(expected["i2t_r5"])
        assert row[f"{name}_t2i_median_rank"] == pytest.approx(expected["t2i_median_rank"])
    assert row["chance_i2t_r1"] == pytest.approx(100 / 12)
    assert build_validators(load_config(config, ["evaluate.data=null"])) == []


def test_equal_captions_are_encoded_once_in_a_training(tmp_path: Path) -> None:
    members = [sample(number % 3, key=str(number)) for number in range(8)]
    shard = write_tar(tmp_path / "0.tar", {name: data for one in members for name, data in one.items()})
    config = load_config(tiny_config("demo", tmp_path), [f"evaluate.data={shard}", "evaluate.batch_size=2"])
    validator = RetrievalValidator(config)
    captions = [f"raw {number % 3}" for number in range(8)]
    assert sum(map(len, validator.tokens)) == 3
    rows = torch.cat(validator.tokens)[validator.row_M]
    assert torch.equal(rows, tokenize(captions, config.model.text.context_length))

"""A run that begins with the weights of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cosmos_fast import create_model
from cosmos_fast.config import ModelConfig
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.model.weights import CROSSMODAL
from cosmos_fast.utils.errors import UserError
from tests.tiny_run import losses_of, make_trainer, tiny_config

COSMOS = tiny_config(Path()).model
CLIP = ModelConfig(**{**vars(COSMOS), "crossmodal": False})


def write(file: Path, config: ModelConfig, seed: int = 7) -> CosmosModel:
    """A model in a file that says what it is of."""
    torch.manual_seed(seed)
    model = create_model(config)
    save_file(model.state_dict(), file, {"format": "cosmos-fast/1", "model": json.dumps(config.to_openclip())})
    return model


def differing(model: CosmosModel, expected: CosmosModel) -> set[str]:
    others = expected.state_dict()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, others[name])}


def test_student_and_teacher_begin_with_the_weights(tmp_path):
    given = write(tmp_path / "cosmos.safetensors", COSMOS)
    trainer = make_trainer(tiny_config(tmp_path, f"init.path={tmp_path}/cosmos.safetensors"))
    assert not differing(trainer.student, given)
    assert not differing(trainer.teacher, given)
    assert differing(make_trainer(tiny_config(tmp_path)).student, given)


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_a_file_of_two_models_gives_the_one_that_is_asked_for(tmp_path, weights):
    models = {"student": create_model(COSMOS), "teacher": create_model(COSMOS)}
    folder = tmp_path / "step"
    folder.mkdir()
    for seed, name in enumerate(models):
        models[name] = write(folder / f"{name}.safetensors", COSMOS, seed)
    trainer = make_trainer(tiny_config(tmp_path, f"init.path={folder}", f"init.weights={weights}"))
    assert not differing(trainer.student, models[weights])
    assert not differing(trainer.teacher, models[weights])


def test_plain_clip_leaves_the_heads_as_the_seed_made_them(tmp_path, caplog):
    given = write(tmp_path / "clip.safetensors", CLIP)
    fresh = make_trainer(tiny_config(tmp_path)).student
    with caplog.at_level("INFO", logger="cosmos_fast"):
        trainer = make_trainer(tiny_config(tmp_path, f"init.path={tmp_path}/clip.safetensors"))
    assert "cross-modal heads begin fresh" in caplog.text
    for model in (trainer.student, trainer.teacher):
        assert not differing(given, model)
        heads = {name for name in model.state_dict() if name.startswith(CROSSMODAL)}
        assert len(heads) == 21
        assert differing(model, fresh).isdisjoint(heads)


@pytest.mark.parametrize("pool_heads", [2, 4])
def test_heads_are_left_out_where_plain_clip_is_trained(tmp_path, pool_heads):
    """However many attention heads they have."""
    given = write(tmp_path / "cosmos.safetensors", ModelConfig(**{**vars(COSMOS), "pool_heads": pool_heads}))
    path = f"init.path={tmp_path}/cosmos.safetensors"
    trainer = make_trainer(tiny_config(tmp_path, path, recipe="demo_clip"))
    assert not trainer.config.model.crossmodal
    assert not differing(trainer.student, given)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.embed_dim=32", "its model.embed_dim is 16, here it is 32"),
        ("model.pool_heads=4", "its model.pool_heads is 2, here it is 4"),
        ("model.vision.head_width=16", "its model.vision.head_width is 8, here it is 16"),
        ("model.text.heads=4", "its model.text.heads is 2, here it is 4"),
    ],
)
def test_another_architecture_is_named_and_nothing_is_written(tmp_path, setting, message):
    """Also where the shapes are the same."""
    write(tmp_path / "cosmos.safetensors", COSMOS)
    config = tiny_config(tmp_path / "runs", setting, f"init.path={tmp_path}/cosmos.safetensors")
    with pytest.raises(UserError, match=f"another architecture: {message}"):
        make_trainer(config)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_goes_on_needs_the_file_no_more(tmp_path):
    file = tmp_path / "cosmos.safetensors"
    write(file, COSMOS)
    config = tiny_config(tmp_path, f"init.path={file}")
    whole = make_trainer(config)
    whole.fit()
    first = make_trainer(tiny_config(tmp_path / "again", f"init.path={file}"))
    first.hooks.insert(0, StopAt(3))
    first.fit()
    file.unlink()
    plan = plan_run(first.config, resume="auto")
    assert plan.state.step == 3
    second = make_trainer(first.config, plan=plan)
    second.fit()
    assert losses_of(second) == losses_of(whole)
    with pytest.raises(UserError, match=r"cosmos\.safetensors does not exist"):
        make_trainer(tiny_config(tmp_path / "anew", f"init.path={file}"))


class StopAt:
    """Asks the run to stop after a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer, outcome) -> None:
        if trainer.state.step == self.step:
            trainer.stop.signal_name = "SIGTERM"

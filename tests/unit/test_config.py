"""Reading, checking and writing configurations."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
import yaml

from cosmos_fast.config import (
    ModelConfig,
    SourceConfig,
    TrainConfig,
    ViewsConfig,
    VisionConfig,
    dotted_names,
    dump_config,
    load_config,
    named_model,
)
from cosmos_fast.recipes import RECIPES, get_recipe
from cosmos_fast.utils.errors import UserError

BASE = TrainConfig(name="base")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_yaml_reads_back_equal(name: str, tmp_path) -> None:
    config = load_config(
        get_recipe(name), ["data.train=[{path: 'a/{0..9}.tar', weight: 0.25}, b]", "optimizer.clip_norm=1e-3"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert config.data.train == (SourceConfig(path="a/{0..9}.tar", weight=0.25), SourceConfig(path="b"))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),  # YAML 1.1 reads 1e-3 as text
        ("run.epochs=2", "run.epochs", 2.0),
        ("run.max_steps=null", "run.max_steps", None),
        ("run.tensorboard=true", "run.tensorboard", True),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("name=007", "name", "007"),
        ("compute.compile=true", "compute.compile", True),
        ("compute.checkpoint_activations=none", "compute.checkpoint_activations", "none"),
        ("data.views.global_blur_p=[0.5]", "data.views.global_blur_p", (0.5,)),
    ],
)
def test_override_value(override: str, key: str, value: object) -> None:
    config = load_config(BASE, [override])
    found: object = config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        ("shards", ["shards"]),
        ("{a,b}/{00..09}.tar", ["{a,b}/{00..09}.tar"]),
        ("[x, y]", ["x", "y"]),
        ("[{path: x, weight: 2}, y]", ["x", "y"]),
        ("{path: x}", ["x"]),
    ],
)
def test_source_shorthand(value: str, paths: list[str]) -> None:
    for key in ("data.train", "evaluate.data"):
        config = load_config(BASE, [f"{key}={value}"])
        sources = config.data.train if key == "data.train" else config.evaluate.data
        assert sources is not None
        assert [source.path for source in sources] == paths


def test_later_override_wins_and_section_can_be_given_whole() -> None:
    config = load_config(BASE, ["optimizer.lr=1", "optimizer={lr: 2, weight_decay: 0}", "optimizer.lr=3"])
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.eps) == (3.0, 0.0, 1e-8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimzer.lr=3", "did you mean 'optimizer.lr'"),
        ("lr=3", "did you mean 'optimizer.lr'"),
        ("run.batchsize=3", "did you mean 'run.batch_size'"),
        ("model.visoin.width=3", "did you mean 'model.vision.width'"),
        ("optimizer={learning: 3}", "unknown configuration key 'optimizer.learning'"),
        ("run.batch_size.x=1", "did you mean 'run.batch_size'"),
        ("optimizer=3", "optimizer is a section"),
        ("optimizer.lr", "is not of the form key=value"),
        ("run.batch_size=many", "'run.batch_size' is 'many'"),
        ("run.batch_size=0", "run.batch_size is 0"),
        ("optimizer.lr=yes", "'optimizer.lr' is True (so YAML reads yes"),
        ("run={max_steps: on}", "'run.max_steps' is True"),
        ("optimizer.betas=[0.5, no]", "'optimizer.betas.1' is False"),
        ("data.train=[{path: x, weight: true}]", "'data.train.0.weight' is True"),
        ("optimizer.lr=.nan", "optimizer.lr is nan"),
        ("model.vision.width=100", "model.vision.width=100 is not a multiple of model.vision.head_width=64"),
        ("data.views.local_image_size=50", "data.views.local_image_size=50 is not a multiple"),
        ("data.views.global_scale=[0.5, 0.1]", "data.views.global_scale"),
        ("data.views.jitter_p=1.5", "data.views.jitter_p is 1.5"),
        ("data.train=[{pth: x}]", "give a path"),
        ("data.train=[{path: x, wieght: 1}]", "unknown key 'wieght'"),
        ("data.train=[{path: x, weight: 0}]", "weight is 0"),
        ("run.epochs=null", "run.epochs and run.max_steps are both empty"),
        ("objective=clip", "set model.crossmodal=false"),
        ("model.crossmodal=false", "set model.crossmodal=true"),
        ("objective=siglip", "'objective' is 'siglip'"),
        ("name=../x", "it names a folder"),
        ("ema.decay=1.01", "ema.decay is 1.01"),
        ("compute.linear=fp4", "'compute.linear' is 'fp4'"),
        ("compute.checkpoint=mlp", "did you mean 'compute.checkpoint_activations'"),
        ("compute.fp8_backend=te", "set compute.linear=fp8"),
        ("compute={compile: true, layer_norm: apex}", "set compute.layer_norm=torch"),
        ("compute={checkpoint_activations: mlp, layer_norm: triton}", "set compute.layer_norm=torch, or"),
    ],
)
def test_mistake_is_one_line_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(BASE, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match=r"set run\.accumulate_steps=1 or compute\.cuda_graphs=false"):
        load_config(BASE, ["compute.cuda_graphs=true", "run.accumulate_steps=2"])
    with pytest.raises(UserError, match=r"set run\.precision=bf16 or compute\.linear=plain"):
        load_config(BASE, ["compute.linear=fp8", "run.precision=fp16"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nrun: {batch: 3}", "did you mean 'run.batch_size'"),
        ("run: {batch_size: 3}", "'name' is missing"),
        ("- 1", "must hold keys and values"),
        ("a: [", "is not valid YAML"),
        ("name: x\nrun: {}\nseed: 1\nrun: {epochs: 1}", "line 4 gives 'run' again, after line 2: keep one"),
        ("name: x\noptimizer:\n  lr: 1\n  'lr': 2", "line 4 gives 'lr' again, after line 3"),
        ("name: x\noptimizer: 3", "'optimizer' is 3"),
    ],
)
def test_bad_file(text: str, message: str, tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_that_yaml_merges_may_be_given_again(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: x\noptimizer: &o {lr: 1, eps: 2}\n<<: {optimizer: {<<: *o, lr: 3}, seed: 4}\nseed: 5\n")
    config = load_config(file)
    assert (config.optimizer.lr, config.seed) == (1.0, 5)


def test_missing_file() -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_config("nowhere.yaml")


def test_every_dataclass_is_frozen_and_keyword_only() -> None:
    def visit(section: object) -> None:
        with pytest.raises(FrozenInstanceError):
            section.name = "x"  # type: ignore[attr-defined]
        for field in fields(section):  # type: ignore[arg-type]
            assert field.kw_only
            value = getattr(section, field.name)
            if is_dataclass(value):
                visit(value)

    visit(BASE)


def test_dotted_names_are_the_keys_of_the_yaml_form() -> None:
    def keys(tree: dict, prefix: str = "") -> list[str]:
        found = []
        for key, value in tree.items():
            found.append(prefix + key)
            found += keys(value, f"{prefix}{key}.") if isinstance(value, dict) else []
        return found

    assert keys(yaml.safe_load(dump_config(BASE))) == dotted_names()


def test_crops_follow_the_published_augmentation() -> None:
    crops = ViewsConfig().crops(224)
    assert [crop.size for crop in crops] == [224] * 2 + [96] * 6
    assert [crop.blur_p for crop in crops] == [1.0, 0.1] + [0.5] * 6
    assert [crop.solarize_p for crop in crops] == [0.0, 0.2] + [0.0] * 6
    assert {crop.scale for crop in crops[:2]} == {(0.4, 1.0)}
    assert {crop.scale for crop in crops[2:]} == {(0.05, 0.4)}


def test_openclip_dict_round_trip_and_its_mistakes() -> None:
    model = ModelConfig(embed_dim=64, vision=VisionConfig(width=128, layers=3), crossmodal=False)
    assert ModelConfig.from_openclip(model.to_openclip()) == model
    plain = {"embed_dim": 512, "vision_cfg": {"patch_size": 32}, "text_cfg": {}}
    assert ModelConfig.from_openclip(plain) == named_model("ViT-B-32")
    for broken, message in (
        ({**plain, "quick_gelu": True}, "quick_gelu not supported"),
        ({"embed_dim": 512, "vision_cfg": {}}, "'text_cfg' is missing"),
        ({**plain, "vision_cfg": {"layers": [3, 4]}}, "must be a whole number"),
        ({**plain, "vision_cfg": {"timm_model_name": "x"}}, "timm_model_name not supported"),
    ):
        with pytest.raises(UserError, match=message):
            ModelConfig.from_openclip(broken)
    with pytest.raises(UserError, match="ViT-B-16"):
        named_model("ViT-L-14")

"""The published settings, number by number."""

from __future__ import annotations

import json

import pytest

from cosmos_fast.cli.main import command, run
from cosmos_fast.engine.schedules import total_steps
from cosmos_fast.model.flops import sample_flops
from cosmos_fast.recipes import RECIPES, get_recipe
from cosmos_fast.utils.errors import UserError

PUBLISHED = {  # samples, GPUs, samples a GPU, EMA decay
    "cc3m": (2_823_019, 16, 64, 0.999),
    "cc12m": (10_010_225, 128, 32, 0.99),
    "yfcc15m": (14_065_827, 128, 32, 0.99),
    "merged30m": (26_899_071, 128, 32, 0.99),
    "pixelprose": (15_037_386, 128, 32, 0.99),
}


@pytest.mark.parametrize("patch_size", [16, 32])
@pytest.mark.parametrize("data", PUBLISHED)
def test_published_setting(data: str, patch_size: int) -> None:
    samples, gpus, batch, decay = PUBLISHED[data]
    config = get_recipe(f"{data}_vit_b_{patch_size}")
    assert config.name == f"{data}_vit_b_{patch_size}"
    assert (config.run.world_size_hint, config.run.batch_size, config.ema.decay) == (gpus, batch, decay)
    assert config.run.published_batch == gpus * batch
    assert (config.data.samples_per_epoch, config.run.epochs, config.run.accumulate_steps) == (samples, 32, 1)
    assert config.model.vision.patch_size == patch_size
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (5e-4, (0.9, 0.98), 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm, config.schedule.warmup_steps) == (0.5, None, 2000)
    views = config.data.views
    assert (views.global_crops, views.local_crops, views.global_captions, views.local_captions) == (2, 6, 2, 6)
    assert total_steps(config, samples, gpus) == 32 * samples // (gpus * batch)


@pytest.mark.parametrize(("recipe", "samples"), [("cc12m_vit_b_16", 4096), ("demo", 256)])
def test_a_plan_is_of_the_published_batch_whatever_fits_a_rank(recipe: str, samples: int, capsys) -> None:
    given = ["--recipe", recipe, "--gpus", "16", "--set", "run.batch_size=256"]
    assert run(command, ["plan", *given, "--json"]) == 0
    assert {row["global_batch"] for row in json.loads(capsys.readouterr().out)["layouts"]} == {samples}


def test_clip_baseline_has_the_towers_and_data_of_the_demo_and_equal_compute() -> None:
    demo, clip = get_recipe("demo"), get_recipe("demo_clip")
    assert (demo.model.vision, demo.model.text) == (clip.model.vision, clip.model.text)
    assert demo.data.train == clip.data.train
    assert (demo.optimizer.weight_decay, demo.optimizer.betas) == (clip.optimizer.weight_decay, clip.optimizer.betas)
    flops = [
        config.run.max_steps
        * config.run.batch_size
        * sample_flops(
            config.model,
            config.data.views,
            caption_tokens=[33.0] * config.data.views.global_captions + [17.8] * config.data.views.local_captions,
            global_batch=config.run.batch_size,
        ).training
        for config in (demo, clip)
    ]
    assert flops[0] == pytest.approx(flops[1], rel=0.02)
    assert clip.objective == "clip"
    assert not clip.model.crossmodal


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'cc12m_vit_b_16'"):
        get_recipe("cc12m_vitb16")


def test_every_recipe_says_what_it_is() -> None:
    assert all((make.__doc__ or "").strip() for make in RECIPES.values())

"""Small runs on generated scenes, for a laptop: COSMOS, and plain CLIP of equal compute to compare it with."""

from __future__ import annotations

from dataclasses import replace

from cosmos_fast.config import (
    DataConfig,
    EmaConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TextConfig,
    TrainConfig,
    ViewsConfig,
    VisionConfig,
)

STEPS = 260
# A long warm-up: at 3e-3, 33 steps of it ended 8 points of R@1 lower than 70 (one seed).
WARMUP_SHARE = 0.27
# A COSMOS sample (8 crops, 8 captions, the teacher) costs this many plain CLIP samples of one crop and one caption;
# from the FLOPs that both runs log.
CLIP_SAMPLES_PER_SAMPLE = 5.8
CLIP_BATCH = 128


def demo() -> TrainConfig:
    """ViT-tiny COSMOS on generated scenes (`cosmos-fast data synth --out data/demo`), minutes on two CPU cores."""
    return TrainConfig(
        name="cosmos",
        model=ModelConfig(
            embed_dim=128,
            vision=VisionConfig(image_size=48, patch_size=8, width=128, layers=3, head_width=32),
            text=TextConfig(context_length=48, width=128, heads=4, layers=3),
            pool_heads=4,
        ),
        data=DataConfig(
            train=(SourceConfig(path="data/demo/train"),),
            # A scene is told by its colours and places, and a 48 px crop has no detail to spare: no flips, global crops
            # that keep most of the scene, mild jitter, blur below a pixel.
            views=ViewsConfig(
                local_image_size=24,
                global_scale=(0.75, 1.0),
                local_scale=(0.15, 0.5),
                flip_p=0.0,
                jitter=(0.2, 0.2, 0.1, 0.02),
                jitter_p=0.5,
                gray_p=0.0,
                global_blur_p=(0.2, 0.1),
                local_blur_p=0.1,
                blur_radius=(0.1, 0.7),
                global_solarize_p=(0.0, 0.0),
                max_sentences=3,
            ),
            workers=1,
        ),
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.2),
        schedule=ScheduleConfig(warmup_steps=round(WARMUP_SHARE * STEPS)),
        # The teacher must keep up with a run of a few hundred steps.
        ema=EmaConfig(decay=0.96),
        run=RunConfig(
            out_dir="runs/demo",
            epochs=None,
            max_steps=STEPS,
            batch_size=64,
            log_every_steps=10,
            checkpoint_every_steps=65,
            evaluate_every_steps=65,
        ),
        evaluate=EvaluateConfig(data=(SourceConfig(path="data/demo/heldout"),), batch_size=64, max_samples=500),
    )


def demo_clip() -> TrainConfig:
    """Plain CLIP with the towers and data of `demo`: one crop and caption a sample, equal FLOPs, own batch and rate."""
    cosmos = demo()
    views = replace(cosmos.data.views, global_crops=1, local_crops=0, global_captions=1, local_captions=0)
    steps = round(STEPS * CLIP_SAMPLES_PER_SAMPLE * cosmos.run.batch_size / CLIP_BATCH)
    return replace(
        cosmos,
        name="clip",
        objective="clip",
        model=replace(cosmos.model, crossmodal=False),
        data=replace(cosmos.data, views=views),
        # One pair a sample makes noisier gradients: at 3e-3 (batch 64, a short warm-up) CLIP ended at 6 % R@1.
        optimizer=replace(cosmos.optimizer, lr=1.4e-3),
        schedule=ScheduleConfig(warmup_steps=round(WARMUP_SHARE * steps)),
        run=replace(
            cosmos.run,
            max_steps=steps,
            batch_size=CLIP_BATCH,
            log_every_steps=25,
            checkpoint_every_steps=steps // 4,
            evaluate_every_steps=steps // 4,
        ),
    )

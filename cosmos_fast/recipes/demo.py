"""Small runs on generated scenes, for a laptop: COSMOS, and plain CLIP to compare it with."""

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


def demo() -> TrainConfig:
    """ViT-tiny COSMOS on generated scenes (`cosmos-fast data synth --out data/demo`), minutes on two CPU cores."""
    return TrainConfig(
        name="demo",
        model=ModelConfig(
            embed_dim=128,
            vision=VisionConfig(image_size=48, patch_size=8, width=128, layers=4, head_width=32),
            text=TextConfig(context_length=77, width=128, heads=4, layers=4),
            pool_heads=4,
        ),
        data=DataConfig(
            train=(SourceConfig(path="data/demo/train"),),
            # A scene is told by its colours, and a 48 px crop has no detail to spare: mild jitter, blur below a pixel.
            views=ViewsConfig(
                local_image_size=24,
                local_scale=(0.1, 0.4),
                jitter=(0.2, 0.2, 0.1, 0.02),
                gray_p=0.0,
                global_blur_p=(0.2, 0.1),
                local_blur_p=0.1,
                blur_radius=(0.1, 0.7),
                global_solarize_p=(0.0, 0.0),
            ),
            workers=1,
        ),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.2),
        schedule=ScheduleConfig(warmup_steps=50),
        ema=EmaConfig(decay=0.99),
        run=RunConfig(
            epochs=None,
            max_steps=300,
            batch_size=64,
            log_every_steps=10,
            checkpoint_every_steps=100,
            evaluate_every_steps=50,
        ),
        evaluate=EvaluateConfig(data=(SourceConfig(path="data/demo/heldout"),), batch_size=64, max_samples=500),
    )


def demo_clip() -> TrainConfig:
    """The same towers, data and optimizer as `demo` under the plain CLIP loss: one crop and one caption a sample."""
    cosmos = demo()
    views = replace(cosmos.data.views, global_crops=1, local_crops=0, global_captions=1, local_captions=0)
    return replace(
        cosmos,
        name="demo_clip",
        objective="clip",
        model=replace(cosmos.model, crossmodal=False),
        data=replace(cosmos.data, views=views),
    )

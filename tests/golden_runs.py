"""The product on golden tensors: models and trainers started from them, and checks of what they give.

Relative tolerances in fp32: 1e-5 for features and losses, 1e-4 for gradients, the trajectory and the final weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from cosmos_fast import create_model
from cosmos_fast.config import (
    ComputeConfig,
    EmaConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from cosmos_fast.data.batch import Batch
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.loss import CosmosLossOutput
from cosmos_fast.model import CosmosFeatures, CosmosModel, TeacherFeatures
from cosmos_fast.model.compute import apply_compute
from cosmos_fast.model.transformer import ResidualBlock
from tests.golden import Golden, assert_close_to_max, without_key_bias

FORWARD_RTOL = 1e-5
BACKWARD_RTOL = 1e-4
FEATURES = {
    "image": "student.image_features",
    "text": "student.text_features",
    "image_crossmodal": "student.img_crossmodal_features",
    "text_crossmodal": "student.txt_crossmodal_features",
}


def model_config(golden: Golden) -> ModelConfig:
    cfg = golden.cfg
    return ModelConfig(
        embed_dim=cfg["embed_dim"],
        vision=VisionConfig(
            image_size=cfg["image_size"],
            patch_size=cfg["patch_size"],
            width=cfg["vision_width"],
            layers=cfg["vision_layers"],
            head_width=cfg["head_width"],
        ),
        text=TextConfig(
            context_length=cfg["context_length"],
            vocab_size=cfg["vocab_size"],
            width=cfg["text_width"],
            heads=cfg["text_heads"],
            layers=cfg["text_layers"],
        ),
    )


def model(golden: Golden, prefix: str, compute: ComputeConfig | None = None) -> CosmosModel:
    built = create_model(model_config(golden))
    built.load_reference_state_dict(golden.part(prefix))
    apply_compute(built, compute or ComputeConfig(), torch.device("cpu"))
    return built


def pair(golden: Golden, compute: ComputeConfig | None = None) -> tuple[CosmosModel, CosmosModel]:
    """Student and teacher."""
    return model(golden, "student.", compute), model(golden, "teacher.", compute).requires_grad_(False).eval()


def forward(golden: Golden, student: CosmosModel, teacher: CosmosModel) -> tuple[CosmosFeatures, TeacherFeatures]:
    images, texts = golden.images("input."), golden.tensors["input.text"]
    with torch.no_grad():
        teacher_features = teacher.encode_views(images[:2], texts[:2])
    return student(images, texts), teacher_features


def golden_features(golden: Golden) -> tuple[CosmosFeatures, TeacherFeatures]:
    """What the original computed, as this program has it."""
    scales = {name: golden.tensors[f"student.{name}"].exp() for name in ("logit_scale", "distill_logit_scale")}
    found = {key: golden.tensors[f"out.{name}"].unflatten(0, (-1, golden.hyper["B"])) for key, name in FEATURES.items()}
    of_teacher = [golden.tensors[f"out.teacher.{name}_features"] for name in ("image", "text")]
    image, text = (features.unflatten(0, (-1, golden.hyper["B"])) for features in of_teacher)
    return CosmosFeatures(**found, **scales), TeacherFeatures(image, text)


def check_features(golden: Golden, student: CosmosFeatures, teacher: TeacherFeatures) -> None:
    expected, expected_of_teacher = golden_features(golden)
    for name in FEATURES:
        assert_close_to_max(getattr(student, name), getattr(expected, name), FORWARD_RTOL, name)
    for name in ("image", "text"):
        expected_VBD = getattr(expected_of_teacher, name)
        assert_close_to_max(getattr(teacher, name), expected_VBD, FORWARD_RTOL, f"teacher {name}")


def check_losses_and_gradients(golden: Golden, student: CosmosModel, losses: CosmosLossOutput) -> None:
    student.zero_grad()
    losses.total.backward()
    assert_close_to_max(losses.clip, golden.tensors["out.clip_loss"], FORWARD_RTOL, "clip_loss")
    assert_close_to_max(losses.distill, golden.tensors["out.distill_loss"], FORWARD_RTOL, "distill_loss")
    expected = golden.part("grad.")
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient is not None, name
        assert_close_to_max(gradient, expected[name], BACKWARD_RTOL, name)


def trainer(golden: Golden, out_dir: str, compute: ComputeConfig | None = None, parts: int = 1) -> Trainer:
    """The product's own trainer, started from the golden weights. parts: micro-batches a step, with all negatives."""
    hyper = golden.hyper
    config = TrainConfig(
        name="golden",
        model=model_config(golden),
        optimizer=OptimizerConfig(lr=hyper["lr"], weight_decay=hyper["wd"]),
        schedule=ScheduleConfig(warmup_steps=hyper["warmup"]),
        ema=EmaConfig(decay=hyper["momentum"]),
        compute=compute or ComputeConfig(),
        run=RunConfig(
            out_dir=out_dir,
            max_steps=hyper["total_steps"],
            batch_size=hyper["B"] // parts,
            accumulate_steps=parts,
            negatives="all" if parts > 1 else "micro",
            precision="fp32",
            device="cpu",
        ),
    )
    loader: Any = SimpleNamespace(samples_per_epoch=10**6, identity="golden")
    built = Trainer(config, loader, plan=plan_run(config))
    built.student.load_reference_state_dict(golden.part("student."))
    built.teacher.load_reference_state_dict(golden.part("teacher."))
    return built


def blocks_of(*models: CosmosModel) -> list[ResidualBlock]:
    """The blocks of all towers."""
    return [block for one in models for block in (*one.transformer.blocks, *one.visual.transformer.blocks)]


def check_trajectory(golden: Golden, run: Trainer) -> None:
    rows = [row_of(run, batch) for batch in batches(golden)]
    expected = golden.tensors["trajectory"].double()
    torch.testing.assert_close(torch.tensor(rows, dtype=torch.float64), expected, rtol=BACKWARD_RTOL, atol=0)
    for prefix, trained in (("final.student.", run.student), ("final.teacher.", run.teacher)):
        weights = trained.reference_state_dict()
        expected_weights = golden.part(prefix)
        assert weights.keys() == expected_weights.keys()
        for name, tensor in expected_weights.items():
            found = without_key_bias(name, weights[name])
            assert_close_to_max(found, without_key_bias(name, tensor), BACKWARD_RTOL, prefix + name)


def batches(golden: Golden) -> Iterator[Batch]:
    size = golden.hyper["B"]
    for step in range(golden.hyper["steps"]):
        yield Batch(
            images=golden.images(f"trajectory.{step}."),
            texts=golden.tensors[f"trajectory.{step}.text"],
            keys=[str(sample) for sample in range(size)],
            position=step * size,
            next_position=(step + 1) * size,
        )


def row_of(run: Trainer, batch: Batch) -> list[float]:
    """Losses and scales of a step."""
    outcome = run.train_step(micro_batches(batch, run.config.run.accumulate_steps))
    assert outcome.applied
    scales = run.scales()
    losses = float(outcome.clip_loss), float(outcome.distill_loss)
    return [*losses, scales["logit_scale"], scales["distill_logit_scale"]]


def micro_batches(batch: Batch, parts: int) -> list[Batch]:
    """A batch cut in `parts`; as one, it is where the next step goes on."""
    size = len(batch.keys) // parts
    slices = [slice(start, start + size) for start in range(0, size * parts, size)]
    return [
        replace(batch, images=[view[part] for view in batch.images], texts=batch.texts[:, part], keys=batch.keys[part])
        for part in slices
    ]

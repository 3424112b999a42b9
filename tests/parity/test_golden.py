"""The product computes what the original computed: features, losses, gradients, and five steps of training.

Relative tolerances in fp32: 1e-5 for features and losses, 1e-4 for gradients, the trajectory and the final weights.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cosmos_fast import CosmosLoss, create_model
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
from cosmos_kernels import triton_support
from tests import attention_fakes
from tests.golden import GOLDEN_FILES, Golden, assert_close_to_max, without_key_bias

FORWARD_RTOL = 1e-5
BACKWARD_RTOL = 1e-4


@pytest.fixture(scope="module", params=GOLDEN_FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.read(request.param)


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


def model(golden: Golden, prefix: str, attention: str = "auto", prune: bool = True) -> CosmosModel:
    built = create_model(model_config(golden))
    built.load_reference_state_dict(golden.part(prefix))
    built.set_attention(attention)
    built.transformer.prune = built.visual.transformer.prune = prune
    return built


def forward(golden: Golden, student: CosmosModel) -> tuple[CosmosFeatures, TeacherFeatures]:
    images, texts = golden.images("input."), golden.tensors["input.text"]
    with torch.no_grad():
        teacher = model(golden, "teacher.", student.transformer.attention, student.transformer.prune)
        teacher_features = teacher.encode_views(images[:2], texts[:2])
    return student(images, texts), teacher_features


def test_there_is_a_golden_file() -> None:
    assert GOLDEN_FILES


def test_features(golden: Golden) -> None:
    check_features(golden, *forward(golden, model(golden, "student.")))


def check_features(golden: Golden, student: CosmosFeatures, teacher: TeacherFeatures) -> None:
    found = {
        "student.image_features": student.image,
        "student.text_features": student.text,
        "student.img_crossmodal_features": student.image_crossmodal,
        "student.txt_crossmodal_features": student.text_crossmodal,
        "teacher.image_features": teacher.image,
        "teacher.text_features": teacher.text,
    }
    for name, features_VBD in found.items():
        assert features_VBD is not None
        assert_close_to_max(features_VBD.flatten(0, 1), golden.tensors[f"out.{name}"], FORWARD_RTOL, name)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_losses_and_every_gradient(golden: Golden, backend: str) -> None:
    student = model(golden, "student.")
    check_losses_and_gradients(golden, student, CosmosLoss(backend=backend)(*forward(golden, student)))


@pytest.mark.parametrize("prune", [True, False], ids=["pruned", "unpruned"])
@pytest.mark.parametrize("attention", ["sdpa", *attention_fakes.FAKES])
def test_every_attention_backend(golden: Golden, attention: str, prune: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends that need a GPU or a package run on stand-ins."""
    if attention in attention_fakes.FAKES:
        attention = attention_fakes.use(attention, monkeypatch)
    student = model(golden, "student.", attention, prune)
    features = forward(golden, student)
    check_features(golden, *features)
    check_losses_and_gradients(golden, student, CosmosLoss()(*features))


@pytest.mark.skipif(triton_support.why_missing() is not None, reason=str(triton_support.why_missing()))
def test_triton_attention(golden: Golden) -> None:
    """In the interpreter; on a GPU the kernels take half precision, which golden tensors are too exact for."""
    if not triton_support.INTERPRETED:
        pytest.skip("the kernels take no fp32")
    student = model(golden, "student.", "triton")
    with torch.no_grad():
        teacher = model(golden, "teacher.").encode_views(golden.images("input.")[:2], golden.tensors["input.text"][:2])
    features = student(golden.images("input."), golden.tensors["input.text"])
    check_features(golden, features, teacher)
    check_losses_and_gradients(golden, student, CosmosLoss()(features, teacher))


def check_losses_and_gradients(golden: Golden, student: CosmosModel, losses: CosmosLossOutput) -> None:
    losses.total.backward()
    assert_close_to_max(losses.clip, golden.tensors["out.clip_loss"], FORWARD_RTOL, "clip_loss")
    assert_close_to_max(losses.distill, golden.tensors["out.distill_loss"], FORWARD_RTOL, "distill_loss")
    expected = golden.part("grad.")
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient is not None, name
        assert_close_to_max(gradient, expected[name], BACKWARD_RTOL, name)


def test_dense_features(golden: Golden) -> None:
    student = model(golden, "student.")
    image = golden.images("input.")[0]
    for name, csa in (("out.dense", False), ("out.dense_csa", True)):
        found = student.encode_image_dense(image, csa=csa)
        assert_close_to_max(found, golden.tensors[name], FORWARD_RTOL, name)


def trainer(golden: Golden, out_dir: str, recompute: str = "none", compiled: bool = False, parts: int = 1) -> Trainer:
    """The product's own trainer, started from the golden weights. parts: micro-batches a step, with all negatives."""
    hyper = golden.hyper
    config = TrainConfig(
        name="golden",
        model=model_config(golden),
        optimizer=OptimizerConfig(lr=hyper["lr"], weight_decay=hyper["wd"]),
        schedule=ScheduleConfig(warmup_steps=hyper["warmup"]),
        ema=EmaConfig(decay=hyper["momentum"]),
        compute=ComputeConfig(checkpoint_activations=recompute, compile=compiled),  # type: ignore[arg-type]
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
    built = Trainer(config, SimpleNamespace(samples_per_epoch=10**6), plan=plan_run(config))
    built.student.load_reference_state_dict(golden.part("student."))
    built.teacher.load_reference_state_dict(golden.part("teacher."))
    return built


def test_trajectory_and_final_weights(golden: Golden, tmp_path) -> None:
    """Optimizer groups, schedule, moving average and clamp are the trainer's own."""
    check_trajectory(golden, trainer(golden, str(tmp_path)))


def test_trajectory_with_every_saving(golden: Golden, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations made anew, blocks compiled, micro-batches with all negatives; packed and pruned as ever.

    Of the compiler the front end alone: PyTorch runs what it hands on, which spares building C++ code.
    """
    monkeypatch.setattr("cosmos_fast.model.compute.COMPILER", "eager")
    run = trainer(golden, str(tmp_path), recompute="blocks", compiled=True, parts=2)
    blocks = [*run.student.transformer.blocks, *run.student.visual.transformer.blocks]
    assert {(block.savings.recompute, block.savings.compiler) for block in blocks} == {("blocks", "eager")}
    check_trajectory(golden, run)


def check_trajectory(golden: Golden, run: Trainer) -> None:
    batch_size = golden.hyper["B"]
    rows = []
    for step in range(golden.hyper["steps"]):
        batch = Batch(
            images=golden.images(f"trajectory.{step}."),
            texts=golden.tensors[f"trajectory.{step}.text"],
            keys=[str(sample) for sample in range(batch_size)],
            position=step * batch_size,
            next_position=(step + 1) * batch_size,
        )
        outcome = run.train_step(micro_batches(batch, run.config.run.accumulate_steps))
        assert outcome.applied
        scales = run.scales()
        rows.append(
            [
                float(outcome.clip_loss),
                float(outcome.distill_loss),
                scales["logit_scale"],
                scales["distill_logit_scale"],
            ]
        )
    expected = golden.tensors["trajectory"].double()
    torch.testing.assert_close(torch.tensor(rows, dtype=torch.float64), expected, rtol=BACKWARD_RTOL, atol=0)
    for prefix, trained in (("final.student.", run.student), ("final.teacher.", run.teacher)):
        weights = trained.reference_state_dict()
        expected_weights = golden.part(prefix)
        assert weights.keys() == expected_weights.keys()
        for name, tensor in expected_weights.items():
            found = without_key_bias(name, weights[name])
            assert_close_to_max(found, without_key_bias(name, tensor), BACKWARD_RTOL, prefix + name)


def micro_batches(batch: Batch, parts: int) -> list[Batch]:
    """A batch cut in `parts`; as one, it is where the next step goes on."""
    size = len(batch.keys) // parts
    slices = [slice(start, start + size) for start in range(0, size * parts, size)]
    return [
        replace(batch, images=[view[part] for view in batch.images], texts=batch.texts[:, part], keys=batch.keys[part])
        for part in slices
    ]

"""The eager port of the benchmarks computes what the original computed, on every golden file."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.eager_cosmos import EagerConfig, EagerCosmos, EagerFeatures, EagerTrainer, cosmos_loss, learning_rate
from benchmarks.shapes import VIT_B_16, VIT_B_32
from tests.golden import DATA, GOLDEN_FILES, Golden, assert_close_to_max, without_key_bias


@pytest.fixture(scope="module", params=GOLDEN_FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.read(request.param)


def model(golden: Golden, prefix: str) -> EagerCosmos:
    cfg = {key: value for key, value in golden.cfg.items() if key != "local_size"}
    built = EagerCosmos(EagerConfig(**cfg))
    built.load_state_dict(golden.part(prefix), strict=True)
    return built


def forward(golden: Golden, student: EagerCosmos) -> tuple[EagerFeatures, EagerFeatures]:
    images, texts = golden.images("input."), golden.tensors["input.text"]
    with torch.no_grad():
        teacher = model(golden, "teacher.")(images[:2], texts[:2], crossmodal=False)
    return student(images, texts), teacher


def test_there_is_a_golden_file() -> None:
    assert GOLDEN_FILES


def test_features_and_losses_agree(golden: Golden) -> None:
    student, teacher = forward(golden, model(golden, "student."))
    losses = cosmos_loss(student, teacher, golden.tensors["input.text"].shape[1])
    found = {
        "student.image_features": student.image,
        "student.text_features": student.text,
        "student.img_crossmodal_features": student.image_crossmodal,
        "student.txt_crossmodal_features": student.text_crossmodal,
        "teacher.image_features": teacher.image,
        "teacher.text_features": teacher.text,
        "clip_loss": losses.clip,
        "distill_loss": losses.distill,
    }
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, golden.tensors[f"out.{name}"], rtol=1e-5, atol=1e-6, msg=name)


def test_all_gradients_agree(golden: Golden) -> None:
    student = model(golden, "student.")
    cosmos_loss(*forward(golden, student), golden.tensors["input.text"].shape[1]).total.backward()
    expected = golden.part("grad.")
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient is not None, name
        assert_close_to_max(gradient, expected[name], 1e-4, name)


def test_dense_features_agree(golden: Golden) -> None:
    student = model(golden, "student.")
    image = golden.images("input.")[0]
    for name, csa in (("out.dense", False), ("out.dense_csa", True)):
        found = student.encode_dense(image, csa=csa)
        torch.testing.assert_close(found, golden.tensors[name], rtol=1e-5, atol=1e-5, msg=name)


def test_trajectory_and_final_weights_agree(golden: Golden) -> None:
    hyper = golden.hyper
    trainer = EagerTrainer(model(golden, "student."), weight_decay=hyper["wd"], ema_decay=hyper["momentum"])
    trainer.teacher.load_state_dict(golden.part("teacher."))
    rows = []
    for step in range(int(hyper["steps"])):
        lr = learning_rate(step, hyper["lr"], int(hyper["warmup"]), int(hyper["total_steps"]))
        losses = trainer.step(golden.images(f"trajectory.{step}."), golden.tensors[f"trajectory.{step}.text"], lr)
        scales = trainer.student.logit_scale.exp(), trainer.student.distill_logit_scale.exp()
        rows.append([float(value.detach()) for value in (*losses, *scales)])
    torch.testing.assert_close(torch.tensor(rows, dtype=torch.float64), golden.tensors["trajectory"], rtol=1e-5, atol=0)
    for prefix, trained in (("final.student.", trainer.student), ("final.teacher.", trainer.teacher)):
        for name, expected in golden.part(prefix).items():
            found = without_key_bias(name, trained.state_dict()[name])
            assert_close_to_max(found, without_key_bias(name, expected), 1e-4, prefix + name)


@pytest.mark.parametrize("config", [VIT_B_16, VIT_B_32], ids=["16", "32"])
def test_names_and_shapes_are_those_of_the_released_checkpoints(config: EagerConfig) -> None:
    expected = json.loads((DATA / f"state_dict_vit_b_{config.patch_size}.json").read_text())
    with torch.device("meta"):
        built = EagerCosmos(config)
    found = {name: list(tensor.shape) for name, tensor in built.state_dict().items()}
    assert found == {name: list(shape) for name, shape in expected.items()}

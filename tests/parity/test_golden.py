"""The product computes what the original computed: features, losses, gradients, and five steps of training."""

from __future__ import annotations

import pytest

from cosmos_fast import CosmosLoss
from cosmos_fast.config import ComputeConfig
from cosmos_fast.model.transformer import Transformer
from cosmos_kernels import attention_native
from tests import attention_fakes
from tests.golden import GOLDEN_FILES, Golden, assert_close_to_max
from tests.golden_runs import (
    FORWARD_RTOL,
    check_features,
    check_losses_and_gradients,
    check_trajectory,
    forward,
    model,
    pair,
    trainer,
)
from tests.unpruned import run_every_block_on_every_token


@pytest.fixture(scope="module", params=GOLDEN_FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.read(request.param)


def test_there_is_a_golden_file() -> None:
    assert GOLDEN_FILES


def test_features(golden: Golden) -> None:
    check_features(golden, *forward(golden, *pair(golden)))


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_losses_and_every_gradient(golden: Golden, backend: str) -> None:
    student, teacher = pair(golden)
    losses = CosmosLoss(backend=backend)(*forward(golden, student, teacher))
    check_losses_and_gradients(golden, student, losses)


@pytest.mark.parametrize("prune", [True, False], ids=["pruned", "unpruned"])
@pytest.mark.parametrize("attention", ["sdpa", "native", *attention_fakes.FAKES])
def test_every_attention_backend(golden: Golden, attention: str, prune: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends that need a GPU or a package run on stand-ins; all but sdpa pack every caption at its own length."""
    if attention == "native" and (reason := attention_native.why_missing()) is not None:
        pytest.skip(reason)
    if attention in attention_fakes.FAKES:
        attention = attention_fakes.use(attention, monkeypatch)
    if not prune:
        monkeypatch.setattr(Transformer, "forward", run_every_block_on_every_token)
    student, teacher = pair(golden, ComputeConfig(attention=attention))  # type: ignore[arg-type]
    features = forward(golden, student, teacher)
    check_features(golden, *features)
    check_losses_and_gradients(golden, student, CosmosLoss()(*features))


def test_dense_features(golden: Golden) -> None:
    student = model(golden, "student.")
    image = golden.images("input.")[0]
    for name, csa in (("out.dense", False), ("out.dense_csa", True)):
        found = student.encode_image_dense(image, csa=csa)
        assert_close_to_max(found, golden.tensors[name], FORWARD_RTOL, name)


def test_trajectory_and_final_weights(golden: Golden, tmp_path) -> None:
    """Optimizer groups, schedule, moving average and clamp are the trainer's own."""
    check_trajectory(golden, trainer(golden, str(tmp_path)))

"""What the towers leave out: equal to the run that leaves nothing out, and really left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cosmos_fast import CosmosLoss, create_model
from cosmos_fast.config import ModelConfig, TextConfig, VisionConfig
from cosmos_fast.loss import ClipLoss
from cosmos_fast.model import CosmosModel, text
from cosmos_fast.model.packing import PackedLayout, PackedText, SequenceGroup
from cosmos_fast.model.transformer import Transformer
from tests import attention_fakes
from tests.unpruned import run_every_block_on_every_token

BATCH, CONTEXT = 3, 12
CONFIG = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=8, width=24, layers=2, head_width=12),
    text=TextConfig(context_length=CONTEXT, vocab_size=50, width=16, heads=2, layers=2),
    pool_heads=4,
)
ONE_BLOCK = replace(CONFIG, vision=replace(CONFIG.vision, layers=1), text=replace(CONFIG.text, layers=1))
CONFIGS = {"cosmos": CONFIG, "clip": replace(CONFIG, crossmodal=False), "one block": ONE_BLOCK}
SIDES = (32, 32, 16, 16, 16)
LENGTHS = torch.tensor([[5, 12, 2], [7, 9, 12], [3, 4, 4], [2, 6, 3]])  # captions [V, B], EOT included


def make_model(seed: int, config: ModelConfig = CONFIG) -> CosmosModel:
    torch.manual_seed(seed)
    built = create_model(config).double()
    for parameter in built.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # biases and norms too
    return built


@pytest.fixture
def inputs() -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    images = [torch.randn(BATCH, 3, side, side, dtype=torch.float64) for side in SIDES]
    texts = torch.randint(1, 48, (*LENGTHS.shape, CONTEXT))
    texts[torch.arange(CONTEXT) >= LENGTHS.unsqueeze(-1)] = 0
    texts.scatter_(2, LENGTHS.unsqueeze(-1) - 1, 49)
    return images, texts


def padded_text(
    token_ids_NL: Tensor, keep_all: int = 0, *, backend: str = "sdpa", device: torch.device | None = None
) -> PackedText:
    """To stand in for pack_text: every caption at full length."""
    count, length = token_ids_NL.shape
    eot = token_ids_NL.argmax(dim=1).tolist()
    sizes = ((keep_all, eot[:keep_all], True), (count - keep_all, eot[keep_all:], False))
    groups = [SequenceGroup(size, length, tuple(pooled), keep) for size, pooled, keep in sizes if size]
    layout = PackedLayout.build(groups, causal=True, backend=backend)
    return PackedText(layout, token_ids_NL.flatten(), torch.arange(length).repeat(count))


def outcome(config: ModelConfig, attention: str, images: list[Tensor], texts: Tensor) -> dict[str, Tensor]:
    """Features of student and teacher, losses, every gradient."""
    student, teacher_model = make_model(1, config), make_model(2, config)
    for one in (student, teacher_model):
        one.visual.transformer.attention = one.transformer.attention = attention
    with torch.no_grad():
        teacher = teacher_model.encode_views(images[:2], texts[:2])
    features = student(images, texts)
    losses = (CosmosLoss() if config.crossmodal else ClipLoss())(features, teacher)
    losses.total.backward()
    found = {f"student.{name}": value.detach() for name, value in vars(features).items() if value is not None}
    found |= {f"teacher.{name}": value for name, value in vars(teacher).items()}
    found |= {"clip": losses.clip.detach(), "distill": losses.distill.detach()}
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        found[f"grad.{name}"] = parameter.grad
    return found


@pytest.mark.parametrize("packing", ["rounded", "exact", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_student_and_teacher_equal_those_that_run_every_block_on_every_token(
    name: str, packing: str, inputs: tuple[list[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both towers of both models and both poolers; captions packed in groups, each at its own length, or not at all.
    What they are held against is neither pruned nor packed."""
    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "forward", run_every_block_on_every_token)
        patch.setattr(text, "pack_text", padded_text)
        whole = outcome(CONFIGS[name], "sdpa", *inputs)
    if packing == "padded":
        monkeypatch.setattr(text, "pack_text", padded_text)
    attention = attention_fakes.use("varlen", monkeypatch) if packing == "exact" else "sdpa"
    pruned = outcome(CONFIGS[name], attention, *inputs)
    assert pruned.keys() == whole.keys()
    for key, expected in whole.items():
        torch.testing.assert_close(pruned[key], expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=key: f"{n}: {m}")


def test_token_maps_of_view_zero_are_those_of_all_views(inputs):
    """Every caption padded and returning all its tokens, every crop all its patches, as in the original: view 0 of them
    is what the student maps."""
    images, texts = inputs
    model = make_model(1)
    seen = {}
    for name in ("text_token_mapping", "image_token_mapping"):
        getattr(model, name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    model(images, texts)
    every_token = model.run_text(texts.flatten(0, 1), keep_tokens=texts.shape[0] * BATCH).tokens_MLW
    every_patch = model.visual([torch.cat(images[:2])], keep_patches=2 * BATCH).patches_MPW
    mapped = {"text_token_mapping": seen["text_token_mapping"], "image_token_mapping": seen["image_token_mapping"]}
    assert [len(tokens) for tokens in mapped.values()] == [BATCH, BATCH]
    torch.testing.assert_close(mapped["text_token_mapping"], model.text_token_mapping(every_token)[:BATCH])
    torch.testing.assert_close(mapped["image_token_mapping"], model.image_token_mapping(every_patch)[:BATCH])


def rows_of_last_mlps(model: CosmosModel) -> list[int]:
    """Filled with the rows that the last MLP of either tower is run on, vision first, as forwards go by."""
    rows: list[int] = []
    for transformer in (model.visual.transformer, model.transformer):
        transformer.blocks[-1].mlp.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    return rows


def test_the_last_mlp_runs_on_the_rows_that_are_read_only(inputs):
    images, texts = inputs
    student, teacher = make_model(1), make_model(2)
    student_rows, teacher_rows = rows_of_last_mlps(student), rows_of_last_mlps(teacher)
    student(images, texts)
    teacher.encode_views(images[:2], texts[:2])
    # View 0 of the student keeps its tokens; of everything else one row is read.
    assert student_rows == [BATCH * (17 + len(SIDES) - 1), BATCH * (CONTEXT + len(texts) - 1)]
    assert teacher_rows == [2 * BATCH, 2 * BATCH]

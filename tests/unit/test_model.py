"""The model's contract: shapes, view order, any mix of crop sizes, weights by name, initialisation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cosmos_fast
from cosmos_fast import create_model
from cosmos_fast.config import ModelConfig, TextConfig, VisionConfig
from cosmos_fast.model.vision import crop_layout, resize_matrix
from cosmos_fast.utils.errors import UserError

DATA = Path(__file__).parents[1] / "data"
TINY = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=8, width=24, layers=2, head_width=12),
    text=TextConfig(context_length=10, vocab_size=50, width=16, heads=2, layers=2),
    pool_heads=4,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model(TINY)


def _texts(views: int, batch: int) -> torch.Tensor:
    texts = torch.randint(1, 48, (views, batch, 10))
    texts.scatter_(2, torch.randint(2, 10, (views, batch, 1)), 49)
    return texts


def _images(batch: int, *sides: int) -> list[torch.Tensor]:
    return [torch.randn(batch, 3, side, side) for side in sides]


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-32"])
def test_names_and_shapes_are_the_released_ones(name):
    expected = json.loads((DATA / f"state_dict_{name.lower().replace('-', '_')}.json").read_text())
    with torch.device("meta"):
        built = create_model(name)
    assert {key: list(tensor.shape) for key, tensor in built.state_dict().items()} == expected


def test_forward_shapes_and_norms(model):
    features = model(_images(3, 32, 32, 16, 16, 24), _texts(4, 3))
    for field, views in (("image", 5), ("text", 4), ("image_crossmodal", 5), ("text_crossmodal", 4)):
        tensor = getattr(features, field)
        assert tensor.shape == (views, 3, 16)
        torch.testing.assert_close(tensor.norm(dim=-1), torch.ones(views, 3))
    torch.testing.assert_close(features.logit_scale, torch.tensor(1 / 0.07))
    torch.testing.assert_close(features.distill_logit_scale, torch.tensor(1 / 0.07))


@pytest.mark.parametrize("sides", [(32, 16, 32, 16), (16, 32, 32), (32,), (24, 32, 24, 16, 32)])
def test_crops_of_mixed_sizes_keep_their_order(model, sides):
    """One packed run gives what each view gives alone, in the order given, with and without kept patches."""
    images, texts = _images(3, *sides), _texts(2, 3)
    alone = torch.stack([model.encode_image(image) for image in images])
    torch.testing.assert_close(model(images, texts).image, alone)
    torch.testing.assert_close(model.encode_views(images, texts).image, alone)


@pytest.mark.parametrize("crossmodal", [True, False])
def test_a_forward_pass_reads_nothing_back_from_the_device(crossmodal):
    """Meta tensors have no values: whoever asked for one would fail. Captions are packed on the host."""
    model = create_model(replace(TINY, crossmodal=crossmodal)).to("meta")
    images, texts = [image.to("meta") for image in _images(3, 32, 16)], _texts(2, 3)
    features = model(images, texts)
    assert features.image.is_meta
    assert features.text.shape == (2, 3, 16)
    assert model.encode_views(images, texts).text.is_meta


def test_captions_may_stay_on_the_host_or_not(model):
    images, texts = _images(3, 32, 16), _texts(2, 3)
    assert model.to("meta").run_text(texts.flatten(0, 1)).features_ND.is_meta
    with pytest.raises(NotImplementedError, match="meta"):  # fetched, which a meta tensor cannot be
        model([image.to("meta") for image in images], texts.to("meta"))


def test_what_is_cached_in_inference_mode_serves_training(model):
    """Layouts and position-resize matrices are made once, for whoever comes first."""
    images, texts = _images(2, 32, 16, 24), _texts(2, 2)
    crop_layout.cache_clear()
    resize_matrix.cache_clear()
    with torch.inference_mode():
        expected = model.encode_views(images, texts)
    found = model.encode_views(images, texts)
    (found.image.sum() + found.text.sum()).backward()
    torch.testing.assert_close(found.image, expected.image.clone())
    assert model.visual.positional_embedding.grad.abs().sum() > 0


def test_a_layout_is_made_once_for_the_sizes_of_a_run(model):
    crop_layout.cache_clear()
    for _ in range(2):
        model(_images(3, 32, 16, 16), _texts(2, 3))
    assert crop_layout.cache_info()[:2] == (1, 1)  # hits, misses


def test_an_attention_backend_that_cannot_run_is_refused_at_once(model):
    with pytest.raises(UserError, match="unknown backend 'fast'; choose one of auto, "):
        model.set_attention("fast")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="'varlen' was asked for but cannot run: "):
            model.set_attention("varlen")
    model.set_attention("sdpa")
    assert model.visual.transformer.attention == model.transformer.attention == "sdpa"


def test_text_features_do_not_depend_on_company(model):
    texts = _texts(3, 4)
    alone = torch.stack([model.encode_text(view) for view in texts])
    torch.testing.assert_close(model(_images(4, 32), texts).text, alone)
    torch.testing.assert_close(model.encode_text(texts[1][:1]), alone[1][:1])


def test_crossmodal_features_attend_to_view_zero_only(model):
    images, texts = _images(2, 32, 32), _texts(2, 2)
    before = model(images, texts)
    changed_texts, changed_images = texts.clone(), [images[0], torch.randn_like(images[1])]
    changed_texts[1] = _texts(1, 2)[0]
    after = model(changed_images, changed_texts)
    torch.testing.assert_close(after.image_crossmodal[0], before.image_crossmodal[0])
    torch.testing.assert_close(after.text_crossmodal[0], before.text_crossmodal[0])
    assert not torch.allclose(after.image_crossmodal[1], before.image_crossmodal[1])


def test_padding_of_caption_view_zero_is_attended_to(model):
    """The original does not mask it; changing what stands after EOT must show in the image's cross-modal feature."""
    images, texts = _images(1, 32), _texts(1, 1)
    texts[0, 0, 2:] = 0
    texts[0, 0, 2] = 49
    before = model(images, texts)
    texts[0, 0, 5] = 7
    after = model(images, texts)
    torch.testing.assert_close(after.text, before.text)
    assert not torch.allclose(after.image_crossmodal, before.image_crossmodal)


def test_batch_of_one(model):
    features = model(_images(1, 32, 16), _texts(2, 1))
    assert features.image_crossmodal.shape == (2, 1, 16)


def test_plain_clip_has_no_crossmodal_parameters():
    model = create_model(ModelConfig(**{**vars(TINY), "crossmodal": False}))
    assert not [name for name in model.state_dict() if "cross_pool" in name or "token_mapping" in name]
    features = model(_images(2, 32), _texts(1, 2))
    assert features.image_crossmodal is None
    assert features.distill_logit_scale is None
    with pytest.raises(UserError, match="no cross-attention pooling"):
        model.cross_attention_maps(_images(2, 32)[0], _texts(1, 2)[0])


def test_attention_maps_are_distributions(model):
    maps = model.cross_attention_maps(_images(2, 32)[0], _texts(1, 2)[0])
    assert maps.image_BHP.shape == (2, 4, 16)
    assert maps.text_BHL.shape == (2, 4, 10)
    torch.testing.assert_close(maps.image_BHP.sum(-1), torch.ones(2, 4))
    torch.testing.assert_close(maps.text_BHL.sum(-1), torch.ones(2, 4))


@pytest.mark.parametrize(("grid", "rows", "columns"), [(6, 3, 3), (14, 6, 6), (4, 7, 5)])
def test_resize_matrix_is_the_interpolation(grid, rows, columns):
    embedding = torch.randn(grid * grid, 8)
    factors = ((rows + 0.1) / grid, (columns + 0.1) / grid)
    expected = F.interpolate(embedding.T.view(1, 8, grid, grid), scale_factor=factors, mode="bicubic")
    torch.testing.assert_close(
        resize_matrix(grid, rows, columns) @ embedding, expected.view(8, -1).T, rtol=1e-5, atol=1e-5
    )


def test_weights_go_both_ways_bit_exactly(model):
    exported = model.reference_state_dict()
    other = create_model(TINY)
    other.load_reference_state_dict({f"module.{name}": tensor for name, tensor in exported.items()})
    for name, tensor in other.reference_state_dict().items():
        assert torch.equal(tensor, exported[name]), name
    exported["visual.proj"].zero_()
    assert model.visual.proj.abs().sum() > 0, "the export must be a copy"


def test_weights_that_do_not_fit_are_named(model):
    weights = model.reference_state_dict()
    weights["surplus"] = weights.pop("ln_final.weight")
    weights["visual.proj"] = weights["visual.proj"].T
    with pytest.raises(
        UserError, match=r"missing: ln_final.weight; unknown: surplus; wrong shape: visual.proj is \(16, 24\)"
    ):
        model.load_reference_state_dict(weights)


def test_every_parameter_is_initialised_and_trained(model):
    """Gradients reach all parameters; nothing is left at what the allocator gave."""
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.abs().max() < 10, name
    teacher = create_model(TINY)
    images, texts = _images(3, 32, 32, 16), _texts(4, 3)
    cosmos_fast.CosmosLoss()(model(images, texts), teacher.encode_views(images[:2], texts[:2])).total.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == set()
    assert all(parameter.grad is None for parameter in teacher.parameters()), "no gradient reaches the teacher"


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        ([torch.randn(2, 3, 32, 32)], _texts(1, 2)[0], "captions of shape"),
        ([], _texts(1, 2), "got 0 image views"),
        ([torch.randn(3, 3, 32, 32)], _texts(1, 2), r"images\[0\] has shape \(3, 3, 32, 32\), expected \[2, 3, H, W\]"),
        (
            [torch.randn(2, 3, 30, 32)],
            _texts(1, 2),
            "30 x 32 px is not divisible by the patch size 8: give sides that are multiples of 8",
        ),
    ],
)
def test_views_that_do_not_fit_are_named(model, images, texts, message):
    with pytest.raises(ValueError, match=message):
        model(images, texts)


def test_create_model_takes_names_dicts_files_and_configs(tmp_path):
    as_dict = TINY.to_openclip()
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(as_dict))
    for source in (TINY, as_dict, path, str(path)):
        assert create_model(source).config == TINY
    with pytest.raises(UserError, match="'ViT-X' is not known: use one of ViT-B-16, ViT-B-32"):
        create_model("ViT-X")
    with pytest.raises(UserError, match=r"missing\.json does not exist"):
        create_model(tmp_path / "missing.json")
    for text, message in (
        ("{", "not valid JSON"),
        ("[1]", "expected a dict, not a list"),
        (json.dumps(as_dict | {"embed_dim": "512"}), "embed_dim must be a whole number, not '512'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            create_model(path)

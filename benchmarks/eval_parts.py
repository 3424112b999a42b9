"""What `bench eval` times: the product's way, and the straightforward one that comes to the same numbers.

Axes: N images, M captions, B batch, D embedding, P patches, S wordings, C classes, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.eager_cosmos import EagerCosmos
from cosmos_fast.evaluate import retrieval
from cosmos_fast.evaluate.segmentation import SegmentationProtocol, segment, window_starts

SCALE = 40.0
DISTINCT = 64  # pictures; making one takes longer than reading it
KINDS = ("photo", "bad photo", "low resolution photo", "close-up photo", "dark photo", "drawing", "cropped photo")
TEMPLATES = tuple(
    f"a {kind} of {article}{{}}{end}"
    for kind in (*KINDS, "rendition", "jpeg corrupted photo", "sculpture")
    for article in ("a ", "the ", "one ", "my ")
    for end in (".", " in a video game.")
)
NOUNS = (
    "dog",
    "aeroplane",
    "dining table",
    "traffic light",
    "bird",
    "sewing machine",
    "mountain",
    "tree frog",
    "pizza",
)
ADJECTIVES = ("small", "grey", "wooden", "spotted", "old", "bright green", "long-haired", "striped", "toy", "broken")
NAMES = [f"{adjective} {noun}" for noun in NOUNS for adjective in ADJECTIVES]
Scene = tuple[Tensor, tuple[int, int]]  # pixels [3, h, w], and the shape that its map is wanted in


def write_pairs(folder: Path, images: int, captions: int, width: int, height: int) -> None:
    """JPEGs of a photograph's size, each with a text of so many captions beside it; DISTINCT different ones."""
    import numpy as np

    from benchmarks.input_shards import jpeg, picture, sentence

    pictures = [jpeg(picture(width, height, seed=number)) for number in range(min(images, DISTINCT))]
    for number in range(images):
        texts = [sentence(np.random.default_rng([number, caption])) for caption in range(captions)]
        (folder / f"{number:05d}.txt").write_text("\n".join(texts), encoding="utf-8")
        (folder / f"{number:05d}.jpg").write_bytes(pictures[number % DISTINCT])


class Pairs:
    """A folder of images and captions: encoded as `cosmos-fast eval run` does it, and from tensors that are ready.

    Imports what it needs, which a GPU check's machine may lack, when it is made.
    """

    def __init__(self, model: Any, folder: Path, batch: int) -> None:
        from cosmos_fast.data.images import eval_crop, normalize, to_pixels
        from cosmos_fast.data.tokenizer import tokenize
        from cosmos_fast.evaluate import published
        from cosmos_fast.evaluate.datasets.registry import open_set

        self.model, self._tokenize, self._published = model, tokenize, published
        self.found: Any = open_set("captions", folder)
        self._settings = published.Settings(batch_size=batch)
        size = model.config.vision.image_size
        pixels = [to_pixels(eval_crop(self.found.images.image(n), size)) for n in range(len(self.found.images))]
        device = next(model.parameters()).device
        self.batches = [normalize(torch.stack(part).to(device)) for part in _parts(pixels, batch)]
        self.texts = [text for captions in self.found.captions for text in captions]
        self.token_batches: list[Tensor] = []
        self._order: list[str] = []
        self.captions_evaluated(None, self._keep)

    def _keep(self, texts: list[str]) -> Tensor:
        tokens = self._tokenize(texts, self.model.config.text.context_length)
        self._order += texts
        self.token_batches.append(tokens.to(next(self.model.parameters()).device))
        return tokens

    @torch.inference_mode()
    def images_evaluated(self, _: object) -> Tensor:
        return self._published.image_features(self.model, self.found, self._settings, self._published.ALONE)

    @torch.inference_mode()
    def images_ready(self, _: object) -> Tensor:
        return torch.cat([self.model.encode_image(batch, normalize=True).float() for batch in self.batches])

    @torch.inference_mode()
    def captions_evaluated(self, _: object, tokenizer: Callable[[list[str]], Tensor] | None = None) -> Tensor:
        tokenizer = tokenizer or self._published.counted_tokenizer(self.model, self._settings)
        return self._published.encode_texts(self.model, self.texts, tokenizer)

    @torch.inference_mode()
    def captions_ready(self, _: object) -> Tensor:
        """In the order of the batches."""
        return torch.cat([self.model.encode_text(tokens, normalize=True).float() for tokens in self.token_batches])

    def check(self) -> None:
        """Both ways give the same features."""
        torch.testing.assert_close(self.images_evaluated(None), self.images_ready(None), rtol=0, atol=1e-4)
        rows = [self.texts.index(text) for text in self._order]
        torch.testing.assert_close(self.captions_evaluated(None)[rows], self.captions_ready(None), rtol=0, atol=1e-4)


def _parts(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


@dataclass(frozen=True)
class Gallery:
    """image_ND, text_MD: normalised features. owner_M: the image of each caption; all own equally many."""

    image_ND: Tensor
    text_MD: Tensor
    owner_M: Tensor

    @classmethod
    def made(cls, images: int, captions: int, dim: int, seed: int, device: str = "cpu") -> Gallery:
        """Captions that resemble their image, in no order. Made in place: what peaks is to be what is measured."""
        generator = torch.Generator(device).manual_seed(seed)
        image_ND = torch.randn(images, dim, generator=generator, device=device)
        owner_M = torch.arange(images, device=device).repeat_interleave(captions // images)
        owner_M = owner_M[torch.randperm(len(owner_M), generator=generator, device=device)]
        text_MD = torch.randn(len(owner_M), dim, generator=generator, device=device)
        for part_BD, owner_B in zip(text_MD.split(1000), owner_M.split(1000), strict=True):
            part_BD.add_(image_ND[owner_B], alpha=0.15)
        for features in (image_ND, text_MD):
            features.div_(features.norm(dim=1, keepdim=True))
        return cls(image_ND, text_MD, owner_M)

    def double(self) -> Gallery:
        """Where scores do not tie by rounding, which sorting decides in any way."""
        return Gallery(self.image_ND.double(), self.text_MD.double(), self.owner_M)


@torch.inference_mode()
def metrics_in_blocks(gallery: Gallery) -> dict[str, float]:
    return retrieval.retrieval_metrics(gallery.image_ND, gallery.text_MD, gallery.owner_M)


@torch.inference_mode()
def metrics_by_sorting(gallery: Gallery) -> dict[str, float]:
    """All scores at once, sorted both ways; the place of what is looked for is its rank."""
    score_NM = gallery.image_ND @ gallery.text_MD.T
    order_NM = score_NM.argsort(dim=1, descending=True)
    images = torch.arange(len(score_NM), device=order_NM.device)
    own_NM = gallery.owner_M[order_NM] == images[:, None]
    ranks = {"i2t": own_NM.int().argmax(dim=1) + 1}  # the first of several
    del order_NM, own_NM
    order_MN = score_NM.T.argsort(dim=1, descending=True)
    ranks["t2i"] = (order_MN == gallery.owner_M[:, None]).int().argmax(dim=1) + 1
    return {**retrieval.rank_metrics(ranks["i2t"], "i2t"), **retrieval.rank_metrics(ranks["t2i"], "t2i")}


def run_gallery(metrics: Callable[[Gallery], object], images: int, captions: int, dim: int, device: str) -> None:
    """What peak memory is taken of; the features count on both sides."""
    metrics(Gallery.made(images, captions, dim, 0, device))


@dataclass(frozen=True)
class Segmented:
    """A model, and what its patches are compared with: text_SD, a wording a class here. batch: windows a forward."""

    model: Any
    text_SD: Tensor
    batch: int

    @property
    def window(self) -> int:
        return int(self.model.config.vision.image_size)

    def across_images(self, scenes: Sequence[Scene]) -> list[Tensor]:
        """As `cosmos-fast eval` does it."""
        class_S = torch.arange(len(self.text_SD))
        with torch.inference_mode():
            maps = segment(
                self.model,
                scenes,
                self.text_SD,
                [class_S],
                window=self.window,
                csa=True,
                protocol=SegmentationProtocol(batch_size=self.batch),
            )
            return [labels for (labels,) in maps]

    @torch.inference_mode()
    def image_by_image(self, scenes: Sequence[Scene]) -> list[Tensor]:
        """The protocol as it is written, with the windows of one image in a forward: probabilities of all classes."""
        found = []
        for pixels_3HW, shape in scenes:
            _, height, width = pixels_3HW.shape
            tops, lefts = (window_starts(side, self.window, self.window // 2) for side in (height, width))
            places = [
                (slice(top, top + self.window), slice(left, left + self.window)) for top in tops for left in lefts
            ]
            windows = torch.stack([pixels_3HW[:, rows, columns] for rows, columns in places]).to(self.text_SD.device)
            patches_BPD = F.normalize(self.model.encode_image_dense(windows, csa=True).float(), dim=-1)
            side = round(patches_BPD.shape[1] ** 0.5)
            grid_BShw = (patches_BPD @ self.text_SD.T).transpose(1, 2).unflatten(2, (side, side))
            large_BSHW = F.interpolate(grid_BShw, (self.window, self.window), mode="bilinear")
            sum_SHW = torch.zeros(len(self.text_SD), height, width, device=large_BSHW.device)
            count_HW = torch.zeros(height, width, device=large_BSHW.device)
            for place, map_SHW in zip(places, large_BSHW, strict=True):
                sum_SHW[(slice(None), *place)] += map_SHW
                count_HW[place] += 1
            cosine_SHW = F.interpolate((sum_SHW / count_HW)[None], shape, mode="bilinear")[0]
            found.append((SCALE * cosine_SHW).softmax(dim=0).argmax(dim=0).to(torch.uint8).cpu())
        return found

    def check(self, scenes: Sequence[Scene]) -> None:
        """Equal classes, but for pixels where rounding decides."""
        for ours, theirs in zip(self.across_images(scenes), self.image_by_image(scenes), strict=True):
            differing = (ours != theirs).float().mean().item()
            assert differing < 2e-3, f"{100 * differing:.2f} % of the pixels have another class"


@dataclass(frozen=True)
class ClassTexts:
    """Prompts of every class: encoded together at their own lengths, and class by class with all padding."""

    model: Any
    port: EagerCosmos
    names: Sequence[str]
    templates: Sequence[str]

    @torch.inference_mode()
    def together(self, _: object) -> Tensor:
        from cosmos_fast.data.tokenizer import tokenize
        from cosmos_fast.evaluate.prompts import class_features, fill_templates

        classes = fill_templates("made up", {name: (name,) for name in self.names}, self.templates)
        return class_features(self.model, classes, lambda texts: tokenize(texts, self.model.config.text.context_length))

    @torch.inference_mode()
    def class_by_class(self, _: object) -> Tensor:
        from cosmos_fast.data.tokenizer import tokenize

        found = []
        for name in self.names:
            prompts = [template.replace("{}", name) for template in self.templates]
            tokens = tokenize(prompts, self.port.config.context_length).to(self.port.logit_scale.device)
            found.append(F.normalize(F.normalize(self._padded(tokens), dim=-1).mean(dim=0), dim=-1))
        return torch.stack(found)

    def _padded(self, tokens_BL: Tensor) -> Tensor:
        """The port's text tower, without the token features that only training needs."""
        port = self.port
        x_BLW = port.token_embedding(tokens_BL) + port.positional_embedding
        x_BLW = port.ln_final(port.transformer(x_BLW, port.attn_mask))
        return x_BLW[torch.arange(len(x_BLW)), tokens_BL.argmax(dim=-1)] @ port.text_projection

    def check(self) -> None:
        torch.testing.assert_close(self.together(None), self.class_by_class(None), rtol=0, atol=1e-4)

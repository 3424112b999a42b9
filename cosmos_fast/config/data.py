"""What is read, and which views are cut from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from cosmos_fast.config.checks import (
    require,
    require_choice,
    require_not_negative,
    require_positive,
    require_probability,
)
from cosmos_fast.config.remote import RemoteConfig

LOADERS = ("auto", "pil", "dali")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of webdataset tar shards.

    path: a directory, a glob, a brace pattern (`{00000..00575}.tar`), or one file. weight: how often its samples are
    seen in an epoch; 1 for all sources is a plain concatenation. schema: layout of the json member, guessed for each
    record by its fields with "auto".
    """

    path: str
    weight: float = 1.0
    schema: Literal["auto", "dreamlip", "pixelprose"] = "auto"

    def __post_init__(self) -> None:
        require(bool(self.path.strip()), "data source path is empty: give a directory, a glob or a shard file")
        require(_is_address(self.path), "data source: its path is no valid address; check the host, and its brackets")
        require_positive(f"source {self.path!r}", self, "weight")
        require_choice(f"source {self.path!r} schema", self.schema, ("auto", "dreamlip", "pixelprose"))


def _is_address(path: str) -> bool:
    """Whether it can be taken apart as a URL, if it is one."""
    try:
        return "://" not in path or path.startswith("pipe:") or bool(urlsplit(path))
    except ValueError:  # of brackets that hold no IPv6 address
        return False


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How one image view is cut and recoloured; made by ViewsConfig.crops().

    size: side of the crop, pixels. scale: range of the crop's share of the image area. jitter: strengths of brightness,
    contrast, saturation, hue. blur_radius: range of the Gaussian radius, pixels. solarize_threshold: 8-bit level.
    *_p: probabilities.
    """

    size: int
    scale: tuple[float, float]
    flip_p: float
    jitter: tuple[float, float, float, float]
    jitter_p: float
    gray_p: float
    blur_p: float
    blur_radius: tuple[float, float]
    solarize_p: float
    solarize_threshold: int


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Image crops and captions of a sample, globals first; the teacher sees the globals only.

    local_image_size: side of a local crop, pixels (a global crop has the model's image_size). *_scale: range of the
    share of the image area that a crop covers. jitter: brightness, contrast, saturation, hue. *_p: probabilities;
    global_blur_p and global_solarize_p hold one value a global crop, the last one repeats. max_sentences: a global
    caption joins 1 to this many sentences.
    """

    global_crops: int = 2
    local_crops: int = 6
    global_captions: int = 2
    local_captions: int = 6
    local_image_size: int = 96
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    flip_p: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    global_blur_p: tuple[float, ...] = (1.0, 0.1)
    local_blur_p: float = 0.5
    blur_radius: tuple[float, float] = (0.1, 2.0)
    global_solarize_p: tuple[float, ...] = (0.0, 0.2)
    local_solarize_p: float = 0.0
    solarize_threshold: int = 128
    max_sentences: int = 5

    def __post_init__(self) -> None:
        where = "data.views"
        require_positive(where, self, "global_crops", "global_captions", "local_image_size", "max_sentences")
        require_not_negative(where, self, "local_crops", "local_captions")
        probabilities = ("flip_p", "jitter_p", "gray_p", "global_blur_p", "local_blur_p")
        require_probability(where, self, *probabilities, "global_solarize_p", "local_solarize_p")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            require(0.0 < low <= high <= 1.0, f"{where}.{name} is {(low, high)}: needs 0 < low <= high <= 1")
        for name in ("global_blur_p", "global_solarize_p"):
            require(len(getattr(self, name)) > 0, f"{where}.{name} is empty: give one probability a global crop")
        low, high = self.blur_radius
        require(0.0 <= low <= high, f"{where}.blur_radius is {self.blur_radius}: needs 0 <= low <= high")
        require(all(0.0 <= s <= 1.0 for s in self.jitter[:3]), f"{where}.jitter is {self.jitter}: strengths are 0 to 1")
        require(0.0 <= self.jitter[3] <= 0.5, f"{where}.jitter hue is {self.jitter[3]}: hue lies between 0 and 0.5")
        require(
            0 <= self.solarize_threshold <= 256, f"{where}.solarize_threshold is {self.solarize_threshold}: use 0..256"
        )

    @property
    def image_views(self) -> int:
        """Image crops of a sample."""
        return self.global_crops + self.local_crops

    @property
    def text_views(self) -> int:
        """Captions of a sample."""
        return self.global_captions + self.local_captions

    def crops(self, image_size: int) -> tuple[CropConfig, ...]:
        """One CropConfig an image view, globals first; image_size is the model's, pixels."""
        cut = []
        for view in range(self.global_crops):
            blur_p = self.global_blur_p[min(view, len(self.global_blur_p) - 1)]
            solarize_p = self.global_solarize_p[min(view, len(self.global_solarize_p) - 1)]
            cut.append(self._crop(image_size, self.global_scale, blur_p, solarize_p))
        local = self._crop(self.local_image_size, self.local_scale, self.local_blur_p, self.local_solarize_p)
        return (*cut, *[local] * self.local_crops)

    def _crop(self, size: int, scale: tuple[float, float], blur_p: float, solarize_p: float) -> CropConfig:
        return CropConfig(
            size=size,
            scale=scale,
            flip_p=self.flip_p,
            jitter=self.jitter,
            jitter_p=self.jitter_p,
            gray_p=self.gray_p,
            blur_p=blur_p,
            blur_radius=self.blur_radius,
            solarize_p=solarize_p,
            solarize_threshold=self.solarize_threshold,
        )


@dataclass(frozen=True, kw_only=True)
class DaliConfig:
    """How DALI works, where `loader` settles on it.

    threads: of its CPU work, a rank. ahead: batches it works on before they are asked for. max_pixels: larger images
    are cut in the workers, so that the decoded ones of a rank take (ahead + 1) * batch_size * max_pixels * 3 B at most.
    """

    threads: int = 4
    ahead: int = 1
    max_pixels: int = 4 * 2**20

    def __post_init__(self) -> None:
        require_positive("data.dali", self, "threads", "max_pixels")
        require_not_negative("data.dali", self, "ahead")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources and loading.

    train: the sources; several are mixed by weight. loader: who decodes and cuts images: "pil" in the workers, "dali"
    in the training process, on its GPU if it has one; "auto" is DALI on a GPU where it is installed, else PIL. workers:
    loader processes a rank, 0 loads in the training process. prefetch: batches each worker keeps ready. max_bad_share:
    the run stops once more than this share of samples is unusable. max_pixels: larger images are skipped.
    max_member_bytes: larger tar members are skipped. samples_per_epoch: length of an epoch, samples; None takes the
    number of samples in the sources. order: "global" permutes all samples of a source; "window" reads pieces of shards
    (remote.piece_mib) in random order, `window_pieces` of them at a time, for storage where random access is dear;
    "auto" is window for remote shards. remote: how these are read. allow_pipe: `pipe:` sources run a shell command.
    """

    train: tuple[SourceConfig, ...] = ()
    views: ViewsConfig = field(default_factory=ViewsConfig)
    loader: Literal["auto", "pil", "dali"] = "auto"
    dali: DaliConfig = field(default_factory=DaliConfig)
    workers: int = 2
    prefetch: int = 2
    max_bad_share: float = 0.05
    max_pixels: int = 50_000_000
    max_member_bytes: int = 64 * 2**20
    samples_per_epoch: int | None = None
    order: Literal["auto", "global", "window"] = "auto"
    window_pieces: int = 256
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        require_choice("data.loader", self.loader, LOADERS)
        require_not_negative("data", self, "workers")
        require_choice("data.order", self.order, ("auto", "global", "window"))
        require_positive("data", self, "prefetch", "max_pixels", "max_member_bytes", "window_pieces")
        require_probability("data", self, "max_bad_share")
        if self.samples_per_epoch is not None:
            require_positive("data", self, "samples_per_epoch")

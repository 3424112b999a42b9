"""Shards for the benchmarks of the input: no data set travels with the repository, so pictures and captions are made.

Pictures have the spectrum of photographs (amplitude falls as 1/frequency, colours mostly go together), so that a JPEG
of them is about as large and as dear to decode. Captions have the word frequencies of the tokenizer's vocabulary, which
is ordered by frequency; some words are not in it, and some texts hold what must be mended first.
"""

from __future__ import annotations

import io
import json
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from cosmos_fast.config import ViewsConfig
from cosmos_fast.data.captions import draw_captions
from cosmos_fast.data.records import DREAMLIP_FIELDS
from cosmos_fast.data.tokenizer import tokenizer

WIDTH, HEIGHT, QUALITY = 500, 375, 90
SHARD_SAMPLES = 64
_SENTENCE_WORDS = (6, 24)
_LONG_SENTENCES = (2, 5)  # in each of the fields of long captions
_UNKNOWN, _MENDED = 0.03, 0.03  # shares of words that are in no vocabulary, of sentences that are not plain ASCII
_ODD = ("caf\u00e9 \u201cquoted\u201d", "salt &amp; pepper", "it\u2019s 20\u00a0\u00b0C", "na\u00efve &lt;b&gt;")
_MOST_COMMON = 12  # words of this rank are as common as the first: flattens Zipf's law at its top


def write_shards(folder: Path, samples: int, *, width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Path:
    """`samples` samples in shards of SHARD_SAMPLES; the same arguments give the same bytes. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, samples, SHARD_SAMPLES)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(first, min(first + SHARD_SAMPLES, samples)):
                image = jpeg(picture(width, height, seed=seed + number))
                record = json.dumps(caption_record(seed + number)).encode()
                for name, data in ((f"{number:08d}.jpg", image), (f"{number:08d}.json", record)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return folder


def picture(width: int = WIDTH, height: int = HEIGHT, *, seed: int = 0) -> Image.Image:
    """1/f noise in colour, all levels used."""
    numbers = np.random.default_rng([seed, 0])
    luma, *chroma = (_pink(width, height, numbers) for _ in range(3))
    red, blue = (0.35 * band for band in chroma)
    channels = np.stack([luma + red, luma - 0.5 * (red + blue), luma + blue], axis=-1)
    low, high = np.percentile(channels, (0.5, 99.5))
    return Image.fromarray((255 * (channels - low) / (high - low)).clip(0, 255).astype(np.uint8))


def _pink(width: int, height: int, numbers: np.random.Generator) -> np.ndarray:
    """float64 [height, width] of deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * numbers.random(frequency.shape))
    noise = np.fft.irfft2(phases / frequency, (height, width))
    return noise / noise.std()


def jpeg(image: Image.Image, quality: int = QUALITY, **options: object) -> bytes:
    """The picture as a baseline JPEG with halved colour resolution, or as the options say."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, **options)
    return out.getvalue()


@lru_cache(maxsize=1)
def _common_words() -> tuple[list[str], np.ndarray]:
    """Words of the vocabulary, most frequent first, and their cumulated probabilities."""
    ranked = sorted(tokenizer().get_vocab().items(), key=lambda item: item[1])
    words = [piece.removesuffix("</w>") for piece, _ in ranked if piece.endswith("</w>")]
    words = [word for word in words if word.isascii() and word.isalpha() and len(word) > 1]
    share = 1 / (np.arange(len(words)) + _MOST_COMMON)
    return words, np.cumsum(share / share.sum())


def sentence(numbers: np.random.Generator) -> str:
    """Words in no order of sense, the first with a capital."""
    words, cumulated = _common_words()
    count = int(numbers.integers(_SENTENCE_WORDS[0], _SENTENCE_WORDS[1] + 1))
    chosen = np.searchsorted(cumulated, numbers.random(2 * count)).clip(max=len(words) - 1)
    unknown, comma = numbers.random((2, count))
    spelled = [
        words[first] + (words[second] if u < _UNKNOWN else "") + ("," if c < 0.07 else "")
        for first, second, u, c in zip(chosen[:count], chosen[count:], unknown, comma, strict=True)
    ]
    if numbers.random() < _MENDED:
        spelled.insert(count // 2, _ODD[int(numbers.integers(len(_ODD)))])
    return " ".join(spelled).capitalize()


def caption_record(seed: int) -> dict[str, list[str]]:
    """The seven fields of a DreamLIP record."""
    numbers = np.random.default_rng([seed, 1])
    counts = (int(numbers.integers(*_LONG_SENTENCES)) if name.startswith("long") else 1 for name in DREAMLIP_FIELDS)
    return {
        name: [sentence(numbers) for _ in range(count)] for name, count in zip(DREAMLIP_FIELDS, counts, strict=True)
    }


def training_captions(samples: int, *, seed: int = 0) -> list[str]:
    """What training tokenizes of so many samples: two long captions and six single sentences each."""
    captions: list[str] = []
    for number in range(samples):
        sentences = [text for texts in caption_record(seed * 1_000_000 + number).values() for text in texts]
        captions += draw_captions(sentences, ViewsConfig(), np.random.default_rng([seed, number, 2]))
    return captions

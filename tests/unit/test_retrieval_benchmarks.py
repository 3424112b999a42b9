"""Every layout of captions through `eval run --benchmark`, against ranks counted pair by pair on pictures known by
number: the readers have no part in what is expected."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cosmos_fast.cli.eval import command
from cosmos_fast.cli.main import run as run_command
from cosmos_fast.data.images import eval_transform
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.model.checkpoints import load_checkpoint
from cosmos_fast.model.cosmos import CosmosModel
from tests.benchmark_folders.caption_layouts import LAYOUTS
from tests.benchmark_folders.captions import expected
from tests.shards import picture
from tests.unit.test_eval_cli import tiny_config, write_run

# The set that stands in each layout, as the command line names it.
NAMES = {
    "coco": "coco",
    "coco as webdataset": "coco:wds",
    "coco in Karpathy's split": "coco_karpathy",
    "flickr30k by Karpathy's JSON": "flickr30k",
    "flickr30k by CLIP-benchmark's list": "flickr30k:list",
    "flickr30k by the hub's table": "flickr30k:table",
    "flickr30k as webdataset": "flickr30k:wds",
    "texts beside images": "captions",
    "captions.json": "captions:json",
    "metadata.jsonl": "captions:jsonl",
    "captions.csv": "captions:csv",
    "captions.tsv": "captions:tsv",
    "shards of one's own": "captions:tar",
    "webdataset": "wds",
}
MIXED = ("JPEG", "PNG", "WEBP", "JPEG", "JPEG", "JPEG")  # formats of write_captions


def ranks(model: CosmosModel, formats: Sequence[str]) -> dict[str, list[int]]:
    """Each direction's ranks, by comparing every pair's cosine; a tie with another owner's is lost."""
    size, length = model.config.vision.image_size, model.config.text.context_length
    pairs = [(text, owner) for owner, texts in enumerate(expected()) for text in texts]
    with torch.no_grad():
        images = [
            model.encode_image(eval_transform(picture(n, 24 + 8 * n, 40, form), size)[None])[0].double()
            for n, form in enumerate(formats)
        ]
        texts = [model.encode_text(tokenize([text], length))[0].double() for text, _ in pairs]
    score = [[round(float(image @ text), 6) for text in texts] for image in images]
    order = sorted({value for row in score for value in row})
    assert min(b - a for a, b in itertools.pairwise(order)) > 1e-6  # rounding decides nothing
    i2t, t2i = [], []
    for n in range(len(images)):
        best = max(score[n][m] for m, (_, owner) in enumerate(pairs) if owner == n)
        i2t.append(1 + sum(owner != n and score[n][m] >= best for m, (_, owner) in enumerate(pairs)))
    for m, (_, own) in enumerate(pairs):
        t2i.append(1 + sum(n != own and score[n][m] >= score[own][m] for n in range(len(images))))
    return {"i2t": i2t, "t2i": t2i}


def metrics(of_way: dict[str, list[int]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for way, places in of_way.items():
        found |= {f"{way}_r{k}": 100 * sum(place <= k for place in places) / len(places) for k in (1, 5, 10)}
        found[f"{way}_mean_rank"] = statistics.mean(places)
        found[f"{way}_median_rank"] = statistics.median(places)
    return found


def test_every_layout_is_evaluated_as_pair_by_pair(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny_config("demo", tmp_path))
    given = []
    for layout, (write, _, _) in LAYOUTS.items():
        given += ["--benchmark", f"{NAMES[layout]}={write(tmp_path / 'sets' / NAMES[layout])}"]
    out = tmp_path / "r.json"
    arguments = ["run", "--checkpoint", str(tmp_path / "run"), "--device", "cpu", "--batch-size", "4"]
    assert run_command(command, [*arguments, *given, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["benchmarks"]
    assert list(found) == list(NAMES.values())
    model = load_checkpoint(tmp_path / "run", "teacher")
    counted = {formats: ranks(model, formats) for formats in (("JPEG",) * 6, MIXED)}
    for layout, name in NAMES.items():
        mixed = name.startswith("captions") and name != "captions:tar"
        assert found[name]["metrics"] == pytest.approx(metrics(counted[MIXED if mixed else ("JPEG",) * 6])), layout
        assert found[name]["protocol"]["images"] == 6
        assert found[name]["protocol"]["captions"] == 13
        assert found[name]["split"] == LAYOUTS[layout][2]

"""`cosmos-fast visualize`: pictures of what a checkpoint attends to, retrieves and segments, as PNG and one page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cosmos_fast.utils.errors import UserError

if TYPE_CHECKING:
    from cosmos_fast.evaluate.pictures.album import Sheet
    from cosmos_fast.evaluate.pictures.retrieval import Query
    from cosmos_fast.evaluate.pictures.sources import Source
    from cosmos_fast.model.cosmos import CosmosModel

A_PATH = click.Path(path_type=Path)
_SHARED = (
    click.option("--checkpoint", type=A_PATH, required=True, help="Run or checkpoint folder, or file, or hf://."),
    click.option("--weights", type=click.Choice(["teacher", "student"]), default="teacher", show_default=True),
    click.option("--image", "images", type=A_PATH, multiple=True, help="Image file, or folder of images; repeatable."),
    click.option("--benchmark", metavar="NAME=PATH", help="A published set (`cosmos-fast eval sets`)."),
    click.option("--data", help="Shards of images and captions, as for `eval run`."),
    click.option(
        "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="A data.remote key or data.allow_pipe."
    ),
    click.option("--max-samples", type=click.IntRange(1), help="Look at so many samples of a set or of shards only."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto."),
    click.option("--out", type=A_PATH, required=True, help="Folder to make: index.html, pictures.json, PNGs."),
    click.option("--overwrite", is_flag=True, help="Replace the pictures of an earlier call."),
)


@dataclass(frozen=True)
class Shared:
    """What all three commands are told (see _SHARED)."""

    checkpoint: Path
    weights: str
    images: tuple[Path, ...]
    benchmark: str | None
    data: str | None
    overrides: tuple[str, ...]
    max_samples: int | None
    device: str
    out: Path
    overwrite: bool
    by: str = field(default="colour")


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_SHARED):
        command = option(command)
    return command


@click.group("visualize")
def command() -> None:
    """Look at what a checkpoint does: PNG sheets, and one page that works without a network.

    Pictures are of image files or folders (--image), a published set (--benchmark), or shards (--data).
    """


@command.command("attention")
@shared_options
@click.option("--caption", "captions", multiple=True, help="Shown with every image; repeatable. Default: its own.")
@click.option("--samples", type=click.IntRange(1, 200), default=6, show_default=True, help="Images to show.")
def attention(captions: tuple[str, ...], samples: int, **given: Any) -> None:
    """Cross-attention: where captions look in images, and which words the images look at, from 0 to 1.

    Means over heads. A caption's own are those in a text file beside the image (x.txt for x.jpg, one a line).

    \b
    cosmos-fast visualize attention --checkpoint runs/demo/cosmos --data data/demo/heldout --out attention
    cosmos-fast visualize attention --checkpoint cosmos.pt --image dog.jpg --caption "a dog" --caption "grass" --out dog
    """
    from cosmos_fast.evaluate.pictures import attention as pictures

    shared = Shared(**given)
    model, source, made = opened(shared)
    numbers = source.choose(samples)
    sheets = with_bar("images", len(numbers), partial(pictures.attention_sheets, model, source, numbers, captions))
    reading = (
        "Cross-attention, mean over heads. A caption's map over the patches of the image is scaled from its lowest "
        "value, 0, to its highest, 1; so are the shares of its words in what the image attends to. Start, end and "
        "padding take the rest."
    )
    save(shared, source, made, "attention", "Where attention goes", reading, sheets)


@command.command("retrieval")
@shared_options
@click.option("--text", "texts", multiple=True, help="Rank the images for this text; repeatable.")
@click.option("--query", "files", type=A_PATH, multiple=True, help="Rank captions (or images) for this image file.")
@click.option(
    "--samples", type=click.IntRange(1, 200), default=6, show_default=True, help="Of its own, if no query is given."
)
@click.option("--top", type=click.IntRange(1, 100), default=10, show_default=True, help="Answers to show.")
def retrieval(texts: tuple[str, ...], files: tuple[Path, ...], samples: int, top: int, **given: Any) -> None:
    """Ranked answers: images for a text; captions for an image, or images like it where there are no captions.

    Without a query, some of the gallery's own images and captions are asked for, with the right answers marked.

    \b
    cosmos-fast visualize retrieval --checkpoint cosmos.pt --image photos --text "a dog in the snow" --out dogs
    cosmos-fast visualize retrieval --checkpoint cosmos.pt --benchmark coco=/data/coco --samples 20 --out coco_ranked
    """
    from cosmos_fast.evaluate.pictures import retrieval as pictures

    shared = Shared(**given)
    model, source, made = opened(shared)
    queries = queries_of(source, texts, files, samples)
    needs_captions = any(query.image is not None for query in queries)
    encode = partial(pictures.encode_gallery, model, source, needs_captions)
    gallery = with_bar("images", len(source), lambda on_one: [encode(on_one)])[0]
    sheets = with_bar("queries", len(queries), partial(pictures.retrieval_sheets, model, gallery, queries, top))
    reading = (
        f"What ranks first among {len(source)} images and {sum(map(len, source.captions))} captions, by cosine. "
        "Right answers are marked where they are known; of equal scores, a rank counts the wrong ones first."
    )
    save(shared, source, made, "retrieval", "What ranks first", reading, sheets)


@command.command("segmentation")
@shared_options
@click.option("--class", "named", multiple=True, metavar="NAME[;NAME]", help="A class with its wordings; repeatable.")
@click.option("--classes", "file", type=A_PATH, help="File of classes or templates, as for `eval run`.")
@click.option(
    "--protocol",
    metavar="KEY=VALUE",
    multiple=True,
    help="csa=false, pamr_steps=10, ..., as for `eval run`; repeatable.",
)
@click.option("--by", type=click.Choice(["colour", "shape"]), default="colour", help="Classes of synthetic shards.")
@click.option("--samples", type=click.IntRange(1, 200), default=6, show_default=True, help="Images to show.")
def segmentation(
    named: tuple[str, ...], file: Path | None, protocol: tuple[str, ...], by: str, samples: int, **given: Any
) -> None:
    """The class of every pixel among any classes, by their names; beside the truth where the set has one.

    A first class called "background" is drawn grey.

    \b
    cosmos-fast visualize segmentation --checkpoint cosmos.pt --image dog.jpg --class dog --class "grass;lawn" --out dog
    cosmos-fast visualize segmentation --checkpoint cosmos.pt --benchmark voc21=/data/VOC2012 --out voc
    """
    from cosmos_fast.evaluate.pictures import segmentation as pictures
    from cosmos_fast.evaluate.pictures.choices import chosen_classes

    shared = Shared(**given, by=by)
    model, source, made = opened(shared)
    source, classes, settings = chosen_classes(source, named, file, protocol)
    numbers = source.choose(samples)
    make = partial(pictures.segmentation_sheets, model, source, numbers, classes, settings)
    sheets = with_bar("images", len(numbers), make)
    reading = (
        f"The nearest of {len(classes.classes)} classes for every pixel, found by their names alone, "
        f"{'with' if settings.csa else 'without'} correlative self-attention (CSA)."
    )
    save(shared, source, made, "segmentation", "Segmentation without a label seen", reading, sheets)


def opened(shared: Shared) -> tuple[CosmosModel, Source, list[tuple[str, str]]]:
    """The model, what is looked at, and the checkpoint's name and digest and the model in words, for the page.

    All that may be wrong with these, or with OUT, is said before any work.
    """
    from cosmos_fast.cli.eval_shown import pick_device, remote_settings
    from cosmos_fast.evaluate.pictures import sources
    from cosmos_fast.evaluate.pictures.album import check_folder
    from cosmos_fast.model.checkpoints import find_weights_file, load_checkpoint
    from cosmos_fast.utils.files import sha256_of
    from cosmos_fast.utils.ranks import place_of_environment

    if place_of_environment().world_size > 1:
        raise UserError("pictures are made by one process: start it without a launcher")
    check_folder(shared.out, shared.overwrite)
    storage = remote_settings(shared.overrides)
    device = pick_device(shared.device)
    if sum(map(bool, (shared.images, shared.benchmark, shared.data))) != 1:
        raise UserError("give one of --image, --benchmark NAME=PATH, --data SHARDS: what to make pictures of")
    if shared.benchmark:
        source = sources.of_set(shared.benchmark, shared.max_samples)
    elif shared.data:
        source = sources.of_shards(shared.data, shared.max_samples, storage, shared.by)
    else:
        source = sources.of_files(shared.images, shared.max_samples)
    # Found once: a run that goes on has another newest checkpoint later.
    file = find_weights_file(shared.checkpoint, shared.weights)  # type: ignore[arg-type]
    model = load_checkpoint(file, weights=shared.weights)  # type: ignore[arg-type]
    vision = model.config.vision
    made = [
        ("checkpoint", f"{file.name}, {shared.weights}, sha256 {sha256_of(file)}"),
        ("model", f"{vision.image_size} px, patches of {vision.patch_size} px, {model.config.embed_dim} features"),
    ]
    return model.to(device), source, made


def queries_of(source: Source, texts: Sequence[str], files: Sequence[Path], samples: int) -> list[Query]:
    """Those given, else some of the source's own: captions, then images. UserError: none of either."""
    from cosmos_fast.evaluate.pictures.retrieval import Query
    from cosmos_fast.evaluate.pictures.sources import PictureFiles

    given = PictureFiles(files)
    queries = [Query(text) for text in texts]
    queries += [Query(given.key(number), given.image(number)) for number in range(len(files))]
    if queries:
        return queries
    chosen = source.choose(samples, captioned=True)
    if not chosen:
        raise UserError(f"{source.name} has no captions: say what to look for with --text or --query")
    queries = [Query(source.captions[number][0], owner=number) for number in chosen]
    return queries + [Query(source.images.key(n), source.images.image(n), n) for n in chosen]


def with_bar(unit: str, total: int, make: Callable[[Callable[[], None]], Iterable[Any]]) -> list[Any]:
    """All that `make` gives, under a progress bar that its argument moves on."""
    from cosmos_fast.cli.eval_shown import progress_bar

    with progress_bar(unit="") as bar:
        handle = bar.add_task(unit, total=total)
        return list(make(lambda: bar.advance(handle)))


def save(
    shared: Shared,
    source: Source,
    made: list[tuple[str, str]],
    kind: str,
    title: str,
    reading: str,
    sheets: list[Sheet],
) -> None:
    """Write the folder aside and let it appear. made: what opened() says of the model."""
    from cosmos_fast.evaluate.pictures.album import PAGE, Album, check_folder
    from cosmos_fast.evaluate.pictures.drawing import undrawn
    from cosmos_fast.exchange.export import appearing

    images = f"{len(sheets)} sheets of {source.name}" if kind == "retrieval" else source.name
    files = Album(kind, title, reading, sheets, [("images", images), *made]).files()
    with appearing(shared.out.resolve(), folder=True) as aside:
        for name, content in files.items():
            (aside / name).write_bytes(content)
        check_folder(shared.out, shared.overwrite)
    click.echo(f"wrote {len(sheets)} pictures and {shared.out / PAGE}")
    boxes = undrawn(json.dumps([[sheet.key, sheet.numbers] for sheet in sheets], ensure_ascii=False))
    if boxes:
        click.echo(
            f"the font of the PNG sheets lacks {len(boxes)} characters ({boxes[:10]}); {PAGE} shows them", err=True
        )

"""Write synthetic scenes as webdataset shards, several processes at once; resumable and byte-identical for a seed.

A shard appears under its name only when it is complete and on disk (write aside, fsync, rename), so what a killed run
left behind is either complete or carries the suffix .tmp.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cosmos_fast.data.synthetic import vocabulary
from cosmos_fast.data.synthetic.scene import SPLITS, Scene, SceneSettings, scenes
from cosmos_fast.utils.errors import UserError

FORMAT = "cosmos-fast-synthetic/1"
_TICK = 20  # scenes between two reports of progress


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """All that decides the bytes of a data set."""

    train: int
    heldout: int
    shard_size: int = 500
    scene: SceneSettings = field(default_factory=SceneSettings)

    def __post_init__(self) -> None:
        if self.train < 0 or self.heldout < 0 or self.train + self.heldout == 0:
            raise UserError(f"{self.train} train and {self.heldout} held-out scenes: give at least one scene")
        if max(self.train, self.heldout) >= 10**7:
            raise UserError("more than 9,999,999 scenes in a split: keys have seven digits")
        if self.shard_size < 1:
            raise UserError(f"shard size is {self.shard_size}: give at least 1 sample a shard")

    def count(self, split: str) -> int:
        return self.train if split == "train" else self.heldout

    def parameters(self) -> dict[str, int]:
        """As they stand in meta.json."""
        own = {"train": self.train, "heldout": self.heldout, "shard_size": self.shard_size}
        return own | asdict(self.scene)


@dataclass(frozen=True)
class Shard:
    """Scenes start..stop-1 of a split, and the file they go to."""

    path: Path
    split: str
    start: int
    stop: int


def plan_shards(out: Path, settings: DatasetSettings) -> list[Shard]:
    """All shards of the data set."""
    size = settings.shard_size
    return [
        Shard(out / split / f"{number:05d}.tar", split, start, min(start + size, settings.count(split)))
        for split in SPLITS
        for number, start in enumerate(range(0, settings.count(split), size))
    ]


def missing_shards(out: Path, settings: DatasetSettings) -> list[Shard]:
    """Shards that are not there, or are no complete tar files."""
    return [shard for shard in plan_shards(out, settings) if not _is_complete_tar(shard.path)]


def write_dataset(
    out: Path, settings: DatasetSettings, workers: int, progress: Callable[[int], None] = lambda scenes: None
) -> int:
    """Write what is missing; calls `progress` with numbers of scenes done. Returns the number of shards written.

    Raises UserError if `out` holds a data set with other parameters, another process writes there, or the disk is full.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            _check_parameters(out, settings)
            for split in SPLITS:
                (out / split).mkdir(exist_ok=True)
                for leftover in (out / split).glob("*.tar.tmp"):
                    leftover.unlink()
            _write_file(out / "meta.json", _meta(settings))
            shards = missing_shards(out, settings)
            if workers == 1 or len(shards) == 1:
                for shard in shards:
                    write_shard(shard, settings.scene, progress)
            elif shards:
                _write_in_pool(shards, settings.scene, min(workers, len(shards)), progress)
    except OSError as error:
        raise _write_error(error.filename or out, error) from error
    return len(shards)


def write_shard(shard: Shard, settings: SceneSettings, progress: Callable[[int], None]) -> None:
    """Write one shard aside, then rename it. Raises UserError if the file system refuses."""
    from webdataset import TarWriter  # imports torch: 2 s that a finished data set need not wait for

    aside = shard.path.with_suffix(".tar.tmp")
    try:
        with aside.open("wb") as file:
            with TarWriter(file, encoder=False, mtime=0, user="cosmos", group="cosmos") as tar:
                for done, scene in enumerate(scenes(settings, shard.split, shard.start, shard.stop), 1):
                    tar.write(make_sample(scene, settings))
                    if done % _TICK == 0:
                        progress(_TICK)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(shard.path)
        _sync_directory(shard.path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise _write_error(shard.path, error) from error
    progress((shard.stop - shard.start) % _TICK)


def make_sample(scene: Scene, settings: SceneSettings) -> dict[str, Any]:
    """A webdataset sample: members jpg, json and mask.png as bytes."""
    from cosmos_fast.data.synthetic.captions import write_captions
    from cosmos_fast.data.synthetic.render import draw_scene, encode_jpeg, encode_mask

    drawing = draw_scene(scene, settings)
    objects = [
        {
            "shape": item.shape,
            "colour": item.colour,
            "size": item.size,
            "texture": item.texture,
            "place": item.place,
            "box": list(box),
            "instance": item.instance,
        }
        for item, box in zip(scene.objects, drawing.boxes, strict=True)
    ]
    record = {**write_captions(scene, settings), "scene": {"background": scene.background, "objects": objects}}
    return {
        "__key__": scene.key,
        "jpg": encode_jpeg(drawing, scene.quality),
        "json": json.dumps(record).encode(),
        "mask.png": encode_mask(drawing),
    }


def _meta(settings: DatasetSettings) -> bytes:
    """meta.json: parameters, counts, and the vocabulary with synonyms and prompt templates."""
    counts = {split: settings.count(split) for split in SPLITS}
    meta = {
        "format": FORMAT,
        "seed": settings.scene.seed,
        "parameters": settings.parameters(),
        "counts": counts,
        "shards": {split: -(-count // settings.shard_size) for split, count in counts.items()},
        "shapes": list(vocabulary.SHAPES),
        "colours": list(vocabulary.COLOURS),
        "sizes": list(vocabulary.SIZES),
        "textures": list(vocabulary.TEXTURES),
        "places": list(vocabulary.PLACES),
        "backgrounds": list(vocabulary.BACKGROUNDS),
        "synonyms": {
            "shapes": vocabulary.SHAPE_SYNONYMS,
            "colours": vocabulary.COLOUR_SYNONYMS,
            "sizes": vocabulary.SIZE_SYNONYMS,
            "textures": vocabulary.TEXTURE_SYNONYMS,
            "places": vocabulary.PLACE_PHRASES,
            "backgrounds": vocabulary.BACKGROUND_PHRASES,
        },
        "templates": list(vocabulary.TEMPLATES),
        "colour_templates": list(vocabulary.COLOUR_TEMPLATES),
        "background_templates": list(vocabulary.BACKGROUND_TEMPLATES),
    }
    return (json.dumps(meta, indent=1) + "\n").encode()


def _check_parameters(out: Path, settings: DatasetSettings) -> None:
    """Refuse to mix two data sets in one directory."""
    path = out / "meta.json"
    if not path.exists():
        if any(out.glob("*/*.tar")):
            raise UserError(f"{out} holds shards but no meta.json: choose another --out, or delete that directory")
        return
    try:
        meta = json.loads(path.read_bytes())
        there = {"format": meta["format"], **meta["parameters"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: delete {out} and run again") from None
    asked = {"format": FORMAT, **settings.parameters()}
    differing = [
        f"{name} {there.get(name)} there, {asked[name]} asked" for name in asked if there.get(name) != asked[name]
    ]
    if differing:
        raise UserError(
            f"{out} holds a data set with other parameters ({'; '.join(differing)}): "
            "choose another --out, or delete that directory"
        )


def _is_complete_tar(path: Path) -> bool:
    """Whether the file is whole records of 10240 bytes and ends with the two empty blocks that close a tar."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0 or size % 10240:
                return False
            file.seek(-1024, os.SEEK_END)
            return not any(file.read())
    except OSError:
        return False


def _write_file(path: Path, content: bytes) -> None:
    """Write aside, fsync, rename; nothing if the content is there already."""
    if path.exists() and path.read_bytes() == content:
        return
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the directory for this process; the lock ends with the process, however it ends."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing to {out}: wait for it, or choose another --out") from None
        yield
    finally:
        os.close(descriptor)


def _write_error(path: Path | str, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(
        f"cannot write {path}: {reason}; mend that and run the same command again, finished shards are kept"
    )


# -- worker processes --------------------------------------------------------------------------------------------------

_scenes_done: Any = None  # a shared counter, set in worker processes


def _start_worker(counter: Any) -> None:
    global _scenes_done
    _scenes_done = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent must not leave workers that go on writing beside the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _count_scenes(scenes: int) -> None:
    with _scenes_done.get_lock():
        _scenes_done.value += scenes


def _write_shard_in_worker(shard: Shard, settings: SceneSettings) -> None:
    write_shard(shard, settings, _count_scenes)


def _write_in_pool(shards: list[Shard], settings: SceneSettings, workers: int, progress: Callable[[int], None]) -> None:
    context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks of the progress bar
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counter,))
    seen = 0
    try:
        pending: set[Future[None]] = {pool.submit(_write_shard_in_worker, shard, settings) for shard in shards}
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            done = counter.value
            progress(done - seen)
            seen = done
            for future in finished:
                future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?): run the same command again with fewer --workers"
        ) from None
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)

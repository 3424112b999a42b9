"""`data verify`: what it finds and writes, how it goes on after a stop, and that a killed worker costs nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosmos_fast.cli.main import command, run
from cosmos_fast.config import SourceConfig
from cosmos_fast.data import faults, quarantine, verify_pool
from cosmos_fast.data import verify as verification
from cosmos_fast.data.index import Index, open_source
from cosmos_fast.data.quarantine import BadSample, Rules
from cosmos_fast.data.verify import Verdict, verify
from cosmos_fast.data.verify_part import Task
from cosmos_fast.utils.errors import UserError
from tests.held import kill_where_held
from tests.shards import record, sample, write_shards, write_tar

RULES = Rules("auto", 50_000_000, 1 << 20)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "PART_SAMPLES", 3)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards of 8, 1 and 6 samples; 000002, 000007, 000008 and 000014 are bad."""
    folder = write_shards(tmp_path / "shards", (8, 1, 6))
    for shard, (first, count, bad) in enumerate([(0, 8, (2, 7)), (8, 1, (8,)), (9, 6, (14,))]):
        members: dict[str, bytes] = {}
        for number in range(first, first + count):
            members.update(sample(number))
            if number in bad:
                members[f"{number:06d}.jpg"] = b"no image"
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


BAD = ["000002", "000007", "000008", "000014"]


def whole(folder: Path) -> Index:
    return open_source(SourceConfig(path=str(folder)), whole=True)


def verified(folder: Path, workers: int = 1, **options: object) -> Verdict:
    return verify(whole(folder), RULES, workers, **options)  # type: ignore[arg-type]


def keys(verdict: Verdict) -> list[str]:
    return [bad.key for _, bad in verdict.bad]


@pytest.mark.usefixtures("small_parts")
def test_bad_samples_are_found_and_written_with_their_causes(shards: Path) -> None:
    before = {path: path.read_bytes() for path in shards.glob("*.tar")}
    done: list[int] = []
    verdict = verified(shards, progress=done.append)
    assert keys(verdict) == BAD
    assert verdict.causes == {faults.NOT_AN_IMAGE: 4}
    assert [shard for shard, _ in verdict.bad] == ["00000.tar"] * 2 + ["00001.tar", "00002.tar"]
    assert (verdict.samples, verdict.read, sum(done)) == (15, 15, 15)
    assert verdict.quarantine.parent == whole(shards).cache.parent  # type: ignore[union-attr]
    lines = [json.loads(line) for line in verdict.quarantine.read_text().splitlines()]
    assert [(line["shard"], line["start"], line["stop"]) for line in lines[1:]] == [(0, 0, 8), (1, 0, 1), (2, 0, 6)]
    assert [bad[1] for line in lines[1:] for bad in line["bad"]] == BAD
    assert {path: path.read_bytes() for path in shards.glob("*.tar")} == before
    assert not list(verdict.quarantine.parent.glob("*.verify")), "the journal is left"


def test_what_is_verified_is_not_read_again(shards: Path) -> None:
    verified(shards)
    second = verified(shards)
    assert (second.read, keys(second)) == (0, BAD)
    again = verified(shards, again=True)
    assert (again.read, keys(again)) == (15, BAD)
    other = verify(whole(shards), Rules("auto", 100, 1 << 20), 1)  # other limits
    assert (other.read, len(other.bad)) == (15, 15)


def test_only_changed_shards_are_read_again(shards: Path) -> None:
    verified(shards)
    write_tar(shards / "00001.tar", {**sample(8), **sample(20)})
    verdict = verified(shards)
    assert verdict.read == 2
    assert keys(verdict) == ["000002", "000007", "000014"]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("torn", [b"", b'{"shard": 2, "sta', b"\n"])
def test_a_stopped_verification_goes_on_where_it_was(shards: Path, torn: bytes) -> None:
    expected = verified(shards)
    whole_file = expected.quarantine.read_bytes()
    expected.quarantine.unlink()

    class StopError(Exception):
        pass

    done: list[int] = []

    def stop(samples: int) -> None:
        done.append(samples)
        if len(done) >= 3:
            raise StopError

    with pytest.raises(StopError):
        verified(shards, progress=stop)
    assert not expected.quarantine.exists()
    assert len(open_source(SourceConfig(path=str(shards)))) == 15, "half a verification is none"
    journal = expected.quarantine.with_suffix(".verify")
    if torn == b"\n":
        journal.write_bytes(journal.read_bytes()[:-1])  # its last line is not whole
    else:
        with journal.open("ab") as file:
            file.write(torn)
    if torn == b"\n":
        done.pop()
    with pytest.raises(StopError):  # and once more
        verified(shards, progress=stop)
    rest = verified(shards)
    assert rest.read == 15 - sum(done)
    assert rest.quarantine.read_bytes() == whole_file
    assert keys(rest) == BAD


def test_one_killed_before_its_first_line_is_none(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = quarantine.place(whole(shards).shards).with_suffix(".verify")
    journal.write_bytes(b"")
    assert verified(shards).read == 15
    assert not caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_workers_find_what_one_process_finds(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = verified(shards).quarantine.read_bytes()
    shared = []

    def in_pool(index: Index, rules: Rules, workers: int, tasks: list[Task]) -> Iterator[tuple[Task, list[BadSample]]]:
        shared.append((workers, len(tasks) > 2))
        return verify_pool.verify_in_pool(index, rules, workers, tasks)

    monkeypatch.setattr(verification, "verify_in_pool", in_pool)
    many = verified(shards, workers=2, again=True)
    assert shared == [(2, True)]
    assert many.read == 15
    assert many.quarantine.read_bytes() == one


def read_or_die(index: Index, rules: Rules, task: Task) -> list[BadSample]:
    """In worker processes: sample 000011 crashes its reader."""
    if any(index.key(task.first + number) == "000011" for number in range(task.start, task.stop)):
        os.kill(os.getpid(), signal.SIGKILL)
    return verify_pool.find_bad(index, rules, task)


@pytest.mark.long
def test_a_sample_that_kills_its_reader_is_found_out(shards: Path) -> None:
    tasks = [Task(0, 0, 0, 8), Task(1, 8, 0, 1), Task(2, 9, 2, 4), Task(2, 9, 4, 6)]
    found = dict(verify_pool.verify_in_pool(whole(shards), RULES, 2, tasks, read_or_die))
    assert set(found) == set(tasks)
    assert [(bad.key, bad.cause) for task in tasks for bad in found[task]] == [
        ("000002", faults.NOT_AN_IMAGE),
        ("000007", faults.NOT_AN_IMAGE),
        ("000008", faults.NOT_AN_IMAGE),
        ("000011", faults.KILLS_READER),
        ("000014", faults.NOT_AN_IMAGE),
    ]


@pytest.mark.long
def test_kill_again_and_again_and_run_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real command, killed with -9 in the middle of parts: in the end the file of an undisturbed run."""
    members: dict[str, bytes] = {}
    for number in range(3000):
        members[f"{number:06d}.jpg"] = sample(number % 7)[f"{number % 7:06d}.jpg"] if number % 100 else b"broken"
        members[f"{number:06d}.json"] = record(number)
    folder = tmp_path / "shards"
    write_tar(folder / "00000.tar", members)
    line = ["data", "verify", str(folder), "--workers", "1"]
    index = whole(folder)
    journal = quarantine.place(index.shards).with_suffix(".verify")
    for parts in (1, 5):
        place = f"arguments[1] == {parts} * 256 + 100"
        kill_where_held(tmp_path / f"held_{parts}", line, "cosmos_fast.data.verify_part", "check_sample", place)
        assert journal.read_bytes().count(b"\n") == 1 + parts  # the rules, and a line a part
    assert run(command, line) == 0
    out = capsys.readouterr().out
    assert "3,000 samples, 30 bad (1 %); " in out
    assert "1,280 were verified before" in out
    file = quarantine.place(index.shards)
    resumed = file.read_bytes()
    verified(folder, again=True)
    assert resumed.split(b"\n", 1)[1] == file.read_bytes().split(b"\n", 1)[1]


def test_a_shard_that_cannot_be_read_is_no_fault_of_its_samples(shards: Path) -> None:
    index = whole(shards)
    os.truncate(shards / "00002.tar", 600)
    with pytest.raises(UserError, match=r"00002\.tar.*shard changed or unreadable"):
        verify(index, RULES, 1)
    assert not quarantine.place(index.shards).exists()


def test_two_at_once_are_refused(shards: Path) -> None:
    def second(_: int) -> None:
        with pytest.raises(UserError, match="another process verifies these shards"):
            verified(shards)

    assert keys(verified(shards, progress=second)) == BAD


def test_a_full_disk_leaves_the_old_quarantine(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = verified(shards).quarantine
    before = file.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(UserError, match=r"cannot write .* No space left on device"):
            verified(shards, again=True)
    assert file.read_bytes() == before
    assert verified(shards, again=True).read == 0, "what was read before the disk was full is kept"


def test_command(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["data", "verify", str(shards), "--workers", "1"]
    assert run(command, line) == 2
    out, error = capsys.readouterr()
    assert "15 samples, 4 bad (26.7 %)" in out
    assert "  not an image: 4" in out
    assert "00000.tar:000007: not an image" in out
    assert "quarantine: " in out
    assert len(error.strip().splitlines()) == 1
    assert "4 of 15 samples" in error
    assert "data.max_bad_share=0.05" in error
    assert run(command, [*line, "--set", "data.max_bad_share=0.3"]) == 0
    assert "15 were verified before" in capsys.readouterr().out
    assert run(command, ["data", "index", str(shards)]) == 0
    assert "in quarantine, left out: 4" in capsys.readouterr().out


def test_command_reads_the_settings_of_a_run(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"data.train=[{{path: {shards}}}]", "data.max_pixels=1000", "data.max_bad_share=1.0"]
    options = [word for setting in settings for word in ("--set", setting)]
    assert run(command, ["data", "verify", "--workers", "1", *options]) == 0
    out = capsys.readouterr().out
    assert "15 bad" in out
    assert "image over the pixel cap: 11" in out


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", {**sample(0), "\x1b[31mx.jpg": b"", "\x1b[31mx.json": record(0)})
    assert run(command, ["data", "verify", str(tmp_path), "--workers", "1"]) == 2
    out = capsys.readouterr().out
    assert "[31mx: empty member" in out
    assert "\x1b[31mx" not in out


@pytest.mark.parametrize("wrong", [[], ["/nowhere/at/all"], [".", "--workers", "0"]])
def test_mistakes_exit_with_2_and_one_line(
    wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(command, ["data", "verify", *wrong]) == 2
    error = capsys.readouterr().err
    assert "error" in error.lower()
    assert "Traceback" not in error

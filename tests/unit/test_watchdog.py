"""When the watchdog ends a process, and what it leaves behind; time passes when the test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cosmos_fast.utils import watchdog
from cosmos_fast.utils.ranks import Ranks
from cosmos_fast.utils.watchdog import EXIT_HANGS, SLOW, TICK_S, Watchdog, stacks_of_threads
from tests.hand_clock import HandClock

LIMIT_S = 100.0


class Played(Watchdog):
    """Watches over the events of a test, in the test's own thread. Of each: so many seconds later, this happens."""

    def play(self, *events: tuple[float, Callable[[], object]]) -> float:
        """The seconds after which it ended the process, or all."""
        self.passed_s, self._events, self.statuses = 0.0, list(events), []
        self._end = self.statuses.append
        self._watch()
        return self.passed_s

    def _tick(self) -> float:
        if not self._events:
            self._is_over.set()
            return 0.0
        seconds, happens = self._events.pop(0)
        happens()
        self.passed_s += seconds
        return seconds


@pytest.fixture
def dog(tmp_path: Path) -> Played:
    return Played(LIMIT_S, tmp_path, Ranks())


def nothing() -> None:
    pass


QUIET: Sequence[tuple[float, Callable[[], object]]] = [(10.0, nothing)] * 100


def test_a_step_that_ends_in_time_is_a_sign_of_life(dog: Played) -> None:
    events = [(0.9 * LIMIT_S, lambda step=step: dog.step_done(step)) for step in range(50)]
    dog.play(*events)
    assert dog.statuses == []


def test_every_phase_is_a_sign_of_life(dog: Played) -> None:
    def in_two_phases() -> None:
        with dog("student"), dog("communication"):
            pass

    dog.step_done(1)
    dog.play(*[(0.9 * LIMIT_S, in_two_phases)] * 50)
    assert dog.statuses == []


def test_it_ends_the_process_when_nothing_moves(dog: Played, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    dog.step_done(16)
    with dog("backward"):
        assert dog.play(*QUIET) == LIMIT_S
    assert dog.statuses == [EXIT_HANGS]
    said, written = capfd.readouterr().err, (tmp_path / "stacks_rank_0.txt").read_text()
    for text in (said, written):
        assert "rank 0: nothing has moved for 100 s: backward, 16 steps done" in text
        assert "in test_it_ends_the_process_when_nothing_moves" in text


@pytest.mark.parametrize("steps_done", [None, 3])
def test_the_first_step_and_what_is_slow_by_nature_have_more_time(dog: Played, steps_done: int | None) -> None:
    if steps_done is None:
        with dog("data"):
            assert dog.play(*QUIET) == SLOW * LIMIT_S
        return
    dog.step_done(steps_done)
    with dog.slow("saving"), dog("communication"):
        assert dog.play(*QUIET) == SLOW * LIMIT_S
    assert dog.statuses == [EXIT_HANGS]
    assert dog.play(*QUIET) == SLOW * LIMIT_S  # in no phase: at the end of a run


def test_time_in_which_the_process_was_stopped_does_not_count(dog: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HandClock(monkeypatch, watchdog)
    monkeypatch.setattr(dog._wake, "wait", clock.pass_s)
    assert Watchdog._tick(dog) == TICK_S
    monkeypatch.setattr(dog._wake, "wait", lambda seconds: clock.pass_s(86400.0))
    assert Watchdog._tick(dog) == 2 * TICK_S


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_it_ends_the_process_although_its_words_hang_too(dog: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    for_ever = threading.Event()

    def hang() -> str:
        for_ever.wait()
        raise SystemExit  # of its thread

    monkeypatch.setattr(watchdog, "GRACE_S", 0.01)
    monkeypatch.setattr(watchdog, "stacks_of_threads", hang)
    dog.play(*QUIET)
    assert dog.statuses == [EXIT_HANGS]
    for_ever.set()
    for thread in dog._threads:
        thread.join()


def test_a_folder_that_is_gone_does_not_keep_it(tmp_path: Path) -> None:
    dog = Played(LIMIT_S, tmp_path / "gone", Ranks())
    dog.play(*QUIET)
    assert dog.statuses == [EXIT_HANGS]


def test_the_stacks_are_those_of_all_threads() -> None:
    ready, done = threading.Event(), threading.Event()

    def wait_in_a_thread() -> None:
        ready.set()
        done.wait()

    thread = threading.Thread(target=wait_in_a_thread, name="loader of images")
    thread.start()
    ready.wait()
    found = stacks_of_threads()
    done.set()
    thread.join()
    main, _, others = found.partition("thread loader of images:")
    assert main.startswith("\nthread MainThread:")
    assert "in test_the_stacks_are_those_of_all_threads" in main
    assert "in wait_in_a_thread" in others


def test_nothing_runs_where_the_limit_is_0_and_all_ends_with_the_block(tmp_path: Path) -> None:
    before = threading.active_count()
    with Watchdog(0.0, tmp_path, Ranks()) as dog, dog("data"):
        assert threading.active_count() == before
    with Watchdog(LIMIT_S, tmp_path, Ranks()):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before

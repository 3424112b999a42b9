"""Ranks that meet at a store in which former tries have left their things."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.rendezvous import agree_on_name, keeps_store

WORLD = 4


@pytest.fixture
def store() -> dist.Store:
    made = dist.HashStore()
    made.set_timeout(timedelta(seconds=300))
    return made


def meet(store: dist.Store, *ranks: int) -> list[str]:
    """The name that each of these has got; they come in this order, or at once."""
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(lambda rank: agree_on_name(store, rank, WORLD, 300.0), ranks))


def test_every_try_has_a_name_of_its_own(store: dist.Store) -> None:
    names = [meet(store, *order) for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2])]
    assert all(len(set(of_a_try)) == 1 for of_a_try in names)
    assert len({of_a_try[0] for of_a_try in names}) == 3


def test_the_words_of_ranks_that_died_waiting_are_no_ranks(store: dist.Store) -> None:
    for rank in range(1, WORLD):
        store.set(f"hello/{rank}", f"word of a dead rank {rank}")
    with pytest.raises(UserError, match=r"rank 0 of 4 waits for ranks \[1, 2, 3\]"):
        agree_on_name(store, 0, WORLD, 0.0)
    assert len(set(meet(store, 0, 1, 2, 3))) == 1


def test_only_torchrun_keeps_a_store() -> None:
    assert keeps_store({"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert not keeps_store({"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert not keeps_store({})

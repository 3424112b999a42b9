"""The processes of a run: which one this is, how they find each other, and what they tell each other.

A launcher (`torchrun`, `deepspeed`) starts the same command once a GPU and says by environment variables who is who.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.group_end import group_ended
from cosmos_fast.utils.network import INTERFACE, LostRanks, choose_interface, lost_ranks_explained
from cosmos_fast.utils.rendezvous import keeps_store, store_of_this_try

TIMEOUT_S = 1800.0
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's and deepspeed's name
_MEND = "start the run with torchrun or deepspeed, or unset them all to train on one process"


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    rank, world_size: in the run. local_rank, local_world_size: on this host (0 where the launcher does not tell).
    group: what the collectives of training run in, None for a run of one process, which needs none; device: where their
    tensors lie. control: what the methods run in, by the host: on GPUs a group of its own, so that a step that asks for
    a signal does not wait for the GPU.

    All methods are collective: every rank calls them in the same order, or the others wait until the timeout.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes and reports."""
        return self.rank == 0

    def mean(self, values: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
        """The mean over ranks of each number; the same names in the same order everywhere. One collective, in fp64."""
        packed = _packed(values)
        if self.control is not None:
            dist.all_reduce(packed, group=self.control)
        return dict(zip(values, (packed / self.world_size).tolist(), strict=True))

    def spread(self, values: Mapping[str, float | torch.Tensor]) -> dict[str, tuple[float, float]]:
        """The least and the greatest of each number over ranks. One collective."""
        packed = _packed(values)
        both = torch.stack([-packed, packed])
        if self.control is not None:
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.control)
        least, greatest = both.tolist()
        return {name: (-low, high) for name, low, high in zip(values, least, greatest, strict=True)}

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, on all, by rank. Two collectives.

        Args:
            value: what JSON can hold; NaN and Inf come through.
        """
        if self.control is None:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([len(own)]), group=self.control)
        sent = torch.zeros(max(int(length) for length in lengths), dtype=torch.uint8)  # one size for all
        sent[: len(own)] = own
        found = [torch.empty_like(sent) for _ in lengths]
        dist.all_gather(found, sent, group=self.control)
        return [json.loads(text[: int(length)].numpy().tobytes()) for text, length in zip(found, lengths, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank: a signal that one of them has got, a step that one cannot take."""
        return bool(self.spread({"flag": float(flag)})["flag"][1])

    def all_equal(self, text: str) -> bool:
        """Whether every rank holds the same text (48 bits of its hash are compared)."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")  # exact in fp64
        least, greatest = self.spread({"text": float(number)})["text"]
        return least == greatest

    def on_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, on every rank; the others do not call it.

        Args:
            make: returns what JSON can hold.

        Raises:
            UserError: rank 0's, on every rank, so that nobody waits for a rank that gave up.
        """
        if self.control is None:
            return make()
        answer: dict[str, Any] = {}
        failure: Exception | None = None
        if self.first:
            try:
                answer = {"value": make()}
            except Exception as error:
                failure = error
                answer = {"error": _one_line(error)}
        answer = json.loads(self._share(json.dumps(answer)))
        if failure is not None:
            raise failure
        if "error" in answer:
            raise UserError(f"rank 0: {answer['error']}")
        return answer["value"]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that every rank gets through, or none: where one raises, all do.

        Raises:
            UserError: on the ranks that were fine themselves; the others raise what went wrong.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = 0.0 if failure is None else float(self.world_size - self.rank)  # the largest: the lowest rank's
        worst = int(self.spread({"failed": failed})["failed"][1])
        if worst == 0:
            return
        culprit = self.world_size - worst
        told = self._share("" if failure is None else _one_line(failure), culprit)
        raise failure if failure is not None else UserError(f"rank {culprit}: {told}")

    def barrier(self) -> None:
        """Wait for all."""
        if self.control is not None:
            dist.all_reduce(torch.zeros(1), group=self.control)

    def _share(self, text: str, source: int = 0) -> str:
        """The text of one rank, on all: its length, then its bytes."""
        if self.control is None:
            return text
        own = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = torch.tensor(len(own))
        dist.broadcast(length, source, group=self.control)
        if self.rank != source:
            own = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(own, source, group=self.control)
        return bytes(own.tolist()).decode()


ONE = Ranks()
"""A run of this process alone."""


def place_of_environment(environ: Mapping[str, str] | None = None) -> Ranks:
    """Where the launcher has put this process; nothing is started. Without a launcher: a run of one process.

    Raises:
        UserError: variables that are missing, no numbers, or contradict each other.
    """
    environ = os.environ if environ is None else environ
    there = {name: environ[name] for name in _NAMES if environ.get(name)}
    if (there.get("WORLD_SIZE"), there.get("RANK")) in ((None, None), ("1", None), ("1", "0")):
        return Ranks()
    if missing := [name for name in _NAMES if name not in there]:
        given = ", ".join(f"{name}={value}" for name, value in there.items())
        raise UserError(f"the environment has {given} but not {', '.join(missing)}: {_MEND}")
    rank, world_size, local_rank = (_number(name, there[name]) for name in _NAMES[:3])
    local_size = next((environ[name] for name in _LOCAL_SIZES if environ.get(name)), "0")
    local_world_size = _number("LOCAL_WORLD_SIZE", local_size)
    if not 0 <= rank < world_size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world_size}: ranks go from 0 to WORLD_SIZE - 1; {_MEND}")
    if not 1 <= _number("MASTER_PORT", there["MASTER_PORT"]) <= 65535:
        raise UserError(f"MASTER_PORT is {there['MASTER_PORT']}: a port is a number from 1 to 65535")
    if local_rank > rank or 0 < local_world_size <= local_rank:
        raise UserError(
            f"LOCAL_RANK is {local_rank}, which cannot be on a host of {local_world_size or rank + 1} ranks"
        )
    return Ranks(rank, world_size, local_rank, local_world_size)


def device_of_rank(request: str, place: Ranks) -> str:
    """The device to ask for on this rank: a GPU of its own where "auto" or "cuda" may use GPUs, else the request.

    Raises:
        UserError: several ranks on one GPU.
    """
    if place.world_size == 1:
        return request
    if request.startswith("cuda:"):
        raise UserError(f"run.device is {request!r}, one GPU for {place.world_size} ranks: use cuda or auto")
    if request not in ("auto", "cuda") or not torch.cuda.is_available():
        return request
    count = torch.cuda.device_count()
    if count == 1:  # a scheduler may show each process its own GPU only; NCCL refuses a GPU that two ranks share
        return "cuda:0"
    if place.local_rank >= count:
        raise UserError(f"LOCAL_RANK is {place.local_rank}, but torch sees {count} GPUs: start {count} ranks a host")
    return f"cuda:{place.local_rank}"


@contextmanager
def joined_ranks(
    device_request: str = "auto", *, timeout_s: float = TIMEOUT_S, always: bool = False, meeting: str = ""
) -> Iterator[Ranks]:
    """The ranks of this run with their process group, which ends with the block (NCCL's, where the block raises, with
    the process): gloo on CPUs, NCCL on GPUs.

    Args:
        device_request: as in run.device.
        timeout_s: how long a collective, or the start, waits for the slowest rank before it fails.
        always: initialise torch.distributed for a run of one process too, for libraries that insist on it; the group
            of its Ranks is None all the same.
        meeting: a name for one of several groups, which follow each other while other processes keep the store.

    Raises:
        UserError: an environment that says half of what is needed, ranks that cannot meet, or lose each other.
    """
    place = place_of_environment()
    if place.world_size == 1 and not always:
        yield place
        return
    request = device_of_rank(device_request, place)
    device = torch.device("cpu")
    if torch.cuda.is_available() and request.startswith(("auto", "cuda")):
        device = torch.device("cuda", int(request.partition(":")[2] or 0))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if place.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # needs no port
    else:
        _meet(place, backend, timeout_s, meeting)
    waits = backend == "nccl" and place.world_size > 1
    with group_ended(waits=waits), lost_ranks_explained(place.rank, place.world_size):
        yield _with_groups(place, device, timeout_s)


def _meet(place: Ranks, backend: str, timeout_s: float, meeting: str) -> None:
    """Start the process group."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    choose_interface(address, port, one_host=place.local_world_size == place.world_size)
    timeout = timedelta(seconds=timeout_s)
    try:
        if meeting:
            plain = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
            store: dist.Store = dist.PrefixStore(meeting, plain)
        elif keeps_store():
            store = store_of_this_try(place.rank, place.world_size, timeout_s)
        if meeting or keeps_store():
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        listening = os.environ.get(INTERFACE, "none that was chosen")
        raise LostRanks(
            f"rank {place.rank} of {place.world_size} cannot meet the others at {address}:{port} "
            f"({_one_line(error)}): check that all ranks run, that this address is reachable from every host, and that "
            f"the ranks reach each other (interface: {listening}; {INTERFACE} names another)"
        ) from None


def _with_groups(place: Ranks, device: torch.device, timeout_s: float) -> Ranks:
    """The place with the groups that its process group, which is there, serves with."""
    if place.world_size == 1:
        return replace(place, device=device)
    group = dist.group.WORLD
    control = group
    if device.type == "cuda":
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return replace(place, group=group, device=device, control=control)


def _packed(values: Mapping[str, float | torch.Tensor]) -> torch.Tensor:
    """The numbers as one fp64 tensor of the host."""
    return torch.tensor([float(value) for value in values.values()], dtype=torch.float64)


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}, not a number: {_MEND}") from None


def _one_line(error: BaseException) -> str:
    """The first line of its message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

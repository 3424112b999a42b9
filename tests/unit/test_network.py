"""What a rank says when it no longer reaches the others."""

from __future__ import annotations

import pytest

from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.network import lost_ranks_explained


@pytest.mark.parametrize(
    "said",
    [
        "[/src/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv operation to complete",
        "[/src/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:29500",
        "Application timeout caused pair closure",  # of a collective behind the one that timed out
        "Read timeout [10.0.0.2]:1234",
        "Pair is not connected (10.0.0.2)",
    ],
)
def test_what_gloo_says_becomes_one_line(said: str) -> None:
    line = r"^rank 1 of 4 on .* no longer reaches the others \("
    with pytest.raises(UserError, match=line) as caught, lost_ranks_explained(1, 4):
        raise RuntimeError(said)
    assert said.rpartition("] ")[2] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), lost_ranks_explained(1, 4):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

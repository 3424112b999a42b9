"""Settings every test shares."""

from __future__ import annotations

import os

import pytest
import torch

# Small tensors gain nothing from a second thread, and the suite runs one process a core.
torch.set_num_threads(1)

# Without a GPU, Triton's kernels are tested in its interpreter. Triton looks at this when it is imported, so it stands
# here, before any test module can bring Triton in. `auto` never chooses interpreted kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `long` are for CI; `make test` alone stays under ten minutes on two cores."""
    if os.environ.get("COSMOS_LONG_TESTS"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: runs in .ci/run, or with COSMOS_LONG_TESTS=1"))

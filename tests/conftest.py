"""Settings every test shares."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

from tests.interpreter import patch_once_a_launch

# Small tensors gain nothing from a second thread, and the suite runs one process a core.
torch.set_num_threads(1)

# Without a GPU, Triton's kernels are tested in its interpreter. Triton looks at this when it is imported, so it stands
# here, before any test module can bring Triton in. `auto` never chooses interpreted kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    patch_once_a_launch()


# Files that take longest, with the long tests, come first, so that at the end no process waits for one of them alone.
FIRST = (
    "test_compile_ahead.py",
    "test_golden_savings.py",
    "test_launchers.py",
    "test_deepspeed_four.py",
    "test_deepspeed.py",
    "test_bench_loader.py",
    "test_loader_memory.py",
    "test_position_window.py",
    "test_rehearsal.py",
    "test_bench_ranks.py",
    "test_position.py",
    "test_infonce_emulated.py",
    "test_faults_kill.py",
    "test_faults_hang.py",
    "test_train_launched.py",
    "test_verify.py",
    "test_infonce_triton.py",
    "test_export_graphs.py",
    "test_resume.py",
    "test_checkpoint_ranks.py",
    "test_distill_triton.py",
    "test_pool_triton.py",
    "test_harness.py",
    "test_gradients_ranks.py",
    "test_loss_ranks.py",
    "test_batch_size.py",
    "test_bench_step.py",
    "test_compiled_blocks.py",
    "test_infonce_compile.py",
    "test_batch_trial.py",
    "test_eval_cli.py",
    "test_loader.py",
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would put files of many tests first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `long` are for CI; `make test` alone stays under ten minutes on two cores."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))
    if os.environ.get("COSMOS_LONG_TESTS"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: runs in .ci/run, or with COSMOS_LONG_TESTS=1"))


@pytest.fixture(autouse=True)
def _logging_ends_with_its_test() -> Iterator[None]:
    """What a command sets up writes to the stderr of its test, which is closed when the next one comes."""
    logger = logging.getLogger("cosmos_fast")
    before = logger.level, logger.propagate, logger.handlers[:]
    yield
    level, logger.propagate, logger.handlers[:] = before
    logger.setLevel(level)  # which also forgets what loggers below it have found out

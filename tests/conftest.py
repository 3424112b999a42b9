"""Settings every test shares."""

from __future__ import annotations

import torch

# Small tensors gain nothing from a second thread, and the suite runs one process a core.
torch.set_num_threads(1)

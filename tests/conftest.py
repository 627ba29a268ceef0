"""Settings every test runs under."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)  # the same speed and the same summation order on every machine
settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("tests")

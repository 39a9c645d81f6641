"""One thread a test process: two run beside each other, and their results must not depend on the machine's cores."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch starts, and for the processes that tests start

import torch

torch.set_num_threads(1)

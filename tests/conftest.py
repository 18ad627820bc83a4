"""Every test runs on 2 threads, from the same seeds."""

import numpy as np
import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    np.random.seed(0)

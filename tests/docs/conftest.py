"""What runs the code of pages and tutorials."""

import signal

import pytest
import torch


@pytest.fixture
def one_thread():
    """Tutorials set their own seeds, and share a machine and, where they call commands, SIGINT with other tests."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)

"""What takes PyTorch Geometric is collected where that is: `make test-slow` runs it beside it."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("torch_geometric") else ["test_pyg.py"]

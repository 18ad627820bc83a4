"""Plain PyTorch: `reference`, the oracle, and `eager`, which runs everywhere."""

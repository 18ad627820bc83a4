"""Computes the running statistics of batch norms anew, for averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from .._check import require
from ._modules import in_mode


@torch.no_grad()
def update_bn(
    loader: Iterable[Any],
    model: torch.nn.Module,
    device: torch.device | str | None = None,
    forward: Callable[[torch.nn.Module, Any], Any] | None = None,
) -> None:
    """Set the running statistics of all batch norms in ``model`` to their averages over the batches of ``loader``:
    ``torch.optim.swa_utils.update_bn`` for this package's norms, in kernels and on features, for escnn's and torch's.

    torch's own function updates subclasses of its batch norms only, and so ignores the norms here. These are not
    subclasses, since they compute something else: ``SyncBatchNorm.convert_sync_batchnorm``, for example, would replace
    a subclass by torch's norm.

    Args:
        loader: batches.
        model: the network, such as ``torch.optim.swa_utils.AveragedModel``; called in training mode, without gradients.
            Afterwards every part is in its own mode again. A model without batch norms is left as it is.
        device: batches, or their tensors, are moved there first, by their method ``to``.
        forward: ``forward(model, batch)`` calls the network; None calls ``model(batch)``, or ``model(batch[0])`` for a
            tuple or list, as torch's function does.

    Raises:
        ValueError: ``loader`` has no batches. Then ``model`` is as it was.

    Example:
        >>> averaged = torch.optim.swa_utils.AveragedModel(conv)
        >>> clouds = [(x, graph, delta)]
        >>> update_bn(clouds, averaged, forward=lambda model, cloud: model(*cloud))
    """
    norms: list[Any] = [module for module in model.modules() if _is_batch_norm(module)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        with in_mode(model, True):
            for count, batch in enumerate(loader, 1):
                if count == 1:
                    for norm in norms:
                        _reset(norm)
                        norm.momentum = None  # the average over all batches
                batch = _moved(batch, device)
                if forward is not None:
                    forward(model, batch)
                else:
                    model(batch[0] if isinstance(batch, tuple | list) else batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    require(count > 0, "loader", "at least one batch", "none")


def _is_batch_norm(module: torch.nn.Module) -> bool:
    """Whether ``module`` is a batch norm: escnn's and this package's have a momentum and count batches, as torch's."""
    return isinstance(module, _BatchNorm) or (
        hasattr(module, "momentum") and module._buffers.get("num_batches_tracked") is not None
    )


def _reset(norm: torch.nn.Module) -> None:
    for name, buffer in norm._buffers.items():
        if buffer is not None and name.endswith(("running_mean", "num_batches_tracked")):
            buffer.zero_()
        elif buffer is not None and name.endswith("running_var"):
            buffer.fill_(1)


def _moved(batch: Any, device: torch.device | str | None) -> Any:
    if device is None:
        return batch
    if type(batch) in (tuple, list):
        return type(batch)(_moved(item, device) for item in batch)
    expected = "something with a method 'to', or a tuple or list of such, with 'device'"
    require(hasattr(batch, "to"), "batch", expected, type(batch).__name__, kind=TypeError)
    return batch.to(device)

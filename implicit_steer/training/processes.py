"""Several processes that train one network, each on its share of every batch, as if it were one process.

Three things make it so: the shares together are the batch that one process would have taken
(:class:`~implicit_steer.training.lightning.Shares`); a mean over a batch is put together from means over shares
(:func:`share`); and batch norms take their statistics from all shares (:func:`synchronise`).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .._check import require
from ..deploy.convert import saved_as
from ..layers.batch_norm import NormBase
from ..layers.kernel import KernelBase
from ..plan.moments import Moments, combined


def begin(device: str) -> None:
    """Join the processes that ``torchrun`` has started; without it nothing happens. ``device``: "cpu", "gpu" or
    "auto"."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        gpu = device != "cpu" and torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if gpu else "gloo")
        atexit.register(dist.destroy_process_group)


def say(text: str) -> None:
    """Print ``text`` in process 0 alone."""
    if rank() == 0:
        print(text)


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the block in process 0, then in all others, which find the files that process 0 has made."""
    if rank() > 0:
        dist.barrier()
    yield
    if count() > 1 and rank() == 0:
        dist.barrier()


def total(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes; not differentiable."""
    if count() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values


def share(rows: int, device: torch.device) -> float:
    """The factor by which this process multiplies a mean over its ``rows`` rows, so that the mean over processes of the
    products, which DistributedDataParallel makes of gradients, is the mean over all rows."""
    if count() == 1:
        return 1.0
    return rows * count() / max(float(total(torch.tensor(float(rows), dtype=torch.float64, device=device))), 1.0)


def take_over(module: torch.nn.Module) -> None:
    """Every process continues with process 0's parameters and buffers. They go by name: the order in which escnn
    registers its buffers, by which DistributedDataParallel would send them, differs from process to process."""
    if count() > 1:
        state = [module.state_dict()]
        dist.broadcast_object_list(state)
        module.load_state_dict(state[0])


def pooled(n: int, mean: Tensor, squares: Tensor) -> Moments:
    """Count, mean and sum of squared deviations of all processes' rows, from this one's; not differentiable."""
    own = torch.cat([mean.new_tensor([n]), mean.reshape(-1), squares.reshape(-1)]).double()
    every = [torch.empty_like(own) for _ in range(count())]
    dist.all_gather(every, own)
    parts = []
    for part in every:
        of_mean, of_squares = part[1:].to(mean.dtype).chunk(2)
        parts.append((int(part[0]), of_mean.view_as(mean), of_squares.view_as(squares)))
    return combined(parts)


class _Total(torch.autograd.Function):
    """:func:`total`, differentiable: the gradient is that of the sum of all processes' losses."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return total(values)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return total(grad)


@saved_as(torch.nn.BatchNorm1d)
class BatchNorm1d(torch.nn.BatchNorm1d):
    """torch's, with the statistics of all processes' rows (N, C) in training, through which gradients flow as there.

    ``torch.nn.SyncBatchNorm`` runs on GPUs only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) → (N, C)."""
        if not self.training:
            return super().forward(x)
        rows = total(x.new_tensor(float(len(x))))
        mean = _Total.apply(x.sum(0)) / rows
        var = _Total.apply((x - mean).square().sum(0)) / rows
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * rows / (rows - 1), self.momentum)
        return torch.addcmul(self.bias, x - mean, self.weight * (var + self.eps).rsqrt())


def synchronise(module: torch.nn.Module) -> None:
    """Let every batch norm in ``module`` take its statistics from all processes: those of kernels, those of fields, and
    torch's ``BatchNorm1d``. Parameters, buffers and their names stay. With one process nothing happens.

    Raises ``TypeError`` for a batch norm of another kind: its statistics would be those of a share.
    """
    if count() == 1:
        return
    in_kernels: set[int] = set()
    for part in list(module.modules()):
        if isinstance(part, KernelBase | NormBase):
            part.pool = pooled
        if isinstance(part, KernelBase):
            in_kernels.update(id(norm) for norm, _ in part._norms)
        for key, child in part.named_children():
            if type(child) is torch.nn.BatchNorm1d and child.affine and child.momentum is not None:
                part._modules[key] = norm = BatchNorm1d(child.num_features, child.eps, child.momentum)
                norm._parameters, norm._buffers, norm.training = child._parameters, child._buffers, child.training
    for name, part in module.named_modules():
        keeps = any("running_var" in buffer for buffer, _ in part.named_buffers(recurse=False))
        expected = "one of implicit_steer's batch norms, or a torch.nn.BatchNorm1d with parameters and a momentum"
        ok = not keeps or id(part) in in_kernels or isinstance(part, BatchNorm1d | NormBase)
        require(ok, name, expected, type(part).__name__, "It would see one process's share.", TypeError)

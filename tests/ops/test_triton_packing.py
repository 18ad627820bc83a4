"""The sparse matrix that packs the weights of backend `triton`, against PyTorch's own packing."""

import numpy as np
import pytest
import torch
from helpers import layer, relative

from implicit_steer.ops.triton import dense
from implicit_steer.ops.triton.packing import packing
from implicit_steer.ops.triton.prepared import prepare
from implicit_steer.plan.packing import learned_tensors, pack
from implicit_steer.testing.cases import SMALL


def sums(entries, found, numbers, gradient=None):
    """The sums of ``Entries`` in NumPy."""
    known = np.append(numbers, np.nan)
    weight, var, bias, mean = found.factors.T
    with np.errstate(invalid="ignore"):
        a = np.where(weight >= 0, known[weight], 1) / np.where(var >= 0, np.sqrt(known[var] + found.eps), 1)
        factors = np.where(mean >= 0, np.where(bias >= 0, known[bias], 0) - known[mean] * a, a)
    terms = entries.value * np.where(entries.column >= 0, known[entries.column], 1) * factors[entries.factor]
    if gradient is not None:
        terms = terms * gradient[entries.source]
    n_rows = len(entries.rowptr) - 1
    return np.bincount(np.repeat(np.arange(n_rows), np.diff(entries.rowptr)), terms, n_rows)


@pytest.mark.parametrize("configuration", ["eval", "no norm"])
@pytest.mark.parametrize("name", ["so2", "c4", "mirror-r3", "o3-linear"])
def test_weights_and_gradients(name, configuration):
    conv = layer(SMALL[name], configuration)
    plan, parameters = conv.implicit_kernel.plan, conv.implicit_kernel.parameters_for_op()
    learned = learned_tensors(parameters)
    prepared = prepare(plan, torch.device("cpu"), torch.float64)
    weights = pack(plan, parameters, fold=True)
    parts = [dense.pack_theta(prepared, weights.theta).flatten()]
    if weights.linears:
        parts.insert(0, dense.pack_layers(prepared, weights.linears))
    expected = torch.cat(parts)
    gradient = torch.randn_like(expected)
    of_learned = torch.autograd.grad(expected, learned, gradient, materialize_grads=True)

    found = packing(prepared.tables, [t.numel() for t in learned], measured=False)
    statistics = [t for norm in parameters.norms for t in (norm.mean, norm.var)]
    numbers = torch.cat([t.detach().flatten() for t in (*learned, *statistics)]).numpy()
    assert relative(torch.tensor(sums(found.forward, found, numbers)), expected) < 1e-14
    backward = torch.tensor(sums(found.transposed, found, numbers, gradient.numpy()))
    assert relative(backward, torch.cat([t.flatten() for t in of_learned])) < 1e-13

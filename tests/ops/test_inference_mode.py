"""Calls under torch.inference_mode, and training after them: nothing that is kept may be one of its tensors."""

import pytest
import torch
from helpers import BACKENDS, layer

from bench.qm9_step import synthetic
from implicit_steer.experiments.models import QM9Net
from implicit_steer.ops.conv import implicit_kernel
from implicit_steer.plan.moments import RUNNING
from implicit_steer.testing.cases import SMALL


@pytest.mark.parametrize("configuration", ["train", "eval", "no norm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_after_inference_mode(backend, configuration):
    """What a first call under it makes is kept: plans, constants, packed weights. Autograd must be able to save it."""
    conv = layer(SMALL["o3"], configuration)
    conv.backend, problem = backend, SMALL["o3"].inputs(conv)
    with torch.inference_mode():
        problem.run(conv.eval())
    conv.train(configuration == "train")
    _, delta, *_ = problem.requires_grad()
    (gradient,) = torch.autograd.grad(problem.run(conv).square().sum(), delta, create_graph=True)
    gradient.square().sum().backward()
    assert delta.grad.isfinite().all()


def test_training_a_model_after_inference_mode():
    """As Lightning does, whose first validation comes before the first step."""
    model = QM9Net(blocks=1, channels=2, norm=None)
    batch = synthetic(4).__getitems__([0, 1, 2, 3])
    with torch.inference_mode():
        model.eval()(batch)
    model.train()(batch).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_kernel_gradients_after_inference_mode():
    kernel = layer(SMALL["o3"]).implicit_kernel
    problem = SMALL["o3"].inputs(layer(SMALL["o3"]))
    arguments = problem.delta, problem.attributes
    with torch.inference_mode():
        implicit_kernel(kernel.plan, kernel.parameters_for_op(), *arguments, statistics_from=RUNNING)
    values, _ = implicit_kernel(kernel.plan, kernel.parameters_for_op(), *arguments, statistics_from=RUNNING)
    values.sum().backward()
    assert all(p.grad is not None for p in kernel.mlp.linears[-1].parameters())

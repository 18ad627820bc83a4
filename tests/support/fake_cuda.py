"""What opcheck says of operators on CUDA tensors, where there is no GPU: on fake tensors of device cuda, which have
sizes, a dtype and a device, but no memory.

``torch.library.opcheck`` itself passes over fake tensors: each of its parts returns at once where an argument is one.
And torch's autograd engine refuses tensors of a device that is not there. Therefore, of the four parts:

- test_schema compares memory before and after a call: on real tensors alone, those of the processor (test_torch.py).
- test_autograd_registration asks for a kernel of the key AutogradCUDA or its alias Autograd: opcheck's inner function,
  called on the fakes. It lets an operator pass that has neither; here that has to give gradients.
- test_faketensor compares the fake kernel's results with real ones: with those of the processor, but for the device.
- test_aot_dispatch_dynamic runs the graphs of forward and backward, traced with symbolic sizes: traced on the processor
  with its own autograd registration, run on the fakes. What is compared are shapes, dtypes and devices; numbers are
  compared on the processor alone.
"""

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.optests import autograd_registration_check
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

ON_THE_PROCESSOR = ("plan_", "pack_")  # of these arguments a call on a GPU, too, gets CPU tensors


def has_kernel(operator, key):
    """Whether one is registered for the dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)


def on_gpu(mode, tree):
    """The same with stand-ins on the GPU for all tensors, leaves where these are."""

    def of(t):
        fake = torch.ops.aten._to_copy(mode.from_tensor(t).detach(), device="cuda:0")
        return fake.requires_grad_(t.requires_grad)

    return tree_map_only(torch.Tensor, of, tree)


def placed(operator, arguments, here, there):
    """A call's arguments after ``here`` where they stay on the processor, after ``there`` where they go to the GPU."""
    names = (known.name for known in operator._schema.arguments)
    named = zip(names, arguments, strict=True)
    return [here(a) if name.startswith(ON_THE_PROCESSOR) else there(a) for name, a in named]


def fakes(mode, operator, arguments):
    """Stand-ins for a call's arguments."""

    def here(tree):
        return tree_map_only(torch.Tensor, mode.from_tensor, tree)

    return placed(operator, arguments, here, lambda tree: on_gpu(mode, tree))


def kinds(tree, device=None):
    """Shape, dtype and type of device of every tensor in a tree."""
    return [(tuple(t.shape), t.dtype, device or t.device.type) for t in tree_leaves(tree)]


def check(operator, arguments, differentiated=True):
    """Raise where one of the parts fails on a GPU. ``arguments``: real ones on the processor, that require gradients
    where the operator has them; ``differentiated``: whether to trace these."""
    flat, structure = tree_flatten(arguments)
    tensors = [a for a in flat if isinstance(a, torch.Tensor)]

    def call(*tensors):
        """Results, then gradients."""
        given = iter(tensors)
        parts = [next(given) if isinstance(a, torch.Tensor) else a for a in flat]
        found = tree_leaves(operator(*tree_unflatten(parts, structure)))
        leaves = [t for t in tensors if t.requires_grad and differentiated]
        live = [t for t in found if t.requires_grad]  # others are kept for the gradients
        return found + list(torch.autograd.grad(live, leaves, [torch.ones_like(t) for t in live])) if leaves else found

    expected = kinds(call(*tensors), "cuda")
    graph = make_fx(call, tracing_mode="symbolic")(*tensors)
    with FakeTensorMode() as mode:
        fake = fakes(mode, operator, arguments)
        if any(t.requires_grad for t in tensors):
            autograd_registration_check(operator, fake, {})
        stand_ins = [t.detach() for t in tree_leaves(fake) if isinstance(t, torch.Tensor)]
        assert kinds(graph(*stand_ins)) == expected

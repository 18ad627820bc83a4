"""A model in one file, for use without escnn: :func:`save` writes it where the model was built, :func:`load` reads it
where it is used, and :func:`copy_state` puts what it holds into a module that is to be trained further with escnn's
types.

The file is a safetensors file. Its tensors are the parameters, buffers and constants; its metadata is one JSON text:
the format's version, the modules with what each is built from, and a SHA-256 over everything, which reveals damage (it
is no signature: whoever forges a file can compute it too). Loading executes and imports nothing that the file names:
names are looked up in a table, a plan's indices are checked before native code follows them, and no size asks for more
memory than the file's tensors account for.

A network of your own
---------------------
:func:`register` its class. Where it is built its layers have escnn's types; where it is loaded, in a process that has
imported the module with the class, they are layers on plain tensors, and the class's ``__init__`` is not called::

    @implicit_steer.register
    class Network(torch.nn.Module):
        def __init__(self, channels):
            super().__init__()
            from escnn import gspaces  # here, since the module is imported where escnn is missing, too
            ...
            self.conv = implicit_steer.nn.ImplicitPointConv(scalars, scalars, None, 2, 8)

        def forward(self, x, pos, edges):
            x = self.conv.in_type(x, pos)  # a GeometricTensor; or, loaded, x itself
            return implicit_steer.layers.values(self.conv(x, edges, pos[edges[1]] - pos[edges[0]]))

Without registering anything, save the parts and compose them again where they are used::

    implicit_steer.save(torch.nn.ModuleDict(dict(network.named_children())), "parts.safetensors")
    parts = implicit_steer.load("parts.safetensors")
    y = parts["head"](parts["conv"](x, edges, delta))

For developers
--------------
A module is saved as its *plain* counterpart: a class that needs no escnn, takes and returns plain tensors, and is
rebuilt from ``arguments()``, a dict of what its constructor takes: numbers, strings, None, NumPy arrays, pieces of a
:class:`~implicit_steer.plan.Plan`, :class:`~implicit_steer.layers.Fields`, other modules, and tuples of these. The file
also holds its parameters and buffers, by name, and nothing else. To make a new kind saveable:

1. A network (a composition of modules): write it in ``implicit_steer/layers`` as a class whose constructor takes its
   parts, whose ``forward`` reads and writes features with ``values`` and ``with_values`` and so runs on
   GeometricTensors and plain tensors alike, and which has ``arguments()``. Add it to ``_PLAIN`` in ``kinds.py``. The
   class that builds the parts from escnn types derives from it, is decorated with ``@saved_as(Network)``, and holds
   nothing that matters beyond what the network has. See ``layers/molecules.py`` and
   ``experiments/models/qm9.py``.
2. A layer: put its arithmetic in a base class in ``implicit_steer/layers``, which ``nn`` and the plain class share; add
   the plain class to ``_PLAIN``, and to ``deploy/plain.py`` a function decorated with ``@converts(Layer)`` that makes
   the plain layer, with the same Parameter objects.
3. Either needs a test in ``tests/deploy/test_deploy.py``. If files written before would be read differently now, raise
   ``FORMAT``.
"""

from .._native import LIBRARY as OPERATORS
from .packaging import package
from .registry import register
from .saving import copy_state, load, save

__all__ = ["OPERATORS", "copy_state", "load", "package", "register", "save"]

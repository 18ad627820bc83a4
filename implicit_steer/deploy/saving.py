"""``save`` and ``load``: modules to files and back; ``copy_state``: what was learned, from one to another."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .._check import fail, require
from ..layers.activation import FourierActivation
from ..layers.exact import is_exact
from . import file
from .convert import convert
from .encoding import decode, encode, unregistered
from .kinds import is_registered

STATE = "state."  # names of parameters and buffers in the file begin with this


def save(module: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Write ``module`` to a file that :func:`load` reads without escnn.

    Saved are the parameters, buffers and constants in their dtypes, which parameters are frozen, and which modules are
    in training mode; not gradients, hooks (a module with forward hooks is refused) or optimizers. The file is written
    beside ``path`` and then moved there, so that an interrupted call leaves an existing file as it was. Equal modules
    give equal bytes.

    Args:
        module: a module of :mod:`implicit_steer.nn` or :mod:`implicit_steer.experiments.models`; one of escnn's
            ``Linear``, ``IIDBatchNorm1d``, ``TensorProductModule``, ``SequentialModule``, ``ReLU``, ``ELU``,
            ``LeakyReLU``, ``IdentityModule``, or a pooling; common layers of ``torch.nn``; ``Sequential``,
            ``ModuleList``, ``ModuleDict`` of these; one of a class of your own that
            :func:`~implicit_steer.register` knows; or what :func:`load` returned.
        path: the file; an existing one is replaced.

    Raises:
        TypeError: a part that cannot be saved; the message says what to do, then names it and what can be.
        OSError: the file cannot be written.

    Example:
        >>> gs = escnn.gspaces.flipRot3dOnR3()
        >>> t = gs.type(*[gs.trivial_repr] * 4, *[gs.irrep(1, 1)] * 4)
        >>> conv = implicit_steer.nn.ImplicitPointConv(t, t, None, n_layers=3, n_channels=8)
        >>> implicit_steer.save(conv, "conv.safetensors")
    """
    require(isinstance(module, torch.nn.Module), "module", "a torch.nn.Module", type(module).__name__, kind=TypeError)
    plain = convert(module)
    objects, tensors = encode(plain)
    frozen: list[str] = []
    owners: dict[int, str] = {}
    for name, owner, key in _state(plain):
        tensor = getattr(owner, key)
        if id(tensor) in owners:
            remedy = "Give each module tensors of its own; modules that are shared as a whole can be saved."
            fail(f"{remedy} {name}", "a tensor of one module", f"that of {owners[id(tensor)]!r}", kind=TypeError)
        owners[id(tensor)] = name
        tensors[STATE + name] = owner.exact(key) if is_exact(owner, key) else tensor.detach().cpu()
        if isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad:
            frozen.append(name)
    training = [name for name, part in plain.named_modules() if part.training]
    file.write(path, {"objects": objects, "frozen": frozen, "training": training}, tensors)


def load(path: str | os.PathLike[str]) -> torch.nn.Module:
    """The module that :func:`save` wrote, without escnn: plain tensors in, plain tensors out, on the CPU.

    A file is looked through before it is believed: nothing that it names is imported or run, and no size in it asks for
    more memory than its tensors account for.

    It gives the numbers of the original to rounding, is trainable and equivariant while it is trained, and can be saved
    again. Its arguments are the original's with tensors for GeometricTensors: ``conv(x, edge_index, edge_delta,
    edge_attr)``; ``conv.in_type(x, positions)`` returns x, so code that wraps its features runs unchanged. Its
    ``state_dict`` is its own, not the original's, and carries a fingerprint of the basis of its weights: loaded into a
    module on another basis it raises.

    Args:
        path: the file.

    Returns:
        a module of :mod:`implicit_steer.layers` or ``torch.nn``, or of a registered class, in the training or
        evaluation mode it was saved in.

    Raises:
        OSError: a file that is not there (``FileNotFoundError``) or cannot be read, as Python's ``open`` raises it.
        RuntimeError: a file that ``save`` did not write, a damaged one, one of a newer version, or one of a class that
            is not registered. The message begins with the path.

    Example:
        >>> conv = implicit_steer.load("conv.safetensors").eval()  # as saved in the example of save
        >>> pos, x = torch.randn(100, 3), torch.randn(100, 16)
        >>> graph = implicit_steer.Graph(implicit_steer.knn_graph(pos, k=8), 100)
        >>> conv(x, graph, pos[graph.dst] - pos[graph.src]).shape
        torch.Size([100, 16])
    """
    manifest, tensors = file.read(path)
    if missing := unregistered(manifest.get("objects")):
        remedy = "Import the module that registers them (@implicit_steer.register), then load."
        fail(str(path), f"registered classes {', '.join(missing)}", "none of that name", remedy, RuntimeError)
    state = {k.removeprefix(STATE): v for k, v in tensors.items() if k.startswith(STATE)}
    try:
        module = decode(manifest["objects"], tensors, state.values())
        _restore(module, state, manifest)
    except file.FORGED as error:
        remedy = f"It was written by implicit_steer {manifest.get('library')}: save it again, or install that version."
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        fail(str(path), "the content of a saved module", reason, remedy, RuntimeError)
    return module


def copy_state(saved: torch.nn.Module, module: torch.nn.Module) -> None:
    """Give ``module`` the parameters and buffers of ``saved``, which :func:`load` has read of a module like it.

    Its types, modes and backends stay its own: a network with escnn's types goes on where the saved one ended.

    Raises:
        ValueError: they have other parts, parts of other sizes, or activations of another function or sampling; one is
            named.
        RuntimeError: the weights of ``saved`` are those of another basis. After either ``module`` is as it was.
        TypeError: ``module`` is none that :func:`save` takes.

    Example:
        >>> network = implicit_steer.experiments.models.QM9Net(channels=16)
        >>> implicit_steer.deploy.copy_state(implicit_steer.load("homo.safetensors"), network)
    """
    plain = convert(module)
    own, given = ({name: tuple(t.shape) for name, t in part.state_dict().items()} for part in (plain, saved))
    remedy = "Build the module with the arguments of the saved one."
    for name in sorted(own.keys() | given.keys()):
        expected, got = own.get(name, "none"), given.get(name, "none")
        require(expected == got, name, f"shape {expected}", got, remedy)
    _check_activations(dict(saved.named_modules()), dict(plain.named_modules()))
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    try:
        plain.load_state_dict(saved.state_dict())
    except RuntimeError:
        plain.load_state_dict(before)
        raise


def _check_activations(saved: dict[str, torch.nn.Module], own: dict[str, torch.nn.Module]) -> None:
    """Raise unless Fourier activations are the same functions: those are no part of the state."""
    for name, module in own.items():
        if isinstance(module, FourierActivation):
            other = saved.get(name)
            same = isinstance(other, FourierActivation) and module.is_like(other)
            remedy = "Build it with the function and sampling of the saved one; 'escnn' was the default once."
            require(same, name, str(module), str(other), remedy)


def _state(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module, str]]:
    """(full name, owner, name there) of every parameter and persistent buffer, and of the other buffers of a user's
    class, which no ``__init__`` makes; modules in two places count once."""
    found = []
    for prefix, owner in module.named_modules():
        made_anew = set() if is_registered(type(owner)) else owner._non_persistent_buffers_set
        keys = [k for k, v in owner._parameters.items() if v is not None]
        keys += [k for k, v in owner._buffers.items() if v is not None and k not in made_anew]
        found += [(f"{prefix}.{key}" if prefix else key, owner, key) for key in keys]
    return found


def _restore(module: torch.nn.Module, state: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """Put the file's tensors in place, with their dtypes; then which are frozen, and the modes."""
    places = _state(module)
    names, given = {name for name, _, _ in places}, set(state)
    require(names == given, "state", "one tensor per parameter and buffer", sorted(names ^ given))
    for name, owner, key in places:
        tensor, place = state[name], getattr(owner, key)
        require(tensor.shape == place.shape, name, f"shape {tuple(place.shape)}", tuple(tensor.shape))
        same_kind = tensor.is_floating_point() if place.is_floating_point() else tensor.dtype == place.dtype
        require(same_kind, name, f"a dtype like {place.dtype}", tensor.dtype)
        if isinstance(place, torch.nn.Parameter):
            owner._parameters[key] = torch.nn.Parameter(tensor, requires_grad=name not in manifest["frozen"])
        elif not is_exact(owner, key):
            owner._buffers[key] = tensor
    for name, owner, key in places:
        if is_exact(owner, key):
            owner.set_exact(key, state[name], owner.learned_dtype())
    training = set(manifest["training"])
    for name, part in module.named_modules():
        part.training = name in training

"""``save`` writes a module to a file, ``load`` reads it; ``copy_state`` gives one module what another has learned."""

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


def save(module: torch.nn.Module, path: str | os.PathLike[str], *, table: bool = False) -> None:
    """Write ``module`` to a file that :func:`load` reads without escnn.

    The file holds the parameters, buffers and constants in their dtypes, which parameters are frozen, and which modules
    are in training mode. It holds no gradients, hooks (a module with forward hooks is refused) or optimizers. It is
    written beside ``path`` and then moved there, so that an interrupted call leaves an existing file as it was. Equal
    modules give equal bytes.

    Args:
        module: a module of :mod:`implicit_steer.nn`, :mod:`implicit_steer.irreps` or
            :mod:`implicit_steer.experiments.models`, or a :class:`~implicit_steer.potentials.Potential`; one of escnn's
            ``Linear``, ``IIDBatchNorm1d``, ``TensorProductModule``, ``SequentialModule``, ``ReLU``, ``ELU``,
            ``LeakyReLU``, ``IdentityModule``, or a pooling; common layers of ``torch.nn``; ``Sequential``,
            ``ModuleList``, ``ModuleDict`` of these; one of a class of your own that
            :func:`~implicit_steer.register` knows; or what :func:`load` returned.
        path: the file; an existing one is replaced.
        table: whether convolutions on points are saved with splines of the distance in place of their MLPs (see
            :meth:`~implicit_steer.layers.ImplicitPointConv.freeze_table`), as many knots as they have, else 256. The
            loaded convolutions' ``explain()`` says how large the error is. A warning names those that keep their MLPs,
            and the reason.

    Raises:
        TypeError: a part cannot be saved; the message says what to do, then names the part and what can be saved.
        OSError: the file cannot be written.

    Example:
        >>> gs = escnn.gspaces.flipRot3dOnR3()
        >>> t = gs.type(*[gs.trivial_repr] * 4, *[gs.irrep(1, 1)] * 4)
        >>> conv = implicit_steer.nn.ImplicitPointConv(t, t, None, n_layers=3, n_channels=8)
        >>> implicit_steer.save(conv, "conv.safetensors")
    """
    require(isinstance(module, torch.nn.Module), "module", "a torch.nn.Module", type(module).__name__, kind=TypeError)
    plain = convert(module, freeze=table)
    objects, tensors = encode(plain)
    frozen: list[str] = []
    owners: dict[int, str] = {}
    for name, owner, key in _state(plain):
        tensor = getattr(owner, key)
        if id(tensor) in owners:
            remedy = "Give each module tensors of its own; modules that are shared as a whole can be saved."
            fail(f"{remedy} {name}", "a tensor of one module", f"the tensor of {owners[id(tensor)]!r}", kind=TypeError)
        owners[id(tensor)] = name
        tensors[STATE + name] = owner.exact(key) if is_exact(owner, key) else tensor.detach().cpu()
        if isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad:
            frozen.append(name)
    training = [name for name, part in plain.named_modules() if part.training]
    file.write(path, {"objects": objects, "frozen": frozen, "training": training}, tensors)


def load(path: str | os.PathLike[str]) -> torch.nn.Module:
    """The module that :func:`save` wrote, without escnn: plain tensors in, plain tensors out, on the CPU.

    The file is checked before it is used: nothing that it names is imported or run, and no size in it asks for more
    memory than its tensors account for.

    The module computes what the original does, to rounding. It can be trained, stays equivariant as it is trained, and
    can be saved again. It takes the original's arguments, with tensors for GeometricTensors: ``conv(x, edge_index,
    edge_delta, edge_attr)``; ``conv.in_type(x, positions)`` returns x, so code that wraps its features runs unchanged.
    Its ``state_dict`` has other names than the original's and holds a fingerprint of the basis of its weights: loading
    it into a module on another basis raises.

    Args:
        path: the file.

    Returns:
        a module of :mod:`implicit_steer.layers` or ``torch.nn``, or of a registered class, in the training or
        evaluation mode it was saved in.

    Raises:
        OSError: the file is not there (``FileNotFoundError``) or cannot be read, as Python's ``open`` raises it.
        RuntimeError: ``save`` did not write the file, it is damaged, of a newer version, or holds a class that is not
            registered. The message begins with the path.

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
    """Give ``module`` the parameters and buffers of ``saved``, which :func:`load` returned for a module like it.

    ``module`` keeps its types, modes and backends, so that a network with escnn's types continues the training of the
    saved one.

    Raises:
        ValueError: the two have other parts, parts of other sizes, or activations of another function or sampling; the
            message names one.
        RuntimeError: ``saved`` has weights on another basis. After either error ``module`` is as it was.
        TypeError: :func:`save` does not take ``module``.

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
    """Raise unless Fourier activations are the same functions, which the state does not say."""
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
    """Put the file's tensors in place, with their dtypes; freeze parameters and set modes as in the file."""
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

"""Buffers that hold constants, which are known in float64 and rounded to the dtype that their module has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class ExactBuffers(torch.nn.Module):
    """A Module with buffers that are rounded from float64 whenever their dtype changes, so that ``.double()`` makes
    them exact. They are in the ``state_dict``; a value loaded from one takes their place if it differs by more than
    rounding."""

    _exact: dict[str, Tensor] = {}  # noqa: RUF012 - by name, float64, on the CPU; replaced, never changed

    def set_exact(self, name: str, value: Tensor, dtype: torch.dtype | None = None, persistent: bool = True) -> None:
        """Make ``value`` such a buffer, in ``dtype`` (by default PyTorch's), in place of any buffer of this name."""
        where = value.device if value.is_meta else "cpu"  # a placeholder has no values
        exact = value.detach().to(where, torch.float64, copy=True)
        self._exact = self._exact | {name: exact}
        self.register_buffer(name, exact.to(dtype or torch.get_default_dtype(), copy=True), persistent=persistent)

    def share_exact(self, other: ExactBuffers) -> None:
        """Copy the exact buffers of ``other``."""
        for name in other._exact:
            persistent = name not in other._non_persistent_buffers_set
            self.set_exact(name, other.exact(name), other.get_buffer(name).dtype, persistent)

    def exact(self, name: str) -> Tensor:
        """One of these buffers in float64, on the CPU: its exact values, unless other values were written to it."""
        exact, buffer = self._exact[name], self.get_buffer(name)
        unchanged = buffer.is_meta or torch.equal(exact.to(buffer.dtype), buffer.cpu())
        return exact if unchanged else buffer.detach().to("cpu", torch.float64)

    def learned_dtype(self) -> torch.dtype:
        """The dtype of what the module itself learns or measures."""
        tensors = [t for name, t in (self._parameters | self._buffers).items() if name not in self._exact]
        return next(t.dtype for t in tensors if t is not None and t.is_floating_point())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: (self.get_buffer(name), self.exact(name)) for name in self._exact}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, (buffer, exact) in before.items():
            now = self.get_buffer(name)
            if now.dtype != buffer.dtype or (buffer.is_meta and not now.is_meta):
                self._buffers[name] = exact.to(now, copy=True)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, exact in self._exact.items():
            given, buffer = state_dict.get(prefix + name), self.get_buffer(name)
            if given is None or given.shape != exact.shape or given.is_meta or buffer.is_meta:
                continue
            rounding = 2 * max(torch.finfo(t.dtype).eps for t in (given, buffer))
            if torch.allclose(given.to("cpu", torch.float64), exact, rtol=0, atol=rounding * float(exact.abs().max())):
                buffer.copy_(exact)


def is_exact(module: torch.nn.Module, name: str) -> TypeGuard[ExactBuffers]:
    """Whether ``name`` is one of a module's exact buffers."""
    return isinstance(module, ExactBuffers) and name in module._exact

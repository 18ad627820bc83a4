"""Triton's interpreter made trustworthy and bearable, for tests: imported where TRITON_INTERPRET=1.

Seen in Triton 3.6.0 and 3.7.1: tl.dot ignores ``input_precision``; nothing checks addresses."""

import contextlib

import fast_interpreter
import numpy as np
import torch
from triton.runtime import interpreter as triton_interpreter

from implicit_steer.ops.triton import launch as launches

_BUILDER = triton_interpreter.InterpreterBuilder


def _tf32(x):
    """float32 rounded to 10 bits of mantissa."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    x, y = a.data, b.data
    if getattr(input_precision, "name", "") == "TF32" and x.dtype == np.float32:
        x, y = _tf32(x), _tf32(y)
    found = np.matmul(x, y, dtype=d.data.dtype) + d.data
    return triton_interpreter.TensorHandle(found, d.dtype.scalar)


class Guard:
    """Every access inside its block falls into one of the tensors, and no two programs store to one element."""

    def __init__(self, tensors):
        storages = [t.untyped_storage() for t in tensors]
        ranges = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes()})
        self.low = np.array([low for low, _ in ranges], np.uint64)
        self.high = np.array([high for _, high in ranges], np.uint64)
        self.stores = []  # addresses, number of the program

    def check(self, pointers, mask, what, program):
        """The addresses that are not masked, after the check."""
        address = np.broadcast_to(pointers.data, pointers.data.shape).ravel().astype(np.uint64)
        size = np.uint64(pointers.dtype.scalar.element_ty.primitive_bitwidth // 8)
        if mask is not None:
            address = address[np.broadcast_to(mask.data, pointers.data.shape).ravel().astype(bool)]
        at = np.searchsorted(self.low, address, side="right") - 1
        inside = (at >= 0) & (address + size <= self.high[at])
        if not inside.all():
            raise IndexError(f"{what}: {int((~inside).sum())} addresses outside of the tensors, program {program}")
        return address

    def store(self, pointers, mask, program):
        address = self.check(pointers, mask, "store", program)
        number = (program[0] << 40) + (program[1] << 20) + program[2]
        self.stores.append(np.stack([address, np.full(len(address), number, np.uint64)]))

    def check_stores(self):
        if self.stores:
            pairs = np.unique(np.concatenate(self.stores, 1), axis=1)
            shared = int((np.diff(pairs[0]) == 0).sum())
            if shared:
                raise RuntimeError(f"several programs store to {shared} elements")

    @contextlib.contextmanager
    def on(self):
        load, store = _BUILDER.create_masked_load, _BUILDER.create_masked_store

        def masked_load(builder, pointers, mask, *rest):
            self.check(pointers, mask, "load", builder.grid_idx)
            return load(builder, pointers, mask, *rest)

        def masked_store(builder, pointers, value, mask, *rest):
            self.store(pointers, mask, builder.grid_idx)
            return store(builder, pointers, value, mask, *rest)

        _BUILDER.create_masked_load, _BUILDER.create_masked_store = masked_load, masked_store
        try:
            yield
            self.check_stores()
        finally:
            _BUILDER.create_masked_load, _BUILDER.create_masked_store = load, store


def install():
    """Once per process: exact tl.dot, a guard around every launch, and the time of fast_interpreter saved."""
    _BUILDER.create_dot = _create_dot
    fast_interpreter.install()
    launch = launches.launch

    def guarded(variant, grid, arguments):
        with Guard([t for t in arguments if isinstance(t, torch.Tensor)]).on():
            launch(variant, grid, arguments)

    launches.launch = guarded


@contextlib.contextmanager
def poisoned():
    """Uninitialised memory holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

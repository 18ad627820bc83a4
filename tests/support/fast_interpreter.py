"""Time of Triton's interpreter that changes no result, saved: imported where TRITON_INTERPRET=1.

Seen in Triton 3.6.0 and 3.7.1: every call of a jit function patches the language again; sums and products of int32 are
made a second time in int64 for an assertion that is off; made anew for every value are the table of dtypes, the type of
its block and its shape, a tuple of constants that has a type of its own."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import triton.language as tl
from triton.language import core, semantic
from triton.runtime import interpreter

_make_block_type, _unwrap, _find_np_dtype = tl.block_type.__init__, core._unwrap_if_constexpr, interpreter._get_np_dtype
_find_common_type = semantic.TritonSemantic.computation_type_impl
_find_operands = semantic.TritonSemantic.binary_op_type_checking_impl


class _Shape(NamedTuple):
    """What Triton derives from the lengths of a shape."""

    lengths: Any  # the shape of a type: Triton's tuple of integers
    text: str
    numel: int
    constants: Any  # the shape of a value: Triton's tuple of constants
    constant_numel: Any


_BY_LENGTHS, _BY_ID = {}, {}  # _BY_ID: by the identity of both tuples, which live as long as these tables


def _shape(lengths):
    """The entry of these lengths; they may be Triton's constants."""
    found = _BY_ID.get(id(lengths))
    if found is None:
        key = (*map(int, map(_unwrap, lengths)),)
        found = _BY_LENGTHS.get(key)
    if found is None:
        block = object.__new__(tl.block_type)
        _make_block_type(block, tl.int1, list(key))  # which refuses lengths that are no powers of 2
        constants = core.tuple([core.constexpr(n) for n in key])
        found = _Shape(block.shape, str(block.shape), block.numel, constants, core.constexpr(block.numel))
        _BY_LENGTHS[key] = _BY_ID[id(block.shape)] = _BY_ID[id(constants)] = found
    return found


_SCALAR = core.tuple([]), core.constexpr(1)  # shape, number of elements


def _init_block_type(self, element_ty, shape):
    found = _shape(shape)
    self.element_ty, self.shape, self.numel = element_ty, found.lengths, found.numel
    self.name = f"<{found.text}, {element_ty.name}>"


def _init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    if type.is_block():
        found = _shape(type.shape)
        self.shape, self.numel = found.constants, found.constant_numel
    else:
        self.shape, self.numel = _SCALAR


def _unwrap_if_constexpr(value):
    kind = type(value)
    if kind is core.constexpr:
        return value.value
    return _unwrap(value) if kind in (list, tuple, core.tuple) or isinstance(value, (list, tuple)) else value


_NP_DTYPES = {}  # by the name of Triton's type


def _np_dtype(kind):
    """NumPy's dtype for the elements of a type of Triton's."""
    name = kind.scalar.name
    if name not in _NP_DTYPES:
        _NP_DTYPES[name] = _find_np_dtype(kind)
    return _NP_DTYPES[name]


_COMMON_TYPES = {}  # by the arguments of _common_type, types by their names


def _common_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod):
    key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
    if key not in _COMMON_TYPES:
        _COMMON_TYPES[key] = _find_common_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
    return _COMMON_TYPES[key]


_COMMON_SHAPES = {}  # by the identities of two entries of the tables above


def _common_shape(a, b):
    key = id(a), id(b)
    if key not in _COMMON_SHAPES:
        _COMMON_SHAPES[key] = _shape(np.broadcast_shapes(tuple(a.lengths.values), tuple(b.lengths.values)))
    return _COMMON_SHAPES[key]


def _broadcast_values(self, left, right):
    """Both in the shape that they have together, by the rule of NumPy, which is Triton's; scalars have none."""
    shapes = [_shape(value.type.shape) for value in (left, right) if value.type.is_block()]
    if not shapes:
        return left, right
    common = shapes[0] if shapes[0] is shapes[-1] else _common_shape(*shapes)

    def wide(value):
        if value.type.is_block() and value.type.shape is common.lengths:
            return value
        handle = self.builder.create_broadcast(value.handle, common.lengths.values)
        return tl.tensor(handle, tl.block_type(value.dtype, common.lengths))

    return wide(left), wide(right)


_PLAIN = ("fp32", "fp64", "int32", "int64")  # two of one of them are computed with as they are


def _operands(self, left, right, *options, **named):
    """Both operands in one type and one shape."""
    if type(left) is type(right) is tl.tensor and left.dtype is right.dtype and left.dtype.name in _PLAIN:
        return _broadcast_values(self, left, right)
    return _find_operands(self, left, right, *options, **named)


def _patch_builtin(owner, name, member, builder, scope):
    """One call between a builtin's caller and its function, not two."""
    function = getattr(member, "__wrapped__", member)

    def called(*arguments, **named):
        named["_semantic"] = interpreter.interpreter_semantic
        return function(*arguments, **named)

    scope.set_attr(owner, name, called)


def install():
    """Once per process."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_attr = _patch_builtin
    interpreter._patch_lang(tl.sum.fn)  # for good: the part of the language that Triton's own functions are in
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    interpreter._get_np_dtype = _np_dtype
    core._unwrap_if_constexpr = _unwrap_if_constexpr
    tl.block_type.__init__, tl.tensor.__init__ = _init_block_type, _init_tensor
    semantic.TritonSemantic.computation_type_impl = _common_type
    semantic.TritonSemantic.broadcast_impl_value = _broadcast_values
    semantic.TritonSemantic.binary_op_type_checking_impl = _operands

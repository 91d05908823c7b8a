"""A pretend accelerator: `sim`, whose tensors hold tensors of the processor.

Operators compute on what is held. One that is given tensors of both devices fails, as on CUDA, so
that a compilation that forgets to move something is found without such a machine. Importing this
registers the device with torch for the rest of the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME, CPU = "sim", torch.device("cpu")
READS: list[tuple[int, ...]] = []
"""Shapes of what the processor read from the device, for which it would wait."""
_HELD: dict[int, tuple[Tensor, Any]] = {}
"""Address of a storage -> the tensor that it stands for, and the storage, which stays alive."""
_TAKES_BOTH = ("aten::copy_", "aten::_copy_from", "aten::_to_copy", "aten::repeat_interleave")
"""Operators that also CUDA lets mix devices; so it does with an index."""
_VIEWS = ("aten::view", "aten::_unsafe_view", "aten::_reshape_alias")
_WITHOUT_FALLBACK = """expand permute transpose.int slice.Tensor select.int squeeze squeeze.dim
    squeeze.dims unsqueeze t view.dtype split.Tensor split_with_sizes unbind.int diagonal
    _unsafe_view _reshape_alias unfold cat stack repeat bmm mm addmm baddbmm _softmax _log_softmax
    where.self masked_fill.Scalar masked_fill_.Scalar abs clone add.Tensor add_.Tensor mul.Tensor
    sum.dim_IntList index.Tensor index_select masked_scatter remainder.Scalar floor_divide
    floor_divide.Scalar div.Tensor_mode div.Scalar_mode""".split()
"""Operators that have kernels for any device, which would look into a storage."""


class _Backend(_DummyBackendModule):  # type: ignore[misc]  # untyped
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _stand_in(held: Tensor) -> Tensor:
    """A tensor of the device for one of the processor."""
    found: Tensor = torch._C._acc.create_empty_tensor(list(held.shape), held.dtype)  # type: ignore[attr-defined]
    storage = found.untyped_storage()
    _HELD[storage._cdata] = (held, storage)
    return found


def _held(value: Any) -> Any:
    """What a tensor of the device holds; anything else as it is."""
    if isinstance(value, Tensor) and value.device.type == NAME:
        return _HELD[value.untyped_storage()._cdata][0]
    is_device = isinstance(value, torch.device) and value.type == NAME
    return CPU if is_device else value


def _compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator, on what its arguments hold."""
    name, given, spec = op._schema.name, *pytree.tree_flatten((args, kwargs))
    tensors = [value for value in given if isinstance(value, Tensor)]
    strange = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.dim()]
    if strange and len(strange) < len(tensors) and name not in _TAKES_BOTH and "index" not in name:
        raise RuntimeError(f"Expected all tensors to be on the same device: {op}, sim and cpu")
    held = [_held(value) for value in given]
    args, kwargs = pytree.tree_unflatten(held, spec)
    numbers = zip(args, op._schema.arguments, strict=False)
    args = tuple(
        torch.tensor(value)
        if isinstance(value, (int, float)) and str(at.type) == "Tensor"
        else value
        for value, at in numbers
    )
    try:
        found = op(*args, **kwargs)
    except RuntimeError:
        if name not in _VIEWS:
            raise
        found = args[0].reshape(args[1])  # what is held may be strided otherwise
    to_processor = any(isinstance(value, torch.device) and value == CPU for value in given)
    written = {id(one): value for one, value in zip(held, given, strict=True)}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in written:
            return value if to_processor else _stand_in(value)
        own: Any = written[id(value)]
        if own.device.type == NAME and own.shape != value.shape:
            own.data = _stand_in(value)
        return own

    return pytree.tree_map(wrapped, found)


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return _stand_in(torch.empty(size, dtype=dtype or torch.get_default_dtype()))


def _empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
    return _empty(size, **options)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if target.device.type == "cpu":
        READS.append(tuple(source.shape))
    _held(target).copy_(_held(source))
    return target


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return _copy(target, source)


def _to_copy(x: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    copied: Tensor = _held(x).to(dtype=dtype or x.dtype, copy=True)
    if device is None or torch.device(device) != CPU:
        return _stand_in(copied)
    READS.append(tuple(x.shape))
    return copied


def _view(x: Tensor, size: Any) -> Tensor:
    return _stand_in(_held(x).reshape(size))


def _number(x: Tensor) -> Any:
    READS.append(())
    return _held(x).item()


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Any:
    return _compute(torch.ops.aten.convolution.default, x, weight, bias, *options)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Any:
    *rest, mask = options
    sizes = [weight.shape[0]]
    return _compute(
        torch.ops.aten.convolution_backward.default, grad, x, weight, sizes, *rest, mask
    )


def _pack_int4(codes: Tensor, inner_tiles: int) -> Tensor:
    """uint8 [N, K / 2] as CUDA has it, int32 [N / 8, K / 16 / tiles, 32, tiles / 2]; in its order
    of bytes nothing but the kernel can read it."""
    held = _held(codes).contiguous()
    rows, half = held.shape
    shape = (rows // 8, 2 * half // (16 * inner_tiles), 32, inner_tiles // 2)
    return _stand_in(held.view(torch.int32).reshape(shape))


def _multiply_int4(x: Tensor, packed: Tensor, group_size: int, scale_and_zero: Tensor) -> Tensor:
    """[M, K] times the transpose of (u - 8) * scale + zero, the even u in the high nibble."""
    if any(one.device.type != NAME for one in (x, packed, scale_and_zero)):
        raise RuntimeError("Expected all tensors to be on the same device: an INT4 kernel")
    given, codes, scales = _held(x), _held(packed), _held(scale_and_zero)
    if given.dtype != torch.bfloat16 or scales.dtype != torch.bfloat16:
        raise RuntimeError("the INT4 kernel takes bfloat16")
    stored = codes.reshape(len(codes) * 8, -1).view(torch.uint8)
    unsigned = torch.stack([stored >> 4, stored & 15], dim=-1).flatten(1).to(torch.bfloat16)
    scale, zero = scales.repeat_interleave(group_size, 0).unbind(-1)
    return _stand_in(given @ ((unsigned.t() - 8) * scale + zero))


def _narrow(name: str) -> Callable[..., Any]:
    """An operator that autocast gives 16-bit operands."""
    op, keys = getattr(torch.ops.aten, name).default, torch._C.DispatchKeySet
    autocast = keys(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.get_autocast_dtype(NAME)) if wide else value

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return op(*pytree.tree_map(cast, args), **pytree.tree_map(cast, kwargs))

    return run


def _operator(name: str) -> Callable[..., Any]:
    base, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, base), overload or "default")
    return lambda *args, **kwargs: _compute(op, *args, **kwargs)


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
_ANY = torch.library.Library("_", "IMPL")
_ANY.fallback(_compute, "PrivateUse1")
_ANY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")
for _name in "linear matmul mm bmm addmm conv2d scaled_dot_product_attention".split():
    _ATEN.impl(_name, _narrow(_name), dispatch_key="AutocastPrivateUse1")
for _name, _function in {
    **{name: _operator(name) for name in _WITHOUT_FALLBACK},
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "copy_": _copy,
    "_copy_from": _copy_from,
    "_to_copy": _to_copy,
    "view": _view,
    "_local_scalar_dense": _number,
    "_convert_weight_to_int4pack": _pack_int4,
    "_weight_int4pack_mm": _multiply_int4,
    "convolution_overrideable": _convolution,
    "convolution_backward_overrideable": _convolution_backward,
}.items():
    _ATEN.impl(_name, _function, dispatch_key="PrivateUse1")

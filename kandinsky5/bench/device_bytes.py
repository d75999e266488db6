"""What lies on the device while a stage runs, counted on tensors of PyTorch's meta device.

Shapes and lifetimes are real, numbers are not computed. Attention counts by its output: fused kernels
allocate no more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from kandinsky5.model.bench import LiveBytes

META = torch.device("meta")
_QUESTIONS = frozenset(
    (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.item.default,
        torch.ops.aten.is_nonzero.default,
    )
)
"""How a program asks for a number, such as whether all of a tensor is finite."""
_MOVES = (torch.ops.aten.to, torch.ops.aten._to_copy)


class DeviceBytes(LiveBytes):
    """Counts what is on the meta device, apart from empty models; says yes to questions about numbers.

    What goes to main memory is there as memory that is never touched.
    """

    def __init__(self, *apart_from: nn.Module) -> None:
        super().__init__(nn.ModuleList(apart_from))
        self._attention = _AttentionByItsOutput()

    def __enter__(self) -> DeviceBytes:
        super().__enter__()
        self._attention.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._attention.__exit__(*exception)
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS and args[0].is_meta:
            return True
        if func.overloadpacket in _MOVES and args[0].is_meta:
            given = (*args[1:], *(kwargs or {}).values())
            if any(isinstance(value, torch.device) and value.type == "cpu" for value in given):
                dtypes = [value for value in given if isinstance(value, torch.dtype)]
                dtype = (dtypes or [args[0].dtype])[0]
                return torch.empty(args[0].shape, dtype=dtype, device="cpu")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == META.type:
            super()._add(storage)


class _AttentionByItsOutput(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class WholeNumbersKept(TorchFunctionMode):
    """Leaves whole numbers in main memory, where a program can ask for them, until they become floats.

    Token ids, sizes of pictures and indices decide what Qwen's vision computes; they are a few kilobytes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") == META:
            made = func(*args, **{**kwargs, "device": None})
            return made.to(META) if made.is_floating_point() else made
        if func is F.embedding and args[1].is_meta:
            ids, table = args[:2]
            return table.new_empty(*ids.shape, table.shape[1])
        if func in (torch.Tensor.to, torch.Tensor.float) and _is_whole_in_main_memory(args[0]):
            if func is torch.Tensor.float:
                return torch.empty(args[0].shape, device=META)
            if META in (*args[1:], *kwargs.values()):
                return args[0]
        return func(*args, **kwargs)


def _is_whole_in_main_memory(tensor: torch.Tensor) -> bool:
    is_whole = not (tensor.is_floating_point() or tensor.dtype == torch.bool)
    return is_whole and not tensor.is_meta


def weights_bytes(*models: nn.Module) -> int:
    """Of all parameters and saved buffers."""
    return sum(tensor.nbytes for model in models for tensor in model.state_dict().values())

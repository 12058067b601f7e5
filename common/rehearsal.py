"""What a forward costs, found by going through it on meta tensors, which have shapes and no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class _Fused(torch.autograd.Function):
    """Attention as a fused kernel leaves it: output and log-sum-exp, no matrix of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


class _Attention(TorchFunctionMode):
    """Takes the fused path, which meta tensors by themselves would not. flops: of all scores and weighted values."""

    flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        output: Tensor = _Fused.apply(query, key, value)
        self.flops += 2 * key.shape[-2] * (query.numel() + output.numel())
        return output


class _Live(TorchDispatchMode):
    """Bytes of the tensors that are alive. most: the largest sum so far."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = {_identity(tensor) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and _identity(tensor) not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(_identity(tensor))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, _identity(tensor), storage.nbytes())
        return output

    def _gone(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.now -= size


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class Forward:
    """One forward without gradient: operations of matrix products and convolutions (a multiply and an add are two),
    of attention apart, and the most bytes alive besides the weights."""

    matrix_flops: int
    attention_flops: int
    most_bytes: int


def rehearse(modules: Iterable[nn.Module], forward: Callable[[], Any]) -> Forward:
    """Goes through a forward of modules on the meta device."""
    live = _Live(tensor for module in modules for tensor in module.state_dict().values())
    with torch.no_grad(), _Attention() as attention, FlopCounterMode(display=False) as counter, live:
        forward()
    return Forward(counter.get_total_flops(), attention.flops, live.most)


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of one forward, in bytes. all: without recomputation; entering: what enters the blocks;
    outside: what is kept besides the blocks; block: of the block that keeps most."""

    all: int
    entering: int
    outside: int
    block: int

    def __add__(self, other: Kept) -> Kept:
        return Kept(
            self.all + other.all,
            self.entering + other.entering,
            self.outside + other.outside,
            max(self.block, other.block),
        )

    def most(self, recompute: bool) -> int:
        """The most bytes alive in forward and backward. The backward of a block holds the gradients of what the block
        kept and, when recomputing, that itself."""
        return self.entering + self.outside + 2 * self.block if recompute else self.all + self.block


def kept(module: nn.Module, blocks: Iterable[nn.Module], forward: Callable[[], Any]) -> Kept:
    """Goes through a training forward of a module on the meta device; blocks: what would be recomputed one by one."""
    weights = {_identity(p) for p in module.parameters()}
    tensors: dict[int, Tensor] = {}  # keeps them alive, so that no identity is used twice
    entered: dict[int, int] = {}
    marks: list[int] = []
    sizes: list[int] = []

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())

    def keep(tensor: Tensor) -> Tensor:
        if _identity(tensor) not in weights:
            tensors[_identity(tensor)] = tensor
        return tensor

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        marks.append(total())
        entered.update(
            {_identity(t): t.untyped_storage().nbytes() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        )

    def after(*_: Any) -> None:
        sizes.append(total() - marks.pop())

    handles = []
    for block in blocks:
        handles += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    with _Attention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    for handle in handles:
        handle.remove()
    everything = total()
    del output
    return Kept(everything, sum(entered.values()), everything - sum(sizes), max(sizes, default=0))

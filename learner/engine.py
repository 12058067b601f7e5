"""The DeepSpeed engine of one learner rank, and what the learner needs of it beyond forward and backward."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from common.transport.store import join, serve

PERSISTENT = 100_000
"""Elements up to which ZeRO-3 leaves a parameter whole between its uses."""


def init_process_group(rank: int, world: int, address: str, deadline_s: float) -> None:
    """torch.distributed formed by us (gloo on CPUs, NCCL on GPUs), DeepSpeed on top.

    address is "host:port" of rank 0. No device_id is given: with it, later sub-groups were seen to hang.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    from common.torchvision_cpu import patch

    patch()
    import deepspeed
    import deepspeed.ops

    if not cuda:
        # Without this, the first collective compiles an extension for up to 80 s; gloo does the work either way.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    host, _, port = address.rpartition(":")
    store = serve(host, int(port), deadline_s, world) if rank == 0 else join(host, int(port), deadline_s, world)
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=deadline_s)
    )
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", dist_init_required=False, verbose=False)


class Engine:
    """DeepSpeed around a policy: accumulate micro-batches, look at the gradients, then step or drop them."""

    def __init__(
        self,
        module: nn.Module,
        groups: dict[str, tuple[list[nn.Parameter], float]],
        *,
        zero_stage: int,
        dtype: str,
        betas: tuple[float, float],
        weight_decay: float,
        grad_clip: float,
    ) -> None:
        """groups: name -> (parameters, learning rate). dtype float32 or bfloat16 (masters stay fp32)."""
        import deepspeed

        self.names, self.stage = list(groups), zero_stage
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": lr, "name": name} for name, (parameters, lr) in groups.items()],
            betas=betas,
            weight_decay=weight_decay,
        )
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {
                "stage": zero_stage,
                "overlap_comm": False,
                "reduce_bucket_size": 50_000_000,
                "stage3_param_persistence_threshold": PERSISTENT,
            },
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": grad_clip,
            "bf16": {"enabled": dtype == "bfloat16"},
            # A sum of many micro-batches in bf16 loses the small ones. At stage 1 DeepSpeed would take another
            # optimizer class for it, whose gradients the rest of this file does not know.
            "data_types": {"grad_accum_dtype": "fp32" if zero_stage > 1 else None},
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @staticmethod
    def shape(parameter: nn.Parameter) -> tuple[int, ...]:
        """A parameter's full shape."""
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    @contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Inside, these parameters are whole on every rank (collective)."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            yield

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds one micro-batch's gradient; `last` marks the one after which `step` follows."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def grad_norms(self) -> dict[str, float]:
        """L2 norm of the averaged gradient by parameter group, over all ranks; call between backward and step."""
        zero = self.optimizer
        squares = dict.fromkeys(self.names, 0.0)
        for i, parameters in enumerate(zero.fp16_groups if self.stage == 3 else zero.params_in_partition):
            norm = float(zero.get_grad_norm_direct(zero.averaged_gradients[i], parameters))
            # DeepSpeed reports a norm that is NaN or infinite as -1.
            squares[self.names[self._group_of(i)]] += norm**2 if norm >= 0 else math.nan
        return {name: math.sqrt(square) for name, square in squares.items()}

    def _group_of(self, partition: int) -> int:
        """ZeRO-3 cuts a group's parameters into sub-groups; below that, a group is one partition."""
        return int(self.optimizer.sub_group_to_group_id[partition]) if self.stage == 3 else partition

    def step(self) -> dict[str, float] | None:
        """One optimizer step; gradient norms by group, or None if they are not finite: then nothing is changed."""
        norms = self.grad_norms()
        if not all(math.isfinite(norm) for norm in norms.values()):
            self.drop()
            return None
        self.engine.step()
        return norms

    def drop(self) -> None:
        """Forgets the accumulated gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.stage == 3:
            self.optimizer.averaged_gradients = {}
        for i in list(self.optimizer.averaged_gradients):
            self.optimizer.averaged_gradients[i] = None
        self.engine.micro_steps += 1

    def set_learning_rates(self, factor: float, base: dict[str, float]) -> None:
        """Scales every group's base learning rate."""
        for group, name in zip(self.optimizer.param_groups, self.names, strict=True):
            group["lr"] = base[name] * factor

    def state(self, named: Iterable[tuple[str, nn.Parameter]], keep: bool = True) -> dict[str, Tensor]:
        """Full fp32 masters and Adam moments by parameter name (collective: every rank calls it; nothing is returned
        where keep is False).

        Keys `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`; independent of rank count and ZeRO stage.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.steps and self.stage < 3:
            self._link_moments()
        out = {}
        for name, parameter in named:
            master = safe_get_full_fp32_param(parameter)
            if keep:
                out["master." + name] = master.detach().cpu().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                moment = safe_get_full_optimizer_state(parameter, key) if self.steps else torch.zeros_like(master)
                if keep:
                    out[f"{key}.{name}"] = moment.detach().float().cpu().clone()
        return out

    def rest(self, keep: bool = True) -> dict[str, Tensor]:
        """The module's state dict, in which the masters may take the place of what is trained (collective). Where
        ZeRO-3 holds shards, its buffers and whole frozen parameters only; these where keep is True."""
        out: dict[str, Tensor] = self.module.state_dict()
        if self.stage < 3:
            return out
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            del out[name]
            if not parameter.requires_grad:
                with self.gathered([parameter]):
                    if keep:
                        out[name] = parameter.detach().cpu().clone()
        return out

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        for state in self.optimizer.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def load_state(self, named: Iterable[tuple[str, nn.Parameter]], tensors: dict[str, Tensor], steps: int) -> None:
        """The inverse of `state`, into an engine of any rank count."""
        import deepspeed

        named = list(named)
        if steps:
            self._create_moments(steps)
        for name, parameter in named:
            self._set(parameter, tensors["master." + name])
            # DeepSpeed refreshes the compute weights after a step; a resumed run uses and publishes them before.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.data.copy_(tensors["master." + name])
            for key in ("exp_avg", "exp_avg_sq") if steps else ():
                self._set(parameter, tensors[f"{key}.{name}"], key)

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """A parameter's master, or one of its moments, on every rank that holds a piece of it."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.stage == 3:
            # DeepSpeed's own setter fails where the ranks do not divide the parameter's size.
            piece = self.optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )[0].data
            mine = value.flatten()[torch.distributed.get_rank() * piece.numel() :][: piece.numel()]
            piece[: mine.numel()].copy_(mine)
        elif key:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            safe_set_full_fp32_param(parameter, value)

    def _create_moments(self, steps: int) -> None:
        """Adam makes its moments on the first step; a zero-gradient step at learning rate 0 makes them now."""
        optimizer = self.optimizer.optimizer
        if self.stage == 3:
            # DeepSpeed hands the optimizer its parameters for the time of a step only.
            for i, partition in enumerate(self.optimizer.fp32_partitioned_groups_flat):
                optimizer.param_groups[self._group_of(i)]["params"].append(partition)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            for parameter in group["params"]:
                parameter.grad = None
            if self.stage == 3:
                group["params"] = []
        for state in optimizer.state.values():
            state["step"] = torch.tensor(float(steps))
        if self.stage < 3:
            self._link_moments()

    def _link_moments(self) -> None:
        """Ties each parameter to its slice of the moments. DeepSpeed does it after the first group's first step, when
        the other groups have none yet."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self.optimizer
        for parameters, partition in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, partition, zero.optimizer.state)

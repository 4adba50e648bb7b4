"""Models with weights sharded over processes: FSDP2 and DeepSpeed ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def shares_out(accelerator: Any) -> bool:
    """Whether the accelerator shards weights over processes."""
    zero = accelerator.state.deepspeed_plugin
    return accelerator.distributed_type == DistributedType.FSDP or (zero is not None and zero.zero_stage == 3)


def make_ready(model: Any) -> None:
    """Prepare a model for sharding.

    TRL's fused head multiplies by the head's weights and never calls the head, so that FSDP2 neither gathers them nor
    averages their gradients over the processes: each would keep its own. The model's forward gathers them here.

    Accelerate refuses a model that names layers which it does not have, as Gemma 3 does by its tower's family.

    Args:
        model: the outermost module, before it is shared out.
    """
    model.register_forward_pre_hook(_gather_head)
    made = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = [name for name in model._no_split_modules or () if name in made]


def _gather_head(model: Any, _: tuple) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights of a model under FSDP2, so that processes may need different numbers of forwards; else nothing.

    Every process has to take part. No gradient is taken inside.
    """
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    if units:
        units[0]._get_fsdp_state()._lazy_init()  # as the first forward does, which must be that of the whole
    # There is no public way to read what `set_reshard_after_forward` sets.
    groups = [group for unit in units for group in _groups(unit._get_fsdp_state())]
    before = [group.post_forward_mesh_info for group in groups]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for group, mesh in zip(groups, before, strict=True):
            group.post_forward_mesh_info = mesh
        for unit in units:
            unit.reshard()


def _groups(state: Any) -> list[Any]:
    """Parameters that a unit shares out together; torch 2.11 knows one such group at most."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def whole(trainer: Any) -> Any:
    """The trained model with all its weights on every process, to be saved or merged and not to be run.

    Every process has to take part.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                value = _all_of(parameter)
                made[id(parameter)] = (
                    parameter if value is None else nn.Parameter(value, requires_grad=parameter.requires_grad)
                )
            module._parameters[name] = made[id(parameter)]
    load_whole()
    return model


def load_whole() -> None:
    """Models that are made or read from now on have all their weights on every process.

    Under ZeRO-3 transformers shares them out at once, even those that are never trained, while the arguments of any
    trainer last.
    """
    unset_hf_deepspeed_config()


def _all_of(parameter: nn.Parameter) -> torch.Tensor | None:
    """The whole of a parameter; None where it is whole already."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor().cpu()
    if hasattr(parameter, "ds_numel"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()
    return None

"""What spalign knows of process groups and sharded tensors; everything else sees plain local tensors."""

import sys
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "Group",
    "all_reduce_statistics",
    "full_tensor",
    "is_sharded",
    "reshard_owner",
    "shard_like",
    "sharded_along",
    "to_local",
    "world_size",
]

if TYPE_CHECKING:
    Group: TypeAlias = dist.ProcessGroup | EllipsisType | None
else:  # builds of torch without distributed have no ProcessGroup
    Group = Any


def world_size(group: Group) -> int:
    """Return how many ranks share class statistics; 1 where there is nothing to share.

    ``...`` is the default group wherever ``torch.distributed`` is initialized, ``None`` no communication at all.
    """
    if group is None or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(None if group is ... else group)


def all_reduce_statistics(sum_CD: Tensor, weight_C: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Add class sums (C, D) and weights (C,) up over the ranks in one collective.

    Summing before any state is touched makes every rank hold the same state, and one call of fixed shape per batch,
    whatever is in the batch, cannot hang (pitfalls C1, C2, C5).
    """
    packed = torch.cat([sum_CD, weight_C.unsqueeze(1)], 1)
    dist.all_reduce(packed, group=None if group is ... else group)
    return packed[:, :-1], packed[:, -1]


def reshard_owner(module: nn.Module) -> None:
    """Have FSDP2 put the sharded parameters back into ``module``, if it is FSDP2's and gathered now.

    After a forward pass without backward the root's parameters stay gathered, and what is written into them is lost
    (pitfall B2). No communication.

    Raises:
        RuntimeError: torch has moved the table of wrapped modules, so that the owner cannot be found.
    """
    if not getattr(module, "_is_fsdp_managed_module", False):
        return
    from torch.distributed.fsdp import FSDPModule

    try:
        # The one place where torch keeps them all; a module does not know who wrapped it.
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError as error:
        if any(is_sharded(p) for p in module.parameters()):
            return
        raise RuntimeError(
            "FSDP2 may hold the classifier gathered, where writing is lost; call reshard() on the FSDP module it "
            "belongs to before step()"
        ) from error
    for owner in list(_module_state_mapping):
        if isinstance(owner, FSDPModule) and any(m is module for m in owner.modules()):
            owner.reshard()


def _as_dtensor(x: Tensor) -> Any:
    """Return ``x`` if it is a ``DTensor``, else None."""
    # A DTensor exists only where its module was imported; importing it here would slow every `import spalign`.
    module = sys.modules.get("torch.distributed.tensor")
    return x if module is not None and isinstance(x, module.DTensor) else None


def is_sharded(x: Tensor) -> bool:
    """Return whether ``x`` is a ``DTensor``."""
    return _as_dtensor(x) is not None


def full_tensor(x: Tensor) -> Tensor:
    """Return the whole tensor of a ``DTensor``, differentiably; anything else as it is."""
    sharded = _as_dtensor(x)
    full: Tensor = x if sharded is None else sharded.full_tensor()
    return full


def to_local(x: Tensor) -> Tensor:
    """Return this rank's shard of a ``DTensor`` (its storage, not a copy); anything else as it is."""
    sharded = _as_dtensor(x)
    local: Tensor = x if sharded is None else sharded.to_local()
    return local


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """Cut the full tensor ``x``, equal on every rank, as the ``DTensor`` ``like`` is cut; no communication."""
    sharded = _as_dtensor(like)
    if sharded is None:
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh
    replicated = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, sharded.placements)


def sharded_along(x: Tensor, dim: int) -> bool:
    """Return whether each rank holds whole slices of ``x`` along ``dim`` (true of plain tensors)."""
    sharded = _as_dtensor(x)
    return sharded is None or all(p.is_replicate() or p.is_shard(dim) for p in sharded.placements)

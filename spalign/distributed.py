"""What spalign knows of process groups and sharded tensors; everything else sees plain local tensors.

Shapes: R ranks, N samples of the largest local batch, C classes, D feature dimensions.
"""

import sys
import weakref
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spalign import functional
from spalign.functional import BatchShare

__all__ = [
    "Exchange",
    "Group",
    "absorb_batch_",
    "full_tensor",
    "group_name",
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


# Process groups by name, because a compiled graph has no place for the objects; the trackers keep them alive.
_groups: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def group_name(group: Group) -> str:
    """Return the name by which :class:`Exchange` finds a group again; ``""`` stands for the default group.

    Raises:
        ValueError: this is no group, or, as ``new_group`` returns elsewhere, none that this rank is in.
    """
    if group is None or group is ...:
        return ""
    if not hasattr(group, "group_name"):
        raise ValueError(
            f"process_group is {group!r}, expected a process group that this rank is a member of; pass None to keep "
            "the means of this rank alone, or ... for the default group"
        )
    name = str(group.group_name)
    _groups[name] = group
    return name


# ----------------------------------------------------------------------------------------------------------------------
# Class means of several ranks
# ----------------------------------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """How the ranks of a group learn of each other's batches: one collective of fixed shape per call.

    Attributes:
        group: name of the process group, see :func:`group_name`.
        rows: samples that each rank sends, padded to this number; 0 to add up sums and weights instead.
        dtype: what features are sent as.
    """

    group: str
    rows: int
    dtype: torch.dtype

    @classmethod
    def cheapest(
        cls, mean_CD: Tensor, *, group: str, ranks: int, batch_size: int | None, feature_dtype: torch.dtype | None
    ) -> "Exchange":
        """Return the way that moves fewer bytes, by sizes that every rank knows and never by data.

        Each rank receives ``2 (R - 1) / R (C D + C) s`` bytes to add up sums and weights, and ``(R - 1) N (D e + l)``
        to gather features of e bytes and labels of l.
        """
        num_classes, dim = mean_CD.shape
        dtype = mean_CD.dtype if feature_dtype is None else feature_dtype
        if batch_size is not None:
            gathered = ranks * batch_size * (dim * dtype.itemsize + _label_dtype(dtype).itemsize)
            if gathered < 2 * num_classes * (dim + 1) * mean_CD.dtype.itemsize:
                return cls(group, batch_size, dtype)
        return cls(group, 0, dtype)

    @property
    def process_group(self) -> Any:
        """The group as ``torch.distributed`` takes it."""
        return _groups[self.group] if self.group else None


def _label_dtype(sent: torch.dtype) -> torch.dtype:
    """Return the integers that labels are sent as, whole columns beside features."""
    return torch.int64 if sent.itemsize == 8 else torch.int32


def absorb_batch_(
    mean_CD: Tensor,
    weight_C: Tensor,
    mean_sum_D: Tensor,
    features: Tensor,
    targets: Tensor,
    momentum: float | None,
    ignore_index: int,
    exchange: Exchange,
) -> BatchShare:
    """:func:`spalign.functional.update_class_means_` by the batches of all ranks; the share is of this rank's samples.

    Every rank enters the same collective on every call, empty batches included (pitfall C5), and computes the same
    bits from what comes out (C1, C2, B8). The share is multiplied by R: gradients of a loss that every rank computes in
    full are averaged over the ranks, but each rank's features exist on that rank alone (C3).
    """
    features, targets = features.detach(), targets.detach()
    if torch.compiler.is_compiling():
        arguments = (mean_CD, weight_C, mean_sum_D, features, targets, momentum, ignore_index, *exchange)
        return BatchShare.of_outputs(*_opaque_absorb(*arguments))
    with torch.no_grad():
        num_classes, ranks = len(mean_CD), dist.get_world_size(exchange.process_group)
        batch = functional._parse_batch(features, targets, num_classes, ignore_index, mean_CD.dtype)
        if exchange.rows and batch.labels is not None:
            labels_N = torch.where(batch.weight > 0, batch.labels, -1)
            h_ND, labels_N = _gather_batch(batch.h.to(exchange.dtype), labels_N, exchange)
            whole = functional._parse_batch(h_ND, labels_N, num_classes, -1, mean_CD.dtype)
            assert whole.labels is not None
            rate_N = functional._update_from_rows_(
                mean_CD, weight_C, whole, whole.labels, momentum, mean_sum_D, same_bits=True
            )
            first = dist.get_rank(exchange.process_group) * exchange.rows
            return BatchShare(rate_N[first : first + len(features)] * ranks, batch.labels)
        sum_CD, batch_weight_C = _all_reduce_statistics(*functional._batch_statistics(batch, num_classes), exchange)
        rate_C = functional._update_from_statistics_(mean_CD, weight_C, sum_CD, batch_weight_C, momentum, mean_sum_D)
        return functional._share_of_rates(batch, rate_C * ranks)


def _all_reduce_statistics(sum_CD: Tensor, weight_C: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Add class sums (C, D) and weights (C,) up over the ranks, as one buffer."""
    packed = torch.cat([sum_CD, weight_C.unsqueeze(1)], 1)
    dist.all_reduce(packed, group=exchange.process_group)
    return packed[:, :-1], packed[:, -1]


def _gather_batch(h_ND: Tensor, labels_N: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Return the features and labels of all ranks, in the order of ranks; padding has the label -1."""
    rows, dtype = exchange.rows, exchange.dtype
    num_samples, dim = h_ND.shape
    # Labels ride along as the bits of one or two more feature columns, which are copied and never computed with.
    labels = labels_N.new_full((rows, 1), -1, dtype=_label_dtype(dtype))
    labels[:num_samples, 0] = labels_N
    columns = labels.view(dtype)
    packed = h_ND.new_zeros(rows, dim + columns.shape[1])
    packed[:num_samples, :dim] = h_ND
    packed[:, dim:] = columns
    ranks = dist.get_world_size(exchange.process_group)
    gathered = packed.new_empty(ranks * rows, packed.shape[1])
    dist.all_gather_into_tensor(gathered, packed, group=exchange.process_group)
    return gathered[:, :dim], gathered[:, dim:].contiguous().view(labels.dtype)[:, 0]


@torch.library.custom_op("spalign::update_class_means_across_ranks", mutates_args=("mean", "weight", "mean_sum"))
def _opaque_absorb(
    mean: Tensor,
    weight: Tensor,
    mean_sum: Tensor,
    features: Tensor,
    targets: Tensor,
    momentum: float | None,
    ignore_index: int,
    group: str,
    rows: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The update as one node of a compiled graph, for the reason given at :func:`spalign.functional._opaque_update`."""
    exchange = Exchange(group, rows, dtype)
    return absorb_batch_(mean, weight, mean_sum, features, targets, momentum, ignore_index, exchange).outputs()


_opaque_absorb.register_fake(functional._empty_outputs)


# ----------------------------------------------------------------------------------------------------------------------
# Sharded tensors
# ----------------------------------------------------------------------------------------------------------------------


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

"""One view of every kind of classifier: rows to read, rows to write, the leaf whose gradient turns them.

C classes, D feature dimensions; ``w_CD`` is the weight as (C, D) whatever its own layout. The weight is looked up
through its module at every use, because sharding, ``load_state_dict(assign=True)`` and parametrizations replace it.
"""

from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from spalign.distributed import full_tensor, reshard_owner, shard_like, to_local

__all__ = ["Classifier", "ClassifierLike"]

_PLAIN = (Tensor, nn.Parameter)
_KEPT_ELSEWHERE = (
    "FullyShardedDataParallel (FSDP1) keeps it elsewhere: use fully_shard (FSDP2), or leave the classifier out of what "
    "FSDP1 wraps (ignored_modules)"
)

# What frameworks tie to a parameter that only mirrors the master copy which their optimizer moves: DeepSpeed, Megatron.
_OF_MASTERS = ("get_full_hp_param", "main_param")


class Leaves(NamedTuple):
    """The tensors that an optimizer moves to turn and stretch classifier rows.

    Attributes:
        direction: laid out as the weight; its rows point where the classifier's rows point.
        magnitude: row norms of a weight-normed classifier, ``None`` where ``direction`` carries them.
    """

    direction: Tensor
    magnitude: Tensor | None

    def sign(self) -> Tensor | float:
        """Return -1 where a negative magnitude turns the classifier's row against ``direction``'s, 1 elsewhere."""
        return 1.0 if self.magnitude is None else torch.where(full_tensor(self.magnitude) < 0, -1.0, 1.0)


class Classifier:
    """Adapter that shows the weight of a linear classifier as (C, D) rows.

    Everything in spalign that takes a classifier takes one of these or what it can be made from. Use it directly for a
    weight of another name or a transposed one.

    Args:
        module: ``nn.Linear``, a 1x1 ``nn.Conv2d``, any module with a 2-D weight (weight-normed ones and ``DTensor``
            weights included); or a parameter or fixed tensor itself.
        weight: attribute of ``module`` that holds the weight. Ignored for a tensor.
        class_dim: which dimension of the weight counts the classes: 0 for (C, D), 1 for (D, C).

    Raises:
        ValueError: there is no such attribute, it is not a float matrix, or ``class_dim`` is not 0 or 1.

    Example:
        >>> import torch, spalign
        >>> class CosineHead(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.prototypes = torch.nn.Parameter(torch.randn(64, 10))
        >>> head = spalign.Classifier(CosineHead(), weight="prototypes", class_dim=1)
        >>> head.num_classes, head.feature_dim
        (10, 64)
    """

    def __init__(self, module: nn.Module | Tensor, weight: str = "weight", class_dim: int = 0) -> None:
        if not isinstance(module, (nn.Module, Tensor)):
            raise ValueError(
                f"the classifier is a {type(module).__name__}, expected a module with a weight or a tensor; "
                "pass the last layer itself, for example model.fc"
            )
        if class_dim not in (0, 1):
            raise ValueError(f"class_dim is {class_dim!r}, expected 0 for a (C, D) weight or 1 for a (D, C) one")
        # Of a compiled module the one inside, whose weight norm has its hooks there.
        self.module: nn.Module | Tensor = getattr(module, "_orig_mod", module)
        self.weight_name = weight
        self.class_dim = class_dim
        self._check()

    @classmethod
    def of(cls, classifier: "ClassifierLike") -> "Classifier":
        """Return ``classifier`` itself if it is an adapter, else an adapter of it with the default layout."""
        return classifier if isinstance(classifier, Classifier) else cls(classifier)

    @property
    def shape(self) -> tuple[int, int]:
        """(C, D)."""
        shape = self._shape
        return shape[self.class_dim], shape[1 - self.class_dim]

    @property
    def num_classes(self) -> int:
        """C."""
        return self.shape[0]

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weight is now."""
        return self._stored().device

    @property
    def fixed(self) -> bool:
        """Whether no optimizer can move the weight: a plain tensor, a buffer, or a frozen parameter."""
        if self._parametrized():
            return not any(p.requires_grad for p in self._parametrizations().parameters())
        return not self._stored().requires_grad

    @property
    def mirrors_master(self) -> bool:
        """Whether a framework has marked the weight as one that it overwrites by a master copy at each step (B7)."""
        return any(getattr(self._stored(), name, None) is not None for name in _OF_MASTERS)

    def require_trainable(self, action: str) -> None:
        """Raise ValueError if the weight is fixed or its rows cannot be reached; ``action`` completes "cannot be"."""
        self._require_own(action)
        if self.fixed:
            raise ValueError(
                f"{self} is fixed (a plain tensor, a buffer or a frozen parameter), so it cannot be {action}; align "
                "the features to it instead, with SpARegLoss(classifier, tracker, align='features')"
            )

    def require_writable(self) -> None:
        """Raise ValueError if rows that are written would be lost."""
        self.require_trainable("rotated")
        if self._parametrized() and self._weight_norm() is None:
            for parametrization in self._parametrizations():
                if not hasattr(parametrization, "right_inverse"):
                    raise ValueError(
                        f"the weight of {self} is parametrized by {type(parametrization).__name__}, expected one with "
                        "a right_inverse, through which rows are written; give it one, or align with SpARegLoss"
                    )

    def _require_own(self, action: str, as_leaf: bool = False) -> None:
        """Raise ValueError if the weight is made anew in every forward pass, which undoes what is written into it.

        A part of a parameter can be written to, but has no gradient of its own: refused ``as_leaf``.
        """
        module, name = self.module, self.weight_name
        own = {} if isinstance(module, Tensor) else module._parameters
        if name in own or self._parametrized() or self._weight_norm() is not None:
            return
        weight = self._present(self._weight())
        held = weight._base if weight._is_view() and not as_leaf else weight
        # Without gradients what a property computes is a leaf, but another at every look; and so is what hooks keep as
        # an attribute, and name by what they compute it from.
        kept = weight.is_leaf and weight is self._weight() and f"{name}_orig" not in own
        if kept or isinstance(held, nn.Parameter):
            return
        source = next((n for n, p in own.items() if p is not None and p.shape == weight.shape), None)
        layout = ", class_dim=1" if self.class_dim == 1 else ""
        raise ValueError(
            f"the weight of {self} is computed in each forward pass, as by pruning, spectral norm or a property, "
            f"expected a parameter: what is computed cannot be {action}; name the parameter that it is made from, "
            f"spalign.Classifier(module, weight={'...' if source is None else repr(source)}{layout})"
        )

    def reshard(self) -> None:
        """Bring back the parameters that the optimizer holds, where FSDP2 has gathered ones in their place.

        To be called before rows are read to be written: gathered ones may be of lower precision, and are thrown away.
        """
        if isinstance(self.module, nn.Module):
            reshard_owner(self.module)

    def rows(self) -> Tensor:
        """Return the weight as (C, D), in its own dtype, inside the autograd graph; sharded weights are gathered."""
        normed = self._weight_norm()
        if normed is None:
            return self.as_rows(full_tensor(self._present(self._weight())))
        # Computed here: what the layer holds may belong to the graph of an earlier forward pass, or be sharded.
        direction, magnitude, dim = normed
        return self.as_rows(torch._weight_norm(full_tensor(self._present(direction)), full_tensor(magnitude), dim))

    def as_rows(self, x: Tensor) -> Tensor:
        """View a tensor laid out as the weight as (C, D)."""
        if x.ndim > 2:
            x = x[(slice(None), slice(None)) + (0,) * (x.ndim - 2)]
        return x.t() if self.class_dim == 1 else x

    def as_stored(self, x_CD: Tensor) -> Tensor:
        """View (C, D) rows in the layout of the weight."""
        x = x_CD.t() if self.class_dim == 1 else x_CD
        return x if self._ndim == 2 else x[(...,) + (None,) * (self._ndim - 2)]

    def localize(self, x: Tensor) -> Tensor:
        """Cut (C, D) or (C, 1) values that every rank holds to the rows of this rank's shard of the weight."""
        return self.as_rows(to_local(shard_like(self.as_stored(x), self._stored())))

    def same_weight(self, other: "Classifier") -> bool:
        """Return whether both stand for one weight."""
        return self._stored() is other._stored()

    def leaves(self, *, to_write: bool = False) -> Leaves:
        """Return the tensors whose gradients turn and stretch the rows, or those to write rows into.

        Raises:
            ValueError: the weight has a parametrization other than weight norm with one norm per class, or is computed
                in each forward pass.
        """
        normed = self._weight_norm()
        if normed is None:
            if self._parametrized():
                names = ", ".join(type(p).__name__ for p in self._parametrizations())
                raise ValueError(
                    f"the weight of {self} is parametrized by {names}, expected none or weight norm: its gradient does "
                    "not act on rows; use SpARegLoss, or spalign.functional.project_gradient where you hold a row "
                    "gradient"
                )
            self._require_own("rotated" if to_write else "projected", as_leaf=not to_write)
            return Leaves(self._present(self._weight()), None)
        direction, magnitude, dim = normed
        if dim != self.class_dim:
            raise ValueError(
                f"weight norm of {self} has dim={dim}, expected dim={self.class_dim}: one norm per class, so that rows "
                "keep their direction when norms change"
            )
        return Leaves(self._present(direction), magnitude)

    @torch.no_grad()
    def write(self, new_CD: Tensor, changed_C: Tensor | None = None) -> None:
        """Replace rows, in place, by values that every rank holds; unchanged rows keep every bit.

        Weight norm gets the directions into v, whose own norms stay, and the norms into g. Other parametrizations are
        assigned through their ``right_inverse``.

        Args:
            new_CD: (C, D), equal to :meth:`rows` where ``changed_C`` is False.
            changed_C: (C,) bool; every row if not given.
        """
        self.reshard()
        if self._weight_norm() is None and self._parametrized():
            setattr(self.module, self.weight_name, self.as_stored(new_CD))
            return
        leaves = self.leaves(to_write=True)
        direction, magnitude = leaves
        stored = self.as_stored(new_CD)
        if magnitude is not None:
            changed_C = new_CD.new_ones(len(new_CD), dtype=torch.bool) if changed_C is None else changed_C
            changed, sign = self.as_stored(changed_C.unsqueeze(1)), leaves.sign()
            norm, old = torch.norm_except_dim(stored, 2, self.class_dim), full_tensor(direction)
            scale = sign * torch.norm_except_dim(old, 2, self.class_dim) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            magnitude.copy_(shard_like(torch.where(changed, norm * sign, full_tensor(magnitude)), magnitude))
            stored = torch.where(changed, stored * scale, old)
        direction.copy_(shard_like(stored, direction))
        if magnitude is not None and not self._parametrized():
            # Old weight norm keeps the product as an attribute, and recomputes it at the next forward pass only.
            setattr(self.module, self.weight_name, torch._weight_norm(direction, magnitude, self.class_dim))

    def _weight(self) -> Tensor:
        weight = self.module if isinstance(self.module, Tensor) else getattr(self.module, self.weight_name)
        return cast(Tensor, weight)

    def _present(self, weight: Tensor) -> Tensor:
        """Return the stored weight, or raise ValueError where FSDP1 has flattened it or taken its memory away (B2)."""
        there = weight.shape == self._shape
        # Transformed tensors are of the plain type too, and have no memory to ask for; nor have those of some devices.
        if there and type(weight) in _PLAIN and not torch.compiler.is_compiling() and torch._C._has_storage(weight):
            there = weight.untyped_storage().size() > 0
        if not there:
            now = f"shape {tuple(weight.shape)}{' and no memory' if weight.shape == self._shape else ''}"
            raise ValueError(
                f"the weight of {self} has {now}, expected {tuple(self._shape)} as at first; "
                f"{_KEPT_ELSEWHERE}. If the layer itself was changed, build the objects of spalign anew"
            )
        return weight

    def _stored(self) -> Tensor:
        """The weight or, for weight norm, its direction leaf: same layout, no computation."""
        normed = self._weight_norm()
        return self._weight() if normed is None else normed[0]

    def _parametrized(self) -> bool:
        return isinstance(self.module, nn.Module) and parametrize.is_parametrized(self.module, self.weight_name)

    def _parametrizations(self) -> parametrize.ParametrizationList:
        lists = cast(nn.ModuleDict, cast(nn.Module, self.module).parametrizations)
        return cast(parametrize.ParametrizationList, lists[self.weight_name])

    def _weight_norm(self) -> tuple[Tensor, Tensor, int] | None:
        """Return direction v, magnitude g and dim of a weight-normed weight ``g v / |v|``, of either kind."""
        if isinstance(self.module, Tensor):
            return None
        if self._parametrized():
            found = self._parametrizations()
            if len(found) == 1 and isinstance(found[0], _WeightNorm):
                return cast(Tensor, found.original1), cast(Tensor, found.original0), found[0].dim
            return None
        for hook in self.module._forward_pre_hooks.values():
            # The deprecated torch.nn.utils.weight_norm; its module is shadowed by the function of the same name.
            if type(hook).__name__ == "WeightNorm" and getattr(hook, "name", None) == self.weight_name:
                v, g = (cast(Tensor, getattr(self.module, f"{self.weight_name}_{leaf}")) for leaf in "vg")
                return v, g, cast(int, getattr(hook, "dim"))  # noqa: B009
        return None

    def _check(self) -> None:
        what = type(self.module).__name__
        if isinstance(self.module, nn.Module) and not hasattr(self.module, self.weight_name):
            raise ValueError(
                f"{what} has no attribute {self.weight_name!r}, expected the layer that maps features to logits; pass "
                "that layer (for example model.fc), or spalign.Classifier(module, weight=...) for another name"
            )
        weight = self._stored()
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"{what}.{self.weight_name} is {weight!r}, expected a weight tensor of shape (C, D); name the "
                "attribute that holds it: spalign.Classifier(module, weight=...)"
            )
        if isinstance(weight, UninitializedParameter):
            raise ValueError(
                f"{what}.{self.weight_name} is uninitialized, expected a weight of known shape; run one forward pass "
                "before building spalign objects"
            )
        shape = tuple(weight.shape)
        if weight.ndim < 2 or any(n != 1 for n in shape[2:]) or not weight.is_floating_point():
            raise ValueError(
                f"{what}.{self.weight_name} has shape {shape} and dtype {weight.dtype}, expected a float matrix "
                "(C, D), or (C, D, 1, 1) of a 1x1 convolution; pass the layer that maps features to logits"
                + (f". {_KEPT_ELSEWHERE}" if weight.ndim == 1 else "")
            )
        self._ndim, self._shape = weight.ndim, weight.shape
        if 0 in shape:
            raise ValueError(f"{what}.{self.weight_name} has shape {shape}, expected at least one class and feature")

    def __repr__(self) -> str:
        name = "" if isinstance(self.module, Tensor) else f".{self.weight_name}"
        c, d = self.shape
        return f"Classifier({type(self.module).__name__}{name}, {c} classes x {d} features)"


ClassifierLike: TypeAlias = nn.Module | Tensor | Classifier
"""What spalign accepts as a classifier: a layer, its weight, or an adapter."""

"""Running class means of features: the one state that the three strategies share."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from spalign import distributed, functional, host, kernels
from spalign.classifier import Classifier, ClassifierLike
from spalign.distributed import Exchange, Group
from spalign.functional import BatchShare

__all__ = ["ClassMeanTracker"]

_HALF = (torch.float16, torch.bfloat16)


class ClassMeanTracker(nn.Module):
    """Running mean of the features of each class.

    ``mean[y_i] += r[y_i] (h_i - mean[y_i])`` with ``r_c = momentum / n_c``, ``1 / n_c`` at a class's first
    observation, or ``1 / (N_c + n_c)`` for ``momentum=None``; n_c is the batch's count of the class, N_c the count
    before. For class indices a call costs O(N D), whatever the number of classes, and never waits for the device.

    Exactly one call per batch feeds a tracker: :meth:`update`, or the forward pass of the :class:`SpARegLoss` that
    holds it. Everything else only reads.

    Args:
        num_classes: C.
        feature_dim: D, the width of the classifier's input.
        momentum: weight of the new value in (0, 1], as in BatchNorm (not an EMA decay); ``None`` for the exact mean of
            everything seen.
        ignore_index: label of samples to pass over.
        process_group: ranks that share the means. ``...`` is the default group wherever ``torch.distributed`` is
            initialized, ``None`` keeps the means of this rank alone.
        batch_size: the most samples that any rank takes in at once (dense predictions count each position), the same on
            all ranks. With it, ranks exchange features and labels, padded to this size, where that moves fewer bytes
            than class sums do: roughly where C exceeds half of all ranks' samples. Without it, class sums.
        feature_dtype: what features are sent as where they are exchanged, the same on all ranks: what the model
            computes in, for example ``torch.bfloat16``. The state's dtype if not given.
        device: where the state lives.

    Attributes:
        mean: (C, D) float32 buffer; rows of unseen classes are zero.
        weight: (C,) float32 buffer, the total sample weight of each class; 0 marks an unseen class.

    To set both by hand use ``load_state_dict({"mean": mean, "weight": weight})``: written into, they leave the sum of
    the means behind, which ``center`` comes from.

    Raises:
        ValueError: a size, the momentum or the feature dtype is out of range, this rank is not in the group, or the
            device has no float64.

    Several ranks: every rank calls the same number of times, with the same kind of targets (class indices, or soft
    labels, which always go by class sums); batches may be uneven or empty. A rank that raises an error alone leaves the
    others waiting in the collective until it exits, or until the process group's timeout.

    Checkpoint behavior: all state is in buffers, so an update after ``load_state_dict`` continues bit for bit. Without
    it every class is unseen, and each strategy does nothing for a class until it is seen again.

    Dtypes: features of any float dtype come in; the state is float32 and stays so under ``half()`` and ``bfloat16()``.
    ``double()`` makes state and maths float64.

    Example:
        >>> import torch, spalign
        >>> tracker = spalign.ClassMeanTracker(num_classes=3, feature_dim=2)
        >>> tracker.update(torch.tensor([[1., 0.], [3., 0.], [0., 4.]]), torch.tensor([0, 0, 2]))
        >>> tracker.mean.tolist(), tracker.seen.tolist()
        ([[2.0, 0.0], [0.0, 0.0], [0.0, 4.0]], [True, False, True])
    """

    mean: Tensor
    weight: Tensor
    mean_sum: Tensor

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        momentum: float | None = 0.1,
        ignore_index: int = -100,
        process_group: Group = ...,
        batch_size: int | None = None,
        feature_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("feature_dim", feature_dim)):
            if not functional._is_count(value, 1):
                raise ValueError(f"{name} is {value!r}, expected a positive integer; read it off the classifier weight")
        if batch_size is not None and not functional._is_count(batch_size, 1):
            raise ValueError(
                f"batch_size is {batch_size!r}, expected a positive integer, the most samples that a rank takes in at "
                "once, or None"
            )
        if feature_dtype is not None and feature_dtype not in (*_HALF, torch.float32, torch.float64):
            raise ValueError(
                f"feature_dtype is {feature_dtype!r}, expected a float dtype of 16, 32 or 64 bits, or None"
            )
        if momentum is not None and not (functional._is_number_in(momentum, 0.0, 1.0) and momentum > 0.0):
            raise ValueError(
                f"momentum is {momentum!r}, expected a number in (0, 1], the weight of the new value, or None for the "
                "exact cumulative mean; for an EMA decay d pass 1 - d"
            )
        try:
            self.ignore_index = operator.index(ignore_index)
        except TypeError:
            raise ValueError(
                f"ignore_index is {ignore_index!r}, expected an integer; to pass over no sample leave it at -100, "
                "which no label equals"
            ) from None
        self.num_classes = int(num_classes)
        self.feature_dim = int(feature_dim)
        self.momentum = None if momentum is None else float(momentum)
        self.process_group = process_group
        self.batch_size = None if batch_size is None else int(batch_size)
        self.feature_dtype = feature_dtype
        self._group_name = distributed.group_name(process_group)
        with torch.inference_mode(False):  # what is made in that mode cannot be written outside of it
            self.register_buffer("mean", torch.zeros(num_classes, feature_dim, device=device, dtype=torch.float32))
            self.register_buffer("weight", torch.zeros(num_classes, device=device, dtype=torch.float32))
            try:
                self.register_buffer("mean_sum", torch.zeros(feature_dim, device=device, dtype=torch.float64))
            except TypeError as error:  # of Apple's MPS
                raise ValueError(
                    f"device is {self.mean.device}, which has no float64, expected one that has, for the sum of the "
                    "class means; keep the classifier and this on the CPU or on CUDA"
                ) from error

    @classmethod
    def for_classifier(
        cls,
        classifier: ClassifierLike,
        *,
        momentum: float | None = 0.1,
        ignore_index: int = -100,
        process_group: Group = ...,
        batch_size: int | None = None,
        feature_dtype: torch.dtype | None = None,
    ) -> Self:
        """Return a tracker with the classifier's C and D, on the classifier's device.

        Example:
            >>> import torch, spalign
            >>> tracker = spalign.ClassMeanTracker.for_classifier(torch.nn.Linear(64, 10))
            >>> tracker.mean.shape
            torch.Size([10, 64])
        """
        adapter = Classifier.of(classifier)
        num_classes, feature_dim = adapter.shape
        return cls(
            num_classes,
            feature_dim,
            momentum=momentum,
            ignore_index=ignore_index,
            process_group=process_group,
            batch_size=batch_size,
            feature_dtype=feature_dtype,
            device=adapter.device,
        )

    @property
    def seen(self) -> Tensor:
        """(C,) bool, the classes that have a mean."""
        return self.weight > 0

    @property
    def center(self) -> Tensor:
        """(D,) global mean ``mu_G``, the mean of the class means over the classes seen; no pass over (C, D)."""
        return self._geometry()[2]

    def directions(self) -> Tensor:
        """Return ``mu_hat`` (C, D), unit rows of mean minus global mean; zero rows for classes without a direction."""
        mean_CD, alignable_C, center_D = self._geometry()
        return functional.directions(mean_CD, alignable_C, center_D=center_D)

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Take in a batch, whatever the training mode.

        Args:
            features: (N, D) or, for dense prediction, (N, D, ...); any float dtype.
            targets: (N,) or (N, ...) integer class indices, or (N, C) or (N, C, ...) float soft labels. Of a soft
                label each row's floor is ignored, so smoothing changes nothing; mixed samples count for each of their
                classes by weight (where C is 2 for the heavier alone, as the lighter is the floor). With momentum a
                class moves as far for a weight of 0.1 in the batch as for 100 samples, so the softmax of a teacher lets
                other classes wash over those absent from a batch: pass the hard labels in distillation.

        Rows with a non-finite value, or too long for their squared length to be finite, and samples labelled
        ``ignore_index`` change nothing. So do labels outside [0, C) on accelerators, where checking them would wait for
        the device.

        Raises:
            ValueError: wrong shape, dtype or device, or, on the CPU, a label outside [0, C). No state is changed.
        """
        self._absorb(*self._checked(features, targets))

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Take in a batch in training mode, and return the means (C, D), differentiable by the features.

        The gradient is that of the update, ``mu'_c = mu_c + r_c sum_i (h_i - mu_c)``; with several ranks it is scaled
        so that averaged gradients equal those of one process (pitfall C3). The result is a copy: later updates do not
        touch it. In evaluation mode the state is returned as it is. Arguments and errors as :meth:`update`.
        """
        flat_ND, flat_targets, usable = self._checked(features, targets)
        if not self.training:
            return self.mean.clone()
        share = self._absorb(flat_ND, flat_targets, usable)
        return functional.attach_features(self.mean, flat_ND, share)

    def reset(self) -> None:
        """Forget every class, in place."""
        for buffer in (self.mean, self.weight, self.mean_sum):
            buffer.zero_()

    def train(self, mode: bool = True) -> Self:
        """Set the training mode. Leaving it sums the class means afresh, which keeps rounding out of ``center``.

        Not where ranks share the means: one that validates alone would no longer hold the others' bits.
        """
        if self.training and not mode and distributed.world_size(self.process_group) == 1:
            self._sum_means()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, feature_dim={self.feature_dim}, momentum={self.momentum}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy for weight averaging and the like; process groups cannot be copied and are shared."""
        if self._group_name:
            memo[id(self.process_group)] = self.process_group
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow device moves and ``double()``, but let no conversion put the state into fewer bits than it needs."""

        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            narrowed = out.dtype in _HALF or t is self.mean_sum
            return t.to(out.device) if narrowed and out.dtype != t.dtype else out

        with torch.inference_mode(False):
            super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self

    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return means (C, D), weights (C,) and the sum of the means (D,)."""
        state: Any = self._buffers  # which is faster than a module's attributes
        return state["mean"], state["weight"], state["mean_sum"]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load, and sum the means afresh where their saved sum is missing or rounded, or they were rounded."""
        dtypes = {"mean": self.mean.dtype, "weight": self.weight.dtype}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, dtype in dtypes.items():  # with assign=True
            loaded: Tensor = getattr(self, name)
            if loaded.dtype in _HALF:
                setattr(self, name, loaded.to(dtype))
        mean, mean_sum = state_dict.get(f"{prefix}mean"), state_dict.get(f"{prefix}mean_sum")
        if mean is None or (mean_sum is not None and mean_sum.dtype is torch.float64 and mean.dtype is self.mean.dtype):
            return
        if mean_sum is None and f"{prefix}mean_sum" in missing_keys:
            missing_keys.remove(f"{prefix}mean_sum")
        self._sum_means()

    @torch.no_grad()
    def _sum_means(self) -> None:
        sum_D = self.mean.sum(0, dtype=torch.float64)
        if (self.mean_sum.dtype, self.mean_sum.device) == (sum_D.dtype, sum_D.device):
            self.mean_sum.copy_(sum_D)
        else:  # loaded with assign=True
            self.mean_sum = sum_D

    def _geometry(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the functions of :mod:`spalign.functional` take: means (C, D), classes to align (C,), mu_G (D,).

        A single class lies on the global mean to within rounding, which would pass for a direction: none is returned.
        """
        mean_CD, weight_C, mean_sum_D = self._state()
        if kernels.can_read(mean_CD, weight_C, mean_sum_D):
            return mean_CD, *kernels.geometry(weight_C, mean_sum_D)
        seen_C = weight_C > 0
        if not torch.compiler.is_compiling() and type(seen_C) is Tensor and host.can_read(mean_CD):
            count = np.count_nonzero(seen_C.numpy())
            center_D = torch.from_numpy((mean_sum_D.numpy() / max(count, 1)).astype(mean_CD.numpy().dtype))
            return mean_CD, seen_C if count > 1 else torch.zeros_like(seen_C), center_D
        num_seen = seen_C.sum()
        center_D = (mean_sum_D / num_seen.clamp(min=1)).to(mean_CD.dtype)
        return mean_CD, seen_C & (num_seen > 1), center_D

    def _absorb(self, features: Tensor, targets: Tensor, usable: bool, *, add_up: bool = True) -> BatchShare:
        """Take in a batch that passed :meth:`_checked`. Return how far each sample moved the means.

        Without ``add_up``, the sum of the means may be left to the caller.
        """
        mean_CD, weight_C, mean_sum_D = self._state()
        batch = features, targets, self.momentum, self.ignore_index
        ranks = distributed.world_size(self.process_group)
        if ranks > 1:
            self._check_fits(features)
            exchange = Exchange.cheapest(
                mean_CD,
                group=self._group_name,
                ranks=ranks,
                batch_size=self.batch_size,
                feature_dtype=self.feature_dtype,
            )
            return distributed.absorb_batch_(mean_CD, weight_C, mean_sum_D, *batch, exchange)
        return functional._absorb_batch_(mean_CD, weight_C, mean_sum_D if add_up else None, *batch, usable)

    def _check_fits(self, features: Tensor) -> None:
        """Raise ValueError if a batch is not what was announced to the other ranks."""
        if self.batch_size is None:
            return
        if len(features) > self.batch_size:
            raise ValueError(
                f"this rank takes in {len(features)} samples, expected at most batch_size = {self.batch_size}; build "
                "the tracker with the largest batch of any rank"
            )
        sent = self.feature_dtype
        if sent is not None and len(features) > 0 and torch.promote_types(features.dtype, sent) is not sent:
            raise ValueError(
                f"features have dtype {features.dtype}, expected what fits into feature_dtype = {sent}; build the "
                "tracker with the dtype that the model computes in"
            )

    def _checked(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Check a batch, or raise ValueError.

        Returns:
            features (N, D) and targets (N,) or (N, C), dense predictions flattened; and whether all targets are known
            to be class indices in [0, C), none of them to be ignored.
        """
        shape, dim = features.shape, self.feature_dim
        if len(shape) < 2 or shape[1] != dim:
            transposed = len(shape) > 1 and shape[1] == self.num_classes
            raise ValueError(
                f"features have shape {tuple(shape)}, expected (N, {dim}) or (N, {dim}, ...): pass what the classifier "
                "takes in (spalign.FeatureCapture records it), feature dimension second"
                + ("; of a classifier with a (D, C) weight, spalign.Classifier(module, class_dim=1)" * transposed)
            )
        if not features.is_floating_point():
            raise ValueError(f"features have dtype {features.dtype}, expected a float dtype; pass features.float()")
        soft = targets.is_floating_point()
        if targets.dtype is torch.bool or targets.is_complex():
            raise ValueError(f"targets have dtype {targets.dtype}, expected integer class indices or float soft labels")
        expected = (shape[0], self.num_classes, *shape[2:]) if soft else (shape[0], *shape[2:])
        if targets.shape != expected:
            pooled = len(shape) > 2 and features.numel() == shape[0] * dim and (*targets.shape, *shape[2:]) == expected
            raise ValueError(
                f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype}, expected {expected} for "
                f"features of shape {tuple(shape)}: class indices as integers (N, ...), soft labels as floats "
                "(N, C, ...)" + ("; of pooled features pass features.flatten(1)" * pooled)
            )
        device = self._state()[0].device
        if features.device != device or targets.device != device:
            self._check_device("features are", features)
            self._check_device("targets are", targets)
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "class means are a running state, which functions that torch.func transforms cannot write; take in the "
                "batch outside of them, and inside use what spalign.functional has"
            )
        usable = not compiling and type(targets) is Tensor and targets.is_cpu and self._check_values(targets)
        if len(shape) > 2:
            features = features.movedim(1, -1).reshape(-1, dim)
            targets = targets.movedim(1, -1).reshape(-1, self.num_classes) if soft else targets.reshape(-1)
        return features, targets, usable

    def _check_device(self, what: str, tensor: Tensor) -> None:
        if tensor.device != self.mean.device:
            if self.mean.is_meta:
                raise ValueError(
                    f"{what} on {tensor.device} but the class means on meta, where they hold nothing, expected one "
                    f"device; call .to_empty(device={str(tensor.device)!r}) on the tracker and then its reset()"
                )
            raise ValueError(
                f"{what} on {tensor.device} but the class means on {self.mean.device}, expected one device; move the "
                f"tracker (or the loss that holds it) with .to({str(tensor.device)!r})"
            )

    def _check_classifier(self, classifier: Classifier) -> None:
        if classifier.shape != (self.num_classes, self.feature_dim):
            raise ValueError(
                f"{classifier} does not fit a tracker of {self.num_classes} classes x {self.feature_dim} features, "
                "expected equal sizes; build it with ClassMeanTracker.for_classifier(classifier), or name a transposed "
                "weight's layout with spalign.Classifier(module, class_dim=1)"
            )

    def _check_values(self, targets: Tensor) -> bool:
        """Refuse targets out of range, and return whether all are class indices to take in.

        On the CPU only, and through numpy: a device would have to be waited for.
        """
        if targets.numel() == 0:
            return False
        if targets.is_floating_point():
            lowest = float(np.fmin.reduce(targets.detach().double().resolve_neg().numpy(), axis=None))
            if lowest < 0:
                raise ValueError(f"soft labels contain {lowest:.6g}, expected weights of at least 0")
            return False
        ignored, c = self.ignore_index, self.num_classes
        if host.all_within(targets, c):
            return not 0 <= ignored < c
        labels = targets.numpy()
        wrong = labels[((labels < 0) | (labels >= c)) & (labels != ignored)]
        if wrong.size:
            raise ValueError(
                f"targets contain the label {wrong.flat[0]}, expected 0 to {c - 1} or ignore_index = {ignored}; "
                "relabel, or build the tracker with the classifier's num_classes"
            )
        return False

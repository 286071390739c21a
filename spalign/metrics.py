"""Neural collapse of features and classifier, NC1 to NC4 and alignment: functions of tensors, and one streaming class.

Every class seen counts the same, whatever its number of samples, and unseen classes count nowhere; on balanced data
these are the metrics of Papyan, Han and Donoho (2020). Below two classes seen there is nothing to compare: NaN. Sums
are float64, no gradient flows, and nothing waits for the device but the pseudo-inverse of :func:`nc1_pinv` on CUDA.

Shapes: N samples, C classes, S of them seen, D feature dimensions. ``d_c = mu_c - mu_G`` with ``mu_G`` the mean of the
class means seen; ``seen_C`` is bool. Equation numbers are those of *Space Alignment Matters*.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spalign import distributed, functional
from spalign.classifier import Classifier, ClassifierLike
from spalign.distributed import Exchange, Group
from spalign.tracker import ClassMeanTracker

__all__ = [
    "ClassMoments",
    "NeuralCollapse",
    "class_moments",
    "nc1_pinv",
    "nc1_trace",
    "nc2_angles",
    "nc2_norms",
    "nc3",
    "nc4",
]

# Outer products of features are formed for so many entries at once: 128 MiB.
_MAX_ENTRIES = 2**24


class ClassMoments(NamedTuple):
    """First and second moments of each class's features, float64.

    Attributes:
        weight: (C,) number of samples; 0 marks an unseen class.
        mean: (C, D), zero for unseen classes.
        scatter: ``sum_i |h_i - mu_c|^2`` (C,), or ``sum_i (h_i - mu_c)(h_i - mu_c)'`` (C, D, D).
    """

    weight: Tensor
    mean: Tensor
    scatter: Tensor

    @property
    def seen(self) -> Tensor:
        """(C,) bool, the classes that have a mean."""
        return self.weight > 0

    def covariance(self) -> Tensor:
        """Return each class's scatter over its number of samples; zero for unseen classes."""
        return self.scatter / _like(self.weight.clamp(min=1.0), self.scatter)

    def merge(self, other: "ClassMoments") -> "ClassMoments":
        """Return the moments of both sets of samples together (Chan, Golub and LeVeque, 1983)."""
        weight_C = self.weight + other.weight
        share_C = other.weight / weight_C.clamp(min=1.0)
        apart_CD = other.mean - self.mean
        between = _squares(apart_CD, self.scatter) * _like(self.weight * share_C, self.scatter)
        mean_CD = self.mean + apart_CD * share_C.unsqueeze(1)
        return ClassMoments(weight_C, mean_CD, self.scatter + other.scatter + between)


def _like(x_C: Tensor, scatter: Tensor) -> Tensor:
    """View (C,) so that it multiplies a scatter of either form."""
    return x_C.reshape(-1, *(1,) * (scatter.ndim - 1))


def _squares(x_ND: Tensor, scatter: Tensor) -> Tensor:
    """Return squared lengths (N,) or outer products (N, D, D), whichever the scatter sums."""
    return functional._dots(x_ND, x_ND) if scatter.ndim == 1 else x_ND.unsqueeze(2) * x_ND.unsqueeze(1)


def _parse(features: Tensor, targets: Tensor, num_classes: int, ignore_index: int) -> functional._Batch:
    if targets.is_floating_point():
        raise ValueError(
            f"targets have dtype {targets.dtype}, expected integer class indices: a mixed sample lies within no class; "
            "measure on samples that are not mixed, and pass their labels"
        )
    functional._check_batch(features, targets, num_classes)
    return functional._parse_batch(features, targets, num_classes, ignore_index, torch.float64)


def _moments(batch: functional._Batch, num_classes: int, covariance: bool) -> ClassMoments:
    sum_CD, weight_C = functional._batch_statistics(batch, num_classes)
    mean_CD, dim = sum_CD / weight_C.clamp(min=1.0).unsqueeze(1), sum_CD.shape[1]
    scatter = sum_CD.new_zeros(num_classes, dim, dim) if covariance else torch.zeros_like(weight_C)
    chunk = max(1, _MAX_ENTRIES // dim**2 if covariance else len(batch.h))
    assert batch.labels is not None
    for h_ND, weight_N, labels_N in zip(*(x.split(chunk) for x in (batch.h, batch.weight, batch.labels)), strict=True):
        apart_ND = torch.where(weight_N.unsqueeze(1) > 0, h_ND - mean_CD.index_select(0, labels_N), 0.0)
        scatter.index_add_(0, labels_N, _squares(apart_ND, scatter))
    return ClassMoments(weight_C, mean_CD, scatter)


def _mean_over(x_C: Tensor, seen_C: Tensor) -> Tensor:
    """Return the mean of ``x_C`` over the classes seen; NaN for fewer than two."""
    num_seen = seen_C.sum()
    return torch.where(num_seen > 1, torch.where(seen_C, x_C, 0.0).sum() / num_seen, torch.nan)


def _centered(mean_CD: Tensor, seen_C: Tensor) -> Tensor:
    """Return d_CD float64, zero for unseen classes."""
    d_CD = mean_CD.double()
    # Once more, for what rounding leaves of a common offset: it would pass for one more dimension of the means.
    for _ in range(2):
        d_CD = torch.where(seen_C.unsqueeze(1), d_CD - functional.global_mean(d_CD, seen_C), 0.0)
    return d_CD


@torch.no_grad()
def class_moments(
    features: Tensor, targets: Tensor, num_classes: int, *, covariance: bool = False, ignore_index: int = -100
) -> ClassMoments:
    """Return number, mean and scatter of each class's features: what NC1 is made of. Those of parts can be merged.

    Args:
        features: (N, D), any float dtype.
        targets: (N,) integer class indices.
        num_classes: C.
        covariance: scatter matrices, (C, D, D), which :func:`nc1_pinv` needs, instead of their traces.
        ignore_index: label of samples to pass over. Labels outside [0, C) and rows with a non-finite value are too.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> moments = class_moments(torch.tensor([[1., 0.], [3., 0.], [0., 5.]]), torch.tensor([0, 0, 1]), 3)
        >>> moments.weight.tolist(), moments.mean.tolist(), moments.scatter.tolist()
        ([2.0, 1.0, 0.0], [[2.0, 0.0], [0.0, 5.0], [0.0, 0.0]], [2.0, 0.0, 0.0])
    """
    return _moments(_parse(features, targets, num_classes, ignore_index), num_classes, covariance)


@torch.no_grad()
def nc1_trace(moments: ClassMoments) -> Tensor:
    """Return ``tr(Sigma_W) / tr(Sigma_B)``, within-class over between-class variability (Tirer et al., 2023).

    ``Sigma_W = 1/S sum_c 1/n_c sum_i (h_i - mu_c)(h_i - mu_c)'`` (Eq. 2, printed for equal n) and
    ``Sigma_B = 1/S sum_c d_c d_c'``. 0 is collapse.

    Example:
        >>> import torch
        >>> nc1_trace(class_moments(torch.tensor([[3.], [5.], [-4.]]), torch.tensor([0, 0, 1]), 2)).item()
        0.03125
    """
    variance_C, d_CD = moments.covariance(), _centered(moments.mean, moments.seen)
    if variance_C.ndim == 3:
        variance_C = variance_C.diagonal(dim1=1, dim2=2).sum(1)
    return _mean_over(variance_C, moments.seen) / _mean_over(functional._dots(d_CD, d_CD), moments.seen)


@torch.no_grad()
def nc1_pinv(moments: ClassMoments) -> Tensor:
    """Return ``tr(Sigma_W pinv(Sigma_B)) / S``, what Papyan et al. (2020) plot; the Sigmas are :func:`nc1_trace`'s.

    Args:
        moments: with scatter matrices (``covariance=True``).

    Example:
        >>> import torch
        >>> h, y = torch.tensor([[3.], [5.], [-4.]]), torch.tensor([0, 0, 1])
        >>> round(nc1_pinv(class_moments(h, y, 2, covariance=True)).item(), 6)
        0.015625
    """
    if moments.scatter.ndim != 3:
        raise ValueError(
            f"the scatter has shape {tuple(moments.scatter.shape)}, expected matrices (C, D, D); pass "
            "covariance=True to class_moments, or take nc1_trace"
        )
    within_DD, num_seen = moments.covariance().sum(0), moments.seen.sum()
    # Sigma_B = d' d / S, so its pseudo-inverse is S pinv(d) pinv(d)'.
    inverse_DC = torch.linalg.pinv(_centered(moments.mean, moments.seen))
    return torch.where(num_seen > 1, ((within_DD @ inverse_DC) * inverse_DC).sum() / num_seen, torch.nan)


@torch.no_grad()
def nc2_norms(vectors_CD: Tensor, seen_C: Tensor) -> Tensor:
    """Return the standard deviation of the rows' lengths over their mean (Eq. 3; Papyan et al., 2020).

    Args:
        vectors_CD: (C, D) centred class means d_c, or classifier rows.
        seen_C: (C,) classes with a mean.

    Example:
        >>> import torch
        >>> nc2_norms(torch.tensor([[3., 0.], [0., 1.]]), torch.tensor([True, True])).item()
        0.5
    """
    norm_C = vectors_CD.double().norm(dim=1)
    mean = _mean_over(norm_C, seen_C)
    return _mean_over((norm_C - mean) ** 2, seen_C).sqrt() / mean


@torch.no_grad()
def nc2_angles(vectors_CD: Tensor, seen_C: Tensor) -> Tensor:
    """Return ``mean over pairs c != c' of |cos(v_c, v_c') + 1/(S-1)|`` (Eq. 3; Papyan et al., 2020).

    Args:
        vectors_CD: (C, D) centred class means d_c, or classifier rows. A zero row has cosine 0.
        seen_C: (C,) classes with a mean.

    Example:
        >>> import torch
        >>> nc2_angles(torch.eye(2), torch.tensor([True, True])).item()
        1.0
    """
    unit_CD = torch.nn.functional.normalize(vectors_CD.double(), dim=1, eps=torch.finfo(torch.float64).tiny)
    unit_CD, num_seen = torch.where(seen_C.unsqueeze(1), unit_CD, 0.0), seen_C.sum(dtype=torch.float64)
    least = 1.0 / (num_seen - 1.0)
    # By parts: C x C does not fit where C is large. The pairs c = c' are taken out of the sum.
    parts = [((part @ unit_CD.t() + least).abs() * seen_C).sum(1) for part in unit_CD.split(1024)]
    away_C = torch.cat(parts) - (functional._dots(unit_CD, unit_CD) + least)
    return _mean_over(away_C, seen_C) / (num_seen - 1.0)


@torch.no_grad()
def nc3(weight_CD: Tensor, mean_CD: Tensor, seen_C: Tensor) -> Tensor:
    """Return ``|W / |W|_F - M / |M|_F|_F`` with M the rows d_c (Eq. 4, whose printed shapes do not match), in [0, 2].

    Args:
        weight_CD: (C, D) classifier rows; those of unseen classes are left out.
        mean_CD: (C, D) class means.
        seen_C: (C,) bool, classes with a mean.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> mean, seen = torch.tensor([[3., 1.], [1., 1.]]), torch.tensor([True, True])
        >>> nc3(torch.tensor([[5., 0.], [-5., 0.]]), mean, seen).item()
        0.0
    """
    functional._check_rows(mean_CD, seen_C, weight_CD)
    w_CD, d_CD = torch.where(seen_C.unsqueeze(1), weight_CD.double(), 0.0), _centered(mean_CD, seen_C)
    distance: Tensor = (w_CD / w_CD.norm() - d_CD / d_CD.norm()).norm()
    return distance


@torch.no_grad()
def nc4(logits: Tensor, features: Tensor, mean_CD: Tensor, seen_C: Tensor) -> Tensor:
    """Return for each sample whether the largest logit is that of the nearest class mean, among classes seen (Eq. 5).

    Args:
        logits: (N, C).
        features: (N, D) that they come from.
        mean_CD: (C, D) class means.
        seen_C: (C,) classes with a mean.

    Returns:
        (N,) bool.

    Example:
        >>> import torch
        >>> h, logits = torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([[2., 1.], [2., 1.]])
        >>> nc4(logits, h, torch.eye(2), torch.tensor([True, True])).tolist()
        [True, False]
    """
    d_CD = _centered(mean_CD, seen_C)
    # About the global mean, where no common offset cancels in |h - mu|^2 = |h|^2 + |mu|^2 - 2 <h, mu>.
    h_ND = features.double() - functional.global_mean(mean_CD.double(), seen_C)
    distance_NC = functional._dots(d_CD, d_CD) - 2.0 * (h_ND @ d_CD.t())
    nearest_N = distance_NC.masked_fill(~seen_C, torch.inf).argmin(1)
    predicted_N = logits.masked_fill(~seen_C, -torch.inf).argmax(1)
    return predicted_N == nearest_N


class NeuralCollapse:
    """Neural collapse metrics of all samples since the last :meth:`reset`, whatever the batches they came in.

    Feed it a pass over the training set in evaluation mode, with the network fixed. Fed while training it costs no
    further pass, and how features move during the epoch counts as within-class variability.

    Args:
        classifier: the layer that maps features to logits, its weight, or a :class:`spalign.Classifier`; read by
            :meth:`compute`.
        tracker: class means for ``nc4``, which must be known before the samples come: running ones, or for Eq. 5 to the
            letter those of an earlier pass over the samples (``momentum=None``). It is only read.
        covariance: return ``nc1_pinv`` too, which takes a (D, D) float64 matrix per class: 3 MB for 100 classes x 64
            features, 34 GB for 1000 x 2048. One for all will not do: what a class weighs in it, 1 / n_c, is not known
            before the end.
        ignore_index: label of samples to pass over.
        process_group: ranks whose samples are measured together, as in :class:`spalign.ClassMeanTracker`.

    Raises:
        ValueError: classifier and tracker differ in size, or an argument is none of the above.

    Several ranks: batches may differ in number and size. Ranks exchange sums in :meth:`compute`, which each must call.

    Example:
        >>> import torch, spalign
        >>> fc = torch.nn.Linear(8, 3)
        >>> collapse = spalign.metrics.NeuralCollapse(fc)
        >>> for _ in range(4):
        ...     collapse.update(torch.randn(16, 8), torch.arange(16) % 3)
        >>> list(collapse.compute())
        ['nc1_trace', 'nc2_norms', 'nc2_angles', 'nc2_norms_classifier', 'nc2_angles_classifier', 'nc3', 'alignment']
        >>> collapse.reset()
    """

    def __init__(
        self,
        classifier: ClassifierLike,
        tracker: ClassMeanTracker | None = None,
        *,
        covariance: bool = False,
        ignore_index: int = -100,
        process_group: Group = ...,
    ) -> None:
        self.classifier = Classifier.of(classifier)
        self.tracker = tracker
        self.covariance = covariance
        if tracker is not None:
            tracker._check_classifier(self.classifier)
        # Holds counts and means, and knows which batches to refuse.
        self._means = ClassMeanTracker.for_classifier(
            self.classifier, momentum=None, ignore_index=ignore_index, process_group=process_group
        ).double()
        self.reset()

    def reset(self) -> None:
        """Forget every sample."""
        c, d = self.classifier.shape
        self._means.reset()
        with torch.inference_mode(False):  # where validation loops call this, and later ones write
            self._scatter = self._means.weight.new_zeros((c, d, d) if self.covariance else c)
            self._agreement = self._means.weight.new_zeros(c, 2)  # samples that agree, and all those asked
        self._empty = True

    @torch.no_grad()
    def update(self, features: Tensor, targets: Tensor, logits: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            features: (N, D) or, for dense prediction, (N, D, ...); any float dtype.
            targets: (N,) or (N, ...) integer class indices.
            logits: (N, C) or (N, C, ...), for ``nc4``.

        What changes nothing (non-finite rows, ignored labels) is as in :meth:`spalign.ClassMeanTracker.update`.

        Raises:
            ValueError: wrong shape, dtype or device, soft labels, logits without a tracker or, on the CPU, a label
                outside [0, C). No state is changed.
        """
        means, c = self._means, self._means.num_classes
        self._follow(features.device)
        h_ND, labels_N, _ = means._checked(features, targets)
        batch = _parse(h_ND, labels_N, c, means.ignore_index)
        if logits is not None:
            self._check_logits(logits, (features.shape[0], c, *features.shape[2:]))
            self._ask(logits.movedim(1, -1).reshape(-1, c), batch)
        weight_C, mean_CD, self._scatter = self._held().merge(_moments(batch, c, self.covariance))
        means.weight.copy_(weight_C)
        means.mean.copy_(mean_CD)
        self._empty = False

    @torch.no_grad()
    def compute(self) -> dict[str, Tensor]:
        """Return the metrics as float64 scalars, and keep what they come from.

        Returns:
            ``nc1_trace``, with ``covariance`` ``nc1_pinv``; ``nc2_norms`` and ``nc2_angles`` of the class means, and
            of the rows with ``_classifier`` behind; ``nc3``; ``alignment``, the mean of
            :func:`spalign.functional.alignment` over classes seen; with a tracker ``nc4``, the share of samples that
            agree in each class, averaged over classes. NaN where fewer than two classes have come in.
        """
        self._follow(self.classifier.device)
        moments, agreement = self._of_all_ranks()
        mean_CD, seen_C = moments.mean, moments.seen
        weight_CD = self.classifier.rows().to(mean_CD.device)
        found = {"nc1_trace": nc1_trace(moments)}
        if self.covariance:
            found["nc1_pinv"] = nc1_pinv(moments)
        found["nc2_norms"] = nc2_norms(_centered(mean_CD, seen_C), seen_C)
        found["nc2_angles"] = nc2_angles(functional.directions(mean_CD, seen_C), seen_C)
        found["nc2_norms_classifier"] = nc2_norms(weight_CD, seen_C)
        found["nc2_angles_classifier"] = nc2_angles(weight_CD, seen_C)
        found["nc3"] = nc3(weight_CD, mean_CD, seen_C)
        found["alignment"] = _mean_over(functional.alignment(weight_CD, mean_CD, seen_C), seen_C)
        if self.tracker is not None:
            agree_C, asked_C = agreement.unbind(1)
            found["nc4"] = _mean_over(agree_C / asked_C, asked_C > 0)
        return found

    def _follow(self, device: torch.device) -> None:
        """Move where the model has moved, as long as nothing came in."""
        if self._empty and self._means.mean.device != device:
            self._means.to(device)
            self.reset()

    def _held(self) -> ClassMoments:
        return ClassMoments(self._means.weight, self._means.mean, self._scatter)

    def _check_logits(self, logits: Tensor, expected: tuple[int, ...]) -> None:
        if self.tracker is None:
            raise ValueError(
                "logits were passed but there is no tracker, expected class means known before the samples, for nc4: "
                "build NeuralCollapse(classifier, tracker), or leave the logits out"
            )
        if logits.shape != expected or not logits.is_floating_point():
            raise ValueError(
                f"logits have shape {tuple(logits.shape)} and dtype {logits.dtype}, expected floats of shape "
                f"{expected}; pass what the classifier makes of these features"
            )
        self.tracker._check_device("logits are", logits)
        self.tracker._check_device("features are", self._means.mean)

    def _ask(self, logits_NC: Tensor, batch: functional._Batch) -> None:
        """Count the samples on which classifier and nearest mean agree, of classes that have a mean."""
        assert self.tracker is not None
        assert batch.labels is not None
        mean_CD, seen_C = self.tracker.mean, self.tracker.seen
        asked_N = batch.weight * (seen_C & (seen_C.sum() > 1)).index_select(0, batch.labels)
        agree_N = nc4(logits_NC, batch.h, mean_CD, seen_C) * asked_N
        self._agreement.index_add_(0, batch.labels, torch.stack([agree_N, asked_N], 1))

    def _of_all_ranks(self) -> tuple[ClassMoments, Tensor]:
        """Return moments and agreement over the ranks: first the means, then each rank's scatter about them."""
        held, agreement = self._held(), self._agreement
        if distributed.world_size(self._means.process_group) == 1:
            return held, agreement
        exchange = Exchange(self._means._group_name, 0, torch.float64)
        sum_CD, weight_C = distributed._all_reduce_statistics(
            held.mean * held.weight.unsqueeze(1), held.weight, exchange
        )
        mean_CD = sum_CD / weight_C.clamp(min=1.0).unsqueeze(1)
        scatter = held.scatter + _squares(held.mean - mean_CD, held.scatter) * _like(held.weight, held.scatter)
        packed = torch.cat([scatter.reshape(len(scatter), -1), agreement[:, :1]], 1)
        packed, asked_C = distributed._all_reduce_statistics(packed, agreement[:, 1], exchange)
        moments = ClassMoments(weight_C, mean_CD, packed[:, :-1].reshape(scatter.shape))
        return moments, torch.stack([packed[:, -1], asked_C], 1)

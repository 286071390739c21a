"""SpA-SLERP: rotate classifier rows towards class means on a schedule."""

import operator
import warnings
from typing import Any

import torch
from torch import Tensor

from spalign import functional
from spalign.classifier import Classifier, ClassifierLike
from spalign.tracker import ClassMeanTracker

__all__ = ["SpASlerp"]


class SpASlerp:
    """Spherical interpolation of classifier rows towards class means, called like a scheduler.

    Each :meth:`step` rotates the rows with ``<w_hat_c, mu_hat_c> < threshold`` by the share ``alpha_t`` of their angle
    and keeps their norms (see :func:`spalign.functional.slerp`), with
    ``alpha_t = alpha_max (1 - cos(pi t / T)) / 2``; t counts the present call from 1 and is clamped to T, so the last
    of ``total_steps`` calls rotates by ``alpha_max``. Call it once per epoch: n calls towards a fixed mean multiply the
    angle by ``(1 - alpha)^n``, so a call per batch forces the threshold whatever ``alpha_max`` is.

    It is not an ``LRScheduler`` (trainers step those behind your back) and never an optimizer hook. Momentum buffers
    of the optimizer keep pointing where they did.

    Args:
        classifier: the layer that maps features to logits, its weight, or a :class:`spalign.Classifier`; trainable.
        tracker: class means to rotate towards; only read.
        total_steps: T, the number of calls of :meth:`step` over which alpha grows.
        alpha_max: largest share of the angle to rotate by, in [0, 1].
        threshold: rows whose cosine is at least this are left alone, in [-1, 1].

    Attributes:
        alpha: the share last used, 0.0 before the first call.
        last_step: calls so far.
        num_rotated: () int64 tensor, rows rotated by the last call.
        num_antipodal: () int64 tensor, rows the last call left alone because they lie within 1e-3 rad of the
            antipode of their mean, where no path is the shortest.

    Raises:
        ValueError: an argument is out of range, the classifier is fixed or computed in each forward pass, its
            parametrization has no inverse, or its sizes differ from the tracker's.

    Of a parametrized weight what the parametrization can hold is kept: an orthogonal one takes a part of the rotation.

    Checkpoint behavior: ``state_dict()`` holds ``last_step`` alone; alpha follows from it, so ``total_steps`` may
    change on resume.

    Example:
        >>> import torch, spalign
        >>> fc = torch.nn.Linear(8, 3)
        >>> tracker = spalign.ClassMeanTracker.for_classifier(fc)
        >>> slerp = spalign.SpASlerp(fc, tracker, total_steps=2, alpha_max=0.2, threshold=0.9)
        >>> for epoch in range(2):
        ...     tracker.update(torch.randn(16, 8), torch.arange(16) % 3)  # training goes here
        ...     slerp.step()
        >>> slerp.alpha, slerp.last_step
        (0.2, 2)
    """

    def __init__(
        self,
        classifier: ClassifierLike,
        tracker: ClassMeanTracker,
        *,
        total_steps: int,
        alpha_max: float = 0.2,
        threshold: float = 0.5,
    ) -> None:
        adapter = Classifier.of(classifier)
        try:
            self.total_steps = operator.index(total_steps)
        except TypeError:
            self.total_steps = 0
        if self.total_steps < 1:
            raise ValueError(f"total_steps is {total_steps!r}, expected a positive integer, the calls of step()")
        if not functional._is_number_in(alpha_max, 0.0, 1.0):
            raise ValueError(
                f"alpha_max is {alpha_max!r}, expected a share of the angle in [0, 1], as a number; 0 rotates nothing"
            )
        if not functional._is_number_in(threshold, -1.0, 1.0):
            raise ValueError(
                f"threshold is {threshold!r}, expected a cosine in [-1, 1], as a number; 1 rotates every row"
            )
        adapter.require_writable()
        tracker._check_classifier(adapter)
        self.classifier = adapter
        self.tracker = tracker
        self.alpha_max = float(alpha_max)
        self.threshold = float(threshold)
        self.last_step = 0
        self.num_rotated: Tensor = torch.zeros((), dtype=torch.int64)
        self.num_antipodal: Tensor = torch.zeros((), dtype=torch.int64)

    @property
    def alpha(self) -> float:
        """Share of the angle that the last call rotated by; 0.0 before the first."""
        return functional.cosine_schedule(self.last_step, self.total_steps, self.alpha_max)

    @torch.no_grad()
    def step(self) -> None:
        """Count one call and rotate. Warns where a framework has marked the weight as a mirror of master weights.

        Raises:
            ValueError: classifier and tracker are on different devices. Nothing is rotated or counted.
        """
        if self.classifier.mirrors_master:
            warnings.warn(
                f"the weight of {self.classifier} mirrors master weights, which overwrite this rotation at the next "
                "optimizer step; build SpASlerp for the master weight, or apply spalign.functional.slerp to it "
                "(DeepSpeed: safe_get_full_fp32_param, safe_set_full_fp32_param)",
                stacklevel=3,  # past no_grad
            )
        self.classifier.reshard()
        weight_CD = self.classifier.rows()
        self.tracker._check_device("the classifier is", weight_CD)
        mean_CD, alignable_C, center_D = self.tracker._geometry()
        alpha = functional.cosine_schedule(self.last_step + 1, self.total_steps, self.alpha_max)
        result = functional.slerp(
            weight_CD, mean_CD, alignable_C, alpha=alpha, threshold=self.threshold, center_D=center_D
        )
        self.classifier.write(result.weight, result.rotated)
        self.last_step += 1
        self.num_rotated, self.num_antipodal = result.rotated.sum(), result.antipodal.sum()

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"last_step": int}``."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after ``state_dict["last_step"]`` calls.

        Raises:
            ValueError: there is no such entry, or it is not a count.
        """
        last_step: Any = state_dict.get("last_step")
        if not functional._is_count(last_step, 0):
            raise ValueError(
                f"state_dict holds last_step = {last_step!r}, expected a count; load what state_dict() returned"
            )
        self.last_step = last_step

    def __repr__(self) -> str:
        return (
            f"SpASlerp({self.classifier}, total_steps={self.total_steps}, alpha_max={self.alpha_max}, "
            f"threshold={self.threshold}, last_step={self.last_step})"
        )

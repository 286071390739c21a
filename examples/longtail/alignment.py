"""The three strategies of spalign as one object that any baseline's training loop can use.

Shapes: N samples, D feature dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

import spalign


@dataclass(frozen=True)
class AlignmentOptions:
    """Which strategies are on, and their hyper-parameters.

    Attributes:
        spareg: weight of the loss term; 0 for none.
        spareg_align: which side the term pulls: `both`, `classifier` or `features`.
        spaslerp, alpha_max, threshold: rotate the classifier's rows once per epoch.
        spaproj, gamma, radial: project the classifier's gradient at every optimizer step.
        momentum: of the running class means, the weight of the new value.
    """

    spareg: float = 0.0
    spareg_align: Literal["both", "classifier", "features"] = "both"
    spaslerp: bool = False
    alpha_max: float = 0.2
    threshold: float = 0.5
    spaproj: bool = False
    gamma: float = 0.9
    radial: Literal["paper", "keep"] = "paper"
    momentum: float = 0.1

    @property
    def names(self) -> list[str]:
        """The strategies that are on."""
        flags = {"reg": bool(self.spareg), "slerp": self.spaslerp, "proj": self.spaproj}
        return [name for name, on in flags.items() if on]


class Alignment:
    """Running class means and the strategies that read them.

    The class means are tracked whether or not a strategy is on, so that alignment is measured alike in every run; this
    changes nothing in the training of a plain baseline.

    Args:
        classifier: the head to align.
        options: the strategies.
        epochs: of the whole run.
        batch_size: of several ranks, the largest batch that one of them feeds at once, if known: they exchange less.
    """

    def __init__(
        self, classifier: nn.Module, options: AlignmentOptions, *, epochs: int, batch_size: int | None = None
    ) -> None:
        self.classifier = spalign.Classifier(classifier)
        self.options = options
        self.tracker = spalign.ClassMeanTracker.for_classifier(
            self.classifier, momentum=options.momentum, batch_size=batch_size
        )
        self.spareg: spalign.SpARegLoss | None = None
        self.slerp: spalign.SpASlerp | None = None
        if options.spareg:
            self.spareg = spalign.SpARegLoss(self.classifier, self.tracker, align=options.spareg_align)
        if options.spaslerp:
            self.slerp = spalign.SpASlerp(
                self.classifier,
                self.tracker,
                total_steps=epochs,
                alpha_max=options.alpha_max,
                threshold=options.threshold,
            )

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer to use: with SpA-Proj, one that projects the classifier's gradient first."""
        if not self.options.spaproj:
            return optimizer
        return spalign.SpAProj(
            optimizer, self.classifier, self.tracker, gamma=self.options.gamma, radial=self.options.radial
        )

    def penalty(self, features: Tensor, targets: Tensor) -> Tensor | None:
        """Feed the tracker one batch and return SpA-Reg's value, unweighted; None where SpA-Reg is off.

        Args:
            features: (N, D), in the graph of the loss.
            targets: (N,) class indices or (N, C) soft labels.
        """
        if self.spareg is None:
            self.tracker.update(features, targets)
            return None
        value: Tensor = self.spareg(features, targets)
        return value

    def end_epoch(self) -> None:
        """Rotate the classifier where SpA-SLERP is on. Call once after each epoch of training."""
        if self.slerp is not None:
            self.slerp.step()

    @property
    def alpha(self) -> float | None:
        """SpA-SLERP's last rotation share, or None."""
        return None if self.slerp is None else float(self.slerp.alpha)

    def cosines(self, tracker: spalign.ClassMeanTracker | None = None) -> tuple[Tensor, Tensor]:
        """Return the cosine (C,) of each classifier row and its centred class mean, and (C,) bool where it is defined.

        Args:
            tracker: read these class means instead of the running ones.
        """
        tracker = tracker or self.tracker
        weight_CD = self.classifier.rows().detach()
        return spalign.functional.alignment(weight_CD, tracker.mean, tracker.seen), tracker.seen

    def state_dict(self) -> dict[str, Any]:
        return {
            "tracker": self.tracker.state_dict(),
            "slerp": None if self.slerp is None else self.slerp.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tracker.load_state_dict(state["tracker"])
        if self.slerp is not None:
            self.slerp.load_state_dict(state["slerp"])

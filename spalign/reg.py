"""SpA-Reg: a loss term that aligns classifier rows and class means."""

from typing import Literal

from torch import Tensor, nn

from spalign import functional, kernels
from spalign.classifier import Classifier, ClassifierLike
from spalign.tracker import ClassMeanTracker

__all__ = ["SpARegLoss"]

Align = Literal["both", "classifier", "features"]


class SpARegLoss(nn.Module):
    """Similarity regularization, ``mean over seen classes of 1 - <w_hat_c, mu_hat_c>`` (Eq. 15).

    ``w_hat_c`` is the unit classifier row, ``mu_hat_c`` the unit class mean minus the mean of the class means. Classes
    not seen yet, and rows with nothing to align, contribute exactly 0 in value and gradient. Add it to the main loss
    with a weight, Eq. 16: ``loss = criterion(logits, y) + lam * spareg(h, y)``. The default this project found for
    ``lam`` is in ``docs/results.md``; the paper prints none.

    Args:
        classifier: the layer that maps features to logits, its weight, or a :class:`spalign.Classifier`. A fixed
            tensor, buffer or frozen parameter receives no gradient. It is not registered: ``parameters()`` is empty and
            ``state_dict()`` holds the tracker's buffers alone.
        tracker: class means to use and, in ``forward(features, targets)``, to feed. Made for the classifier with its
            defaults if not given.
        align: which side receives gradient. ``"features"`` is what acts on a fixed classifier; the gradient reaches
            the features through the current batch's share in the means.

    Raises:
        ValueError: the sizes of classifier and tracker differ, ``align`` is unknown, or ``align="classifier"`` is asked
            of a fixed classifier.

    Several ranks: the term is computed in full on every rank, and its gradients are right once averaged, as DDP does;
    do not scale it by the number of ranks. Under DDP's ``find_unused_parameters=True`` the classifier must take part in
    the wrapped forward pass.

    Checkpoint behavior: save this module's ``state_dict()``; without it the term is 0 until classes are seen again.

    Example:
        >>> import torch, spalign
        >>> fc = torch.nn.Linear(8, 3)
        >>> spareg = spalign.SpARegLoss(fc)
        >>> h, y = torch.randn(16, 8, requires_grad=True), torch.arange(16) % 3
        >>> loss = torch.nn.functional.cross_entropy(fc(h), y) + 0.5 * spareg(h, y)
        >>> loss.backward()
    """

    def __init__(
        self, classifier: ClassifierLike, tracker: ClassMeanTracker | None = None, *, align: Align = "both"
    ) -> None:
        super().__init__()
        adapter = Classifier.of(classifier)
        if align not in ("both", "classifier", "features"):
            raise ValueError(f"align is {align!r}, expected 'both', 'classifier' or 'features': the side that moves")
        if align == "classifier" and adapter.fixed:
            raise ValueError(f"align='classifier' but {adapter} is fixed, so nothing would move; use align='features'")
        self.tracker = ClassMeanTracker.for_classifier(adapter) if tracker is None else tracker
        self.tracker._check_classifier(adapter)
        self.classifier = adapter
        self.align = align

    def forward(self, features: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
        """Feed the tracker the batch (in training mode) and return the term; without a batch, only read.

        Args:
            features: (N, D) or (N, D, ...), the classifier's input.
            targets: (N,) or (N, ...) class indices, or (N, C) or (N, C, ...) soft labels.

        Returns:
            Scalar in [0, 2], float32 (float64 if weight or tracker are).

        Raises:
            ValueError: see :meth:`ClassMeanTracker.update`; or only one of the two arguments is given; or classifier
                and tracker are on different devices. No state is changed.
        """
        if (features is None) != (targets is None):
            raise ValueError("features and targets go together; pass both, or neither to only read the tracker")
        weight_CD = self.classifier.rows()
        self.tracker._check_device("the classifier is", weight_CD)
        if self.align == "features":
            weight_CD = weight_CD.detach()
        state, share = self.tracker._state(), None
        # One kernel finds the global mean and aligns to it; nothing reads the sum of the means before it writes it.
        together = kernels.can_align(weight_CD, *state, of_state=True)
        if features is not None and targets is not None:
            features, targets, usable = self.tracker._checked(features, targets)
            if self.training:
                share = self.tracker._absorb(features, targets, usable, add_up=not together)
        by_features = None if share is None or self.align == "classifier" else features
        if together:
            return functional._loss_by_kernels(
                weight_CD, *state, by_features, share, of_state=True, write_sum=share is not None
            )
        mean_CD, alignable_C, center_D = self.tracker._geometry()
        return functional.alignment_loss(
            weight_CD, mean_CD, alignable_C, center_D=center_D, features=by_features, share=share
        )

    def extra_repr(self) -> str:
        return f"{self.classifier}, align={self.align!r}"

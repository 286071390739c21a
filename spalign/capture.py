"""Get at a model's features where its forward pass returns logits alone."""

from typing import Any

import torch
from torch import Tensor, nn

from spalign.classifier import Classifier, ClassifierLike

__all__ = ["FeatureCapture"]

# Passes that may wait to be read: enough for any step, few enough that a forgotten capture shows before memory does.
_MAX_PENDING = 64


class FeatureCapture:
    """Record what goes into a classifier during training-mode forward passes.

    A training pass is one in training mode with gradients enabled: re-estimating BatchNorm statistics under ``no_grad``
    records nothing, nor does the second run of a checkpointed segment during backward. Recording is all it does; the
    tracker is fed by your one explicit call per batch.

    Args:
        classifier: the layer to watch, or a :class:`spalign.Classifier` around it. Attach before the first call of a
            compiled model: hooks added later never fire there.

    Raises:
        ValueError: the classifier is a bare tensor, which has no forward pass.

    A deep copy of the model carries a copy of the capture, which records for the copy and leaves this one alone.

    Example:
        >>> import torch, spalign
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> features = spalign.FeatureCapture(model[-1])
        >>> logits = model(torch.randn(16, 4))
        >>> features().shape
        torch.Size([16, 8])
    """

    def __init__(self, classifier: ClassifierLike) -> None:
        module = classifier.module if isinstance(classifier, Classifier) else classifier
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"the classifier is a {type(module).__name__}, expected a module whose forward pass can be watched; "
                "pass the layer itself, or hand your features to the tracker directly"
            )
        self._pending: list[Tensor] = []
        # Linear layers take the feature dimension last, convolutions second.
        weight = getattr(module, getattr(classifier, "weight_name", "weight"), None)
        self._features_last = not hasattr(module, "kernel_size") and getattr(weight, "ndim", 2) <= 2
        # A bound method is deep-copied with its owner; a closure would keep recording for the original (pitfall C10).
        self._handle = module.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training or not torch.is_grad_enabled() or _inside_backward():
            return
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(inputs, Tensor):
            return
        if len(self._pending) >= _MAX_PENDING:
            self._pending.clear()
            raise RuntimeError(
                f"{_MAX_PENDING} training passes were captured and none read, which would keep their graphs alive; "
                "call features() once per step, or remove() the capture; a copy of a model copies its capture: run the "
                "copy under torch.no_grad(), or copy the model before FeatureCapture is attached"
            )
        self._pending.append(inputs)

    def __call__(self) -> Tensor:
        """Return the inputs since the last call, concatenated along N, and release them.

        Returns:
            (N, D) or, for dense prediction and tokens, (N, D, ...), as the tracker takes it; inside its graph.

        Raises:
            RuntimeError: nothing was captured.
        """
        if not self._pending:
            raise RuntimeError(
                "no features were captured since the last read: run one forward pass in training mode with gradients "
                "enabled first (in evaluation nothing is recorded: leave the term out there); if there was one, the "
                "model was compiled and called before this hook was attached "
                "(attach before the first compiled call), its classifier runs inside checkpoint(use_reentrant=True), "
                "whose first run has no gradients, or it is called through another module"
            )
        features = self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending)
        self._pending.clear()
        return features.movedim(-1, 1) if self._features_last and features.ndim > 2 else features

    def remove(self) -> None:
        """Stop recording and release what is held."""
        self._handle.remove()
        self._pending.clear()

    def __getstate__(self) -> dict[str, Any]:
        # What is pending belongs to a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "_pending": []}


def _inside_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

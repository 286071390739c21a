"""SpA-Proj: an optimizer wrapper that removes classifier gradient leading away from class means."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spalign import distributed, functional, kernels
from spalign.classifier import Classifier, ClassifierLike
from spalign.functional import Radial
from spalign.tracker import ClassMeanTracker

__all__ = ["SpAProj"]

_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_READ_THROUGH = (
    "param_groups",
    "state",
    "defaults",
    *_STEP_HOOKS,
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_NOT_COPIED = ("_handles", "_held", "_done", "step")
# Where wrappers keep the optimizer that they step.
_INNER = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "original_optimizer")


def _stepped(optimizer: Any) -> Optimizer:
    """Return the optimizer that moves the parameters: the innermost of wrappers such as SAM, Lookahead, Accelerate's.

    Only there are the gradients those of the update and the rows those that it moves; and some wrappers run no hooks
    (pitfall A2).
    """
    for name in _INNER:
        inner = getattr(optimizer, name, None)
        if isinstance(inner, Optimizer):
            return _stepped(inner)
    return cast(Optimizer, optimizer)


def _runs_hooks(optimizer: Optimizer) -> bool:
    """Return whether ``step`` runs step hooks: ``Optimizer.__init__`` makes tables and patches the class (A2)."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(type(optimizer).step, "hooked", False)


def _steps_may_nest(optimizer: Optimizer) -> bool:
    """Return whether ``step`` may call that of a base class, which is patched to run the same hooks once more."""
    defined = (vars(c)["step"] for c in type(optimizer).__mro__ if "step" in vars(c) and c is not Optimizer)
    return len({inspect.unwrap(step) for step in defined}) > 1


class SpAProj(Optimizer):
    """Gradient projection (Eqs. 17 to 20) in front of any optimizer.

    Right before the wrapped optimizer steps, and inside its closure if it gets one, the classifier's gradient is
    replaced in place by :func:`spalign.functional.project_gradient` of it: after reduction over ranks, unscaling and
    clipping, once per optimizer step. The projection has no state, and zero gradients stay zero.

    The object is an ``Optimizer`` that reads through to the wrapped one: ``param_groups``, ``state``, ``defaults``,
    hooks and ``state_dict()`` are the wrapped optimizer's own, so checkpoints are interchangeable with a plain run.
    Use it in the place of the wrapped optimizer everywhere (schedulers, ``GradScaler``); stepping the wrapped optimizer
    itself projects as well, because the work is done by a step pre-hook on it. Of an optimizer that wraps another (SAM,
    Lookahead, what a trainer's prepare() returns) the innermost is hooked, so either order of wrapping is the same run:
    the gradient of the update is projected, against the rows that are moved. Methods that are not an ``Optimizer``'s,
    such as SAM's ``first_step``, are called on the optimizer that has them, which projects as well.

    Args:
        optimizer: the optimizer that holds the classifier's parameters.
        classifier: the layer that maps features to logits, its weight, or a :class:`spalign.Classifier`; trainable. Of
            a weight-normed layer the direction's gradient is projected.
        tracker: class means; only read.
        gamma: share of the original gradient that is mixed back in, in [0, 1]; 1 changes nothing.
        radial: ``"paper"`` scales the part of the gradient along the row by gamma too (Eq. 20), so with a small gamma
            row norms nearly freeze; ``"keep"`` leaves it alone.

    Attributes:
        optimizer: the wrapped optimizer.

    Raises:
        ValueError: an argument is out of range, the classifier is fixed, its sizes differ from the tracker's, or the
            optimizer projects this classifier already.

    Checkpoint behavior: nothing of its own; save the tracker. Until classes are seen their gradients pass unchanged.

    Example:
        >>> import torch, spalign
        >>> fc = torch.nn.Linear(8, 3)
        >>> tracker = spalign.ClassMeanTracker.for_classifier(fc)
        >>> optimizer = torch.optim.SGD(fc.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = spalign.SpAProj(optimizer, fc, tracker, gamma=0.5)
        >>> h, y = torch.randn(16, 8), torch.arange(16) % 3
        >>> tracker.update(h, y)
        >>> torch.nn.functional.cross_entropy(fc(h), y).backward()
        >>> optimizer.step()
    """

    # GradScaler must unscale before the wrapped optimizer steps, even a fused one that could do it itself (pitfall A4).
    _step_supports_amp_scaling = False

    classifier: Classifier

    def __init__(
        self,
        optimizer: Optimizer,
        classifier: ClassifierLike,
        tracker: ClassMeanTracker,
        *,
        gamma: float = 0.9,
        radial: Radial = "paper",
    ) -> None:
        # Optimizer.__init__ would build second hook tables and parameter groups; everything is read through instead.
        stepped = _stepped(optimizer)
        if not isinstance(optimizer, Optimizer) or not _runs_hooks(stepped):
            wrong = stepped if isinstance(optimizer, Optimizer) else optimizer
            raise ValueError(
                f"the optimizer is a {type(wrong).__name__}, expected a torch.optim.Optimizer that runs step hooks; "
                "wrap the optimizer that it steps, before this or a trainer's prepare() does"
            )
        if getattr(optimizer, "_overlap_with_ddp", False):
            raise ValueError(
                f"the {type(optimizer).__name__} has overlap_with_ddp=True, expected False: it moves parameters while "
                "gradients are still being reduced, so nothing can be projected before its step"
            )
        if not functional._is_number_in(gamma, 0.0, 1.0):
            raise ValueError(
                f"gamma is {gamma!r}, expected a share of the original gradient in [0, 1], as a number; 1 changes "
                "nothing, 0 removes all that leads away"
            )
        if radial not in ("paper", "keep"):
            raise ValueError(f"radial is {radial!r}, expected 'paper' or 'keep'")
        adapter = Classifier.of(classifier)
        adapter.require_trainable("projected")
        adapter.leaves()
        tracker._check_classifier(adapter)
        for hook in stepped._optimizer_step_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, SpAProj) and owner.classifier.same_weight(adapter):
                raise ValueError(
                    f"this {type(stepped).__name__} projects {owner.classifier} already, expected one SpAProj per "
                    "classifier; call remove() on the first one"
                )
        self.optimizer = optimizer
        self.classifier = adapter
        self.tracker = tracker
        self.gamma = float(gamma)
        self.radial: Radial = radial
        self._attach()

    def _attach(self) -> None:
        optimizer = _stepped(self.optimizer)
        self._held: Tensor | None = None
        self._done: tuple[weakref.ref[Tensor], int] | None = None
        self._nests = _steps_may_nest(optimizer)
        self._handles: list[RemovableHandle] = [optimizer.register_step_pre_hook(self._before_step)]
        if self._nests:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    # ------------------------------------------------------------------------------------------------------------------
    # The projection
    # ------------------------------------------------------------------------------------------------------------------

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Project now, or, where the gradients are yet to come, have the closure do it (pitfall A7)."""
        position = 1 if args and args[0] is optimizer else 0
        closure = kwargs["closure"] if "closure" in kwargs else args[position] if len(args) > position else None
        if closure is None:
            self._project(optimizer)
            return None

        def projected_closure() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._project(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": projected_closure}
        return (*args[:position], projected_closure, *args[position + 1 :]), kwargs

    def _after_step(self, *_: Any) -> None:
        self._done = None

    def _is_done(self) -> bool:
        """Return whether the gradient was projected by this very step, which has called that of its base class."""
        if self._done is None:
            return False
        grad, version = self._done
        now = self.classifier.leaves().direction.grad
        return now is not None and now is grad() and now._version == version

    @torch.no_grad()
    def _project(self, optimizer: Optimizer) -> None:
        if self._is_done():
            return
        leaves = self.classifier.leaves()
        if leaves.direction.grad is None:
            self.classifier.reshard()  # gathered parameters hold no gradient
            leaves = self.classifier.leaves()
        direction, magnitude = leaves
        if direction.grad is None:
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                if self.classifier.fixed:
                    raise RuntimeError(
                        f"{self.classifier} was frozen after SpAProj was built, so there is no gradient to project; "
                        "call remove() on the SpAProj where you freeze it"
                    )
                raise RuntimeError(
                    f"{self.classifier} has no gradient while other parameters have; expected one in weight.grad. If "
                    "the classifier is unused in this step, leave it out of the optimizer; if a framework keeps "
                    "gradients elsewhere (DeepSpeed: safe_get_full_grad), apply spalign.functional.project_gradient "
                    "to them there"
                )
            return
        self.tracker._check_device("the classifier is", direction)
        self._check_held(optimizer, direction)
        # Sharded by rows, each rank projects the rows it holds; sharded otherwise, rows have to be put together first.
        by_rows = distributed.sharded_along(direction, self.classifier.class_dim)
        part = distributed.to_local if by_rows else distributed.full_tensor
        grad = direction.grad.to_dense() if direction.grad.is_sparse else part(direction.grad)
        # With maximize=True the optimizer goes along the gradient: it descends along its negative.
        uphill = self._maximizes(optimizer, direction)
        grad_CD = self.classifier.as_rows(-grad if uphill else grad)
        weight_CD, sign = self.classifier.as_rows(part(direction)), leaves.sign()
        shard, state = by_rows and distributed.is_sharded(direction), self.tracker._state()
        # The kernel finds the global mean by itself, where means and rows are as they are stored.
        of_state = not (shard or isinstance(sign, Tensor))
        of_state = of_state and kernels.can_align(weight_CD, *state, grad_CD, of_state=True)
        mean_CD, alignable_C, center_D = state if of_state else self.tracker._geometry()
        if isinstance(sign, Tensor):
            # A row that points against its leaf is aligned by turning the leaf to the mirror image of the mean.
            mean_CD = center_D + (mean_CD - center_D) * self.classifier.as_rows(sign)
        if shard:
            mean_CD = self.classifier.localize(mean_CD)
            alignable_C = self.classifier.localize(alignable_C.unsqueeze(1))[:, 0]
        # In place: CUDA graphs and DDP's buckets know the gradient by its address (pitfall A17).
        in_place = by_rows and not uphill and not direction.grad.is_sparse
        out = grad_CD if in_place else None
        projected_CD = functional._project(
            grad_CD, weight_CD, mean_CD, alignable_C, center_D, self.gamma, self.radial, out, of_state
        )
        if uphill:
            projected_CD = projected_CD.neg_()
        if direction.grad.is_sparse:
            projected = self.classifier.as_stored(projected_CD)
            direction.grad.copy_(projected.sparse_mask(direction.grad.coalesce()))
        elif not by_rows:
            direction.grad.copy_(distributed.shard_like(self.classifier.as_stored(projected_CD), direction.grad))
        elif not in_place:
            grad.copy_(self.classifier.as_stored(projected_CD))
        if magnitude is not None and magnitude.grad is not None and self.radial == "paper":
            # Weight norm keeps the part of the gradient along the row in a leaf of its own.
            directed_C1 = self.tracker.directions().any(1, keepdim=True)
            scale = self.classifier.as_stored(1.0 - (1.0 - self.gamma) * directed_C1.to(magnitude.dtype))
            distributed.to_local(magnitude.grad).mul_(distributed.to_local(distributed.shard_like(scale, magnitude)))
        if self._nests:
            self._done = weakref.ref(direction.grad), direction.grad._version

    def _check_held(self, optimizer: Optimizer, direction: Tensor) -> None:
        """Raise unless the optimizer holds the parameter that is projected now; it may have been replaced (A15)."""
        if self._held is direction:
            return
        if not any(p is direction for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"the optimizer does not hold the parameter of {self.classifier}, expected it among param_groups; "
                "build the optimizer from the parameters the model has now (sharding and assign=True replace them), or "
                "give the master copy of the weight as the classifier, where that is what it moves"
            )
        self._held = direction

    @staticmethod
    def _maximizes(optimizer: Optimizer, direction: Tensor) -> bool:
        """Return whether the optimizer was told to go up the gradient, by an option of the group or for all groups."""
        anywhere = getattr(optimizer, "maximize", False)
        return any(
            group.get("maximize", anywhere) and any(p is direction for p in group["params"])
            for group in optimizer.param_groups
        )

    def remove(self) -> None:
        """Stop projecting. The wrapped optimizer goes on as if it had never been wrapped."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ------------------------------------------------------------------------------------------------------------------
    # The optimizer
    # ------------------------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Project the classifier's gradient and step the wrapped optimizer."""
        return self.optimizer.step(closure) if closure is not None else self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the wrapped optimizer."""
        self.optimizer.zero_grad(set_to_none)

    def train(self) -> None:
        """Put a schedule-free optimizer into training mode; others have no modes."""
        getattr(self.optimizer, "train", lambda: None)()

    def eval(self) -> None:
        """Put a schedule-free optimizer into evaluation mode; others have no modes."""
        getattr(self.optimizer, "eval", lambda: None)()

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, nothing added."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the wrapped optimizer, from a run with or without projection."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the wrapped optimizer carry no hooks (pitfall A12), nor the step that a scheduler patched in.
        state = {name: value for name, value in self.__dict__.items() if name not in _NOT_COPIED}
        return {**state, "projecting": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        projecting = state.pop("projecting")
        self.__dict__.update(state)
        self._handles = []
        if projecting:
            self._attach()

    def __repr__(self) -> str:
        return f"SpAProj({self.optimizer!r}, {self.classifier}, gamma={self.gamma}, radial={self.radial!r})"


def _read_through(name: str) -> property:
    """Read and write an attribute of the wrapped optimizer, which may be replaced there at any time (pitfall A3).

    Step hooks are those of the optimizer that runs them: wrappers may have none, or tables that nothing runs.
    """

    def owner(self: SpAProj) -> Any:
        return _stepped(self.optimizer) if name in _STEP_HOOKS else self.optimizer

    return property(lambda self: getattr(owner(self), name), lambda self, value: setattr(owner(self), name, value))


for _name in _READ_THROUGH:
    setattr(SpAProj, _name, _read_through(_name))

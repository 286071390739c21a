"""The classifier adapter: every kind of head shows the same rows, takes the same rows, names the right gradient."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import cast

import pytest
import torch
from problems import FIXED, HEADS, Columns, Rows, make_problem
from torch import Tensor, nn
from torch.nn.utils import prune

import spalign

every_head = pytest.mark.parametrize("kind", HEADS)
every_fixed = pytest.mark.parametrize("kind", FIXED)
# Weight norm multiplies by g / |v|: two roundings each way.
ROUNDING = {torch.float32: 5e-7, torch.float64: 1e-15}


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return make_problem(1, num_classes=5, dim=7, dtype=dtype).w


def write(adapter: spalign.Classifier, rows: Tensor) -> None:
    adapter.write(rows, torch.ones(len(rows), dtype=torch.bool))


@every_head
def test_rows_are_those_of_the_next_forward_pass(kind: str) -> None:
    w = weight()
    head = HEADS[kind](w)
    adapter = spalign.Classifier.of(head.classifier)
    assert adapter.shape == (5, 7)
    assert (adapter.num_classes, adapter.feature_dim) == (5, 7)
    assert adapter.device == torch.device("cpu")
    assert not adapter.fixed
    torch.testing.assert_close(adapter.rows(), w, rtol=ROUNDING[w.dtype], atol=0)
    torch.testing.assert_close(adapter.rows().detach(), head.rows(), rtol=ROUNDING[w.dtype], atol=1e-7)


@every_head
def test_rows_are_in_the_graph_of_the_parameters(kind: str) -> None:
    head = HEADS[kind](weight())
    rows = spalign.Classifier.of(head.classifier).rows()
    grads = torch.autograd.grad((rows * torch.randn_like(rows)).sum(), head.parameters)
    assert all(g.any() for g in grads)


@every_head
def test_write_then_forward(kind: str) -> None:
    head = HEADS[kind](weight())
    adapter = spalign.Classifier.of(head.classifier)
    head.logits(torch.randn(2, 7))  # old weight norm writes its attribute in a forward pass
    new = torch.randn(5, 7)
    pointers = [p.data_ptr() for p in head.parameters]
    write(adapter, new)
    torch.testing.assert_close(head.rows(), new, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(adapter.rows().detach(), new, rtol=2e-6, atol=1e-6)
    assert [p.data_ptr() for p in head.parameters] == pointers, "optimizers and graphs know the parameters by address"


@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_unchanged_rows_of_weight_norm_keep_every_bit(kind: str, sign: float) -> None:
    head = HEADS[kind](weight())
    adapter = spalign.Classifier.of(head.classifier)
    magnitude = adapter.leaves().magnitude
    assert magnitude is not None
    with torch.no_grad():
        magnitude.mul_(sign)
    before = [p.detach().clone() for p in head.parameters]
    changed = torch.tensor([False, True, False, False, True])
    new = torch.where(changed.unsqueeze(1), torch.randn(5, 7), adapter.rows().detach())
    adapter.write(new, changed)
    for p, old in zip(head.parameters, before, strict=True):
        assert torch.equal(p[~changed], old[~changed])
        assert not (p[changed] == old[changed]).all()
    torch.testing.assert_close(head.rows(), new, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm"])
def test_write_to_weight_norm_keeps_the_norms_of_v(kind: str) -> None:
    head = HEADS[kind](weight())
    v = next(p for p in head.parameters if p.shape == (5, 7))
    before = v.norm(dim=1).detach()
    write(spalign.Classifier.of(head.classifier), torch.randn(5, 7))
    torch.testing.assert_close(v.norm(dim=1).detach(), before, rtol=1e-6, atol=0)


@every_head
def test_leaves_are_parameters_of_the_head(kind: str) -> None:
    head = HEADS[kind](weight())
    direction, magnitude = spalign.Classifier.of(head.classifier).leaves()
    assert any(direction is p for p in head.parameters)
    assert (magnitude is not None) == ("weight_norm" in kind)
    if magnitude is not None:
        assert any(magnitude is p for p in head.parameters)


@every_fixed
def test_fixed_classifiers(kind: str) -> None:
    w = weight()
    adapter = spalign.Classifier.of(FIXED[kind](w))
    assert adapter.fixed
    assert torch.equal(adapter.rows(), w)
    assert not adapter.rows().requires_grad
    with pytest.raises(ValueError, match=r"fixed.*cannot be turned.*features"):
        adapter.require_trainable("turned")


@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm"])
def test_frozen_weight_norm_is_fixed(kind: str) -> None:
    head = HEADS[kind](weight())
    for p in head.parameters:
        p.requires_grad_(False)
    assert spalign.Classifier.of(head.classifier).fixed


def test_freezing_and_thawing_is_noticed() -> None:
    fc = nn.Linear(7, 5)
    adapter = spalign.Classifier.of(fc)
    fc.weight.requires_grad_(False)
    assert adapter.fixed
    fc.weight.requires_grad_(True)
    assert not adapter.fixed


def test_one_by_one_convolutions_of_every_dimension() -> None:
    for conv in (nn.Conv1d(7, 5, 1), nn.Conv2d(7, 5, 1), nn.Conv3d(7, 5, 1)):
        adapter = spalign.Classifier.of(conv)
        assert adapter.shape == (5, 7)
        new = torch.randn(5, 7)
        write(adapter, new)
        assert torch.equal(conv.weight.flatten(1), new)


def test_square_weight_needs_class_dim_and_honours_it() -> None:
    w = torch.arange(9.0).reshape(3, 3)
    module = Rows(w.clone())
    assert torch.equal(spalign.Classifier(module).rows(), w)
    assert torch.equal(spalign.Classifier(module, class_dim=1).rows(), w.t())
    write(spalign.Classifier(module, class_dim=1), w)
    assert torch.equal(module.weight.detach(), w.t())


def test_class_dim_of_a_bare_parameter() -> None:
    p = nn.Parameter(weight().t().clone())
    adapter = spalign.Classifier(p, class_dim=1)
    assert adapter.shape == (5, 7)
    assert torch.equal(adapter.rows(), weight())


def test_class_dim_of_a_transposed_weight_norm() -> None:
    """The cosine head of DisA and LDAM: one norm per column."""
    module = Columns(weight())
    nn.utils.parametrizations.weight_norm(module, "prototypes", dim=1)
    adapter = spalign.Classifier(module, weight="prototypes", class_dim=1)
    new = torch.randn(5, 7)
    write(adapter, new)
    torch.testing.assert_close(module.prototypes.detach().t(), new, rtol=2e-6, atol=1e-6)
    assert adapter.leaves().magnitude is not None


@pytest.mark.parametrize("old", [False, True])
def test_weight_norm_over_the_wrong_dimension_is_refused_where_leaves_matter(old: bool) -> None:
    fc = nn.Linear(7, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm)(fc, dim=1)
    adapter = spalign.Classifier.of(fc)
    assert adapter.rows().shape == (5, 7)
    with pytest.raises(ValueError, match=r"dim=1, expected dim=0"):
        adapter.leaves()


def test_other_parametrizations_are_read_and_assigned_but_have_no_leaf_rows() -> None:
    fc = nn.utils.parametrizations.orthogonal(nn.Linear(7, 5))
    adapter = spalign.Classifier.of(fc)
    assert isinstance(fc.weight, Tensor)
    assert torch.equal(adapter.rows(), fc.weight)
    with pytest.raises(ValueError, match="parametrized by"):
        adapter.leaves()


def test_of_an_adapter_is_itself() -> None:
    adapter = spalign.Classifier(nn.Linear(7, 5))
    assert spalign.Classifier.of(adapter) is adapter


def test_same_weight() -> None:
    fc = nn.Linear(7, 5)
    assert spalign.Classifier(fc).same_weight(spalign.Classifier(fc))
    assert spalign.Classifier(fc).same_weight(spalign.Classifier(fc.weight))
    assert not spalign.Classifier(fc).same_weight(spalign.Classifier(nn.Linear(7, 5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_keep_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    fc = nn.Linear(7, 5).to(dtype)
    assert spalign.Classifier.of(fc).rows().dtype == dtype


def test_copies_are_of_the_module_and_pickle_works() -> None:
    fc = nn.Linear(7, 5)
    adapter = spalign.Classifier(fc)
    for other in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert other.shape == (5, 7)
        write(other, torch.zeros(5, 7))
        assert fc.weight.any()
    model = nn.ModuleDict({"fc": fc})
    both = copy.deepcopy({"model": model, "adapter": adapter})
    copied_model, copied = both["model"], both["adapter"]
    assert isinstance(copied, spalign.Classifier)
    assert isinstance(copied_model, nn.ModuleDict)
    assert copied.module is copied_model["fc"]


def test_repr_says_what_it_is() -> None:
    assert repr(spalign.Classifier(nn.Linear(7, 5))) == "Classifier(Linear.weight, 5 classes x 7 features)"


# ----------------------------------------------------------------------------------------------------------------------
# Weights that are not there to be written
# ----------------------------------------------------------------------------------------------------------------------


class Cosine(nn.Module):
    """A head whose weight is a property."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(4, 8))

    @property
    def weight(self) -> Tensor:
        return torch.nn.functional.normalize(self.raw)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def pruned() -> nn.Module:
    head = nn.Linear(8, 4)
    prune.l1_unstructured(head, "weight", amount=0.2)
    return head


def spectral() -> nn.Module:
    head = torch.nn.utils.spectral_norm(nn.Linear(8, 4))
    head(torch.randn(2, 8))
    return head


def fed_tracker() -> spalign.ClassMeanTracker:
    tracker = spalign.ClassMeanTracker(4, 8)
    tracker.update(torch.randn(40, 8), torch.arange(40) % 4)
    return tracker


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("build", [pruned, Cosine, spectral])
def test_b5_what_a_forward_pass_makes_anew_is_not_written(build: Callable[[], nn.Module]) -> None:
    """B5: the next forward pass would undo the rotation, and no gradient arrives at what it made."""
    head, tracker = build(), fed_tracker()
    with pytest.raises(ValueError, match=r"is computed in each forward pass.* cannot be rotated"):
        spalign.SpASlerp(head, tracker, total_steps=1)
    with pytest.raises(ValueError, match=r"is computed in each forward pass.* cannot be projected"):
        spalign.SpAProj(torch.optim.SGD(head.parameters(), lr=0.1), head, tracker)
    loss = spalign.SpARegLoss(head, tracker)()  # which only reads it
    loss.backward()


def test_pruning_between_two_steps_is_noticed() -> None:
    head, tracker = nn.Linear(8, 4), fed_tracker()
    slerp = spalign.SpASlerp(head, tracker, total_steps=2, alpha_max=1.0, threshold=1.0)
    slerp.step()
    prune.l1_unstructured(head, "weight", amount=0.2)
    with pytest.raises(ValueError, match="weight='weight_orig'"):
        slerp.step()
    assert slerp.last_step == 1
    rows = head.get_parameter("weight_orig").detach().clone()
    spalign.SpASlerp(
        spalign.Classifier(head, weight="weight_orig"), tracker, total_steps=1, alpha_max=1.0, threshold=1.0
    ).step()
    assert not torch.equal(rows, head.get_parameter("weight_orig"))


def test_pruning_is_noticed_after_a_validation_pass_too() -> None:
    """What it has computed without gradients has no graph, by which it could be known."""
    head, tracker = nn.Linear(8, 4), fed_tracker()
    slerp = spalign.SpASlerp(head, tracker, total_steps=2, alpha_max=1.0, threshold=1.0)
    prune.l1_unstructured(head, "weight", amount=0.2)
    with torch.no_grad():
        head(torch.randn(2, 8))
    with pytest.raises(ValueError, match="weight='weight_orig'"):
        slerp.step()
    assert slerp.last_step == 0


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_the_parameter_to_pass_is_named() -> None:
    before_its_first_pass = torch.nn.utils.spectral_norm(nn.Linear(8, 4))  # a plain tensor until then
    for head, name in ((Cosine(), "raw"), (pruned(), "weight_orig"), (before_its_first_pass, "weight_orig")):
        with pytest.raises(ValueError, match=rf"Classifier\(module, weight='{name}'\)"):
            spalign.SpASlerp(head, fed_tracker(), total_steps=1)
        spalign.SpASlerp(spalign.Classifier(head, weight=name), fed_tracker(), total_steps=1).step()
    transposed = Columns(torch.randn(4, 8))
    prune.identity(transposed, "prototypes")
    with pytest.raises(ValueError, match=r"Classifier\(module, weight='prototypes_orig', class_dim=1\)"):
        spalign.SpASlerp(spalign.Classifier(transposed, "prototypes", class_dim=1), fed_tracker(), total_steps=1)


def test_a_computed_tensor_is_refused_and_left_as_it_was() -> None:
    rows = torch.nn.functional.normalize(nn.Parameter(torch.randn(4, 8)))
    with pytest.raises(ValueError, match=r"is computed in each forward pass"):
        spalign.SpASlerp(rows, fed_tracker(), total_steps=1)
    before, property_head = rows.detach().clone(), Cosine()
    for adapter in (spalign.Classifier(rows), spalign.Classifier(property_head)):
        with pytest.raises(ValueError, match=r"is computed in each forward pass"):
            adapter.write(torch.zeros(4, 8))
    assert torch.equal(rows, before)
    assert property_head.raw.any()


class Tied(nn.Module):
    """A head whose rows are some of an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight[:4]


def test_a_part_of_a_parameter_is_written_and_has_no_gradient_to_project() -> None:
    head, tracker = Tied(), fed_tracker()
    before = head.embedding.weight.detach().clone()
    spalign.SpASlerp(head, tracker, total_steps=1, alpha_max=1.0, threshold=1.0).step()
    cosine = spalign.functional.alignment(head.weight, tracker.mean, tracker.seen)
    torch.testing.assert_close(cosine, torch.ones(4))  # float32
    assert torch.equal(head.embedding.weight[4:], before[4:])
    with pytest.raises(ValueError, match=r"cannot be projected"):
        spalign.SpAProj(torch.optim.SGD(head.parameters(), lr=0.1), head, tracker)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_weight_norm_of_a_compiled_layer_is_found() -> None:
    head = torch.nn.utils.weight_norm(nn.Linear(8, 4))
    compiled, tracker = cast(nn.Module, torch.compile(head, backend="eager")), fed_tracker()
    slerp = spalign.SpASlerp(compiled, tracker, total_steps=1, alpha_max=1.0, threshold=1.0)
    slerp.step()
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled(x), x @ head.weight.t() + head.bias)
    cosine = spalign.functional.alignment(head.weight, tracker.mean, tracker.seen)
    torch.testing.assert_close(cosine, torch.ones(4))  # float32


class LowRank(nn.Module):
    """A parametrization that cannot be assigned to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.zeros(2, 8))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


def test_a_parametrization_without_an_inverse_is_refused_at_once() -> None:
    head = nn.Linear(8, 4)
    torch.nn.utils.parametrize.register_parametrization(head, "weight", LowRank())
    with pytest.raises(ValueError, match="parametrized by LowRank, expected one with a right_inverse"):
        spalign.SpASlerp(head, fed_tracker(), total_steps=1)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("taken", ["flat", "freed", "freed part"])
def test_weights_that_fsdp1_has_taken_away_are_named(taken: str, normed: bool) -> None:
    """B2: as its use_orig_params leaves them, a flat shard or a matrix without memory, which crashed the process."""
    head, tracker = nn.Linear(8, 4), fed_tracker()
    head = torch.nn.utils.parametrizations.weight_norm(head) if normed else head
    slerp, spareg = spalign.SpASlerp(head, tracker, total_steps=1), spalign.SpARegLoss(head, tracker)
    optimizer = spalign.SpAProj(torch.optim.SGD(head.parameters(), lr=0.1), head, tracker)
    owner, name = (head.get_submodule("parametrizations.weight"), "original1") if normed else (head, "weight")
    if taken == "flat":
        setattr(owner, name, nn.Parameter(torch.randn(16)))
    elif taken == "freed":
        getattr(owner, name).untyped_storage().resize_(0)
    else:  # without use_orig_params it is no parameter any more, but a view of a larger one
        delattr(owner, name)
        whole = nn.Parameter(torch.randn(50))
        setattr(owner, name, whole[:32].view(4, 8))
        whole.untyped_storage().resize_(0)
    message = r"FullyShardedDataParallel \(FSDP1\) keeps it elsewhere: use fully_shard"
    for use in (slerp.step, spareg, optimizer.step):
        with pytest.raises(ValueError, match=message):
            use()
    assert slerp.last_step == 0
    assert "4 classes x 8 features" in repr(spareg)
    if taken == "flat" and not normed:
        with pytest.raises(ValueError, match=message):
            spalign.SpASlerp(head, tracker, total_steps=1)


def test_a_layer_of_another_size_is_named() -> None:
    head, tracker = nn.Linear(8, 4), fed_tracker()
    spareg = spalign.SpARegLoss(head, tracker)
    head.weight = nn.Parameter(torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"has shape \(5, 8\), expected \(4, 8\) .*build the objects of spalign anew"):
        spareg()


def test_weights_without_memory_of_their_own_are_read() -> None:
    """Of transformed tensors and of meta ones there is none to ask for."""
    head = nn.Linear(8, 4)
    adapter = spalign.Classifier(head)

    def norm(weight: Tensor) -> Tensor:
        head.__dict__["weight"] = weight  # in the place of the parameter, as a functional call has it
        rows = adapter.rows()
        del head.__dict__["weight"]
        return rows.square().sum()

    got = torch.func.grad(norm)(head.weight.detach())
    torch.testing.assert_close(got, 2 * head.weight.detach(), rtol=0, atol=0)
    assert spalign.Classifier(nn.Linear(8, 4, device="meta")).rows().is_meta


def test_a_transposed_head_is_named_where_its_features_do_not_fit() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))  # (D, C), as LDAM's head

    with pytest.raises(ValueError, match=r"spalign\.Classifier\(module, class_dim=1\)"):
        spalign.SpARegLoss(Normed())(torch.randn(5, 8), torch.arange(5) % 4)

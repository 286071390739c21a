"""The training step as torch.compile writes it for a GPU: it builds, it trains as the step it was written from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import cifar_lt
import pytest
import torch
from longtail.engine import Trainer

pytest.importorskip("triton", reason="Inductor writes Triton kernels for a GPU")
if torch.version.cuda is None or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
    pytest.skip("this PyTorch knows no tensors of a GPU that is not there", allow_module_level=True)

from cuda_code import cuda_code

Options = Callable[..., list[str]]
ALIGNED = ("--spareg", "0.3", "--spaproj")
CALLS = {
    "extern_kernels.convolution",
    "torch.ops.aten.convolution_backward.default",
    "extern_kernels.addmm",
    "extern_kernels.mm",
    "torch.ops.spalign.update_class_means.default",
}


def train(argv: list[str], *, compiled: bool, epochs: int = 2) -> Trainer:
    trainer = Trainer(cifar_lt.settings_from(cifar_lt.build_parser().parse_args(argv)))
    if compiled:
        trainer.training_step.compile()
    for _ in range(epochs):
        trainer._train_epoch()
    return trainer


@pytest.mark.parametrize(
    ("options", "batch_launches"),
    [
        (("--amp", "bf16", *ALIGNED), 2),  # of 19 operations
        (("--method", "glmc", *ALIGNED), 4),  # of about 100
    ],
)
def test_the_step_compiles_for_a_gpu_and_trains_alike(
    options: tuple[str, ...], batch_launches: int, tiny_options: Options
) -> None:
    """Batch, loss and backward pass are one graph each for each of two sizes, however many epochs follow.

    Of libraries and operators only those are called that nothing could be written for.
    """
    with cuda_code() as codes:
        compiled = train(tiny_options("compiled", *options), compiled=True)
    assert len(compiled.batches) % compiled.batches.batch_size, "the last batch is smaller"
    assert [code.backward for code in codes] == [False, False, True] * 2
    assert {name for code in codes for name in code.launches if not name.startswith("triton_")} <= CALLS
    assert len(codes[0].launches) <= batch_launches

    eager = train(tiny_options("eager", *options), compiled=False)
    for name in ("loss_sum", "penalty_sum", "predictions"):
        a, b = getattr(compiled.training_step, name), getattr(eager.training_step, name)
        # Sums are added in another order, and two epochs carry that on: with 24 bits, and with the 8 of bfloat16.
        torch.testing.assert_close(a, b, rtol=0.1 if "bf16" in options else 1e-4, atol=0.0)


def test_the_kernels_build(tiny_options: Options) -> None:
    """As Triton's compiler and ptxas see it."""
    with cuda_code() as codes:
        train(tiny_options("compiled", *ALIGNED, "--batch-size", "250"), compiled=True, epochs=1)
    batch, loss, backward = codes
    assert sum(code.compile() for code in codes) > 20
    assert len(loss.launches) + len(backward.launches) > 40
    broken = dataclasses.replace(batch, source=batch.source.replace("tl.program_id(0)", "tl.no_such_thing(0)"))
    with pytest.raises(Exception, match="no_such_thing"):
        broken.compile()

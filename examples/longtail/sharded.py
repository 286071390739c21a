"""Checkpoints that every rank writes its part of, and that any number of ranks can read.

A checkpoint is a folder `epoch-EEEE-step-SSSSSS`: network and optimizer by PyTorch's distributed checkpoint, everything
else in `state.pt`. It is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from .checkpoint import load_checkpoint, save_checkpoint
from .parallel import World


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    return sorted(path for path in folder.glob("epoch-*-step-*") if path.suffix != ".tmp")


def newest_checkpoint(folder: Path, world: World) -> Path | None:
    """Return the checkpoint to go on from, the same on all ranks; None where there is none."""
    folders = checkpoint_folders(folder) if world.first else []
    name = world.from_first(folders[-1].name if folders else None)
    return None if name is None else folder / name


def save_sharded(
    folder: Path, world: World, module: nn.Module, optimizer: Optimizer, state: dict[str, Any], *, keep: int
) -> Path:
    """Write a checkpoint; a kill at any moment leaves it complete or does not show it.

    Args:
        folder: of the run's checkpoints.
        world: the ranks, all of which call.
        module, optimizer: what is sharded.
        state: the rest, equal on all ranks; `epoch` and `step` name the checkpoint.
        keep: how many checkpoints remain.
    """
    final = folder / f"epoch-{state['epoch']:04d}-step-{state['step']:06d}"
    temporary = final.with_suffix(".tmp")
    if world.first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    model_state, optimizer_state = get_state_dict(module, optimizer)
    with _quiet():
        save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=temporary)
    if world.first:
        save_checkpoint(temporary / "state.pt", state)
        if final.exists():  # of the same moment, by an attempt that went on from an older one
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync_folder(folder)
        for old in checkpoint_folders(folder)[:-keep]:
            # Not complete once part of it is gone: another name first.
            os.replace(old, old.with_suffix(".tmp"))
            shutil.rmtree(old.with_suffix(".tmp"))
    world.barrier()
    return final


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what `save_sharded` was given as `state`.

    Raises:
        ValueError: the file is damaged.
        OSError: there is none.
    """
    return load_checkpoint(path / "state.pt", device)


def load_sharded(path: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Load network and optimizer, written by any number of ranks."""
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    with _quiet():
        load(state, checkpoint_id=path)
    set_state_dict(
        module,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=True),
    )


def full_weights(model: nn.Module) -> dict[str, Any]:
    """Return a whole network's state on the CPU, on the first rank; all ranks have to call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from users what PyTorch says of a process without a group, and of itself (2.6)."""
    with warnings.catch_warnings():
        for message in ("torch.distributed is .*uninitialized", "TypedStorage is deprecated"):
            warnings.filterwarnings("ignore", message=message)
        yield


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder last, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Files that are either complete or absent, whenever the process is killed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` on a temporary file beside `path`, flush it to the disk, then rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class FolderLock:
    """Keeps a second process out of a run's folder until this one ends, however it ends.

    Processes forked from this one, such as loader workers, hold nothing: they may live on for seconds after a kill.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            OSError: another process holds it.
        """
        self._file: int | None = os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            import fcntl
        except ImportError:  # Windows: up to the user
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise OSError(f"{folder} is in use by another process: wait for it, end it, or set --output-dir") from error
        here = weakref.ref(self)

        def release_in_child() -> None:
            if (lock := here()) is not None:
                lock.release()

        os.register_at_fork(after_in_child=release_in_child)

    def release(self) -> None:
        """Let others in."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    __del__ = release


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; a kill at any moment leaves the old one or the new one."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only, nothing in the file is run.

    Raises:
        ValueError: the file is no checkpoint of this script.
        FileNotFoundError: there is none.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file may raise nearly anything
        raise ValueError(f"{path} cannot be read as a checkpoint ({error}); remove it to start afresh") from error
    if not isinstance(state, dict) or "epoch" not in state:
        raise ValueError(f"{path} is no checkpoint of this script; remove it to start afresh")
    return state

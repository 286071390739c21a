"""Lists of image files with their classes, and a check of every file before training starts.

Shapes: N images of a list.
"""

from __future__ import annotations

import gzip
import posixpath
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from ..data import shot_groups as shot_groups

Level = Literal["off", "fast", "full"]

_SHOWN = 10  # of many problems, the first
_TAIL = 4096  # bytes: some writers leave a few after the end marker
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


@dataclass(frozen=True, eq=False)
class ImageList:
    """What a list file says.

    Attributes:
        path: the list file.
        root: the folder that its file names are relative to.
        files: N names.
        labels_N: (N,) int64, their classes.
        lines: N, where each stands in the list, from 1.
        skipped: how many entries were left out because they, or their files, were bad.
    """

    path: Path
    root: Path
    files: tuple[str, ...]
    labels_N: Tensor  # noqa: N815
    lines: tuple[int, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.files)

    def where(self, i: int) -> str:
        """Return list, line and file of entry `i`, for messages."""
        return f"{self.path}:{self.lines[i]} ({self.root / self.files[i]})"


def read_list(path: Path, root: Path, *, num_classes: int | None = None, skip_bad: bool = False) -> ImageList:
    """Read lines of `file label`, as text or gzipped (.gz).

    Args:
        path: the list; blank lines are passed over.
        root: folder that the files are relative to.
        num_classes: labels must lie below it; None takes any.
        skip_bad: leave bad lines out and count them instead of raising.

    Raises:
        ValueError: bad lines (the first of them are named, with what is wrong), or no good one.
        OSError: the list cannot be read.
    """
    files: list[str] = []
    labels: list[int] = []
    lines: list[int] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    try:
        data = path.read_bytes()
        content = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no list of lines `file label` in UTF-8, plain or gzipped: {error}") from error
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        file, label, problem = _parse(line, num_classes)
        if not problem and file in first_line:
            problem = f"the file stands in line {first_line[file]} already; keep one of the two"
        if problem:
            problems.append(f"{path}:{number} {line.strip()!r}: {problem}")
            continue
        first_line[file] = number
        files.append(file)
        labels.append(label)
        lines.append(number)
    if problems and not skip_bad:
        advice = "Correct them, or leave them out with --skip-bad."
        raise ValueError(_report(f"{len(problems)} bad lines in {path}", problems, advice))
    if not files:
        raise ValueError(_report(f"{path} lists no image: expected lines `file label`", problems))
    return ImageList(path, root, tuple(files), torch.tensor(labels), tuple(lines), skipped=len(problems))


def _parse(line: str, num_classes: int | None) -> tuple[str, int, str]:
    """Return file, label and what is wrong with a line (nothing: an empty text)."""
    parts = line.rsplit(maxsplit=1)
    if len(parts) < 2:
        return "", 0, "no label; write `file label`"
    if not re.fullmatch("-?[0-9]{1,18}", parts[1]):
        return "", 0, f"the label {parts[1]!r} is no integer; write `file label`"
    label, bound = int(parts[1]), 2**31 if num_classes is None else num_classes
    if not 0 <= label < bound:
        classes = "" if num_classes is None else f", the {num_classes} classes of the training list"
        return "", 0, f"label {label} is out of range; expected 0 .. {bound - 1}{classes}"
    file = posixpath.normpath(parts[0].strip())
    if file.startswith("/") or file.split("/")[0] == "..":
        return "", 0, "the file lies outside the image folder; write its name relative to that folder"
    return file, label, ""


def class_counts(labels_N: Tensor, num_classes: int) -> list[int]:
    """Count the training images of each class.

    Args:
        labels_N: (N,) int64 in 0 .. num_classes - 1.
        num_classes: the largest label of the training list plus one.

    Raises:
        ValueError: a class has no image.
    """
    if num_classes > len(labels_N):
        raise ValueError(
            f"{num_classes} classes, as the largest label is {num_classes - 1}, but only {len(labels_N)} training "
            "images: the list is incomplete, or its labels do not count from 0 without gaps"
        )
    counts: list[int] = torch.bincount(labels_N, minlength=num_classes).tolist()
    missing = [label for label, count in enumerate(counts) if count == 0]
    if missing:
        shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        raise ValueError(
            f"{len(missing)} of {num_classes} classes have no training image ({shown}): "
            "the list is incomplete, or its labels do not count from 0 without gaps"
        )
    return counts


# --- the files themselves ---------------------------------------------------------------------------------------------


def scan(images: ImageList, *, level: Level = "fast", workers: int, skip_bad: bool = False) -> ImageList:
    """Look for missing, empty, foreign and truncated files, so that training does not stop at one hours later.

    Args:
        images: a list.
        level: "fast" reads the head and the tail of each file, "full" decodes it, "off" does nothing.
        workers: threads.
        skip_bad: leave bad files out and count them instead of raising.

    Returns:
        The list without the files left out.

    Raises:
        ValueError: bad files (the first of them are named, with what is wrong), or no good one.
    """
    if level == "off":
        return images
    check = partial(_problem, decode=level == "full")
    found = _map_files(check, [images.root / file for file in images.files], workers, f"{images.path.name}: {level}")
    problems = [f"{images.where(i)}: {problem}" for i, problem in enumerate(found) if problem]
    if not problems:
        return images
    summary = f"{len(problems)} of {len(images)} images of {images.path} cannot be used"
    if not skip_bad or len(problems) == len(images):
        advice = "Check the image folder, fetch these files again, or leave them out with --skip-bad."
        raise ValueError(_report(summary, problems, advice))
    good = [i for i, problem in enumerate(found) if not problem]
    return replace(
        images,
        files=tuple(images.files[i] for i in good),
        labels_N=images.labels_N[good],
        lines=tuple(images.lines[i] for i in good),
        skipped=images.skipped + len(problems),
    )


def _map_files(check: Callable[[Path], str], paths: Sequence[Path], workers: int, label: str) -> list[str]:
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        # Reading and decoding release Python's lock; a progress bar only where there is a terminal.
        results = pool.map(check, paths)
        return list(tqdm(results, label, len(paths), unit="file", leave=False, disable=None, dynamic_ncols=True))


def _problem(path: Path, *, decode: bool) -> str:
    """Return what is wrong with an image file, an empty text for nothing."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                return "is empty"
            file.seek(max(0, size - _TAIL))
            tail = file.read()
            file.seek(0)
            # The formats are named, as PIL would try all that it knows.
            with Image.open(file, formats=tuple(_ENDS)) as image:
                kind = "PNG" if image.format == "PNG" else "JPEG"  # some cameras' JPEGs are MPO to PIL
                if _ENDS[kind] not in tail:
                    return f"is truncated: no end of a {kind} in its last {len(tail)} bytes"
                if decode:
                    image.convert("RGB")
        return ""
    except FileNotFoundError:
        return "is missing"
    except UnidentifiedImageError:
        return "is no JPEG or PNG"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot be read: {error}"


def _report(summary: str, problems: Iterable[str], advice: str = "") -> str:
    listed = list(problems)
    more = [f"... and {len(listed) - _SHOWN} more"] if len(listed) > _SHOWN else []
    return "\n  ".join([f"{summary}:" if listed else summary, *listed[:_SHOWN], *more]) + (
        f"\n{advice}" if advice else ""
    )

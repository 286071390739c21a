"""Batches for any number of processes: which images make up a step, and getting them onto the device in time.

Every random number is a function of the seed, the epoch, the place in the epoch, the loader and the look. So neither
the number of workers or processes, nor continuing in the middle of an epoch, changes what a step sees.

Shapes: N images (of the list, or of a batch), R pixels a side, C classes.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .images import Kind, decode, draw_seed, seeded, test_transform, training_transform
from .lists import ImageList

T = TypeVar("T")
Decode = Literal["cpu", "device"]

PREFETCH = 2  # requests that each worker has in advance
PIECE = 64  # images that a worker makes at a time: smaller ones come sooner, and fewer images are under way
_ORDER, _RESAMPLED = 0, 1  # streams of random numbers, and the loaders A and B that they are for


class BadImage(RuntimeError):  # noqa: N818
    """An image that was good when training started, or was not looked at, cannot be read."""


class LoadedBatch(NamedTuple):
    """A micro-batch on the device.

    Attributes:
        looks: each (N, 3, R, R) uint8. `standard` has one; `glmc` has own_mixup, own_cutmix, other_mixup, other_cutmix.
        labels: each (N,) int64. `standard` has one; `glmc` has those of loader A and of loader B.
    """

    looks: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]


LoadedStep = tuple[LoadedBatch, ...]
"""The micro-batches of one process in one step."""


# --- which images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How the N places of an epoch are divided into steps, processes and micro-batches.

    An epoch has ceil(N / batch_size) steps of nearly equal size (they differ by at most one image), and so have the
    parts of a step. Every place is used exactly once, whatever the number of processes, and what makes up a step
    depends on neither `ranks` nor `accumulate`.

    Attributes:
        num_images: N.
        batch_size: of all processes together; an upper bound.
        ranks, rank: number of processes, and which of them this is.
        accumulate: micro-batches of a step in each process.

    Raises:
        ValueError: a micro-batch would have fewer than the 2 images that batch normalisation needs.
    """

    num_images: int
    batch_size: int
    ranks: int = 1
    rank: int = 0
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size", "ranks", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank is {self.rank}; expected 0 .. {self.ranks - 1}, as there are {self.ranks} ranks")
        smallest = self.num_images // self.steps // self._parts
        if smallest < 2:
            larger = f"a batch size of {4 * self._parts} or more, " if self.num_images >= 2 * self._parts else ""
            raise ValueError(
                f"{self.num_images} images in steps of at most {self.batch_size}, each divided into {self.ranks} ranks "
                f"x {self.accumulate} micro-batches, leave {smallest} images in some: batch normalisation needs 2. "
                f"Use {larger}fewer micro-batches or fewer processes."
            )

    @property
    def steps(self) -> int:
        """Return the number of steps of an epoch."""
        return -(-self.num_images // self.batch_size)

    @property
    def _parts(self) -> int:
        return self.ranks * self.accumulate

    @property
    def largest_part(self) -> int:
        """Return the number of images of the largest micro-batch of any process."""
        largest_step = -(-self.num_images // self.steps)
        return -(-largest_step // self._parts)

    def global_size(self, step: int) -> int:
        """Return the number of images of a step in all processes together."""
        return len(self._places(step))

    def parts(self, step: int) -> list[range]:
        """Return the places in the epoch of this process's micro-batches."""
        places, first = self._places(step), self.rank * self.accumulate
        return [_share(places, part, self._parts) for part in range(first, first + self.accumulate)]

    def _places(self, step: int) -> range:
        return _share(range(self.num_images), step, self.steps)


def _share(places: range, part: int, parts: int) -> range:
    """Return one of `parts` consecutive pieces that differ in length by at most one."""
    return places[part * len(places) // parts : (part + 1) * len(places) // parts]


def _pieces(places: range) -> list[range]:
    """Divide a batch into what workers make at a time."""
    parts = -(-len(places) // PIECE)
    return [_share(places, part, parts) for part in range(parts)]


class EpochOrder:
    """Which image comes at each place of an epoch: the same on every process and machine.

    Args:
        num_images: N.
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return a random permutation, (N,) int64."""
        random = np.random.default_rng(draw_seed(seed, epoch, _ORDER))
        return torch.from_numpy(random.permutation(self.num_images))

    def resampled(self, weights_N: Tensor, seed: int, epoch: int) -> Tensor:
        """Draw with replacement, with chances proportional to the weights: (N,) int64."""
        random = np.random.default_rng(draw_seed(seed, epoch, _RESAMPLED))
        chances_N = weights_N.double().numpy()
        return torch.from_numpy(random.choice(self.num_images, self.num_images, p=chances_N / chances_N.sum()))


# --- in the workers ---------------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """A piece of a micro-batch to make.

    Attributes:
        epoch: from 0.
        first: its first place in the epoch.
        indices: for each loader, which images of the list.
    """

    epoch: int
    first: int
    indices: tuple[tuple[int, ...], ...]


class _Encoded(NamedTuple):
    """Files as they are, for a device that decodes.

    Attributes:
        request: what it answers.
        data: (bytes,) uint8, the files one after another: a tensor each would need a file handle each.
        sizes: their lengths.
        plain: whether they are JPEGs in colour or grey, which a GPU can decode.
    """

    request: _Request
    data: Tensor
    sizes: tuple[int, ...]
    plain: tuple[bool, ...]


class _TrainImages(Dataset[Any]):
    """Makes pieces of micro-batches.

    What goes wrong is returned, because the loader would wrap what is raised in a traceback.
    """

    def __init__(self, images: ImageList, kind: Kind, resolution: int, seed: int, decode: Decode) -> None:
        self.images, self.seed, self.decode = images, seed, decode
        self.looks = 1 if kind == "standard" else 2
        self.transform = training_transform(kind, resolution)

    def __getitem__(self, request: _Request) -> LoadedBatch | _Encoded | BadImage:
        try:
            if self.decode == "device":
                return self._encoded(request)
            return self.augment(request, (_read(self.images, i, decode) for i in sum(request.indices, ())))
        except BadImage as error:
            return error

    def augment(self, request: _Request, decoded: Iterable[Any]) -> LoadedBatch:
        """Make the looks of decoded images, which come loader by loader."""
        looks: list[Tensor] = []
        images = iter(decoded)
        for loader, index in enumerate(request.indices):
            made: list[list[Tensor]] = [[] for _ in range(self.looks)]
            for place in range(request.first, request.first + len(index)):
                image = next(images)
                for look in range(self.looks):
                    with seeded(self.seed, request.epoch, place, loader, look):
                        made[look].append(self.transform(image))
            looks += [torch.stack(tensors) for tensors in made]
        return LoadedBatch(tuple(looks), tuple(self.images.labels_N[list(index)] for index in request.indices))

    def _encoded(self, request: _Request) -> _Encoded:
        files = [_read(self.images, i, lambda path: path.read_bytes()) for i in sum(request.indices, ())]
        data = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
        return _Encoded(request, data, tuple(map(len, files)), tuple(map(_plain, files)))


class _EvalImages(Dataset[Any]):
    def __init__(self, images: ImageList, resolution: int) -> None:
        self.images = images
        self.transform = test_transform(resolution)

    def __getitem__(self, index: Sequence[int]) -> LoadedBatch | BadImage:
        try:
            look = torch.stack([self.transform(_read(self.images, i, decode)) for i in index])
        except BadImage as error:
            return error
        return LoadedBatch((look,), (self.images.labels_N[list(index)],))


def _read(images: ImageList, i: int, read: Callable[[Any], T], source: Any = None) -> T:
    """Read image `i` from its file, or from `source` where that is at hand."""
    try:
        return read(images.root / images.files[i] if source is None else source)
    except OSError as error:
        raise BadImage(
            f"{images.where(i)} cannot be read ({error}): fetch it again, or look for others with --scan full"
        ) from error


def _plain(file: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(file)) as image:
            return image.format == "JPEG" and image.mode in ("RGB", "L")
    except (OSError, SyntaxError, ValueError):
        return False  # decoding it on the CPU will say what is wrong


def _start_method() -> str:
    """Return how workers start: forked where Python, from 3.14 on, would ask a fork server.

    SIGTERM to every process ends that server and the workers that it is starting, and each of its workers imports
    PyTorch anew, in every epoch.
    """
    method = multiprocessing.get_start_method()
    return "fork" if method == "forkserver" else method


def _outlive_sigterm(worker: int) -> None:
    """Leave SIGTERM, which schedulers send to every process, to the main process: it needs its workers until it saves.

    Workers end when that one tells them to, or is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextmanager
def _sigterm_later() -> Iterator[None]:
    """Hold SIGTERM back in this process, and in workers that start meanwhile until they ignore it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, which sends none
        yield
        return
    if _start_method() == "spawn":
        resource_tracker.ensure_running()  # what starts it with the first worker lets SIGTERM in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _handed_over(answer: T) -> T:
    """Put a worker's tensors into shared memory.

    The queue to the main process does so too, but where there is too little, a thread of its drops them, and the main
    process waits for ever.
    """
    if get_worker_info() is not None:
        held = (*answer.looks, *answer.labels) if isinstance(answer, LoadedBatch) else answer
        for tensor in held if isinstance(held, tuple) else ():
            if isinstance(tensor, Tensor):
                tensor.share_memory_()
    return answer


def check_shared_memory(
    batches: Sequence[tuple[int, int]],
    resolution: int,
    *,
    workers: int,
    processes: int,
    folder: Path = Path("/dev/shm"),
) -> None:
    """Refuse workers that have more pixels ready at once than their machine's shared memory takes.

    Args:
        batches: of each loader whose workers are there at a time, the images of a batch and the looks at each of them.
        resolution: R.
        workers: of each process.
        processes: on this machine.
        folder: where shared memory is; what some systems lack is not looked at.

    Raises:
        ValueError: it is too little.
    """
    if not workers or not folder.is_dir():
        return
    # All of it counts, not what is free: a run that died has not yet given its own back when the next one starts.
    there = shutil.disk_usage(folder).total
    looks = sum(max(map(len, _pieces(range(images)))) * looks for images, looks in batches)
    needed = looks * 3 * resolution**2 * workers * PREFETCH * processes
    if needed > there:
        raise ValueError(
            f"{folder} holds {there / 1e6:,.0f} MB, but {processes} processes with --workers {workers} have up to "
            f"{needed / 1e6:,.0f} MB of images ready there: make it larger (of a container, --shm-size="
            f"{-(-2 * needed // 10**9)}g) or use fewer --workers"
        )


# --- onto the device --------------------------------------------------------------------------------------------------


class _Requests(Generic[T]):
    """What a loader with persistent workers is asked for; replaced for every pass."""

    def __init__(self) -> None:
        self.items: Iterable[T] = ()

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)


class _Pipeline(Generic[T]):
    """Runs a data set's requests in workers and counts the time spent waiting for them."""

    def __init__(
        self, dataset: Dataset[Any], *, workers: int, prefetch: int, persistent: bool, pin_memory: bool
    ) -> None:
        self.waited_seconds = 0.0
        self._persistent = persistent and workers > 0
        self._requests: _Requests[T] = _Requests()
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset,
            batch_size=None,  # a request is a batch
            sampler=self._requests,
            num_workers=workers,
            collate_fn=_handed_over,
            pin_memory=pin_memory,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=self._persistent,
            multiprocessing_context=_start_method() if workers else None,
            worker_init_fn=_outlive_sigterm,
            generator=torch.Generator(),  # or every epoch would move the global one on
        )
        self._running: list[Any] = []
        # At exit, multiprocessing would send workers a SIGTERM and wait for them: before that, and before the queues to
        # them are closed, at priority 10, they are told to end.
        self._end = Finalize(self, _end_workers, (self._running,), exitpriority=20)

    def run(self, requests: Iterable[T]) -> Iterator[Any]:
        """Yield the answers in order; a pass that was not finished is dropped.

        Raises:
            BadImage: a file cannot be read.
        """
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        self._requests.items = requests
        start = time.perf_counter()
        others = multiprocessing.active_children()
        try:
            with _sigterm_later():
                answers = iter(self._loader)
        except BaseException:
            for worker in set(multiprocessing.active_children()).difference(others):
                worker.kill()  # at exit they would be sent a SIGTERM, which they ignore, and waited for
            raise
        self._running[:] = [answers]
        try:
            for answer in answers:
                self.waited_seconds += time.perf_counter() - start
                if isinstance(answer, BadImage):
                    raise answer
                yield answer
                start = time.perf_counter()
        finally:
            if not self._persistent:
                _end_workers(self._running)

    def close(self) -> None:
        """End the workers."""
        self._end()
        self._loader = None


def _end_workers(running: list[Any]) -> None:
    """End the workers of iterators; dropping these would, but only once nothing refers to them."""
    while running:
        iterator = running.pop()
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def _ahead(
    items: Iterator[tuple[Any, ...]], device: torch.device, move: Callable[[Any], LoadedBatch]
) -> Iterator[LoadedStep]:
    """Yield items, whose batches come in pieces, on the device.

    On CUDA the next one is being copied, beside what the device computes.
    """
    if device.type != "cuda":
        for item in items:
            yield tuple(move(batch) for batch in item)
        return
    stream = _copy_stream(device)
    waiting: tuple[LoadedStep, torch.cuda.Event] | None = None
    for item in items:
        with torch.cuda.stream(stream):
            copied = tuple(move(batch) for batch in item)
            event = torch.cuda.Event()
            event.record(stream)
        if waiting is not None:
            yield _arrived(*waiting, device)
        waiting = copied, event
    if waiting is not None:
        yield _arrived(*waiting, device)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device's copies: memory that was used on one stream is not given to another."""
    return torch.cuda.Stream(device)


def _arrived(step: LoadedStep, event: torch.cuda.Event, device: torch.device) -> LoadedStep:
    current = torch.cuda.current_stream(device)
    current.wait_event(event)
    for batch in step:
        for tensor in (*batch.looks, *batch.labels):
            tensor.record_stream(current)  # its memory must not be given away before the step has used it
    return step


def _joined(pieces: Sequence[LoadedBatch], device: torch.device) -> LoadedBatch:
    """Put the pieces of a micro-batch together, on the device."""

    def join(tensors: tuple[Tensor, ...]) -> Tensor:
        moved = [tensor.to(device, non_blocking=True) for tensor in tensors]
        return moved[0] if len(moved) == 1 else torch.cat(moved)

    looks, labels = (tuple(map(join, zip(*tensors, strict=True))) for tensors in zip(*pieces, strict=True))
    return LoadedBatch(looks, labels)


# --- loaders ----------------------------------------------------------------------------------------------------------


class TrainLoader:
    """The training batches of one process.

    Args:
        images: the training list.
        plan: the division of an epoch, for `len(images)` images.
        seed: of order and augmentation, 0 or more, the same in every process.
        kind: `standard`, or `glmc` for two looks of each image and of its partner from loader B.
        resolution: R.
        device: where batches go.
        workers: processes that decode; 0 decodes in this one.
        prefetch: pieces of micro-batches, of `PIECE` images at most, that each worker makes in advance: at the end of
            an epoch, of the next one, so that an evaluation in between finds it ready.
        epochs: of the run; nothing is made for epochs that do not follow. None: there is always a next one.
        other_weights_N: (N,) chances of loader B, proportional; for `glmc` alone.
        decode: "device" decodes JPEGs on a CUDA device; workers only read them.

    Attributes:
        waited_seconds: how long `next` has waited for data so far, or decoded and augmented it itself; may be set to 0.

    Raises:
        ValueError: the arguments do not fit each other.
    """

    def __init__(
        self,
        images: ImageList,
        plan: Plan,
        *,
        seed: int,
        kind: Kind,
        resolution: int,
        device: torch.device,
        workers: int,
        prefetch: int = PREFETCH,
        epochs: int | None = None,
        other_weights_N: Tensor | None = None,
        decode: Decode = "cpu",
    ) -> None:
        if plan.num_images != len(images):
            raise ValueError(f"the plan is for {plan.num_images} images, the list has {len(images)}: make both alike")
        _check_kind(kind, other_weights_N, len(images))
        if decode == "device" and device.type != "cuda":
            raise ValueError(f"decode='device' needs a CUDA device, and this one is {device}: use decode='cpu'")
        self.plan, self.seed, self.device, self.epochs = plan, seed, device, epochs
        self._order, self._weights_N = EpochOrder(len(images)), other_weights_N
        self._answers: Iterator[Any] = iter(())
        self._comes: tuple[int, int] | None = None  # the epoch and step that the next answers are for
        self._dataset = _TrainImages(images, kind, resolution, seed, decode)
        self._pipeline: _Pipeline[_Request] = _Pipeline(
            self._dataset,
            workers=workers,
            prefetch=prefetch,
            persistent=True,
            pin_memory=device.type == "cuda" and decode == "cpu",
        )

    @property
    def waited_seconds(self) -> float:
        return self._pipeline.waited_seconds

    @waited_seconds.setter
    def waited_seconds(self, seconds: float) -> None:
        self._pipeline.waited_seconds = seconds

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[LoadedStep]:
        """Yield the steps of an epoch from `first_step` on; nothing of earlier ones is read.

        An unfinished epoch is dropped when the next one begins.

        Raises:
            BadImage: a file cannot be read; list, line and file are named.
        """
        return _ahead(self._steps(epoch, first_step), self.device, self._move)

    def _steps(self, epoch: int, first_step: int) -> Iterator[tuple[list[Any], ...]]:
        """Yield the pieces of steps, which the workers were asked for already where the steps before were taken."""
        for step in range(first_step, self.plan.steps):
            if self._comes != (epoch, step):
                self._answers = self._pipeline.run(self._requests(epoch, step))
            self._comes = None
            sizes = [len(_pieces(places)) for places in self.plan.parts(step)]
            pieces = tuple(list(itertools.islice(self._answers, size)) for size in sizes)
            if step + 1 < self.plan.steps:
                self._comes = epoch, step + 1
            elif self.epochs is None or epoch + 1 < self.epochs:
                self._comes = epoch + 1, 0
            yield pieces

    def _requests(self, epoch: int, first_step: int) -> Iterator[_Request]:
        """Yield the pieces of this process's micro-batches, epoch after epoch."""
        while True:
            orders = [self._order.order(self.seed, epoch)]
            if self._weights_N is not None:
                orders.append(self._order.resampled(self._weights_N, self.seed, epoch))
            for step in range(first_step, self.plan.steps):
                for places in self.plan.parts(step):
                    for piece in _pieces(places):
                        indices = tuple(tuple(one[piece.start : piece.stop].tolist()) for one in orders)
                        yield _Request(epoch, piece.start, indices)
            epoch, first_step = epoch + 1, 0
            if self.epochs is not None and epoch >= self.epochs:
                return

    def close(self) -> None:
        """End the workers."""
        self._pipeline.close()

    def _move(self, pieces: Sequence[LoadedBatch | _Encoded]) -> LoadedBatch:
        start = time.perf_counter()
        decoded = [self._decoded(piece) if isinstance(piece, _Encoded) else piece for piece in pieces]
        if self._dataset.decode == "device":  # the host's time for it
            self.waited_seconds += time.perf_counter() - start
        return _joined(decoded, self.device)

    def _decoded(self, piece: _Encoded) -> LoadedBatch:
        return self._dataset.augment(piece.request, _decode_on(piece, self._dataset.images, self.device))


def _decode_on(batch: _Encoded, images: ImageList, device: torch.device) -> list[Tensor]:
    """Decode files to uint8 (3, H, W) on the device; those that it cannot decode, on the CPU."""
    from torchvision.io import ImageReadMode, decode_jpeg

    files = batch.data.split(batch.sizes)
    plain = [file for file, plain in zip(files, batch.plain, strict=True) if plain]
    try:
        on_device = iter(decode_jpeg(plain, mode=ImageReadMode.RGB, device=device) if plain else [])
        kinds = batch.plain
    except RuntimeError:  # does not say which: the CPU decodes all of them, or names the broken one
        on_device, kinds = iter(()), (False,) * len(files)
    decoded = []
    for i, file, plain_file in zip(sum(batch.request.indices, ()), files, kinds, strict=True):
        if plain_file:
            decoded.append(next(on_device))
        else:
            image = _read(images, i, decode, io.BytesIO(file.numpy().tobytes()))
            decoded.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device))
    return decoded


def _check_kind(kind: Kind, other_weights_N: Tensor | None, num_images: int) -> None:
    if (kind == "glmc") != (other_weights_N is not None):
        raise ValueError(
            f"kind is {kind!r}, other_weights_N {'missing' if kind == 'glmc' else 'given'}: glmc alone "
            "has a second loader, and draws from it by these weights"
        )
    if other_weights_N is not None and other_weights_N.shape != (num_images,):
        raise ValueError(f"other_weights_N has shape {tuple(other_weights_N.shape)}; expected ({num_images},)")


class EvalLoader:
    """Images without augmentation, divided among the processes: each exactly once, none padded.

    Processes may have numbers of batches that differ by one.

    Args:
        images: the list to evaluate on.
        rank, ranks: which of how many processes this is; it has the images rank, rank + ranks, ...
        batch_size: of this process; the last one may be smaller.
        resolution: R.
        device: where batches go.
        workers: processes that decode; they end with each pass.

    Raises:
        BadImage: while iterating, a file cannot be read.
    """

    def __init__(
        self,
        images: ImageList,
        *,
        rank: int = 0,
        ranks: int = 1,
        batch_size: int,
        resolution: int,
        device: torch.device,
        workers: int,
    ) -> None:
        self.device = device
        mine = range(rank, len(images), ranks)
        self._batches = [_pieces(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
        self._pipeline: _Pipeline[range] = _Pipeline(
            _EvalImages(images, resolution),
            workers=workers,
            prefetch=PREFETCH,
            persistent=False,
            pin_memory=device.type == "cuda",
        )

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (N, 3, R, R) uint8 and labels (N,) int64 on the device."""
        answers = self._pipeline.run([piece for pieces in self._batches for piece in pieces])
        batches = ((tuple(itertools.islice(answers, len(pieces))),) for pieces in self._batches)
        for (batch,) in _ahead(batches, self.device, partial(_joined, device=self.device)):
            yield batch.looks[0], batch.labels[0]


# --- without files ----------------------------------------------------------------------------------------------------


class SyntheticLoader:
    """The interface of `TrainLoader` without files: noise made once on the device, to measure everything but the data.

    Args:
        counts: training images per class.
        plan, seed, kind, resolution, device, other_weights_N: as for `TrainLoader`.
    """

    def __init__(
        self,
        counts: Sequence[int],
        plan: Plan,
        *,
        seed: int,
        kind: Kind,
        resolution: int,
        device: torch.device,
        other_weights_N: Tensor | None = None,
    ) -> None:
        if plan.num_images != sum(counts):
            raise ValueError(f"the plan is for {plan.num_images} images, counts add up to {sum(counts)}")
        _check_kind(kind, other_weights_N, plan.num_images)
        self.waited_seconds = 0.0
        self.plan, self.seed, self.device = plan, seed, device
        self._weights_N = other_weights_N
        self.labels_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        looks = 1 if kind == "standard" else 4
        self._looks = [_noise(plan.largest_part, resolution, seed + look, device) for look in range(looks)]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[LoadedStep]:
        """Yield the steps of an epoch from `first_step` on."""
        order = EpochOrder(self.plan.num_images)
        orders = [order.order(self.seed, epoch)]
        if self._weights_N is not None:
            orders.append(order.resampled(self._weights_N, self.seed, epoch))
        labels = [self.labels_N[one].to(self.device) for one in orders]
        for step in range(first_step, self.plan.steps):
            yield tuple(
                LoadedBatch(
                    tuple(look[: len(places)] for look in self._looks),
                    tuple(one[places.start : places.stop] for one in labels),
                )
                for places in self.plan.parts(step)
            )

    def close(self) -> None:
        """Do nothing: there are no workers."""


class SyntheticEvalLoader:
    """The interface of `EvalLoader` without files.

    Args:
        num_classes: C.
        per_class: images of each class, in all processes together.
        rank, ranks, batch_size, resolution, device: as for `EvalLoader`.
    """

    def __init__(
        self,
        num_classes: int,
        per_class: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        batch_size: int,
        resolution: int,
        device: torch.device,
    ) -> None:
        labels = torch.arange(num_classes).repeat_interleave(per_class)[rank::ranks]
        self._labels = labels.to(device).split(batch_size)
        self._images = _noise(min(batch_size, max(len(labels), 1)), resolution, 0, device)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for labels in self._labels:
            yield self._images[: len(labels)], labels


def _noise(num_images: int, resolution: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, 3, resolution, resolution)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)

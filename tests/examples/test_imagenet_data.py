"""ImageNet-LT: lists, the check of files, augmentation, and batches for any number of processes and workers.

Images are one colour per class where a test needs to tell them apart: red, green or blue survives crops and jitter.
"""

from __future__ import annotations

import gzip
import io
import itertools
import multiprocessing
import os
import pickle
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install -e '.[imagenet]'")

from longtail.imagenet import images, lists, loader
from PIL import Image, ImageFilter
from pretended_gpu import pretended_gpu

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"
CPU = torch.device("cpu")
R = 32
COLOURS = ((200, 60, 30), (40, 190, 60), (50, 70, 210))  # of classes 0, 1, 2: the largest channel is the class

# Python 3.12 and later say so of every fork of a process with threads, which is how workers start.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def save(path: Path, colour: tuple[int, int, int], mode: str = "RGB", size: tuple[int, int] = (48, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    image = image.quantize(4) if mode == "P" else image.convert(mode)  # converting would dither
    image.save(path, "PNG" if path.suffix == ".png" else "JPEG", **({} if path.suffix == ".png" else {"quality": 95}))
    return path


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture
def tree(tmp_path: Path) -> lists.ImageList:
    """Twenty-three images with structure, so that looks differ, and the list of them: line = place + 1."""
    noise = np.random.default_rng(0)
    lines = []
    for i in range(23):
        label = (0, 0, 0, 1, 1, 2)[i % 6]
        pixels = np.array(COLOURS[label]) + noise.normal(0, 15, (40, 48, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i}.jpg", quality=95)
        lines.append(f"{i}.jpg {label}")
    return lists.read_list(write(tmp_path / "train.txt", *lines), tmp_path)


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_list_is_read(tmp_path: Path, packed: bool) -> None:
    text = "train/a b.JPEG 3\n\n  ./val/c.JPEG\t0\r\nd.png 12"
    path = tmp_path / ("list.txt.gz" if packed else "list.txt")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = lists.read_list(path, tmp_path / "root", num_classes=13)
    assert found.files == ("train/a b.JPEG", "val/c.JPEG", "d.png")
    assert found.labels_N.tolist() == [3, 0, 12]
    assert found.labels_N.dtype == torch.int64
    assert (found.lines, found.skipped, len(found)) == ((1, 3, 4), 0, 3)
    assert found.where(1) == f"{path}:3 ({tmp_path / 'root' / 'val/c.JPEG'})"


BAD_LINES = [
    ("b.jpg", "no label; write `file label`"),
    ("7", "no label; write `file label`"),
    ("b.jpg x", "the label 'x' is no integer"),
    ("b.jpg 1.0", "the label '1.0' is no integer"),
    ("b.jpg 1_0", "the label '1_0' is no integer"),
    ("b.jpg " + "9" * 30, "is no integer"),
    ("b.jpg -1", "label -1 is out of range; expected 0 .. 9"),
    ("b.jpg 10", "label 10 is out of range; expected 0 .. 9, the 10 classes of the training list"),
    ("/etc/b.jpg 1", "outside the image folder; write its name relative"),
    ("../b.jpg 1", "outside the image folder"),
    ("x/../../b.jpg 1", "outside the image folder"),
    ("a.jpg 1", "the file stands in line 1 already; keep one of the two"),
    ("x/../a.jpg 1", "the file stands in line 1 already"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line_is_named_or_left_out(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "list.txt", "a.jpg 1", "", line, "c.jpg 2")
    with pytest.raises(ValueError, match=r"1 bad lines in .*list\.txt") as caught:
        lists.read_list(path, tmp_path, num_classes=10)
    assert f"{path}:3 {line!r}: " in str(caught.value)
    assert reason in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    found = lists.read_list(path, tmp_path, num_classes=10, skip_bad=True)
    assert (found.files, found.labels_N.tolist(), found.lines) == (("a.jpg", "c.jpg"), [1, 2], (1, 4))
    assert found.skipped == 1


def test_names_with_dots_stay_inside(tmp_path: Path) -> None:
    path = write(tmp_path / "list.txt", "x/../b.jpg 1", "..b.jpg 1")
    assert lists.read_list(path, tmp_path).files == ("b.jpg", "..b.jpg")


def test_label_without_a_known_bound_is_bounded_by_what_can_be_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label 2147483648 is out of range; expected 0 \.\. 2147483647"):
        lists.read_list(write(tmp_path / "list.txt", "a.jpg 2147483648"), tmp_path)


def test_of_many_bad_lines_ten_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "list.txt", *(f"{i}.jpg -1" for i in range(13)))
    with pytest.raises(ValueError, match="13 bad lines") as caught:
        lists.read_list(path, tmp_path)
    assert f"{path}:10 " in str(caught.value)
    assert f"{path}:11 " not in str(caught.value)
    assert "... and 3 more" in str(caught.value)


@pytest.mark.parametrize("lines", [(), ("", " "), ("a.jpg x",)])
def test_list_without_an_image_is_explained(tmp_path: Path, lines: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"list\.txt lists no image"):
        lists.read_list(write(tmp_path / "list.txt", *lines), tmp_path, skip_bad=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt.gz", b"a.jpg 1\n"),
        ("list.txt.gz", gzip.compress(b"a.jpg 1\n" * 50)[:-12]),
        ("list.txt.gz", gzip.compress(b"a.jpg 1\n")[:10] + b"\xff" * 20),
        ("list.txt", gzip.compress(b"a.jpg 1\n")),
    ],
    ids=["no gzip", "truncated gzip", "damaged gzip", "gzip without its suffix"],
)
def test_foreign_list_is_explained(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"is no list of lines `file label`") as caught:
        lists.read_list(tmp_path / name, tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        lists.read_list(tmp_path / "nowhere.txt", tmp_path)


def test_classes_are_counted_and_empty_ones_named() -> None:
    assert lists.class_counts(torch.tensor([1, 0, 1, 2]), 3) == [1, 2, 1]
    with pytest.raises(ValueError, match=r"2 of 4 classes have no training image \(0, 2\)"):
        lists.class_counts(torch.tensor([1, 3, 1, 3]), 4)
    with pytest.raises(ValueError, match=r"100000 classes, .* only 2 training images"):
        lists.class_counts(torch.tensor([0, 99_999]), 100_000)
    assert lists.shot_groups([101, 100, 20, 19]) == {"many": [0], "medium": [1, 2], "few": [3]}


@pytest.mark.skipif(not (SHARED / "imagenet_lt").exists(), reason="no ../shared/data beside the repository")
@pytest.mark.parametrize(("name", "total", "folder"), [("test", 50_000, "val"), ("val", 20_000, "train")])
def test_published_lists_are_read(name: str, total: int, folder: str) -> None:
    path = SHARED / "imagenet_lt" / f"ImageNet_LT_{name}.txt.gz"
    found = lists.read_list(path, Path("imagenet"), num_classes=1000)
    assert (len(found), found.skipped) == (total, 0)
    assert lists.class_counts(found.labels_N, 1000) == [total // 1000] * 1000
    assert all(file.startswith(f"{folder}/n") and file.endswith(".JPEG") for file in found.files)
    with gzip.open(path, "rt") as text:
        assert [f"{file} {label}\n" for file, label in zip(found.files, found.labels_N.tolist(), strict=True)] == list(
            text
        )


# --- the check of files -----------------------------------------------------------------------------------------------


def make_good(folder: Path) -> list[str]:
    save(folder / "colour.jpg", COLOURS[0])
    save(folder / "grey.jpg", COLOURS[0], "L")
    save(folder / "cmyk.jpg", COLOURS[0], "CMYK")
    save(folder / "alpha.png", COLOURS[0], "RGBA")
    save(folder / "palette.png", COLOURS[0], "P")
    save(folder / "png.JPEG", COLOURS[0])
    Image.new("RGB", (48, 40), COLOURS[0]).save(folder / "png.JPEG", "PNG")  # ImageNet has one with the wrong suffix
    trailing = save(folder / "trailing.jpg", COLOURS[0])
    trailing.write_bytes(trailing.read_bytes() + b"\0" * 100)
    return ["colour.jpg", "grey.jpg", "cmyk.jpg", "alpha.png", "palette.png", "png.JPEG", "trailing.jpg"]


def noise(folder: Path, name: str, rows: int = 80) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 96, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return (folder / name).read_bytes()


BAD_FILES = {
    "missing.jpg": "is missing",
    "empty.jpg": "is empty",
    "text.jpg": "is no JPEG or PNG",
    "gif.jpg": "is no JPEG or PNG",
    "head.jpg": "is no JPEG or PNG",
    "half.jpg": "is truncated: no end of a JPEG",
    "half.png": "is truncated: no end of a PNG",
    "folder.jpg": "cannot be read",
}


def make_bad(folder: Path) -> None:
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("<html>404 Not Found</html>")
    Image.new("RGB", (8, 8)).save(folder / "gif.jpg", "GIF")
    whole = noise(folder, "half.jpg")
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "head.jpg").write_bytes(whole[:2] + b"\0" * 50)
    whole = noise(folder, "half.png")
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "folder.jpg").mkdir()


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("level", ["fast", "full"])
def test_scan_finds_every_bad_file(tmp_path: Path, level: Literal["fast", "full"], workers: int) -> None:
    good = make_good(tmp_path)
    make_bad(tmp_path)
    names = [good[0], *BAD_FILES, *good[1:]]
    path = write(tmp_path / "list.txt", *(f"{name} {i}" for i, name in enumerate(names)))
    found = lists.read_list(path, tmp_path)
    with pytest.raises(ValueError, match=r"8 of 15 images of .*list\.txt cannot be used") as caught:
        lists.scan(found, level=level, workers=workers)
    for line, (name, reason) in enumerate(BAD_FILES.items(), start=2):
        assert f"{path}:{line} ({tmp_path / name}): {reason}" in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    assert not [name for name in good if f"/{name})" in str(caught.value)]
    left = lists.scan(found, level=level, workers=workers, skip_bad=True)
    assert left.files == tuple(good)
    assert left.labels_N.tolist() == [0, *range(9, 15)]
    assert left.lines == (1, *range(10, 16))
    assert left.skipped == 8


def test_full_scan_decodes(tmp_path: Path) -> None:
    data = bytearray(noise(tmp_path, "damaged.png"))
    data[len(data) // 2] ^= 255
    (tmp_path / "damaged.png").write_bytes(data)
    save(tmp_path / "good.jpg", COLOURS[0])
    found = lists.read_list(write(tmp_path / "list.txt", "damaged.png 0", "good.jpg 0"), tmp_path)
    assert lists.scan(found, level="fast", workers=1) is found
    with pytest.raises(ValueError, match=r"list\.txt:1 .*damaged\.png\): cannot be read: "):
        lists.scan(found, level="full", workers=1)


def test_skipped_files_add_to_skipped_lines_and_ten_are_shown(tmp_path: Path) -> None:
    save(tmp_path / "good.jpg", COLOURS[0])
    lines = ["bad line", "good.jpg 0", *(f"{i}.jpg 0" for i in range(12))]
    found = lists.read_list(write(tmp_path / "list.txt", *lines), tmp_path, skip_bad=True)
    assert lists.scan(found, workers=2, skip_bad=True).skipped == 13
    assert lists.scan(found, level="off", workers=2) is found
    with pytest.raises(ValueError, match="12 of 13 images") as caught:
        lists.scan(found, workers=2)
    assert str(caught.value).count("is missing") == 10
    assert "... and 2 more" in str(caught.value)


def test_scan_needs_one_good_file(tmp_path: Path) -> None:
    found = lists.read_list(write(tmp_path / "list.txt", "a.jpg 0"), tmp_path)
    with pytest.raises(ValueError, match="1 of 1 images"):
        lists.scan(found, workers=1, skip_bad=True)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.jpg", "RGB"), ("a.jpg", "CMYK"), ("a.jpg", "L"), ("a.png", "RGBA"), ("a.png", "P"), ("a.png", "LA")],
)
def test_every_colour_space_decodes_to_rgb(tmp_path: Path, name: str, mode: str) -> None:
    grey = round(0.299 * 200 + 0.587 * 60 + 0.114 * 30)  # ITU-R 601, as JPEG
    expected = (grey,) * 3 if mode in ("L", "LA") else COLOURS[0]
    image = images.decode(save(tmp_path / name, COLOURS[0], mode))
    assert (image.mode, image.size) == ("RGB", (48, 40))
    tolerance = 0 if name == "a.png" else 3  # a JPEG of quality 95 has steps of 2 or 3
    assert np.abs(np.array(image).astype(int) - expected).max() <= tolerance


def broken_images(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Return files whose head is an image's, and what PIL says of them; each of these is another class of exception."""
    whole, png = noise(folder, "a.jpg"), bytearray(noise(folder, "a.png", rows=400))
    header = struct.pack(">4sIIBBBBB", b"IHDR", 65_000, 65_000, 8, 2, 0, 0, 0)
    empty = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, b"IDAT", b"IEND")
    )
    png[png.rindex(b"IDAT")] = 0  # the second part of the pixels
    return {
        "half.jpg": (whole[: len(whole) // 2], "truncated"),
        "start.jpg": (whole[:4], "truncated|cannot identify"),
        "empty.jpg": (b"", "cannot identify"),
        "text.jpg": (b"text", "cannot identify"),
        "huge.png": (bytes(png[:8]) + empty, "exceeds limit"),
        "chunk.png": (bytes(png), "broken PNG"),
    }


@pytest.mark.parametrize("name", ["half.jpg", "start.jpg", "empty.jpg", "text.jpg", "huge.png", "chunk.png"])
def test_broken_image_is_an_os_error_and_found_by_the_scan(tmp_path: Path, name: str) -> None:
    content, reason = broken_images(tmp_path)[name]
    with pytest.raises(OSError, match=reason):
        images.decode(io.BytesIO(content))
    (tmp_path / name).write_bytes(content)
    found = lists.read_list(write(tmp_path / "list.txt", f"{name} 0"), tmp_path)
    with pytest.raises(ValueError, match=rf"list\.txt:1 .*{name}\): "):
        lists.scan(found, level="full", workers=1)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("kind", ["standard", "glmc"])
def test_training_looks_are_square_uint8(kind: images.Kind, as_tensor: bool) -> None:
    transform = images.training_transform(kind, R)
    for size in ((48, 40), (20, 300), (7, 7)):
        image: Any = Image.new("RGB", size, COLOURS[1])
        if as_tensor:
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        for _ in range(5):
            look = transform(image)
            assert (look.shape, look.dtype) == ((3, R, R), torch.uint8)
            assert type(look) is Tensor


def test_jitter_is_the_published_strength() -> None:
    """Of one grey 100, contrast and saturation change nothing and brightness makes 60 .. 140."""
    for kind in get_args(images.Kind):
        transform = images.training_transform(kind, 8)
        looks = torch.stack([transform(Image.new("RGB", (8, 8), (100,) * 3)) for _ in range(400)]).float()
        values = looks[:, 0, 4, 4]
        assert bool((looks == values[:, None, None, None]).all())
        assert 60 <= float(values.min()) < 65  # 400 uniform draws miss an eighth of the range with chance 1e-23
        assert 135 < float(values.max()) <= 140
        assert abs(float(values.mean()) - 100) < 6  # uniform on 60 .. 140: five standard errors of 1.15


def test_looks_are_flipped_grey_and_blurred_as_often_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    blur = mock.Mock(wraps=ImageFilter.GaussianBlur)
    monkeypatch.setattr(ImageFilter, "GaussianBlur", blur)
    halves = Image.new("RGB", (40, 40), COLOURS[0])
    halves.paste(COLOURS[2], (20, 0, 40, 40))  # red on the left, blue on the right
    count = 1600
    shares: dict[images.Kind, tuple[float, float]] = {"standard": (0.0, 0.0), "glmc": (0.2, 0.5)}
    for kind, (grey_share, blur_share) in shares.items():
        transform = images.training_transform(kind, 8)
        looks = torch.stack([transform(halves) for _ in range(count)]).float()
        grey = (looks.amax(1) - looks.amin(1) == 0).all(-1).all(-1)
        left, right = looks[~grey, 0, 4, 0], looks[~grey, 0, 4, -1]  # their red
        seen_both = (left - right).abs() > 40
        flipped = (right > left)[seen_both].float().mean()
        # Five standard errors of a share of all looks, or of the 600 or more crops that show both halves.
        assert float(grey.float().mean()) == pytest.approx(grey_share, abs=5 * (grey_share * 0.8 / count) ** 0.5)
        assert blur.call_count / count == pytest.approx(blur_share, abs=5 * (blur_share * 0.5 / count) ** 0.5)
        assert int(seen_both.sum()) > 600
        assert float(flipped) == pytest.approx(0.5, abs=5 * (0.25 / 600) ** 0.5)
    sigmas = [call.args[0] for call in blur.call_args_list]
    assert 0.1 <= min(sigmas) < 0.3 < 1.8 < max(sigmas) <= 2.0


def test_both_blurs_are_the_same_blur() -> None:
    pixels = np.zeros((33, 33, 3), np.uint8)
    pixels[:, 16:] = 240
    blur = images.GaussianBlur(224)
    assert blur.kernel_size == 23
    for seed in range(5):
        with images.seeded(seed):
            of_pil = np.array(blur(Image.fromarray(pixels))).astype(int)
        with images.seeded(seed):
            of_tensor = blur(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0).numpy().astype(int)
        assert (of_tensor[16, 15:17] != pixels[16, 15:17]).any()
        # PIL's is three box blurs, within a thirtieth of the step of a Gaussian.
        assert np.abs(of_pil - of_tensor).max() <= 10


def test_test_time_images_are_the_middle() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3)).astype(np.uint8)
    # R = 56 resizes the shorter side to 64, which it has: nothing but the middle is taken.
    found = images.test_transform(56)(Image.fromarray(pixels))
    np.testing.assert_array_equal(found.permute(1, 2, 0), pixels[4:60, 12:68])
    wide = Image.new("RGB", (512, 128), COLOURS[0])
    wide.paste(COLOURS[2], (0, 0, 256, 128))
    look = images.test_transform(56)(wide)  # 256 x 64, and the middle of it
    assert look.shape == (3, 56, 56)
    assert look[2, :, :25].eq(COLOURS[2][2]).all()
    assert look[0, :, 31:].eq(COLOURS[0][0]).all()


def test_seeded_depends_on_its_key_alone_and_leaves_no_trace() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    draws = {}
    torch.manual_seed(5)
    for key in ((0, 0), (0, 1), (1, 0), (0, 0, 0), (0,)):
        with images.seeded(7, *key):
            draws[key] = torch.rand(3)
    with pytest.raises(KeyError), images.seeded(7):
        raise KeyError
    assert torch.equal(torch.rand(3), expected)
    with images.seeded(7, 0, 1):
        assert torch.equal(torch.rand(3), draws[0, 1])
    with images.seeded(8, 0, 1):
        draws[8,] = torch.rand(3)
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 6


def test_normalise_is_the_formula() -> None:
    batch = torch.randint(256, (4, 3, 5, 6), dtype=torch.uint8)
    found = images.Normalise(CPU)(batch)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (batch.numpy() / 255.0 - mean[:, None, None]) / std[:, None, None]
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # values up to 3 in float32, two roundings
    assert not images.Normalise(CPU).state_dict()


# --- plans ------------------------------------------------------------------------------------------------------------


@hypothesis.given(st.integers(1, 400), st.integers(1, 120), st.integers(1, 5), st.integers(1, 4))
@hypothesis.example(115_846 % 1024, 1024, 4, 1)
def test_plan_uses_every_place_once(num_images: int, batch_size: int, ranks: int, accumulate: int) -> None:
    steps = -(-num_images // batch_size)
    # numpy's division of the same numbers tells how large the parts are; it puts the larger ones first.
    batches = np.array_split(np.arange(num_images), steps)
    sizes = {len(part) for batch in batches for part in np.array_split(batch, ranks * accumulate)}
    if min(sizes) < 2:
        with pytest.raises(ValueError, match=f"{num_images} images in steps of at most {batch_size}"):
            loader.Plan(num_images, batch_size, ranks, 0, accumulate)
        return
    plans = [loader.Plan(num_images, batch_size, ranks, rank, accumulate) for rank in range(ranks)]
    places: list[int] = []
    found_sizes = set()
    for step in range(steps):
        parts = [part for plan in plans for part in plan.parts(step)]
        assert [len(plan.parts(step)) for plan in plans] == [accumulate] * ranks
        in_step = [place for part in parts for place in part]
        assert len(in_step) == plans[0].global_size(step) <= batch_size
        one_process = loader.Plan(num_images, batch_size)
        assert in_step == list(one_process.parts(step)[0])
        of_rank = [sum(map(len, plan.parts(step))) for plan in plans]
        assert max(of_rank) - min(of_rank) <= 1
        found_sizes |= {len(part) for part in parts}
        places += in_step
    assert places == list(range(num_images))
    step_sizes = [plans[0].global_size(step) for step in range(steps)]
    assert sorted(step_sizes) == sorted(map(len, batches))
    assert found_sizes <= sizes
    assert {plan.largest_part for plan in plans} == {max(found_sizes)}
    assert {plan.steps for plan in plans} == {steps}


def test_plan_says_what_would_fit() -> None:
    with pytest.raises(
        ValueError, match=r"20 images .* at most 9, .*4 ranks x 1 .* leave 1 .*batch size of 16 or more"
    ):
        loader.Plan(20, 9, ranks=4)
    with pytest.raises(ValueError, match=r"leave 0 images in some.* Use fewer micro-batches or fewer processes"):
        loader.Plan(7, 100, ranks=4, accumulate=2)
    for num_images in range(8, 60):  # the advised batch size does
        loader.Plan(num_images, 16, ranks=4)
    with pytest.raises(ValueError, match=r"rank is 2; expected 0 \.\. 1"):
        loader.Plan(20, 10, ranks=2, rank=2)
    for name in ("num_images", "batch_size", "ranks", "accumulate"):
        with pytest.raises(ValueError, match=f"{name} is 0; expected 1 or more"):
            loader.Plan(**{"num_images": 20, "batch_size": 10, name: 0})


def test_order_is_a_permutation_of_seed_and_epoch() -> None:
    order = loader.EpochOrder(50)
    first = order.order(3, 0)
    assert first.dtype == torch.int64
    assert sorted(first.tolist()) == list(range(50))
    assert torch.equal(first, loader.EpochOrder(50).order(3, 0))
    assert len({tuple(order.order(*key).tolist()) for key in ((3, 0), (3, 1), (4, 0), (0, 3))}) == 4
    assert first.tolist() != list(range(50))


def test_resampling_follows_the_weights() -> None:
    weights = torch.tensor([1.0, 0.0, 3.0, 4.0]).repeat(2500)
    order = loader.EpochOrder(10_000)
    drawn = order.resampled(weights, 0, 0)
    counts = np.bincount(drawn.numpy() % 4, minlength=4)
    expected = np.array([1250, 0, 3750, 5000])
    # Five standard deviations of a binomial count of 10,000 are at most 250.
    assert (np.abs(counts - expected) <= 250).all()
    assert counts[1] == 0
    assert torch.equal(drawn, order.resampled(weights * 7, 0, 0))
    assert not torch.equal(drawn, order.resampled(weights, 0, 1))
    assert not torch.equal(drawn, order.resampled(weights, 1, 0))
    # With replacement: 10,000 draws of 2,500 + 2,500 + 2,500 images repeat some.
    assert len(set(drawn.tolist())) < 7500


# --- training batches -------------------------------------------------------------------------------------------------

Epoch = dict[int, tuple[Tensor, ...]]
MakeLoader = Callable[..., loader.TrainLoader]


@pytest.fixture
def make_loader(tree: lists.ImageList) -> Iterator[MakeLoader]:
    made = []

    def make(kind: images.Kind = "glmc", *, workers: int = 0, batch: int = 8, **plan: int) -> loader.TrainLoader:
        weights = torch.arange(1, len(tree) + 1, dtype=torch.float64) if kind == "glmc" else None
        made.append(
            loader.TrainLoader(
                tree,
                loader.Plan(len(tree), batch, **plan),
                seed=3,
                kind=kind,
                resolution=R,
                device=CPU,
                workers=workers,
                other_weights_N=weights,
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert not multiprocessing.active_children()


def by_place(one: loader.TrainLoader, epoch: int, first_step: int = 0) -> Epoch:
    """Return looks and labels of one process by their place in the epoch."""
    found: Epoch = {}
    for step, micro_batches in enumerate(one.epoch(epoch, first_step), start=first_step):
        for batch, places in zip(micro_batches, one.plan.parts(step), strict=True):
            assert {len(tensor) for tensor in (*batch.looks, *batch.labels)} == {len(places)}
            for i, place in enumerate(places):
                found[place] = tuple(tensor[i] for tensor in (*batch.looks, *batch.labels))
    assert step == one.plan.steps - 1
    return found


def same(found: Epoch, expected: Epoch) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(a, b) for place in found for a, b in zip(found[place], expected[place], strict=True)
    )


def test_batches_show_the_listed_images(make_loader: MakeLoader, tree: lists.ImageList) -> None:
    found = by_place(make_loader("standard"), 0)
    assert sorted(found) == list(range(len(tree)))
    for look, label in found.values():
        assert (look.shape, look.dtype, label.dtype) == ((3, R, R), torch.uint8, torch.int64)
        assert int(look.float().mean((1, 2)).argmax()) == int(label)
    assert Counter(int(label) for _, label in found.values()) == Counter(tree.labels_N.tolist())


@pytest.mark.parametrize("kind", ["standard", "glmc"])
def test_looks_are_those_of_the_seed_the_epoch_and_the_place(
    make_loader: MakeLoader, tree: lists.ImageList, kind: images.Kind
) -> None:
    """Made here image by image from the documented key: seed, epoch, place, loader, look."""
    transform = images.training_transform(kind, R)
    order = loader.EpochOrder(len(tree))
    orders = [order.order(3, 1)]
    if kind == "glmc":
        orders.append(order.resampled(torch.arange(1.0, len(tree) + 1), 3, 1))
    expected: Epoch = {}
    for place in range(len(tree)):
        tensors = []
        for of_loader, indices in enumerate(orders):
            pixels = Image.open(tree.root / tree.files[indices[place]]).convert("RGB")
            for look in range(len(orders)):
                seed = np.random.SeedSequence(3, spawn_key=(1, place, of_loader, look)).generate_state(1, np.uint64)[0]
                torch.manual_seed(int(seed) // 2)
                tensors.append(transform(pixels))
        expected[place] = (*tensors, *(tree.labels_N[indices[place]] for indices in orders))
    assert same(by_place(make_loader(kind), 1), expected)
    looks = expected[0][: -len(orders)]
    assert len({tuple(look.flatten().tolist()) for look in looks}) == (1 if kind == "standard" else 4)


@pytest.mark.parametrize(
    "changed",
    [
        {"workers": 2},
        {"ranks": 2},
        {"ranks": 3, "accumulate": 1},
        {"accumulate": 3},
        {"ranks": 2, "accumulate": 2, "workers": 1, "batch": 12},
        {"batch": 23},
        {"piece": 3},
        {"piece": 2, "ranks": 2, "workers": 2},
    ],
    ids=str,
)
def test_looks_depend_on_no_division(
    make_loader: MakeLoader, changed: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_place(make_loader(), 2)
    changed = dict(changed)
    monkeypatch.setattr(loader, "PIECE", changed.pop("piece", loader.PIECE))
    found: Epoch = {}
    for rank in range(changed.get("ranks", 1)):
        of_rank = by_place(make_loader(**changed, rank=rank), 2)
        assert not found.keys() & of_rank.keys()
        found |= of_rank
    assert same(found, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_continues_in_the_middle_and_after_an_interruption(make_loader: MakeLoader, workers: int) -> None:
    one = make_loader(workers=workers)
    expected = by_place(make_loader(), 0)
    interrupted = one.epoch(0)
    next(interrupted)
    next(interrupted)
    rest = by_place(one, 0, first_step=2)
    first = one.plan.parts(2)[0].start
    assert sorted(rest) == list(range(first, 23))
    assert same(rest, {place: expected[place] for place in rest})
    assert same(by_place(one, 0), expected)  # the same workers, one epoch later
    assert not same(by_place(one, 1), expected)
    assert list(one.epoch(1, first_step=one.plan.steps)) == []


def test_next_epoch_is_made_while_another_thing_is_done(make_loader: MakeLoader) -> None:
    """Or the device would wait for its first images after every evaluation."""
    expected = [by_place(make_loader(), epoch) for epoch in range(4)]
    one = make_loader(workers=1)
    with mock.patch.object(one._pipeline, "run", wraps=one._pipeline.run) as run:
        for epoch in range(2):
            assert same(by_place(one, epoch), expected[epoch])
        assert run.call_count == 1
        assert same(by_place(one, 3), expected[3])  # not what was made
        assert run.call_count == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_is_made_after_the_last_epoch(make_loader: MakeLoader, tree: lists.ImageList, workers: int) -> None:
    one = make_loader("standard", workers=workers)
    one.epochs = 2
    order = loader.EpochOrder(len(tree))
    asked = [i for request in one._requests(0, 2) for i in request.indices[0]]
    assert asked == order.order(3, 0)[15:].tolist() + order.order(3, 1).tolist()
    expected = [by_place(make_loader("standard"), epoch) for epoch in range(4)]
    for epoch in (0, 1, 1, 3):  # what is asked for is made even so
        assert same(by_place(one, epoch), expected[epoch])


def test_passes_may_take_turns(make_loader: MakeLoader) -> None:
    one, expected = make_loader(workers=1), make_loader()
    pairs = list(zip(one.epoch(0), one.epoch(1), strict=True))
    for found, epoch in zip(zip(*pairs, strict=True), range(2), strict=True):
        for parts, others in zip(found, expected.epoch(epoch), strict=True):
            assert torch.equal(parts[0].looks[0], others[0].looks[0])


def test_workers_make_pieces_of_batches(tmp_path: Path) -> None:
    """A whole batch of 1,024 images takes a worker seconds, in which the first step of an epoch would wait."""
    numbers = tuple(range(1, 1001))
    found = lists.ImageList(tmp_path, tmp_path, tuple(map(str, numbers)), torch.zeros(1000).long(), numbers)
    shared: dict[str, Any] = {"kind": "standard", "resolution": R, "device": CPU, "workers": 0}
    one = loader.TrainLoader(found, loader.Plan(1000, 300, accumulate=2), seed=3, **shared)
    requests = list(itertools.islice(one._requests(0, 1), 12 + 3))
    # Of an epoch from its second step on: 6 micro-batches of 125 images. Then comes the next epoch.
    assert [len(request.indices[0]) for request in requests] == [62, 63] * 7 + [62]
    assert [request.epoch for request in requests] == [0] * 12 + [1] * 3
    order = loader.EpochOrder(1000)
    assert [i for request in requests[:12] for i in request.indices[0]] == order.order(3, 0)[250:].tolist()
    assert requests[12].indices[0] == tuple(order.order(3, 1)[:62].tolist())


def test_continuing_reads_nothing_of_earlier_steps(make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    read = mock.Mock(wraps=images.decode)
    monkeypatch.setattr(loader, "decode", read)
    one = make_loader("standard")
    by_place(one, 0, first_step=2)
    assert read.call_count == one.plan.global_size(2)
    read.reset_mock()
    by_place(make_loader("glmc"), 0)
    assert read.call_count == 2 * 23  # an image is decoded once for its two looks


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_leave_the_global_generators_alone(make_loader: MakeLoader, workers: int) -> None:
    one = make_loader(workers=workers)
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    for epoch in range(2):
        by_place(one, epoch)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]  # noqa: NPY002


def test_spawned_workers_can_be_given_the_data(make_loader: MakeLoader) -> None:
    """Where there is no fork, workers start from nothing and receive what they need pickled."""
    one = make_loader()
    request = loader._Request(0, 0, ((0, 1), (2, 2)))
    expected, found = one._dataset[request], pickle.loads(pickle.dumps(one._dataset))[request]
    assert isinstance(expected, loader.LoadedBatch)
    assert len(expected.looks) == 4
    assert all(torch.equal(a, b) for a, b in zip(found.looks, expected.looks, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_file_that_fails_in_training_is_named(make_loader: MakeLoader, tree: lists.ImageList, workers: int) -> None:
    one = make_loader("standard", workers=workers)
    expected = by_place(one, 0)
    whole = (tree.root / tree.files[11]).read_bytes()
    for content in (None, whole[:600], b""):
        if content is None:
            (tree.root / tree.files[11]).unlink()
        else:
            (tree.root / tree.files[11]).write_bytes(content)
        with pytest.raises(loader.BadImage) as caught:
            by_place(one, 2)  # workers have made the one before already
        assert str(caught.value).startswith(f"{tree.path}:12 ({tree.root / '11.jpg'}) cannot be read (")
        assert "--scan full" in str(caught.value)
        evaluation = loader.EvalLoader(tree, batch_size=4, resolution=R, device=CPU, workers=workers)
        with pytest.raises(loader.BadImage, match=r"train\.txt:12 "):
            list(evaluation)
    (tree.root / tree.files[11]).write_bytes(whole)
    assert same(by_place(one, 0), expected)  # the workers are still there


def test_close_ends_workers_in_the_middle_of_an_epoch(make_loader: MakeLoader) -> None:
    one = make_loader(workers=2)
    running = one.epoch(0)
    next(running)
    assert len(multiprocessing.active_children()) == 2
    one.close()
    assert not multiprocessing.active_children()
    one.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(one.epoch(1))


LEFT_OPEN = """
import sys
from pathlib import Path
import torch
from longtail.imagenet import lists, loader

tree = lists.read_list(Path(sys.argv[1]), Path(sys.argv[1]).parent)
shared = {"seed": 0, "kind": "standard", "resolution": 32, "device": torch.device("cpu"), "workers": 1}
one = loader.TrainLoader(tree, loader.Plan(len(tree), 8), **shared)
print(len(list(one.epoch(0))))
"""


def test_a_loader_that_is_left_open_does_not_keep_python_from_ending(tree: lists.ImageList) -> None:
    path = os.pathsep.join([str(REPOSITORY / "examples"), str(REPOSITORY), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, str(tree.path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # PyTorch's, of its half-made iterator
def test_workers_of_a_loader_that_fails_to_start_end(make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """They ignore SIGTERM, so Python would wait for them at its exit for ever."""
    started: list[int] = []

    def fails(*_: object, **__: object) -> None:
        started.append(len(multiprocessing.active_children()))
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_reset", fails)
    with pytest.raises(RuntimeError, match="no driver"):
        next(make_loader(workers=2).epoch(0))
    assert started == [2]
    for worker in multiprocessing.active_children():
        worker.join(20)
        alive = worker.is_alive()
        worker.kill()
        assert not alive


def test_workers_without_shared_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two times 16 workers x 2 pieces of 64 images of 224 pixels are 617 MB, and a container has 64 MiB by default."""
    usage = mock.Mock(return_value=mock.Mock(total=64 * 2**20))
    monkeypatch.setattr("shutil.disk_usage", usage)
    check = partial(loader.check_shared_memory, [(1024, 1), (256, 1)], 224, folder=tmp_path)
    with pytest.raises(ValueError, match=r"holds 67 MB, but 1 processes with --workers 16 have up to 617 MB .*=2g"):
        check(workers=16, processes=1)
    usage.return_value.total = 8 * 1024**3
    check(workers=16, processes=8)
    check(workers=0, processes=8)
    with pytest.raises(ValueError, match=r"up to 11,715 MB .* --shm-size=24g\) or use fewer --workers"):
        loader.check_shared_memory([(120, 4), (256, 1)], 224, workers=16, processes=8, folder=tmp_path)
    loader.check_shared_memory([(15, 4), (256, 1)], 224, workers=16, processes=8, folder=tmp_path)
    loader.check_shared_memory([(120, 4)], 224, workers=16, processes=8, folder=tmp_path / "missing")


def test_shared_memory_that_runs_out_ends_the_epoch(make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of the worker's would fail instead, where nobody hears it."""

    def full(tensor: Tensor) -> Tensor:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    with pytest.raises(RuntimeError, match="No space left on device"):
        next(make_loader(workers=1).epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_waiting_is_counted(make_loader: MakeLoader, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_loader("standard", workers=workers)
    clock = mock.Mock(side_effect=itertools.count().__next__)
    monkeypatch.setattr("time.perf_counter", clock)
    for _ in one.epoch(0):
        clock.side_effect = itertools.count(clock() + 10_000).__next__  # the step takes its time
    # The clock ticks when it is read, before and after each of the three waits; what the steps took is no waiting.
    assert 3 <= one.waited_seconds < 10_000
    one.waited_seconds = 0.0
    assert one.waited_seconds == 0.0


@pytest.mark.filterwarnings("ignore:.*TorchVision are deprecated")
def test_decoding_in_this_process_counts_as_waiting(make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host decodes and augments between the steps, and a GPU may starve meanwhile. On the CPU, as a stand-in."""
    one = make_loader("standard")
    one._dataset.decode = "device"
    clock = mock.Mock(side_effect=itertools.count().__next__)
    monkeypatch.setattr("time.perf_counter", clock)
    whole = loader._decode_on

    def slow(*args: Any) -> list[Tensor]:
        clock.side_effect = itertools.count(clock() + 10_000).__next__
        return whole(*args)

    monkeypatch.setattr(loader, "_decode_on", slow)
    assert len(list(one.epoch(0))) == 3
    assert 30_000 <= one.waited_seconds < 31_000


def test_arguments_that_do_not_fit_are_explained(tree: lists.ImageList) -> None:
    def make(num_images: int = 23, **options: Any) -> None:
        loader.TrainLoader(
            tree,
            loader.Plan(num_images, 8),
            **{"seed": 0, "kind": "standard", "resolution": R, "device": CPU, "workers": 0, **options},
        )

    with pytest.raises(ValueError, match="the plan is for 22 images, the list has 23"):
        make(22)
    with pytest.raises(ValueError, match="kind is 'glmc', other_weights_N missing"):
        make(kind="glmc")
    with pytest.raises(ValueError, match="kind is 'standard', other_weights_N given"):
        make(other_weights_N=torch.ones(23))
    with pytest.raises(ValueError, match=r"other_weights_N has shape \(5,\); expected \(23,\)"):
        make(kind="glmc", other_weights_N=torch.ones(5))
    with pytest.raises(ValueError, match="decode='device' needs a CUDA device, and this one is cpu"):
        make(decode="device")


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [3, 64])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (3, 1), (5, 0), (30, 0)])
def test_every_image_is_evaluated_exactly_once(
    tree: lists.ImageList, ranks: int, workers: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PIECE", piece)
    transform = images.test_transform(R)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for rank in range(ranks):
        one = loader.EvalLoader(tree, rank=rank, ranks=ranks, batch_size=4, resolution=R, device=CPU, workers=workers)
        for _ in range(2):  # again, with new workers
            batches = list(one)
        assert len(batches) == len(one)
        assert all(len(look) == 4 for look, _ in batches[:-1])
        pairs = [pair for look, labels in batches for pair in zip(look, labels, strict=True)]
        assert not found.keys() & set(range(rank, len(tree), ranks))
        found |= dict(zip(range(rank, len(tree), ranks), pairs, strict=True))
    assert sorted(found) == list(range(len(tree)))
    for i, (look, label) in found.items():
        assert torch.equal(look, transform(Image.open(tree.root / tree.files[i])))
        assert int(label) == int(tree.labels_N[i])
    assert not multiprocessing.active_children()


SIGNALLED = """
import multiprocessing, os, signal, sys, threading, time
from pathlib import Path
import torch
from longtail.imagenet import lists, loader

def terminate():
    while not multiprocessing.active_children():
        time.sleep(0.001)
    os.killpg(0, signal.SIGTERM)

multiprocessing.set_start_method(sys.argv[1])
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
tree = lists.read_list(Path(sys.argv[2]), Path(sys.argv[2]).parent)
one = loader.EvalLoader(tree, batch_size=4, resolution=32, device=torch.device("cpu"), workers=2)
threading.Thread(target=terminate).start()
print(sum(len(labels) for _, labels in one), len(heard))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only POSIX has fork and signals to a group of processes")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_that_are_starting_outlive_sigterm_to_every_process(tree: lists.ImageList, method: str) -> None:
    """Whichever is Python's default: `fork`, from 3.14 on `forkserver`, on macOS `spawn`."""
    path = os.pathsep.join([str(REPOSITORY / "examples"), str(REPOSITORY), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, method, str(tree.path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["23", "1"]), done.stderr


# --- without files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["standard", "glmc"])
def test_synthetic_batches_look_like_real_ones(make_loader: MakeLoader, kind: images.Kind) -> None:
    counts = [12, 8, 3]
    weights = torch.ones(23) if kind == "glmc" else None
    labels: list[int] = []
    for rank in range(2):
        plan = {"batch": 12, "ranks": 2, "rank": rank, "accumulate": 2}
        real = make_loader(kind, **plan)
        synthetic = loader.SyntheticLoader(
            counts, real.plan, seed=3, kind=kind, resolution=R, device=CPU, other_weights_N=weights
        )
        for first_step in (1, 0):
            pairs = list(zip(synthetic.epoch(0, first_step), real.epoch(0, first_step), strict=True))
        for made, expected in pairs:
            for one, other in zip(made, expected, strict=True):
                for tensors, others in zip(one, other, strict=True):
                    assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in others]
                labels += one.labels[0].tolist()
        assert synthetic.waited_seconds == 0.0
        synthetic.close()
    assert np.bincount(labels).tolist() == counts
    assert synthetic.labels_N.tolist() == [0] * 12 + [1] * 8 + [2] * 3
    own = [label for batch in next(iter(synthetic.epoch(0))) for label in batch.labels[0].tolist()]
    places = [place for part in real.plan.parts(0) for place in part]
    assert own == synthetic.labels_N[loader.EpochOrder(23).order(3, 0)[places]].tolist()
    with pytest.raises(ValueError, match="the plan is for 23 images, counts add up to 24"):
        loader.SyntheticLoader([12, 12], real.plan, seed=3, kind=kind, resolution=R, device=CPU)


def test_synthetic_evaluation_shows_every_class_alike() -> None:
    labels: list[int] = []
    for rank in range(3):
        one = loader.SyntheticEvalLoader(5, 4, rank=rank, ranks=3, batch_size=3, resolution=R, device=CPU)
        batches = list(one)
        assert len(one) == len(batches)
        for look, of_batch in batches:
            assert (look.shape, look.dtype) == ((len(of_batch), 3, R, R), torch.uint8)
            labels += of_batch.tolist()
    assert Counter(labels) == dict.fromkeys(range(5), 4)


# --- decoding on the device -------------------------------------------------------------------------------------------


def test_all_passes_copy_on_one_stream(tree: lists.ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator keeps memory for the stream that used it: a stream for each pass would lose each one's batches."""
    made: list[object] = []
    loader._copy_stream.cache_clear()
    with pretended_gpu():
        stream: Any = torch.cuda.Stream

        def recorded(device: torch.device) -> Any:
            made.append(device)
            return stream(device)

        monkeypatch.setattr(torch.cuda, "Stream", recorded)
        device = torch.device("cuda", 0)
        shared: dict[str, Any] = {"resolution": R, "device": device, "workers": 0}
        one = loader.TrainLoader(tree, loader.Plan(len(tree), 8), seed=3, kind="standard", **shared)
        for epoch in range(2):
            assert len(list(one.epoch(epoch))) == 3
            assert len(list(loader.EvalLoader(tree, batch_size=8, **shared))) == 3
        one.close()
        monkeypatch.undo()
    loader._copy_stream.cache_clear()
    assert made == [device]


@pytest.fixture
def mixed(tmp_path: Path) -> lists.ImageList:
    names = make_good(tmp_path)
    return lists.read_list(write(tmp_path / "list.txt", *(f"{name} 0" for name in names)), tmp_path)


def decode_mixed(mixed: lists.ImageList, device: torch.device) -> list[Tensor]:
    dataset = loader._TrainImages(mixed, "standard", R, 0, "device")
    answer = dataset[loader._Request(0, 0, (tuple(range(len(mixed))),))]
    assert isinstance(answer, loader._Encoded)
    assert answer.plain == (True, True, False, False, False, False, True)
    return loader._decode_on(answer, mixed, device)


@pytest.mark.filterwarnings("ignore:.*TorchVision are deprecated")
def test_files_for_the_device_are_those_of_the_list(mixed: lists.ImageList) -> None:
    """On the CPU, torchvision's decoder stands in for the GPU's."""
    for file, decoded in zip(mixed.files, decode_mixed(mixed, CPU), strict=True):
        expected = np.array(images.decode(mixed.root / file)).astype(int)
        # Two builds of one decoder; flat colours leave nothing but a rounding between them.
        assert np.abs(decoded.permute(1, 2, 0).numpy() - expected).max() <= 1
    whole = noise(mixed.root, mixed.files[6])
    (mixed.root / mixed.files[6]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(loader.BadImage, match=r"list\.txt:7 .*trailing\.jpg"):
        decode_mixed(mixed, CPU)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*TorchVision are deprecated")
@pytest.mark.parametrize("decode", ["cpu", "device"])
def test_batches_on_a_gpu_are_those_of_the_cpu(
    make_loader: MakeLoader, tree: lists.ImageList, decode: loader.Decode
) -> None:
    expected = by_place(make_loader(), 0)
    weights = torch.arange(1, len(tree) + 1, dtype=torch.float64)
    one = loader.TrainLoader(
        tree,
        loader.Plan(len(tree), 8),
        seed=3,
        kind="glmc",
        resolution=R,
        device=torch.device("cuda"),
        workers=2,
        other_weights_N=weights,
        decode=decode,
    )
    found = by_place(one, 0)
    one.close()
    for place, tensors in found.items():
        assert all(tensor.is_cuda for tensor in tensors)
        for tensor, other in zip(tensors, expected[place], strict=True):
            if decode == "cpu":
                assert torch.equal(tensor.cpu(), other)
            else:  # another decoder, resize and blur of the same crop: a few levels on average
                assert float((tensor.cpu().float() - other.float()).abs().mean()) < 6


# --- the real images, where they are ----------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "imagenet_sample").exists(), reason="no ../shared/data beside the repository")
def test_real_images_go_through(tmp_path: Path) -> None:
    folder = SHARED / "imagenet_sample"
    names = sorted(path.name for path in folder.iterdir())
    path = write(tmp_path / "sample.txt", *(f"{name} {i // 2}" for i, name in enumerate(names)))
    found = lists.scan(lists.read_list(path, folder), level="full", workers=2)
    assert len(found) == 63
    assert lists.scan(found, level="fast", workers=2) is found
    one = loader.TrainLoader(found, loader.Plan(63, 16), seed=0, kind="standard", resolution=224, device=CPU, workers=0)
    looks = torch.cat([batch.looks[0] for (batch,) in one.epoch(0)])
    assert looks.shape == (63, 3, 224, 224)
    batches = list(loader.EvalLoader(found, batch_size=40, resolution=224, device=CPU, workers=0))
    assert [len(labels) for _, labels in batches] == [40, 23]
    # Augmented or not, photographs have much the same mean: within a standard error of 63 means that spread by 40.
    normalise = images.Normalise(CPU)
    plain, augmented = normalise(torch.cat([look for look, _ in batches])), normalise(looks)
    assert abs(float(plain.mean() - augmented.mean())) < 0.2
    assert float(plain.std()) == pytest.approx(1.0, abs=0.3)  # ImageNet's deviation

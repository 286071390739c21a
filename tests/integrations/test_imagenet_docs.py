"""docs/imagenet_lt.md says what the script does: commands, lists, recipes, arithmetic, table; and the table itself.

Shapes: C classes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
pytest.importorskip("torchvision", reason="torchvision is not installed: pip install -e '.[imagenet]'")
pytest.importorskip("longtail", reason="the examples are not here")

import imagenet as benchmark
import imagenet_lt
from longtail.imagenet import loader
from longtail.imagenet.engine import synthetic_lists
from longtail.imagenet.images import Kind, seeded, training_transform
from longtail.imagenet.lists import class_counts, read_list
from longtail.imagenet.networks import NETWORKS
from longtail.imagenet.recipes import METHOD_RECIPES, RECIPES
from longtail.imagenet.table import read_results, report, table
from torch._subclasses import FakeTensorMode
from torch.distributed.run import get_args_parser
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "imagenet_lt.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
PUBLISHED = ROOT.parent / "shared" / "data" / "imagenet_lt"


def commands() -> list[list[str]]:
    """Return the command lines that start the script, each as the words before and from its name on."""
    lines = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    return [shlex.split(line.removesuffix("&")) for line in lines if "examples/imagenet_lt.py" in line]


def rows(first_cell: str) -> list[list[str]]:
    """Return the rows of the table whose header begins with a cell, without backticks."""
    lines = TEXT[TEXT.index(f"\n| {first_cell} |") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_are_the_scripts(words: list[str]) -> None:
    place = words.index("examples/imagenet_lt.py")
    before, argv = words[:place], words[place + 1 :]
    if "torchrun" in before:
        launcher = before[before.index("torchrun") + 1 :]
        assert get_args_parser().parse_args([*launcher, "script.py"]).training_script == "script.py"
    else:
        assert before == ["python"]
    if argv[0] == "report":
        assert argv[1:] == ["runs/imagenet-lt-*"]
        name = imagenet_lt.settings_from(imagenet_lt.build_parser().parse_args(["--data", "synthetic"])).output_dir
        assert name.match("runs/imagenet-lt-*")
        return
    settings = imagenet_lt.settings_from(imagenet_lt.build_parser().parse_args(argv))
    if "torchrun" in before:
        assert settings.resume, "a restarted group of processes has to go on"


def test_there_are_commands_for_one_gpu_one_machine_and_two() -> None:
    texts = [" ".join(words) for words in commands()]
    assert any(text.startswith("python examples/imagenet_lt.py --data-dir") for text in texts)
    assert any("--standalone --nproc-per-node 8" in text for text in texts)
    assert any(text.startswith("torchrun --nnodes 2") for text in texts)
    # Since Slurm 22.05, srun no longer takes the number of CPUs from the batch script.
    assert any(text.startswith("srun --cpus-per-task=$SLURM_CPUS_PER_TASK torchrun") for text in texts)


def test_every_option_exists() -> None:
    slurm = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--signal", "--requeue"}
    known = {*slurm, "--open-mode", "--shm-size"}
    for parser in (imagenet_lt.build_parser(), get_args_parser(), benchmark.build_parser()):
        known.update(option for action in parser._actions for option in action.option_strings)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT))
    assert len(named) > 30
    assert named <= known


def test_inline_options_take_their_values() -> None:
    ours = {option for action in imagenet_lt.build_parser()._actions for option in action.option_strings}
    inline = [shlex.split(code) for code in re.findall(r"`(--[^`]+ [^`]+)`", TEXT)]
    mine = [words for words in inline if words[0] in ours and words[-1] != "K"]
    assert len(mine) >= 8
    for words in mine:
        imagenet_lt.build_parser().parse_args(words)
    (command,) = re.findall(r"`python benchmarks/imagenet.py ([^`]+)`", TEXT)
    benchmark.build_parser().parse_args(shlex.split(command))


def test_flags_that_restore_published_behaviour_fit_their_method() -> None:
    restoring = [(published.split()[0].lower(), flag) for published, _, flag in rows("published") if flag]
    assert [method for method, _ in restoring] == ["arb", "arb", "glmc", "glmc"]
    for method, flag in restoring:
        plain = ["--data", "synthetic", "--method", method]
        parse = imagenet_lt.build_parser().parse_args
        changed = imagenet_lt.settings_from(parse([*plain, *flag.split()])).outcome()
        assert changed != imagenet_lt.settings_from(parse(plain)).outcome()


def test_recipes_are_those_of_the_script() -> None:
    listed = {name: values for name, *values, _ in rows("recipe")}
    assert list(listed) == list(RECIPES)
    for name, recipe in RECIPES.items():
        numbers = (recipe.epochs, recipe.batch_size, recipe.lr, recipe.weight_decay, recipe.warmup_epochs, recipe.mixup)
        assert listed[name] == [recipe.network, *(f"{number:g}" for number in numbers)]
        assert (recipe.sgd_momentum, recipe.resolution) == (0.9, 64 if name == "small" else 224)
        assert recipe.schedule == "epoch-cosine"


@pytest.mark.parametrize("name", ["val", "test"])
def test_list_facts_are_those_of_the_published_lists(name: str) -> None:
    path = PUBLISHED / f"ImageNet_LT_{name}.txt.gz"
    if not path.exists():
        pytest.skip(f"{path} is not here: the published lists are not part of the repository")
    import gzip

    facts = {row[0]: row[1:] for row in rows("list")}[f"ImageNet_LT_{name}.txt"]
    images = read_list(path, Path("ILSVRC"))
    lines, per_class = (int(cell.replace(",", "")) for cell in facts[:2])
    assert len(images) == lines
    assert class_counts(images.labels_N, 1000) == [per_class] * 1000
    assert hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest() == facts[3]
    folders = [file.split("/") for file in images.files]
    assert {folder[0] for folder in folders} == {"train" if name == "val" else "val"}
    wnids = sorted({folder[1] for folder in folders})
    assert [wnids[label] for label in images.labels_N.tolist()] == [folder[1] for folder in folders]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_validation_images_are_sorted_by_the_test_list(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if "read -r val wnid file" in block)
    wanted = ["val/n02/ILSVRC2012_val_00000001.JPEG", "val/n01/ILSVRC2012_val_00000002.JPEG"]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "ImageNet_LT_test.txt").write_text(f"{wanted[0]} 1\n{wanted[1]} 0\n")
    (tmp_path / "ILSVRC" / "val").mkdir(parents=True)
    for file in wanted:
        (tmp_path / "ILSVRC" / "val" / Path(file).name).write_text(file)
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True, timeout=30)
    found = [path for path in (tmp_path / "ILSVRC").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path / "ILSVRC")) for path in found) == sorted(wanted)
    assert all(path.read_text() == str(path.relative_to(tmp_path / "ILSVRC")) for path in found)


def saved_bytes(name: str, num_images: int, *, bf16: bool) -> int:
    """Return what a forward pass of the script saves for the backward pass, weights included."""
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16), hooks:
        NETWORKS[name]()(torch.empty(num_images, 3, 224, 224))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("cells", rows("network"), ids=lambda cells: cells[0])
def test_sizes_of_networks(cells: list[str]) -> None:
    name, parameters, macs, *megabytes = cells
    with torch.device("meta"):
        network, images = NETWORKS[name](), torch.empty(2, 3, 224, 224)
    with FlopCounterMode(display=False) as flops:
        network(images)
    assert parameters == f"{sum(tensor.numel() for tensor in network.parameters()) / 1e6:.1f} M"
    assert macs == f"{flops.get_total_flops() / 2 / len(images) / 1e9:.2f}"
    # Weights, their bf16 copies and statistics are saved once for the whole batch: the difference is one image.
    per_image = [saved_bytes(name, 3, bf16=bf16) - saved_bytes(name, 2, bf16=bf16) for bf16 in (True, False)]
    assert megabytes == [f"{saved / 1e6:.1f}" for saved in per_image]


def test_memory_follows_from_the_sizes() -> None:
    bf16, float32 = ({cells[0]: float(cells[column]) / 1e3 for cells in rows("network")} for column in (3, 4))
    ce, glmc = RECIPES["ce"], RECIPES["glmc"]
    whole = ce.batch_size * bf16[ce.network]
    found = [
        f"CE's {ce.batch_size:,} images are {whole:.0f} GB in bf16 on one GPU, "
        f"{ce.batch_size * float32[ce.network]:.0f} GB in float32, and {whole / 4:.0f} GB with",
        f"GLMC's {glmc.batch_size}, twice forward, are {2 * glmc.batch_size * bf16[glmc.network]:.0f} GB in bf16.",
    ]
    words = " ".join(TEXT.split())
    assert [sentence for sentence in found if sentence not in words] == []


def test_shared_memory_follows_from_what_workers_make_in_advance() -> None:
    piece, one = loader.PIECE, 16 * loader.PREFETCH * 3 * 224**2 / 1e9
    process = 2 * one * piece  # of training and of an evaluation
    # GLMC's batches are divided into equal pieces.
    glmc = one * (max(map(len, loader._pieces(range(RECIPES["glmc"].batch_size)))) * 4 + piece)
    words = " ".join(TEXT.split())
    assert f"up to {loader.PREFETCH} pieces of {piece} images" in words
    assert f"{1e3 * process:.0f} MB a process, {8 * process:.1f} GB for the eight" in words
    assert f"with GLMC's four looks, on one GPU, {glmc:.1f} GB" in words


def test_operations_of_a_look_on_the_device() -> None:
    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operations += not function.is_view
            return function(*args, **(kwargs or {}))

    words = " ".join(TEXT.split())
    listed = re.search(r"about (\d+) operations a look, for GLMC about (\d+)\. At 5 µs", words)
    assert listed is not None
    image = torch.randint(256, (3, 96, 128), dtype=torch.uint8)
    for kind, about in zip(get_args(Kind), map(int, listed.groups()), strict=True):
        transform = training_transform(kind, 64)
        with Count() as count:  # type: ignore[no-untyped-call]
            for place in range(40):
                with seeded(0, 0, place, 0, 0):
                    transform(image)
        assert abs(count.operations / 40 - about) < 5, kind  # of versions, and of what chance leaves out
    standard, glmc = (5e-6 * int(operations) for operations in listed.groups())
    assert f"{1e3 * standard:.2f} ms an image, so {1 / standard:,.0f} images/s" in words
    assert f"and {1 / (4 * glmc):.0f} with GLMC's four looks" in words


def test_times_follow_from_the_sizes() -> None:
    macs = {cells[0]: float(cells[2]) for cells in rows("network")}
    total, listed = 0.0, rows("method")
    assert [cells[0] for cells in listed] == list(METHOD_RECIPES)
    for method, train, validation, epochs, hours in listed:
        recipe = RECIPES[METHOD_RECIPES[method]]
        relative = macs[recipe.network] / macs["resnet50"]
        train_seconds = 115_846 / 2500 * relative * (2 if method == "glmc" else 1)
        validation_seconds = 20_000 / (3 * 2500) * relative  # forward only
        exact = recipe.epochs * (train_seconds + validation_seconds) / 3600
        assert [train, validation] == [f"{train_seconds:.0f}", f"{validation_seconds:.0f}"]
        assert [epochs, hours] == [str(recipe.epochs), f"{exact:.1f}"]
        total += exact * (2 if method == "etf-dr" else 4)
    assert f"{total:.0f} GPU hours for one seed, {3 * total:.0f} for three" in TEXT


def test_the_table_is_the_reports_for_no_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert report([]) == 0
    assert capsys.readouterr().out in TEXT


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / "docs" / link).exists(), link


# --- the table --------------------------------------------------------------------------------------------------------

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Return a function that writes a finished run's `result.json`."""

    def write(strategies: Sequence[str], seed: int, accuracy: float, *, method: str = "ce", **changes: Any) -> Path:
        options = {"method": method, "seed": seed, "epochs": 200, "lr": 0.1, "spareg": 0.3 if strategies else 0.0}
        options |= {"gamma": 0.9, **changes.pop("options", {})}
        figures = {"all": 0.0, "balanced": accuracy, "many": 60.0, "medium": 40.0, "few": None}
        result = {
            "method": method,
            "strategies": list(strategies),
            "seed": seed,
            "options": options,
            "accuracy_last": figures,
            "accuracy_best": {"balanced": accuracy + 1, "all": 0.0, "epoch": 7},
            "best_on": "validation",
            **changes,
        }
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    return write


def cells_of(text: str, title: str) -> list[str]:
    """Return the row of a title, without the title."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_gains_are_paired_by_seed(write_run: WriteRun) -> None:
    baseline = [write_run([], seed, 40.0 + seed) for seed in (0, 1, 2)]
    variant = [write_run(["reg"], seed, accuracy) for seed, accuracy in ((0, 40.5), (1, 42.5))]
    text = table(read_results([*baseline, *variant]))
    # paper, its gain, last epoch, gain, many, medium, few, best, runs
    plain = cells_of(text, "CE")
    assert plain[:7] == ["44.3", "", "41.0 ± 1.0", "", "60.0 ± 0.0", "40.0 ± 0.0", "-"]
    assert plain[7:] == ["42.0 ± 1.0 (validation)", "3"]
    # Differences 0.5 and 1.5, where the difference of the means is 0.5. Student's 0.975 quantile at one degree of
    # freedom is 12.706, times the deviation 0.7071 over the root of 2: 6.35. That of 40.5 and 42.5 is 1.414.
    assert cells_of(text, "CE+SpAReg")[2:4] == ["41.5 ± 1.4", "+1.0 ± 6.4"]
    assert cells_of(text, "CE+SpAReg")[-1] == "2"


def test_rows_without_runs_or_without_a_common_seed(write_run: WriteRun) -> None:
    text = table(read_results([write_run([], 0, 40.0), write_run(["proj"], 1, 41.0), write_run(["reg"], 0, 39.75)]))
    assert cells_of(text, "ARB+SpAProj") == ["53.6", "+0.8", "", "", "", "", "", "", ""]
    assert cells_of(text, "CE+SpAProj")[2:4] == ["41.0", ""]
    # One common seed has no interval; 39.75 - 40 rounds to even.
    assert cells_of(text, "CE+SpAReg")[2:4] == ["39.8", "-0.2"]


def test_combinations_come_after_the_papers_rows(write_run: WriteRun) -> None:
    text = table(read_results([write_run(["reg", "slerp"], 0, 40.0, best_on="test")]))
    assert text.splitlines()[-1].startswith("| CE+SpAReg+SpASLERP |")
    assert cells_of(text, "CE+SpAReg+SpASLERP")[:3] == ["", "", "40.0"]
    assert cells_of(text, "CE+SpAReg+SpASLERP")[-2] == "41.0 (test)"


def refused(folders: Sequence[Path], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the report says on refusing."""
    assert report([str(folder) for folder in folders]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_one_run_twice_is_refused(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run([], 0, 40.0), write_run([], 0, 41.0)]
    message = refused(folders, capsys)
    assert all(str(folder) in message for folder in folders)
    assert "leave one out" in message


def test_other_recipes_are_refused(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run([], 0, 40.0), write_run(["reg"], 0, 41.0, options={"epochs": 90})]
    message = refused(folders, capsys)
    assert "--epochs" in message
    assert "--lr" not in message
    # Methods have recipes of their own, and strategies are what is compared.
    other = write_run([], 0, 41.0, method="arb", options={"epochs": 90})
    assert report([str(folders[0]), str(other), str(write_run(["reg"], 0, 41.0))]) == 0


def test_one_row_has_one_choice_of_hyper_parameters(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    weak, strong = write_run(["reg"], 0, 40.0), write_run(["reg"], 1, 41.0, options={"spareg": 1.0})
    message = refused([weak, strong], capsys)
    assert "--spareg" in message
    assert str(weak) in message
    assert str(strong) in message
    # Another row may choose differently.
    assert report([str(weak), str(write_run(["reg", "proj"], 0, 41.0, options={"spareg": 1.0, "gamma": 0.5}))]) == 0


def test_a_folder_without_a_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "unfinished").mkdir()
    message = refused([tmp_path / "unfinished"], capsys)
    assert "unfinished" in message
    assert "result.json" in message


# --- synthetic data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_images", "num_classes"), [(1000, 1000), (1200, 1000), (115_846, 1000), (2, 2), (50, 3)])
def test_synthetic_lists_have_all_classes_the_first_most(num_images: int, num_classes: int) -> None:
    counts = class_counts(synthetic_lists(num_images, num_classes)[0].labels_N, num_classes)
    assert sum(counts) == num_images
    assert counts == sorted(counts, reverse=True)
    assert min(counts) >= 1

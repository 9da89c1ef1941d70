"""What happens to runs and what users mistake: kills, full disks, damaged files, other data, bad input."""

import errno
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import evaluate
import train
from conftest import ROOT, SMALL, SPLIT, coloured_classes
from soak import Killed, assert_same, failing, flipped, sealed, state_of

EXPORTS = ["config.json", "log.csv", "result.json"]


def contents(directory):
    """Everything below a directory: {relative path: bytes, None for a folder or a lock, which may be held}."""
    return {str(path.relative_to(directory)): None if path.is_dir() or path.name == ".lock" else path.read_bytes()
            for path in directory.rglob("*")}


def one_line(capsys, *words):
    """The only line on stderr, an error that holds these words."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, f"{word!r} is not in: {error}"
    return error


def stopping_after(steps, error=KeyboardInterrupt):
    """A step that ends with an error where the run has done this many."""
    def step(run, *batch):
        if run.step == steps:
            raise error
        return train.train_step(run, *batch)
    return step


@pytest.fixture(scope="module")
def undisturbed(image_folder, tmp_path_factory):
    """What the run of `train_small` comes to when nothing happens to it."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train.main(["--dataset", "folder", "--data-dir", str(image_folder), *SPLIT, *SMALL,
                       "--out", str(directory)]) == 0
    return directory


# --------------------------------------------------------------------------- continued is undisturbed

def test_a_killed_process_is_continued_to_the_bit(train_small, image_folder, tmp_path, undisturbed):
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--dataset", "folder", "--data-dir", image_folder,
                                *SPLIT, *SMALL, "--out", tmp_path / "run"], stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert train_small("--out", "run") == 0
    assert_same(state_of(tmp_path / "run"), state_of(undisturbed))


SHORT = "--steps", 2, "--eval-every", 1  # two saves, which write checkpoint, config and log, the second the result, too
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def whole(train_small, tmp_path, capsys):
    """What the short run comes to when nothing happens to it."""
    assert train_small(*SHORT, "--out", "whole") == 0
    capsys.readouterr()
    return state_of(tmp_path / "whole")


def test_a_kill_between_any_two_writes_leaves_a_run_that_the_same_command_completes(
        train_small, tmp_path, whole, monkeypatch):
    for n in itertools.count(1):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing(os.replace, n, Killed()))
            try:
                train_small(*SHORT, "--out", f"run{n}")
                break
            except Killed:
                pass
        assert train_small(*SHORT, "--out", f"run{n}") == 0
        assert_same(state_of(tmp_path / f"run{n}"), whole)
        assert not list((tmp_path / f"run{n}").glob("*.tmp"))
    assert n == 8


@pytest.mark.parametrize("n", range(1, 8))
def test_a_disk_that_is_full_at_the_last_save_is_an_error_and_with_space_the_same_command_completes(
        n, train_small, tmp_path, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, n, FULL, and_later=True))
        assert train_small(*SHORT, "--out", "run") == 1
    warnings = capsys.readouterr().err.splitlines()
    assert warnings.pop().startswith("error: step 2: [Errno 28] No space left on device")
    assert len(warnings) == (n <= 3) and all(line.startswith("warning: ") for line in warnings)
    assert train_small(*SHORT, "--out", "run") == 0
    assert_same(state_of(tmp_path / "run"), whole)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_earlier_save_that_fails_is_a_warning_and_training_goes_on(
        n, train_small, tmp_path, whole, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", failing(os.fsync, n, FULL))
    assert train_small(*SHORT, "--out", "run") == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and "No space left" in error and error.count("\n") == 1
    assert_same(state_of(tmp_path / "run"), whole)


def test_a_save_once_a_minute_keeps_the_sums_since_the_last_row(train_small, tmp_path, undisturbed, monkeypatch):
    """Steps that take 61 seconds by the clock, stopped between two evaluations: nothing is done twice."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "time", types.SimpleNamespace(monotonic=itertools.count(step=61).__next__))
        assert train_small("--out", "run", step=stopping_after(5)) == 130
    done = []

    def step(run, *batch):
        done.append(run.step)
        return train.train_step(run, *batch)
    assert train_small("--out", "run", step=step) == 0
    assert done == [5]
    assert_same(state_of(tmp_path / "run"), state_of(undisturbed))


def test_a_continued_run_in_fp16_equals_the_undisturbed_one_with_the_state_of_its_scaler(train_small, tmp_path):
    small = "--precision", "fp16", "--image-size", 8, "--eval-every", 2
    assert train_small(*small, "--out", "whole") == 0
    assert train_small(*small, "--out", "part", step=stopping_after(5)) == 130
    assert train_small(*small, "--out", "part") == 0
    scaler = train.read_checkpoint(tmp_path / "part" / "checkpoint.pt")["scaler"]
    assert scaler["_growth_tracker"] == 6 and scaler["scale"] == 2 ** 16  # six good steps since the start
    assert_same(state_of(tmp_path / "part"), state_of(tmp_path / "whole"))


def test_ctrl_c_says_in_one_line_how_to_continue(train_small, tmp_path, undisturbed, capsys):
    def step(run, *batch):
        if run.step == 4:
            signal.raise_signal(signal.SIGINT)
        return train.train_step(run, *batch)
    assert train_small("--out", "run", "--fresh", step=step) == 130
    captured = capsys.readouterr()
    line = captured.out.splitlines()[-1]
    assert "same command" in line and "without --fresh" in line and "continue" in line and not captured.err
    assert train_small("--out", "run") == 0 and "from step 3" in capsys.readouterr().out
    assert_same(state_of(tmp_path / "run"), state_of(undisturbed))


def test_a_finished_run_is_printed_and_not_repeated(train_small, tmp_path, capsys):
    assert train_small("--out", "run") == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    before = (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns
    assert train_small("--out", "run", step=None) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == table
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns == before
    assert train_small("--out", "run", "--fresh") == 0
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns > before


def test_a_fresh_run_that_is_stopped_leaves_no_result_of_the_run_before(train_small, tmp_path):
    """Else the new settings stand beside the old figures."""
    assert train_small("--out", "run") == 0
    assert train_small("--out", "run", "--lr", 0.2, "--fresh", step=stopping_after(4)) == 130
    with pytest.raises(ValueError, match="no finished run"):
        evaluate.read_run(tmp_path / "run")


def test_a_run_whose_name_is_a_pattern_prints_itself(train_small, capsys):
    assert train_small("--out", "run1") == 0
    capsys.readouterr()
    assert train_small("--out", "run[1]", "--seed", 1) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| run[1] |")


# ------------------------------------------------------------------------------------ whose run is this

@pytest.fixture(params=["finished", "unfinished"])
def held(request, train_small, tmp_path):
    """A directory `run` that holds a run of 6 steps with seed 0, done or stopped after step 3."""
    if request.param == "finished":
        assert train_small("--out", "run") == 0
    else:
        assert train_small("--out", "run", step=stopping_after(4)) == 130
    return tmp_path / "run"


OTHER = {"--lr": "0.05", "--method": "udal", "--seed": "1", "--imb": "2.0", "--data-dir": "absent", "--steps": "9",
         "--warmup-steps": "0"}


def test_other_settings_are_refused_by_the_name_that_was_typed(held, train_small, capsys):
    before = contents(held)
    for option, value in OTHER.items():
        capsys.readouterr()
        assert train_small("--out", "run", option, value) == 2
        one_line(capsys, option + " ", value, "--fresh")
    assert contents(held) == before


def test_longer_training_is_refused_by_steps_and_not_by_what_follows_from_them(train_small, capsys):
    assert train_small("--out", "run", "--steps", 40, "--eval-every", 1, step=stopping_after(1)) == 130
    assert train_small("--out", "run", "--steps", 60, "--eval-every", 1) == 2
    assert "warmup" not in one_line(capsys, "--steps 40", "60")


def test_other_folders_are_refused_though_they_hold_the_same_images(held, train_small, image_folder, tmp_path, capsys):
    shutil.copytree(image_folder, tmp_path / "copy")
    before = contents(held)
    assert train_small("--out", "run", "--data-dir", "copy") == 2
    one_line(capsys, "--data-dir", "copy")
    assert contents(held) == before


def add_images(root):
    for i in range(5):
        shutil.copy(root / "train" / "cat" / "000.png", root / "train" / "cat" / f"more{i}.png")


def rename_a_class(root):
    for part in ("train", "test"):
        (root / part / "cat").rename(root / part / "cow")


def change_a_pixel(root):
    pixels = np.array(Image.open(root / "test" / "bee" / "003.png"))
    pixels[5, 5, 0] ^= 1
    Image.fromarray(pixels).save(root / "test" / "bee" / "003.png")


@pytest.mark.parametrize("change", [add_images, rename_a_class, change_a_pixel])
def test_data_that_changed_since_the_last_save_are_refused(change, train_small, tmp_path, capsys):
    root = coloured_classes(tmp_path / "data", {"train": 40, "test": 10})
    by_fraction = "--data-dir", "data", "--out", "run"
    assert train_small(*by_fraction, split=(), step=stopping_after(4)) == 130
    change(root)
    before = contents(tmp_path / "run")
    assert train_small(*by_fraction, split=()) == 2
    one_line(capsys, "data", "--fresh")
    assert contents(tmp_path / "run") == before


def test_another_seeds_checkpoint_in_the_directory_is_refused(held, train_small, tmp_path, capsys):
    assert train_small("--out", "other", "--seed", 1) == 0
    shutil.copy(tmp_path / "other" / "checkpoint.pt", held)
    before = contents(held)
    assert train_small("--out", "run") == 2
    one_line(capsys, "--seed 1")
    assert contents(held) == before


def test_the_lock_comes_before_anything_is_read_or_loaded(held, train_small, capsys):
    """So a process that waits for its data cannot overwrite what another one finishes meanwhile."""
    holder = subprocess.Popen([sys.executable, "-c", "import filelock, sys; lock = filelock.FileLock('run/.lock'); "
                               "lock.acquire(); print('held', flush=True); sys.stdin.read()"], cwd=held.parent,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    before = contents(held)
    for arguments in ((), ("--seed", 1), ("--fresh",)):
        assert train_small("--out", "run", *arguments, prepare=None) == 2  # None cannot be called
        one_line(capsys, "in use by another process")
    assert contents(held) == before
    holder.kill()  # its lock ends with it
    holder.communicate()
    assert train_small("--out", "run") == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks_is_a_warning(number, train_small, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", flock)
    assert train_small("--out", "run", "--steps", 1) == 0
    error = capsys.readouterr().err
    assert number == errno.ENOSYS and not error or error.startswith("warning: ") and error.count("\n") == 1
    assert train_small("--out", "run", "--steps", 1) == 0


# ------------------------------------------------------------------------------------- damaged files

DAMAGES = {"missing": lambda content: None, "empty": lambda content: b"", "cut": lambda content: content[:-7],
           "null": lambda content: b"null", "a list": lambda content: b"[1]", "noise": lambda content: b"\xff\x00\xfe"}


def damage(path, how):
    content = DAMAGES[how](path.read_bytes() if path.exists() else b"")
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_damaged_export_of_a_finished_run_is_mended_by_the_same_command(name, train_small, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    before = contents(undisturbed)
    for how in DAMAGES:
        damage(tmp_path / "run" / name, how)
        assert train_small("--out", "run") == 0
        assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_exports_of_an_unfinished_run_are_mended_by_the_same_command(how, train_small, tmp_path, undisturbed):
    assert train_small("--out", "run", step=stopping_after(4)) == 130
    for name in EXPORTS:
        damage(tmp_path / "run" / name, how)
    assert train_small("--out", "run") == 0
    assert_same(state_of(tmp_path / "run"), state_of(undisturbed))


def test_one_flipped_bit_anywhere_in_a_checkpoint_is_refused(undisturbed, tmp_path):
    """In its header, in the states, in the zip directory (the attributes of an entry among them) and in the trailer."""
    content = (undisturbed / "checkpoint.pt").read_bytes()
    draw = random.Random(0)
    entries = [place for place in range(len(content)) if content.startswith(b"PK\x01\x02", place)]
    assert len(entries) > 50
    places = [*range(8), *(entry + 38 for entry in entries), *range(len(content) - 60, len(content)),
              *(draw.randrange(len(content)) for _ in range(60))]
    for place in places:
        (tmp_path / "checkpoint.pt").write_bytes(flipped(content, place, draw.randrange(8)))
        with pytest.raises(ValueError, match="damaged"):
            train.read_checkpoint(tmp_path / "checkpoint.pt")


class Evil:
    """A pickle that makes a directory where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved(value, **options):
    """What torch.save writes of a value."""
    path = f"saved{time.monotonic_ns()}"
    torch.save(value, path, **options)
    with open(path, "rb") as file:
        content = file.read()
    os.unlink(path)
    return content


FOREIGN = {
    "an empty file": lambda good: b"",
    "no checkpoint at all": lambda good: b"PK\x03\x04 no checkpoint",
    "a cut one": lambda good: good[:len(good) // 2],
    "one without its trailer": lambda good: good[:-32],
    "one with something after it": lambda good: good + b"\0",
    "another program's": lambda good: saved({"model": torch.nn.Linear(2, 2).state_dict(), "epoch": 3}),
    "a whole network": lambda good: saved(torch.nn.Linear(2, 2)),
    "a pickle that runs code": lambda good: pickle.dumps(Evil("ran")),
    "a checkpoint that runs code": lambda good: saved({"step": Evil("ran")}),
    "a sealed one that runs code": lambda good: sealed(saved({"step": Evil("ran")})),
    "a sealed one of another program": lambda good: sealed(saved({"epoch": 3})),
    "a sealed list": lambda good: sealed(saved([1, 2]))}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_or_damaged_checkpoint_is_refused_in_one_line_and_left_as_it_is(
        what, train_small, tmp_path, undisturbed, capsys):
    shutil.copytree(undisturbed, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(FOREIGN[what](path.read_bytes()))
    before = contents(tmp_path)
    assert train_small("--out", "run") == 2
    one_line(capsys, "checkpoint.pt", "--fresh")
    assert contents(tmp_path) == before  # nothing ran


def test_what_the_refusal_of_a_damaged_checkpoint_offers_works(train_small, tmp_path, undisturbed):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"damaged")
    assert train_small("--out", "run", "--fresh") == 0
    assert_same(state_of(tmp_path / "run"), state_of(undisturbed))


# ------------------------------------------------------------------------------- faults while training

def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_good_checkpoint(train_small, tmp_path, capsys):
    def step(run, *batch):
        found = train.train_step(run, *batch)
        return found | {"loss_u": found["loss_u"] * (float("nan") if run.step == 4 else 1)}
    assert train_small("--eval-every", 1, "--out", "run", step=step) == 1
    one_line(capsys, "not finite", "try a lower --lr")
    assert train.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 4
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("steps", [1, 6])
def test_a_learning_rate_that_explodes_ends_in_one_line(steps, train_small, capsys):
    """After one step the loss was still finite and the network is not."""
    assert train_small("--lr", 1e30, "--steps", steps, "--out", "run") == 1
    one_line(capsys, "finite", "try a lower --lr")


def raises(error):
    raise error


OUT_OF_MEMORY = {
    "torch on a CPU": lambda: torch.empty(1 << 60),
    "torch on Windows": lambda: raises(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")),
    "numpy": lambda: np.empty(1 << 59),
    "torch on a GPU": lambda: raises(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\n")),
    "Python": lambda: raises(MemoryError())}


@pytest.mark.parametrize("whose", OUT_OF_MEMORY)
@pytest.mark.parametrize("hook", ["prepare", "step"])
def test_out_of_memory_is_one_line_that_says_what_takes_less(hook, whose, train_small, capsys):
    assert train_small("--out", "run", **{hook: lambda *_: OUT_OF_MEMORY[whose]()}) == 1
    error = one_line(capsys, "--batch-size", "--image-size", "--model")
    assert "--lr" not in error and "--compile" not in error


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x3 and 4x2)"),
                                   KeyError("p_model"), TypeError("unsupported operand")])
@pytest.mark.parametrize("hook", ["prepare", "step"])
def test_a_fault_of_the_code_is_shown_whole_and_without_advice(hook, error, train_small, capsys):
    with pytest.raises(type(error)):
        train_small("--out", "run", **{hook: lambda *_: raises(error)})
    assert not capsys.readouterr().err


def test_a_batch_that_batch_norm_cannot_take_is_its_own_line(train_small, capsys):
    def prepare(config):
        network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.BatchNorm1d(3))
        return train.setup(config, model=network)
    assert train_small("--method", "supervised", "--batch-size", 1, "--out", "run", prepare=prepare) == 1
    error = one_line(capsys, "more than 1 value per channel")
    assert "--lr" not in error and "--compile" not in error


def test_a_thread_that_cannot_be_started_is_no_fault_of_the_images(train_small, monkeypatch, capsys):
    monkeypatch.setattr(threading.Thread, "start", lambda self: raises(RuntimeError("can't start new thread")))
    try:
        assert train_small("--out", "run") in (1, 2)
        assert "--data-dir" not in one_line(capsys, "can't start new thread")
    except RuntimeError as error:
        assert str(error) == "can't start new thread"


def test_a_compiler_that_fails_is_one_line_that_names_the_way_out(train_small, monkeypatch, capsys):
    def broken(function, **options):
        return lambda *arguments: raises(torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand more"))
    monkeypatch.setattr(torch, "compile", broken)
    assert train_small("--compile", "on", "--out", "run") == 1
    one_line(capsys, "step 0: no C++ compiler; ", "--compile off")


# --------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "mnist"], "--dataset mnist"),
    (["--method", "mixmatch"], "--method mixmatch"),
    (["--shift", "sideways"], "--shift sideways"),
    (["--model", "vgg"], "--model vgg wrn-<depth>-<width>"),
    (["--model", "wrn-27-2"], "--model wrn-27-2"),
    (["--device", "tpu"], "--device tpu"),
    (["--device", "mps"], "--device mps"),
    (["--device", "cuda:63"], "--device cuda:63"),
    (["--device", ""], "--device"),
    (["--precision", "fp8"], "--precision fp8"),
    (["--compile", "maybe"], "--compile maybe"),
    (["--steps"], "--steps"),
    (["--steps", "many"], "--steps many int"),
    (["--steps", "0"], "--steps 0"),
    (["--steps", "1.5"], "--steps 1.5 int"),
    (["--batch-size", "-4"], "--batch-size -4"),
    (["--mu", "0"], "--mu 0"),
    (["--lr", "0"], "--lr 0.0 1e-15"),
    (["--lr", "nan"], "--lr nan"),
    (["--lr", "inf"], "--lr inf"),
    (["--lr", "fast"], "--lr fast float"),
    (["--weight-decay", "-1"], "--weight-decay -1"),
    (["--n1", "0"], "--n1 0"),
    (["--m1", "-5"], "--m1 -5"),
    (["--imb", "0"], "--imb 0"),
    (["--imb", "-10"], "--imb -10"),
    (["--imb", "0.5"], "--imb 0.5"),
    (["--imb-u", "0"], "--imb-u 0"),
    (["--n1", "995"], "class disc has 1000 images 995 12 unlabeled --n1 --m1"),
    (["--n1", "10", "--imb", "20"], "at least 1 --n1 --imb"),
    (["--m1", "2000"], "class crescent has 1000 images --m1"),
    (["--alpha-min", "1.5"], "--alpha-min 1.5 0 to 1"),
    (["--d", "0"], "--d 0"),
    (["--threshold", "-0.1"], "--threshold -0.1"),
    (["--prior-momentum", "1"], "--prior-momentum 1.0"),
    (["--ema", "1"], "--ema 1.0"),
    (["--bn-momentum", "0"], "--bn-momentum 0"),
    (["--labeled-fraction", "1"], "--labeled-fraction 1"),
    (["--labeled-fraction", "0.5", "--n1", "5"], "--n1 --labeled-fraction"),
    (["--warmup-steps", "2000"], "--warmup-steps 2000 --steps 1500"),
    (["--image-size", "4"], "--image-size 4"),
    (["--seed", "-1"], "--seed -1"),
    (["--eval-every", "0"], "--eval-every 0"),
    (["--imb-u", "50", "--shift", "reversed"], "--shift cannot be used with --imb-u"),
    (["--out", "file"], "file"),
    (["--out", "file/run"], "file/run"),
    (["--out", "empty", "--m1", "2000"], "--m1"),
    (["--out", "empty/run", "--m1", "2000"], "--m1"),
    (["--out", "new/new/new", "--m1", "2000"], "--m1"),
    (["--step", "5"], "unrecognized --step"),
    (["surplus"], "unrecognized surplus"),
    (["--dataset", "folder", "--data-dir", "absent"], "--data-dir absent train/<class>"),
    (["--dataset", "folder", "--data-dir", "file"], "--data-dir file train/<class>"),
    (["--dataset", "folder", "--data-dir", "empty"], "--data-dir empty train/<class>"),
    (["--dataset", "folder", "--data-dir", "no-test"], "--data-dir no-test test/<class>"),
    (["--dataset", "folder", "--data-dir", "unequal"], "unequal/train the same classes 'dog'"),
    (["--dataset", "folder", "--data-dir", "no-images"], "no-images"),
    (["--dataset", "folder", "--data-dir", "one-class", "--n1", "1", "--m1", "1"], "one-class/train two at least"),
    (["--dataset", "folder", "--n1", "5", "--labeled-fraction", "0.5"], "--n1 --labeled-fraction"),
    (["--dataset", "stl10", "--m1", "5"], "--m1 stl10"),
    (["--dataset", "cifar10", "--data-dir", "corrupt"], "cifar10 is not whole in corrupt"),
    (["--dataset", "cifar100", "--data-dir", "file"], "cifar100 file"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_is_one_line_and_status_2_and_leaves_everything_as_it_was(
        arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/absent.tar.gz")
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", "http://127.0.0.1:9/absent.tar.gz")
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    for name in ("empty", "no-test/train/ant", "unequal/train/ant", "unequal/train/dog", "unequal/test/ant",
                 "no-images/train/a", "no-images/train/b", "no-images/test/a", "no-images/test/b",
                 "one-class/train/ant", "one-class/test/ant", "corrupt/cifar-10-batches-py"):
        (tmp_path / name).mkdir(parents=True)
    for i in range(1, 6):
        (tmp_path / f"corrupt/cifar-10-batches-py/data_batch_{i}").write_bytes(b"not CIFAR")
    before = contents(tmp_path)
    assert train.main(arguments) == 2
    one_line(capsys, *words.split())
    assert contents(tmp_path) == before


def test_a_mistake_leaves_the_directory_that_one_is_in(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--out", ".", "--m1", "2000"]) == 2
    one_line(capsys, "--m1")
    assert tmp_path.exists()


def test_names_of_classes_are_not_paths(train_small, tmp_path):
    root = coloured_classes(tmp_path / "data", {"train": 20, "test": 4})
    for part in ("train", "test"):
        for old, new in (("ant", "_..hidden\nline"), ("bee", "a;b'$(c)"), ("cat", "\u732b 100%")):
            try:
                (root / part / old).rename(root / part / new)
            except OSError:
                pytest.skip("no such names on this system")
    assert train_small("--data-dir", "data", "--n1", 8, "--m1", 8, "--imb", 1) == 0
    assert sorted(os.listdir(tmp_path)) == ["data", "runs"] and len(os.listdir(tmp_path / "runs")) == 1
    result = next((tmp_path / "runs").glob("*/result.json"))
    assert json.loads(result.read_text(encoding="utf-8"))["classes"] == ["_..hidden\nline", "a;b'$(c)", "\u732b 100%"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="who reads and writes everything")
@pytest.mark.parametrize("what", ["--data-dir", "--out"])
def test_a_directory_without_permission_is_one_line(what, train_small, tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0)
    assert train_small(what, "closed") == 2
    one_line(capsys)


def test_an_oracle_without_labels_is_refused(train_small, tmp_path, capsys):
    coloured_classes(tmp_path / "data", {"train": 20, "test": 4, "unlabeled": 1})
    assert train_small("--data-dir", "data", "--method", "oracle", split=()) == 2
    one_line(capsys, "--method oracle needs the true prior")
    assert os.listdir(tmp_path) == ["data"]


# ------------------------------------------------------------------------------------------ Windows

def test_without_what_windows_lacks_and_in_its_encoding_everything_works(image_folder, tmp_path):
    """A process without fcntl, resource, pwd and affinities, whose stdout is cp1252: help, a run, a table."""
    arguments = ["--dataset", "folder", "--data-dir", str(image_folder), *SPLIT, *SMALL, "--out", "\u732b/run-s0"]
    script = f"""
import os, sys
for name in ("fcntl", "resource", "pwd", "grp"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "geteuid", "fork"):
    if hasattr(os, name):
        delattr(os, name)
sys.path.insert(0, {str(ROOT)!r})
import evaluate, train
try:
    train.main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
for again in range(2):
    assert train.main({arguments!a}) == 0
assert evaluate.main([{arguments[-1]!a}[:-1] + "*"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, timeout=120,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert "Traceback" not in done.stderr.decode("cp1252")
    assert done.stdout.decode("cp1252").count("| run | 1 | ") == 3


def test_results_without_a_checkpoint_are_not_overwritten(train_small, capsys):
    assert train_small("--out", "run") == 0
    Path("run/checkpoint.pt").unlink()
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert train_small("--out", "run", "--lr", "0.5") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_fresh_run_that_ends_before_its_first_save_does_not_come_back_as_the_old_one(train_small, capsys):
    def stop(run, *tensors):
        raise KeyboardInterrupt
    assert train_small("--out", "run") == 0
    assert train_small("--out", "run", "--fresh", step=stop) == 130
    assert "the last save, if any" in capsys.readouterr().out
    assert not Path("run/checkpoint.pt").exists() and not Path("run/result.json").exists()

"""What happens to runs and what users mistake: kills, full disks, damaged files, other data, bad input."""

import errno
import io
import itertools
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import filelock
import pytest
import torch

import data
import evaluate
import train
from conftest import (EXPORTS, ROOT, assert_same, at_step, coloured_classes, contents, raises, rows, saved, sealed,
                      small_run, small_sets, state_of, stopping_after)


def files(directory):
    """The files below a directory, but for locks: {relative path: bytes}."""
    return {path: content for path, content in contents(directory).items() if content is not None}


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    """Two runs with the settings of `train_small`: `finished`, and `unfinished`, saved after step 3."""
    root = tmp_path_factory.mktemp("trained")
    words = [*small_run(image_folder), "--out"]
    assert train.main([*words, str(root / "finished")]) == 0
    assert train.main([*words, str(root / "unfinished")], stopping_after(4)) == 130
    return root


@pytest.fixture
def undisturbed(trained):
    """What the run of `train_small` comes to when nothing happens to it."""
    return state_of(trained / "finished")


@pytest.fixture(params=["finished", "unfinished"])
def held(request, trained, tmp_path):
    """A directory `run` that holds such a run."""
    return shutil.copytree(trained / request.param, tmp_path / "run")


finished = pytest.mark.parametrize("held", ["finished"], indirect=True)


@pytest.fixture
def slow(monkeypatch):
    """Gives a kind of run whose steps take so many seconds by the clock that the training looks at."""
    now = [0.0]
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def kind(seconds):
        class Slow(train.Run):
            def step(self, *batch):
                now[0] += seconds
                return super().step(*batch)
        return Slow
    return kind


# --------------------------------------------------------------------------- continued is undisturbed

def test_a_killed_process_is_continued_to_the_bit(train_small, image_folder, tmp_path, undisturbed):
    log = tmp_path / "run" / "log.csv"
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *small_run(image_folder),
                                "--out", tmp_path / "run"], stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert train_small("--out", "run") == 0
    assert_same(state_of(tmp_path / "run"), undisturbed)


class Killed(BaseException):
    """Nothing in the program catches it, as nothing catches a kill."""


def from_call(n, function, act):
    """The function, but from its n-th call on it is another one."""
    calls = itertools.count(1)
    return lambda *arguments: (function if next(calls) < n else act)(*arguments)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def short(train_small):
    """A command of two steps of a small network, with three saves, of three, two and three files."""
    def run(config):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10), torch.nn.BatchNorm1d(10))
        return train.Run(config, small_sets(), network)
    return lambda out: train_small("--steps", 2, "--eval-every", 1, "--out", out, kind=run)


@pytest.fixture
def whole(short, tmp_path, capsys):
    """What the short run comes to when nothing happens to it."""
    assert short("whole") == 0
    capsys.readouterr()
    return state_of(tmp_path / "whole")


@pytest.mark.parametrize("where, name, writes", [(Path, "write_bytes", 8), (os, "replace", 3)])
def test_a_kill_in_any_write_leaves_a_run_that_the_same_command_completes(
        where, name, writes, short, tmp_path, whole, monkeypatch):
    """In the middle of a file, and between a file and its renaming."""
    real = getattr(where, name)

    def killed(path, content):
        if name == "write_bytes":
            real(path, content[:len(content) // 2])
        raise Killed
    for n in range(1, writes + 1):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, from_call(n, real, killed))
            with pytest.raises(Killed):
                short(f"run{n}")
        assert short(f"run{n}") == 0
        assert_same(state_of(tmp_path / f"run{n}"), whole)
        assert not list((tmp_path / f"run{n}").glob("*.tmp"))


def test_a_disk_that_is_full_is_one_line_and_with_space_the_same_command_completes(
        short, tmp_path, whole, monkeypatch, one_line):
    for n, step in enumerate([None, None, None, 1, 1, 2, 2, 2], start=1):
        with monkeypatch.context() as patch:
            full = from_call(n, Path.write_bytes, lambda *_: raises(FULL))
            patch.setattr(Path, "write_bytes", full)
            assert short(f"run{n}") == (1 if step else 2)
        one_line("No space left on device", f"step {step}: " if step else "error: [")
        assert short(f"run{n}") == 0
        assert_same(state_of(tmp_path / f"run{n}"), whole)


def test_a_save_once_a_minute_keeps_the_sums_since_the_last_row_and_its_line_repeats_no_loss(
        train_small, tmp_path, undisturbed, slow, capsys):
    """Steps that take 61 seconds, stopped between two evaluations: nothing is done twice."""
    assert train_small("--out", "run", kind=stopping_after(5, slow(61))) == 130
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("/")[0] for line in lines] == ["step 2", "step 3", "step 4", "step 5"]
    for word in ("loss_s", "ece"):
        assert [word in line for line in lines] == [False, True, False, False]
    assert train_small("--out", "run", kind=at_step(4, lambda: raises(AssertionError))) == 0
    assert_same(state_of(tmp_path / "run"), undisturbed)


def test_a_continued_run_in_fp16_equals_the_undisturbed_one_with_the_state_of_its_scaler(train_small, tmp_path):
    small = "--precision", "fp16", "--steps", 3, "--eval-every", 2
    assert train_small(*small, "--out", "whole") == 0
    assert train_small(*small, "--out", "part", kind=stopping_after(2)) == 130
    assert train_small(*small, "--out", "part") == 0
    scaler = train.read_checkpoint(tmp_path / "part" / "checkpoint.pt")["scaler"]
    assert scaler["_growth_tracker"] == 3 and scaler["scale"] == 2 ** 16  # good steps since the start
    assert_same(state_of(tmp_path / "part"), state_of(tmp_path / "whole"))


def test_ctrl_c_says_in_one_line_how_to_continue(train_small, tmp_path, undisturbed, capsys, sigint):
    kind = at_step(4, lambda: signal.raise_signal(signal.SIGINT))
    assert train_small("--out", "run", "--fresh", kind=kind) == 130
    captured = capsys.readouterr()
    line = captured.out.splitlines()[-1]
    assert "same command" in line and "without --fresh" in line and "continue" in line and not captured.err
    assert train_small("--out", "run") == 0 and "from step 3" in capsys.readouterr().out
    assert_same(state_of(tmp_path / "run"), undisturbed)


@finished
def test_a_finished_run_is_printed_and_not_repeated_and_its_files_are_left_alone(
        held, train_small, monkeypatch, capsys):
    """As where a spreadsheet lets nobody replace log.csv, or the directory is read-only."""
    def written():
        return {path.name: path.stat().st_mtime_ns for path in held.glob("*.*")}
    assert evaluate.main([str(held)]) == 0
    table = capsys.readouterr().out
    before = written()
    with monkeypatch.context() as patch:
        for place, name in ((os, "replace"), (Path, "write_bytes"), (filelock.FileLock, "_acquire")):
            denied = PermissionError(errno.EACCES, "Permission denied")
            patch.setattr(place, name, lambda *_: raises(denied))
        assert train_small("--out", "run", kind=stopping_after(0)) == 0
    out, error = capsys.readouterr()
    assert out.endswith(table) and error.startswith("warning: ") and error.count("\n") == 1
    assert written() == before
    assert train_small("--out", "run", "--fresh") == 0
    assert written()["checkpoint.pt"] > before["checkpoint.pt"]


@finished
@pytest.mark.parametrize("steps", [0, 4])
def test_a_fresh_run_that_is_stopped_leaves_nothing_of_the_run_before(steps, held, train_small):
    """Else the new settings stand beside the old figures. A damaged checkpoint is not read."""
    (held / "checkpoint.pt").write_bytes(b"damaged")
    assert train_small("--out", "run", "--lr", 0.2, "--fresh", kind=stopping_after(steps)) == 130
    with pytest.raises(ValueError, match="no finished run"):
        evaluate.read_run(held)
    assert train.read_checkpoint(held / "checkpoint.pt")["t"] == (3 if steps else 0)


@finished
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_fresh_run_that_is_killed_while_it_first_saves_leaves_no_new_settings_beside_old_figures(
        n, held, train_small, monkeypatch):
    killed = from_call(n, Path.write_bytes, lambda *_: raises(Killed()))
    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(Killed):
        train_small("--out", "run", "--lr", 0.2, "--fresh")
    try:
        assert evaluate.read_run(held).config["lr"] == train.Config().lr
    except ValueError as error:
        assert "no finished run" in str(error)


@finished
def test_a_fresh_run_on_data_that_cannot_be_read_leaves_the_run_before(held, train_small, tmp_path, one_line):
    before = files(tmp_path)
    assert train_small("--out", "run", "--data-dir", "absent", "--fresh") == 2
    one_line("absent")
    assert files(tmp_path) == before


# ------------------------------------------------------------------------------------ whose run is this

def test_other_settings_are_refused_by_the_name_that_was_typed(held, train_small, capsys, one_line):
    before = contents(held)
    for option, value in (("--lr", "0.05"), ("--seed", "1"), ("--precision", "fp16")):
        capsys.readouterr()
        assert train_small("--out", "run", option, value) == 2
        one_line(option + " ", value, "--fresh")
    assert contents(held) == before


def test_longer_training_is_refused_by_steps_and_not_by_what_follows_from_them(train_small, one_line):
    assert train_small("--out", "run", "--steps", 40, "--eval-every", 1, kind=stopping_after(1)) == 130
    assert train_small("--out", "run", "--steps", 60, "--eval-every", 1) == 2
    assert "warmup" not in one_line("--steps 40", "60")


@pytest.mark.parametrize("begun, later, typed", [("bf16", "fp32", ()), ("fp32", "bf16", ("--precision", "auto"))])
def test_a_run_goes_on_in_its_own_precision_on_a_machine_that_would_choose_another(
        begun, later, typed, train_small, tmp_path, monkeypatch):
    def processor(precision):
        able = {"amx_bf16": precision == "bf16"}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    small = "--device", "cpu", "--steps", 2, "--eval-every", 1, "--out"
    processor(begun)
    assert train_small(*small, "whole") == 0
    assert train_small(*small, "run", kind=stopping_after(1)) == 130
    processor(later)
    assert train_small(*small, "run", *typed) == 0
    assert_same(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))
    assert state_of(tmp_path / "run")["config.json"]["precision"] == begun


def test_the_same_images_in_another_place_are_the_same_run_however_the_place_is_written(
        held, train_small, image_folder, tmp_path, undisturbed):
    shutil.copytree(image_folder, tmp_path / "imgs")
    for place in ("imgs", "imgs/", "./imgs", tmp_path / "imgs"):
        assert train_small("--out", "run", "--data-dir", place) == 0
    found = state_of(held)
    for state in (found["checkpoint"]["config"], found["config.json"]):
        state["data_dir"] = str(image_folder)
    assert_same(found, undisturbed)


def test_other_images_in_a_place_of_the_same_name_are_refused(held, train_small, tmp_path, monkeypatch, one_line):
    """A relative --data-dir from another working directory, and one absolute --out."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    coloured_classes(tmp_path / "elsewhere" / "imgs", {"train": 40, "test": 10}, seed=4)
    before = contents(held)
    assert train_small("--out", held, "--data-dir", "imgs") == 2
    one_line("other data", "--fresh")
    assert contents(held) == before


@pytest.mark.parametrize("name", EXPORTS)
def test_somebody_elses_files_without_a_checkpoint_are_never_overwritten(name, train_small, tmp_path, one_line):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine", encoding="utf-8")
    before = files(tmp_path)
    for fresh in ((), ("--fresh",)):
        assert train_small("--out", "run", *fresh) == 2
        one_line("--out run", "give another --out")
    assert files(tmp_path) == before


def test_the_lock_comes_before_anything_is_read_or_loaded(held, train_small, monkeypatch, one_line):
    """So a process that waits for its data cannot overwrite what another one finishes meanwhile."""
    holder = subprocess.Popen([sys.executable, "-c", "import filelock, sys; lock = filelock.FileLock('run/.lock'); "
                               "lock.acquire(); print('held', flush=True); sys.stdin.read()"], cwd=held.parent,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    before = contents(held)
    with monkeypatch.context() as patch:
        patch.setattr(train, "read_checkpoint", None)  # it cannot be called, nor can a kind None
        for arguments in ((), ("--seed", 1), ("--fresh",)):
            assert train_small("--out", "run", *arguments, kind=None) == 2
            one_line("in use by another process")
    assert contents(held) == before
    holder.kill()  # its lock ends with it
    holder.communicate()
    assert train_small("--out", "run") == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks_is_a_warning(number, train_small, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", lambda *_: raises(OSError(number, os.strerror(number))))
    for _ in range(2):
        assert train_small("--out", "run", "--steps", 2) == 0
        error = capsys.readouterr().err
        assert number == errno.ENOSYS and not error or error.startswith("warning: ") and error.count("\n") == 1


# ------------------------------------------------------------------------------------- damaged files

@pytest.mark.parametrize("content", [None, b"", b'{"seed": 0, ', b"null", b"[1]", b"\xff\x00\xfe"])
def test_damaged_exports_are_mended_by_the_same_command(content, held, train_small, undisturbed):
    for name in EXPORTS:
        (held / name).unlink(missing_ok=True)
        if content is not None:
            (held / name).write_bytes(content)
    assert train_small("--out", "run") == 0
    assert_same(state_of(held), undisturbed)


def test_one_flipped_bit_anywhere_in_a_checkpoint_is_refused(trained, tmp_path):
    """In its header, in the states, in the zip directory (the attributes of an entry among them) and in the trailer."""
    content = (trained / "finished" / "checkpoint.pt").read_bytes()
    draw = random.Random(0)
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
    assert len(entries) > 50
    places = [*range(8), *(entry + 38 for entry in entries[::4]), *range(len(content) - 60, len(content), 3),
              *(draw.randrange(len(content)) for _ in range(20))]
    for place in places:
        flipped = bytes([content[place] ^ 1 << draw.randrange(8)])
        (tmp_path / "checkpoint.pt").write_bytes(content[:place] + flipped + content[place + 1:])
        with pytest.raises(ValueError, match="damaged"):
            train.read_checkpoint(tmp_path / "checkpoint.pt")


class Evil:
    """A pickle that makes a directory where it is loaded."""
    def __reduce__(self):
        return os.mkdir, ("ran",)


PARTS = ["config", "made_with", "data", "result", "t", "seconds", "rows", "totals", "model", "ema", "optimizer",
         "scaler", "estimator"]


def without(name):
    """Takes an entry out of a checkpoint, or out of its config, and seals it again."""
    def change(good):
        state = torch.load(io.BytesIO(good[:-32]), weights_only=True)
        del (state if name in PARTS else state["config"])[name]
        return sealed(saved(state))
    return change


FOREIGN = {
    "an empty file": lambda good: b"", "a cut one": lambda good: good[:len(good) // 2],
    "one without its trailer": lambda good: good[:-32],
    "a sealed one of another program": lambda good: sealed(saved({"epoch": 3})),
    "a sealed list": lambda good: sealed(saved([1, 2])),
    **{f"one without its {name}": without(name) for name in [*PARTS, "seed"]}}


@finished
@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_or_damaged_checkpoint_is_refused_in_one_line_and_left_as_it_is(
        what, held, train_small, tmp_path, one_line):
    path = held / "checkpoint.pt"
    path.write_bytes(FOREIGN[what](path.read_bytes()))
    before = contents(tmp_path)
    assert train_small("--out", "run") == 2
    one_line("run", "--fresh")
    assert contents(tmp_path) == before


def test_a_sealed_checkpoint_that_runs_code_does_not_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(sealed(saved({"step": Evil()})))
    with pytest.raises(pickle.UnpicklingError):
        train.read_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------- what a run says

def test_after_a_continuation_the_seconds_go_on_and_the_time_that_is_left_goes_by_the_speed_of_this_start(
        train_small, tmp_path, slow, capsys):
    options = "--steps", 8, "--eval-every", 1, "--out", "run"
    assert train_small(*options, kind=stopping_after(4, slow(100))) == 130
    capsys.readouterr()
    assert train_small(*options, kind=slow(2)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("/")[0] for line in lines] == ["step 5", "step 6", "step 7", "step 8"]
    assert "ETA" not in lines[0]  # the first step, which may compile, is no measure
    assert [line.split("  ")[-2:] for line in lines[1:]] == [["0.5 steps/s", f"ETA 0:00:0{left}"] for left in (4, 2, 0)]
    assert rows(tmp_path / "run")[-1]["seconds"] == 4 * 100 + 4 * 2


def test_averages_that_are_slow_for_the_steps_are_a_note_that_names_the_options(train_small, capsys):
    """0.999^600 is 55 %, 0.99^2 is 98 %, 0.2^2 is 4 %."""
    for option in ("--ema", "--prior-momentum"):
        assert train_small("--steps", 2, option, 0.99, "--out", option[2:]) == 0
        (note,) = capsys.readouterr().err.splitlines()
        assert note.startswith("note: ") and f"{option} " in note and "2 steps" in note
    assert train_small("--steps", 2, "--out", "neither") == 0
    assert not capsys.readouterr().err


# ------------------------------------------------------------------------------- faults while training

def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_good_checkpoint(train_small, tmp_path, one_line):
    class Broken(train.Run):
        def step(self, *batch):
            found = super().step(*batch)
            return found | {"loss_u": found["loss_u"] * (float("nan") if self.t == 1 else 1)}
    assert train_small("--eval-every", 1, "--out", "run", kind=Broken) == 1
    one_line("not finite", "try a lower --lr")
    assert train.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["t"] == 1
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("steps", [2, 6])
def test_a_learning_rate_that_explodes_ends_in_one_line(steps, train_small, one_line):
    """After two steps the loss may still be finite where the network is not."""
    assert train_small("--lr", 1e9, "--steps", steps, "--out", "run") == 1
    one_line("finite", "try a lower --lr")


FAULTS = {  # what is raised in the set-up or in a step, and a word of its line; None: it is shown whole
    "memory of torch on a CPU": (lambda: torch.empty(1 << 60), "allocate"),
    "memory of a GPU": (lambda: raises(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\n")),
                        "CUDA out of memory"),
    "memory of Python": (lambda: raises(MemoryError()), "out of memory"),
    "a batch that batch-norm cannot take": (
        lambda: torch.nn.BatchNorm1d(3)(torch.zeros(1, 3)), "more than 1 value per channel"),
    "a kernel": (lambda: raises(RuntimeError("CUDA error: an illegal memory access was encountered")), None),
    "a name": (lambda: raises(KeyError("p_model")), None)}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_of_the_code_is_shown_whole_and_any_other_is_a_line_without_advice(what, train_small, one_line, capsys):
    act, word = FAULTS[what]
    for status, kind in ((2, lambda config: act()), (1, at_step(2, act))):
        if word:
            assert train_small("--out", "run", kind=kind) == status
            error = one_line(word)
            assert ("step 2: " in error) == (status == 1) and "--lr" not in error
        else:
            with pytest.raises((RuntimeError, KeyError)):
                train_small("--out", "run", kind=kind)
            assert not capsys.readouterr().err


# --------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("arguments, words", [
    (["--method", "mixmatch"], "--method mixmatch"),
    (["--model", "vgg"], "model 'vgg' wrn-<depth>-<width>"), (["--model", "wrn-27-2"], "wrn-27-2 depth"),
    (["--device", "mps"], "--device mps"),
    (["--device", "cuda:63"], "--device cuda:63"),
    (["--steps"], "--steps"), (["--steps", "many"], "--steps many int"), (["--m1=--"], "--m1"),
    (["--imb", "0.01"], "--imb 0.01 reverse --shift"),
    (["--seed", "-1", "--n1", "-2"], "--n1 -2"),  # the first of --help, whatever their order here
    (["--step", "5"], "unrecognized --step"),
    (["--data-dir", "empty"], "--data-dir cannot be used with shapes"),
    (["--dataset", "stl10", "--m1", "5"], "--m1 stl10"),
    (["--labeled-fraction", "0.5", "--n1", "5"], "--n1 --labeled-fraction"),
    (["--imb-u", "50", "--shift", "reversed"], "--shift cannot be used with --imb-u"),
    (["--warmup-steps", "2000"], "--warmup-steps 2000 --steps 1500"),
    (["--n1", "10", "--imb", "20"], "no labeled image --n1 --imb"),
    (["--out", "new/new/new", "--n1", "995"], "class disc has 1000 images 995 12 unlabeled --n1 --m1"),
    (["--out", "file/run"], "file/run"),
    (["--dataset", "folder", "--data-dir", "absent"], "--data-dir there is no folder absent/train"),
    (["--dataset", "folder", "--data-dir", "no-test"], "--data-dir there is no folder no-test/test"),
    (["--dataset", "folder", "--data-dir", "unequal"], "unequal/train the same classes ['cat', 'dog']"),
    (["--dataset", "folder", "--data-dir", "no-images"], "no-images"),
    (["--dataset", "folder", "--data-dir", "one-class"], "one-class/train two at least"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_is_one_line_and_status_2_and_leaves_every_file_as_it_was(
        arguments, words, tmp_path, monkeypatch, one_line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    for name in ("empty", "no-test/train/ant", "unequal/train/ant", "unequal/train/dog", "unequal/test/ant",
                 "unequal/test/cat", "no-images/train/a", "no-images/train/b", "no-images/test/a", "no-images/test/b",
                 "one-class/train/ant", "one-class/test/ant"):
        (tmp_path / name).mkdir(parents=True)
    before = files(tmp_path)
    assert train.main(arguments) == 2
    one_line(*words.split())
    assert files(tmp_path) == before


@pytest.mark.parametrize("option, value", [words.split() for words in (
    "--dataset mnist, --shift sideways, --precision fp8, --compile maybe, --n1 0, --m1 -5, --imb -10, --imb-u 0, "
    "--labeled-fraction 0, --image-size 4, --alpha-min 1.5, --d 0, --threshold -0.1, --warmup-steps -1, "
    "--prior-momentum 1.1, --steps 0, --batch-size -4, --mu 0, --lr 0, --lr nan, --lr inf, --weight-decay -1, "
    "--ema -0.1, --bn-momentum 1.1, --eval-every 0, --seed -1").split(", ")])
def test_a_value_out_of_its_range_is_refused_by_option_and_value(option, value):
    with pytest.raises(ValueError, match=f"{option}.* '?{value}"):
        train.parse([option, value])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="who reads and writes everything")
@pytest.mark.parametrize("what", ["--data-dir", "--out"])
def test_a_directory_without_permission_is_one_line(what, train_small, tmp_path, one_line):
    (tmp_path / "closed").mkdir(mode=0)
    assert train_small(what, "closed") == 2
    one_line()


def test_an_oracle_without_labels_is_refused(train_small, tmp_path, one_line):
    coloured_classes(tmp_path / "data", {"train": 20, "test": 4, "unlabeled": 1})
    assert train_small("--data-dir", "data", "--method", "oracle", split=()) == 2
    one_line("--method oracle needs the true prior")


# ------------------------------------------------------------------------------------------ Windows

def test_without_what_windows_lacks_and_in_its_encoding_everything_works(image_folder, tmp_path):
    """A process without fcntl, resource, pwd and affinities, whose stdout is cp1252: help, a run, a table."""
    arguments = [*small_run(image_folder), "--out", "\u732b/run-s0"]
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


def test_a_directory_that_goes_while_training_is_one_line(train_small, one_line):
    assert train_small("--out", "run", kind=at_step(1, lambda: shutil.rmtree("run"))) == 1
    one_line("step 3: ", "No such file or directory")


def test_a_second_ctrl_c_while_the_first_is_handled_has_no_traceback(monkeypatch, tmp_path):
    """The first in the set-up; the second when its line is about to be printed."""
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "load", interrupted)
    monkeypatch.setattr("builtins.print", interrupted)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path)])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert stop.type is SystemExit and stop.value.code == 130

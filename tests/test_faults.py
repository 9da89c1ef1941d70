"""What happens to runs and what users mistake: resume to the bit, kills, full disks, bad input."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
import torchvision

import models
import train
from conftest import ROOT, SMALL, rows

LONG = ["--n1", 20, "--m1", 20, "--imb", 4, *SMALL, "--steps", 40, "--eval-every", 4]


def start(image_folder, directory, *arguments, **options):
    """train.py as a process of its own, on one thread so that its sums have one order."""
    return subprocess.Popen([sys.executable, ROOT / "train.py", "--dataset", "folder", "--data-dir", image_folder,
                             *map(str, LONG), "--out", directory, *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def until(path, process=None):
    """Wait until a file is there."""
    end = time.time() + 120
    while not path.exists():
        assert time.time() < end and (process is None or process.poll() is None), f"{path} never came"
        time.sleep(0.002)


def state_of(directory):
    """What must be the same to the bit: all of the checkpoint but seconds, and the two result files."""
    checkpoint = models.load_checkpoint(directory / "checkpoint.pt")
    log = [{k: v for k, v in row.items() if k != "seconds"} for row in checkpoint["record"]["rows"]]
    result = json.loads((directory / "result.json").read_text())
    result.pop("seconds")
    return checkpoint, log, result, [row["step"] for row in rows(directory)]


def assert_same(first, second):
    """Equal to the bit, through nested dicts and lists."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            if key != "seconds":
                assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second):
            assert_same(one, other)
    else:
        assert first == second or first != first and second != second


@pytest.fixture(scope="module")
def uninterrupted(image_folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    status, out, err = finish(start(image_folder, directory))
    assert status == 0, err
    return state_of(directory)


# ---------------------------------------------------------------------------------- resume to the bit

def test_killed_and_continued_equals_uninterrupted_to_the_bit(image_folder, tmp_path, uninterrupted):
    """SIGKILL after the first checkpoint and again as soon as the third file name is written."""
    directory = tmp_path / "run"
    for wait in (0.0, 0.13):
        process = start(image_folder, directory)
        until(directory / "checkpoint.pt", process)
        time.sleep(wait)
        process.kill()
        finish(process)
    status, out, err = finish(start(image_folder, directory))
    assert status == 0 and ("continued at step" in out or "balanced accuracy" in out), err
    assert_same(uninterrupted, state_of(directory))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_and_the_same_command_continues(image_folder, tmp_path, uninterrupted, number, status):
    directory = tmp_path / "run"
    process = start(image_folder, directory)
    until(directory / "checkpoint.pt", process)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == status, err
    stopped = int(re.search(r"stopped after step (\d+); the same command continues", out)[1])
    assert models.load_checkpoint(directory / "checkpoint.pt")["record"]["step"] == stopped
    code, out, err = finish(start(image_folder, directory))
    assert code == 0 and f"continued at step {stopped}" in out, err
    assert_same(uninterrupted, state_of(directory))


def test_a_finished_run_is_printed_and_not_repeated(go, tmp_path, capsys):
    assert go("--out", "run") == 0
    before = (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns
    summary = capsys.readouterr().out.splitlines()[-2:]
    assert go("--out", "run") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == summary
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns == before
    assert go("--out", "run", "--fresh") == 0
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns > before


# ------------------------------------------------------------------------------------------ faults

def test_a_full_disk_is_a_warning_and_the_last_good_checkpoint_stays(image_folder, tmp_path):
    """A file-size limit below the checkpoint's size stands for the full disk."""
    directory = tmp_path / "run"
    process = start(image_folder, directory)
    until(directory / "checkpoint.pt", process)
    process.terminate()
    finish(process)
    good = (directory / "checkpoint.pt").read_bytes()
    status, out, err = finish(start(image_folder, directory, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, 100_000))))
    assert status == 0 and "could not be saved" in err and "training goes on" in err
    assert (directory / "checkpoint.pt").read_bytes() == good
    assert not [f for f in directory.iterdir() if f.suffix == ".tmp"]


def test_a_result_that_cannot_be_written_is_one_line(image_folder, tmp_path):
    status, out, err = finish(start(image_folder, tmp_path / "run", "--steps", 4, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (1200, 1200))))
    assert status == 1 and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(go, tmp_path, capsys, monkeypatch):
    calls, step = [], train.train_step

    def fails_at_the_fifth(run, *arguments):
        calls.append(1)
        step(run, *arguments)
        run.record.totals *= float("nan") if len(calls) == 5 else 1
    monkeypatch.setattr(train, "train_step", fails_at_the_fifth)
    assert go("--eval-every", 1, "--out", "run") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step 4: the loss is not finite; the last good checkpoint stays in run")
    assert len(calls) == 5 and models.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["record"]["step"] == 4
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_compiler_that_fails_is_one_line_that_names_the_way_out(go, monkeypatch, capsys):
    def broken(function):
        def fails(*arguments):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand more")
        return fails
    monkeypatch.setattr(torch, "compile", broken)
    assert go("--compile", "on", "--out", "run") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step 0: no C++ compiler; ") and "--compile off" in error and error.count("\n") == 1


def test_a_learning_rate_that_explodes_ends_in_one_line(go, tmp_path, capsys):
    assert go("--lr", 1e20, "--out", "run") == 1
    assert re.match(r"error: step \d: .*(not|must be) finite.*--lr", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no checkpoint"])
def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(go, tmp_path, capsys, content):
    assert go("--out", "run") == 0
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
    assert go("--out", "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: run/checkpoint.pt is damaged") and "--fresh" in error
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == content
    assert go("--out", "run", "--fresh") == 0  # what the line offers works


def test_a_second_process_is_refused_while_the_first_lives_and_not_after(go, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, time; f = open('run/.lock', 'w'); "
                               "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(100)"],
                              cwd=tmp_path, stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert go("--out", "run") == 2 and "in use by another process" in capsys.readouterr().err
    holder.kill()
    holder.wait()
    assert go("--out", "run") == 0


def test_names_of_classes_are_not_paths(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for source, name in (("ant", "..hidden\nline"), ("bee", "a;b'$(c)")):
            (tmp_path / "data" / part / name.replace("..", "_..")).symlink_to(image_folder / part / source)
    assert train.main(["--dataset", "folder", "--data-dir", "data", "--n1", "8", "--m1", "8", "--imb", "1", *SMALL]) == 0
    assert sorted(os.listdir(tmp_path)) == ["data", "runs"] and len(os.listdir(tmp_path / "runs")) == 1
    result = json.loads(next((tmp_path / "runs").glob("*/result.json")).read_text())
    assert result["classes"] == ["_..hidden\nline", "a;b'$(c)"]


# --------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "mnist"], "--dataset mnist"),
    (["--method", "mixmatch"], "--method mixmatch"),
    (["--shift", "sideways"], "--shift sideways"),
    (["--model", "vgg"], "--model vgg wrn-<depth>-<width>"),
    (["--device", "tpu"], "--device tpu"),
    (["--device", "cuda:63"], "--device cuda:63"),
    (["--precision", "fp8"], "--precision fp8"),
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
    (["--n1", "995"], "class 0 has 1000 images 995 labeled, 12 unlabeled --n1 --m1"),
    (["--n1", "10", "--imb", "20"], "at least 1 --n1 --imb"),
    (["--m1", "2000"], "class 9 has 1000 images --m1"),
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
    (["--step", "5"], "unrecognized --step"),
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
def test_a_mistake_is_one_line_and_status_2_before_anything_is_written(
        arguments, words, tmp_path, monkeypatch, capsys, image_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/absent.tar.gz")
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", "http://127.0.0.1:9/absent.tar.gz")
    (tmp_path / "file").write_text("kept")
    for name in ("empty", "no-test/train/ant", "unequal/train/ant", "unequal/train/dog", "unequal/test/ant",
                 "no-images/train/a", "no-images/train/b", "no-images/test/a", "no-images/test/b",
                 "one-class/train", "one-class/test", "corrupt/cifar-10-batches-py"):
        (tmp_path / name).mkdir(parents=True)
    for part in ("train", "test"):
        (tmp_path / "one-class" / part / "ant").symlink_to(image_folder / part / "ant")
    for i in range(1, 6):
        (tmp_path / f"corrupt/cifar-10-batches-py/data_batch_{i}").write_bytes(b"not CIFAR")
    before = sorted(p for p in tmp_path.rglob("*"))
    try:
        status = train.main(arguments)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), error
    for word in words.split():
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"
    assert sorted(p for p in tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
@pytest.mark.parametrize("what", ["--data-dir", "--out"])
def test_a_directory_without_permission_is_one_line(what, go, tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0)
    assert go(what, "closed") == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("setting, value", [("--lr", "0.05"), ("--method", "udal"), ("--steps", "7"), ("--seed", "1")])
def test_a_directory_of_other_settings_is_refused_naming_the_setting(setting, value, go, tmp_path, capsys):
    assert go("--out", "run") == 0
    kept = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    assert go("--out", "run", setting, value) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: run holds a run with " + setting) and value in error and "--fresh" in error
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == kept


def test_an_oracle_without_labels_is_refused(image_folder, tmp_path, capsys, monkeypatch):
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "unlabeled").mkdir(parents=True)
    for part in ("train", "test"):
        (tmp_path / "data" / part).symlink_to(image_folder / part)
    Image.new("RGB", (16, 16)).save(tmp_path / "data" / "unlabeled" / "0.png")
    assert train.main(["--dataset", "folder", "--method", "oracle", *SMALL]) == 2
    assert "--method oracle needs the true prior" in capsys.readouterr().err

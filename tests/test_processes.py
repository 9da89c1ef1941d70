"""distributed.py under torchrun: two processes train as one, go on from a checkpoint, end together."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import models
from conftest import ROOT, rows
from test_faults import LONG, until

# Batch-norm with the running statistics, since two processes on CPUs normalise each half by its own
FIXED_BATCH_NORM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.path.insert(0, {str(ROOT / "tests")!r})
import models, train
build = models.build
models.build = lambda *arguments: build(*arguments).eval()
import os, distributed
sys.exit(distributed.main(sys.argv[1:]) if "WORLD_SIZE" in os.environ else train.main())
"""
SHORT = LONG + ["--steps", 8, "--lr", 0.01, "--warmup-steps", 2]


def start(processes, script, image_folder, directory, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    return subprocess.Popen(list(map(str, [sys.executable, *launcher, script, "--dataset", "folder", "--data-dir",
                                           image_folder, *SHORT, "--out", directory, *arguments])),
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_equal_one(image_folder, tmp_path):
    script = tmp_path / "fixed.py"
    script.write_text(FIXED_BATCH_NORM)
    logs, states = [], []
    for processes in (1, 2):
        process = start(processes, script, image_folder, tmp_path / str(processes), "--precision", "fp32")
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert out.count("ETA") == 2 and out.count("balanced accuracy") == 1, out  # one writer
        states.append(models.load_checkpoint(tmp_path / str(processes) / "checkpoint.pt"))
        logs.append(rows(tmp_path / str(processes)))
    torch.testing.assert_close(states[0]["model"], states[1]["model"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(states[0]["estimator"], states[1]["estimator"], atol=1e-6, rtol=0)
    for one, two in zip(*logs):
        for name in ("loss_s", "loss_u", "loss_uc", "mask_rate", "kl_q_qhat", "temperature", "balanced_accuracy"):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name


SAME_ON_ALL = f"""
import hashlib, sys
sys.path.insert(0, {str(ROOT)!r})
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch, distributed
kept, prepare = [], distributed.prepare_part
distributed.prepare_part = lambda s: kept.append(prepare(s)) or kept[0]
status = distributed.main(sys.argv[1:])
parameters = torch.cat([p.detach().flatten() for p in kept[0].model.parameters()] + [kept[0].estimator.q_hat])
sys.stderr.write("fingerprint " + hashlib.sha256(parameters.numpy().tobytes()).hexdigest() + "\\n")  # in one piece
sys.exit(status)
"""


def test_all_processes_hold_the_same_parameters_and_prior_and_a_stopped_run_goes_on(image_folder, tmp_path):
    script, directory = tmp_path / "same.py", tmp_path / "run"
    script.write_text(SAME_ON_ALL)
    process = start(2, script, image_folder, directory, "--eval-every", 1, "--steps", 60)
    until(directory / "checkpoint.pt", process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    process.communicate(timeout=120)
    step = models.load_checkpoint(directory / "checkpoint.pt")["record"]["step"]
    process = start(2, script, image_folder, directory, "--eval-every", 1, "--steps", 60)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and f"continued at step {step}" in out, err
    assert [row["step"] for row in rows(directory)] == list(range(1, 61))
    fingerprints = re.findall(r"fingerprint (\w+)", err)
    assert len(fingerprints) == 2 and len(set(fingerprints)) == 1


def test_a_killed_process_ends_the_others_and_leaves_a_usable_checkpoint(image_folder, tmp_path):
    directory, long = tmp_path / "run", ["--steps", 4000, "--eval-every", 50, "--warmup-steps", 0]
    process = start(2, ROOT / "tests" / "distributed.py", image_folder, directory, *long)
    until(directory / "checkpoint.pt", process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert models.load_checkpoint(directory / "checkpoint.pt")["record"]["step"] >= 50
    for worker in workers:
        assert not os.path.exists(f"/proc/{worker}")


def test_a_batch_that_does_not_divide_is_refused(image_folder, tmp_path):
    process = start(2, ROOT / "tests" / "distributed.py", image_folder, tmp_path / "run", "--batch-size", 3)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "error: --batch-size 3 does not divide over 2 processes" in err

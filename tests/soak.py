"""A long test, for a person to run: processes killed at random, and random settings, until the time is over.

    python tests/soak.py [--minutes 10] [--seed 0]

Whatever happens to a run, the same command has to complete it to the same bits, or to say in one line why not. The
first that does not ends the soak with its traceback.
"""

import argparse
import io
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from conftest import ROOT, assert_same, coloured_classes, result_of, state_of  # adds ROOT to the path
import train
from losses import METHODS


def random_arguments(seed, folder):
    """A command line: sensible values, their edges, and one value in twenty beyond them."""
    draw = random.Random(seed)
    options = {  # name: (how often, values, values beyond)
        "--n1": (1, [4, 5, 12, 20], [0, 1, 41]), "--m1": (1, [4, 10, 20], [-1, 1, 60]),
        "--imb": (1, [1, 1.5, 4], [0.5, 1e6]), "--shift": (0.5, ["consistent", "uniform", "reversed"], ["none"]),
        "--imb-u": (0.1, [0.01, 0.5, 3, 100], [0]), "--method": (0.8, [*METHODS], ["cosSL"]),
        "--alpha-min": (0.3, [0, 0.1, 1], [1.1]), "--d": (0.3, [0.01, 1, 2, 50], [0]),
        "--threshold": (0.3, [0, 0.4, 0.95, 1], [2]), "--warmup-steps": (0.4, [0, 1, 2], [3]),
        "--prior-momentum": (0.3, [0, 0.5, 0.999], [1]),
        "--model": (1, ["wrn-10-1", "wrn-10-1", "wrn-16-1"], ["wrn-11-1"]),
        "--image-size": (1, [8, 9, 13, 16, 20], [7]), "--batch-size": (0.8, [1, 2, 7, 16, 50], [0]),
        "--mu": (0.3, [1, 2, 5], [0]), "--lr": (0.6, [1e-12, 0.03, 1, 1e4], [math.nan, 1e30]),
        "--weight-decay": (0.2, [0, 5e-4, 10], [-1]), "--ema": (0.3, [0, 0.9, 0.9999], [1]),
        "--bn-momentum": (0.3, [1e-6, 0.1, 1], [0]), "--seed": (0.3, [0, 1, 2 ** 31], [-1]),
        "--eval-every": (0.4, [1, 2, 100], [0]), "--precision": (0.15, ["auto", "fp32", "bf16", "fp16"], ["fp64"])}
    chosen = {name: draw.choice(beyond if draw.random() < 0.05 else values)
              for name, (often, values, beyond) in options.items() if draw.random() < often}
    if draw.random() < 0.15:
        chosen = {k: v for k, v in chosen.items() if k not in ("--n1", "--m1", "--imb", "--shift", "--imb-u")}
        chosen["--labeled-fraction"] = draw.choice([0.01, 0.1, 0.5, 0.99])
    return ["--dataset", "folder", "--data-dir", str(folder), "--steps", "2", "--out", f"run{seed}",
            *(str(part) for pair in chosen.items() for part in pair)]


def quietly(arguments):
    """train.main without its output. Returns the exit status and the lines on stderr."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as told:
        status = train.main(list(map(str, arguments)))
    return status, told.getvalue().splitlines()


def check(seed, folder, directory):
    """Run one setting in the current directory. Returns "trained", "refused" or "stopped"."""
    arguments = random_arguments(seed, folder)
    status, told = quietly(arguments)
    told = [line for line in told if not line.startswith("note: ")]
    command = " ".join(arguments)
    if status == 0:
        result = result_of(directory / f"run{seed}")
        assert result["step"] == 2 and math.isfinite(result["nll"]) and 0 <= result["ece"] <= 1, command
        assert abs(sum(result["q_hat"]) - 1) < 1e-4 and min(result["q_hat"]) >= 0, command
        return "trained"
    assert status in (1, 2) and len(told) == 1 and told[0].startswith("error: "), (command, told)
    if status == 2:
        return "refused"
    assert "finite" in told[0] and "--lr" in told[0], (command, told)
    return "stopped"


RUN = ("--n1 20 --m1 20 --imb 4 --model wrn-10-1 --bn-momentum 0.05 --image-size 16 --batch-size 8 --steps 40 "
       "--eval-every 2 --dataset folder --data-dir").split()


def kills(draw, directory, folder, whole):
    """One run, killed at random moments until it is through. Returns how many times."""
    command = [sys.executable, ROOT / "train.py", *RUN, folder, "--out", directory]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for count in itertools.count():
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        while not (directory / ".lock").exists() and process.poll() is None:
            time.sleep(0.01)
        try:
            process.wait(draw.uniform(0, 3) if count < 6 else 600)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        train.read_checkpoint(directory / "checkpoint.pt")  # whole, or not there yet
    assert process.returncode == 0, process.stderr.read()
    assert_same(whole, state_of(directory))
    return count


def soak(minutes, seed):
    """A run that is killed and ten random settings, in turn, until the time is over."""
    draw = random.Random(seed)
    end = time.monotonic() + 60 * minutes
    killed = tried = 0
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        root = Path(temporary).resolve()
        folder = coloured_classes(root / "folder", {"train": 40, "test": 10})
        assert quietly([*RUN, folder, "--out", "whole"])[0] == 0
        whole = state_of(root / "whole")
        while (left := end - time.monotonic()) > 0:
            print(f"{left:.0f} s left: {killed} kills, {tried} settings", flush=True)
            killed += kills(draw, root / "killed", folder, whole)
            for tried in range(tried + 1, tried + 11):
                check(draw.randrange(10 ** 9), folder, root)
            for run in {*root.iterdir()} - {folder, root / "whole"}:
                shutil.rmtree(run)
        print(f"{killed} kills, {tried} settings, no fault")
        os.chdir(ROOT)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    soak(options.minutes, options.seed)


if __name__ == "__main__":
    main()

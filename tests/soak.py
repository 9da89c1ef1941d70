"""The long tests, for a person to run: 25 kills at random moments, 2,000 random settings, 10,000 classes.

    python tests/soak.py [--kills 25] [--settings 2000] [--classes 10000]
"""

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from conftest import ROOT, rows
import models
from test_faults import assert_same, state_of
from test_random import check

KILLED = ["--dataset", "shapes", "--n1", "20", "--m1", "40", "--imb", "4", "--batch-size", "8", "--steps", "60",
          "--eval-every", "2"]


def make_folder(root, classes, train_images, test_images):
    """A folder data set of coloured noise."""
    draw = np.random.default_rng(0)
    for part, count in (("train", train_images), ("test", test_images)):
        for k in range(classes):
            directory = root / part / f"{k:05}"
            directory.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., k % 3] += 120
                Image.fromarray(pixels).save(directory / f"{i}.png")
    return root


def start(directory):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *KILLED, "--out", directory], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)


def kills(count, root):
    """SIGKILL at random moments, checkpoint writes among them; then the run equals the undisturbed one."""
    process = start(root / "undisturbed")
    assert process.wait() == 0
    whole, draw, landed = state_of(root / "undisturbed"), random.Random(0), 0
    while landed < count:
        directory, end = root / f"killed{landed}", landed + 5
        while True:
            process = start(directory)
            while not (directory / ".lock").exists() and process.poll() is None:
                time.sleep(0.01)
            if landed < min(end, count):
                time.sleep(draw.uniform(0, 8))
            else:
                process.wait()
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            landed += 1
            state = models.load_checkpoint(directory / "checkpoint.pt")  # whole, or not there yet
            if (directory / "log.csv").exists():
                assert [r["step"] for r in rows(directory)] == list(range(2, 2 * len(rows(directory)) + 1, 2))
            print(f"kill {landed}: checkpoint of step {state['record']['step'] if state else None}", flush=True)
        assert process.returncode == 0, process.stderr.read()
        assert_same(whole, state_of(directory))
    print(f"{landed} kills: every run ended equal to the undisturbed one, to the bit")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--settings", type=int, default=2000)
    parser.add_argument("--classes", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        root = Path(temporary)
        if options.classes:
            folder = make_folder(root / "many", options.classes, 1, 1)
            for split in (["--n1", "1", "--m1", "1", "--imb", "1"], ["--labeled-fraction", "0.5"]):
                begun = time.time()
                status = subprocess.run([sys.executable, ROOT / "train.py", "--dataset", "folder", "--data-dir", folder,
                                         "--steps", "2", "--model", "wrn-10-1", "--image-size", "16", *split]).returncode
                print(f"{options.classes} classes of one image, {' '.join(split)}: status {status} after "
                      f"{time.time() - begun:.1f} s", flush=True)
        if options.kills:
            kills(options.kills, root)
        folder, seen = make_folder(root / "folder", 3, 40, 10), collections.Counter()
        for seed in range(1000, 1000 + options.settings):
            seen[check(seed, folder, root)] += 1
            subprocess.run(["rm", "-rf", root / f"run{seed}"])
            if sum(seen.values()) % 100 == 0:
                print(f"{sum(seen.values())} settings: {dict(seen)}", flush=True)


if __name__ == "__main__":
    main()

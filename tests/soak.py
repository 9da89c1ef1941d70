"""The long tests, for a person to run: faults of every kind until the time is over, random settings, many classes.

    python tests/soak.py [--minutes 10] [--kinds kills writes flips exports data settings] [--classes 10000]

Each kind takes its turn: kills at random moments of a process, kills inside a write, flipped bits in a checkpoint,
damaged exports, changed data, random settings. Whatever happens to a run, the same command has to complete it to the
same bits, or to say in one line why not. The first that does not ends the soak with its traceback.
"""

import argparse
import collections
import hashlib
import io
import itertools
import json
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

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from conftest import assert_same, state_of, stopping_after
from losses import METHODS


# ------------------------------------------------------------------------------- shared with the tests

class Killed(BaseException):
    """Nothing in the program catches it, as nothing catches a kill."""


def failing(function, n, error, and_later=False):
    """The function, but for its n-th call (and later ones), which raises the error."""
    calls = itertools.count(1)

    def fails(*arguments, **options):
        call = next(calls)
        if call == n or and_later and call > n:
            raise error
        return function(*arguments, **options)
    return fails


def flipped(content, place, bit):
    """These bytes with one bit turned over."""
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1:]


def sealed(content):
    """Bytes with the trailer that says that nothing in them has changed."""
    return content + hashlib.sha256(content).digest()


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


def quietly(arguments, kind=train.Run):
    """train.main without its output. Returns the exit status and the lines on stderr."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = train.main(list(map(str, arguments)), kind)
    return status, err.getvalue().splitlines()


def check(seed, folder, directory):
    """Run one setting in the current directory. Returns "trained", "refused" or "stopped"."""
    arguments = random_arguments(seed, folder)
    status, told = quietly(arguments)
    told = [line for line in told if not line.startswith("note: ")]
    command = " ".join(arguments)
    if status == 0:
        result = json.loads((directory / f"run{seed}" / "result.json").read_text(encoding="utf-8"))
        assert result["step"] == 2 and math.isfinite(result["nll"]) and 0 <= result["ece"] <= 1, command
        assert abs(sum(result["q_hat"]) - 1) < 1e-4 and min(result["q_hat"]) >= 0, command
        return "trained"
    assert status in (1, 2) and len(told) == 1 and told[0].startswith("error: "), (command, told)
    if status == 2:
        return "refused"
    assert "finite" in told[0] and "--lr" in told[0], (command, told)
    return "stopped"


# --------------------------------------------------------------------------------------- the soak

RUN = ("--n1 20 --m1 20 --imb 4 --model wrn-10-1 --bn-momentum 0.05 --image-size 16 --batch-size 8 --steps 40 "
       "--eval-every 2 --dataset folder --data-dir").split()
SHORT = ["--steps", 6, "--eval-every", 3]


def make_folder(root, classes=3, train_images=40, test_images=10):
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


def start(*arguments, inside=""):
    """train.py as a process of its own, on one thread; inside: what it does first."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train\n{inside}\nsys.exit(train.main())"
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kills(draw, root, folder, whole):
    """One run, killed at random moments until it is through."""
    directory = root / "killed"
    count = 0
    while True:
        process = start(*RUN, folder, "--out", directory)
        while not (directory / ".lock").exists() and process.poll() is None:
            time.sleep(0.01)
        deadline = time.monotonic() + (draw.uniform(0, 3) if count < 6 else 600)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        count += 1
        train.read_checkpoint(directory / "checkpoint.pt")  # whole, or not there yet
    assert process.returncode == 0, process.stderr.read()
    assert_same(whole["long"], state_of(directory))
    return count


def writes(draw, root, folder, whole):
    """A run, its process ended between a write and its renaming, and another, ended in the middle of a write."""
    for part in (1, 0.5):
        directory = root / f"cut{part}"
        n = draw.randrange(whole["replacements"])  # the ones before the n-th do their work
        inside = (f"import os, itertools; real = os.replace; calls = itertools.count()\n"
                  f"def cut(source, target):\n"
                  f"    if next(calls) == {n}:\n"
                  f"        os.truncate(source, int({part} * os.path.getsize(source)))\n"
                  f"        os._exit(9)\n"
                  f"    real(source, target)\n"
                  f"os.replace = cut")
        process = start(*RUN, folder, "--out", directory, inside=inside)
        assert process.wait() == 9, (n, process.stderr.read())
        status, told = quietly([*RUN, folder, "--out", directory])
        assert status == 0, told
        assert_same(whole["long"], state_of(directory))
        assert not list(directory.glob("*.tmp"))
    return 2


def flips(draw, root, folder, whole):
    """Flipped bits in a checkpoint, half of them in the zip directory."""
    directory = root / "flipped"
    shutil.copytree(root / "short", directory)
    path = directory / "checkpoint.pt"
    content = path.read_bytes()
    directory_of_zip = content.index(b"PK\x01\x02")
    for _ in range(100):
        place = draw.randrange(draw.choice([0, directory_of_zip]), len(content))
        path.write_bytes(flipped(content, place, draw.randrange(8)))
        status, told = quietly([*RUN, folder, *SHORT, "--out", directory])
        assert status == 2 and len(told) == 1 and "damaged" in told[0], (place, told)
    return 100


def exports(draw, root, folder, whole):
    """Exports cut, emptied, taken away or overwritten, of a finished run and of one that is stopped."""
    for finished in (True, False):
        directory = root / f"spoiled{finished}"
        shutil.copytree(root / ("short" if finished else "stopped"), directory)
        for name in ("config.json", "log.csv", "result.json"):
            path = directory / name
            content = path.read_bytes() if path.exists() else b"{}"
            path.unlink(missing_ok=True)
            kind = draw.randrange(5)
            if kind:
                path.write_bytes([content[:draw.randrange(len(content))], b"null", b"[]", draw.randbytes(50)][kind - 1])
        status, told = quietly([*RUN, folder, *SHORT, "--out", directory])
        assert status == 0, told
        assert_same(whole["short"], state_of(directory))
    return 2


def data(draw, root, folder, whole):
    """A folder that changes between stop and continuation: refused, and taken again when it is as it was."""
    directory = root / "changed"
    shutil.copytree(root / "stopped", directory)
    images = sorted(folder.glob("*/*/*.png"))
    first, second = draw.sample(images, 2)
    kept = first.read_bytes()
    kind = draw.randrange(3)
    if kind == 0:
        first.write_bytes(second.read_bytes())  # of the same class or another
    elif kind == 1:
        first.unlink()
    else:
        shutil.copy(second, first.with_name("more.png"))
    status, told = quietly([*RUN, folder, *SHORT, "--out", directory])
    # what is cut out of the folder may not hold the image that changed
    assert status in (0, 2) and len(told) == (status == 2), told
    if status == 0:
        assert_same(whole["short"], state_of(directory))
    first.with_name("more.png").unlink(missing_ok=True)
    first.write_bytes(kept)
    status, told = quietly([*RUN, folder, *SHORT, "--out", directory])
    assert status == 0, told
    assert_same(whole["short"], state_of(directory))
    return 1


def settings(draw, root, folder, whole):
    """Ten random settings."""
    os.chdir(root)
    for _ in range(10):
        seed = draw.randrange(10 ** 9)
        check(seed, folder, root)
        shutil.rmtree(root / f"run{seed}", ignore_errors=True)
    return 10


KINDS = {kind.__name__: kind for kind in (kills, writes, flips, exports, data, settings)}


def soak(kinds, minutes, seed):
    """Each kind in its turn until the time is over."""
    draw = random.Random(seed)
    end = time.monotonic() + 60 * minutes
    done = collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        root = Path(temporary).resolve()
        folder = make_folder(root / "folder")
        replace = os.replace
        replaced = []
        os.replace = lambda *places: replaced.append(places) or replace(*places)
        assert quietly([*RUN, folder, "--out", root / "long"])[0] == 0
        os.replace = replace
        assert replaced, "a run renames no file: kills inside a write would test nothing"
        assert quietly([*RUN, folder, *SHORT, "--out", root / "short"])[0] == 0
        assert quietly([*RUN, folder, *SHORT, "--out", root / "stopped"], stopping_after(4))[0] == 130
        whole = {name: state_of(root / name) for name in ("long", "short")} | {"replacements": len(replaced)}
        kept = set(os.listdir(root))
        for kind in itertools.cycle(kinds):
            if time.monotonic() > end:
                break
            done[kind] += KINDS[kind](draw, root, folder, whole)
            for name in set(os.listdir(root)) - kept:
                shutil.rmtree(root / name)
            print(f"{max(0, end - time.monotonic()):.0f} s left: {dict(done)}", flush=True)
        os.chdir(ROOT)


def many_classes(count):
    """A folder of so many classes of one image trains, by counts and by fraction."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(Path(temporary) / "many", count, 2, 1)
        for split in (["--n1", 1, "--m1", 1, "--imb", 1], ["--labeled-fraction", 0.5]):
            begun = time.time()
            status, told = quietly(["--dataset", "folder", "--data-dir", folder, "--steps", 2, "--model", "wrn-10-1",
                                    "--image-size", 16, "--out", Path(temporary) / "run", "--fresh", *split])
            assert status == 0, told
            print(f"{count} classes, {' '.join(map(str, split))}: {time.time() - begun:.1f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--classes", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.classes:
        many_classes(options.classes)
    soak(options.kinds, options.minutes, options.seed)


if __name__ == "__main__":
    main()

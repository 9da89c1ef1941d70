"""Shared by the tests: small data in memory and on disk, small runs, and what has to be the same of two."""

import csv
import functools
import hashlib
import io
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import train

torch.set_num_threads(1)

SPLIT = ["--n1", "20", "--m1", "20", "--imb", "4"]
SMALL = ("--steps 6 --batch-size 8 --eval-every 3 --model wrn-10-1 --bn-momentum 0.05 "
         "--image-size 8 --ema 0.2 --prior-momentum 0.2").split()
EXPORTS = ["config.json", "log.csv", "result.json"]


# --------------------------------------------------------------------------------------------- data

@functools.cache
def small_sets():
    """A long-tailed split of 16x16 shapes, the unlabeled ones reversed, in which no two images are the same."""
    images, labels = data.shapes(60, 0)
    seen, hidden = data.split(labels, data.long_tail_counts(20, 4, 10), data.long_tail_counts(40, 1 / 4, 10), 0)
    both = torch.cat([seen, hidden])
    test, test_labels = data.shapes(3, 1)
    statistics = torch.tensor(data.STATISTICS["shapes"]).view(2, 3, 1, 1)
    return data.Data(images[seen], labels[seen], images[both], labels[both], test, test_labels, list(data.SHAPES),
                     *statistics)


def load(dataset, root=None, **settings):
    """data.load of a data set in a folder, with images of 16 pixels and the other settings given or the paper's."""
    return data.load(train.Config(dataset=dataset, data_dir=root, **{"image_size": 16, **settings}))


@pytest.fixture
def sigint():
    """Ctrl-C is KeyboardInterrupt, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def coloured_classes(root, counts, seed=3):
    """<part>/<class>/*.png, 16x16, classes ant, bee and cat told apart by colour.

    counts: images of each class of a part, or a list of three.
    """
    random = np.random.default_rng(seed)
    for part, count in counts.items():
        of_each = count if isinstance(count, list) else 3 * [count]
        for k, name in enumerate(("ant", "bee", "cat")):
            (root / part / name).mkdir(parents=True)
            for i in range(of_each[k]):
                pixels = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., k] += 120
                Image.fromarray(pixels).save(root / part / name / f"{i:03}.png")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """train/ and test/ of three classes, 40 and 10 images each. Not to be changed."""
    return coloured_classes(tmp_path_factory.mktemp("folder"), {"train": 40, "test": 10})


@pytest.fixture(scope="session")
def images():
    """Unlike each other, with gradients, edges, noise and the full range: (64, 3, 32, 32) uint8."""
    random = np.random.default_rng(7)
    found = []
    for i in range(64):
        small = Image.fromarray(random.integers(0, 256, (2 + i % 7, 2 + i % 5, 3), dtype=np.uint8))
        large = np.asarray(small.resize((32, 32), Image.BICUBIC if i % 3 else Image.NEAREST)).astype(int)
        found.append((large + random.normal(0, i % 20, large.shape)).clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


# --------------------------------------------------------------------------------------------- runs

def small_run(image_folder, split=SPLIT):
    """train.py's options for six steps on the small folder, with two evaluations."""
    return ["--dataset", "folder", "--data-dir", str(image_folder), *split, *SMALL]


@pytest.fixture
def options(image_folder, tmp_path, monkeypatch):
    """The options of a small run in fp32 on the CPU, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return [*small_run(image_folder), "--precision", "fp32", "--device", "cpu"]


@pytest.fixture
def train_small(image_folder, tmp_path, monkeypatch):
    """train.main of a small run, in an empty directory; returns the exit status.

    Further options come last and win. kind and variant: main's.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments, split=SPLIT, kind=train.Run, variant=None):
        words = [*small_run(image_folder, split), *map(str, arguments)]
        return train.main(words, kind, variant)
    return run


def parse(*words, variant=None):
    """The Config of a command line, with numbers allowed among its words."""
    return train.parse([str(word) for word in words], variant)[0]


def raises(error):
    raise error


def at_step(t, act, kind=train.Run):
    """A kind of run that calls `act` before step t."""
    class Acting(kind):
        def step(self, *batch):
            if self.t == t:
                act()
            return super().step(*batch)
    return Acting


def stopping_after(steps, kind=train.Run):
    """A kind of run that is interrupted where it has done this many steps."""
    return at_step(steps, lambda: raises(KeyboardInterrupt), kind)


@pytest.fixture
def one_line(capsys):
    """The only line on stderr, an error that holds these words."""
    def check(*words):
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        for word in words:
            assert word in error, f"{word!r} is not in: {error}"
        return error
    return check


# -------------------------------------------------------------------------------------- what they wrote

def result_of(directory):
    """A run's result.json as a strict reader of JSON sees it: NaN and Infinity are no numbers."""
    text = (directory / "result.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=lambda name: raises(ValueError(f"{name} is not JSON")))


def rows(directory):
    """A run's log.csv: a dict of floats for each evaluation."""
    with open(directory / "log.csv", newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def contents(directory):
    """Everything below a directory: {relative path: bytes, None for a folder or a lock, which may be held}."""
    return {str(path.relative_to(directory)): None if path.is_dir() or path.name == ".lock" else path.read_bytes()
            for path in directory.rglob("*")}


def state_of(directory):
    """What has to be the same to the bit: the checkpoint and the files that are made from it."""
    return {"checkpoint": train.read_checkpoint(directory / "checkpoint.pt"), "log": rows(directory),
            **{name: json.loads((directory / name).read_text(encoding="utf-8"))
               for name in ("config.json", "result.json")}}


def assert_same(first, second, where=""):
    """Equal to the bit through nested dicts and lists, but for the seconds and the directory."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first.keys() - {"seconds", "out"}:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for i, (one, other) in enumerate(zip(first, second)):
            assert_same(one, other, f"{where}/{i}")
    else:
        assert first == second or first != first and second != second, (where, first, second)


def sealed(content):
    """Bytes with the trailer that says that nothing in them has changed."""
    return content + hashlib.sha256(content).digest()


def saved(value):
    """What torch.save writes of a value."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def made_up_run(directory, accuracy=0.5, result=(), **settings):
    """The three files of a run of four classes, with known numbers."""
    directory.mkdir(parents=True)
    config = dict(dataset="shapes", method="adello", shift="reversed", imb=50.0, steps=100, seed=0, lr=0.1,
                  out=str(directory), device="cpu", data={"test": 0}) | settings
    result = dict(balanced_accuracy=accuracy, ece=0.1, mce=0.2, kl_q_qhat=0.03, classes=list("abcd"),
                  per_class_accuracy=[0.9, 0.6, 0.4, 0.1], p_labeled=[0.4, 0.3, 0.2, 0.1]) | dict(result)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (directory / "log.csv").write_text("step,alpha,kl_q_qhat\n50,0.8,nan\n100,0.1,0.03\n", encoding="utf-8")
    return directory

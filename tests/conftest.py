"""Shared by the tests: the modules on the path, one thread, small data on disk, a small run on it."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)

SPLIT = ["--n1", "20", "--m1", "20", "--imb", "4"]
SMALL = "--steps 6 --batch-size 8 --eval-every 3 --model wrn-10-1 --bn-momentum 0.05 --image-size 16".split()


def rows(directory):
    """A run's log.csv: a dict of floats for each evaluation."""
    with open(directory / "log.csv", newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def train_small(image_folder, tmp_path, monkeypatch):
    """train.main on the small folder, in an empty directory; returns the exit status.

    Six steps, two evaluations; further options come last and win. hooks: main's prepare, step and variant.
    """
    import train
    monkeypatch.chdir(tmp_path)

    def run(*arguments, split=SPLIT, **hooks):
        return train.main(["--dataset", "folder", "--data-dir", str(image_folder), *split, *SMALL,
                           *map(str, arguments)], **hooks)
    return run


def coloured_classes(root, counts, seed=3):
    """<part>/<class>/*.png, 16x16, classes ant, bee and cat told apart by colour; counts: of each part."""
    random = np.random.default_rng(seed)
    for part, count in counts.items():
        for k, name in enumerate(("ant", "bee", "cat")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
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

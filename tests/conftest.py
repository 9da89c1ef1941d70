"""Shared by the tests: the modules on the path, a small data set on disk, a small run on it."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train

torch.set_num_threads(2)

SMALL = "--steps 6 --batch-size 8 --eval-every 3 --model wrn-10-1 --bn-momentum 0.05 --image-size 16".split()


def rows(directory):
    """A run's log.csv: a dict of floats for each evaluation."""
    with open(directory / "log.csv") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def go(image_folder, tmp_path, monkeypatch):
    """train.main on the small folder, in an empty directory; returns the exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, split=("--n1", "20", "--m1", "20", "--imb", "4")):
        return train.main(["--dataset", "folder", "--data-dir", str(image_folder), *split, *SMALL,
                           *map(str, arguments)])
    return run


@pytest.fixture(scope="session")
def pictures():
    """Real pixels to test on: 64 photographs' worth of texture is not at hand, so smooth random ones.

    (64, 3, 32, 32) uint8 with gradients, edges, noise and full range, unlike each other.
    """
    random = np.random.default_rng(7)
    images = []
    for i in range(64):
        small = Image.fromarray(random.integers(0, 256, (2 + i % 7, 2 + i % 5, 3), dtype=np.uint8))
        large = np.asarray(small.resize((32, 32), Image.BICUBIC if i % 3 else Image.NEAREST)).astype(int)
        images.append((large + random.normal(0, i % 20, large.shape)).clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """train/ and test/ of three classes, 40 and 10 images each, 16x16 PNG, told apart by colour."""
    root, random = tmp_path_factory.mktemp("folder"), np.random.default_rng(3)
    for part, count in (("train", 40), ("test", 10)):
        for k, name in enumerate(("ant", "bee", "cat")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., k] += 120
                Image.fromarray(pixels).save(root / part / name / f"{i:03}.png")
    return root

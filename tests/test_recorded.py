"""Numbers from outside: the paper's counts, the authors' channel statistics, the data and the log of a recorded run."""

import csv
import dataclasses
import gzip
import types

import numpy as np
import pytest
import torch
import torchvision

import data
import train
from conftest import ROOT, parse


def load(*words, size):
    """The Data of a command line, with images of this size, which may be below those of --image-size."""
    return data.load(dataclasses.replace(parse(*words), image_size=size))


# ------------------------------------------------------------------------------------------ counts of the paper

HELD = {"cifar10": (10, 5000), "cifar100": (100, 500), "stl10": (10, 500)}  # classes, training images of each


@pytest.fixture
def published(monkeypatch):
    """CIFAR and STL-10 as torchvision gives them, with as many images, of one black pixel."""
    def stand_in(dataset):
        K, each = HELD[dataset]

        def read(root, part, download):
            count = {"unlabeled": 30, "test": K, False: K}.get(part, K * each)
            pixels = np.zeros((count, 3, 1, 1) if dataset == "stl10" else (count, 1, 1, 3), np.uint8)
            labels = np.arange(count) % K
            classes = [str(k) for k in range(K)]
            return types.SimpleNamespace(data=pixels, targets=labels.tolist(), labels=labels, classes=classes)
        return read
    for dataset in HELD:
        monkeypatch.setattr(torchvision.datasets, dataset.upper(), stand_in(dataset))


def counts(head, gamma, K):
    """N_k = int(N_1 gamma^(-k/(K-1))) by whole numbers: the largest n with n^(K-1) gamma^k <= N_1^(K-1)."""
    found = []
    for k in range(K):
        n = found[-1] if found else head
        while n ** (K - 1) * gamma ** k > head ** (K - 1):
            n -= 1
        found.append(n)
    return found


SETTINGS = [  # section 5 of the paper: data set, N1, M1, gamma
    *(("cifar10", n1, m1, gamma) for n1, m1 in ((1500, 3000), (500, 4000)) for gamma in (100, 150)),
    *(("cifar100", 150, 300, gamma) for gamma in (10, 20, 50, 100)), ("cifar100", 50, 400, 10)]
SHIFTS = {"consistent": lambda gamma: gamma, "uniform": lambda gamma: 1, "reversed": lambda gamma: 1 / gamma}


@pytest.mark.parametrize("dataset, n1, m1, gamma, words, gamma_u", [
    *((*row, ["--shift", shift], of(row[3])) for row in SETTINGS for shift, of in SHIFTS.items()),
    *(("cifar100", 150, 300, 50, ["--imb-u", gamma_u], gamma_u)  # the sweep
      for gamma_u in (50, 20, 10, 1, 0.1, 0.05, 0.02))])
def test_every_setting_of_the_paper_has_its_counts(dataset, n1, m1, gamma, words, gamma_u, published):
    K = HELD[dataset][0]
    sets = load("--dataset", dataset, "--n1", n1, "--m1", m1, "--imb", gamma, *words, size=1)
    labeled = counts(n1, gamma, K)
    drawn = counts(m1, gamma_u, K) if gamma_u >= 1 else counts(m1, round(1 / gamma_u), K)[::-1]
    assert torch.bincount(sets.labels).tolist() == labeled
    assert torch.bincount(sets.hidden_labels).tolist() == [n + m for n, m in zip(labeled, drawn)]


@pytest.mark.parametrize("n1, gamma", [(150, 10), (150, 20), (450, 10), (450, 20)])
def test_stl10_takes_all_its_images_as_unlabeled_ones(n1, gamma, published):
    sets = load("--dataset", "stl10", "--n1", n1, "--imb", gamma, size=1)
    assert torch.bincount(sets.labels).tolist() == counts(n1, gamma, 10)
    assert len(sets.unlabeled) == 5000 + 30


def test_the_counts_that_the_paper_and_the_talk_write_out():
    falling = [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15]
    rising = [30, 50, 83, 139, 232, 387, 646, 1078, 1798, 3000]
    assert counts(1500, 100, 10) == data.long_tail_counts(1500, 100, 10) == falling
    assert counts(3000, 100, 10)[::-1] == data.long_tail_counts(3000, 1 / 100, 10) == rising


# ---------------------------------------------------------------------------------------- channel statistics

STATISTICS = {  # mean and std; where the authors write levels of 0 to 255, so does this table
    "cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1),            # semilearn/datasets/cv_datasets/cifar.py
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4), 255),            # there
    "stl10": ((112.4, 109.1, 98.6), (68.4, 66.6, 68.5), 255),                # cv_datasets/stl10.py
    "folder": ((0.4811, 0.4575, 0.4079), (0.2604, 0.2532, 0.2682), 1),       # cv_datasets/small_imagenet.py, 4 digits
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 1)}                      # no published data


@pytest.mark.parametrize("dataset", STATISTICS)
def test_images_are_normalised_as_the_authors_do_it(dataset, published, image_folder):
    """To the last bit of float32."""
    words = ["--dataset", dataset, *["--data-dir", image_folder] * (dataset == "folder")]
    sets = load(*words, size=1 if dataset in HELD else 8)
    mean, std, unit = STATISTICS[dataset]
    for found, expected in ((sets.mean, mean), (sets.std, std)):
        assert torch.equal(found, torch.tensor([value / unit for value in expected]).view(3, 1, 1))


# -------------------------------------------------------------------------------------- the recorded runs' data

SHAPES = {  # of the images that all recorded runs on shapes saw: mean and standard deviation of each class
    "unlabeled": (1000, [106.944, 99.432, 104.818, 96.973, 90.057, 96.660, 96.236, 96.331, 92.943, 88.794],
                  [85.795, 83.373, 85.399, 82.190, 80.095, 82.474, 82.522, 82.781, 80.813, 79.517]),
    "test": (200, [106.930, 101.155, 106.072, 96.035, 91.798, 97.053, 96.168, 98.563, 93.800, 88.533],
             [85.947, 83.526, 84.760, 82.418, 80.054, 82.777, 82.615, 82.865, 81.055, 79.490])}


def test_shapes_are_the_images_of_the_recorded_runs():
    """By sums: sine and cosine differ in their last bits between machines, and with them a pixel or two."""
    sets = data.load(parse(*"--n1 500 --m1 500 --imb 1".split()))  # the unlabeled set is all of it
    for part, (count, means, deviations) in SHAPES.items():
        images = getattr(sets, part)
        assert images.shape == (10 * count, 3, 16, 16)
        images = images.double().view(10, -1)
        assert images.mean(1).tolist() == pytest.approx(means, abs=0.005)
        assert images.std(1).tolist() == pytest.approx(deviations, abs=0.005)


def test_the_first_steps_are_those_of_a_recorded_run():
    """The first row of its log, after 100 of 1,500 steps. It was made in bf16, which this comparison allows for."""
    with gzip.open(ROOT / ".github/results/logs.csv.gz", "rt", encoding="utf-8") as file:
        recorded = next(row for row in csv.DictReader(file) if row["run"] == "shapes-adello-reversed-imb50-s0")
    assert recorded["step"] == "100"
    run = train.Run(parse(*"--device cpu --precision fp32 --compile off".split()))
    loss = 0
    for run.t in range(100):
        loss += run.step(*run.batch())["loss_s"].item() / 100
    q_hat = run.estimator.q_hat
    kl = (run.q_true * (run.q_true / q_hat).log()).sum().item()
    assert loss == pytest.approx(float(recorded["loss_s"]), rel=0.004)
    assert kl == pytest.approx(float(recorded["kl_q_qhat"]), abs=0.004)
    assert run.optimizer.param_groups[0]["lr"].item() == pytest.approx(float(recorded["lr"]), rel=1e-6)

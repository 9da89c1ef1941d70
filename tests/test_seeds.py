"""What is random in a run changes with seed, step and epoch: each thing with what it should and with nothing else."""

import numpy as np
import pytest
import torch

import data
import train
from conftest import parse

FOLDER = ("--dataset folder --n1 20 --m1 10 --imb 4 --image-size 8 --model wrn-10-1 --batch-size 4 --mu 1 --device cpu "
          "--precision fp32 --compile off").split()
N = 16          # images of each set of the numbered data: an epoch is four steps
EPOCH = N // 4

CHANGES = {  # what is changed: further words, the step
    "nothing": ([], 1), "nothing again": ([], 1),
    "the seed": (["--seed", 1], 1), "the step": ([], 2), "the epoch": ([], 1 + EPOCH),
    "the rate": (["--lr", 0.2], 1), "the method": (["--method", "fixmatch"], 1), "alpha": (["--alpha-min", 1], 1),
    "the length": (["--steps", 999], 1), "the evaluations": (["--eval-every", 1], 1),
    "the precision": (["--precision", "bf16"], 1)}
ALWAYS = {"the seed", "the step", "the epoch"}
THINGS = {  # what is random: what it changes with
    "labeled images": {"the seed"}, "unlabeled images": {"the seed"}, "first weights": {"the seed"},
    "labeled images of the step": ALWAYS, "unlabeled images of the step": ALWAYS, "views of labeled images": ALWAYS,
    "views of unlabeled images": ALWAYS, "shapes to train on": set(), "shapes to test on": set()}


@pytest.fixture(scope="module")
def numbered():
    """Data in which each image shows its number, which is its class: labeled 0 to 15, unlabeled 100 to 115."""
    numbers = torch.arange(N)
    labeled, unlabeled = (k.to(torch.uint8).view(N, 1, 1, 1).repeat(1, 3, 8, 8) for k in (numbers, numbers + 100))
    mean, std = torch.tensor([0.5, 0.25]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    return data.Data(labeled, numbers, unlabeled, numbers, labeled, numbers, [str(k) for k in range(N)], mean, std)


def numbers(images):
    return images[:, 0, 0, 0].tolist()


@pytest.fixture(scope="module")
def runs(image_folder, numbered):
    """For each change every random thing; PyTorch's and numpy's generators are in another state each time."""
    found = {}
    for i, (change, (words, t)) in enumerate(CHANGES.items()):
        torch.manual_seed(i)
        np.random.seed(i)
        config = parse(*FOLDER, "--data-dir", image_folder, *words)
        sets = data.load(config)
        run = train.Run(config, numbered)
        assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), run.ema.model.parameters(), strict=True))
        run.t = t
        labeled, _, unlabeled, _, draws = run.batch()
        parts = {"labeled images": sets.labeled, "unlabeled images": sets.unlabeled,
                 "first weights": torch.cat([p.detach().flatten() for p in run.model.parameters()]),
                 "labeled images of the step": labeled, "unlabeled images of the step": unlabeled,
                 "views of labeled images": draws[:4], "views of unlabeled images": draws[4:]}
        if change in ("nothing", "nothing again", "the seed"):  # 500 + 500 images of a class are all that there are
            every = "--n1 500 --m1 500 --imb 1 --image-size 8 --device cpu".split()
            sets = data.load(parse(*every, *words))
            parts |= {"shapes to train on": sets.unlabeled, "shapes to test on": sets.test}
        found[change] = parts
    return found


@pytest.mark.parametrize("thing", THINGS)
def test_what_is_random_changes_with_what_it_should_and_with_nothing_else(thing, runs):
    for change, parts in runs.items():
        if thing in parts:
            same = torch.equal(parts[thing], runs["nothing"][thing])
            assert same == (change not in THINGS[thing]), change


def epochs(run, part, count=3):
    """The numbers of the images of each epoch, in their order; part: 0 labeled, 2 unlabeled."""
    found = []
    for run.t in range(count * EPOCH):
        found += numbers(run.batch()[part])
    return [found[i:i + N] for i in range(0, len(found), N)]


@pytest.fixture
def run(numbered, image_folder):
    return train.Run(parse(*FOLDER, "--data-dir", image_folder), numbered)


def test_every_epoch_holds_every_image_once_in_an_order_of_its_own_unlike_the_other_sets(run):
    orders = []
    for part, first in ((0, 0), (2, 100)):
        for order in epochs(run, part):
            assert sorted(order) == list(range(first, first + N))
            orders.append(tuple(number - first for number in order))
    assert len({*orders, tuple(range(N))}) == 7


def test_every_image_of_a_batch_comes_with_its_own_label(run):
    labeled, labels, unlabeled, hidden_labels, _ = run.batch()
    assert numbers(labeled) == labels.tolist() and len(set(labels.tolist())) == 4
    assert numbers(unlabeled - 100) == hidden_labels.tolist() and len(set(hidden_labels.tolist())) == 4


@pytest.mark.parametrize("words", [[], ["--shift", "reversed"], ["--seed", 1]])
def test_every_image_of_a_split_comes_with_its_own_label(words, image_folder):
    """The colour of the folder's images says their class."""
    sets = data.load(parse(*FOLDER, "--data-dir", image_folder, *words))
    for images, labels in ((sets.labeled, sets.labels), (sets.unlabeled, sets.hidden_labels),
                           (sets.test, sets.test_labels)):
        assert images.float().mean((2, 3)).argmax(1).tolist() == labels.tolist()
        assert set(labels.tolist()) == {0, 1, 2}


def test_every_image_of_every_step_has_draws_of_its_own(run):
    """15 uniform numbers: no two of 1,000 steps are the same, and each column has the mean and the spread of [0, 1)."""
    rows = []
    for run.t in range(1000):
        rows.append(run.batch()[4])
    rows = torch.cat(rows).double()
    assert len(rows.unique(dim=0)) == len(rows) == 8000
    assert (rows.mean(0) - 0.5).abs().max() < 0.02 and (rows.std(0) - 12 ** -0.5).abs().max() < 0.01
    assert (torch.corrcoef(rows.T) - torch.eye(15)).abs().max() < 0.05
    assert rows.min() >= 0 and rows.max() < 1

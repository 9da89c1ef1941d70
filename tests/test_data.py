"""data.py: the paper's counts and splits, the loaders, and the fingerprint. The views are tested in test_views.py."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
from conftest import load, small_sets
from priors import kl_divergence, uniform


# ---------------------------------------------------------------------------------------- splits

def test_counts_that_are_whole_but_for_rounding_are_whole():
    assert 243 * 243 ** (-2 / 5) < 27 and 32 * 32 ** (-2 / 5) < 8
    assert data.long_tail_counts(243, 243, 6) == [243, 81, 27, 9, 3, 1]
    assert data.long_tail_counts(32, 1 / 32, 6) == [1, 2, 4, 8, 16, 32]
    assert 1 / (1 / 49) > 49 and data.long_tail_counts(490, 1 / 49, 10)[0] == 10


@pytest.mark.parametrize("imb_u, kl", [(100, 0.910), (1 / 100, 0.204), (1, 0.0084)])
def test_distance_of_the_true_prior_from_uniform_as_the_paper_has_it(imb_u, kl):
    union = torch.tensor(data.long_tail_counts(1500, 100, 10)) + torch.tensor(data.long_tail_counts(3000, imb_u, 10))
    assert kl_divergence(uniform(10), union / union.sum()).item() == pytest.approx(kl, abs=6e-4 if kl > 0.1 else 6e-5)


def test_a_split_has_the_counts_and_no_overlap():
    labels = torch.arange(1000) % 4
    labeled, unlabeled = data.split(labels, [40, 20, 10, 5], [0, 50, 100, 200], seed=3)
    assert torch.bincount(labels[labeled]).tolist() == [40, 20, 10, 5]
    assert torch.bincount(labels[unlabeled], minlength=4).tolist() == [0, 50, 100, 200]
    assert not set(labeled.tolist()) & set(unlabeled.tolist())
    assert len(set(labeled.tolist())) == 75 and len(set(unlabeled.tolist())) == 350


def test_a_split_that_asks_too_much_names_the_class_what_there_is_and_the_options():
    with pytest.raises(ValueError, match="class 1 has 10 images, not enough for 8 labeled and 3 unlabeled; see --n1"):
        data.split(torch.arange(20) % 2, [8, 8], [2, 3], 0)
    with pytest.raises(ValueError, match=r"class 'b\\ne' would get no labeled image; see --n1, --imb"):  # one line
        data.split(torch.arange(20) % 2, [8, 0], [1, 1], 0, ["ant", "b\ne"])


# --------------------------------------------------------------------------------------- loading

def test_shapes_have_the_area_of_their_geometry():
    """Disc pi r^2, square (1.7 r)^2, diamond 2 r^2, bar 2 r x 0.6 r, r = 0.4..0.8 of half the side."""
    images, labels = data.shapes(200, 0, size=32, noise=0.0)
    bright = (images.amin(1) >= 127).float().mean((1, 2))  # the figure is above one half in all channels
    r2 = (0.8 ** 3 - 0.4 ** 3) / 3 / 0.4                   # mean of r^2 over uniform r
    for name, area in {"disc": math.pi, "square": 1.7 ** 2, "diamond": 2, "bar": 1.2}.items():
        share = bright[labels == list(data.SHAPES).index(name)].mean().item()
        assert share == pytest.approx(area * r2 / 4, rel=0.06), name


def test_the_unlabeled_set_holds_the_labeled_one_and_the_test_set_stands_apart():
    sets = load("shapes", n1=30, m1=60, imb=10, shift=None, imb_u=0.1)
    pool = {image.numpy().tobytes() for image in sets.unlabeled}
    assert len(pool) == len(sets.unlabeled)  # no two images are the same
    assert all(image.numpy().tobytes() in pool for image in sets.labeled)
    assert not any(image.numpy().tobytes() in pool for image in sets.test)


@pytest.mark.parametrize("fraction, held, labeled", [
    (0.01, [100, 200, 300], [1, 2, 3]), (0.57, [100, 200, 300], [57, 114, 171]),
    (0.29, [100, 200, 300], [29, 58, 87]),    # 0.29 * 100 is 28.999999999999996
    (0.1, [19, 20, 3], [1, 2, 1])])           # cut off, but one image is left
def test_a_labeled_fraction_labels_that_share_of_every_class_and_all_are_unlabeled(
        fraction, held, labeled, monkeypatch):
    images = torch.arange(3 * sum(held)).view(-1, 3, 1, 1).to(torch.uint8)
    labels = torch.arange(3).repeat_interleave(torch.tensor(held))
    whole = images, labels, images[:1], labels[:1], list("abc")
    monkeypatch.setattr(data, "folder", lambda root, size: whole)
    sets = load("folder", n1=None, labeled_fraction=fraction)
    assert torch.bincount(sets.labels).tolist() == labeled
    assert torch.bincount(sets.hidden_labels).tolist() == held


def holds_no_other_memory(sets):
    return all(part.untyped_storage().nbytes() == part.nbytes for part in sets[:6])


def test_cifar_files_already_in_place_are_used(tmp_path, monkeypatch):
    """In torchvision's layout, with random images; the checksums are left out."""
    CIFAR10 = torchvision.datasets.CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    kept = {}
    for attribute, name in (("train_list", "data_batch_1"), ("test_list", "test_batch")):
        kept[name] = random.integers(0, 256, (60, 3072), dtype=np.uint8)
        batch = {"data": kept[name], "labels": [j % 10 for j in range(60)]}
        (folder / name).write_bytes(pickle.dumps(batch))
        monkeypatch.setattr(CIFAR10, attribute, [[name, None]])
    (folder / "meta").write_bytes(pickle.dumps({"label_names": [f"class{k}" for k in range(10)]}))
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    sets = load("cifar10", tmp_path, n1=4, m1=2, imb=2, shift="uniform", image_size=32)
    assert sets.test.shape == (60, 3, 32, 32)
    assert np.array_equal(sets.test.numpy().reshape(60, -1), kept["test_batch"])
    assert sets.test_labels.tolist() == [j % 10 for j in range(60)] and sets.classes[3] == "class3"
    number = {image.tobytes(): j % 10 for j, image in enumerate(kept["data_batch_1"])}
    for images, labels in ((sets.labeled, sets.labels), (sets.unlabeled, sets.hidden_labels)):
        assert [number[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert holds_no_other_memory(sets)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10"])
def test_a_download_that_fails_is_one_line_that_names_set_and_place(dataset, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets.utils, "urlopen", no_network, raising=False)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(ValueError, match=f"{dataset} is not whole in .*--data-dir") as error:
        load(dataset, tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_stl10_is_resized_and_its_unlabeled_images_join_all_training_images(tmp_path, monkeypatch):
    """In torchvision's layout, with smooth random images; the checksums are left out."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, n in {"train": 40, "test": 20, "unlabeled": 30}.items():
        coarse = [Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(n)]
        kept = np.stack([np.asarray(image.resize((96, 96), Image.BICUBIC)) for image in coarse])
        kept.transpose(0, 3, 2, 1).tofile(folder / f"{part}_X.bin")  # stored by column
        (np.arange(n) % 10 + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("0")
    monkeypatch.setattr(torchvision.datasets.STL10, "train_list", [
        ["train_X.bin", None], ["train_y.bin", None], ["unlabeled_X.bin", None]])
    monkeypatch.setattr(torchvision.datasets.STL10, "test_list", [["test_X.bin", None], ["test_y.bin", None]])
    sets = load("stl10", tmp_path, n1=4, imb=4, image_size=32)
    assert sets.unlabeled.shape == (70, 3, 32, 32) and set(sets.hidden_labels.tolist()) == {-1}
    assert sets.test_labels.tolist() == [k % 10 for k in range(20)] and sets.classes == list("abcdefghij")
    assert torch.bincount(sets.labels).tolist() == data.long_tail_counts(4, 4, 10)
    pil = np.stack([Image.fromarray(image).resize((32, 32), Image.BILINEAR) for image in kept])
    assert np.abs(sets.unlabeled[:30].permute(0, 2, 3, 1).numpy() - pil.astype(int)).max() <= 1
    assert holds_no_other_memory(sets)


# -------------------------------------------------------------------------------------- fingerprint

def test_a_fingerprint_is_the_same_for_the_same_data_and_its_part_of_the_test_for_every_seed():
    sets = small_sets()
    found = data.fingerprint(sets)
    copies = [part.clone() if torch.is_tensor(part) else list(part) for part in sets]
    assert found == data.fingerprint(data.Data(*copies)) == json.loads(json.dumps(found))
    one, other = (data.fingerprint(load("shapes", n1=20, m1=20, imb=2, seed=seed)) for seed in (0, 1))
    assert one["test"] == other["test"] and one["split"] != other["split"]


@pytest.mark.parametrize("name", ["labeled", "labels", "unlabeled", "hidden_labels", "test", "test_labels"])
def test_a_fingerprint_sees_one_changed_value_and_two_that_change_places(name):
    sets = small_sets()
    part = getattr(sets, name)
    changed = part.clone()
    changed[-1] += 1
    swapped = part.roll(1, 0)
    which, other = ("test", "split") if name.startswith("test") else ("split", "test")
    found = [data.fingerprint(sets._replace(**{name: t})) for t in (part, changed, swapped)]
    assert len({each[which] for each in found}) == 3 and len({each[other] for each in found}) == 1


def test_a_fingerprint_sees_a_renamed_class():
    sets = small_sets()
    assert data.fingerprint(sets) != data.fingerprint(sets._replace(classes=["other", *sets.classes[1:]]))

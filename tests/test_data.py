"""data.py: the paper's counts and splits, the loaders, and every operation against PIL."""

import itertools
import math
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

import data
from priors import kl_divergence, uniform


# ---------------------------------------------------------------------------------------- splits

def test_the_counts_that_the_paper_states():
    assert data.long_tail_counts(1500, 100, 10) == [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15]
    assert data.long_tail_counts(3000, 1 / 100, 10) == [30, 50, 83, 139, 232, 387, 646, 1078, 1798, 3000]
    assert data.long_tail_counts(3000, 1, 10) == [3000] * 10


@pytest.mark.parametrize("head, gamma, classes", [
    (1500, 100, 10), (500, 100, 10), (1500, 150, 10), (500, 150, 10), (3000, 100, 10), (4000, 150, 10),
    (150, 10, 100), (150, 20, 100), (150, 50, 100), (150, 100, 100), (50, 10, 100), (400, 100, 100),
    (150, 10, 10), (150, 20, 10), (450, 10, 10), (450, 20, 10), (300, 50, 100), (300, 20, 100)])
def test_every_setting_of_the_paper_falls_from_head_to_head_over_gamma(head, gamma, classes):
    counts = data.long_tail_counts(head, gamma, classes)
    assert len(counts) == classes and counts[0] == head and counts[-1] == head // gamma
    assert counts == sorted(counts, reverse=True)
    # integer arithmetic, no floating point: n^(K-1) gamma^k <= N1^(K-1) < (n+1)^(K-1) gamma^k
    for k, n in enumerate(counts):
        assert n ** (classes - 1) * gamma ** k <= head ** (classes - 1) < (n + 1) ** (classes - 1) * gamma ** k
    assert data.long_tail_counts(head, 1 / gamma, classes) == counts[::-1]


def test_a_reversed_imbalance_is_the_inverse_though_its_float_is_not():
    assert 1 / (1 / 49) > 49 and data.long_tail_counts(490, 1 / 49, 10)[0] == 10


@pytest.mark.parametrize("imb_u, kl", [(100, 0.910), (1 / 100, 0.204), (1, 0.0084)])
def test_distance_of_the_true_prior_from_uniform_as_the_paper_has_it(imb_u, kl):
    union = torch.tensor(data.long_tail_counts(1500, 100, 10)) + torch.tensor(data.long_tail_counts(3000, imb_u, 10))
    assert kl_divergence(uniform(10), union / union.sum()).item() == pytest.approx(kl, abs=6e-4 if kl > 0.1 else 6e-5)


@pytest.mark.parametrize("arguments", [(0, 10, 10), (10, 0, 10), (10, -2, 10), (10, 10, 1), (10, math.inf, 3), (10, math.nan, 3)])
def test_counts_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError):
        data.long_tail_counts(*arguments)


def test_a_split_has_the_counts_and_no_overlap():
    labels = torch.arange(1000) % 4
    labeled, unlabeled = data.split(labels, [40, 20, 10, 5], [0, 50, 100, 200], seed=3)
    assert torch.bincount(labels[labeled]).tolist() == [40, 20, 10, 5]
    assert torch.bincount(labels[unlabeled], minlength=4).tolist() == [0, 50, 100, 200]
    assert not set(labeled.tolist()) & set(unlabeled.tolist())
    assert len(set(labeled.tolist())) == 75 and len(set(unlabeled.tolist())) == 350


def test_the_same_seed_gives_the_same_split_and_another_another():
    labels = torch.arange(1000) % 4
    first, again, other = (data.split(labels, [50] * 4, [100] * 4, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_a_split_that_asks_too_much_names_the_class_and_what_is_left():
    with pytest.raises(ValueError, match="class 1 has 10 images, not enough for 8 .* labeled, 3 unlabeled"):
        data.split(torch.arange(20) % 2, [8, 8], [2, 3], 0)
    with pytest.raises(ValueError, match="class 1 has 10 images, not enough for 0 .at least 1. labeled"):
        data.split(torch.arange(20) % 2, [8, 0], [1, 1], 0)


def test_a_thousand_classes_and_a_class_without_unlabeled_images_split():
    labels = torch.arange(3000) % 1000
    labeled, unlabeled = data.split(labels, [1] * 1000, [2] * 500 + [0] * 500, 0)
    assert len(labeled) == 1000 and len(unlabeled) == 1000


# --------------------------------------------------------------------------------------- loading

def test_shapes_are_the_same_for_a_seed_and_unlike_for_another():
    first, labels = data.shapes(5, 0)
    assert first.shape == (50, 3, 16, 16) and first.dtype == torch.uint8
    assert labels.tolist() == [k for k in range(10) for _ in range(5)]
    assert torch.equal(first, data.shapes(5, 0)[0]) and not torch.equal(first, data.shapes(5, 1)[0])


def test_shapes_have_the_area_of_their_geometry():
    """Disc pi r^2, square (1.7 r)^2, diamond 2 r^2, bar 2 r x 0.6 r, r = 0.4..0.8 of half the side."""
    images, labels = data.shapes(400, 0, size=64, noise=0.0)
    bright = (images.amin(1) >= 127).float().mean((1, 2))  # the figure is above one half in all channels
    r2 = (0.8 ** 3 - 0.4 ** 3) / 3 / 0.4                   # mean of r^2 over uniform r
    for name, area in {"disc": math.pi, "square": 1.7 ** 2, "diamond": 2, "bar": 1.2}.items():
        share = bright[labels == list(data.SHAPES).index(name)].mean().item()
        assert share == pytest.approx(area * r2 / 4, rel=0.06), name


def test_the_unlabeled_set_is_the_union_with_the_labeled_one():
    sets = data.load("shapes", n1=30, m1=60, imb=10, imb_u=0.1, image_size=16)
    labeled, unlabeled = data.long_tail_counts(30, 10, 10), data.long_tail_counts(60, 0.1, 10)
    assert torch.bincount(sets.labels).tolist() == labeled
    assert torch.bincount(sets.hidden_labels).tolist() == [a + b for a, b in zip(labeled, unlabeled)]
    pool = {image.numpy().tobytes() for image in sets.unlabeled}
    assert all(image.numpy().tobytes() in pool for image in sets.labeled)
    assert not any(image.numpy().tobytes() in pool for image in sets.test)


def test_a_labeled_fraction_labels_that_share_of_every_class(image_folder):
    sets = data.load("folder", image_folder, labeled_fraction=0.1, image_size=16)
    assert torch.bincount(sets.labels).tolist() == [4, 4, 4] and len(sets.unlabeled) == 120
    assert sets.classes == ["ant", "bee", "cat"]


def test_a_folder_keeps_the_pixels_and_has_the_statistics_of_imagenet_127(image_folder):
    sets = data.load("folder", image_folder, n1=40, m1=None, image_size=16)
    first = np.asarray(Image.open(image_folder / "test" / "ant" / "000.png"))
    assert np.array_equal(sets.test[0].permute(1, 2, 0).numpy(), first)
    assert sets.mean == (.4811, .4575, .4079) and sets.std == (.2604, .2532, .2682)


def test_images_without_labels_join_and_leave_no_hidden_labels(image_folder, tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).symlink_to(image_folder / part)
    (tmp_path / "unlabeled").mkdir()
    for i in range(7):
        Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / "unlabeled" / f"{i}.png")
    sets = data.load("folder", tmp_path, labeled_fraction=0.5, image_size=16)
    assert len(sets.unlabeled) == 127 and sets.hidden_labels is None and len(sets.labels) == 60
    cut = data.load("folder", tmp_path, n1=20, m1=10**6, imb=4, image_size=16)  # M1 draws nothing: the 127 are U
    assert torch.equal(cut.unlabeled, sets.unlabeled) and torch.bincount(cut.labels).tolist() == [20, 10, 5]


def test_grey_rgba_palette_and_16_bit_images_of_any_size_are_read(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("L", (20, 20), 100).save(tmp_path / part / name / "grey.png")
            Image.new("RGBA", (8, 8), (10, 20, 30, 128)).save(tmp_path / part / name / "rgba.png")
            Image.new("RGB", (31, 17), (200, 0, 0)).quantize(4).save(tmp_path / part / name / "palette.png")
            Image.fromarray(np.full((40, 12), 51 * 256, np.uint16)).save(tmp_path / part / name / "sixteen.png")
    images = data.load("folder", tmp_path, n1=4, image_size=16).test[:4]  # grey, palette, rgba, sixteen
    assert images.shape == (4, 3, 16, 16)
    assert [tuple(image[:, 8, 8].tolist()) for image in images] == [
        (100, 100, 100), (200, 0, 0), (10, 20, 30), (51, 51, 51)]


def test_unreadable_images_are_named_together_up_to_ten(image_folder, tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "good.png").write_bytes((image_folder / "test/ant/000.png").read_bytes())
    whole = (image_folder / "test/ant/000.png").read_bytes()
    for i in range(12):
        (tmp_path / "train" / "a" / f"bad{i:02}.png").write_bytes(whole[:len(whole) // 2] if i % 2 else b"")
    with pytest.raises(ValueError, match="12 unreadable images") as error:
        data.load("folder", tmp_path, n1=1, image_size=16)
    assert len(set(re.findall(r"bad\d\d", str(error.value)))) == 10 and "\n" not in str(error.value)


def cifar_files(root, monkeypatch, count=60):
    """CIFAR-10 in torchvision's layout, with random images; the checksums are left out."""
    folder, random = root / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    kept = {}
    for i, name in enumerate(["data_batch_1", "test_batch"]):
        kept[name] = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": kept[name], "labels": [j % 10 for j in range(count)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{k}" for k in range(10)]}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta",
                        {"filename": "batches.meta", "key": "label_names", "md5": None})
    return kept


def test_cifar_files_already_in_place_are_used(tmp_path, monkeypatch):
    kept = cifar_files(tmp_path, monkeypatch)
    sets = data.load("cifar10", tmp_path, n1=4, m1=2, imb=2, imb_u=1, image_size=32)
    assert sets.test.shape == (60, 3, 32, 32)
    assert np.array_equal(sets.test.numpy().reshape(60, -1), kept["test_batch"])
    assert sets.mean == (0.485, 0.456, 0.406) and sets.classes[3] == "class3"


def test_stl10_is_resized_and_its_unlabeled_images_join_all_training_images(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    random, count = np.random.default_rng(0), {"train": 40, "test": 20, "unlabeled": 30}
    for part, n in count.items():
        random.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{part}_X.bin")
        (np.arange(n) % 10 + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    monkeypatch.setattr(torchvision.datasets.STL10, "train_list", [
        ["train_X.bin", None], ["train_y.bin", None], ["unlabeled_X.bin", None]])
    monkeypatch.setattr(torchvision.datasets.STL10, "test_list", [["test_X.bin", None], ["test_y.bin", None]])
    (folder / "fold_indices.txt").write_text("0")
    sets = data.load("stl10", tmp_path, n1=4, imb=4, image_size=32)
    assert sets.unlabeled.shape == (70, 3, 32, 32) and sets.hidden_labels is None
    assert torch.bincount(sets.labels).tolist() == data.long_tail_counts(4, 4, 10)


# ---------------------------------------------------------------------------------- augmentation

def transform(image, *coefficients):
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


PIL_OPERATIONS = {
    "AutoContrast": lambda image, v: ImageOps.autocontrast(image),
    "Brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "Color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "Contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "Equalize": lambda image, v: ImageOps.equalize(image),
    "Identity": lambda image, v: image,
    "Posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "Rotate": lambda image, v: image.rotate(v),
    "Sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "ShearX": lambda image, v: transform(image, 1, v, 0, 0, 1, 0),
    "ShearY": lambda image, v: transform(image, 1, 0, 0, v, 1, 0),
    "Solarize": lambda image, v: ImageOps.solarize(image, v),
    "TranslateX": lambda image, v: transform(image, 1, 0, v * image.size[0], 0, 1, 0),
    "TranslateY": lambda image, v: transform(image, 1, 0, 0, 0, 1, v * image.size[1])}


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def test_there_are_the_papers_fourteen_operations_with_its_ranges():
    assert {name: ends for name, (_, *ends) in data.OPERATIONS.items()} == dict(
        AutoContrast=[0, 1], Brightness=[.05, .95], Color=[.05, .95], Contrast=[.05, .95], Equalize=[0, 1],
        Identity=[0, 1], Posterize=[4, 8], Rotate=[-30, 30], Sharpness=[.05, .95], ShearX=[-.3, .3],
        ShearY=[-.3, .3], Solarize=[0, 256], TranslateX=[-.3, .3], TranslateY=[-.3, .3])


@pytest.mark.parametrize("name", PIL_OPERATIONS)
def test_operation_equals_pil(name, pictures):
    """At 64 magnitudes over the range, its lower end included; AutoContrast may be off by one level."""
    _, low, high = data.OPERATIONS[name]
    magnitude = low + (high - low) * torch.arange(64) / 64 * 0.999
    ours = data.OPERATIONS[name][0](pictures.clone(), magnitude.view(-1, 1, 1, 1)).int()
    theirs = from_pil([PIL_OPERATIONS[name](to_pil(image), v.item()) for image, v in zip(pictures, magnitude)]).int()
    assert (ours - theirs).abs().max() <= (1 if name == "AutoContrast" else 0)


@pytest.mark.parametrize("name", ["TranslateX", "TranslateY"])
def test_translation_at_an_exact_tie_takes_one_of_the_two_neighbours(name, pictures):
    """Half-pixel shifts, where the nearest neighbour is not unique: PIL's view a hair to either side."""
    magnitude = torch.arange(-9, 10) / 64
    ours = data.OPERATIONS[name][0](pictures[:19].clone(), magnitude.view(-1, 1, 1, 1))
    for k, v in enumerate(magnitude.tolist()):
        near = [np.asarray(PIL_OPERATIONS[name](to_pil(pictures[k]), v + tiny)) for tiny in (-1e-4, 1e-4)]
        assert any(np.array_equal(ours[k].permute(1, 2, 0).numpy(), one) for one in near)


def test_each_image_gets_the_operation_and_magnitude_that_its_draws_name(pictures):
    """Against PIL, one round: operation number floor(14 choice), magnitude low + (high - low) level."""
    table = list(data.OPERATIONS.items())
    choice, level = (torch.arange(64) % 14 + 0.5) / 14, torch.arange(64) / 64 * 0.998 + 0.0007
    ours = data.random_operation(pictures.clone(), choice, level).int()
    for image, view, c, l in zip(pictures, ours, choice.tolist(), level):
        name, (_, low, high) = table[int(14 * c)]
        expected = PIL_OPERATIONS[name](to_pil(image), (low + (high - low) * l).item())
        assert (from_pil([expected])[0].int() - view).abs().max() <= (1 if name == "AutoContrast" else 0), name


def test_sorted_by_operation_or_all_chosen_from_the_views_are_the_same(pictures, monkeypatch):
    draws = torch.rand(64, 12, generator=torch.Generator().manual_seed(1))
    by_group = data.strong(pictures, draws=draws)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(by_group, data.strong(pictures, draws=draws))


def test_every_image_is_augmented_by_its_own_draws(pictures):
    draws = torch.rand(64, 12, generator=torch.Generator().manual_seed(2))
    together = data.strong(pictures, draws=draws)
    for i in (0, 17, 63):
        assert torch.equal(together[i:i + 1], data.strong(pictures[i:i + 1], draws=draws[i:i + 1]))


def test_views_never_change_their_input_and_are_the_same_for_a_seed(pictures):
    before = pictures.clone()
    for view in (data.weak, data.strong):
        first, again = (view(pictures, torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(first, again) and first.shape == pictures.shape and first.dtype == torch.uint8
    assert torch.equal(pictures, before)


def test_the_weak_views_are_the_crops_of_the_reflected_image_and_their_mirrors_equally_often(pictures):
    """All 9 x 9 x 2 of them, in PIL's padding; each belongs to an equal part of the draws."""
    ninths = [(i + part) / 9 for i in range(9) for part in (0.01, 0.99)]
    draws = torch.tensor(list(itertools.product(ninths, ninths, (0.01, 0.49, 0.51, 0.99))))
    for picture in pictures[:4]:
        padded = np.pad(picture.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
        possible = {padded[:, y:y + 32, x:x + 32][:, :, ::step].tobytes()
                    for y in range(9) for x in range(9) for step in (1, -1)}
        views = data.weak(picture.expand(len(draws), -1, -1, -1), draws=draws)
        assert Counter(view.numpy().tobytes() for view in views) == dict.fromkeys(possible, 2 * 2 * 2)


@pytest.mark.parametrize("size", [16, 28, 32, 64, 96, 224])
def test_images_of_any_size_are_augmented(size):
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    assert data.strong(images).shape == data.weak(images).shape == images.shape


def test_cutout_equals_pils_rectangle():
    """PIL draws from the truncated corner to the truncated end, both included."""
    draws = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    draws[:100] = (16 * draws[:100]).floor() / 16  # ends that fall on a pixel
    ours = data.cutout(torch.zeros(200, 3, 32, 32, dtype=torch.uint8), draws)
    for view, (side, x, y) in zip(ours, (draws.double() * torch.tensor([16, 32, 32])).tolist()):
        image = Image.new("RGB", (32, 32))
        left, top = int(max(0, x - side / 2)), int(max(0, y - side / 2))
        ImageDraw.Draw(image).rectangle((left, top, min(32, left + side), min(32, top + side)), (125, 123, 114))
        assert np.array_equal(view.permute(1, 2, 0).numpy(), np.asarray(image))


def test_strong_views_have_the_statistics_of_the_authors_transforms():
    """The shares of pixels they produce on photographs hold for any image without grey and black.

    8.2 % Cutout grey on CIFAR-10, and black only from the five geometric operations and Cutout's
    neighbours: Rotate .0, Shear 2 x ~7 %, Translate 2 x 15 %, as computed here by PIL itself.
    """
    bright = torch.full((6000, 3, 32, 32), 200, dtype=torch.uint8)
    views = data.strong(bright, torch.Generator().manual_seed(0))
    grey = (views == torch.tensor([125, 123, 114], dtype=torch.uint8).view(1, 3, 1, 1)).all(1).float().mean().item()
    assert grey == pytest.approx(0.082, abs=0.004)


def test_normalized_images_have_mean_zero_and_deviation_one(pictures):
    pixels = pictures.double() / 255
    mean, std = (t.tolist() for t in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)))
    normal = data.normalize(pictures, mean, std)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)

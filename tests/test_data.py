"""data.py: the paper's counts and splits, the loaders, and every operation against PIL."""

import itertools
import json
import math
import pickle
import types
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
from conftest import load, small_sets
from pil_operations import PIL_OPERATIONS
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


def test_counts_that_are_whole_but_for_rounding_are_whole():
    assert 243 * 243 ** (-2 / 5) < 27 and 32 * 32 ** (-2 / 5) < 8
    assert data.long_tail_counts(243, 243, 6) == [243, 81, 27, 9, 3, 1]
    assert data.long_tail_counts(32, 1 / 32, 6) == [1, 2, 4, 8, 16, 32]


def test_a_reversed_imbalance_is_the_inverse_though_its_float_is_not():
    assert 1 / (1 / 49) > 49 and data.long_tail_counts(490, 1 / 49, 10)[0] == 10


@pytest.mark.parametrize("imb_u, kl", [(100, 0.910), (1 / 100, 0.204), (1, 0.0084)])
def test_distance_of_the_true_prior_from_uniform_as_the_paper_has_it(imb_u, kl):
    union = torch.tensor(data.long_tail_counts(1500, 100, 10)) + torch.tensor(data.long_tail_counts(3000, imb_u, 10))
    assert kl_divergence(uniform(10), union / union.sum()).item() == pytest.approx(kl, abs=6e-4 if kl > 0.1 else 6e-5)


@pytest.mark.parametrize("arguments", [
    (0, 10, 10), (10, 0, 10), (10, -2, 10), (10, 10, 1), (10, math.nan, 3)])
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


def test_a_split_that_asks_too_much_names_the_class_what_there_is_and_the_options():
    with pytest.raises(ValueError, match="class 1 has 10 images, not enough for 8 labeled and 3 unlabeled; see --n1, --m1"):
        data.split(torch.arange(20) % 2, [8, 8], [2, 3], 0)
    with pytest.raises(ValueError, match=r"class 'b\\ne' would get no labeled image; see --n1, --imb"):  # one line
        data.split(torch.arange(20) % 2, [8, 0], [1, 1], 0, ["ant", "b\ne"])


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
    images, labels = data.shapes(200, 0, size=64, noise=0.0)
    bright = (images.amin(1) >= 127).float().mean((1, 2))  # the figure is above one half in all channels
    r2 = (0.8 ** 3 - 0.4 ** 3) / 3 / 0.4                   # mean of r^2 over uniform r
    for name, area in {"disc": math.pi, "square": 1.7 ** 2, "diamond": 2, "bar": 1.2}.items():
        share = bright[labels == list(data.SHAPES).index(name)].mean().item()
        assert share == pytest.approx(area * r2 / 4, rel=0.06), name


def test_the_unlabeled_set_is_the_union_with_the_labeled_one():
    sets = load("shapes", n1=30, m1=60, imb=10, shift=None, imb_u=0.1)
    labeled, unlabeled = data.long_tail_counts(30, 10, 10), data.long_tail_counts(60, 0.1, 10)
    assert torch.bincount(sets.labels).tolist() == labeled
    assert torch.bincount(sets.hidden_labels).tolist() == [a + b for a, b in zip(labeled, unlabeled)]
    pool = {image.numpy().tobytes() for image in sets.unlabeled}
    assert all(image.numpy().tobytes() in pool for image in sets.labeled)
    assert not any(image.numpy().tobytes() in pool for image in sets.test)


@pytest.fixture
def read(monkeypatch):
    """Lets a folder hold so many images of each class, of one pixel that shows its number, and some of unknown class."""
    def found(counts, *unknown):
        n = sum(counts)
        images = torch.arange(3 * n).view(n, 3, 1, 1).to(torch.uint8)
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        whole = images, labels, images[:1], labels[:1], list("abc")[:len(counts)], *unknown
        monkeypatch.setattr(data, "folder", lambda root, size: whole)
    return found


@pytest.mark.parametrize("fraction", [0.01, 0.29, 0.57, 0.58])  # 0.29 * 100 is 28.999999999999996
def test_a_labeled_fraction_labels_that_share_of_every_class_and_all_are_unlabeled(fraction, read):
    read([100, 200, 300])
    sets = load("folder", n1=None, labeled_fraction=fraction)
    assert torch.bincount(sets.labels).tolist() == [round(fraction * n) for n in (100, 200, 300)]
    assert torch.bincount(sets.hidden_labels).tolist() == [100, 200, 300]


def test_a_share_that_is_not_whole_is_cut_off_and_one_image_is_left(read):
    read([19, 20, 3])
    assert torch.bincount(load("folder", n1=None, labeled_fraction=0.1).labels).tolist() == [1, 2, 1]


def test_images_of_unknown_class_replace_drawn_ones(read):
    read([4, 5])
    assert len(load("folder", n1=2, m1=2, imb=1).unlabeled) == 2 * (2 + 2)
    read([4, 5], torch.zeros(7, 3, 1, 1, dtype=torch.uint8))
    sets = load("folder", n1=2, m1=2, imb=1)
    assert len(sets.labels) == 4 and len(sets.unlabeled) == 7 + 9 and sets.hidden_labels.tolist() == [-1] * 16


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
    sets = load("cifar10", tmp_path, n1=4, m1=2, imb=2, shift="uniform", image_size=32)
    assert sets.test.shape == (60, 3, 32, 32)
    assert np.array_equal(sets.test.numpy().reshape(60, -1), kept["test_batch"])
    assert sets.test_labels.tolist() == [j % 10 for j in range(60)] and sets.classes[3] == "class3"
    number = {image.tobytes(): j % 10 for j, image in enumerate(kept["data_batch_1"])}
    for images, labels in ((sets.labeled, sets.labels), (sets.unlabeled, sets.hidden_labels)):
        assert [number[image.numpy().tobytes()] for image in images] == labels.tolist()


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10"])
def test_a_download_that_fails_is_one_line_that_names_set_and_place(dataset, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets.utils, "urlopen", no_network, raising=False)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(ValueError, match=f"{dataset} is not whole in .*--data-dir") as error:
        load(dataset, tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def stl10_files(root, monkeypatch):
    """STL-10 in torchvision's layout, with smooth random images; the checksums are left out."""
    folder = root / "stl10_binary"
    folder.mkdir()
    random = np.random.default_rng(0)
    kept = {}
    for part, n in {"train": 40, "test": 20, "unlabeled": 30}.items():
        coarse = [Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(n)]
        kept[part] = np.stack([np.asarray(image.resize((96, 96), Image.BICUBIC)) for image in coarse])
        kept[part].transpose(0, 3, 2, 1).tofile(folder / f"{part}_X.bin")  # stored by column
        (np.arange(n) % 10 + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("0")
    monkeypatch.setattr(torchvision.datasets.STL10, "train_list", [
        ["train_X.bin", None], ["train_y.bin", None], ["unlabeled_X.bin", None]])
    monkeypatch.setattr(torchvision.datasets.STL10, "test_list", [["test_X.bin", None], ["test_y.bin", None]])
    return kept


def test_stl10_is_resized_and_its_unlabeled_images_join_all_training_images(tmp_path, monkeypatch):
    kept = stl10_files(tmp_path, monkeypatch)
    sets = load("stl10", tmp_path, n1=4, imb=4, image_size=32)
    assert sets.unlabeled.shape == (70, 3, 32, 32) and set(sets.hidden_labels.tolist()) == {-1}
    assert sets.test_labels.tolist() == [k % 10 for k in range(20)] and sets.classes == list("abcdefghij")
    assert torch.bincount(sets.labels).tolist() == data.long_tail_counts(4, 4, 10)
    pil = from_pil([Image.fromarray(image).resize((32, 32), Image.BILINEAR) for image in kept["unlabeled"]])
    assert (sets.unlabeled[:30].int() - pil.int()).abs().max() <= 1


def test_images_are_resized_a_thousand_at_a_time(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (2300, 4, 6, 3), dtype=np.uint8)
    whole = types.SimpleNamespace(data=pixels, targets=[0] * 2300, classes=["a"])
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *_, **__: whole)
    sizes = []
    resize = data.TF.resize
    monkeypatch.setattr(data.TF, "resize", lambda images, size: sizes.append(len(images)) or resize(images, size))
    images = data.published("cifar10", "place", 4)[0]
    assert images.shape == (2300, 3, 4, 4) and sizes == 2 * [1000, 1000, 300]


@pytest.mark.parametrize("dataset", ["cifar10", "stl10"])
def test_what_is_kept_holds_no_other_memory_alive(dataset, tmp_path, monkeypatch):
    files = cifar_files if dataset == "cifar10" else stl10_files
    files(tmp_path, monkeypatch)
    for part in load(dataset, tmp_path, n1=2, m1=2, imb=1)[:6]:
        assert part.untyped_storage().nbytes() == part.nbytes


# ------------------------------------------------------------------------------ place, fingerprint

def fakes_cuda():
    """Whether this torch takes fake tensors to a GPU that is not there; 2.4 asks for the driver."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return torch.zeros(1).to("cuda").is_cuda
    except (RuntimeError, AssertionError):
        return False


FAKE_CUDA = pytest.mark.skipif(not fakes_cuda(), reason="this torch has no fake CUDA without a driver")


@FAKE_CUDA
def test_a_placed_set_is_on_the_gpu_but_for_the_labels_that_metrics_need():
    sets = small_sets()
    with FakeTensorMode(allow_non_fake_inputs=True):
        placed = data.place(sets, torch.device("cuda", 0))
    devices = {name: part.device.type for name, part in placed._asdict().items() if name != "classes"}
    assert devices.pop("test_labels") == "cpu" and set(devices.values()) == {"cuda"} and len(devices) == 7


def test_a_cpu_keeps_the_tensors_that_it_has():
    placed = data.place(small_sets(), torch.device("cpu"))
    assert all(part is own for part, own in zip(placed, small_sets()))


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


# ---------------------------------------------------------------------------------- augmentation

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
def test_operation_equals_pil(name, images):
    """At 64 magnitudes over the range, its lower end included; AutoContrast may be off by one level."""
    _, low, high = data.OPERATIONS[name]
    magnitude = low + (high - low) * torch.arange(64) / 64 * 0.999
    ours = data.OPERATIONS[name][0](images.clone(), magnitude.view(-1, 1, 1, 1)).int()
    theirs = from_pil([PIL_OPERATIONS[name](to_pil(image), v.item()) for image, v in zip(images, magnitude)]).int()
    assert (ours - theirs).abs().max() <= (1 if name == "AutoContrast" else 0)


@pytest.mark.parametrize("name", ["TranslateX", "TranslateY"])
def test_translation_at_an_exact_tie_takes_one_of_the_two_neighbours(name, images):
    """Half-pixel shifts, where the nearest neighbour is not unique: PIL's view a hair to either side."""
    magnitude = torch.arange(-9, 10) / 64
    ours = data.OPERATIONS[name][0](images[:19].clone(), magnitude.view(-1, 1, 1, 1))
    for k, v in enumerate(magnitude.tolist()):
        near = [np.asarray(PIL_OPERATIONS[name](to_pil(images[k]), v + tiny)) for tiny in (-1e-4, 1e-4)]
        assert any(np.array_equal(ours[k].permute(1, 2, 0).numpy(), one) for one in near)


def test_views_never_change_their_input_and_are_the_same_for_the_same_draws(images):
    before = images.clone()
    for view, number in ((data.weak, 3), (data.strong, 12)):
        draws = torch.rand(64, number, generator=torch.Generator().manual_seed(5))
        first, again = (view(images, draws) for _ in range(2))
        assert torch.equal(first, again) and first.shape == images.shape and first.dtype == torch.uint8
    assert torch.equal(images, before)


def test_the_weak_views_are_the_crops_of_the_reflected_image_and_their_mirrors_equally_often(images):
    """All 9 x 9 x 2 of them, in PIL's padding; each belongs to an equal part of the draws."""
    ninths = [(i + part) / 9 for i in range(9) for part in (0.01, 0.99)]
    draws = torch.tensor(list(itertools.product(ninths, ninths, (0.01, 0.49, 0.51, 0.99))))
    for picture in images[:4]:
        padded = np.pad(picture.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
        possible = {padded[:, y:y + 32, x:x + 32][:, :, ::step].tobytes()
                    for y in range(9) for x in range(9) for step in (1, -1)}
        views = data.weak(picture.expand(len(draws), -1, -1, -1), draws)
        assert Counter(view.numpy().tobytes() for view in views) == dict.fromkeys(possible, 2 * 2 * 2)


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("size", [8, 16, 28, 96])
def test_batches_of_any_length_and_images_of_any_size_are_augmented(size, count):
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    draws = torch.rand(count, 12)
    assert data.strong(images, draws).shape == data.weak(images, draws[:, :3]).shape == images.shape


@FAKE_CUDA
def test_views_on_a_gpu_never_make_the_host_wait():
    """On tensors without values nothing can be read back, and nothing is copied from the host."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            out = function(*arguments, **kwargs or {})
            if function._schema.name in ("aten::_to_copy", "aten::copy_"):
                source = arguments[function._schema.name == "aten::copy_"]
                crossings.append(source.device.type != out.device.type)
            return out
    crossings = []
    with FakeTensorMode(), Watch():
        images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="cuda")
        draws = torch.empty(8, 12, device="cuda")
        views = data.strong(images, draws)
        data.weak(images, draws[:, :3])
        data.normalize(images, *torch.empty(2, 3, 1, 1, device="cuda"))
    assert views.is_cuda and views.shape == images.shape and len(crossings) and not any(crossings)


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


def test_strong_views_hold_as_much_of_cutouts_grey_as_the_authors_do():
    """8.2 % of the pixels are Cutout's grey on CIFAR-10, and so on any images that hold none of it."""
    bright = torch.full((6000, 3, 32, 32), 200, dtype=torch.uint8)
    views = data.strong(bright, torch.rand(6000, 12, generator=torch.Generator().manual_seed(0)))
    grey = (views == torch.tensor([125, 123, 114], dtype=torch.uint8).view(1, 3, 1, 1)).all(1).float().mean().item()
    assert grey == pytest.approx(0.082, abs=0.004)


def test_normalized_images_have_mean_zero_and_deviation_one(images):
    pixels = images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    normal = data.normalize(images, mean.float().view(3, 1, 1), std.float().view(3, 1, 1))
    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)

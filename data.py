"""Data: long-tailed splits, five data sets, and augmentation of whole uint8 batches.

    load     reads a data set and draws the split (paper, section 5); place moves it to the device
    batch_indices, draw    the images of a step, and the random numbers of their views
    weak, strong           the views: FixMatch's as the authors run them, with PIL's semantics
"""

import functools
import os
import sys
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF

STATISTICS = {  # mean and std of the channels; the authors' except for shapes
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar100": ((0.507058824, 0.486666667, 0.440784314), (0.267450980, 0.256470588, 0.276078431)),
    "stl10": ((0.440784314, 0.427843137, 0.386666667), (0.268235294, 0.261176471, 0.268627451)),
    "folder": ((0.4811, 0.4575, 0.4079), (0.2604, 0.2532, 0.2682))}  # ImageNet-127's
STREAMS = {"labeled": 0, "unlabeled": 1, "views": 2}  # of random numbers, apart from each other
NO_IMAGE = "no jpg, png, bmp, webp, tiff or ppm image"
Image.MAX_IMAGE_PIXELS = None  # Pillow's, at which it only warns; `square` has a limit of its own


class Data(NamedTuple):
    """A split data set. Images are uint8 (N, 3, H, W), labels int64 (N,) in 0..K-1."""
    labeled: torch.Tensor
    labels: torch.Tensor
    unlabeled: torch.Tensor       # U united with L
    hidden_labels: torch.Tensor   # of `unlabeled`, for analysis only; -1: unknown
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list                 # K names
    mean: torch.Tensor            # of pixels in [0, 1], float32 (3, 1, 1)
    std: torch.Tensor


def long_tail_counts(head, imb, num_classes):
    """Images per class, N_k = int(N_1 gamma^(-k/(K-1))); 1e-9 more against float error.

    head: N_1 >= 1; imb: gamma >= 1 falls from class 0 on, below 1 is the reversed order of 1/gamma;
    num_classes: K >= 2. Returns K ints.
    """
    gamma = max(imb, 1 / imb)
    counts = [int(head * gamma ** (-k / (num_classes - 1)) + 1e-9) for k in range(num_classes)]
    return counts if imb >= 1 else counts[::-1]


def split(labels, labeled_counts, unlabeled_counts, seed, classes=None):
    """Draw labeled images per class, then unlabeled ones from the rest, without overlap.

    labels: int64 (N,); the counts: K ints each; classes: K names, for the error. Returns two index
    tensors, ascending. ValueError when a class has too few images or no labeled one.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for k, (n, m) in enumerate(zip(labeled_counts, unlabeled_counts, strict=True)):
        index = (labels == k).nonzero().squeeze(1)
        name = repr(classes[k]) if classes else k
        if n < 1:
            raise ValueError(f"class {name} would get no labeled image; see --n1, --imb")
        if n + m > len(index):
            raise ValueError(f"class {name} has {len(index)} images, not enough for {n} labeled "
                             f"and {m} unlabeled; see --n1, --m1, --imb, --shift")
        index = index[torch.randperm(len(index), generator=generator)]
        drawn.append(index[:n + m].split([n, m]))
    return [torch.cat(parts).sort().values for parts in zip(*drawn)]


def load(config, unite=True):
    """Read a data set and draw the split. Returns Data. ValueError.

    config: train.Config. Without n1, labeled_fraction of each class is labeled, at least one image.
    In that case, or if some images are of unknown class, U is all images outside the test set.
    unite=False leaves L out of U, for experiments.
    """
    size = config.image_size
    if config.dataset == "shapes":
        read = *shapes(1000, 0, size), *shapes(200, 1, size), list(SHAPES)
    elif config.dataset == "folder":
        read = folder(config.data_dir, size)
    else:
        read = published(config.dataset, config.data_dir, size)
    images, labels, test, test_labels, classes, *unknown = read
    K = len(classes)
    unlabeled_counts = [0] * K
    if config.n1:
        labeled_counts = long_tail_counts(config.n1, config.imb, K)
        if not unknown:
            gamma_u = config.imb_u or {"consistent": config.imb, "uniform": 1,
                                       "reversed": 1 / config.imb}[config.shift]
            unlabeled_counts = long_tail_counts(config.m1, gamma_u, K)
    else:
        held = torch.bincount(labels, minlength=K).tolist()
        labeled_counts = [int(config.labeled_fraction * n + 1e-9) or 1 for n in held]
    chosen, rest = split(labels, labeled_counts, unlabeled_counts, config.seed, classes)
    in_u = torch.full((len(images),), not any(unlabeled_counts))
    in_u[rest] = True
    in_u[chosen] = unite
    unlabeled = images if in_u.all() else images[in_u]  # no copy if it is all
    if unknown:
        unlabeled = torch.cat([*unknown, unlabeled])
    hidden_labels = torch.full((len(unlabeled),), -1) if unknown else labels[in_u]
    mean, std = torch.tensor(STATISTICS[config.dataset]).view(2, 3, 1, 1)
    return Data(images[chosen], labels[chosen], unlabeled, hidden_labels, test, test_labels,
                classes, mean, std)


def prior(labels, num_classes):
    """Class frequencies of labels (N,), on the CPU: (K,), sums to 1."""
    return torch.bincount(labels, minlength=num_classes) / len(labels)


def fingerprint(sets):
    """Checksums: of the split, and of test images and class names, which no seed changes."""
    checksums = {"split": 0, "test": zlib.crc32(repr(sets.classes).encode())}
    for part, which in zip(sets, ["split"] * 4 + ["test"] * 2):
        checksums[which] = zlib.crc32(part.numpy(), checksums[which])
    return checksums


def place(sets, device):
    """Move a data set to the device, except test_labels: metrics are computed on the CPU."""
    moved = [part.to(device) if torch.is_tensor(part) else part for part in sets]
    return Data(*moved)._replace(test_labels=sets.test_labels)


@functools.lru_cache(maxsize=8)
def permutation(size, *seeds):
    """A random order of 0..size-1."""
    return np.random.default_rng(seeds).permutation(size)


def batch_indices(size, batch_size, step, seed, stream):
    """A step's part of an endless chain of permutations of 0..size-1: (batch_size,) int64."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return torch.tensor([permutation(size, seed, STREAMS[stream], place // size)[place % size]
                         for place in places]).long()


def draw(count, step, seed):
    """The random numbers of a step's views, uniform in [0, 1): (count, 15) float32."""
    columns = 3 + 3 + 6 + 3  # weak; strong: crop and flip, three operations and levels, Cutout
    generator = np.random.default_rng((seed, STREAMS["views"], step))
    return torch.from_numpy(generator.random((count, columns), np.float32))


def send(tensor, device):
    """Copy a CPU tensor to a device without making the host wait."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def published(dataset, root, size):
    """torchvision's CIFAR10, CIFAR100 or STL10, downloaded and checked unless it is there."""
    stl10 = dataset == "stl10"
    arrays = []
    try:
        for part in ("train", "test", "unlabeled") if stl10 else (True, False):
            found = getattr(datasets, dataset.upper())(root, part, download=True)
            pixels = found.data if stl10 else found.data.transpose(0, 3, 1, 2)
            chunks = torch.from_numpy(pixels).split(1000)  # STL-10 at 96x96 is 2.8 GB
            arrays.append(torch.cat([TF.resize(x.contiguous(), [size, size]) for x in chunks]))
            arrays.append(torch.tensor(found.labels if stl10 else found.targets).long())
    except Exception as error:  # whatever torchvision raises
        raise ValueError(f"{dataset} is not whole in {root} ({error}); see --data-dir")
    return *arrays[:4], found.classes, *arrays[4:5]


def folder(root, size):
    """Images in `train/<class>/*`, `test/<class>/*` and, if it is there, `unlabeled/*`."""
    wanted = f"--data-dir must hold {root}/train/<class>/* and test/<class>/*"
    places = {}
    for part in ("train", "test"):
        if not os.path.isdir(f"{root}/{part}"):
            raise ValueError(f"{wanted}: there is no folder {root}/{part}")
        names = [e.name for e in os.scandir(f"{root}/{part}") if e.is_dir() and e.name[0] != "."]
        # composed, since a Mac's archive writes a letter and its accent apart
        places[part] = sorted((unicodedata.normalize("NFC", name), name) for name in names)
    classes, others = ([name for name, _ in pairs] for pairs in places.values())
    if classes != others or len({*classes}) < max(len(classes), 2):
        raise ValueError(f"{wanted}, the same classes, two at least, each once; not so: "
                         f"{sorted({*classes} ^ {*others})[:10] or classes[:10]}")
    arrays = []
    unread = Counter()
    for part, pairs in places.items():
        files = [listing(f"{root}/{part}/{name}", unread) for _, name in pairs]
        if part == "train" and [] in files:
            raise ValueError(f"{root}/train/{classes[files.index([])]} holds {NO_IMAGE}; "
                             f"other files: {dict(unread) or 'none'}")
        arrays.append(decode(sum(files, []), size, f"{root}/{part}"))
        arrays.append(torch.tensor([k for k, paths in enumerate(files) for _ in paths]))
    if os.path.lexists(f"{root}/unlabeled"):
        arrays.append(decode(listing(f"{root}/unlabeled", unread), size, f"{root}/unlabeled"))
    if unread:
        print(f"note: in {root} not read: {dict(unread)}", file=sys.stderr)
    return *arrays[:4], classes, *arrays[4:]


def listing(root, unread):
    """Images in a folder and below but for hidden ones; unread counts other files by extension."""
    paths = []
    for entry in os.scandir(root):
        if entry.name[0] == ".":
            continue
        if entry.is_dir():
            if entry.is_symlink():  # which could loop
                raise ValueError(f"{entry.path} is a link to a folder; put the folder itself there")
            paths += listing(entry.path, unread)
        elif datasets.folder.is_image_file(entry.name):
            paths.append(entry.path)
        else:
            unread[os.path.splitext(entry.name)[1].lower()] += 1
    return sorted(paths, key=os.path.split)


def decode(paths, size, root):
    """Image files below root to uint8 (N, 3, size, size). ValueError names what is unreadable."""
    if not paths:
        raise ValueError(f"{root} holds {NO_IMAGE}")
    print(f"reading {len(paths)} images in {root!a}", flush=True)
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def one(i):
        try:
            images[i] = TF.pil_to_tensor(square(paths[i], size))
        except Exception as error:  # a decoder raises anything for a damaged file
            return f"{paths[i]!r} ({error!r})"

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        bad = []
        for start in range(0, len(paths), 256):  # in parts, so that Ctrl-C cancels the rest
            bad += filter(None, pool.map(one, range(len(paths))[start:start + 256]))
    if bad:
        raise ValueError(f"{len(bad)} unreadable images: " + "; ".join(bad[:10]))
    return images


def square(path, size):
    """An image file as RGB: upright by its EXIF, on white where transparent, the central square."""
    with Image.open(path, formats=["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"]) as image:
        if image.width * image.height > 2**26:  # decoding takes about a GB in each thread
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        shallow = ("'1'", "L;2", "L;4") if "transparency" in image.info else ()  # kept unscaled
        odd = any(bits in str(image.tile) for bits in (";16", *shallow))
        if odd or image.mode[0] in "IF" or 2 in getattr(image, "tag_v2", {}).get(339, ()):  # signed
            raise ValueError("its pixels are not of 8 bits without a sign; save them so")
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        return ImageOps.fit(image.convert("RGB"), (size, size))  # bicubic


SHAPES = {  # signed distances on the plane, negative inside; x: right, y: down, 1 is the radius
    "disc": lambda x, y: x.hypot(y) - 1,
    "ring": lambda x, y: (x.hypot(y) - 0.75).abs() - 0.25,
    "square": lambda x, y: x.abs().maximum(y.abs()) - 0.85,
    "frame": lambda x, y: (x.abs().maximum(y.abs()) - 0.65).abs() - 0.2,
    "triangle": lambda x, y: (0.87 * x.abs() + 0.5 * y).maximum(-y) - 0.5,
    "plus": lambda x, y: (x.abs().minimum(y.abs()) - 0.3).maximum(x.abs().maximum(y.abs()) - 1),
    "cross": lambda x, y: SHAPES["plus"](0.71 * (x + y), 0.71 * (x - y)),
    "diamond": lambda x, y: 0.71 * (x.abs() + y.abs() - 1),
    "crescent": lambda x, y: (x.hypot(y) - 1).maximum(0.8 - (x - 0.5).hypot(y)),
    "bar": lambda x, y: (x.abs() - 1).maximum(y.abs() - 0.3)}


def shapes(per_class, seed, size=16, noise=0.35):
    """The embedded data: ten kinds of small figures at random place, size, angle, colours, noise.

    noise: standard deviation, of 1. Returns images (10 per_class, 3, size, size) uint8 and labels.
    """
    random = torch.Generator().manual_seed(seed)
    axis = (torch.arange(size) + 0.5) * 2 / size - 1          # centres of the pixels, -1..1
    images = []
    for distance in SHAPES.values():
        draws = torch.rand(per_class, 10, 1, 1, generator=random)
        x, y, radius, angle, ground, figure = draws.split([1, 1, 1, 1, 3, 3], dim=1)
        right = axis - 0.6 * (x - 0.5)
        down = axis[:, None] - 0.6 * (y - 0.5)
        radius = 0.4 + 0.4 * radius
        angle = 0.8 * (angle - 0.5)
        x = (right * angle.cos() + down * angle.sin()) / radius
        y = (down * angle.cos() - right * angle.sin()) / radius
        cover = (0.5 - distance(x, y) * radius * size / 2).clamp(0, 1)
        image = (ground + cover * (1 + figure - ground)) / 2  # (per_class, 3, size, size)
        images.append(image + noise * torch.randn(image.shape, generator=random))
    images = (torch.cat(images) * 255).round().clamp(0, 255).to(torch.uint8)
    return images, torch.arange(len(SHAPES)).repeat_interleave(per_class)


def normalize(images, mean, std):
    """(x / 255 - mean) / std: uint8 (N, 3, H, W) to float32; mean, std: (3, 1, 1) for [0, 1]."""
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def weak(images, draws):
    """Weak view: pad an eighth by reflection, crop, flip. images: (N, 3, H, W); draws: (N, 3)."""
    vertical, horizontal, flip = draws[..., None, None, None].unbind(dim=1)       # (N, 1, 1, 1)
    size = images.shape[-1]
    pad = size // 8
    places = 2 * pad + 1
    axis = torch.arange(-pad, size - pad, device=images.device)
    rows = axis[:, None] + (vertical * places).long()                             # (N, 1, H, 1)
    columns = axis + (horizontal * places).long()                                 # (N, 1, 1, W)
    rows, columns = (size - 1 - (size - 1 - x.abs()).abs() for x in (rows, columns))  # mirrored
    return pick(images, rows, torch.where(flip < 0.5, columns.flip(3), columns))


def pick(images, rows, columns):
    """Pixels of (N, 3, H, W) at rows and columns that broadcast to (N, 1, H, W)."""
    index = (rows * images.shape[-1] + columns).flatten(2).expand(-1, 3, -1)
    return images.flatten(2).gather(2, index).view_as(images)


def affine(images, a=1, b=0, c=0, d=0, e=1, f=0):
    """Pixel (x, y) becomes that at (a x + b y + c W, d x + e y + f W), nearest, black outside.

    x and y: of the pixels' centres; coefficients: numbers or float64 (N, 1, 1, 1).
    """
    size = images.shape[-1]
    axis = torch.arange(size, dtype=torch.float64, device=images.device)

    def source(p, q, r):
        # floor(p (x + 1/2) + q (y + 1/2) + r W), as PIL counts: p, q and all that is constant
        # are rounded to whole 65536ths, and the sum loses its last 16 bits
        p, q, r = ((65536 * t + 0.5) // 1 for t in (p, q, size * r + (p + q) / 2))
        return (p * axis + q * axis[:, None] + r).long() >> 16                    # (N, 1, H, W)

    x = source(a, b, c)
    y = source(d, e, f)
    columns = x.clamp(0, size - 1)
    rows = y.clamp(0, size - 1)
    return pick(images, rows, columns) * ((rows == y) & (columns == x))


def rotate(images, degrees):
    """Turn counter-clockwise about the centre."""
    angle = torch.deg2rad(degrees.double())
    cos = angle.cos()
    sin = angle.sin()
    return affine(images, cos, -sin, (1 - cos + sin) / 2, sin, cos, (1 - cos - sin) / 2)


def blend(degenerate, images, factor):
    """PIL's Image.blend: degenerate + factor (image - degenerate), truncated; factor in [0, 1]."""
    return (degenerate + factor * (images - degenerate).float()).to(torch.uint8)


def grey(images):
    """Luma as PIL's convert("L"), (N, 1, H, W) int32."""
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


def sharpness(images, factor):
    """Blend with PIL's SMOOTH: (the 3x3 sum + 4 centres) / 13, rounded; borders stay."""
    x = images.float()
    inner = x[..., 1:-1, 1:-1]
    total = torch.nn.functional.avg_pool2d(x, 3, stride=1, divisor_override=1) + 4 * inner
    inner.copy_((total / 13).round())  # thirteenths are never halves
    return blend(x, images, factor)


OPERATIONS = {  # name: (function of images and magnitudes v (n, 1, 1, 1), lowest v, highest v)
    "AutoContrast": (lambda x, v: TF.autocontrast_image(x), 0, 1),
    "Brightness": (lambda x, v: blend(0, x, v), 0.05, 0.95),
    "Color": (lambda x, v: blend(grey(x), x, v), 0.05, 0.95),
    "Contrast": (lambda x, v: blend((grey(x).double().mean((1, 2, 3), True) + 0.5).int(), x, v),
                 0.05, 0.95),
    "Equalize": (lambda x, v: TF.equalize_image(x), 0, 1),
    "Identity": (lambda x, v: x, 0, 1),
    "Posterize": (lambda x, v: x & (256 - 2 ** (8 - v.int())).to(torch.uint8), 4, 8),
    "Sharpness": (sharpness, 0.05, 0.95),
    "Solarize": (lambda x, v: torch.where(x < v, x, 255 - x), 0, 256),
    "Rotate": (rotate, -30, 30),
    "ShearX": (lambda x, v: affine(x, b=v.double()), -0.3, 0.3),
    "ShearY": (lambda x, v: affine(x, d=v.double()), -0.3, 0.3),
    "TranslateX": (lambda x, v: affine(x, c=v.double()), -0.3, 0.3),
    "TranslateY": (lambda x, v: affine(x, f=v.double()), -0.3, 0.3)}


def random_operation(images, choice, level):
    """One of the fourteen operations for each image, at level 0..1 of its range; both (N,).

    A CPU sorts the images by operation. A GPU, whose host cannot know how many each one gets,
    applies every operation to all of them.
    """
    number = (choice * len(OPERATIONS)).long()
    level = level.view(-1, 1, 1, 1)
    if images.is_cuda or torch.compiler.is_compiling():
        views = images
        for k, (operation, low, high) in enumerate(OPERATIONS.values()):
            own = (number == k).view(-1, 1, 1, 1)
            views = torch.where(own, operation(images, low + (high - low) * level), views)
        return views
    order = number.argsort()
    sizes = torch.bincount(number, minlength=len(OPERATIONS)).tolist()
    groups = images.index_select(0, order).split(sizes)
    levels = level[order].split(sizes)
    views = [operation(group, low + (high - low) * part)
             for (operation, low, high), group, part in zip(OPERATIONS.values(), groups, levels)]
    return torch.cat(views).index_select(0, order.argsort())


def cutout(images, draws):
    """Fill a square of side U(0, 0.5) W about a uniform centre, by PIL's rule; draws: (N, 3)."""
    size = images.shape[-1]
    span, x, y = (size * draws[..., None, None, None]).unbind(dim=1)              # (N, 1, 1, 1)
    axis = torch.arange(size, device=images.device)

    def inside(axis, centre):  # of a side of span / 2
        first = (centre - span / 4).clamp(min=0).floor()
        return (axis >= first) & (axis <= first + span / 2)

    hole = (inside(axis[:, None], y) & inside(axis, x)).to(torch.uint8)           # (N, 1, H, W)
    fill = torch.cat([value * hole for value in (125, 123, 114)], dim=1)          # (N, 3, H, W)
    return images * (1 - hole) + fill  # arithmetic, which is vectorised; torch.where is not


def strong(images, draws):
    """Strong view: weak, three random operations, Cutout. images: (N, 3, H, W); draws: (N, 12)."""
    crop, operations, hole = draws.split([3, 6, 3], dim=1)
    views = weak(images, crop)
    for choice, level in operations.T.split(2):                                    # (N,) each
        views = random_operation(views, choice, level)
    return cutout(views, hole)

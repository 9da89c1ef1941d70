"""Data: long-tailed splits, five data sets, and augmentation of whole uint8 batches.

Splits follow the paper (section 5), augmentation FixMatch as the authors run it, with PIL's
semantics. Images are one uint8 tensor (N, 3, H, W); a batch is an index into it. Every random
choice of an image is one row of uniform draws: a batch is a function of (images, draws).
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF

STATISTICS = {  # mean and standard deviation of the channels, as in the authors' code
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "folder": ((0.4811, 0.4575, 0.4079), (0.2604, 0.2532, 0.2682)),  # ImageNet-127's
    "cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar100": ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
    "stl10": ((112.4 / 255, 109.1 / 255, 98.6 / 255), (68.4 / 255, 66.6 / 255, 68.5 / 255))}


class Data(NamedTuple):
    """A split data set. Images are (N, 3, H, W) uint8, labels (N,) int64 in 0..K-1."""
    labeled: torch.Tensor
    labels: torch.Tensor
    unlabeled: torch.Tensor                 # U united with L
    hidden_labels: Optional[torch.Tensor]   # of `unlabeled`, for analysis only; None = unknown
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    mean: tuple                             # of the channels, in [0, 1]
    std: tuple


def long_tail_counts(head, imb, num_classes):
    """Images per class, N_k = int(N_1 gamma^(-k/(K-1))), the last one int(N_1 / gamma).

    head: N_1 >= 1; imb: gamma >= 1 falls from class 0 on, below 1 is the reversed order of 1/gamma;
    num_classes: K >= 2. Returns K ints. ValueError outside these ranges.
    """
    if not (num_classes > 1 and head > 0 and 0 < imb < float("inf")):
        raise ValueError(f"no counts for {num_classes} classes, head {head}, imbalance {imb}")
    gamma = max(imb, 1 / imb)
    counts = [int(head * gamma ** (-k / (num_classes - 1))) for k in range(num_classes - 1)]
    counts.append(int(head / gamma + 1e-9))  # 1 / (1/50) is 50 only up to rounding
    return counts if imb >= 1 else counts[::-1]


def split(labels, labeled_counts, unlabeled_counts, seed):
    """Draw labeled images per class, then unlabeled ones from the rest, without overlap.

    labels: (N,) int64; the counts: K ints each. Returns two index tensors, ascending. Raises
    ValueError, naming a class, when it has too few images or no labeled one.
    """
    generator, labeled, unlabeled = torch.Generator().manual_seed(seed), [], []
    for k, (n, m) in enumerate(zip(labeled_counts, unlabeled_counts, strict=True)):
        index = (labels == k).nonzero().squeeze(1)
        if n < 1 or n + m > len(index):
            raise ValueError(f"class {k} has {len(index)} images, not enough for {n} (at least 1) "
                             f"labeled, {m} unlabeled; see --n1, --m1, --imb, --labeled-fraction")
        index = index[torch.randperm(len(index), generator=generator)]
        labeled.append(index[:n])
        unlabeled.append(index[n:n + m])
    return torch.cat(labeled).sort().values, torch.cat(unlabeled).sort().values


def load(dataset, data_dir="data", n1=None, m1=None, imb=1.0, imb_u=1.0, labeled_fraction=None,
         image_size=32, seed=0):
    """Load a data set and split it: `shapes`, `cifar10`, `cifar100`, `stl10` or `folder`.

    n1, m1, imb, imb_u: head counts and gammas of labeled and unlabeled set; labeled_fraction: label
    this share of every class instead, the rest is unlabeled. STL-10's unlabeled images, or those
    in a folder's `unlabeled/`, take the place of drawn ones, and all training images join them.
    """
    if dataset == "shapes":
        source = shapes(1000, 0, image_size), shapes(200, 1, image_size), list(SHAPES), None
    else:
        read = folder if dataset == "folder" else published
        source = read(dataset, Path(data_dir), image_size)
    (images, labels), test, classes, extra = source
    K, held = len(classes), torch.bincount(labels, minlength=len(classes)).tolist()
    if labeled_fraction is not None:
        labeled_counts = [int(labeled_fraction * n) for n in held]
        unlabeled_counts = [n - m for n, m in zip(held, labeled_counts)]
    else:
        labeled_counts = long_tail_counts(n1, imb, K) if n1 else held
        unlabeled_counts = long_tail_counts(m1, imb_u, K) if m1 and extra is None else [0] * K
    labeled, unlabeled = split(labels, labeled_counts, unlabeled_counts, seed)
    union = torch.cat([labeled, unlabeled]).sort().values
    everything, hidden_labels = images[union], labels[union]
    if extra is not None:
        everything, hidden_labels = torch.cat([extra, images]), None
    return Data(images[labeled], labels[labeled], everything, hidden_labels, *test, classes,
                *STATISTICS[dataset])


def published(dataset, root, size):
    """CIFAR-10/100 and STL-10 through torchvision, downloaded and checked unless already there."""
    name, parts = dataset.upper(), [{"train": True}, {"train": False}]
    if name == "STL10":
        parts = [{"split": "train"}, {"split": "test"}, {"split": "unlabeled"}]
    try:
        sets = [getattr(datasets, name)(root, download=True, **part) for part in parts]
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{dataset} is not whole in {root} and could not be downloaded ({error}); "
                         f"put torchvision's files there, or see --data-dir") from None
    loaded = []
    for part in sets:
        pixels = part.data if name == "STL10" else part.data.transpose(0, 3, 1, 2)
        chunks = torch.from_numpy(np.ascontiguousarray(pixels)).split(1000)
        labels = torch.tensor(part.labels if name == "STL10" else part.targets).long()
        loaded.append((torch.cat([TF.resize(c, [size, size]) for c in chunks]), labels))
    train, test, unlabeled = (*loaded, (None, None))[:3]
    return train, test, list(sets[0].classes), unlabeled[0]


def folder(_, root, size):
    """Images from `train/<class>/*`, `test/<class>/*` and, if it is there, `unlabeled/*`."""
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        raise ValueError(f"--data-dir {root} must hold train/<class>/* and test/<class>/*")
    train, test = (datasets.ImageFolder(root / p, allow_empty=True) for p in ("train", "test"))
    if train.classes != test.classes or len(train.classes) < 2 or not test.samples:
        odd = sorted({*train.classes} ^ {*test.classes})
        raise ValueError(f"{root}/train and {root}/test must hold the same classes, two at "
                         f"least, and images; in one of them only: {odd[:10]}")
    others = sorted(path for path in root.glob("unlabeled/**/*")
                    if datasets.folder.is_image_file(path.name))
    images = decode([path for path, _ in train.samples + test.samples] + others, size)
    parts = images.split([len(train), len(test), len(others)])
    labels = (torch.tensor(part.targets, dtype=torch.int64) for part in (train, test))
    return *zip(parts, labels), train.classes, parts[2] if others else None


def decode(paths, size):
    """Image files to (N, 3, size, size) uint8, in parallel: RGB, a central square, bicubic."""
    images, bad = np.empty((len(paths), size, size, 3), np.uint8), []

    def one(i):
        try:
            with Image.open(paths[i]) as image:
                if image.mode.startswith("I"):  # 16-bit grey: Pillow's conversion would clip
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                images[i] = ImageOps.fit(image.convert("RGB"), (size, size))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            bad.append(f"{paths[i]} ({error})")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, _ in enumerate(pool.map(one, range(len(paths)))):
            if i % 1000 == 0 and sys.stderr.isatty():
                print(f"decoding {i}/{len(paths)} images", end="\r", file=sys.stderr)
    if bad:
        raise ValueError(f"{len(bad)} unreadable images: " + "; ".join(sorted(bad)[:10]))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


SHAPES = {  # signed distances on the plane, negative inside; x, y in units of the figure's radius
    "disc": lambda x, y: x.hypot(y) - 1,
    "ring": lambda x, y: (x.hypot(y) - 0.75).abs() - 0.25,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.85,
    "frame": lambda x, y: (torch.maximum(x.abs(), y.abs()) - 0.65).abs() - 0.2,
    "triangle": lambda x, y: torch.maximum(0.87 * x.abs() + 0.5 * y, -y) - 0.5,
    "plus": lambda x, y: torch.maximum(torch.minimum(x.abs(), y.abs()) - 0.3,
                                       torch.maximum(x.abs(), y.abs()) - 1),
    "cross": lambda x, y: SHAPES["plus"](0.71 * (x + y), 0.71 * (x - y)),
    "diamond": lambda x, y: 0.71 * (x.abs() + y.abs() - 1),
    "crescent": lambda x, y: torch.maximum(x.hypot(y) - 1, 0.8 - (x - 0.5).hypot(y)),
    "bar": lambda x, y: torch.maximum(x.abs() - 1, y.abs() - 0.3)}


def shapes(per_class, seed, size=16, noise=0.35):
    """The embedded data: ten kinds of small figures at random place, size, angle, colours, noise.

    noise: standard deviation, of 1. Returns images (10 per_class, 3, size, size) uint8 and labels.
    """
    random, images = torch.Generator().manual_seed(seed), []
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    for distance in SHAPES.values():
        u = torch.rand(per_class, 10, 1, 1, generator=random)
        x, y = axis - 0.6 * (u[:, 0] - 0.5), axis[:, None] - 0.6 * (u[:, 1] - 0.5)
        radius, angle = 0.4 + 0.4 * u[:, 2], 0.8 * (u[:, 3] - 0.5)
        cos, sin = angle.cos(), angle.sin()
        x, y = (x * cos + y * sin) / radius, (y * cos - x * sin) / radius
        cover = (0.5 - distance(x, y) * radius * size / 2).clamp(0, 1)[:, None]
        image = 0.5 * u[:, 4:7] + cover * (0.5 + 0.5 * u[:, 7:10] - 0.5 * u[:, 4:7])
        images.append(image + noise * torch.randn(per_class, 3, size, size, generator=random))
    images = (torch.cat(images) * 255).round().clamp(0, 255).to(torch.uint8)
    return images, torch.arange(len(SHAPES)).repeat_interleave(per_class)


def normalize(images, mean, std):
    """uint8 images (N, 3, H, W) to float32 of mean 0 and deviation 1; mean, std: 3 in [0, 1]."""
    return TF.normalize(images.float() / 255, list(mean), list(std))


def weak(images, generator=None, draws=None):
    """Weak view of (N, 3, H, W) uint8: pad an eighth by reflection, crop, flip; draws: (N, 3)."""
    size, pad, device = images.shape[-1], images.shape[-1] // 8, images.device
    if draws is None:
        draws = torch.rand(len(images), 3, generator=generator, device=device)
    offset = (draws[:, :2] * (2 * pad + 1)).long() - pad
    rows, columns = (torch.arange(size, device=device) + o for o in offset.split(1, dim=1))
    columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)           # (N, W)
    rows, columns = (size - 1 - (size - 1 - i.abs()).abs() for i in (rows, columns))  # reflection
    return pick(images, rows[:, None, :, None], columns[:, None, None, :])


def pick(images, rows, columns):
    """Pixels of (N, 3, H, W) at rows and columns that broadcast to (N, 1, H, W)."""
    index = (rows * images.shape[-1] + columns).flatten(2).expand(-1, 3, -1)
    return images.flatten(2).gather(2, index).view_as(images)


def affine(images, a, b, c, d, e, f):
    """Pixel (x, y) becomes that at (a x + b y + c, d x + e y + f), nearest neighbour, black fill.

    Coefficients: numbers or float64 (N, 1, 1, 1). 16.16 fixed point at pixel centres, as in PIL.
    """
    def source(p, q, r):
        p, q, r = ((65536 * t + 0.5) // 1 for t in (p, q, r + (p + q) / 2))
        return ((p * x + q * x[:, None] + r) / 65536).floor().long()

    size = images.shape[-1]
    x = torch.arange(size, dtype=torch.float64, device=images.device)
    column, row = source(a, b, c), source(d, e, f)
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    return pick(images, row.clamp(0, size - 1), column.clamp(0, size - 1)) * inside


def rotate(images, degrees):
    """Turn counter-clockwise about the centre."""
    angle, centre = torch.deg2rad(degrees.double()), images.shape[-1] / 2
    cos, sin = angle.cos(), angle.sin()
    return affine(images, cos, -sin, centre * (1 - cos + sin), sin, cos, centre * (1 - cos - sin))


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
    inner, sums = x[..., 1:-1, 1:-1], x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    total = sums[..., :-2, :] + sums[..., 1:-1, :] + sums[..., 2:, :] + 4 * inner
    x[..., 1:-1, 1:-1] = (total / 13).round()  # thirteenths are never halves
    return blend(x, images, factor)


OPERATIONS = {  # name: (function of images and magnitudes v (n, 1, 1, 1), lowest v, highest v)
    "AutoContrast": (lambda x, v: TF.autocontrast(x), 0, 1),
    "Brightness": (lambda x, v: blend(torch.zeros_like(x), x, v), 0.05, 0.95),
    "Color": (lambda x, v: blend(grey(x), x, v), 0.05, 0.95),
    "Contrast": (lambda x, v: blend((grey(x).double().mean((1, 2, 3), True) + 0.5).int(), x, v),
                 0.05, 0.95),
    "Equalize": (lambda x, v: TF.equalize(x), 0, 1),
    "Identity": (lambda x, v: x, 0, 1),
    "Posterize": (lambda x, v: x & (256 - 2 ** (8 - v.int())).to(torch.uint8), 4, 8),
    "Sharpness": (sharpness, 0.05, 0.95),
    "Solarize": (lambda x, v: torch.where(x < v, x, 255 - x), 0, 256),
    "Rotate": (rotate, -30, 30),
    "ShearX": (lambda x, v: affine(x, 1, v.double(), 0, 0, 1, 0), -0.3, 0.3),
    "ShearY": (lambda x, v: affine(x, 1, 0, 0, v.double(), 1, 0), -0.3, 0.3),
    "TranslateX": (lambda x, v: affine(x, 1, 0, v.double() * x.shape[-1], 0, 1, 0), -0.3, 0.3),
    "TranslateY": (lambda x, v: affine(x, 1, 0, 0, 0, 1, v.double() * x.shape[-1]), -0.3, 0.3)}


def random_operation(images, choice, level):
    """One of the fourteen operations for each image, at level 0..1 of its range; both (N,)."""
    number = (choice * len(OPERATIONS)).long()
    spans = [(low, high - low) for _, low, high in OPERATIONS.values()]
    low, span = torch.tensor(spans, device=images.device)[number].unbind(1)
    v = (low + span * level).view(-1, 1, 1, 1)
    if images.is_cuda or torch.compiler.is_compiling():  # each for all, as it cannot ask how many
        result = images
        for k, (operation, _, _) in enumerate(OPERATIONS.values()):
            result = torch.where((number == k).view(-1, 1, 1, 1), operation(images, v), result)
        return result
    order, counts = number.argsort(), torch.bincount(number, minlength=len(OPERATIONS)).tolist()
    groups = zip(OPERATIONS.values(), images.index_select(0, order).split(counts),
                 v[order].split(counts))
    done = [operation(mine, w) for (operation, _, _), mine, w in groups if len(mine)]
    return torch.cat([images[:0], *done]).index_select(0, order.argsort())


def cutout(images, draws):
    """Fill a square of side U(0, 0.5) W about a uniform centre, by PIL's rule; draws: (N, 3)."""
    size = images.shape[-1]
    side, centre = draws[:, :1] * size / 2, draws[:, 1:] * size
    left, top = (centre - side / 2).clamp(min=0).floor().split(1, dim=1)          # (N, 1) each
    axis = torch.arange(size, device=images.device)
    column, row = (axis >= left) & (axis <= left + side), (axis >= top) & (axis <= top + side)
    hole = (row[:, None, :, None] & column[:, None, None, :]).to(torch.uint8)     # (N, 1, H, W)
    fill = torch.cat([value * hole for value in (125, 123, 114)], dim=1)          # (N, 3, H, W)
    return images * (1 - hole) + fill  # arithmetic, which is vectorised; torch.where is not


def strong(images, generator=None, draws=None):
    """Strong view of (N, 3, H, W) uint8: weak, three random operations, Cutout; draws: (N, 12)."""
    if draws is None:
        draws = torch.rand(len(images), 12, generator=generator, device=images.device)
    views = weak(images, draws=draws[:, :3])
    for first in (3, 5, 7):
        views = random_operation(views, draws[:, first], draws[:, first + 1])
    return cutout(views, draws[:, 9:])

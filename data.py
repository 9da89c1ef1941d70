"""Data: long-tailed splits, five data sets, and augmentation of whole uint8 batches.

Splits follow the paper (section 5): N_k = N_1 gamma^(-k/(K-1)). Augmentation follows FixMatch as
the authors run it: weak = pad, crop, flip; strong = weak, three of fourteen operations, Cutout,
with PIL's semantics. Images are one uint8 tensor (N, 3, H, W) and a batch is an index into it: no
Dataset, no DataLoader, no worker. Every random choice of an image is one row of uniform draws, so
an augmented batch is a pure function of (images, draws).
"""

import functools
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

STATISTICS = {  # mean and standard deviation of the channels, as in the authors' code
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
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


# ---------------------------------------------------------------------------------------- splits

def long_tail_counts(head, imb, num_classes):
    """Images per class, N_k = int(N_1 gamma^(-k/(K-1))), the last one int(N_1 / gamma).

    head: N_1, the largest class; imb: gamma >= 1 falls from class 0 on, gamma < 1 is the reversed
    order of 1/gamma; num_classes: K >= 2. Returns K ints. Raises ValueError outside these ranges.
    """
    if num_classes < 2 or head < 1 or not 0 < imb < math.inf:
        raise ValueError(f"long-tailed counts need at least 2 classes, a head of at least 1 and an "
                         f"imbalance above 0; got {num_classes}, {head} and {imb}")
    gamma = max(imb, 1 / imb)
    counts = [int(head * gamma ** (-k / (num_classes - 1))) for k in range(num_classes - 1)]
    counts.append(int(head / gamma + 1e-9))  # 1 / (1/50) is 50 only up to rounding
    return counts if imb >= 1 else counts[::-1]


def split(labels, labeled_counts, unlabeled_counts, seed):
    """Draw labeled images per class, then unlabeled ones from the rest, without overlap.

    labels: (N,) int64; the counts: K ints each; seed: another seed, another split. Returns two
    index tensors (ascending). Raises ValueError, with the class and what is left of it, when a
    class has too few images or would keep no labeled one.
    """
    generator = torch.Generator().manual_seed(seed)
    labeled, unlabeled = [], []
    for k, (n, m) in enumerate(zip(labeled_counts, unlabeled_counts, strict=True)):
        index = (labels == k).nonzero().squeeze(1)
        if n < 1:
            raise ValueError(f"class {k} would have no labeled image; raise --n1 or "
                             "--labeled-fraction, or lower --imb")
        if n + m > len(index):
            raise ValueError(f"class {k} has {len(index)} images: {n} labeled leave "
                             f"{max(len(index) - n, 0)}, but {m} unlabeled are asked for; lower "
                             "--n1 or --m1")
        index = index[torch.randperm(len(index), generator=generator)]
        labeled.append(index[:n])
        unlabeled.append(index[n:n + m])
    return torch.cat(labeled).sort().values, torch.cat(unlabeled).sort().values


def load(dataset, data_dir="data", n1=None, m1=None, imb=1.0, imb_u=1.0, labeled_fraction=None,
         image_size=32, seed=0):
    """Load a data set and split it: `shapes`, `cifar10`, `cifar100`, `stl10` or `folder`.

    n1, m1: head counts of the labeled and unlabeled set, imb, imb_u: their gammas (below 1 =
    reversed); labeled_fraction in (0, 1) takes that share of every class as labeled and the rest
    as unlabeled instead. A set of truly unlabeled images (STL-10's; `unlabeled/` in a folder)
    takes the place of the drawn one, and all training images join it. Returns Data on the CPU.
    Raises ValueError or OSError with what is wrong and what to do.
    """
    if dataset == "shapes":
        train, test = shapes(1000, 0, image_size), shapes(200, 1, image_size)
        classes, extra = list(SHAPES), None
    elif dataset == "folder":
        train, test, classes, extra = folder(Path(data_dir), image_size)
    elif dataset in STATISTICS:
        train, test, classes, extra = published(dataset, Path(data_dir), image_size)
    else:
        raise ValueError(f"data set {dataset!r} is unknown; it must be folder, "
                         f"{', '.join(STATISTICS)}")
    (images, labels), K = train, len(classes)
    if K < 2:
        raise ValueError(f"{data_dir} has one class ({classes}); training needs at least two")
    held = torch.bincount(labels, minlength=K)
    if labeled_fraction is not None:
        labeled_counts = [int(labeled_fraction * n) for n in held.tolist()]
        unlabeled_counts = [n - m for n, m in zip(held.tolist(), labeled_counts)]
    else:
        labeled_counts = long_tail_counts(n1, imb, K) if n1 else held.tolist()
        unlabeled_counts = long_tail_counts(m1, imb_u, K) if m1 and extra is None else [0] * K
    labeled, unlabeled = split(labels, labeled_counts, unlabeled_counts, seed)
    mean, std = STATISTICS.get(dataset) or channel_statistics(images)
    if extra is not None:
        everything, hidden_labels = torch.cat([extra, images]), None
    else:
        union = torch.cat([labeled, unlabeled]).sort().values
        whole = len(union) == len(images)  # then no second copy of a large set
        everything, hidden_labels = (images, labels) if whole else (images[union], labels[union])
    return Data(images[labeled], labels[labeled], everything, hidden_labels, *test, classes, mean,
                std)


def channel_statistics(images):
    """Mean and standard deviation of each channel of (N, 3, H, W) uint8, two tuples in [0, 1]."""
    counts = sum(torch.stack([torch.bincount(part[:, c].flatten().int(), minlength=256)
                              for c in range(3)]) for part in images.split(4096)).double()
    counts, levels = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = counts @ levels
    std = (counts @ levels ** 2 - mean ** 2).clamp(min=1e-4).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


# ------------------------------------------------------------------------------------- data sets

def published(dataset, root, size):
    """CIFAR-10/100 and STL-10 through torchvision: downloaded and checked unless already there."""
    name = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}[dataset]
    parts = [dict(train=True), dict(train=False)]
    if dataset == "stl10":
        parts = [dict(split="train"), dict(split="test"), dict(split="unlabeled")]
    try:
        sets = [getattr(torchvision.datasets, name)(root, download=True, **part) for part in parts]
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{dataset} is not whole in {root} and could not be downloaded ({error}); "
                         f"put torchvision's {name} files there, or name another --data-dir"
                         ) from None
    loaded = []
    for part in sets:
        images = part.data.transpose(0, 3, 1, 2) if dataset != "stl10" else part.data
        labels = part.targets if dataset != "stl10" else part.labels
        images = torch.from_numpy(np.ascontiguousarray(images))
        if images.shape[-1] != size:
            images = torch.cat([TF.resize(chunk, [size, size]) for chunk in images.split(1000)])
        loaded.append((images, torch.as_tensor(np.asarray(labels), dtype=torch.int64)))
    return loaded[0], loaded[1], list(sets[0].classes), loaded[2][0] if len(loaded) > 2 else None


def folder(root, size):
    """Images from `train/<class>/*`, `test/<class>/*` and, if it is there, `unlabeled/*`.

    Any format Pillow reads, any size; converted to RGB, cut to a central square, resized (bicubic).
    Returns (train images, labels), (test images, labels), class names, unlabeled images or None.
    """
    for part in (root, root / "train", root / "test"):
        if not part.is_dir():
            raise ValueError(f"{part} is not a directory; a folder data set is "
                             "train/<class>/* and test/<class>/* under --data-dir")
    names = [sorted(d.name for d in os.scandir(root / part) if d.is_dir() and d.name[0] != ".")
             for part in ("train", "test")]
    if names[0] != names[1] or not names[0]:
        odd = sorted(set(names[0]) ^ set(names[1]))
        raise ValueError(f"the class folders under {root}/train and {root}/test must be the same, "
                         f"and at least one; in one of them only: {', '.join(map(repr, odd[:10]))}")

    def files(directory):
        return sorted(f.path for f in os.scandir(directory) if f.is_file() and f.name[0] != ".")

    sets = []
    for part in ("train", "test"):
        listed = [files(root / part / name) for name in names[0]]
        counts = torch.tensor([len(paths) for paths in listed])
        sets.append(([path for paths in listed for path in paths],
                     torch.arange(len(listed)).repeat_interleave(counts)))
    sets.append((files(root / "unlabeled") if (root / "unlabeled").is_dir() else [], None))
    images = decode(sum((paths for paths, _ in sets), []), size)
    train, test, unlabeled = images.split([len(paths) for paths, _ in sets])
    if not len(test):
        raise ValueError(f"{root}/test has no images")
    return (train, sets[0][1]), (test, sets[1][1]), names[0], unlabeled if len(unlabeled) else None


def decode(paths, size):
    """Decode image files in parallel into one (N, 3, size, size) uint8 tensor, with progress."""
    images = np.empty((len(paths), size, size, 3), np.uint8)
    bad, start = [], time.time()

    def one(i):
        try:
            with Image.open(paths[i]) as image:
                if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip
                    image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
                image = image.convert("RGB")
            images[i] = image if image.size == (size, size) else ImageOps.fit(image, (size, size))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            bad.append(f"{paths[i]} ({error})")

    def some(first):
        for i in range(first, min(first + 256, len(paths))):
            one(i)
        return first

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in pool.map(some, range(0, len(paths), 256)):
            if sys.stderr.isatty() and first % 2048 == 0:
                print(f"\rdecoding {first}/{len(paths)} images", end="", file=sys.stderr)
    if bad:
        raise ValueError(f"{len(bad)} unreadable images: " + "; ".join(sorted(bad)[:10]))
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{clear}{len(paths)} images decoded in {time.time() - start:.1f} s", file=sys.stderr)
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


def shapes(per_class, seed, size=16, noise=0.15):
    """The embedded data: ten kinds of small figures at random place, size, angle, colours, noise.

    per_class: images of each class; seed: the images depend on it alone; noise: its standard
    deviation in [0, 1]. Returns images (10 per_class, 3, size, size) uint8 and labels.
    """
    random = torch.Generator().manual_seed(seed)
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    images = []
    for distance in SHAPES.values():
        u = torch.rand(per_class, 10, 1, 1, generator=random)
        x, y = axis - 0.6 * (u[:, 0] - 0.5), axis[:, None] - 0.6 * (u[:, 1] - 0.5)
        radius, angle = 0.4 + 0.4 * u[:, 2], 0.8 * (u[:, 3] - 0.5)
        cos, sin = angle.cos(), angle.sin()
        x, y = (x * cos + y * sin) / radius, (y * cos - x * sin) / radius
        cover = (0.5 - distance(x, y) * radius * size / 2).clamp(0, 1)[:, None]
        image = 0.5 * u[:, 4:7] + cover * (0.5 + 0.5 * u[:, 7:10] - 0.5 * u[:, 4:7])
        images.append(image + noise * torch.randn(per_class, 3, size, size, generator=random))
    labels = torch.arange(len(SHAPES)).repeat_interleave(per_class)
    return (torch.cat(images) * 255).round().clamp(0, 255).to(torch.uint8), labels


# ---------------------------------------------------------------------------------- augmentation

def normalize(images, mean, std):
    """uint8 images (N, 3, H, W) to float32 of mean 0 and deviation 1; mean, std: 3 in [0, 1]."""
    parts = [(channel.float() / 255 - m) / d for channel, m, d in zip(images.unbind(1), mean, std)]
    return torch.stack(parts, dim=1)


def weak(images, generator=None, draws=None):
    """Weak view: pad an eighth by reflection, crop back at random, flip with probability 1/2.

    images: (N, 3, H, W) uint8; draws: (N, 3) uniform in [0, 1), taken from `generator` when not
    given. Returns a new tensor of the same shape.
    """
    size, pad, device = images.shape[-1], images.shape[-1] // 8, images.device
    if draws is None:
        draws = torch.rand(len(images), 3, generator=generator, device=device)
    offset = (draws[:, :2] * (2 * pad + 1)).long() - pad
    rows, columns = (torch.arange(size, device=device) + o for o in offset.split(1, dim=1))
    columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)           # (N, W)
    rows, columns = (size - 1 - (size - 1 - i.abs()).abs() for i in (rows, columns))  # reflection
    return pick(images, rows[:, :, None] * size + columns[:, None, :])


def pick(images, index):
    """Pixels of (N, 3, H, W) at flat positions index (N, H, W), the same for the three channels."""
    index = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, index).view_as(images)


def affine(images, matrix):
    """Pixel (x, y) becomes that at (a x + b y + c, d x + e y + f), nearest neighbour, black fill.

    matrix: (N, 6) float64 of a..f. In 16.16 fixed point at pixel centres, as PIL's Image.transform.
    """
    size, device = images.shape[-1], images.device
    a, b, c = matrix.view(-1, 2, 1, 1, 3).unbind(4)                            # (N, 2, 1, 1) each
    a, b, c = ((65536 * t + 0.5).floor().int() for t in (a, b, c + (a + b) / 2))
    axis = torch.arange(size, dtype=torch.int32, device=device)
    source = (a * axis + b * axis[:, None] + c) >> 16                             # (N, 2, H, W)
    nearest = source.clamp(0, size - 1)
    (column, row), (beside, above) = nearest.unbind(1), (source != nearest).unbind(1)
    return pick(images, (row * size + column).long()) * ~(beside | above)[:, None]


def identity_but(place, v):
    """Affine matrices of the identity, (1, 0, 0, 0, 1, 0), but for v (N,) at one place."""
    matrix = torch.eye(2, 3, dtype=torch.float64, device=v.device).flatten().repeat(len(v), 1)
    matrix[:, place] = v
    return matrix


def rotation(v, size):
    """Affine matrices that turn by v degrees, counter-clockwise about the centre."""
    angle, centre = torch.deg2rad(v.double()), size / 2
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, centre * (1 - cos + sin),
                        sin, cos, centre * (1 - cos - sin)], dim=1)


def blend(degenerate, images, factor):
    """PIL's Image.blend: degenerate + factor (image - degenerate), truncated; factor in [0, 1]."""
    return (degenerate + factor.view(-1, 1, 1, 1) * (images - degenerate).float()).to(torch.uint8)


def grey(images):
    """Luma as PIL's convert("L"), (N, 1, H, W) int32."""
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


def contrast(images, factor):
    """Blend with the rounded mean luma."""
    return blend((grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).int(), images, factor)


def sharpness(images, factor):
    """Blend with PIL's SMOOTH: (the 3x3 sum + 4 centres) / 13, rounded; borders stay."""
    x = images.float()
    inner, sums = x[..., 1:-1, 1:-1], x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    total = sums[..., :-2, :] + sums[..., 1:-1, :] + sums[..., 2:, :] + 4 * inner
    x[..., 1:-1, 1:-1] = (total / 13).round()  # thirteenths are never halves
    return blend(x, images, factor)


def solarize(images, threshold):
    """Invert what is at or above the threshold."""
    return torch.where(images < threshold.view(-1, 1, 1, 1), images, 255 - images)


def posterize(images, bits):
    """Keep the top bits, 4 to 8, truncated to an integer."""
    return images & (256 - 2 ** (8 - bits.int())).to(torch.uint8).view(-1, 1, 1, 1)


COLOUR = {  # name: (function of images and their magnitudes, lowest, highest magnitude)
    "AutoContrast": (lambda images, _: TF.autocontrast(images), 0, 1),
    "Brightness": (lambda images, v: blend(torch.zeros_like(images), images, v), 0.05, 0.95),
    "Color": (lambda images, v: blend(grey(images), images, v), 0.05, 0.95),
    "Contrast": (contrast, 0.05, 0.95),
    "Equalize": (lambda images, _: TF.equalize(images), 0, 1),
    "Identity": (lambda images, _: images, 0, 1),
    "Posterize": (posterize, 4, 8),
    "Sharpness": (sharpness, 0.05, 0.95),
    "Solarize": (solarize, 0, 256)}
GEOMETRY = {  # name: (matrices from magnitudes and the image size, lowest, highest magnitude)
    "Rotate": (rotation, -30, 30),
    "ShearX": (lambda v, size: identity_but(1, v), -0.3, 0.3),
    "ShearY": (lambda v, size: identity_but(3, v), -0.3, 0.3),
    "TranslateX": (lambda v, size: identity_but(2, v.double() * size), -0.3, 0.3),
    "TranslateY": (lambda v, size: identity_but(5, v.double() * size), -0.3, 0.3)}


def random_operation(images, choice, level):
    """One of the fourteen operations for each image, at level 0..1 of its range.

    choice, level: (N,) in [0, 1). On the CPU the images are sorted by operation and each is
    computed for its own. A GPU computes each for all and then chooses: the sizes of the groups
    would have to be read back, and so every step is the same sequence of kernels.
    """
    size, colours, geometry = images.shape[-1], COLOUR.values(), GEOMETRY.values()
    choice = (choice * (len(colours) + len(geometry))).long()
    if images.is_cuda or torch.compiler.is_compiling():
        for k, (operation, low, high) in enumerate(colours):
            done = operation(images, low + (high - low) * level)
            images = torch.where((choice == k).view(-1, 1, 1, 1), done, images)
        matrices = identity_but(0, torch.ones_like(level))
        for k, (matrix, low, high) in enumerate(geometry, len(colours)):
            turned = matrix(low + (high - low) * level, size)
            matrices = torch.where((choice == k)[:, None], turned, matrices)
        return affine(images, matrices)
    spans = torch.tensor([(low, high - low) for _, low, high in (*colours, *geometry)])[choice]
    order = choice.argsort(stable=True)
    counts = torch.bincount(choice, minlength=len(colours) + len(geometry)).tolist()
    magnitudes = (spans[:, 0] + spans[:, 1] * level)[order].split(counts)
    parts = images.index_select(0, order).split(
        counts[:len(colours)] + [sum(counts[len(colours):])])
    done = [operation(part, v) if len(part) else part
            for part, v, (operation, _, _) in zip(parts, magnitudes, colours)]
    matrices = [matrix(v, size) for v, (matrix, _, _) in zip(magnitudes[len(colours):], geometry)]
    done = torch.cat(done + [affine(parts[-1], torch.cat(matrices))])
    return done.index_select(0, order.argsort())


def cutout(images, draws):
    """Fill a square of side U(0, 0.5) W about a uniform centre with (125, 123, 114), as PIL does.

    draws: (N, 3). Truncated corners and inclusive ends, as in the authors' code.
    """
    size = images.shape[-1]
    side, x, y = (draws[:, :1] * size / 2, *(draws[:, 1:] * size).split(1, dim=1))  # (N, 1) each
    left, top = (x - side / 2).clamp(min=0).floor(), (y - side / 2).clamp(min=0).floor()
    axis = torch.arange(size, device=images.device)
    column, row = (axis >= left) & (axis <= left + side), (axis >= top) & (axis <= top + side)
    hole = (row[:, None, :, None] & column[:, None, None, :]).to(torch.uint8)     # (N, 1, H, W)
    fill = torch.cat([value * hole for value in (125, 123, 114)], dim=1)          # (N, 3, H, W)
    return images * (1 - hole) + fill  # arithmetic, which is vectorised; torch.where is not


def strong(images, generator=None, draws=None):
    """Strong view: weak, three random operations of random magnitudes, Cutout.

    images: (N, 3, H, W) uint8; draws: (N, 12) uniform in [0, 1): 3 for weak, an operation and a
    magnitude for each of 3 rounds, 3 for Cutout. Returns a new tensor of the same shape.
    """
    if draws is None:
        draws = torch.rand(len(images), 12, generator=generator, device=images.device)
    views = weak(images, draws=draws[:, :3])
    for first in (3, 5, 7):
        views = random_operation(views, draws[:, first], draws[:, first + 1])
    return cutout(views, draws[:, 9:])


# --------------------------------------------------------------------------------------- batches

@functools.lru_cache(maxsize=8)
def permutation(size, *seeds):
    """A random order of 0..size-1, a function of its arguments."""
    return np.random.default_rng(seeds).permutation(size)


def batch_indices(size, batch_size, step, *seeds):
    """The indices of a step's batch: its place in an endless chain of permutations of 0..size-1.

    A function of its arguments alone. Every image comes once an epoch; a batch larger than the set
    runs on into the next permutation. Returns (batch_size,) int64.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64)] + [
        permutation(size, *seeds, epoch)[max(first - epoch * size, 0):last - epoch * size]
        for epoch in range(first // size, (last - 1) // size + 1)]))


def place(sets, device, room):
    """Data with each part on the device while there is room (bytes), else in pinned host memory."""
    placed = {}
    for name in ("labels", "hidden_labels", "labeled", "unlabeled", "test"):
        tensor = getattr(sets, name)
        if tensor is not None and tensor.nbytes <= room:
            placed[name], room = tensor.to(device), room - tensor.nbytes
        elif tensor is not None and torch.cuda.is_available():
            placed[name] = tensor.pin_memory()
    return sets._replace(**placed)


def gather(tensor, index, device):
    """Rows of a tensor, wherever it lives, on the device. None stays None."""
    if tensor is None:
        return None
    index = index.to(tensor.device, non_blocking=True)
    rows = tensor.index_select(0, index)  # tensor[index] would go byte by byte
    return rows.to(device, non_blocking=True)

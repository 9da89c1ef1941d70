"""Data: long-tailed splits, five data sets, and augmentation of whole uint8 batches.

Splits follow the paper (section 5), augmentation FixMatch as the authors run it, with PIL's
semantics. Images are one uint8 tensor (N, 3, H, W); a batch is an index into it. All random
numbers of an image are one row of uniform draws: a batch is a function of (images, draws).
"""

import glob
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF

STATISTICS = {  # mean and std of the channels; but for shapes, as in the authors' code
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar100": ((0.507058824, 0.486666667, 0.440784314), (0.267450980, 0.256470588, 0.276078431)),
    "stl10": ((0.440784314, 0.427843137, 0.386666667), (0.268235294, 0.261176471, 0.268627451)),
    "folder": ((0.4811, 0.4575, 0.4079), (0.2604, 0.2532, 0.2682))}  # ImageNet-127's


class Source(NamedTuple):
    """A data set before the split. Images are uint8 (N, 3, H, W), labels int64 (N,) in 0..K-1."""
    images: torch.Tensor
    labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list                 # K names
    extra: torch.Tensor = None    # unlabeled images of unknown class, or None


class Data(NamedTuple):
    """A split data set, as above; mean and std: float32 (3, 1, 1), of pixels in [0, 1]."""
    labeled: torch.Tensor
    labels: torch.Tensor
    unlabeled: torch.Tensor       # U united with L
    hidden_labels: torch.Tensor   # of `unlabeled`, for analysis only; None = unknown
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    mean: torch.Tensor
    std: torch.Tensor


def long_tail_counts(head, imb, num_classes):
    """Images per class, N_k = int(N_1 gamma^(-k/(K-1))); 1e-9 more against float error.

    head: N_1 >= 1; imb: gamma >= 1 falls from class 0 on, below 1 is the reversed order of 1/gamma;
    num_classes: K >= 2. Returns K ints. ValueError outside these ranges.
    """
    if not (num_classes > 1 and head > 0 and imb > 0):
        raise ValueError(f"no counts for {num_classes} classes, head {head}, imbalance {imb}")
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
        if n < 1 or n + m > len(index):
            raise ValueError(f"class {classes[k] if classes else k} has {len(index)} images, not "
                             f"enough for {n} (at least 1) labeled, {m} unlabeled; see --n1, --m1, "
                             "--imb, --labeled-fraction")
        index = index[torch.randperm(len(index), generator=generator)]
        drawn.append(index[:n + m].split([n, m]))
    return [torch.cat(parts).sort().values for parts in zip(*drawn)]


def cut(source, n1, m1, imb, imb_u, labeled_fraction, seed):
    """Choose the labeled and the unlabeled images: two index tensors of source.images.

    n1, m1, imb, imb_u: head counts and gammas of the two sets. Without n1, this labeled_fraction of
    every class is labeled (None: all of it) and the rest is not.
    """
    K = len(source.classes)
    if n1:
        labeled_counts = long_tail_counts(n1, imb, K)
        unlabeled_counts = [0] * K
        if m1 and source.extra is None:
            unlabeled_counts = long_tail_counts(m1, imb_u, K)
    else:
        held = torch.bincount(source.labels, minlength=K).tolist()
        labeled_counts = [int((labeled_fraction or 1) * n + 1e-9) for n in held]
        unlabeled_counts = [n - m for n, m in zip(held, labeled_counts)]
    return split(source.labels, labeled_counts, unlabeled_counts, seed, source.classes)


def load(dataset, data_dir="data", n1=None, m1=None, imb=1.0, imb_u=1.0, labeled_fraction=None,
         image_size=32, seed=0):
    """Read a data set, cut it, unite U with L; arguments as of `read` and `cut`. Returns Data."""
    source = read(dataset, data_dir, image_size)
    labeled, unlabeled = cut(source, n1, m1, imb, imb_u, labeled_fraction, seed)
    return gather(dataset, source, labeled, torch.cat([labeled, unlabeled]).sort().values)


def gather(dataset, source, labeled, unlabeled):
    """Data from the chosen images of a Source, two index tensors.

    Where a Source has images of unknown class (STL-10's, or those in a folder's `unlabeled/`), the
    unlabeled set is these and all its other training images, and hidden_labels is None.
    """
    pool = source.images[unlabeled]
    hidden_labels = source.labels[unlabeled]
    if source.extra is not None:
        pool = torch.cat([source.extra, source.images])
        hidden_labels = None
    mean, std = torch.tensor(STATISTICS[dataset]).view(2, 3, 1, 1)
    return Data(source.images[labeled], source.labels[labeled], pool, hidden_labels,
                source.test, source.test_labels, source.classes, mean, std)


def place(sets, device):
    """Move a data set to the device, but for test_labels: metrics are computed on the CPU."""
    moved = {name: part.to(device) for name, part in sets._asdict().items()
             if torch.is_tensor(part) and name != "test_labels"}
    return sets._replace(**moved)


def fingerprint(sets):
    """What tells a data set from another: class names, counts, a checksum of pixels and labels."""
    checksum = 0
    for part in filter(torch.is_tensor, sets):
        checksum = zlib.crc32(part.contiguous().numpy(), checksum)
    return {"classes": sets.classes, "labeled": len(sets.labeled),
            "unlabeled": len(sets.unlabeled), "test": len(sets.test), "checksum": checksum}


def read(dataset, data_dir="data", image_size=32):
    """Read `shapes`, `cifar10`, `cifar100`, `stl10` or `folder`: a Source. Raises ValueError."""
    if dataset == "shapes":
        return Source(*shapes(1000, 0, image_size), *shapes(200, 1, image_size), list(SHAPES))
    faults = OSError if dataset == "folder" else (OSError, EOFError, RuntimeError)  # torchvision's
    try:
        if dataset == "folder":
            return folder(data_dir, image_size)
        if dataset == "stl10":
            return stl10(data_dir, image_size)
        return cifar(getattr(datasets, dataset.upper()), data_dir, image_size)
    except faults as error:
        raise ValueError(f"{dataset} is not whole in {data_dir} ({error}); put its files there, or "
                         "see --data-dir") from None


def cifar(kind, root, size):
    """torchvision's CIFAR10 or CIFAR100, downloaded and checked unless it is there already."""
    arrays = []
    for train in (True, False):
        part = kind(root, train, download=True)
        arrays += [resize(part.data.transpose(0, 3, 1, 2), size), torch.tensor(part.targets)]
    return Source(*arrays, part.classes)


def stl10(root, size):
    """STL-10, downloaded and checked likewise. Its unlabeled images are of unknown class."""
    arrays = []
    for name in ("train", "test", "unlabeled"):
        part = datasets.STL10(root, name, download=True)
        arrays += [resize(part.data, size), torch.tensor(part.labels).long()]
    return Source(*arrays[:4], part.classes, arrays[4])


def resize(pixels, size):
    """Array (N, 3, H, W) to tensor (N, 3, size, size), in chunks: STL-10 at 96x96 is 2.8 GB."""
    chunks = torch.from_numpy(pixels).split(1000)
    return torch.cat([TF.resize(chunk.contiguous(), [size, size]) for chunk in chunks])


def folder(root, size):
    """Images in `train/<class>/*`, `test/<class>/*` and, if it is there, `unlabeled/*`."""
    classes, others = (sorted(name[:-1] for name in glob.glob("*/", root_dir=f"{root}/{part}"))
                       for part in ("train", "test"))
    if classes != others or len(classes) < 2:
        raise ValueError(f"--data-dir must hold {root}/train/<class>/* and test/<class>/*, the "
                         "same classes, two at least; in one of them only: "
                         f"{sorted({*classes} ^ {*others})[:10]}")
    arrays = []
    for part in ("train", "test"):
        found = [listing(f"{root}/{part}/{name}") for name in classes]
        paths = [path for one_class in found for path in one_class]
        labels = [k for k, one_class in enumerate(found) for _ in one_class]
        arrays += [decode(paths, size, f"{root}/{part}"), torch.tensor(labels)]
    extra = None
    if os.path.lexists(f"{root}/unlabeled"):
        extra = decode(listing(f"{root}/unlabeled"), size, f"{root}/unlabeled")
    return Source(*arrays, classes, extra)


def listing(root):
    """Images in a folder and below, by folder and name. ValueError for a link that could loop."""
    paths = []
    for entry in os.scandir(root):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.is_symlink():
                raise ValueError(f"{entry.path} is a link to a folder; put the folder itself there")
            paths += listing(entry.path)
        elif datasets.folder.is_image_file(entry.name):
            paths.append(entry.path)
    return sorted(paths, key=os.path.split)


def decode(paths, size, root):
    """Image files below root to uint8 (N, 3, size, size). ValueError names what is unreadable."""
    if not paths:
        raise ValueError(f"{root} holds no jpg, png, bmp, webp, tiff or ppm image")
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def one(i):
        try:
            images[i] = TF.pil_to_tensor(square(paths[i], size))
        except Exception as error:  # a decoder raises anything for a damaged file
            return f"{paths[i]} ({error!r})"

    bad = []
    begun = shown = time.monotonic()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, len(paths), 256):
            done = min(start + 256, len(paths))
            bad += filter(None, pool.map(one, range(start, done)))  # Ctrl-C cancels the rest
            now = time.monotonic()
            if now - shown > 10:
                shown = now
                left = (now - begun) * (len(paths) / done - 1)
                print(f"{root}: {done} of {len(paths)} images, {left:.0f} s left", file=sys.stderr)
    if bad:
        raise ValueError(f"{len(bad)} unreadable images: " + "; ".join(bad[:10]))
    return images


def square(path, size):
    """One image file as RGB: turned as its EXIF says, on white where transparent, central square.

    16-bit grey keeps its high byte. Raises whatever Pillow raises; ValueError for 32-bit pixels.
    """
    if not os.path.isfile(path):
        raise ValueError("not a regular file")
    with Image.open(path, formats=["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"]) as image:
        if f"{image.format} {image.mode}" in ("TIFF I", "TIFF F", "PPM F"):
            raise ValueError("pixels of 32 bits have no known range; save 8 or 16")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            image = image.convert("I").point(lambda value: value / 256)  # convert alone would clip
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
    return (images.float() / 255 - mean) / std


def weak(images, draws):
    """Weak view: pad an eighth by reflection, crop, flip. images: (N, 3, H, W); draws: (N, 3)."""
    vertical, horizontal, flip = draws[..., None, None, None].unbind(dim=1)       # (N, 1, 1, 1)
    size = images.shape[-1]
    pad = size // 8
    axis = torch.arange(size, device=images.device)
    # the pixel at each place of the padded axis: 4 3 2 1 0 1 2 3 4 5 ...
    padded = torch.nn.functional.pad(axis.float()[None], (pad, pad), mode="reflect")[0].long()
    rows = padded[axis[:, None] + (vertical * (2 * pad + 1)).long()]              # (N, 1, H, 1)
    columns = padded[axis + (horizontal * (2 * pad + 1)).long()]                  # (N, 1, 1, W)
    return pick(images, rows, torch.where(flip < 0.5, columns.flip(3), columns))


def pick(images, rows, columns):
    """Pixels of (N, 3, H, W) at rows and columns that broadcast to (N, 1, H, W)."""
    index = (rows * images.shape[-1] + columns).flatten(2).expand(-1, 3, -1)
    return images.flatten(2).gather(2, index).view_as(images)


def affine(images, a=1, b=0, c=0, d=0, e=1, f=0):
    """Pixel (x, y) becomes that at (a x + b y + c W, d x + e y + f W), nearest, black outside.

    Coefficients: numbers or float64 (N, 1, 1, 1). 16.16 fixed point at pixel centres, as in PIL.
    """
    size = images.shape[-1]
    axis = torch.arange(size, dtype=torch.float64, device=images.device)

    def source(p, q, r):
        p, q, r = ((65536 * t + 0.5) // 1 for t in (p, q, size * r + (p + q) / 2))
        return (p * axis + q * axis[:, None] + r).long() >> 16                    # (N, 1, H, W)

    column = source(a, b, c)
    row = source(d, e, f)
    columns = column.clamp(0, size - 1)
    rows = row.clamp(0, size - 1)
    return pick(images, rows, columns) * ((rows == row) & (columns == column))


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
    rows = x + x.roll(1, 2) + x.roll(-1, 2)
    total = rows + rows.roll(1, 3) + rows.roll(-1, 3) + 4 * x
    x[..., 1:-1, 1:-1] = (total / 13).round()[..., 1:-1, 1:-1]  # thirteenths are never halves
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
    """One of the fourteen operations for each image, at level 0..1 of its range; both (N,)."""
    number = (choice * len(OPERATIONS)).long()
    level = level.view(-1, 1, 1, 1)
    if images.is_cuda or torch.compiler.is_compiling():
        return each_for_all(images, number, level)
    return each_for_its_group(images, number, level)


def each_for_its_group(images, number, level):
    """Sort the images by operation, apply each to its own, and sort them back. Fast on a CPU."""
    order = number.argsort()
    sizes = torch.bincount(number, minlength=len(OPERATIONS)).tolist()
    groups = images.index_select(0, order).split(sizes)
    levels = level[order].split(sizes)
    views = [operation(group, low + (high - low) * part)
             for (operation, low, high), group, part in zip(OPERATIONS.values(), groups, levels)]
    return torch.cat(views).index_select(0, order.argsort())


def each_for_all(images, number, level):
    """Apply each operation to all images, keep its own: no size of a group has to be known."""
    result = images
    for k, (operation, low, high) in enumerate(OPERATIONS.values()):
        views = operation(images, low + (high - low) * level)
        result = torch.where((number == k).view(-1, 1, 1, 1), views, result)
    return result


def cutout(images, draws):
    """Fill a square of side U(0, 0.5) W about a uniform centre, by PIL's rule; draws: (N, 3)."""
    size = images.shape[-1]
    span, x, y = (size * draws[..., None, None, None]).unbind(dim=1)              # (N, 1, 1, 1)
    side = span / 2
    axis = torch.arange(size, device=images.device)

    def inside(axis, centre):
        first = (centre - side / 2).clamp(min=0).floor()
        return (axis >= first) & (axis <= first + side)

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

"""Views against PIL from end to end, to the last pixel: crop and flip, three of fourteen operations, Cutout."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import adapter
import data
from pil_operations import PIL_OPERATIONS

RANGES = {  # the paper's, in the order in which a draw from 0 to 1 chooses, in fourteen equal parts
    "AutoContrast": (0, 1), "Brightness": (0.05, 0.95), "Color": (0.05, 0.95), "Contrast": (0.05, 0.95),
    "Equalize": (0, 1), "Identity": (0, 1), "Posterize": (4, 8), "Sharpness": (0.05, 0.95), "Solarize": (0, 256),
    "Rotate": (-30, 30), "ShearX": (-0.3, 0.3), "ShearY": (-0.3, 0.3), "TranslateX": (-0.3, 0.3),
    "TranslateY": (-0.3, 0.3)}
NAMES = list(RANGES)
MOVES = {"Identity", "Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}  # they change no colour but to black
GREY = 125, 123, 114


@pytest.fixture(params=["eager", "compiled"])
def form(request, monkeypatch):
    """Both ways of computing the views."""
    if request.param == "compiled":
        adapter.as_compiled(monkeypatch)


def weak_by_pil(image, vertical, horizontal, flip):
    """image: (3, W, W) uint8, as drawn by three numbers from 0 to 1. Returns an image of PIL's."""
    size = image.shape[-1]
    pad = size // 8
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)), mode="reflect").transpose(1, 2, 0)
    top, left = int(vertical * (2 * pad + 1)), int(horizontal * (2 * pad + 1))
    view = Image.fromarray(padded).crop((left, top, left + size, top + size))
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip < 0.5 else view


def strong_by_pil(image, draws):
    """draws: (12,), of crop and flip, operation and level three times, Cutout's side and centre."""
    view = weak_by_pil(image, *draws[:3].tolist())
    for choice, level in draws[3:9].view(3, 2):
        name = NAMES[int(14 * choice)]
        low, high = RANGES[name]
        view = PIL_OPERATIONS[name](view, (low + (high - low) * level).item())
    size = image.shape[-1]
    side, x, y = (size * draws[9:].double() * torch.tensor([0.5, 1, 1])).tolist()
    left, top = int(max(0, x - side / 2)), int(max(0, y - side / 2))
    ImageDraw.Draw(view).rectangle((left, top, min(size, left + side), min(size, top + side)), GREY)
    return view


def operations(draws):
    """Names of the three operations of each image."""
    return [[NAMES[int(14 * choice)] for choice in row] for row in draws[:, 3:9:2].tolist()]


@pytest.fixture(scope="module")
def drawn():
    """Draws of 448 strong views, each operation in each of the three places.

    AutoContrast may be a level apart from PIL's. What comes after it is a movement here: that adds nothing to it.
    """
    draws = torch.rand(448, 12, generator=torch.Generator().manual_seed(11))
    number = torch.arange(448)
    places = torch.stack([number % 14, (number // 14 + 3 * number) % 14, (number // 14 + 5 * number + 1) % 14], dim=1)
    moves = [NAMES.index(name) for name in sorted(MOVES)]
    for i, row in enumerate(places.tolist()):
        if 0 in row:
            first = row.index(0)
            places[i, first + 1:] = torch.tensor([moves[(i + k) % 6] for k in range(2 - first)], dtype=torch.int64)
    draws[:, 3:9:2] = (places + draws[:, 3:9:2]) / 14
    assert all({names[place] for names in operations(draws)} == set(NAMES) for place in range(3))
    return draws


def apart(views, expected):
    """The largest difference of each image from PIL's: (N,)."""
    wanted = torch.from_numpy(np.stack([np.asarray(view) for view in expected])).permute(0, 3, 1, 2)
    return (views.int() - wanted.int()).abs().amax(dim=(1, 2, 3))


def test_a_strong_view_is_crop_and_flip_three_operations_and_cutout_by_pil(images, drawn, form):
    images = images.repeat(7, 1, 1, 1)
    views = data.strong(images.clone(), drawn)
    expected = [strong_by_pil(image, row) for image, row in zip(images, drawn)]
    allowed = torch.tensor(["AutoContrast" in names for names in operations(drawn)]).int()
    assert (apart(views, expected) <= allowed).all()


def test_a_weak_view_is_crop_and_flip_by_pil(images):
    draws = torch.rand(64, 3, generator=torch.Generator().manual_seed(12))
    expected = [weak_by_pil(image, *row) for image, row in zip(images, draws.tolist())]
    assert not apart(data.weak(images, draws), expected).any()


@pytest.mark.parametrize("size", [8, 28])
def test_views_of_another_size_are_pils_too(size, images, drawn, form):
    """The padding, the shifts and the square are shares of the side."""
    images = images[:, :, :size, 32 - size:].contiguous()
    draws = drawn[:64]
    expected = [strong_by_pil(image, row) for image, row in zip(images, draws)]
    allowed = torch.tensor(["AutoContrast" in names for names in operations(draws)]).int()
    assert (apart(data.strong(images, draws), expected) <= allowed).all()

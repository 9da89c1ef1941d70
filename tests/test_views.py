"""Views against PIL, to the last pixel: crop and flip, fourteen operations, Cutout, each and from end to end."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

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
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


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
    return cutout_by_pil(view, draws[9:])


def cutout_by_pil(image, draws):
    """draws: (3,), of side and centre. PIL draws from the truncated corner to the truncated end, both included."""
    size = image.size[0]
    side, x, y = (size * draws.double() * torch.tensor([0.5, 1, 1])).tolist()
    left, top = int(max(0, x - side / 2)), int(max(0, y - side / 2))
    ImageDraw.Draw(image).rectangle((left, top, min(size, left + side), min(size, top + side)), GREY)
    return image


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


@pytest.mark.parametrize("size, count", [(32, 448), (28, 64), (8, 64)])
def test_a_strong_view_is_crop_and_flip_three_operations_and_cutout_by_pil(size, count, images, drawn, form):
    """The padding, the shifts and the square are shares of the side."""
    images = images[:, :, :size, 32 - size:].repeat(count // 64, 1, 1, 1)
    draws = drawn[:count]
    expected = [strong_by_pil(image, row) for image, row in zip(images, draws)]
    allowed = torch.tensor(["AutoContrast" in names for names in operations(draws)]).int()
    assert (apart(data.strong(images, draws), expected) <= allowed).all()


def test_a_weak_view_is_crop_and_flip_by_pil(images):
    draws = torch.rand(64, 3, generator=torch.Generator().manual_seed(12))
    expected = [weak_by_pil(image, *row) for image, row in zip(images, draws.tolist())]
    assert not apart(data.weak(images, draws), expected).any()


# ------------------------------------------------------------------------------------------ part by part

@pytest.mark.parametrize("name", NAMES)
def test_operation_equals_pil(name, images):
    """At 64 magnitudes over the range, its lower end included; AutoContrast may be off by one level."""
    function, low, high = data.OPERATIONS[name]
    assert (low, high) == RANGES[name]
    magnitude = low + (high - low) * torch.arange(64) / 64 * 0.999
    expected = [PIL_OPERATIONS[name](to_pil(image), v) for image, v in zip(images, magnitude.tolist())]
    found = function(images.clone(), magnitude.view(-1, 1, 1, 1))
    assert (apart(found, expected) <= (name == "AutoContrast")).all()


@pytest.mark.parametrize("name", ["TranslateX", "TranslateY"])
def test_translation_at_an_exact_tie_takes_one_of_the_two_neighbours(name, images):
    """Half-pixel shifts, where the nearest neighbour is not unique: PIL's view a hair to either side."""
    magnitude = torch.arange(-9, 10) / 64
    found = data.OPERATIONS[name][0](images[:19].clone(), magnitude.view(-1, 1, 1, 1))
    before, after = ([PIL_OPERATIONS[name](to_pil(image), v + tiny) for image, v in zip(images, magnitude.tolist())]
                     for tiny in (-1e-4, 1e-4))
    assert not torch.minimum(apart(found, before), apart(found, after)).any()


def test_cutout_equals_pils_rectangle():
    draws = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    draws[:100] = (16 * draws[:100]).floor() / 16  # ends that fall on a pixel
    found = data.cutout(torch.zeros(200, 3, 32, 32, dtype=torch.uint8), draws)
    assert not apart(found, [cutout_by_pil(Image.new("RGB", (32, 32)), row) for row in draws]).any()


def test_views_never_change_their_input_and_are_the_same_for_the_same_draws(images):
    before = images.clone()
    for view, number in ((data.weak, 3), (data.strong, 12)):
        draws = torch.rand(64, number, generator=torch.Generator().manual_seed(5))
        first, again = (view(images, draws) for _ in range(2))
        assert torch.equal(first, again) and first.shape == images.shape and first.dtype == torch.uint8
    assert torch.equal(images, before)


def test_batches_of_any_length_are_augmented():
    for count in (0, 1, 5):
        images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
        draws = torch.rand(count, 12)
        assert data.strong(images, draws).shape == data.weak(images, draws[:, :3]).shape == images.shape


def test_strong_views_hold_as_much_of_cutouts_grey_as_the_authors_do():
    """8.2 % of the pixels are Cutout's grey on CIFAR-10, and so on any images that hold none of it."""
    bright = torch.full((6000, 3, 32, 32), 200, dtype=torch.uint8)
    views = data.strong(bright, torch.rand(6000, 12, generator=torch.Generator().manual_seed(0)))
    grey = (views == torch.tensor(GREY, dtype=torch.uint8).view(1, 3, 1, 1)).all(1).float().mean().item()
    assert grey == pytest.approx(0.082, abs=0.004)


def test_normalized_images_have_mean_zero_and_deviation_one(images):
    pixels = images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    normal = data.normalize(images, mean.float().view(3, 1, 1), std.float().view(3, 1, 1))
    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)

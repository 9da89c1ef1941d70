"""data.py: reading a folder of images, the good, the odd and the damaged. What is expected is PIL's."""

import io
import os
import re
import signal
import struct
import unicodedata
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import coloured_classes, load

LINKS = pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")


def noise(seed, width=16, height=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def put(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def root(tmp_path):
    """A good folder of two classes: train and test with one image each, unlike each other."""
    for i, part in enumerate(("train/ant", "train/bee", "test/ant", "test/bee")):
        put(noise(i), tmp_path / part / "first.png")
    return tmp_path


def pixels(image):
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def read(path, size=16):
    """The only image that a list of one path gives, as an array (3, size, size)."""
    return data.decode([str(path)], size, path.parent)[0].numpy()


def as_file(image, form, **options):
    """The bytes of an image file."""
    whole = io.BytesIO()
    image.save(whole, form, **options)
    return whole.getvalue()


HALF = dict(n1=None, labeled_fraction=0.5)


def error_of(root):
    with pytest.raises((ValueError, OSError)) as error:
        load("folder", root, **HALF)
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------- what is found

def test_images_come_by_name_and_then_those_of_subfolders_by_name(root):
    names = ["b/1.png", "z.png", "a/2.png", "b/c/0.png", "k.png"]
    for i, name in enumerate(names):
        put(noise(20 + i), root / "train" / "bee" / name)
    order = ["first.png", "k.png", "z.png", "a/2.png", "b/1.png", "b/c/0.png"]
    expected = [pixels(Image.open(root / "train" / "bee" / name)) for name in order]
    sets = load("folder", root, **HALF)  # all training images are unlabeled, half of them labeled
    assert sets.classes == ["ant", "bee"]
    assert sets.hidden_labels.tolist() == [0] + 6 * [1] and sets.test_labels.tolist() == [0, 1]
    assert np.array_equal(sets.unlabeled[1:], expected)
    assert np.array_equal(sets.test, [pixels(noise(2)), pixels(noise(3))])


def test_images_without_labels_join_and_leave_no_hidden_labels(tmp_path):
    coloured_classes(tmp_path, {"train": 40, "test": 1})
    for i in range(7):
        put(Image.new("RGB", (16, 16), (i, i, i)), tmp_path / "unlabeled" / "deep" / f"{i}.png")
    sets = load("folder", tmp_path, **HALF)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in sets[:6])  # no other memory is kept alive
    assert len(sets.unlabeled) == 127 and set(sets.hidden_labels.tolist()) == {-1} and len(sets.labels) == 60
    assert sets.unlabeled[:7, 0, 0, 0].tolist() == list(range(7))
    by_counts = load("folder", tmp_path, n1=20, m1=10**6, imb=4)  # M1 draws nothing: the 127 are U
    assert torch.equal(by_counts.unlabeled, sets.unlabeled) and torch.bincount(by_counts.labels).tolist() == [20, 10, 5]


def test_hidden_folders_are_no_classes_and_hidden_files_no_images(root):
    for part in ("train", "test", "unlabeled"):
        put(noise(30), root / part / ".ipynb_checkpoints" / "first-checkpoint.png")
    put(noise(32), root / "train" / "ant" / ".ipynb_checkpoints" / "first-checkpoint.png")
    (root / "train" / "ant" / "._first.png").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    (root / "train" / "ant" / "Thumbs.db").write_bytes(b"no image")
    put(noise(33), root / "unlabeled" / "seen.png")
    sets = load("folder", root, **HALF)
    assert sets.classes == ["ant", "bee"] and len(sets.unlabeled) == 2 + 1


def test_an_unlabeled_or_a_test_without_an_image_is_an_error(root):
    (root / "unlabeled").write_bytes(b"")
    assert "unlabeled" in error_of(root)
    (root / "unlabeled").unlink()
    for name in ("one.gif", ".hidden.png"):
        put(noise(5), root / "unlabeled" / name)
    assert "unlabeled holds no jpg, png, bmp, webp, tiff or ppm image" in error_of(root)
    for name in ("ant", "bee"):
        (root / "test" / name / "first.png").unlink()
    assert "test holds no jpg" in error_of(root)


def test_files_of_a_kind_that_is_not_read_are_one_line_with_their_number_and_extensions(root, capsys):
    for name in ("train/ant/1.HEIC", "train/ant/2.heic", "train/bee/deep/3.heic", "test/ant/moving.gif"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    load("folder", root, **HALF)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(root) in line
    assert re.search(r"\.heic\W+3\b", line) and re.search(r"\.gif\W+1\b", line)


def test_a_class_of_nothing_else_is_an_error_that_speaks_of_those_files_and_of_no_option(root):
    (root / "train" / "bee" / "first.png").rename(root / "train" / "bee" / "first.avif")
    message = error_of(root)
    assert f"{root}/train/bee" in message and ".avif" in message and "--" not in message


def test_a_name_composed_in_one_part_and_decomposed_in_the_other_is_one_class(root):
    """As after a Mac's archive."""
    for part, form in (("train", "NFC"), ("test", "NFD")):
        (root / part / "bee").rename(root / part / unicodedata.normalize(form, "m\u00fccke"))
    sets = load("folder", root, **HALF)
    assert sets.classes == ["ant", "m\u00fccke"] and sets.test_labels.tolist() == [0, 1]
    put(noise(0), root / "train" / unicodedata.normalize("NFD", "m\u00fccke") / "first.png")  # of the same name
    assert "each once" in error_of(root)


# ------------------------------------------------------------------------- links and special files

@LINKS
def test_the_parts_the_classes_and_the_images_may_be_links(root, tmp_path_factory):
    linked = tmp_path_factory.mktemp("linked")
    (linked / "train").symlink_to(root / "train")
    (linked / "test" / "ant").mkdir(parents=True)
    for name in ("bee", "ant/first.png"):
        (linked / "test" / name).symlink_to(root / "test" / name)
    assert data.fingerprint(load("folder", linked, **HALF)) == data.fingerprint(load("folder", root, **HALF))


@LINKS
@pytest.mark.parametrize("place, target", [
    ("train/ant/loop", "train"), ("test/bee/other", "test/ant"), ("unlabeled/deep/er/loop", "unlabeled/deep")])
def test_a_linked_folder_below_is_refused_by_name_so_that_no_loop_multiplies_images(root, place, target):
    put(noise(5), root / "unlabeled" / "deep" / "seen.png")
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).symlink_to(root / target, target_is_directory=True)
    message = error_of(root)
    assert str(root / place) in message and "link" in message


@LINKS
def test_a_link_to_itself_and_a_broken_link_are_errors_by_name(root):
    for name, target in (("gone.png", "nowhere.png"), ("self.png", "train/ant/self.png")):
        (root / "train" / "ant" / name).symlink_to(root / target)
        assert name in error_of(root)


# -------------------------------------------------------------------------------- formats and modes

def test_each_extension_of_the_readme_is_an_image(root):
    for suffix in ("jpg", "JPEG", "png", "bmp", "webp", "tif", "tiff", "ppm"):
        noise(1).save(root / "train" / "ant" / f"image.{suffix}")
    assert len(load("folder", root, **HALF).unlabeled) == 2 + 8


@pytest.mark.parametrize("width, height", [(40, 20), (20, 40), (5, 7), (16, 1)])
def test_images_are_cut_to_the_central_square_and_resized_as_pil_does(tmp_path, width, height):
    noise(2, width, height).save(tmp_path / "image.png")
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    expected = noise(2, width, height).resize((16, 16), Image.BICUBIC, (left, top, left + side, top + side))
    assert np.array_equal(read(tmp_path / "image.png"), pixels(expected))


def tiff(bits, *tags, photometric=1):
    """A grey TIFF of 16x16 random pixels, uncompressed; tags: further (number, value)."""
    width = 2 if bits > 8 else 1
    strip = np.random.default_rng(0).integers(0, 2 ** min(bits, 15), 256).astype(f"<u{width}").tobytes()
    tags = sorted([(256, 16), (257, 16), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 16),
                   (279, len(strip)), *tags])
    entries = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


def png(bits, lines, transparent, width=16, height=16, colour=0):
    """A PNG of these packed lines, which are bytes; transparent: the level that is; colour: 0 grey, 2 RGB."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
            + chunk(b"tRNS", struct.pack(">H", transparent) * (1 + colour))
            + chunk(b"IDAT", zlib.compress(b"".join(lines))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [8193, 13_300])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(root, side):
    """Without a limit it would be the pixels that are missing."""
    (root / "train" / "ant" / "vast.png").write_bytes(png(8, [], 0, side, side))
    with warnings.catch_warnings(record=True) as told:
        message = error_of(root)
    assert "vast.png" in message and f"{side} x {side} pixels" in message and not told


UNDO = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270}  # by EXIF's table: how a camera stores an upright picture under each orientation


def by_pil(image, form, **options):
    """An image file, and what PIL makes of it."""
    content = as_file(image, form, **options)
    return content, pixels(Image.open(io.BytesIO(content)))


def turned(form, orientation, **options):
    """The file of a picture that a camera has turned, and the upright picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = noise(4).transpose(UNDO[orientation])
    return as_file(stored, form, exif=exif, **options), pixels(noise(4))


def with_exif(exif):
    """A file whose EXIF is damaged, and what PIL makes of it without."""
    options = {"form": "JPEG", "quality": 95}
    return as_file(noise(6), exif=exif, **options), by_pil(noise(6), **options)[1]


def palette(transparent):
    """A file with a single colour of its palette, entry 1."""
    image = Image.new("P", (16, 16), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    return as_file(image, "PNG", transparency=transparent)


GREY = np.random.default_rng(0).integers(0, 256, (16, 16)).astype(np.uint8)
STRIPES = png(8, [b"\0" + b"\0\1" * 8] * 16, 0), png(8, [b"\0" + b"\0\1" * 8] * 16, 1)

READ = {  # a file, and what is to be seen: (3, 16, 16) or what broadcasts to it
    **{form: by_pil(noise(1), form) for form in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")},
    **{f"mode {mode}": by_pil(noise(3).convert(mode), "TIFF") for mode in ("1", "L", "P", "CMYK")},
    "TIFF, zero is black": (tiff(8), GREY), "TIFF, zero is white": (tiff(8, photometric=0), 255 - GREY),
    "transparent 0": (STRIPES[0], [255, 1] * 8), "transparent 1": (STRIPES[1], [0, 255] * 8),
    "grey and clear": (as_file(Image.fromarray(np.full((16, 16, 2), (40, 0), np.uint8)), "PNG"), 255),
    "palette, clear": (palette(1), 255), "palette, another clear": (palette(0), np.array([40, 50, 60])[:, None, None]),
    **{f"{form}, orientation {number}": turned(form, number, **({"lossless": True} if form == "WEBP" else {}))
       for form in ("PNG", "WEBP", "TIFF") for number in UNDO},
    **{f"EXIF {exif}": with_exif(exif) for exif in (
        b"Exif\0\0", b"Exif\0\0MM\0*\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"no exif at all")}}


@pytest.mark.parametrize("what", READ)
@pytest.mark.filterwarnings("ignore")
def test_a_picture_is_read_as_its_format_has_it_upright_and_on_white(tmp_path, what):
    content, expected = READ[what]
    (tmp_path / "image.jpg").write_bytes(content)  # the name does not say the format
    found = read(tmp_path / "image.jpg")
    assert np.array_equal(found, np.broadcast_to(expected, found.shape))


def test_half_transparent_pixels_are_laid_on_white(tmp_path):
    rgba = np.random.default_rng(1).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    rgba[:4, :, 3] = 0
    rgba[4:8, :, 3] = 255
    put(Image.fromarray(rgba), tmp_path / "image.png")
    ours = read(tmp_path / "image.png").transpose(1, 2, 0)
    alpha = rgba[..., 3:].astype(float) / 255
    exact = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(ours - exact).max() <= 1
    assert (ours[:4] == 255).all() and np.array_equal(ours[4:8], rgba[4:8, :, :3])


# ------------------------------------------------------------------------------------ damaged files

def of_type(form, dtype):
    return as_file(Image.fromarray(np.full((16, 16), 100, dtype)), form)


DEEP = {"12-bit TIFF": tiff(12), "16-bit TIFF": tiff(16), "WhiteIsZero": tiff(16, photometric=0),
        "signed TIFF": tiff(8, (339, 2)), "32-bit TIFF": of_type("TIFF", np.int32),
        "16-bit colour PNG": png(16, [b"\0" + bytes(96)] * 16, 0, colour=2),
        "float TIFF": of_type("TIFF", np.float32), "16-bit PNG": of_type("PNG", np.uint16),
        "16-bit PPM": b"P5 16 16 65535\n" + bytes(512), "12-bit PPM": b"P5 16 16 4095\n" + bytes(512),
        **{f"transparent {bits}-bit PNG": png(bits, [b"\0" + bytes(2 * bits)] * 16, 1) for bits in (1, 2, 4)}}

CUT = (b"", as_file(noise(1), "GIF"), b"DDS |\0\0\0" + bytes(200), b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n",
       b"II*\0\x08\0\0\0\xff\xff", b"BM" + bytes(60), b"P6 9999999999 1 255\n", b"P6 2 2 255\n")


@pytest.mark.parametrize("content, reason", [
    *(pytest.param(content, "8 bits", id=kind) for kind, content in DEEP.items()), *((content, "") for content in CUT)])
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_is_no_whole_image_of_8_bits_without_a_sign_is_one_line_that_names_it(root, content, reason):
    (root / "train" / "ant" / "odd.jpg").write_bytes(content)
    message = error_of(root)
    assert "1 unreadable image" in message and "odd.jpg" in message and reason in message


@pytest.mark.parametrize("kind", [KeyError, MemoryError])
def test_whatever_a_decoder_raises_is_a_line_that_names_the_file(root, monkeypatch, kind):
    def broken(path, size):
        raise kind("first line\nsecond line")
    monkeypatch.setattr(data, "square", broken)
    message = error_of(root)
    assert "first.png" in message and kind.__name__ in message


def test_unreadable_images_are_named_together_up_to_ten(root):
    whole = (root / "train" / "ant" / "first.png").read_bytes()
    for i in range(12):
        (root / "train" / "ant" / f"bad{i:02}.png").write_bytes(whole[:len(whole) // 2] if i % 2 else b"")
    message = error_of(root)
    assert "12 unreadable images" in message
    assert re.findall(r"bad(\d\d)\.png. \(", message) == [f"{i:02}" for i in range(10)]


# ------------------------------------------------------------------------ what is said, interruption

def test_a_line_says_before_the_decoding_how_many_images_there_are_and_where(root, capsys):
    put(noise(9), root / "train" / "bee" / "second.png")
    load("folder", root, **HALF)
    assert capsys.readouterr() == (f"reading 3 images in '{root}/train'\nreading 2 images in '{root}/test'\n", "")


def test_ctrl_c_ends_the_decoding_at_the_latest_with_the_part_that_has_begun(monkeypatch, sigint):
    begun = []

    def square(path, size):
        begun.append(path)
        if len(begun) == 200:
            signal.raise_signal(signal.SIGINT)
        return Image.new("RGB", (size, size))
    monkeypatch.setattr(data, "square", square)
    with pytest.raises(KeyboardInterrupt):
        data.decode(["x"] * 100_000, 1, "photos")
    assert len(begun) <= 256

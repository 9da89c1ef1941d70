"""data.py: reading a folder of images, the good, the odd and the damaged. What is expected is PIL's."""

import io
import os
import re
import signal
import subprocess
import threading

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps

import data

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


def read_one(path, size=16):
    """The only image that a list of one path gives, as an array (3, size, size)."""
    return data.decode([str(path)], size, path.parent)[0].numpy()


def error_of(root, **options):
    with pytest.raises(ValueError) as error:
        data.load("folder", root, **{"n1": 1, "image_size": 16, **options})
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------- what is found

def test_a_folder_keeps_pixels_labels_and_names_and_has_the_statistics_of_imagenet_127(root):
    put(noise(9), root / "train" / "bee" / "second.png")
    sets = data.load("folder", root, n1=1, m1=None, image_size=16)
    assert sets.classes == ["ant", "bee"] and sets.test_labels.tolist() == [0, 1]
    assert all(np.array_equal(image, pixels(noise(seed))) for image, seed in zip(sets.test, (2, 3)))
    assert torch.equal(sets.mean.flatten(), torch.tensor([.4811, .4575, .4079]))
    assert torch.equal(sets.std.flatten(), torch.tensor([.2604, .2532, .2682]))


def test_images_come_by_name_and_then_those_of_subfolders_by_name(root):
    names = ["b/1.png", "z.png", "a/2.png", "b/c/0.png", "k.png"]
    for i, name in enumerate(names):
        put(noise(20 + i), root / "train" / "bee" / name)
    source = data.read("folder", root, 16)
    order = ["first.png", "k.png", "z.png", "a/2.png", "b/1.png", "b/c/0.png"]
    expected = [pixels(Image.open(root / "train" / "bee" / name)) for name in order]
    assert source.labels.tolist() == [0] + 6 * [1]
    assert all(np.array_equal(image, wanted) for image, wanted in zip(source.images[1:], expected))


def test_images_without_labels_join_and_leave_no_hidden_labels(image_folder, tmp_path):
    for part in ("train", "test"):
        for path in sorted((image_folder / part).glob("*/*")):
            put(Image.open(path), tmp_path / path.relative_to(image_folder))
    for i in range(7):
        put(Image.new("RGB", (16, 16), (i, i, i)), tmp_path / "unlabeled" / "deep" / f"{i}.png")
    sets = data.load("folder", tmp_path, labeled_fraction=0.5, image_size=16)
    assert len(sets.unlabeled) == 127 and sets.hidden_labels is None and len(sets.labels) == 60
    assert sets.unlabeled[:7, 0, 0, 0].tolist() == list(range(7))
    cut = data.load("folder", tmp_path, n1=20, m1=10**6, imb=4, image_size=16)  # M1 draws nothing: the 127 are U
    assert torch.equal(cut.unlabeled, sets.unlabeled) and torch.bincount(cut.labels).tolist() == [20, 10, 5]


def test_hidden_folders_are_no_classes_and_hidden_files_no_images(root):
    for part in ("train", "test", "unlabeled"):
        put(noise(30), root / part / ".ipynb_checkpoints" / "first-checkpoint.png")
    put(noise(32), root / "train" / "ant" / ".ipynb_checkpoints" / "first-checkpoint.png")
    (root / "train" / "ant" / "._first.png").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    (root / "train" / "ant" / "Thumbs.db").write_bytes(b"no image")
    put(noise(33), root / "unlabeled" / "seen.png")
    source = data.read("folder", root, 16)
    assert source.classes == ["ant", "bee"] and len(source.images) == 2 and len(source.extra) == 1


@pytest.mark.parametrize("files", [[], ["one.gif"], ["one.jfif", "two.txt"], [".hidden.png"]])
def test_an_unlabeled_folder_without_an_image_is_an_error(root, files):
    (root / "unlabeled").mkdir()
    for name in files:
        (root / "unlabeled" / name).write_bytes(b"")
    assert re.search("unlabeled holds no jpg, png, bmp, webp, tiff or ppm image", error_of(root))


def test_an_unlabeled_that_is_a_file_is_an_error(root):
    (root / "unlabeled").write_bytes(b"")
    assert "unlabeled" in error_of(root)


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_missing_part_is_an_error_that_says_what_there_must_be(root, missing):
    (root / missing).rename(root / "elsewhere")
    message = error_of(root)
    assert str(root) in message and "train/<class>/* and test/<class>/*" in message


def test_classes_that_differ_are_named(root):
    put(noise(0), root / "train" / "cat" / "first.png")
    put(noise(0), root / "test" / "dog" / "first.png")
    assert "['cat', 'dog']" in error_of(root)


def test_one_class_is_too_few(tmp_path):
    for part in ("train", "test"):
        put(noise(0), tmp_path / part / "ant" / "first.png")
    assert "two at least" in error_of(tmp_path)


def test_a_test_folder_without_images_and_a_class_without_training_images_are_errors(root):
    (root / "train" / "bee" / "first.png").rename(root / "train" / "bee" / "first.gif")
    assert "class bee has 0 images" in error_of(root)
    for name in ("ant", "bee"):
        (root / "test" / name / "first.png").unlink()
    assert re.search("test holds no .* image", error_of(root))


# ------------------------------------------------------------------------- links and special files

@LINKS
def test_the_parts_and_the_classes_may_be_links_to_folders(root, tmp_path_factory):
    linked = tmp_path_factory.mktemp("linked")
    (linked / "train").symlink_to(root / "train")
    (linked / "test").mkdir()
    for name in ("ant", "bee"):
        (linked / "test" / name).symlink_to(root / "test" / name)
    ours, theirs = data.read("folder", linked, 16), data.read("folder", root, 16)
    assert ours.classes == theirs.classes
    assert torch.equal(ours.images, theirs.images) and torch.equal(ours.test, theirs.test)


@LINKS
@pytest.mark.parametrize("place, target", [
    ("train/ant/loop", "train/ant"), ("train/ant/loop", "train"), ("train/ant/loop", ""),
    ("test/bee/other", "test/ant"), ("unlabeled/loop", "unlabeled"), ("unlabeled/linked", "train/ant"),
    ("unlabeled/deep/er/loop", "unlabeled/deep")])
def test_a_linked_folder_below_is_refused_by_name_so_that_no_loop_multiplies_images(root, place, target):
    put(noise(5), root / "unlabeled" / "deep" / "seen.png")
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).symlink_to(root / target, target_is_directory=True)
    message = error_of(root)
    assert str(root / place) in message and "link" in message


@LINKS
def test_a_link_to_itself_and_a_broken_link_are_errors_by_name(root):
    (root / "train" / "ant" / "gone.png").symlink_to(root / "nowhere.png")
    assert "gone.png" in error_of(root)
    (root / "train" / "ant" / "self.png").symlink_to(root / "train" / "ant" / "self.png")
    assert "self.png" in error_of(root)


@LINKS
def test_a_linked_image_is_read(root):
    (root / "train" / "ant" / "again.png").symlink_to(root / "train" / "bee" / "first.png")
    images = data.read("folder", root, 16).images
    assert torch.equal(images[0], images[2]) and len(images) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_a_fifo_is_named_and_never_opened(root):
    pipe = root / "train" / "ant" / "pipe.png"
    os.mkfifo(pipe)
    rescue = threading.Timer(10, lambda: os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)))
    rescue.start()  # whoever opens it nevertheless fails instead of waiting for ever
    message = error_of(root)
    rescue.cancel()
    assert "1 unreadable" in message and "pipe.png" in message and "not a regular file" in message


# -------------------------------------------------------------------------------- formats and modes

@pytest.mark.parametrize("suffix, form", [
    ("jpg", "JPEG"), ("JPEG", "JPEG"), ("png", "PNG"), ("bmp", "BMP"), ("webp", "WEBP"), ("tif", "TIFF"),
    ("tiff", "TIFF"), ("ppm", "PPM"), ("jpg", "PNG")])
def test_each_format_of_the_readme_is_read_as_pil_reads_it(tmp_path, suffix, form):
    path = tmp_path / f"image.{suffix}"
    noise(1).save(path, form)
    with Image.open(path) as image:
        assert np.array_equal(read_one(path), pixels(image))


@pytest.mark.parametrize("width, height", [(40, 20), (20, 40), (5, 7), (16, 1)])
def test_images_are_cut_to_the_central_square_and_resized_as_pil_does(tmp_path, width, height):
    noise(2, width, height).save(tmp_path / "image.png")
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    expected = noise(2, width, height).resize((16, 16), Image.BICUBIC, (left, top, left + side, top + side))
    assert np.array_equal(read_one(tmp_path / "image.png"), pixels(expected))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_images_without_transparency_are_read_as_pil_converts_them(tmp_path, mode):
    noise(3).convert(mode).save(tmp_path / "image.tiff")
    assert np.array_equal(read_one(tmp_path / "image.tiff"), pixels(noise(3).convert(mode).convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tiff", "ppm"])
def test_grey_of_16_bits_keeps_its_high_byte(tmp_path, suffix):
    grey = np.random.default_rng(0).integers(0, 2**16, (16, 16), dtype=np.uint16)
    path = tmp_path / f"image.{suffix}"
    if suffix == "ppm":
        path.write_bytes(b"P5 16 16 65535\n" + grey.astype(">u2").tobytes())
    else:
        Image.fromarray(grey).save(path)
    assert np.array_equal(read_one(path), np.stack([grey // 256] * 3))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_32_bits_are_refused_by_name(root, dtype):
    Image.fromarray(np.full((16, 16), 100, dtype)).save(root / "train" / "ant" / "wide.tiff")
    message = error_of(root)
    assert "wide.tiff" in message and "32 bits" in message


UNDO = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270}  # by EXIF's table: how a camera stores an upright picture under each orientation


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", UNDO)
def test_a_picture_stands_upright_whatever_its_exif_orientation(tmp_path, orientation, suffix):
    upright = noise(4)
    stored = upright if orientation == 1 else upright.transpose(UNDO[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"image.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read_one(tmp_path / f"image.{suffix}"), pixels(upright))


def test_an_upright_jpeg_is_the_same_with_and_without_exif_and_a_tall_one_is_cut_after_it_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = noise(5, 24, 16)
    tall.save(tmp_path / "turned.png", exif=exif)
    expected = ImageOps.fit(tall.transpose(Image.Transpose.ROTATE_270), (16, 16))
    assert np.array_equal(read_one(tmp_path / "turned.png"), pixels(expected))


@pytest.mark.parametrize("exif", [
    b"Exif\0\0", b"Exif\0\0MM\0*\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"no exif at all"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_leaves_the_picture_as_it_is(tmp_path, exif):
    noise(6).save(tmp_path / "image.jpg", exif=exif, quality=95)
    noise(6).save(tmp_path / "plain.jpg", quality=95)
    assert np.array_equal(read_one(tmp_path / "image.jpg"), read_one(tmp_path / "plain.jpg"))


def test_transparent_pixels_are_laid_on_white(tmp_path):
    rgba = np.random.default_rng(1).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    rgba[:4, :, 3] = 0
    rgba[4:8, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "image.png")
    ours = read_one(tmp_path / "image.png").transpose(1, 2, 0)
    alpha = rgba[..., 3:].astype(float) / 255
    exact = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(ours - exact).max() <= 1
    assert (ours[:4] == 255).all() and np.array_equal(ours[4:8], rgba[4:8, :, :3])


def test_transparency_of_grey_and_palette_images_is_laid_on_white_too(tmp_path):
    Image.fromarray(np.full((16, 16, 2), (40, 0), np.uint8)).save(tmp_path / "grey.png")
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png", transparency=1)
    palette.save(tmp_path / "opaque.png", transparency=0)
    assert (read_one(tmp_path / "grey.png") == 255).all() and (read_one(tmp_path / "palette.png") == 255).all()
    assert read_one(tmp_path / "opaque.png")[:, 3, 3].tolist() == [40, 50, 60]


# ------------------------------------------------------------------------------------ damaged files

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


def test_a_postscript_file_named_jpg_never_starts_ghostscript(root, monkeypatch):
    def started(*_, **__):
        raise AssertionError("a program was started")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    monkeypatch.setattr(subprocess, "Popen", started)
    (root / "train" / "ant" / "script.jpg").write_bytes(EPS)
    assert Image.open(io.BytesIO(EPS)).format == "EPS"  # Pillow itself would take it
    message = error_of(root)
    assert "script.jpg" in message and "started" not in message


@pytest.mark.parametrize("start", [
    b"", b"DDS |\0\0\0" + bytes(200), b"\0\0\0\x1cftypavif" + bytes(100), b"GIF89a" + bytes(30),
    b"8BPS\0\1" + bytes(30), b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0\x08\0\0\0\xff\xff", b"BM" + bytes(60),
    b"RIFF\0\0\0\0WEBPVP8 ", b"P6 9999999999 1 255\n", b"P6 1000000 1000000 255\n", b"P6 2 2 255\n", b"\0" * 100])
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_is_no_whole_image_is_one_line_that_names_it(root, start):
    (root / "train" / "ant" / "damaged.jpg").write_bytes(start)
    message = error_of(root)
    assert "1 unreadable image" in message and "damaged.jpg" in message


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"])
@pytest.mark.filterwarnings("ignore")
def test_any_damage_to_a_file_is_read_or_reported(tmp_path, form):
    whole = io.BytesIO()
    noise(7).save(whole, form, **({"compression": "tiff_lzw"} if form == "TIFF" else {}))
    random = np.random.default_rng(2)
    paths = []
    for i in range(80):
        bytes_ = bytearray(whole.getvalue())
        for _ in range(1 + i % 4):
            bytes_[random.integers(min(len(bytes_), 200 if i % 2 else len(bytes_)))] = random.integers(256)
        paths.append(str(tmp_path / f"{i:02}.jpg"))
        (tmp_path / f"{i:02}.jpg").write_bytes(bytes_[:random.integers(len(bytes_))] if i % 3 == 0 else bytes_)
    try:
        assert data.decode(paths, 16, tmp_path).shape == (80, 3, 16, 16)
    except ValueError as error:
        assert "unreadable images" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("kind", [
    KeyError, IndexError, ZeroDivisionError, OverflowError, MemoryError, NotImplementedError])
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
    assert re.findall(r"bad(\d\d)\.png \(", message) == [f"{i:02}" for i in range(10)]


# ------------------------------------------------------------------- memory, progress, interruption

def test_what_is_kept_holds_no_other_memory_alive(root):
    put(noise(9), root / "unlabeled" / "more.png")
    for part in data.load("folder", root, n1=1, image_size=16)[:6]:
        assert part is None or part.untyped_storage().nbytes() == part.nbytes


@pytest.fixture
def clock(monkeypatch):
    """A clock that each of its readings moves on by 25 s, and images that need no file."""
    now = [0]

    def read():
        now[0] += 25
        return now[0]
    monkeypatch.setattr(data.time, "monotonic", read)
    monkeypatch.setattr(data, "square", lambda path, size: Image.new("RGB", (size, size)))


def test_progress_is_a_line_each_ten_seconds_with_the_time_that_is_left(clock, capsys):
    data.decode(["x"] * 1000, 1, "photos")  # four parts of 25 s
    lines = capsys.readouterr().err.splitlines()
    assert [int(n) for line in lines for n in re.findall(r"(\d+) of 1000", line)] == [256, 512, 768, 1000]
    assert [int(n) for line in lines for n in re.findall(r"(\d+) s left", line)] == [73, 48, 23, 0]
    assert all(line.startswith("photos") for line in lines)


def test_a_short_decoding_writes_nothing(root, capsys):
    data.read("folder", root, 16)
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_ends_the_decoding_without_the_images_that_have_not_begun(monkeypatch):
    begun = []

    def square(path, size):
        begun.append(path)
        if len(begun) == 20:
            signal.raise_signal(signal.SIGINT)
        elif len(begun) > 20:
            stopped.wait(0.005)
        return Image.new("RGB", (size, size))
    stopped = threading.Event()
    monkeypatch.setattr(data, "square", square)
    with pytest.raises(KeyboardInterrupt):
        data.decode(["x"] * 100_000, 1, "photos")
    assert len(begun) < 200


@pytest.mark.parametrize("allowed", [1, 3])
def test_there_are_as_many_threads_as_pytorch_may_use(root, monkeypatch, allowed):
    numbers = []
    pool = data.ThreadPoolExecutor
    monkeypatch.setattr(data, "ThreadPoolExecutor", lambda number: numbers.append(number) or pool(number))
    before = torch.get_num_threads()
    torch.set_num_threads(allowed)
    try:
        data.read("folder", root, 16)
    finally:
        torch.set_num_threads(before)
    assert set(numbers) == {allowed}

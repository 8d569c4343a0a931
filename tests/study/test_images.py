"""Images come back as their pixels, upright, square and of one size; nothing else gets through."""

import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from study.loading import assert_refused, assert_sound, assert_survives_damage

from batchnorm.study.data import load

GREY = np.random.default_rng(0).integers(0, 256, (10, 8, 8), np.uint8)
COLOURS = np.random.default_rng(1).integers(0, 256, (10, 8, 8, 3), np.uint8)


def write(folder, pixels=GREY, classes=("cat", "dog"), ending=".png", **how):
    """Write images in turn into the folders of classes."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pixels):
        name = classes[number % len(classes)]
        Image.fromarray(image).save(folder / name / f"{number:03}{ending}", **how)
    return f"images:{folder}"


def images_of(data):
    """All images, in bytes: (N, H, W, C), in an order of their own, and their labels."""
    train_x, train_y, test_x, test_y = assert_sound(data)
    images = np.rint(np.concatenate([train_x, test_x]) * 255).astype(np.uint8)
    images, labels = images.transpose(0, 2, 3, 1), np.concatenate([train_y, test_y])
    order = np.lexsort(images.reshape(len(images), -1).T)
    return images[order], labels[order]


def assert_images(data, pixels, labels):
    order = np.lexsort(pixels.reshape(len(pixels), -1).T)
    images, ours = images_of(data)
    np.testing.assert_array_equal(images, pixels[order])
    np.testing.assert_array_equal(ours, np.asarray(labels)[order])


def one_of(folder, image, ending=".png", **how):
    """Load an image beside plain ones of 8x8, and return it: (8, 8, C), in bytes."""
    spec = write(folder, GREY[:, :8, :8] // 2 + 128)
    for name in ("000.png", "001.png"):
        (folder / "cat" / name).unlink(missing_ok=True)
    file = folder / "only" / f"a{ending}"
    for place in (file, folder / "only" / f"b{ending}"):
        place.parent.mkdir(exist_ok=True)
        image.save(place, **how)
    images, labels = images_of(load(spec))
    (first, second) = images[labels == 2]
    np.testing.assert_array_equal(first, second)
    return first


def test_grey_images_have_one_channel(tmp_path):
    data = load(write(tmp_path / "pets"))
    assert (data.name, data.shape, data.classes) == ("pets", (1, 8, 8), 2)
    assert np.bincount(data.test_labels).tolist() == [1, 1]
    assert_images(data, GREY[..., None], np.arange(10) % 2)
    np.testing.assert_array_equal(load(f"images:{tmp_path}/pets").train_inputs, data.train_inputs)


def test_colour_images_have_three(tmp_path):
    data = load(write(tmp_path, COLOURS))
    assert data.shape == (3, 8, 8)
    assert_images(data, COLOURS, np.arange(10) % 2)


@pytest.mark.parametrize("ending", [".png", ".PNG", ".bmp", ".gif", ".webp", ".jpg", ".jpeg"])
def test_every_format(tmp_path, ending):
    how = {"lossless": True} if ending == ".webp" else {}
    images, labels = images_of(load(write(tmp_path, GREY, ending=ending, **how)))
    assert images.shape == (10, 8, 8, 1)
    assert labels.sum() == 5
    if ending not in (".jpg", ".jpeg"):  # which lose something
        assert_images(load(f"images:{tmp_path}"), GREY[..., None], np.arange(10) % 2)


def test_grey_and_colour_together_are_colour(tmp_path):
    write(tmp_path / "train", GREY)
    write(tmp_path / "test", COLOURS)
    data = load(f"images:{tmp_path}")
    assert data.shape == (3, 8, 8)
    train_x, _, test_x, _ = assert_sound(data)
    assert (train_x == train_x[:, :1]).all()
    assert not (test_x == test_x[:, :1]).all()


@pytest.mark.parametrize("test", ["test", "val"])
def test_training_and_test_apart(tmp_path, test):
    write(tmp_path / "train", GREY[:6])
    write(tmp_path / test, GREY[6:])
    train_x, train_y, test_x, test_y = assert_sound(load(f"images:{tmp_path}"))
    order = [0, 2, 4, 1, 3, 5]  # the one class, then the other
    np.testing.assert_array_equal(train_x, np.float32(GREY[order, None]) / np.float32(255))
    np.testing.assert_array_equal(test_x, np.float32(GREY[[6, 8, 7, 9], None]) / np.float32(255))
    assert (train_y.tolist(), test_y.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])


def test_test_comes_before_val_and_train_alone_is_split(tmp_path):
    write(tmp_path / "train", GREY)
    assert len(load(f"images:{tmp_path}").test_labels) == 2
    write(tmp_path / "val", GREY[:4])
    write(tmp_path / "test", GREY[:6])
    assert len(load(f"images:{tmp_path}").test_labels) == 6


def test_a_class_may_be_called_train(tmp_path):
    data = load(write(tmp_path, classes=("plane", "train")))
    assert_images(data, GREY[..., None], np.arange(10) % 2)


def test_hidden_and_other_files_are_skipped(tmp_path):
    spec = write(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "read me.txt").write_text("no image")
    (tmp_path / "cat" / "._000.png").write_bytes(b"no image")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "folder.png").mkdir()
    assert_images(load(spec), GREY[..., None], np.arange(10) % 2)


def test_the_size_is_the_smallest_shorter_side(tmp_path):
    write(tmp_path, np.repeat(np.repeat(GREY, 3, 1), 2, 2), ("tall",))
    assert load(write(tmp_path, GREY[:, :7], ("wide",))).shape == (1, 7, 7)
    assert load(write(tmp_path, GREY[:, :, :5], ("wide",))).shape == (1, 5, 5)


def test_the_size_is_at_most_32(tmp_path):
    pixels = np.full((4, 90, 70), 7, np.uint8) * np.arange(1, 5, dtype=np.uint8)[:, None, None]
    data = load(write(tmp_path, pixels))
    assert data.shape == (1, 32, 32)
    assert sorted(set(images_of(data)[0].ravel())) == [7, 14, 21, 28]


def test_the_square_is_in_the_middle(tmp_path):
    wide = np.pad(GREY[0], ((0, 0), (3, 3)), constant_values=255)
    np.testing.assert_array_equal(one_of(tmp_path, Image.fromarray(wide))[..., 0], GREY[0])
    np.testing.assert_array_equal(one_of(tmp_path, Image.fromarray(wide.T))[..., 0], GREY[0].T)


def test_a_scaled_pixel_is_a_mean_of_its_neighbourhood(tmp_path):
    large = np.kron(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8), np.ones((9, 9), np.uint8))
    small = one_of(tmp_path, Image.fromarray(large))[..., 0].astype(int)
    assert np.abs(small - large[4::9, 4::9]).max() <= 6
    # a chessboard: single pixels would be black or white
    fine = (np.indices((72, 72)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(one_of(tmp_path, Image.fromarray(fine)).astype(int) - 127).max() <= 3


def test_images_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by 90 degrees
    image = one_of(tmp_path, Image.fromarray(GREY[0]), exif=exif)
    np.testing.assert_array_equal(image[..., 0], np.rot90(GREY[0], -1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "I;16", "LA", "RGBA"])
def test_modes(tmp_path, mode):
    values = GREY[0] // 128 * 255 if mode == "1" else GREY[0]
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    ending, how = (".jpg", {"quality": 100}) if mode == "CMYK" else (".png", {})
    ours = one_of(tmp_path, image, ending, **how).astype(int)
    assert np.abs(ours - values[..., None]).max() <= (3 if mode == "CMYK" else 0)


def test_what_is_transparent_is_white(tmp_path):
    clear = (np.arange(64).reshape(8, 8) % 2 * 255).astype(np.uint8)
    image = Image.fromarray(np.dstack([GREY[0] * 0, clear]))
    np.testing.assert_array_equal(one_of(tmp_path, image)[..., 0], 255 - clear)
    palette = Image.fromarray(clear // 255).convert("P")
    ours = one_of(tmp_path, palette, transparency=0)
    assert set(ours[clear == 0].ravel()) == {255}


def test_the_first_picture_of_an_animation_counts(tmp_path):
    first, second = (Image.fromarray(GREY[i]) for i in (0, 1))
    image = one_of(tmp_path, first, ".gif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(image[..., 0], GREY[0])


def png(width, height):
    """A small file that says it is a picture of that size."""

    def chunk(kind, content):
        sum_ = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + sum_

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(16))
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot identify image file"),
        (b"no image", "cannot identify image file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),  # runs a program
        (png(2**31 - 1, 2**31 - 1), "could be decompression bomb"),
        (png(10_000, 10_000), "could be decompression bomb"),
        (png(8, 8)[:45], "error"),
        (png(3, 8), "3x8 pixels, expected 4 or more on each side"),
    ],
)
def test_wrong_images(tmp_path, content, words):
    spec, file = write(tmp_path), tmp_path / "dog" / "005.png"
    file.write_bytes(content)
    assert_refused(spec, f"{file}: got ", words)


def test_wrong_folders(tmp_path):
    spec = f"images:{tmp_path}"
    assert_refused(spec, f"{tmp_path}: got no folders, expected one of images for each class")
    Image.fromarray(GREY[0]).save(tmp_path / "a.png")
    assert_refused(spec, f"{tmp_path}: got no folders")
    (tmp_path / "empty").mkdir()
    assert_refused(spec, f"{tmp_path / 'empty'}: got no images, expected files that end in .png")
    (tmp_path / "empty").rmdir()
    write(tmp_path, GREY, ("cat",))
    assert_refused(spec, "one class only, cat, to train on")
    write(tmp_path, GREY[:1], ("dog",))
    assert_refused(spec, "one example with the label dog")
    (tmp_path / "dog" / "001.png").symlink_to("nowhere.png")
    assert_refused(spec, f"{tmp_path / 'dog' / '001.png'}: got the error '", "No such file")


def test_a_class_of_the_test_alone(tmp_path):
    write(tmp_path / "train", GREY)
    write(tmp_path / "test", GREY, ("cat", "owl"))
    assert_refused(f"images:{tmp_path}", "the test label owl, which training does not have")


def test_without_pillow(tmp_path, monkeypatch):
    spec = write(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert_refused(spec, 'pip install "batchnorm[study]"', "Pillow")


@pytest.mark.parametrize("ending", [".png", ".jpg", ".bmp", ".gif", ".webp"])
def test_a_damaged_image_loads_or_raises_data_error(tmp_path, ending):
    spec = write(tmp_path, COLOURS, ending=ending)
    assert_survives_damage(spec, tmp_path / "cat" / f"000{ending}", examples=40)

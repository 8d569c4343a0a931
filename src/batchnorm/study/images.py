"""Folders of images, a folder for each class, made squares of one size.

A file is only read as what its first bytes say, and only by the decoders of five formats.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from batchnorm.study.errors import needing, reading, wrong
from batchnorm.study.formats import Part

if TYPE_CHECKING:
    from PIL.Image import Image

_Labelled: TypeAlias = list[tuple[Path, str]]  # files, and their classes

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_LARGEST, _SMALLEST = 32, 4  # how many pixels the side of a square has


def read_images(folder: Path) -> list[Part]:
    """Read the images of each class, of training and of test or of both together."""
    with needing(folder, "Pillow, which reads images"):
        import PIL.Image  # noqa: F401
    sets = [_files(place) for place in _sets(folder)]
    size = min(_shorter_side(file) for files in sets for file, _ in files)
    pixels = [np.stack([_square(file, size) for file, _ in files]) for files in sets]
    if all((images == images[..., :1]).all() for images in pixels):
        pixels = [images[..., :1] for images in pixels]
    return [
        (folder, array)
        for images, files in zip(pixels, sets, strict=True)
        for array in (images.transpose(0, 3, 1, 2), np.array([name for _, name in files]))
    ]


def _sets(folder: Path) -> Sequence[Path]:
    """Return the folders of training and of test, or the one of both."""
    if not _folders(folder / "train"):  # a class may be called so, too
        return (folder,)
    tests = [folder / name for name in ("test", "val") if _folders(folder / name)]
    return folder / "train", *tests[:1]


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()] if folder.is_dir() else []


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _files(folder: Path) -> _Labelled:
    """Return the files of each class, in order."""
    labelled: _Labelled = []
    for inner in _folders(folder):
        with reading(inner):
            images = [path for path in _visible(inner) if path.suffix.lower() in _ENDINGS]
            files = [path for path in images if not path.is_dir()]
        if not files:
            expected = f"files that end in {', '.join(_ENDINGS)}"
            raise wrong(inner, "no images", expected, "add some, or remove the folder")
        labelled += [(file, inner.name) for file in files]
    if not labelled:
        raise wrong(folder, "no folders", "one of images for each class", "sort the images so")
    return labelled


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Image]:
    from PIL import Image

    with reading(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what can be read all the same
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=_FORMATS) as image:
            yield image


def _shorter_side(file: Path) -> int:
    """Return how many pixels the shorter side has, at most `_LARGEST`."""
    with _opened(file) as image:
        if min(image.size) < _SMALLEST:
            got, way_out = f"{image.width}x{image.height} pixels", "remove or replace it"
            raise wrong(file, got, f"{_SMALLEST} or more on each side", way_out)
        return min(*image.size, _LARGEST)


def _square(file: Path, size: int) -> NDArray[np.uint8]:
    """Read the square in the middle, scaled: (size, size, 3)."""
    from PIL import Image, ImageOps

    with _opened(file) as image:
        upright = _eight_bits(ImageOps.exif_transpose(image))
        side = min(upright.size)
        left, top = (upright.width - side) // 2, (upright.height - side) // 2
        square = upright.crop((left, top, left + side, top + side)).convert("RGBA")
        square = square.resize((size, size), Image.Resampling.BILINEAR)
        white = Image.new("RGBA", square.size, "white")
        return np.asarray(Image.alpha_composite(white, square).convert("RGB"))


def _eight_bits(image: Image) -> Image:
    """Scale greys of 16 bits, which a conversion would cut off at 255."""
    from PIL.Image import fromarray

    if not image.mode.startswith("I"):
        return image
    return fromarray((np.asarray(image) // 257).astype(np.uint8))

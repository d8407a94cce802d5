"""Tests of opening, verifying and resizing images."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from hf_mel.data.images import open_image, resize_image, verify_image
from hf_mel.errors import ImageError
from tests.dataset_scripts.fixtures import picture


def photo(form="JPEG", size=(64, 48)):
    """Returns an encoded image of random pixels, so that truncation always loses something."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def huge():
    """Returns an image of 90 million pixels in a few kilobytes."""
    buffer = BytesIO()
    Image.new("1", (10_000, 9_000)).save(buffer, "PNG")
    return buffer.getvalue()


def test_all_kinds_of_sources_give_the_same_pixels(tmp_path):
    data = photo("PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    expected = np.asarray(Image.open(path))
    sources = [
        path,
        str(path),
        data,
        bytearray(data),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
    ]
    for source in [*sources, Image.open(path)]:
        image = open_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), expected)
        verify_image(source)


def test_transparent_pixels_become_white():
    for mode, colour in (("RGBA", (9, 9, 9, 0)), ("LA", (9, 0))):
        assert open_image(Image.new(mode, (2, 2), colour)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2))
    palette.info["transparency"] = 0
    assert open_image(palette).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_exif_rotation_is_applied():
    buffer = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the picture is on the right side of the file
    Image.new("RGB", (30, 10)).save(buffer, "JPEG", exif=exif)
    assert open_image(buffer.getvalue()).size == (10, 30)


@pytest.mark.parametrize("check", [open_image, verify_image])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_truncated_image_is_an_error(check, form):
    data = photo(form)
    with pytest.raises(ImageError) as caught:
        check(data[: len(data) // 2], file="release.json", row="7")
    assert str(caught.value).startswith("release.json, row 7: ")


@pytest.mark.parametrize("check", [open_image, verify_image])
@pytest.mark.parametrize("source", [b"", b"<html>404 Not Found</html>", {"bytes": None, "path": None}])
def test_bytes_that_are_no_image_are_an_error(check, source):
    with pytest.raises(ImageError):
        check(source)


@pytest.mark.parametrize("check", [open_image, verify_image])
def test_the_error_names_a_missing_file(check, tmp_path):
    with pytest.raises(ImageError, match="image file does not exist") as caught:
        check(tmp_path / "gone.jpg")
    assert caught.value.file == str(tmp_path / "gone.jpg")


@pytest.mark.parametrize("check", [open_image, verify_image])
def test_an_image_with_too_many_pixels_is_an_error(check, recwarn):
    with pytest.raises(ImageError, match="10000 × 9000 pixels"):
        check(huge())
    assert not recwarn.list


def test_verify_accepts_all_formats_that_open():
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        verify_image(picture("red", form=form))


def test_resizing_keeps_format_and_content():
    large = np.linspace(0, 255, 200 * 100 * 3).reshape(100, 200, 3).astype(np.uint8)
    expected = np.asarray(Image.fromarray(large).resize((50, 25), Image.Resampling.BOX)).astype(int)
    for form, saved_form in (("PNG", "PNG"), ("JPEG", "JPEG"), ("BMP", "PNG"), ("WEBP", "JPEG")):
        buffer = BytesIO()
        Image.fromarray(large).save(buffer, form)
        data = resize_image(buffer.getvalue(), 50)
        image = Image.open(BytesIO(data))
        assert (image.size, image.mode, image.format) == ((50, 25), "RGB", saved_form)
        assert np.abs(np.asarray(image).astype(int) - expected).mean() < 4
        assert data == resize_image(buffer.getvalue(), 50)
        assert resize_image(data, 50) == data


def test_resizing_applies_the_rotation_and_keeps_transparency():
    wide = np.zeros((40, 80, 3), dtype=np.uint8)
    wide[:, :40, 0] = 255  # red on the left, which is on top after rotation
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    Image.fromarray(wide).save(buffer, "JPEG", exif=exif, quality=95)
    image = Image.open(BytesIO(resize_image(buffer.getvalue(), 20)))
    assert image.size == (10, 20)
    assert not image.getexif()
    assert np.asarray(image)[:8, :, 0].min() > 200
    assert np.asarray(image)[12:, :, 0].max() < 55

    clear = np.zeros((40, 80, 4), dtype=np.uint8)
    clear[:, 40:] = (0, 0, 255, 255)
    for mode in ("RGBA", "P"):
        buffer = BytesIO()
        Image.fromarray(clear).convert(mode).save(buffer, "PNG", **({"transparency": 0} if mode == "P" else {}))
        image = Image.open(BytesIO(resize_image(buffer.getvalue(), 20)))
        assert (image.size, image.mode, image.format) == ((20, 10), "RGBA", "PNG")


def test_images_that_cannot_be_resized_are_image_errors():
    for data in (photo()[:900], huge(), b"<html>"):
        with pytest.raises(ImageError):
            resize_image(data, 16)
    with pytest.raises(ImageError):
        resize_image(photo("PNG")[:500], 500)  # small enough already, but damaged

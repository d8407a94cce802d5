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


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def in_colour(grey):
    return np.repeat(grey[:, :, None], 3, axis=2)


def deep_image(mode):
    """Returns the ramp 0–255 in a mode of more than 8 bits, with the values that such files hold."""
    if mode == "F":
        return Image.fromarray((GREY / 255).astype(np.float32))
    values = GREY.astype(np.uint16) * 257  # 0–65535
    if mode == "I":
        return Image.fromarray(values.astype(np.int32))
    byte_order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
    return Image.frombytes(mode, (16, 16), values.astype(byte_order).tobytes())


def colourful_image(mode):
    """Returns a smooth picture in a mode of colours or bytes, and its RGB pixels."""
    rows, columns = np.mgrid[0:16, 0:16]
    rgb = np.stack([40 + 8 * rows, 200 - 9 * columns, 60 + 4 * (rows + columns)], -1).astype(np.uint8)
    if mode in ("L", "LA", "La"):
        rgb = in_colour(GREY)
    picture = Image.fromarray(rgb)
    if mode == "1":
        pixels = (rows + columns) % 3 == 0
        return Image.fromarray(pixels), in_colour(pixels.astype(np.uint8) * 255)
    if mode in ("P", "PA"):
        picture = Image.fromarray(GREY)  # number k of the palette is the colour (k, 255 - k, 7)
        picture.putpalette([value for k in range(256) for value in (k, 255 - k, 7)])
        rgb = np.stack([GREY, 255 - GREY, np.full_like(GREY, 7)], -1)
        return (picture if mode == "P" else picture.convert("PA")), rgb
    if mode == "RGBX":
        return Image.frombytes("RGBX", (16, 16), np.dstack([rgb, GREY]).tobytes()), rgb
    if mode == "La":
        return picture.convert("LA").convert("La"), rgb
    return picture.convert(mode), rgb


DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_of_pil_looks_as_it_is(mode):
    if mode in DEEP_MODES:
        image, expected, tolerance = deep_image(mode), in_colour(GREY), 0
    else:
        image, expected = colourful_image(mode)
        tolerance = {"LAB": 12, "HSV": 4, "YCbCr": 3}.get(mode, 0)  # these round when they are written
    assert image.mode == mode
    pixels = np.asarray(open_image(image)).astype(int)
    assert np.abs(pixels - expected).max() <= tolerance
    verify_image(image)


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (GREY.astype(np.uint16) * 16, 4095),  # a scan of 12 bits in 16
        (GREY.astype(np.uint16), 255),  # 8 bits in 16, which are not scaled
        (GREY.astype(np.uint16) * 250, 65_535),
        (GREY.astype(np.int32), 255),
        (GREY.astype(np.int64) * 200, 65_535),
        (GREY.astype(np.float32), 255),
        (GREY / 255, 1),
        (GREY.astype(np.float16) / 255, 1),
        (GREY * 1.03, 255),  # interpolation leaves values a little beyond white
        (GREY * 257.0, 65_535),
    ],
)
def test_deep_pixels_are_a_share_of_the_white_that_holds_them_all(values, white):
    expected = np.minimum(np.round(values.astype(float) * 255 / white), 255)
    for source in [values, *([Image.fromarray(values)] if values.dtype in (np.uint16, np.int32, np.float32) else [])]:
        assert np.abs(np.asarray(open_image(source)).astype(float) - in_colour(expected)).max() <= 1


@pytest.mark.parametrize("values", [GREY / 127.5 - 1, GREY * 1000.0 - 50_000, GREY.astype(np.int32) * 9000])
def test_pixels_without_a_white_are_stretched_from_the_lowest_to_the_highest(values):
    assert np.abs(np.asarray(open_image(values)).astype(int) - in_colour(GREY)).max() <= 1


def test_images_of_one_value_stay_black_and_white():
    for values, colour in ((np.zeros((2, 2)), 0), (np.ones((2, 2)), 255), (np.full((2, 2), 1e9), 255)):
        assert open_image(values).getpixel((1, 1)) == (colour,) * 3
    assert open_image(np.array([[True, False]])).getpixel((0, 0)) == (255, 255, 255)


def test_pixels_that_are_no_numbers_are_refused_by_name():
    pixels = (GREY / 255).astype(np.float32)
    pixels[3, 3] = np.nan
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF")
    for check in (open_image, verify_image, lambda data: resize_image(data, 8), lambda data: resize_image(data, 99)):
        with pytest.raises(ImageError, match="nan or infinite"):
            check(buffer.getvalue())
    with pytest.raises(ImageError, match="nan or infinite"):
        open_image(pixels)


def test_numpy_arrays_are_images():
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for array in (rgb, rgb.astype(np.uint16) * 257, rgb / 255, (rgb / 255).astype(np.float32), rgb.astype(int)):
        assert np.array_equal(np.asarray(open_image(array)), rgb)
        verify_image(array)
    assert np.array_equal(np.asarray(open_image(rgb[:, :, :1])), in_colour(rgb[:, :, 0]))
    clear = np.dstack([rgb, np.where(np.arange(35).reshape(5, 7) % 2, 255, 0)]).astype(np.uint16) * 257
    expected = np.where((np.arange(35).reshape(5, 7) % 2)[:, :, None], rgb, 255)
    assert np.array_equal(np.asarray(open_image(clear)), expected)
    for array in (rgb.transpose(2, 0, 1), rgb[:, :, :2], rgb[0, 0], np.zeros((2, 2), complex), np.array("photo.png")):
        with pytest.raises(ImageError, match="array of shape"):
            open_image(array)
    with pytest.raises(ImageError, match="no pixels"):
        open_image(np.zeros((0, 4)))


def test_something_that_is_no_image_is_named(tmp_path):
    with pytest.raises(ImageError, match="The image is a list"):
        open_image([[0, 255]])
    with pytest.raises(ImageError, match=r"cannot be read \(Is a directory\)"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="does not exist"):
        open_image("photo\0.png")


def test_a_deep_file_is_upright_and_its_transparent_value_white():
    values = GREY.astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in ("PNG", "TIFF"):
        buffer = BytesIO()
        Image.fromarray(values).save(buffer, form, exif=exif)
        assert np.array_equal(np.asarray(open_image(buffer.getvalue())), in_colour(np.rot90(GREY, -1)))
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, "PNG", transparency=257 * 9)
    expected = GREY.copy()
    expected[GREY == 9] = 255
    assert np.array_equal(np.asarray(open_image(buffer.getvalue())), in_colour(expected))


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    for form in ("GIF", "PNG", "TIFF"):
        buffer = BytesIO()
        frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
        assert open_image(buffer.getvalue()).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("longest", [8, 99])
def test_resizing_leaves_no_deep_pixels(longest):
    """Readers of a built data set decode images without `open_image`, and would show these all white or all black."""
    for image in map(deep_image, ("I;16", "F")):
        for form in ("TIFF", *(["PNG"] if image.mode == "I;16" else [])):
            buffer = BytesIO()
            image.save(buffer, form)
            resized = Image.open(BytesIO(resize_image(buffer.getvalue(), longest)))
            assert max(resized.size) == min(longest, 16)
            assert abs(np.asarray(resized.convert("RGB")).mean() - GREY.mean()) < 2

"""Decoding, checking and resizing of images. Every problem with an image is an [`~hf_mel.errors.ImageError`].

An image is shown as a person sees it: upright (EXIF), its first frame, transparent pixels on white, and deep pixels
(16 or 32 bits, floating point) scaled to 8 bits. White is then 1 for floating-point values up to 1, and otherwise the
smallest of 255, 4,095 and 65,535 that no value exceeds: many scans store 8 or 12 bits in 16, and would be black as 16
bits. Values below 0 or above 65,535 have no white of their own; they are stretched from the lowest to the highest.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from io import BytesIO
from os import PathLike, fspath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hf_mel.errors import ImageError

#: Limit on the pixels of an image, checked before decoding (about 270 MB as RGB).
MAX_PIXELS = 89_478_485

#: A path, the bytes of a file, `{"bytes", "path"}` as `datasets` stores an image, an open PIL image, or a NumPy array of
#: shape [H, W], [H, W, 3] (RGB) or [H, W, 4] (RGBA) with integers, booleans or floating-point numbers.
ImageSource = str | PathLike[str] | bytes | bytearray | Mapping[str, Any] | Image.Image | np.ndarray

#: Modes with one channel of more than 8 bits. `Image.convert` cuts their values off at 255.
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
#: Modes that `Image.convert` turns into RGB or RGBA whatever their pixels are.
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
#: The value of white with 8, 12 and 16 bits.
_WHITES = (255, 4_095, 65_535)
#: Share of white by which floating-point values may exceed it or fall below 0, as interpolation leaves them.
_OVERSHOOT = 0.1


def open_image(
    source: ImageSource, *, file: str | PathLike[str] | None = None, row: int | str | None = None
) -> Image.Image:
    """Decodes an image of any mode to RGB as a person sees it: see the head of this module.

    Args:
        source ([`ImageSource`]): The image.
        file, row (*optional*): The source, for error messages. `file` defaults to the path in `source`.

    Returns:
        `PIL.Image.Image` of mode RGB, H × W pixels.

    Raises:
        ImageError: The file is missing, no image, truncated, or has more than [`MAX_PIXELS`] pixels; its mode cannot be
            converted; pixels are not numbers; an array has another shape or type.
    """
    image = _open_undecoded(source, file, row)
    try:
        image.load()
        image = _in_colour(ImageOps.exif_transpose(image))
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, ValueError and others
        raise _image_error(error, source, file, row) from error


def verify_image(
    source: ImageSource, *, file: str | PathLike[str] | None = None, row: int | str | None = None
) -> None:
    """Checks that [`open_image`] can decode an image, without keeping its pixels.

    JPEG files are decoded at an eighth of their size, which still reads the whole file and so detects truncation.

    Raises:
        ImageError: As in [`open_image`].
    """
    image = _open_undecoded(source, file, row)
    try:
        image.draft("RGB", (1, 1))
        image.load()
        if image.mode not in _PLAIN_MODES:
            _in_colour(image)
    except Exception as error:
        raise _image_error(error, source, file, row) from error


def resize_image(data: bytes, longest: int) -> bytes:
    """Scales an image file down to `longest` pixels on its longest side, upright, without metadata, and in 8 bits.

    A file that is small enough is returned unchanged, unless its pixels are deep: other programs show these as white or
    black. Images with transparent pixels and PNG, GIF and BMP files become PNG; all others become JPEG (quality 90). The
    result depends on the bytes only.

    Args:
        data (`bytes`): The content of an image file.
        longest (`int`): Limit on the longest side, in pixels.

    Returns:
        `bytes`: The content of the resized file.

    Raises:
        ImageError: As in [`open_image`].
    """
    image = _open_undecoded(data, None, None)
    if max(image.size) <= longest and image.mode not in _DEEP_MODES:
        verify_image(data)
        return data
    lossless = image.format in ("PNG", "GIF", "BMP")
    try:
        image.draft("RGB", (2 * longest, 2 * longest))  # decodes a JPEG file at a fraction of its size
        image.load()
        image = _in_colour(ImageOps.exif_transpose(image))
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        file = BytesIO()
        for key in list(image.info):  # PIL would write some of this metadata
            del image.info[key]
        if lossless or image.mode == "RGBA":
            image.save(file, "PNG")
        else:
            image.save(file, "JPEG", quality=90)
        return file.getvalue()
    except Exception as error:
        raise _image_error(error, data, None, None) from error


def _in_colour(image: Image.Image) -> Image.Image:
    """Returns a decoded image with 8 bits a channel: as RGBA if it has transparent pixels, otherwise as RGB.

    Raises:
        ImageError: The mode cannot be converted, or pixels are not numbers.
    """
    mode = image.mode
    try:
        if mode in _DEEP_MODES:
            values, transparent_value = np.asarray(image), image.info.get("transparency")
            image = Image.fromarray(_eight_bits(values))
            if transparent_value is not None:
                image.putalpha(Image.fromarray(np.where(values == transparent_value, 0, 255).astype(np.uint8)))
        elif mode == "La":
            image = image.convert("LA")  # PIL converts it to no other mode
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (ValueError, ImportError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(
            f"The mode {mode!r} of the image cannot be converted to RGB ({error}).", remedy="Save it as RGB."
        ) from error


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scales pixel values of any type and depth to 0–255 (`uint8`), by the rule at the head of this module.

    Raises:
        ImageError: A value is nan or infinite.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    is_float = values.dtype.kind == "f"
    values = values.astype(np.float64 if values.dtype.itemsize > 4 else np.float32)
    if not np.isfinite(values).all():
        raise ImageError(
            "The image has pixels that are nan or infinite.", remedy="Replace them, or leave the image out."
        )
    overshoot = _OVERSHOOT if is_float else 0
    lowest, highest = float(values.min()), float(values.max())
    whites = (1, *_WHITES) if is_float else _WHITES
    black, white = 0.0, float(next((white for white in whites if highest <= (1 + overshoot) * white), 0))
    if not white or lowest < -overshoot * white:
        black, white = lowest, highest
    if black == white:
        return np.full(values.shape, 255 if white > 0 else 0, dtype=np.uint8)
    return (((values - black) * (255 / (white - black))).clip(0, 255) + 0.5).astype(np.uint8)


def _image_of_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)):
        raise ImageError(
            f"The image is an array of shape {list(array.shape)} and type {array.dtype}.",
            remedy="Give numbers of shape [H, W], [H, W, 3] for RGB, or [H, W, 4] for RGBA.",
        )
    if not array.size:
        raise ImageError(f"The image is an array of shape {list(array.shape)}: it has no pixels.")
    return Image.fromarray(_eight_bits(array))


def _open_undecoded(source: ImageSource, file: str | PathLike[str] | None, row: int | str | None) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        try:
            return _image_of_array(source)
        except ImageError as error:
            raise _image_error(error, source, file, row) from error
    content: Any = source
    if isinstance(source, Mapping):
        content = source.get("path") if source.get("bytes") is None else source["bytes"]
    if not isinstance(content, (str, PathLike, bytes, bytearray)) and not hasattr(content, "read"):
        what = "has neither bytes nor a path" if content is None else f"is a {type(content).__name__}"
        raise ImageError(
            f"The image {what}.",
            file=_file_name(source, file),
            row=row,
            remedy="Give a path, the bytes of a file, a PIL image or a NumPy array.",
        )
    try:
        with warnings.catch_warnings():
            # PIL warns at MAX_PIXELS and raises at twice that. The check below raises at MAX_PIXELS.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content) if isinstance(content, (bytes, bytearray)) else content)
        # PIL maps some files that it has opened by name, and then reads what lies beyond their pixels in place of an error.
        image.filename = ""  # type: ignore[attr-defined]
    except Exception as error:
        raise _image_error(error, source, file, row) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ImageError(
            f"The image has {width} × {height} pixels; the limit is {MAX_PIXELS:,}.",
            file=_file_name(source, file),
            row=row,
            remedy="Scale it down. Models read a few hundred pixels per side.",
        )
    return image


def _image_error(error: Exception, source: Any, file: str | PathLike[str] | None, row: int | str | None) -> ImageError:
    message: str
    remedy: str | None
    if isinstance(error, ImageError):
        message, remedy = error.message, error.remedy
    elif isinstance(error, FileNotFoundError) or "null byte" in str(error):  # no file can have such a name
        message, remedy = "The image file does not exist.", "Check its path."
    elif isinstance(error, OSError) and error.strerror:  # of the system: PIL's errors have no number
        message, remedy = f"The image file cannot be read ({error.strerror}).", "Check its path and permissions."
    elif isinstance(error, Image.UnidentifiedImageError):
        message, remedy = "The file is not an image that PIL can read.", "Replace it, or leave the image out."
    elif isinstance(error, Image.DecompressionBombError):
        message, remedy = f"The image has over {2 * MAX_PIXELS:,} pixels.", "Scale it down."
    else:
        message, remedy = f"The image is damaged ({error}).", "Replace it, or leave the image out."
    return ImageError(message, file=_file_name(source, file), row=row, remedy=remedy)


def _file_name(source: Any, file: str | PathLike[str] | None) -> str | None:
    if file is not None:
        return fspath(file)
    return fspath(source) if isinstance(source, (str, PathLike)) else None

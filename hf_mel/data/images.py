"""Decoding, checking and resizing of images. Every problem with an image is an [`~hf_mel.errors.ImageError`]."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from io import BytesIO
from os import PathLike, fspath
from typing import Any

from PIL import Image, ImageOps

from hf_mel.errors import ImageError

#: Limit on the pixels of an image, checked before decoding (about 270 MB as RGB).
MAX_PIXELS = 89_478_485

#: A path, the bytes of a file, `{"bytes", "path"}` as `datasets` stores an image, or an open PIL image.
ImageSource = str | PathLike[str] | bytes | bytearray | Mapping[str, Any] | Image.Image


def open_image(
    source: ImageSource, *, file: str | PathLike[str] | None = None, row: int | str | None = None
) -> Image.Image:
    """Decodes an image to RGB, upright (EXIF rotation applied); transparent pixels become white.

    Args:
        source ([`ImageSource`]): The image.
        file, row (*optional*): The source, for error messages. `file` defaults to the path in `source`.

    Returns:
        `PIL.Image.Image` of mode RGB, H × W pixels.

    Raises:
        ImageError: The file is missing, no image, truncated, or has more than [`MAX_PIXELS`] pixels.
    """
    image = _open_undecoded(source, file, row)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
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
    except Exception as error:
        raise _image_error(error, source, file, row) from error


def resize_image(data: bytes, longest: int) -> bytes:
    """Scales an image file down to `longest` pixels on its longest side, upright and without metadata.

    A file that is small enough is returned unchanged. Images with transparent pixels and PNG, GIF and BMP files become
    PNG; all others become JPEG (quality 90). The result depends on the bytes only.

    Args:
        data (`bytes`): The content of an image file.
        longest (`int`): Limit on the longest side, in pixels.

    Returns:
        `bytes`: The content of the resized file.

    Raises:
        ImageError: As in [`open_image`].
    """
    image = _open_undecoded(data, None, None)
    if max(image.size) <= longest:
        verify_image(data)
        return data
    lossless = image.format in ("PNG", "GIF", "BMP")
    try:
        image.draft("RGB", (2 * longest, 2 * longest))  # decodes a JPEG file at a fraction of its size
        image.load()
        image = ImageOps.exif_transpose(image)
        transparent = image.has_transparency_data
        image = image.convert("RGBA" if transparent else "RGB")
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        file = BytesIO()
        for key in list(image.info):  # PIL would write some of this metadata
            del image.info[key]
        if lossless or transparent:
            image.save(file, "PNG")
        else:
            image.save(file, "JPEG", quality=90)
        return file.getvalue()
    except Exception as error:
        raise _image_error(error, data, None, None) from error


def _open_undecoded(source: ImageSource, file: str | PathLike[str] | None, row: int | str | None) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    content: Any = source
    if isinstance(source, Mapping):
        content = source["path"] if source.get("bytes") is None else source["bytes"]
    try:
        with warnings.catch_warnings():
            # PIL warns at MAX_PIXELS and raises at twice that. The check below raises at MAX_PIXELS.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content) if isinstance(content, (bytes, bytearray)) else content)
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
    if isinstance(error, FileNotFoundError):
        message, remedy = "The image file does not exist.", "Check its path."
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

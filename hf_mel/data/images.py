"""Opening images from wherever they come, with one typed error for everything that can be wrong with them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from io import BytesIO
from os import PathLike, fspath
from typing import Any

from PIL import Image, ImageOps

from hf_mel.errors import ImageError

#: Images of more pixels than this are refused before they are decoded (about 270 MB as RGB).
MAX_PIXELS = 89_478_485

#: A path, the file's bytes, `{"bytes", "path"}` as `datasets` stores an image, or an open PIL image.
ImageSource = str | PathLike[str] | bytes | bytearray | Mapping[str, Any] | Image.Image


def open_image(
    source: ImageSource, *, file: str | PathLike[str] | None = None, row: int | str | None = None
) -> Image.Image:
    """Decodes an image to RGB, upright (EXIF rotation applied); transparent pixels become white.

    Args:
        source ([`ImageSource`]): What to open.
        file, row (*optional*): Named in the error; `file` defaults to the path in `source`.

    Returns:
        `PIL.Image.Image` of mode RGB, H × W pixels.

    Raises:
        ImageError: The file is missing, not an image, cut off, or has more than [`MAX_PIXELS`] pixels.
    """
    image = _open(source, file, row)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, ValueError and others
        raise _broken(error, source, file, row) from error


def verify_image(
    source: ImageSource, *, file: str | PathLike[str] | None = None, row: int | str | None = None
) -> None:
    """Raises [`ImageError`] exactly where [`open_image`] would, without keeping the pixels.

    JPEGs are decoded at an eighth of their size: all of the file is still read, so a cut-off one is found.
    """
    image = _open(source, file, row)
    try:
        image.draft("RGB", (1, 1))
        image.load()
    except Exception as error:
        raise _broken(error, source, file, row) from error


def resize_image(data: bytes, longest: int) -> bytes:
    """An image file whose longest side is at most `longest` pixels, upright and without metadata.

    A file that is small enough comes back as it is. Otherwise JPEG files and the like become JPEG (quality 90); what
    has transparent pixels, and PNG, GIF and BMP files, become PNG. The same bytes give the same bytes.

    Raises:
        ImageError: As [`open_image`].
    """
    image = _open(data, None, None)
    if max(image.size) <= longest:
        verify_image(data)
        return data
    lossless = image.format in ("PNG", "GIF", "BMP")
    try:
        image.draft("RGB", (2 * longest, 2 * longest))  # JPEG: decoded at a fraction of its size
        image.load()
        image = ImageOps.exif_transpose(image)
        transparent = image.has_transparency_data
        image = image.convert("RGBA" if transparent else "RGB")
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        file = BytesIO()
        for key in list(image.info):  # PIL would write some of it
            del image.info[key]
        if lossless or transparent:
            image.save(file, "PNG")
        else:
            image.save(file, "JPEG", quality=90)
        return file.getvalue()
    except Exception as error:
        raise _broken(error, data, None, None) from error


def _open(source: ImageSource, file: str | PathLike[str] | None, row: int | str | None) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    content: Any = source
    if isinstance(source, Mapping):
        content = source["path"] if source.get("bytes") is None else source["bytes"]
    try:
        with warnings.catch_warnings():
            # PIL warns at its own limit and raises at twice that; ours is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content) if isinstance(content, (bytes, bytearray)) else content)
    except Exception as error:
        raise _broken(error, source, file, row) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ImageError(
            f"the image has {width} × {height} pixels; at most {MAX_PIXELS:,} are decoded.",
            file=_name(source, file),
            row=row,
            remedy="Scale it down; models see a few hundred pixels a side.",
        )
    return image


def _broken(error: Exception, source: Any, file: str | PathLike[str] | None, row: int | str | None) -> ImageError:
    if isinstance(error, FileNotFoundError):
        message, remedy = "no such image file.", "Check the path; relative paths start at the file that names them."
    elif isinstance(error, Image.UnidentifiedImageError):
        message, remedy = "is not an image PIL can read.", "Replace it, or leave the image out."
    elif isinstance(error, Image.DecompressionBombError):
        message, remedy = f"the image has over {2 * MAX_PIXELS:,} pixels.", "Scale it down."
    else:
        message, remedy = f"the image is damaged ({error}).", "Replace it, or leave the image out."
    return ImageError(message, file=_name(source, file), row=row, remedy=remedy)


def _name(source: Any, file: str | PathLike[str] | None) -> str | None:
    if file is not None:
        return fspath(file)
    return fspath(source) if isinstance(source, (str, PathLike)) else None

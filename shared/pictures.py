"""What a policy is shown at a state, as one value: a picture, or those of the last states as pages of one file."""

import io
from collections.abc import Sequence

from PIL import Image, ImageSequence


def join_pictures(pictures: Sequence[bytes]) -> bytes:
    """Returns encoded pictures as one value: a single one as it is, several as the pages of a TIFF (lossless).

    Args:
        pictures: At least one, in the order in which they are shown.
    """
    if len(pictures) == 1:
        return pictures[0]
    first, *others = (Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures)
    buffer = io.BytesIO()
    first.save(buffer, format="TIFF", save_all=True, append_images=others, compression="tiff_adobe_deflate")
    return buffer.getvalue()


def decode_pictures(image: bytes) -> list[Image.Image]:
    """Returns the pictures of one value in RGB, in order."""
    with Image.open(io.BytesIO(image)) as opened:
        return [page.convert("RGB") for page in ImageSequence.Iterator(opened)]


def picture_sizes(image: bytes) -> tuple[tuple[int, int], ...]:
    """Returns width and height of every picture of one value, pixels, without decoding them."""
    with Image.open(io.BytesIO(image)) as opened:
        return tuple(page.size for page in ImageSequence.Iterator(opened))


def newest_picture(image: bytes) -> bytes:
    """Returns the last picture of one value alone: as it is where there is one, else as PNG."""
    with Image.open(io.BytesIO(image)) as opened:
        if getattr(opened, "n_frames", 1) == 1:
            return image
    buffer = io.BytesIO()
    decode_pictures(image)[-1].save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()

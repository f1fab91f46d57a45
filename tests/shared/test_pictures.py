"""What a policy is shown as one value."""

import io

import pytest
from PIL import Image

from gflowvlm.shared.pictures import decode_pictures, join_pictures, newest_picture, picture_sizes


def png(color: str, size: tuple[int, int] = (32, 24)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_single_picture_stays_as_it_is():
    one = png("red")
    assert join_pictures([one]) == one
    assert newest_picture(one) == one
    assert picture_sizes(one) == ((32, 24),)


def test_several_pictures_come_back_in_order_whatever_their_sizes_even_where_they_are_alike():
    pictures = [png("red"), png("red"), png("blue", (64, 64)), png("red")]
    joined = join_pictures(pictures)
    assert joined == join_pictures(pictures)
    assert picture_sizes(joined) == ((32, 24), (32, 24), (64, 64), (32, 24))
    for found, expected in zip(decode_pictures(joined), pictures, strict=True):
        assert found.tobytes() == Image.open(io.BytesIO(expected)).convert("RGB").tobytes()
    newest = Image.open(io.BytesIO(newest_picture(join_pictures([png("red"), png("blue")]))))
    assert (newest.format, newest.getpixel((0, 0))) == ("PNG", (0, 0, 255))


def test_nothing_cannot_be_shown():
    with pytest.raises(ValueError, match="unpack"):
        join_pictures([])

"""CRIU's images of areas, with the advice for huge pages taken out and nothing else changed."""

from hypothesis import given
from hypothesis import strategies as st

from hotstart.adapters.criu.images import link_for_small_pages, without_huge_pages

HEAD = b"\x56\x19\x43\x56\x10\x42\x41\x57"
HUGE, SMALL, DONTDUMP = 1 << 14, 1 << 15, 1 << 16


def varint(value):
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def number(field, value):
    return varint(field << 3) + varint(value)


def text(field, value):
    return varint(field << 3 | 2) + varint(len(value)) + value


def image(*areas, before=b"", behind=b""):
    message = before + b"".join(text(14, a) for a in areas) + behind
    return HEAD + len(message).to_bytes(4, "little") + message


def area(advice):
    return number(1, 0x7F0000000000) + number(2, 0x7F0000200000) + number(9, advice) + varint(10 << 3 | 1) + bytes(8)


def test_the_advice_is_turned_and_nothing_else_changed():
    before = image(area(HUGE), area(HUGE | DONTDUMP), area(0), before=number(1, 4096), behind=text(13, b"auxv"))
    behind = image(area(SMALL), area(SMALL | DONTDUMP), area(0), before=number(1, 4096), behind=text(13, b"auxv"))
    assert without_huge_pages(before) == behind
    assert without_huge_pages(behind) == behind


def test_an_area_without_advice_stays_as_it_is():
    plain = image(number(1, 5) + varint(7 << 3 | 5) + b"\1\2\3\4")
    assert without_huge_pages(plain) == plain


@given(st.binary(max_size=60))
def test_what_is_no_such_image_is_copied_or_survives(data):
    without_huge_pages(HEAD + data)


def test_the_other_images_are_links_that_hold_wherever_both_folders_are_seen(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mm-1000.img").write_bytes(image(area(HUGE)))
    (tmp_path / "images" / "pages-1.img").write_bytes(b"pages")
    link_for_small_pages(str(tmp_path / "images"), str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "mm-1000.img").read_bytes() == image(area(SMALL))
    link_for_small_pages(str(tmp_path / "images"), str(tmp_path / "copy"))  # by a stream that goes on with another's
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert (tmp_path.with_name("elsewhere") / "copy" / "pages-1.img").read_bytes() == b"pages"
    tmp_path.with_name("elsewhere").rename(tmp_path)

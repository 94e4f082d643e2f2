"""Images as people have them: transparency, masks, EXIF, odd numbers, sizes, and files that are
torn or something else."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core.batch import is_generated
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.images import (
    check_image,
    eight_bits,
    mask_levels,
    read_image,
    save_image,
    to_mask,
    to_pixels,
)
from comfyui_l2p.l2p_core.train.data import Batches, read_examples
from comfyui_l2p.l2p_core.train.dataset import find_named
from PIL import Image, ImageDraw
from small_runs import config

RIGHT = np.zeros((8, 8), np.uint8)  # the half that is to be generated
RIGHT[:, 4:] = 255
NOISE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
PHOTO, COLOURS = Image.fromarray(NOISE[..., 0]), Image.fromarray(NOISE)


def with_alpha(image, alpha):
    out = image.copy()
    out.putalpha(Image.fromarray(alpha))
    return out


def strokes(mode, colour):
    return with_alpha(Image.new(mode, (8, 8), colour), RIGHT)


def palette_mask():
    palette = Image.fromarray((RIGHT > 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.info["transparency"] = 0
    return palette


@pytest.mark.filterwarnings("ignore:inpaint_mask has")
@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(RIGHT),
        Image.fromarray(RIGHT).convert("RGB"),
        Image.fromarray(RIGHT).convert("1"),
        Image.fromarray((RIGHT / 255).astype(np.float32)),
        Image.fromarray(RIGHT.astype(np.uint16) * 257),
        strokes("RGB", (255, 255, 255)),
        strokes("L", 255),
        strokes("RGB", (0, 0, 0)),
        strokes("RGB", (220, 20, 20)),
        with_alpha(Image.fromarray(RIGHT), RIGHT),
        with_alpha(COLOURS, 255 - RIGHT),
        with_alpha(PHOTO, 255 - RIGHT),
        with_alpha(Image.new("RGB", (8, 8), (40, 80, 220)), 255 - RIGHT),
        palette_mask(),
    ],
    ids=[
        "grey",
        "RGB",
        "black and white",
        "float",
        "16 bits",
        "white strokes",
        "grey and alpha",
        "black strokes",
        "red strokes",
        "painted and transparent",
        "mask editor",
        "mask editor, grey photo",
        "mask editor, one colour",
        "palette",
    ],
)
def test_masks_of_every_kind_mean_the_same(mask):
    """What is inpainted is the photo, but for the editor's mask of an image of one colour."""
    image = PHOTO
    if mask.mode == "RGBA" and mask.getpixel((0, 0)) == (40, 80, 220, 255):
        image = Image.new("RGB", (8, 8), (40, 80, 220))
    assert np.array_equal(np.asarray(mask_levels(mask, image)), RIGHT)


def test_a_mask_that_varies_in_both_is_luminance_times_opacity():
    grey = Image.fromarray(np.array([[0, 100, 200, 255]], np.uint8))
    mask = with_alpha(grey, np.array([[255, 255, 128, 0]], np.uint8))
    with pytest.warns(UserWarning, match="what is white and opaque in it is generated"):
        assert np.asarray(mask_levels(mask)).tolist() == [[0, 100, 100, 0]]


def test_a_mask_of_even_transparency_is_its_luminance():
    mask = with_alpha(Image.fromarray(RIGHT), np.full((8, 8), 128, np.uint8))
    assert np.array_equal(np.asarray(mask_levels(mask)), RIGHT)


def test_a_wholly_transparent_mask_is_rejected():
    with pytest.raises(ValueError, match="completely transparent"):
        to_mask(with_alpha(PHOTO, np.zeros((8, 8), np.uint8)))


@pytest.mark.parametrize("where", ["rows", "flags"])
def test_a_mask_is_looked_at_before_anything_is_generated(tmp_path, monkeypatch, capsys, where):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("start.png")
    Image.new("RGBA", (32, 32)).save("clear.png")
    command = ["generate", "--steps", "1", "--device", "cpu", "-o", "out"]
    if where == "rows":
        (tmp_path / "p.csv").write_text(
            "prompt,input_image,inpaint_mask\na,,\nb,start.png,clear.png\n"
        )
        command += ["--prompts", "p.csv"]
    else:
        command += ["a", "--input-image", "start.png", "--inpaint-mask", "clear.png"]
    assert main(command) == 1
    assert "completely transparent" in capsys.readouterr().err and not (tmp_path / "out").exists()


def cut_out(file, hidden):
    image = Image.new("RGBA", (32, 32), (*hidden, 0))
    ImageDraw.Draw(image).ellipse((8, 8, 24, 24), fill=(200, 20, 20, 255))
    image.save(file)


@pytest.mark.parametrize(
    "background, colour", [("white", 255), ("black", 0), ("#808080", 128), ("grey", 128)]
)
def test_cut_outs_are_trained_on_the_colour_that_was_asked_for(tmp_path, background, colour):
    """Files that every viewer shows alike, whatever colour lies hidden under them."""
    rows = ["file_name,text"]
    for number, hidden in enumerate([(255, 0, 255), (0, 0, 0), (255, 255, 255)]):
        cut_out(tmp_path / f"{number}.png", hidden)
        rows.append(f"{number}.png,a circle")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    examples = read_examples(tmp_path, None, 32 * 32, 16)
    batches = Batches(examples, {"a circle": None}, config(tmp_path, background=background), 16)
    images = torch.cat([batches[number].images for number in range(2)])
    levels = ((images + 1) * 127.5).round()
    assert set(levels[:, :, 0, 0].flatten().tolist()) == {colour}
    assert levels[0, :, 16, 16].tolist() == [200, 20, 20]


def test_half_transparent_pixels_are_mixed_with_the_background(tmp_path):
    Image.new("RGBA", (2, 2), (100, 0, 0, 128)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (177, 127, 127)
    assert read_image(tmp_path / "a.png", "black").getpixel((0, 0)) == (50, 0, 0)
    assert read_image(tmp_path / "a.png", None).getpixel((0, 0)) == (100, 0, 0, 128)


def test_transparent_parts_of_an_image_given_in_python_are_white():
    assert to_pixels(Image.new("RGBA", (1, 1), (255, 0, 255, 0))).flatten().tolist() == [1, 1, 1]


def test_a_background_that_is_no_colour_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="background is 'clear'; expected a colour"):
        config(tmp_path, background="clear")


# EXIF


def ifd(*entries, extra=b""):
    """An EXIF block of these (tag, type, count, four bytes of value)."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    count = struct.pack("<H", len(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + count + body + bytes(4) + extra


ORIENTATION_6 = (0x0112, 3, 1, struct.pack("<I", 6))


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, 7, 9, 10, 11, 12, 13, 99])
@pytest.mark.parametrize("tag", [0x010F, 0x0128, 0x011A, 0x8769, 0x8825, 0x9003, 0xA005])
def test_exif_tags_of_any_type_do_not_keep_an_image_from_being_read(tmp_path, tag, kind):
    exif = ifd(ORIENTATION_6, (tag, kind, 1, struct.pack("<I", 38)), extra=b"\1\0\0\0\1\0\0\0")
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size in ((2, 4), (4, 2))


@pytest.mark.parametrize("value", [0, 9, 2**31, 65535])
def test_an_orientation_that_is_none_leaves_the_image_as_it_is(tmp_path, value):
    exif = ifd((0x0112, 4, 1, struct.pack("<I", value)))
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (4, 2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_images_are_turned_upright_as_pillow_does(tmp_path, kind, orientation):
    from PIL import ImageOps

    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a", kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(tmp_path / "a") as opened:
        expected = ImageOps.exif_transpose(opened)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a")), np.asarray(expected))
    assert check_image(tmp_path / "a") == expected.size[::-1]


# Numbers


@pytest.mark.parametrize(
    "levels, expected",
    [
        (np.full((2, 2), 0.8, np.float32), 204),
        (np.full((2, 2), 30000, np.uint16), 117),
        (np.full((2, 2), True), 255),
    ],
    ids=["float", "16 bits", "1 bit"],
)
def test_tiffs_of_any_depth_are_read_as_they_look(tmp_path, levels, expected):
    Image.fromarray(levels).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").convert("RGB").getpixel((0, 0)) == (expected,) * 3
    mean = float(to_mask(read_image(tmp_path / "a.tif")).mean())
    assert mean == pytest.approx(expected / 255)


@pytest.mark.parametrize(
    "levels",
    [
        np.full((2, 2), 1.5, np.float32),
        np.full((2, 2), -0.1, np.float32),
        np.full((2, 2), np.nan, np.float32),
        np.full((2, 2), np.inf, np.float32),
        np.full((2, 2), 70000, np.int32),
    ],
    ids=["above 1", "below 0", "NaN", "infinite", "32 bits"],
)
def test_numbers_without_a_known_white_are_rejected(tmp_path, levels):
    Image.fromarray(levels).save(tmp_path / "a.tif")
    for read in (read_image, check_image):
        with pytest.raises(ValueError, match="a.tif is not a readable image: its values"):
            read(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F"])
def test_every_mode_becomes_eight_bits(mode):
    image = Image.fromarray((np.asarray(PHOTO) / 255).astype(np.float32)) if mode == "F" else None
    image = image or Image.new("RGBA", (2, 2), (9, 9, 9, 99)).convert(mode)
    assert eight_bits(image).mode in ("L", "LA", "RGB", "RGBA")


# Size


def png_of_zeros(width, height, mode=2, *chunks):
    """A small file of a large black image."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    row = bytes(1 + width * (3 if mode == 2 else 1))
    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_sizes_that_the_models_generate_are_read_without_a_word(tmp_path, recwarn):
    (tmp_path / "a.png").write_bytes(png_of_zeros(10240, 10240, 0))
    assert check_image(tmp_path / "a.png") == (10240, 10240)
    assert not recwarn.list and Image.MAX_IMAGE_PIXELS, "Pillow's own limit is as it was"


def test_an_image_of_more_pixels_than_memory_is_rejected(tmp_path):
    header = png_of_zeros(1, 1)
    file = tmp_path / "a.png"
    file.write_bytes(header[:16] + struct.pack(">II", 60000, 60000) + header[24:])
    with pytest.raises(ValueError, match="a.png is not a readable image"):
        read_image(file)
    with pytest.raises(ValueError, match="was not generated by l2p"):
        is_generated(file, {})


@pytest.mark.slow
def test_images_are_checked_one_at_a_time_where_they_are_large(tmp_path):
    """Three images of 240 MB each, decoded, where 250 MB may be held."""
    rows, content = ["file_name,text"], png_of_zeros(8000, 7500)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(content)
        rows.append(f"{number}.png,black")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from comfyui_l2p.l2p_core import images\n"
        "from comfyui_l2p.l2p_core.train import dataset as data\n"
        "data.MAX_DECODED_BYTES = images.MAX_DECODED_BYTES = 250_000_000\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak(); data.read_examples(Path(sys.argv[1]), None, 9216, 16)\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 400, "MB; each by itself, not several at once"


# What is torn, or something else


def test_a_torn_image_at_the_output_is_generated_again(tmp_path):
    file, said = tmp_path / "a.png", {"seed": 1}
    save_image(COLOURS.resize((64, 64)), file, said)
    whole = file.read_bytes()
    assert is_generated(file, said)
    for torn in (whole[: len(whole) * 6 // 10], whole[:-12], whole[:-20] + bytes(20)):
        file.write_bytes(torn)
        with pytest.warns(UserWarning, match="a.png is torn and is generated again"):
            assert not is_generated(file, said)
        with pytest.raises(ValueError, match="generated with other settings"):
            is_generated(file, {"seed": 2})


def test_a_torn_image_does_not_end_a_run(tmp_path):
    out = tmp_path / "out.png"
    command = ["generate", "a large red circle on a blue background, left", "--steps", "1"]
    command += ["--device", "cpu", "-o", str(out)]
    assert main(command) == 0
    whole = Image.open(out).convert("RGB")
    out.write_bytes(out.read_bytes()[:-500])
    assert main(command) == 0
    assert Image.open(out).convert("RGB").tobytes() == whole.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "PPM"])
def test_a_truncated_image_is_named(tmp_path, kind):
    stream = io.BytesIO()
    try:
        COLOURS.resize((96, 96)).save(stream, kind)
    except KeyError:
        pytest.skip(f"this Pillow has no {kind}")
    content = stream.getvalue()
    (tmp_path / "metadata.csv").write_text("file_name,text\na,x\n")
    (tmp_path / "a").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match="row 1: a: .* is not a readable image: "):
        read_examples(tmp_path, None, 96 * 96, 16)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (bytes(999), "nothing but zeros"),
        (b"%!PS-Adobe", "a PostScript program"),
        (b"\0\x05\x16\x07" + bytes(99), "macOS"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, said):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.png is not a readable image: .*{said}"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "on_disk, named",
    [
        ("e\u0301.png", "\u00e9.png"),
        ("\u00e9.png", "e\u0301.png"),
        ("sub/a.png", "sub\\a.png"),
        ("images/sub/a.png", "sub\\a.png"),
    ],
)
def test_names_of_other_systems_find_their_file(tmp_path, on_disk, named):
    file = tmp_path / on_disk
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")
    found = find_named(tmp_path, named)
    assert found is not None and found.samefile(file)
    assert find_named(tmp_path, "b\0") is None and find_named(tmp_path, "b" * 5000) is None

"""The data room: whatever --data points at is read right, or left out and named, or stops the start with a line."""

import functools
import gzip
import io
import itertools
import json
import os
import shutil
import signal
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import flip_bits, in_child, make_pictures, picture, real_data
from PIL import Image, ImageOps
from torchvision.transforms import v2 as T

import dcgan


def in_bytes(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image, nc=3):
    return T.functional.pil_to_tensor(image.convert("RGB" if nc == 3 else "L"))


def apart(a, b):
    """-> the largest difference of two uint8 pictures, in levels."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.int() - b.int()).abs().max().item()


@pytest.fixture
def config(tmp_path):
    """-> a maker of Configs for data alone, with a cache of their own: config(data, nc=1)."""

    def make(data, **overrides):
        options = dict(image_size=16, workers=0, cache=str(tmp_path / "cache"), max_bad=0.0)
        return dcgan.config(data=os.fspath(data), **{**options, **overrides})

    return make


def names_left_out(c):
    index = Path(c.cache) / f"{dcgan.Pictures(c).key}.json"
    return [line.split(":")[0] for line in json.loads(index.read_text())["left_out"]]


def decode(data, nc, image_size=256):
    """Bytes -> (nc, H, W) uint8 as dcgan.py reads them, before they are made to fit."""
    c = dcgan.config(nc=nc, image_size=image_size)
    with Image.open(io.BytesIO(data), formats=dcgan.FORMATS) as image:
        return T.functional.pil_to_tensor(dcgan.decode(image, c))


def fitted(image, size, how):
    return T.functional.pil_to_tensor(dcgan.fit_picture(image, dcgan.config(image_size=size, fit=how)))


# ---------------------------------------------------------------------------------------- folders


def test_a_flat_folder_is_read_in_the_order_of_its_names(tmp_path, config):
    paths = make_pictures(tmp_path / "p", 5, size=(16, 16))
    x = dcgan.load_pictures(config(tmp_path / "p"))
    assert (x.shape, x.dtype) == ((5, 3, 16, 16), torch.uint8)
    for row, path in zip(x, paths, strict=True):
        assert torch.equal(row, pixels(Image.open(path)))


def test_a_nested_folder_is_read_whole_and_other_files_do_not_count(tmp_path, config):
    deep = tmp_path / "celeb_dataset" / "img_align_celeba" / "img_align_celeba"
    make_pictures(deep, 3, ".jpg")
    make_pictures(tmp_path / "celeb_dataset" / "more", 2, ".PNG")
    (deep.parent / "list_attr_celeba.csv").write_text("image_id,Smiling\n")
    (deep / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (deep / "._0000.jpg").write_bytes(b"\0\5\26\7")  # what a Mac leaves beside each file
    (deep / "noextension").write_bytes(b"x")
    assert len(dcgan.load_pictures(config(tmp_path / "celeb_dataset"))) == 5


@pytest.mark.parametrize(
    "suffix", [".jpg", ".jpeg", ".JPG", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"]
)
def test_every_suffix_is_a_picture(suffix, tmp_path, config):
    make_pictures(tmp_path / "p", 1, suffix, size=(16, 16))
    x = dcgan.load_pictures(config(tmp_path / "p"))
    expected = pixels(Image.open(next((tmp_path / "p").iterdir())))
    assert apart(x[0], expected) <= 2  # JPEG: two decoders


def test_links_that_loop_are_followed_once(tmp_path, config):
    make_pictures(tmp_path / "p" / "inner", 2)
    (tmp_path / "p" / "inner" / "up").symlink_to(tmp_path / "p")
    (tmp_path / "p" / "self").symlink_to(tmp_path / "p")
    assert len(dcgan.load_pictures(config(tmp_path / "p"))) == 2


def test_links_to_nothing_are_pictures_that_cannot_be_read(tmp_path, config):
    """As where a disk is not mounted, or git-annex has not fetched."""
    make_pictures(tmp_path / "p", 2)
    (tmp_path / "p" / "a.jpg").symlink_to(tmp_path / "p" / "b.jpg")  # a loop of two files
    (tmp_path / "p" / "b.jpg").symlink_to(tmp_path / "p" / "a.jpg")
    (tmp_path / "p" / "c.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (tmp_path / "p" / "list.txt").symlink_to(tmp_path / "elsewhere.txt")
    c = config(tmp_path / "p", max_bad=0.6)
    assert len(dcgan.load_pictures(c)) == 2 and names_left_out(c) == ["a.jpg", "b.jpg", "c.jpg"]
    picture(3).save(tmp_path / "elsewhere.jpg")
    assert len(dcgan.load_pictures(c)) == 3  # another cache


def test_a_folder_that_is_a_link_is_followed(tmp_path, config):
    make_pictures(tmp_path / "elsewhere", 2)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "there").symlink_to(tmp_path / "elsewhere")
    assert len(dcgan.load_pictures(config(tmp_path / "p"))) == 2


def test_runs_among_the_pictures_are_left_out(tmp_path, config, monkeypatch):
    """--data . would learn from its own samples, once it goes on."""
    make_pictures(tmp_path, 9)
    monkeypatch.chdir(tmp_path)
    tiny = dict(image_size=16, ngf=4, ndf=4, batch_size=8, samples=4, steps=2)
    assert dcgan.train(dcgan.config("demo", data=".", cache="cache", run="runs/a", **tiny)) == 0
    assert (tmp_path / "runs" / "a" / "samples" / "real.png").exists()
    assert len(dcgan.load_pictures(config("."))) == 9


def test_a_folder_that_may_not_be_read_is_named(tmp_path, config, capsys, monkeypatch):
    make_pictures(tmp_path / "p", 2)
    make_pictures(tmp_path / "p" / "closed", 2)
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert len(dcgan.load_pictures(config(tmp_path / "p"))) == 2
    assert "closed" in capsys.readouterr().out


def test_what_is_no_plain_file_is_no_picture_whatever_its_name(tmp_path, config):
    make_pictures(tmp_path / "p", 2)
    os.mkfifo(tmp_path / "p" / "pipe.jpg")  # opening it would wait for ever
    make_pictures(tmp_path / "p" / "folder.jpg", 1)
    assert len(dcgan.load_pictures(config(tmp_path / "p"))) == 3


def test_names_that_are_not_utf8_are_read_and_named(tmp_path, config, capsys):
    make_pictures(tmp_path / "p", 2)
    os.rename(tmp_path / "p" / "0000.png", os.fsencode(tmp_path / "p") + b"/\xff\xfe.png")
    with open(os.fsencode(tmp_path / "p") + b"/\xe9.jpg", "wb") as file:
        file.write(b"not a picture")
    c = config(tmp_path / "p", max_bad=0.5)
    assert len(dcgan.load_pictures(c)) == 2
    assert len(names_left_out(c)) == 1
    assert ".jpg" in capsys.readouterr().out


def test_a_folder_whose_name_is_not_utf8_is_read(tmp_path, config, capsys):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    make_pictures(folder, 2)
    assert len(dcgan.load_pictures(config(folder))) == 2


@pytest.mark.parametrize("what", ["missing", "empty", "no pictures", "text file", "empty file"])
def test_what_holds_no_pictures_is_said_in_one_line(what, tmp_path, config):
    path = tmp_path / "p"
    if what in ("empty", "no pictures"):
        path.mkdir()
    if what == "no pictures":
        (path / "list.csv").write_text("a,b")
    if what == "text file":
        path.write_text("pictures")
    if what == "empty file":
        path.touch()
    with pytest.raises(dcgan.UserError) as e:
        dcgan.load_pictures(config(path))
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    expected = {"missing": "no such file", "empty": "found 0 other", "no pictures": "found 1 other"}
    assert expected.get(what, "zip") in str(e.value)


# ---------------------------------------------------------------------------------------- zip


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_hidden_pictures_and_those_of_hidden_folders_are_no_data(kind, tmp_path, config):
    """The trash of a disk, the copies of a notebook, what macOS writes beside a file."""
    hidden = (".Trash-1000/files/a.png", "x/.ipynb_checkpoints/b.png", "x/.c.png", "__MACOSX/._d.png", "..g/h.png")
    seen = ("x/e.png", "y.z/f.png")
    members = {name: in_bytes(picture(1)) for name in hidden + seen}
    archive = zipped(tmp_path / "p.zip", members)
    if kind == "folder":
        zipfile.ZipFile(archive).extractall(tmp_path / ".p")  # the folder that is named may be hidden itself
    found = dcgan.Pictures(config(archive if kind == "zip" else tmp_path / ".p")).names
    assert sorted(found) == sorted(seen)


def test_a_zip_is_read_without_unpacking(tmp_path, config):
    pictures = [picture(i, 16, 16) for i in range(4)]
    members = {f"img_align_celeba/img_align_celeba/{i}.png": in_bytes(p) for i, p in enumerate(pictures)}
    members |= {"list.csv": b"a,b", "img_align_celeba/": b"", "folder.jpg/": b""}
    members |= {"__MACOSX/img_align_celeba/._0.png": b"\0\5\26\7", ".DS_Store": b"x"}
    archive = zipped(tmp_path / "faces.zip", members)
    x = dcgan.load_pictures(config(archive))
    assert torch.equal(x, torch.stack([pixels(p) for p in pictures]))
    on_disk = [p for p in tmp_path.rglob("*") if p.suffix == ".png"]
    assert not on_disk


def test_paths_that_climb_out_of_a_zip_write_nothing(tmp_path, config):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    members = {"../../out.png": in_bytes(picture(1)), "/abs.png": in_bytes(picture(2)), "c.png": in_bytes(picture(3))}
    archive = zipped(inside / "climb.zip", members)
    assert len(dcgan.load_pictures(config(archive))) == 3  # only ever read
    assert not list(tmp_path.rglob("out.png")) and not Path("/abs.png").exists()


def test_a_bad_crc_in_a_zip_leaves_that_picture_out(tmp_path, config):
    archive = tmp_path / "faces.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for i in range(4):
            file.writestr(f"{i}.png", in_bytes(picture(i)))
    data = bytearray(archive.read_bytes())
    place = data.index(in_bytes(picture(2))) + 60  # in the compressed pixels of the third
    data[place] ^= 0xFF
    archive.write_bytes(data)
    c = config(archive, max_bad=0.3)
    assert len(dcgan.load_pictures(c)) == 3 and names_left_out(c) == ["2.png"]


def encrypted(archive):
    """Mark all members of a zip as encrypted: enough for a reader to ask for the password."""
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = data.find(signature)
        while place >= 0:
            data[place + offset] |= 1
            place = data.find(signature, place + 1)
    archive.write_bytes(data)
    return archive


def test_an_encrypted_zip_stops_the_start_and_says_why(tmp_path, config):
    archive = encrypted(zipped(tmp_path / "secret.zip", {f"{i}.png": in_bytes(picture(i)) for i in range(3)}))
    with pytest.raises(dcgan.UserError, match="cannot be read(.|\n)*0.png.*password"):
        dcgan.load_pictures(config(archive, max_bad=0.5))


def test_a_damaged_zip_is_one_line_or_some_pictures_but_no_traceback(tmp_path, config):
    whole = zipped(tmp_path / "w.zip", {f"{i}.png": in_bytes(picture(i)) for i in range(3)}).read_bytes()
    directory, path = whole.index(b"PK\1\2"), tmp_path / "d.zip"

    def damage():
        for seed in range(150):  # mostly where the names and offsets are
            path.write_bytes(whole[:directory] + flip_bits(whole[directory:], seed))
            try:
                pictures = dcgan.Pictures(config(path))
                [pictures[i] for i in range(len(pictures))]
            except (dcgan.UserError, OSError):
                pass

    assert in_child(damage)[0] == 0


def test_a_zip_of_other_things_says_what_was_looked_for(tmp_path, config):
    archive = zipped(tmp_path / "words.zip", {"a.txt": b"a", "b.csv": b"b"})
    with pytest.raises(dcgan.UserError, match=r"looked for .*\.jpg.*found 2 other"):
        dcgan.load_pictures(config(archive))


# ---------------------------------------------------------------------------------------- MNIST's idx files


def idx(n=6, h=28, w=28, seed=0):
    body = np.random.default_rng(seed).integers(0, 256, (n, h, w), np.uint8)
    return struct.pack(">IIII", 0x803, n, h, w) + body.tobytes(), torch.from_numpy(body)[:, None]


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images.idx3-ubyte"])
def test_idx_files_are_found_where_people_keep_them(gz, place, name, tmp_path, config):
    data, expected = idx()
    folder = tmp_path / "mnist_dir" / place
    folder.mkdir(parents=True)
    (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(data) if gz else data)
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(2)[0])  # the test pictures are not for training
    for path in (tmp_path / "mnist_dir", folder / (name + ".gz" * gz)):
        x = dcgan.load_pictures(config(path, preset="mnist", image_size=28))
        assert torch.equal(x, expected)


def test_an_idx_file_beside_a_folder_of_its_name_is_found(tmp_path):
    """As Kaggle's archive of MNIST unpacks."""
    (tmp_path / "train-images-idx3-ubyte").mkdir()
    (tmp_path / "train-images.idx3-ubyte").write_bytes(idx()[0])
    assert dcgan.find_idx(tmp_path) == tmp_path / "train-images.idx3-ubyte"


def test_a_damaged_gzip_is_one_line(tmp_path, config):
    data = bytearray(gzip.compress(idx()[0]))
    data[10:400] = b"\xff" * 390
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(dcgan.UserError, match="no whole idx file"):
        dcgan.load_pictures(config(tmp_path, preset="mnist", image_size=28))


def test_a_zip_whose_names_are_damaged_is_one_line(tmp_path, config):
    archive = zipped(tmp_path / "p.zip", {"\u00fc.png": b"x"})
    data = Path(archive or tmp_path / "p.zip").read_bytes().replace("\u00fc".encode(), b"\xff\xff")
    (tmp_path / "p.zip").write_bytes(data)
    with pytest.raises(dcgan.UserError, match="no folder, .zip"):
        dcgan.load_pictures(config(tmp_path / "p.zip"))


def test_idx_pictures_can_be_three_channels_and_another_size(tmp_path, config):
    data, expected = idx()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(data)
    x = dcgan.load_pictures(config(tmp_path, nc=3, image_size=28))
    assert torch.equal(x, expected.expand(-1, 3, -1, -1))
    assert dcgan.load_pictures(config(tmp_path, nc=3, image_size=32)).shape == (6, 3, 32, 32)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("lie", ["short", "long", "labels", "other kind", "cut", "empty", "huge", "none", "no gzip"])
def test_a_lying_idx_header_is_one_line_and_little_memory(lie, gz, tmp_path, config):
    data, _ = idx()
    data = {
        "short": struct.pack(">I", 0x803) + struct.pack(">I", 5) + data[8:],
        "long": struct.pack(">I", 0x803) + struct.pack(">I", 7) + data[8:],
        "labels": struct.pack(">II", 0x801, 6) + bytes(6),
        "other kind": struct.pack(">I", 0x903) + data[4:],  # all else fits: signed bytes
        "cut": data[:-100],
        "empty": b"",
        "huge": struct.pack(">IIII", 0x803, 0xFFFFFFFF, 0xFFFF, 0xFFFF) + data[16:],
        "none": struct.pack(">IIII", 0x803, 0, 28, 28),
        "no gzip": data,
    }[lie]
    if lie == "no gzip" and not gz:
        data = gzip.compress(data)
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * gz)
    path.write_bytes(gzip.compress(data) if gz and lie != "no gzip" else data)

    def read():
        with pytest.raises(dcgan.UserError, match="idx file") as e:
            dcgan.load_pictures(config(path, preset="mnist", image_size=28))
        assert str(path) in str(e.value) and "\n" not in str(e.value) and "fetch it again" in str(e.value)
        assert lie != "long" or f"7 x 28 x 28 bytes, {6 * 28 * 28:,} read" in str(e.value)

    code, grown = in_child(read)
    assert code == 0 and grown < 100


def test_an_idx_file_that_unpacks_to_gigabytes_is_no_danger_to_memory(tmp_path, config):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    header = struct.pack(">IIII", 0x803, 6, 28, 28)
    path.write_bytes(gzip.compress(header + bytes(100_000_000), 1))  # 0.4 MB that say 4,704 bytes

    def read():
        with pytest.raises(dcgan.UserError):
            dcgan.read_idx(path)

    code, grown = in_child(read)
    assert code == 0 and grown < 50


def test_the_real_mnist_is_read(config):
    pictures = dcgan.Pictures(config(real_data("mnist"), preset="mnist", image_size=28))
    assert len(pictures) == 60000
    assert [sum(pictures[i]) for i in (0, 1)] == [27525, 31095]  # the ink of the first 5 and the first 0
    assert len(pictures[59999]) == 28 * 28


# ---------------------------------------------------------------------------------------- drawn faces


def test_a_drawn_face_follows_from_its_seed():
    a, b, other = dcgan.draw_face(5, 32), dcgan.draw_face(5, 32), dcgan.draw_face(6, 32)
    assert (a.size, a.mode) == ((32, 32), "RGB")
    assert a.tobytes() == b.tobytes() != other.tobytes()


def test_drawn_faces_vary_in_every_part():
    x = torch.stack([pixels(dcgan.draw_face(i, 32)) for i in range(200)]).float()
    assert x.std(0).mean() > 40  # levels: what an average face would not have
    assert x.flatten(1).unique(dim=0).shape[0] == 200
    places = {"sky": (2, 2), "hair": (6, 16), "eye": (16, 12), "mouth": (25, 16)}
    for name, (row, column) in places.items():
        colours = x[:, :, row, column] // 32
        assert colours.unique(dim=0).shape[0] > 10, name
    nose = [tuple(face[:, 19, 16].int().tolist()) for face in x]  # where nothing is drawn over the skin
    assert sum(nose.count(colour) > 9 for colour in set(nose)) == 6


def test_no_data_means_drawn_faces_of_the_presets_own_shape(config, few_drawn):
    x = dcgan.load_pictures(config("", preset="mnist", image_size=28))
    assert x.shape == (64, 1, 28, 28)
    y = dcgan.load_pictures(config("", image_size=16))
    assert torch.equal(y[3], pixels(dcgan.draw_face(3, 16)))


# ---------------------------------------------------------------------------------------- odd pictures


def grey_ramp():
    return np.linspace(0, 255, 20 * 24).reshape(24, 20)


def odd_pictures():
    """-> {name: (bytes, what its pixels are, as a Pillow RGB picture, and how far off by rounding they may be)}."""
    rgb, grey = picture(1), picture(2, mode="L")
    ramp = Image.fromarray(grey_ramp().round().astype(np.uint8))
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 20).astype(np.uint8), (24, 1)))
    over_white = lambda p: Image.alpha_composite(Image.new("RGBA", p.size, "white"), p.convert("RGBA"))  # noqa: E731
    rgba, la = rgb.copy(), grey.copy()
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    palette = rgb.quantize(16)
    bits = grey.convert("1")
    cmyk = rgb.convert("CMYK")
    lab = Image.merge("LAB", [grey, *Image.new("RGB", (20, 24), (140, 120, 0)).split()[:2]])
    sixteen = Image.fromarray((grey_ramp() * 257).astype(np.uint16))
    found = {
        "L.png": (in_bytes(grey), grey, 0),
        "L.jpg": (in_bytes(grey, "JPEG"), Image.open(io.BytesIO(in_bytes(grey, "JPEG"))), 1),
        "1.png": (in_bytes(bits), bits, 0),
        "P.png": (in_bytes(palette), palette, 0),
        "P.gif": (in_bytes(palette, "GIF"), palette, 0),
        "RGBA.png": (in_bytes(rgba), over_white(rgba), 1),
        "LA.png": (in_bytes(la), over_white(la), 1),
        "I;16.png": (in_bytes(sixteen), ramp, 1),
        "I;16 dim.png": (
            in_bytes(Image.fromarray((grey_ramp() * 128.5).astype(np.uint16))),
            ramp.point(lambda v: v / 2),
            1,
        ),
        "I;16.tif": (in_bytes(sixteen, "TIFF"), ramp, 1),
        "I.tif": (in_bytes(Image.fromarray((grey_ramp() * 257).astype(np.int32)), "TIFF"), ramp, 1),
        "F.tif": (in_bytes(Image.fromarray((grey_ramp() / 255).astype(np.float32)), "TIFF"), ramp, 1),
        "F255.tif": (in_bytes(Image.fromarray(grey_ramp().astype(np.float32)), "TIFF"), ramp, 1),
        "CMYK.jpg": (in_bytes(cmyk, "JPEG", quality=100), cmyk, 40),  # its chroma is at half the size
        "CMYK as Pillow.jpg": (in_bytes(cmyk, "JPEG"), Image.open(io.BytesIO(in_bytes(cmyk, "JPEG"))), 0),
        "CMYK.tif": (in_bytes(cmyk, "TIFF"), cmyk, 0),
        "LAB.tif": (in_bytes(lab, "TIFF"), Image.open(io.BytesIO(in_bytes(lab, "TIFF"))).convert("RGB"), 0),
        "lossless.webp": (in_bytes(rgb, "WEBP", lossless=True), rgb, 0),
        "progressive.jpg": (in_bytes(rgb, "JPEG", progressive=True, quality=100, subsampling=0), rgb, 6),
        "interlaced.png": (in_bytes(rgb), rgb, 0),
        "png named.jpg": (in_bytes(rgb), rgb, 0),
        "1x1.png": (in_bytes(Image.new("RGB", (1, 1), (9, 80, 200))), Image.new("RGB", (1, 1), (9, 80, 200)), 0),
        "strip.png": (in_bytes(picture(3, 20000, 10)), picture(3, 20000, 10), 0),
    }
    see_through = palette.copy()
    see_through.info["transparency"] = 3
    data = in_bytes(see_through, transparency=3)
    found["P transparent.png"] = (data, over_white(Image.open(io.BytesIO(data))), 1)
    keyed = in_bytes(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3))
    found["RGB transparent.png"] = (keyed, Image.new("RGB", (8, 8), "white"), 0)
    frames = [picture(i).quantize(32) for i in (4, 5)]
    found["animated.gif"] = (in_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]), frames[0], 0)
    frames = [picture(i) for i in (4, 5)]
    moving = in_bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    found["animated.webp"] = (moving, frames[0], 0)
    found["animated.png"] = (in_bytes(frames[0], save_all=True, append_images=frames[1:]), frames[0], 0)
    deep = np.stack([grey_ramp(), grey_ramp().T.reshape(24, 20), 255 - grey_ramp()], -1)
    found["16 bit RGB.png"] = (png16(deep), Image.fromarray(deep.round().astype(np.uint8)), 1)
    return found


def png16(rgb):
    """(H, W, 3) of 0..255 -> a PNG of 16 bits a channel, which Pillow cannot write."""
    h, w, _ = rgb.shape
    rows = (rgb * 257).round().astype(">u2").reshape(h, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    return png_of(struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0), raw)


def png_of(header, raw):
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


ODD = odd_pictures()


@pytest.mark.parametrize("nc", [3, 1])
@pytest.mark.parametrize("name", ODD)
def test_every_colour_mode_and_odd_picture_is_read_right(name, nc):
    data, expected, rounding = ODD[name]
    x = decode(data, nc)
    assert x.dtype == torch.uint8
    # grey is not taken of a grey picture twice: L stays L
    assert apart(x, pixels(expected, nc)) <= rounding + (nc == 1)


def test_what_is_no_number_in_a_picture_is_black():
    x = np.array([[0.0, 1.0], [np.nan, np.inf]], np.float32)
    assert decode(in_bytes(Image.fromarray(x), "TIFF"), nc=1).tolist() == [[[0, 255], [0, 0]]]


@pytest.mark.parametrize("nc", [3, 1])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright_whatever_the_camera_noted(orientation, format, nc):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"JPEG": dict(quality=100, subsampling=0), "WEBP": dict(lossless=True)}.get(format, {})
    data = in_bytes(picture(7), format, exif=exif, **lossless)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((24, 20) if orientation > 4 else (20, 24))
    assert apart(decode(data, nc), pixels(upright, nc)) <= 2


def test_a_sound_picture_with_a_damaged_note_of_the_camera_is_read():
    image, exif = picture(7), b"Exif\0\0garbage, and no TIFF header"
    data = in_bytes(image, "JPEG", quality=100, subsampling=0, exif=exif, dpi=(72, 72))
    assert apart(decode(data, 3), pixels(image)) <= 9


def test_large_photographs_of_phones_are_decoded_small(tmp_path, config, monkeypatch):
    """MPO: a JPEG with more frames behind it."""
    image = Image.new("RGB", (640, 640), "red")
    image.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[image])
    sizes = []
    plain = ImageOps.exif_transpose
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda x: (sizes.append(x.size), plain(x))[1])
    dcgan.load_pictures(config(tmp_path))
    assert sizes == [(80, 80)]


def bad_pictures():
    jpeg, png = in_bytes(picture(1, 64, 64), "JPEG"), in_bytes(picture(1, 64, 64))
    on_its_side = Image.Exif()
    on_its_side[0x0112] = 6
    turned = in_bytes(picture(1, 64, 64), "JPEG", exif=on_its_side)
    return {
        "cut and turned.jpg": turned[: len(turned) // 2],
        "empty.jpg": b"",
        "a.jxl": b"\xff\x0a" + bytes(900),
        "a.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(900),
        "text.jpg": b"this is no picture\n" * 9,
        "html.png": b"<!DOCTYPE html><title>404</title>",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut with end.jpg": jpeg[: len(jpeg) // 3],
        "header only.jpg": jpeg[:200],
        "cut.png": png[: len(png) // 2],
        "cut.gif": in_bytes(picture(1, 64, 64), "GIF")[:900],
        "cut.webp": in_bytes(picture(1, 64, 64), "WEBP")[:300],
        "cut.bmp": in_bytes(picture(1, 64, 64), "BMP")[:5000],
        "zeros.jpg": bytes(5000),
        "crc.png": png[:100] + bytes(8) + png[108:],
        "PHONE.HEIC": b"\0\0\0\x18ftypheic" + bytes(900),  # pictures, but of kinds that are not read
        "page.avif": b"\0\0\0\x18ftypavif" + bytes(900),
    }


@pytest.mark.parametrize("name", bad_pictures())
def test_a_bad_picture_is_left_out_and_named(name, tmp_path, config, capsys):
    make_pictures(tmp_path / "p", 3)
    (tmp_path / "p" / name).write_bytes(bad_pictures()[name])
    c = config(tmp_path / "p", max_bad=0.3)
    x = dcgan.load_pictures(c)
    assert len(x) == 3 and names_left_out(c) == [name]
    assert f"{name}: " in capsys.readouterr().out


def test_a_member_of_a_zip_too_large_for_any_picture_is_not_unpacked(tmp_path, config, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 3,000 bytes
    archive = zipped(tmp_path / "p.zip", {"a.png": in_bytes(picture(1)), "b.jpg": bytes(3001)})
    pictures = dcgan.Pictures(config(archive))
    assert isinstance(pictures[0], bytes) and "3,001 bytes; 3,000 are allowed" in pictures[1]


def test_each_process_drops_its_own(tiny, monkeypatch):
    c, drawn = tiny("mnist"), []
    pictures = dcgan.load_pictures(c)
    monkeypatch.setattr(dcgan, "WORLD", 2)
    for rank in (0, 1, 0):
        monkeypatch.setattr(dcgan, "RANK", rank)
        dcgan.draw_inputs(c, pictures, 3, torch.device("cpu"))
        drawn.append(torch.rand(8))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("name, kind, folder", [("celeba", "CelebA", "celeb_dataset"), ("mnist", "MNIST", "mnist_dir")])
def test_a_download_goes_through_torchvision_into_its_folder(name, kind, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.datasets, kind, lambda root, download: asked.append((root, download)))
    assert dcgan.download(name, "") == folder and dcgan.download(name, "x") == "x"
    assert asked == [(folder, True), ("x", True)] and Path(folder).is_dir() and Path("x").is_dir()


@functools.cache
def bombs():
    """Files of some bytes that claim to be huge."""
    png = png_of(struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0), bytes(100))
    jpeg = bytearray(in_bytes(picture(1), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    gif = bytearray(in_bytes(picture(1), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    bmp = bytearray(in_bytes(picture(1), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    large = Image.new("1", (12_000, 10_000))  # whole; Pillow alone would only warn
    return {"b.png": png, "b.jpg": bytes(jpeg), "b.gif": bytes(gif), "b.bmp": bytes(bmp), "whole.png": in_bytes(large)}


@pytest.mark.parametrize("name", bombs())
def test_a_picture_that_claims_to_be_huge_is_refused_before_memory_is_spent(tmp_path, config, name):
    (tmp_path / name).write_bytes(bombs()[name])
    pictures = dcgan.Pictures(config(tmp_path))

    def read():
        assert "ecompression" in pictures[0] and name in pictures[0]

    code, grown = in_child(read)
    assert code == 0 and grown < 60


def test_a_file_too_large_for_any_picture_is_not_even_read(tmp_path, config, monkeypatch):
    make_pictures(tmp_path / "p", 1)
    with open(tmp_path / "p" / "huge.jpg", "wb") as file:
        file.truncate(400_000_000)  # of nothing, on a file system that keeps none of it
    c = config(tmp_path / "p", max_bad=0.5)

    def load():
        assert len(dcgan.load_pictures(c)) == 1

    code, grown = in_child(load)
    assert code == 0 and grown < 60


def test_a_picture_file_never_starts_another_program(tmp_path, config, monkeypatch):
    """Pillow would hand EPS to Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 moveto\nshowpage\n%%EOF\n"
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.jpg").write_bytes(eps)
    for data in (tmp_path / "p", zipped(tmp_path / "p.zip", {"x.jpg": eps})):
        assert isinstance(dcgan.Pictures(config(data))[0], str)
    assert not started


def test_damaged_bytes_give_a_picture_or_an_exception_but_no_crash():
    sources = []
    for format, options in (("JPEG", {}), ("PNG", {}), ("GIF", {}), ("WEBP", {}), ("BMP", {}), ("TIFF", {})):
        sources.append(in_bytes(picture(1, 40, 40), format, **options))
    sources.append(in_bytes(picture(1, 40, 40), "JPEG", progressive=True))
    sources.append(in_bytes(picture(1, 40, 40), "TIFF", compression="tiff_lzw"))

    def damage():
        good = 0
        for seed in range(480):
            data = flip_bits(sources[seed % len(sources)], seed)
            try:
                x = decode(data, 3)
            except Exception:  # noqa: S112 - this is what we ask for
                continue
            assert x.dtype == torch.uint8 and x.shape[0] == 3
            good += 1
        assert good > 50  # or the damage is such that nothing is tested

    code, grown = in_child(damage)
    assert code == 0 and grown < 1500


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    """Pillow's draft mode: an eighth, a quarter or half the size, but never below what is asked for."""
    for (w, h), size, expected in [
        ((400, 300), 64, (100, 75)),
        ((178, 218), 64, (89, 109)),
        ((100, 90), 64, (100, 90)),
    ]:
        smooth = Image.fromarray(np.linspace(0, 255, w * h * 3).reshape(h, w, 3).astype(np.uint8))
        x = decode(in_bytes(smooth, "JPEG", quality=95), 3, size)
        assert (x.shape[2], x.shape[1]) == expected
        difference = fitted(T.functional.to_pil_image(x), size, "crop").int() - fitted(smooth, size, "crop").int()
        assert difference.abs().float().mean() < 2


# ---------------------------------------------------------------------------------------- fitting


@pytest.mark.parametrize("shape", [(178, 218), (218, 178), (64, 64), (31, 30), (640, 480), (200, 40)])
@pytest.mark.parametrize("size", [28, 32, 64])
def test_crop_is_resize_and_centre_crop(shape, size):
    """As the PyTorch example does, to a fraction of a pixel: it rounds the resized length, this cuts first."""
    w, h = shape
    y, x = np.mgrid[0:h, 0:w]
    smooth = Image.fromarray(np.stack([x * 255 / w, y * 255 / h, (x + y) * 255 / (w + h)], -1).astype(np.uint8))
    expected = pixels(T.CenterCrop(size)(T.Resize(size)(smooth)))
    assert apart(fitted(smooth, size, "crop"), expected) <= 2 + 255 / min(shape) + 255 / size / 2


@pytest.mark.parametrize("shape", [(178, 218), (64, 64), (640, 480), (7, 300)])
def test_squash_uses_the_whole_picture(shape):
    source = picture(3, *shape)
    expected = T.functional.resize(pixels(source), [32, 32], antialias=True)
    assert apart(fitted(source, 32, "squash"), expected) <= 1


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (20000, 10), (10, 20000), (1, 100_000), (8, 1), (9, 1)])
def test_any_shape_fits(shape, fit):
    y = fitted(Image.new("RGB", shape, (77, 77, 77)), 64, fit)
    assert y.shape == (3, 64, 64) and (y == 77).all()


def test_a_strip_takes_no_more_memory_than_a_picture():
    """Its shorter side brought to 64 first, this one would be a gigabyte."""
    code, grown = in_child(lambda: fitted(Image.new("RGB", (100_000, 1)), 64, "crop"))
    assert code == 0 and grown < 100


def test_a_strip_is_cut_around_its_centre():
    strip = Image.new("RGB", (4096, 16))
    strip.paste((200, 200, 200), (2048 - 8, 0, 2048 + 8, 16))  # exactly what a centre crop of a 16-row strip keeps
    assert (fitted(strip, 16, "crop") == 200).all()


def test_real_faces_are_cut_as_the_pytorch_example_does(config):
    archive = real_data("celeba4k_178x218.zip")
    pictures = dcgan.Pictures(config(archive, image_size=64))
    assert len(pictures) == 4000
    with zipfile.ZipFile(archive) as file:
        for i in (0, 1999, 3999):
            source = Image.open(io.BytesIO(file.read(pictures.names[i])))
            expected = pixels(T.CenterCrop(64)(T.Resize(64)(source))).float()
            x = torch.frombuffer(bytearray(pictures[i]), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1)
            assert (x.float() - expected).abs().mean() < 2.5


# ---------------------------------------------------------------------------------------- bad pictures


def test_more_bad_pictures_than_max_bad_stop_the_start_with_the_list(tmp_path, config):
    make_pictures(tmp_path / "p", 8)
    for name in ("x.jpg", "y.jpg"):
        (tmp_path / "p" / name).write_bytes(b"no picture")
    with pytest.raises(dcgan.UserError, match=r"--max-bad(.|\n)*x\.jpg(.|\n)*y\.jpg") as e:
        dcgan.load_pictures(config(tmp_path / "p", max_bad=0.1))
    index = Path(str(e.value).splitlines()[0].split("delete ")[1])  # a disk that could not be read for a moment
    assert index.name.endswith(".json") and "x.jpg" in index.read_text()
    assert len(dcgan.load_pictures(config(tmp_path / "p", max_bad=0.2))) == 8


def test_max_bad_holds_for_pictures_that_are_decoded_already(tmp_path, config):
    make_pictures(tmp_path / "p", 8)
    (tmp_path / "p" / "x.jpg").write_bytes(b"no picture")
    assert len(dcgan.load_pictures(config(tmp_path / "p", max_bad=0.5))) == 8
    with pytest.raises(dcgan.UserError, match=r"--max-bad(.|\n)*x\.jpg"):
        dcgan.load_pictures(config(tmp_path / "p", max_bad=0.01))


def test_no_readable_picture_at_all_stops_the_start(tmp_path, config):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(dcgan.UserError):
        dcgan.load_pictures(config(tmp_path / "p", max_bad=1.0))


# ---------------------------------------------------------------------------------------- the cache


@pytest.fixture
def nothing_opens(monkeypatch):
    """-> a switch: after it, to open, decode or draw a picture is an error."""

    def switch():
        def no(*_, **__):
            raise AssertionError("a picture was opened")

        for owner, name in (
            (dcgan, "decode"), (dcgan, "draw_face"), (dcgan, "read_idx"), (dcgan.Image, "open"),
            (Path, "read_bytes"), (zipfile, "ZipFile"), (dcgan.gzip, "open"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, no)

    return switch


@pytest.mark.parametrize("kind", ["folder", "zip", "idx", "drawn"])
def test_a_second_start_opens_no_picture(kind, tmp_path, config, nothing_opens, few_drawn):
    make_pictures(tmp_path / "p", 4)
    zipped(tmp_path / "p.zip", {"a.png": in_bytes(picture(1))})
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx()[0]))
    data = {"folder": tmp_path / "p", "zip": tmp_path / "p.zip", "idx": tmp_path, "drawn": ""}[kind]
    first = dcgan.load_pictures(config(data)).clone()
    nothing_opens()
    assert torch.equal(dcgan.load_pictures(config(data)), first)


def test_runs_share_the_cache_and_each_way_to_read_has_its_own(tmp_path, config):
    make_pictures(tmp_path / "p", 4)
    path = tmp_path / "p"
    keys = [dcgan.Pictures(c).key for c in (
        config(path), config(path, nc=1), config(path, fit="squash"), config(path, image_size=32),
        config(path, preset="mnist", image_size=28), config(""),
    )]  # fmt: skip
    assert len(set(keys)) == len(keys)
    same = [config(path, seed=3), config(path, nz=8, ngf=4), config(path, flips=True), config(path, batch_size=2)]
    assert {dcgan.Pictures(c).key for c in same} == {keys[0]}


@pytest.mark.parametrize("change", ["added", "removed", "changed", "renamed", "rewritten"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_the_cache_notices_a_change(change, kind, tmp_path, config):
    path = tmp_path / "p"
    make_pictures(path, 4)

    def data():
        if kind == "folder":
            return path
        zipped(tmp_path / "p.zip", {p.name: p.read_bytes() for p in sorted(path.iterdir())})
        return tmp_path / "p.zip"

    before = dcgan.load_pictures(config(data())).clone()
    if change == "added":
        make_pictures(path, 1, first=9)
    elif change == "removed":
        (path / "0003.png").unlink()
    elif change == "renamed":
        (path / "0000.png").rename(path / "zzzz.png")
    else:  # another picture, and rewritten: of the very same length in bytes
        new = picture(99)
        new.save(path / "0001.png")
        if change == "rewritten":
            (path / "0001.bmp").write_bytes(in_bytes(picture(98), "BMP"))
            before = dcgan.load_pictures(config(data())).clone()
            time.sleep(0.02)  # file systems count time in steps
            (path / "0001.bmp").write_bytes(in_bytes(picture(97), "BMP"))
    after = dcgan.load_pictures(config(data()))
    assert before.shape != after.shape or not torch.equal(before, after)
    assert len(after) == len(list(path.iterdir()))


def test_a_file_of_another_size_is_noticed_though_its_time_is_the_same(tmp_path, config):
    keys, file = set(), tmp_path / "pictures" / "0.png"
    file.parent.mkdir()
    for size in (20, 40):
        file.write_bytes(in_bytes(picture(1, size, size)))
        os.utime(file, (1, 1))
        keys.add(dcgan.Pictures(config(file.parent)).key)
    assert len(keys) == 2


def test_two_folders_alike_in_names_sizes_and_times_are_two(tmp_path, config):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "0.bmp"  # not compressed: each has the same length
        picture(seed).save(file)
        os.utime(file, (1, 1))  # as some archivers leave them
    a, b = (dcgan.load_pictures(config(tmp_path / name)) for name in "ab")
    assert not torch.equal(a, b)


@pytest.mark.parametrize("n, given, expected", [(511, -1, 0), (512, -1, 3), (512, 0, 0), (4, 2, 2)])
def test_many_pictures_are_decoded_by_a_process_for_each_core(n, given, expected, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5}, raising=False)
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *_, num_workers, **__: asked.append(num_workers) or [])
    dcgan.decode_all(range(n), dcgan.config(workers=given), tmp_path / "a", tmp_path / "b")
    assert asked == [expected]


def test_a_decoder_process_reads_what_the_main_process_reads(tmp_path, config):
    make_pictures(tmp_path / "p", 70)  # more than one batch of the loader
    (tmp_path / "p" / "0033.png").write_bytes(b"bad")
    one = config(tmp_path / "p", max_bad=0.1)
    two = config(tmp_path / "p", max_bad=0.1, workers=2, cache=str(tmp_path / "other"))
    assert torch.equal(dcgan.load_pictures(one), dcgan.load_pictures(two))
    assert names_left_out(one) == names_left_out(two) == ["0033.png"]


def test_decoder_processes_do_not_share_one_open_zip(tmp_path, config):
    """A file that is open before a fork has one position for all."""
    paths = make_pictures(tmp_path / "p", 300, size=(90, 90))
    archive = zipped(tmp_path / "p.zip", {path.name: path.read_bytes() for path in paths})
    zip_, folder = config(archive, workers=2), config(tmp_path / "p", cache=str(tmp_path / "other"))
    assert torch.equal(dcgan.load_pictures(zip_), dcgan.load_pictures(folder))


def test_a_half_built_cache_of_a_killed_build_is_built_again(tmp_path, config, monkeypatch):
    make_pictures(tmp_path / "p", 70)
    c, decode, count = config(tmp_path / "p"), dcgan.decode, [0]

    def die_at_66(picture, c):
        count[0] += 1
        if count[0] == 66:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(picture, c)

    with monkeypatch.context() as m:
        m.setattr(dcgan, "decode", die_at_66)
        assert in_child(lambda: dcgan.load_pictures(c))[0] == -signal.SIGKILL
    key = dcgan.Pictures(c).key
    assert not list(Path(c.cache).glob(f"{key}.*"))
    assert len(dcgan.load_pictures(c)) == 70
    assert sorted(p.name for p in Path(c.cache).iterdir()) == [
        ".lock",
        f"{key}.json",
        f"{key}.u8",
    ]  # nothing half built


def test_workers_that_cannot_begin_are_no_disk_that_cannot_be_written(tmp_path, config, monkeypatch):
    make_pictures(tmp_path / "p", 4)

    def no_process(_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", no_process)
    with pytest.raises(dcgan.UserError, match="--workers 0.*temporarily") as e:
        dcgan.load_pictures(config(tmp_path / "p"))
    assert "cannot write" not in str(e.value) and not list((tmp_path / "cache").glob("*.u8"))


def test_two_builders_at_once_build_once(tmp_path, config, monkeypatch):
    make_pictures(tmp_path / "p", 20)
    c, decode = config(tmp_path / "p"), dcgan.decode
    seen = tmp_path / "seen"

    def slowly(picture, c):
        time.sleep(0.02)
        with open(seen, "ab") as file:
            file.write(b".")
        return decode(picture, c)

    monkeypatch.setattr(dcgan, "decode", slowly)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        code = 1
        try:
            code = 0 if len(dcgan.load_pictures(c)) == 20 else 1
        finally:
            os._exit(code)
    assert len(dcgan.load_pictures(c)) == 20
    assert os.waitpid(pid, 0)[1] == 0
    assert seen.stat().st_size == 20


def test_a_whole_cache_waits_for_nobody_and_is_not_written_to(tmp_path, config, monkeypatch):
    """Another data set may be under way in it for an hour, or it may lie on a disk that can only be read."""
    make_pictures(tmp_path / "p", 4)
    c = config(tmp_path / "p")
    before = dcgan.load_pictures(c).clone()

    def locked(*_, **__):
        raise AssertionError("it asked for the lock")

    monkeypatch.setattr(dcgan, "FileLock", locked)
    assert torch.equal(dcgan.load_pictures(c), before)


def test_a_cache_that_is_thrown_away_is_built_again(tmp_path, config):
    make_pictures(tmp_path / "p", 4)
    c = config(tmp_path / "p")
    before = dcgan.load_pictures(c).clone()
    shutil.rmtree(c.cache)
    assert torch.equal(dcgan.load_pictures(c), before)


# ---------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("n", [1, 5, 64, 100])
def test_every_epoch_of_the_stream_is_a_permutation(n):
    stream = dcgan.batch_indices(n, 3, 0, 5 * n)
    epochs = stream.view(5, n)
    assert all(sorted(e.tolist()) == list(range(n)) for e in epochs)
    if n > 9:
        assert len({tuple(e.tolist()) for e in epochs}) == 5


@pytest.mark.parametrize(("n", "size"), [(10, 4), (3, 8), (1, 4), (64, 64), (100, 7)])
def test_every_batch_is_full_and_is_a_slice_of_one_stream(n, size):
    stream = dcgan.batch_indices(n, 0, 0, 12 * size)
    for step in range(12):
        batch = dcgan.batch_indices(n, 0, step * size, (step + 1) * size)
        assert batch.shape == (size,) and batch.dtype == torch.int64
        assert torch.equal(batch, stream[step * size : (step + 1) * size])


def test_the_stream_follows_from_seed_and_epoch_alone():
    first = dcgan.batch_indices(50, 1, 100, 150).clone()
    torch.manual_seed(9)
    torch.rand(3)
    dcgan.permutation.cache_clear()
    assert torch.equal(dcgan.batch_indices(50, 1, 100, 150), first)
    assert not torch.equal(dcgan.batch_indices(50, 2, 100, 150), first)
    before = torch.get_rng_state()
    dcgan.batch_indices(50, 5, 0, 50)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_copy_is_left_under_way_where_nothing_would_keep_its_source(tiny, monkeypatch):
    """MPS copies later from memory that is free by then; on CUDA the source is pinned, and kept."""
    plain, seen = torch.Tensor.to, []

    def to(self, *args, **options):
        seen.append(options.get("non_blocking", False))
        return plain(self, *args, **options)

    c = tiny()
    pictures = dcgan.load_pictures(c)
    monkeypatch.setattr(torch.Tensor, "to", to)
    dcgan.draw_inputs(c, pictures, 0, torch.device("cpu"))
    assert seen and not any(seen)


def test_a_step_sees_flips_ranges_and_the_streams_pictures(tiny, faces):
    c = tiny(flips=True, batch_size=8)
    pictures = dcgan.load_pictures(c)
    real, z, noise = dcgan.draw_inputs(c, pictures, 5, torch.device("cpu"))
    plain = dcgan.to_range(pictures[dcgan.batch_indices(24, c.seed, 40, 48)], c)
    assert real.shape == (8, 3, 16, 16) and z.shape == (2, 8, 8) and noise.numel() == 3 and not noise.any()
    flipped = [bool((a == b.flip(-1)).all() and not (a == b).all()) for a, b in zip(real, plain, strict=True)]
    straight = [bool((a == b).all()) for a, b in zip(real, plain, strict=True)]
    assert all(a != b for a, b in zip(flipped, straight, strict=True)) and any(flipped) and any(straight)
    again = dcgan.draw_inputs(c, pictures, 5, torch.device("cpu"))
    assert torch.equal(again[0], real) and torch.equal(again[1], z)


@pytest.mark.parametrize(
    ("steps", "at", "std"), [(8, 0, 0.5), (8, 6, 0.125), (8, 8, 0), (-1, 0, 0.5), (-1, 10**6, 0.5)]
)
def test_noise_falls_linearly_to_nothing_or_stays(steps, at, std, tiny):
    c = tiny(noise=0.5, noise_steps=steps, batch_size=8)
    noise = dcgan.draw_inputs(c, dcgan.load_pictures(c), at, torch.device("cpu"))[2]
    assert noise.shape == ((3, 8, 3, 16, 16) if std else (3, 1, 1, 1, 1))
    assert noise.std().item() == pytest.approx(std, rel=0.03) and abs(noise.mean()) < 0.02


def test_every_seed_step_and_turn_has_random_numbers_of_its_own(tiny):
    pictures, found = dcgan.load_pictures(tiny()), []
    for seed, step in itertools.product((0, 1), (6, 7)):
        c = tiny(seed=seed, noise=0.1, noise_steps=-1, dropout=0.1)
        _, z, noise = dcgan.draw_inputs(c, pictures, step, torch.device("cpu"))
        found += [z.flatten(0, 1), noise.flatten(0, 1).flatten(1)[:, :8], torch.rand(1, 8)]  # rand: as dropout draws
    found = torch.cat(found)
    assert len(found.unique(dim=0)) == len(found) == 4 * (2 * 4 + 3 * 4 + 1)


# ---------------------------------------------------------------------------------------- download


@pytest.mark.parametrize("name", ["celeba", "mnist"])
def test_a_download_that_cannot_be_says_what_to_do_by_hand(name, tmp_path, monkeypatch):
    def no_quota(*_, **__):
        raise RuntimeError("Too many users have viewed or downloaded this file recently.\nPlease try later.")

    monkeypatch.setattr(torchvision.datasets, {"celeba": "CelebA", "mnist": "MNIST"}[name], no_quota)
    with pytest.raises(dcgan.UserError) as e:
        dcgan.download(name, str(tmp_path))
    assert "Too many users" in str(e.value) and "\n" not in str(e.value)
    if name == "celeba":
        assert "kaggle datasets download -d jessicali9530/celeba-dataset" in " ".join(str(e.value).split())


@pytest.mark.parametrize("data", ["", "celeb_dataset"])
def test_from_python_a_download_is_made(tiny, tmp_path, monkeypatch, faces, data):
    asked = []
    monkeypatch.setattr(dcgan, "download", lambda name, root: asked.append((name, root)) or str(faces))
    c = tiny(steps=1, data=data, download="celeba")
    assert dcgan.train(c) == 0 and asked == [("celeba", data)]
    assert dcgan.load(Path(c.run) / "checkpoint.pt")["config"].data == str(faces)


@pytest.mark.parametrize("fetch, preset", [("mnist", "mnist"), ("celeba", "best")])
def test_nothing_is_downloaded_for_options_that_cannot_be(monkeypatch, capsys, fetch, preset):
    monkeypatch.setattr(dcgan, "download", lambda name, root: pytest.fail("it was fetched first"))
    assert dcgan.main(["--download", fetch, "--nz", "0"]) == 2
    assert "nz is 0" in capsys.readouterr().err
    found = []
    monkeypatch.setattr(dcgan, "train", lambda c: found.append(c.preset) or 0)
    assert dcgan.main(["--download", fetch]) == 0 and found == [preset]

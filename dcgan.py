"""DCGAN in one file: pictures in, a generator of pictures out.

    python dcgan.py                                   built-in drawn faces: no download, a few minutes on two CPU cores
    python dcgan.py --data celeb_dataset              a folder, nested folder or .zip of pictures, or MNIST's idx files
    python dcgan.py --data celeb_dataset --fused      the same with the fused kernels of csrc/ (pip install -e .)
    python dcgan.py --preset mnist --data mnist_dir   another system: classic, keras, regularized, mnist, demo
    python dcgan.py --run runs/demo-drawn --resume    go on where a run stopped
    torchrun --nproc-per-node=8 dcgan.py --data ...   the same on many GPUs (or CPU processes)
    python dcgan.py generate RUN --seeds 0-63         pictures from a run, a checkpoint or a snapshot
    python dcgan.py interpolate RUN --seeds 3,7,12    a walk through latent space: a GIF and a strip
    python dcgan.py info                              device, versions, kernels

Two networks play a game [1]. G turns noise z into a picture; D tells real pictures x from G's. D(x) is the
probability that D gives to "x is real"; D maximises log D(x) + log(1 - D(G(z))), G maximises log D(G(z)).

Notation: N pictures of nc channels and H x W pixels, (N, C, H, W); z is (N, nz); `step` is one update of G;
`logits` are D before its sigmoid.  Read from top to bottom: nothing refers to anything further down.

 [1] Goodfellow et al. 2014, Generative adversarial nets                        arXiv:1406.2661
 [2] Radford, Metz, Chintala 2015, DCGAN: the networks and their initialisation arXiv:1511.06434
 [3] Miyato et al. 2018, Spectral normalization for GANs                        arXiv:1802.05957
 [4] Ioffe, Szegedy 2015, Batch normalization                                   arXiv:1502.03167
 [5] Salimans et al. 2016, Improved techniques (one-sided label smoothing)      arXiv:1606.03498
 [6] Sonderby et al. 2016, Amortised MAP inference (noise on D's input)         arXiv:1610.04490
 [7] Heusel et al. 2017, Two time-scale update rule (lr_d != lr_g)              arXiv:1706.08500
 [8] Yazici et al. 2018, Averaging in GAN training (EMA of G)                   arXiv:1806.04498
 [9] White 2016, Sampling generative networks (spherical interpolation)         arXiv:1609.04468
[10] Glorot, Bengio 2010, Understanding the difficulty of training deep networks (Keras' initialisation)
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import signal
import stat
import struct
import sys
import time
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from filelock import FileLock
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.transforms.v2 import functional as T
from tqdm import tqdm

FORMAT = 1  # of checkpoints and caches; a file of another format is refused, never guessed at


class UserError(Exception):
    """Wrong use or unusable data: main prints it as one line and exits with 2."""


# ------------------------------------------------------------------------------------------------ configuration


def opt(default, help, group=None, alias=(), choices=None):
    """A field of Config that is also an option of the command line."""
    meta = {"help": help, "group": group, "alias": alias, "choices": choices}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass
class Config:
    """Every option there is: defaults (those of `classic`) < preset < command line."""

    preset: str = opt("", "which system to train: see below", "what to train, on what, where to")
    data: str = opt("", "folder, nested folder, .zip or MNIST idx files; none: drawn faces", alias=["--dataroot"])
    run: str = opt("", "folder of the run (runs/<preset>-<data>)", alias=["--outf"])
    resume: bool = opt(False, "go on from the run's checkpoint.pt")
    download: str = opt("", "fetch it through torchvision into --data", choices=["", "celeba", "mnist"])
    cache: str = opt("runs/cache", "folder of decoded pictures, shared by runs")
    max_bad: float = opt(0.01, "share of unreadable pictures above which to stop")
    image_size: int = opt(64, "height and width, pixels", "pictures", ["--imageSize"])
    nc: int = opt(3, "channels: 3 colour, 1 grey", choices=[1, 3])
    fit: str = opt("crop", "resize and cut the centre, or squash", choices=["crop", "squash"])
    flips: bool = opt(False, "mirror half of the real pictures")
    family: str = opt("dcgan", "shape of the networks", "networks", choices=["dcgan", "keras", "mnist"])
    nz: int = opt(100, "length of the latent vector z")
    ngf: int = opt(64, "width of G, channels")
    ndf: int = opt(64, "width of D, channels")
    init: str = opt("dcgan", "initial weights", choices=["dcgan", "normal", "keras"])
    slope: float = opt(0.2, "of LeakyReLU for negative inputs")
    bn_eps: float = opt(1e-5, "BatchNorm: added to the variance")
    bn_momentum: float = opt(0.1, "BatchNorm: share of the new batch in the running statistics")
    spectral_norm: bool = opt(False, "divide D's weights by their spectral norm [3]")
    dropout: float = opt(0.0, "in D, share of the features")
    dropout2d: float = opt(0.0, "in D, share of the channels")
    update: str = opt(
        "reuse", "G learns from new fakes, D's fakes, or at once with D", "the game", choices=["fresh", "reuse", "simultaneous"]
    )
    loss: str = opt("sum", "of D's real and fake halves", choices=["sum", "mean"])
    real_label: float = opt(1.0, "what D is to say of real pictures; 0.9 smooths [5]")
    noise: float = opt(0.0, "std of the noise on D's input, falling linearly to 0 [6]")
    noise_steps: int = opt(0, "steps until that noise is 0; 0: the length of the run")
    optimizer: str = opt("adamw", "of both networks", choices=["adam", "adamw"])
    lr_g: float = opt(5e-4, "learning rate of G; --lr sets both")
    lr_d: float = opt(5e-4, "learning rate of D [7]")
    beta1: float = opt(0.5, "Adam: decay of the gradients' mean")
    beta2: float = opt(0.999, "Adam: decay of the gradients' mean square")
    adam_eps: float = opt(1e-8, "Adam: added to the root of it")
    weight_decay: float = opt(0.0, "a step, times the learning rate")
    ema: float = opt(0.0, "decay a step of the average of G that draws the samples; 0: off [8]")
    batch_size: int = opt(64, "pictures a step, over all processes", "length and reports", ["--batchSize"])
    epochs: int = opt(20, "total passes over the pictures", alias=["--niter"])
    steps: int = opt(0, "total updates of G, instead of epochs")
    time_limit: str = opt("", "save and stop after, e.g. 90s, 30m, 2h")
    samples: int = opt(64, "pictures in a grid")
    sample_every: int = opt(100, "steps between grids (more often at first)")
    report_every: int = opt(10, "steps between lines of log.jsonl")
    save_every: int = opt(0, "steps between checkpoints; 0: two minutes")
    keep: int = opt(5, "newest snapshots of G to keep, one an epoch")
    seed: int = opt(0, "all randomness follows from it", "machine", ["--manualSeed"])
    device: str = opt("auto", "cuda, mps, cpu, cuda:1")
    precision: str = opt("auto", "bf16 where the hardware has it", choices=["auto", "fp32", "bf16"])
    fused: bool = opt(False, "use the fused kernels of csrc/")
    deterministic: bool = opt(False, "CUDA: the same bits every time, slower")
    workers: int = opt(-1, "processes that decode pictures; -1: one a core")


# The five systems.  A preset is a row of values; what it leaves out is Config's default.  Values marked * are ours:
# the source names none.
PRESETS = {
    "classic": dict(weight_decay=0.01),
    "regularized": dict(
        nz=128, ngf=128, ndf=128, init="normal", flips=True, spectral_norm=True, dropout2d=0.25, update="fresh",  # *dropout
        real_label=0.9, noise=0.1, optimizer="adam", lr_g=1e-4, lr_d=4e-4, batch_size=128, epochs=60,  # *label, noise, lr
    ),
    "keras": dict(
        family="keras", fit="squash", nz=128, ngf=128, dropout=0.2, init="keras", update="fresh", loss="mean",
        optimizer="adam", lr_g=1e-4, lr_d=1e-4, beta1=0.9, adam_eps=1e-7, batch_size=32, epochs=10,  # *epochs
    ),
    "mnist": dict(
        family="mnist", image_size=28, nc=1, dropout=0.3, slope=0.3, init="keras", bn_eps=1e-3, bn_momentum=0.01,
        update="simultaneous", optimizer="adam", lr_g=1e-4, lr_d=1e-4, beta1=0.9, adam_eps=1e-7, batch_size=256,
        epochs=50, samples=16,
    ),
    "demo": dict(
        image_size=32, nz=64, ngf=32, ndf=32, optimizer="adam", lr_g=1e-3, lr_d=1e-3, ema=0.995,
        batch_size=32, steps=2000, sample_every=200,
    ),
}  # fmt: skip

ABOUT = {
    "classic": "PyTorch's DCGAN on CelebA",
    "regularized": "spectral norm, dropout, noise, smoothing",
    "keras": "the TF/Keras CelebA scripts",
    "mnist": "the TF tutorial",
    "demo": "small, for the drawn faces",
}

# What --resume may change: how long, how often, and on what machine.  Everything else is part of the experiment.
MAY_CHANGE = {"resume", "run", "epochs", "steps", "time_limit", "device", "precision", "fused", "deterministic", "workers"}
MAY_CHANGE |= {"sample_every", "report_every", "save_every", "keep", "cache", "download", "max_bad"}


def config(preset="classic", **overrides):
    """-> the Config of a preset, with some fields set otherwise.  Raises UserError for an unknown name or value."""
    if preset not in PRESETS:
        raise UserError(f"no preset is called {preset!r}; there are {', '.join(PRESETS)}")
    fields = {f.name: f for f in dataclasses.fields(Config)}
    for name, value in overrides.items():
        if name not in fields:
            raise UserError(f"Config has no field {name!r}; there are {', '.join(fields)}")
        choices = fields[name].metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"{name} cannot be {value!r}; it can be {', '.join(map(str, choices))}")
    c = Config(**{**PRESETS[preset], **overrides, "preset": preset})
    for name in ("nz", "ngf", "ndf", "samples", "report_every", "sample_every", "batch_size", "image_size"):
        if getattr(c, name) < 1:
            raise UserError(f"{name} must be 1 or more, not {getattr(c, name)}")
    halvings(c)  # says which sizes work
    return c


def halvings(c):
    """-> (n, base): H = base * 2^n, where base is what the family's networks begin from (G) and end at (D)."""
    smallest = {"dcgan": 4, "keras": 8, "mnist": 7}[c.family]
    base, n = c.image_size, 0
    while base % 2 == 0 and base >= 2 * smallest:
        base, n = base // 2, n + 1
    if n == 0 or not smallest <= base < 2 * smallest:
        sizes = sorted({b * 2**k for b in range(smallest, 2 * smallest) for k in range(1, 8) if b * 2**k <= 256})
        raise UserError(f"image_size {c.image_size} cannot be doubled up to; these can: {', '.join(map(str, sizes))}")
    return n, base


# ------------------------------------------------------------------------------------------------ small tools


def key(*parts):
    """-> 63 bits that follow from the parts alone: the seed of everything random, whatever the machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def say(*lines):
    """Print on the first process only, above the progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write("\n".join(lines), file=sys.stdout)
        sys.stdout.flush()


def progress(total, what, unit, initial=0):
    """A tqdm bar on the first process where the output is a terminal, else silence."""
    quiet = os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty()
    return tqdm(total=total, initial=initial, desc=what, unit=unit, disable=quiet, dynamic_ncols=True, smoothing=0.1)


@contextlib.contextmanager
def written_whole(path):
    """A binary file that appears under its name only when it is complete and on the disk: whatever happens, the old one
    or the new one is there, never half of one."""
    half = path.with_name(f".{path.name}.half")
    with open(half, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)


# ------------------------------------------------------------------------------------------------ data

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
MAX_PIXELS = 100_000_000  # a picture that claims more is left out before it is decoded
DRAWN = 8192  # pictures in the built-in data set


def draw_face(seed, size):
    """-> a drawn face, a Pillow RGB picture of size x size: head, hair, eyes, mouth, sometimes glasses, from the seed."""
    r = random.Random(seed)  # noqa: S311 - a drawing, not a secret
    s = 4 * size  # drawn four times as large, so that shrinking smooths the edges
    skin = r.choice(["#ffe0c4", "#f6c9a0", "#e0a878", "#b97a4a", "#8a5630", "#5c3a20"])
    hair = r.choice(["#1c1410", "#4a2c14", "#8c5a22", "#d8b050", "#b03a20", "#b8b8c0", "#3050c0", "#c040a0"])
    eyes = r.choice(["#2060d0", "#207040", "#60350f", "#202020"])
    sky = tuple(r.randrange(120, 256) for _ in range(3))
    picture = Image.new("RGB", (s, s), sky)
    draw = ImageDraw.Draw(picture)
    x, y, w, h = 0.5 + r.uniform(-0.06, 0.06), 0.55 + r.uniform(-0.04, 0.04), r.uniform(0.25, 0.31), r.uniform(0.31, 0.37)

    def oval(cx, cy, rx, ry, fill):  # centre and radii in units of the head
        box = [(x + (cx - rx) * w) * s, (y + (cy - ry) * h) * s, (x + (cx + rx) * w) * s, (y + (cy + ry) * h) * s]
        draw.ellipse(box, fill=fill)
        return box

    style = r.choice(["short", "long", "round", "none"])
    if style == "long":
        box = oval(0, -0.2, 1.25, 1.05, hair)
        draw.rectangle([box[0], (box[1] + box[3]) / 2, box[2], (y + h) * s], fill=hair)
    elif style == "round":
        oval(0, -0.4, 1.35, 0.95, hair)
    oval(0, 0, 1, 1, skin)
    if style != "none":  # what falls over the forehead
        box = oval(0, -0.15, 1.0, 0.92, None)
        draw.chord(box, 200 + r.randrange(20), 340 - r.randrange(20), fill=hair)
    gap, open_ = r.uniform(0.38, 0.46), r.uniform(0.11, 0.16)
    for side in (-1, 1):
        oval(side * gap, -0.08, 0.22, open_, "#ffffff")
        oval(side * gap, -0.08, 0.12, open_, eyes)
    if r.random() < 0.25:
        for side in (-1, 1):
            box = oval(side * gap, -0.08, 0.34, 0.26, None)
            draw.ellipse(box, outline="#101010", width=s // 32)
        draw.line([(x - 0.1 * w) * s, (y - 0.1 * h) * s, (x + 0.1 * w) * s, (y - 0.1 * h) * s], "#101010", s // 32)
    lips = r.choice(["#a01828", "#d04050", "#702020"])
    if r.random() < 0.5:  # a smile, or an open mouth
        draw.chord(oval(0, 0.38, 0.42, 0.3, None), 10, 170, fill=lips)
    else:
        oval(0, 0.52, r.uniform(0.2, 0.38), r.uniform(0.09, 0.16), lips)
    picture = picture.rotate(r.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=sky)
    return picture.resize((size, size), Image.Resampling.BOX)


def read_idx(path):
    """-> (n, 1, H, W) uint8 from an MNIST idx file, plain or .gz.  Raises UserError if the header lies."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        try:
            magic, n, rows, columns = struct.unpack(">IIII", f.read(16))
            if magic != 0x803 or not 0 < rows * columns <= 1 << 20:
                raise ValueError(f"a header of {magic:#x}, {n} x {rows} x {columns}; pictures have 0x803")
            body = bytearray(f.read(min(n * rows * columns, 1 << 32) + 1))
            if len(body) != n * rows * columns or n == 0:
                raise ValueError(f"{n} pictures of {rows} x {columns} in its header, {len(body)} bytes after it")
        except (OSError, EOFError, ValueError, struct.error) as e:
            raise UserError(f"{path} is no whole idx file of pictures: {e}") from None
    return torch.frombuffer(body, dtype=torch.uint8).view(n, 1, rows, columns)


def find_idx(path):
    """-> the training pictures of MNIST in a folder (torchvision's MNIST/raw layout too), the idx file itself, or None."""
    if path.is_file():
        return path if re.search(r"idx3-ubyte(\.gz)?$", path.name) else None
    for folder in (path, path / "raw", path / "MNIST" / "raw"):
        for name in ("train-images-idx3-ubyte", "train-images.idx3-ubyte"):
            for file in (folder / name, folder / (name + ".gz")):
                if file.is_file():
                    return file
    return None


def list_pictures(root):
    """-> sorted [(name, bytes, time)] of the pictures anywhere under root, and how many files were none.  Opens nothing."""
    found, others, folders, seen = [], 0, [root], set()
    while folders:
        folder = folders.pop()
        with contextlib.suppress(OSError):  # an unreadable folder or a link that loops holds no pictures
            info = os.stat(folder)
            if (info.st_dev, info.st_ino) in seen:
                continue
            seen.add((info.st_dev, info.st_ino))
            for entry in os.scandir(folder):
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                with contextlib.suppress(OSError):
                    info = entry.stat()
                    if stat.S_ISDIR(info.st_mode):
                        folders.append(entry.path)
                    elif stat.S_ISREG(info.st_mode) and os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                        found.append((os.path.relpath(entry.path, root), info.st_size, info.st_mtime_ns))
                    else:
                        others += 1
    return sorted(found), others


def decode(data, nc):
    """-> (nc, H, W) uint8, upright, from the bytes of a picture.  Raises whatever its decoder raises, or ValueError."""
    with Image.open(io.BytesIO(data)) as picture:  # reads the header, decodes nothing yet
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels; {MAX_PIXELS:,} are allowed")
        whole = picture.format == "PNG" or (picture.format == "JPEG" and data.endswith(b"\xff\xd9"))
        if whole and picture.mode in ("RGB", "L") and "transparency" not in picture.info:
            mode = torchvision.io.ImageReadMode.RGB if nc == 3 else torchvision.io.ImageReadMode.GRAY
            with contextlib.suppress(RuntimeError):  # what torchvision refuses, Pillow may read
                raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                x = torchvision.io.decode_image(raw, mode, apply_exif_orientation=True)
                if x.dtype == torch.uint8:  # not 16 bits
                    return x
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):  # 16 and 32 bits a pixel: to 0..255 by what the values reach
            low, high = picture.getextrema()
            top = 65535 if high > 255 else 255 if high > 1 or picture.mode != "F" else 1
            picture = Image.fromarray((np.asarray(picture, np.float64) * (255 / max(top, high))).clip(0, 255).astype(np.uint8))
        elif picture.has_transparency_data:  # over white, as a page would show it
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return T.pil_to_tensor(picture.convert("RGB" if nc == 3 else "L"))


def fit_picture(x, size, how):
    """(C, H, W) uint8 -> (C, size, size): the shorter side to size and the centre cut out, or squashed."""
    h, w = x.shape[-2:]
    if how == "squash":
        return T.resize(x, [size, size], antialias=True)
    if max(h, w) > 8 * min(h, w):  # a strip: cut first, or resizing it could need all the memory there is
        x = T.center_crop(x, [min(h, 8 * w), min(w, 8 * h)])
    return T.center_crop(T.resize(x, [size], antialias=True), [size, size])


class Pictures(torch.utils.data.Dataset):
    """What --data points at: [i] -> (i, (nc, H, W) uint8), or (i, why it cannot be read).  Raises UserError if nothing is there.

    `key` names its cache and follows from names, sizes and times alone; `open` lists what is inside a .zip or idx file."""

    def __init__(self, c):
        self.c, self.root, self.names, self.zip, self.idx = c, Path(c.data), None, None, None
        if not c.data:
            self.kind, self.names, facts = "drawn", range(DRAWN), DRAWN
        elif not self.root.exists():
            raise UserError(f"--data {c.data}: there is no such file or folder; give a folder or .zip of pictures")
        elif find_idx(self.root) or self.root.is_file():
            self.kind = "idx" if find_idx(self.root) else "zip"
            self.root = find_idx(self.root) or self.root
            facts = (str(self.root.resolve()), self.root.stat().st_size, self.root.stat().st_mtime_ns)
        else:
            facts, others = list_pictures(self.root)
            self.kind, self.names = "folder", [name for name, _, _ in facts]
            if not facts:
                raise UserError(f"--data {c.data}: looked for {' '.join(sorted(SUFFIXES))} in it and every folder below, "
                                f"found {others} other files; give the folder or .zip that holds the pictures")  # fmt: skip
        how = (FORMAT, self.kind, c.image_size, c.nc, c.fit, torchvision.__version__, PIL.__version__)
        self.key = f"{key(how, facts):016x}"

    def open(self):
        if self.kind == "idx":
            self.idx = read_idx(self.root)
            self.names = range(len(self.idx))
        elif self.kind == "zip":
            try:
                with zipfile.ZipFile(self.root) as archive:
                    inside = archive.infolist()
            except (zipfile.BadZipFile, OSError, NotImplementedError) as e:
                raise UserError(f"--data {self.c.data} is no folder, .zip or idx file ({e}); give one of these") from None
            paths = [(Path(i.filename), i) for i in inside]
            self.names = [i for p, i in paths if p.suffix.lower() in SUFFIXES and p.parts[0] != "__MACOSX" and p.name[0] != "."]
            if not self.names:
                raise UserError(f"--data {self.c.data}: looked for {' '.join(sorted(SUFFIXES))} in this archive, "
                                f"found {len(inside)} other entries; give one that holds pictures")  # fmt: skip

    def __len__(self):
        return len(self.names)

    def name(self, i):
        name = self.names[i]
        return getattr(name, "filename", str(name)).encode(errors="replace").decode()  # printable whatever its bytes

    def read(self, i):
        if self.kind == "drawn":
            return T.pil_to_tensor(draw_face(i, self.c.image_size).convert("RGB" if self.c.nc == 3 else "L"))
        if self.kind == "idx":
            return self.idx[i].expand(self.c.nc, -1, -1)
        if self.kind == "zip":
            self.zip = self.zip or zipfile.ZipFile(self.root)  # each process opens its own
            size = self.names[i].file_size
        else:
            size = os.stat(self.root / self.names[i]).st_size
        if not 0 < size <= 3 * MAX_PIXELS:
            raise ValueError(f"a file of {size} bytes")
        data = self.zip.read(self.names[i]) if self.zip else (self.root / self.names[i]).read_bytes()
        return decode(data, self.c.nc)

    def __getitem__(self, i):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # decoders warn; what matters they raise
                return i, fit_picture(self.read(i), self.c.image_size, self.c.fit)
        except Exception as e:  # decoders raise anything at all; the picture is left out, named and counted
            return i, " ".join(f"{type(e).__name__}: {e}".split())


def split(items):
    """A worker's batch -> the pictures that could be read, stacked, and [(i, reason)] of the others."""
    good = [x for _, x in items if torch.is_tensor(x)]
    return torch.stack(good) if good else None, [(i, x) for i, x in items if not torch.is_tensor(x)]


def in_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    torch.set_num_threads(1)


def decode_all(pictures, c, folder):
    """Write folder/pictures.u8, (n, nc, H, W) uint8 in the order of the names, and folder/index.json beside it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = c.workers if c.workers >= 0 else 0 if len(pictures) < 512 else cores
    loader = torch.utils.data.DataLoader(
        pictures, batch_size=64, num_workers=workers, collate_fn=split, worker_init_fn=in_worker
    )
    bad, n = [], 0
    with written_whole(folder / "pictures.u8") as file, progress(len(pictures), "decoding", "img") as bar:
        for good, left_out in loader:
            bad += [(pictures.name(i), reason) for i, reason in left_out]
            if len(bad) > c.max_bad * len(pictures):
                raise UserError("\n  ".join([
                    f"more than {c.max_bad:.1%} of the pictures cannot be read (--max-bad); up to picture {n + len(bad)}:",
                    *(f"{name}: {reason}" for name, reason in bad[:50]), *["..."] * (len(bad) > 50),
                ]))  # fmt: skip
            if good is not None:
                file.write(good.numpy().tobytes())
                n += len(good)
            bar.update(64)
    with written_whole(folder / "index.json") as file:
        index = {"format": FORMAT, "shape": [n, c.nc, c.image_size, c.image_size], "left_out": bad}
        file.write(json.dumps(index, indent=1).encode())


def load_pictures(c):
    """-> (n, nc, H, W) uint8, mapped from the cache, which is built first if these pictures are not in it yet."""
    pictures = Pictures(c)
    folder = Path(c.cache) / pictures.key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # one builder; a dead one lets go
        built = not (folder / "index.json").exists()
        if built:
            half = folder.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)  # of a builder that was killed
            half.mkdir()
            pictures.open()
            decode_all(pictures, c, half)
            half.rename(folder)
    index = json.loads((folder / "index.json").read_text())
    size = math.prod(index["shape"])
    say(f"pictures    {index['shape'][0]:,} from {c.data or 'the built-in drawn faces'}; "
        f"{'decoded into' if built else 'found in'} {folder} ({size / 1e6:.0f} MB)")  # fmt: skip
    if index["left_out"]:
        say(f"            {len(index['left_out'])} cannot be read and are left out, listed in {folder / 'index.json'}:")
        say(*(f"            {name}: {reason}" for name, reason in index["left_out"][:5]))
    return torch.from_file(str(folder / "pictures.u8"), size=size, dtype=torch.uint8).view(index["shape"])


def batch_indices(n, seed, start, stop):
    """-> (stop - start,) int64: places start..stop in the endless stream of epochs, each a permutation of the n
    pictures that follows from (seed, epoch) alone.  So every batch is full and a position says everything."""
    parts = []
    while start < stop:
        epoch, first = divmod(start, n)
        last = min(n, first + stop - start)
        parts.append(permutation(n, seed, epoch)[first:last])
        start += last - first
    return torch.cat(parts)


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(key(seed, "epoch", epoch)))


# ------------------------------------------------------------------------------------------------ the two ops
# In plain PyTorch, as the specification of the fused ones: same names, same arguments, same numbers.


def bn_leaky_relu(x, weight, bias, running_mean, running_var, training, momentum, eps, slope, groups=1):
    """leaky_relu(batch_norm(x), slope), the shape and dtype of x, (N, C) or (N, C, H, W) [4].  Slope 0 is ReLU.
    In training each of `groups` equal parts of the batch has its own statistics, and the running ones are updated in order."""
    parts = x.chunk(groups) if training else [x]
    y = [F.batch_norm(part, running_mean, running_var, weight, bias, training, momentum, eps) for part in parts]
    return F.leaky_relu(torch.cat(y) if len(y) > 1 else y[0], slope, inplace=True)


def spectral_norm(weights, us, vs, eps, update):
    """-> [W / sigma] for weights of any shape, each seen as a matrix (out, rest); sigma = u'Wv is its largest singular
    value [3].  With `update` one power iteration first moves u (out,) and v (rest,), in place."""
    normalized = []
    for weight, u, v in zip(weights, us, vs, strict=True):
        with torch.autocast(weight.device.type, enabled=False):  # bf16 would blur sigma
            matrix = weight.flatten(1)
            if update:
                with torch.no_grad():
                    u.copy_(F.normalize(matrix @ v, dim=0, eps=eps))
                    v.copy_(F.normalize(matrix.T @ u, dim=0, eps=eps))
            sigma = torch.dot(u.clone(), matrix @ v.clone())  # clones: the next forward moves u and v before this backward
            normalized.append(weight / sigma)
    return normalized


PLAIN = types.SimpleNamespace(bn_leaky_relu=bn_leaky_relu, spectral_norm=spectral_norm, what="plain PyTorch")


def fused_ops():
    """-> the module dcgan_ops, installed or found in csrc/ beside this file.  Raises UserError with the reason."""
    with contextlib.suppress(ImportError):
        import dcgan_ops

        return dcgan_ops
    file = Path(__file__).parent / "csrc" / "__init__.py"
    if not file.exists():
        raise UserError("no fused kernels: dcgan_ops is not installed; run pip install -e . in the project, or leave --fused out")
    spec = importlib.util.spec_from_file_location("dcgan_ops", file, submodule_search_locations=[str(file.parent)])
    sys.modules["dcgan_ops"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["dcgan_ops"])
    return sys.modules["dcgan_ops"]


def choose_ops(fused, device):
    """The one place where the fused ops come in: -> PLAIN, or dcgan_ops ready for the device.  Never a silent fallback."""
    if not fused:
        return PLAIN
    ops = fused_ops()
    try:
        ops.load(device)
    except ops.Unavailable as e:
        raise UserError(f"--fused: {e}") from None
    return ops


# ------------------------------------------------------------------------------------------------ the networks
# A network is a list of rows: (kind, channels out, kernel, stride, padding, bias, BatchNorm, activation), where the
# activation is LeakyReLU's slope (0: ReLU), "tanh", "sigmoid" or None.  A family is a way to write the rows.


def rows_g(c):
    """The rows of G, from z (N, nz) to pictures (N, nc, H, W)."""
    n, base = halvings(c)
    if c.family == "dcgan":  # [2]: transposed convolutions all the way, from a 1 x 1 picture of nz channels
        first = ("up", c.ngf * 2 ** (n - 1), base, 1, 0, False, True, 0.0)
        middle = [("up", c.ngf * 2**i, 4, 2, 1, False, True, 0.0) for i in reversed(range(n - 1))]
        return [first, *middle, ("up", c.nc, 4, 2, 1, False, False, "tanh")]
    if c.family == "keras":  # wider as the picture grows
        first = ("dense", c.ngf * base**2, 0, 0, 0, True, False, None)
        middle = [("up", c.ngf * 2**i, 4, 2, 1, True, False, c.slope) for i in range(n)]
        return [first, *middle, ("conv", c.nc, 5, 1, 2, True, False, "sigmoid")]
    first = ("dense", 4 * c.ngf * base**2, 0, 0, 0, False, True, c.slope)
    middle = [("up", c.ngf * (1 if i else 2), 5, 2 if i else 1, 2, False, True, c.slope) for i in range(n)]
    return [first, *middle, ("up", c.nc, 5, 2, 2, False, False, "tanh")]


def rows_d(c):
    """The rows of D, from pictures (N, nc, H, W) to one logit each."""
    n, base = halvings(c)
    if c.family == "dcgan":  # [2]: BatchNorm everywhere but first and last
        hidden = [("conv", c.ndf * 2**i, 4, 2, 1, False, i > 0, c.slope) for i in range(n)]
        return [*hidden, ("conv", 1, base, 1, 0, False, False, None)]
    if c.family == "keras":
        hidden = [("conv", c.ndf * min(2**i, 2), 4, 2, 1, True, False, c.slope) for i in range(n)]
    else:
        hidden = [("conv", c.ndf * 2**i, 5, 2, 2, True, False, c.slope) for i in range(n)]
    return [*hidden, ("dense", 1, 0, 0, 0, True, False, None)]


class Block(nn.Module):
    """One row: a dense layer, convolution or transposed convolution, then BatchNorm, the activation and dropout."""

    def __init__(self, row, channels, c, ops, dropout=0.0, dropout2d=0.0):
        super().__init__()
        kind, out, k, s, p, bias, bn, self.activation = row
        if kind == "dense":
            self.layer = nn.Linear(channels, out, bias=bias)
        elif kind == "conv":
            self.layer = nn.Conv2d(channels, out, k, s, p, bias=bias)
        else:  # output_padding: so that a stride of 2 doubles the picture exactly
            self.layer = nn.ConvTranspose2d(channels, out, k, s, p, output_padding=max(0, s + 2 * p - k), bias=bias)
        batch_norm = nn.BatchNorm1d if kind == "dense" else nn.BatchNorm2d
        self.bn = batch_norm(out, c.bn_eps, c.bn_momentum) if bn else None
        self.kind, self.ops, self.dropout, self.dropout2d = kind, ops, dropout, dropout2d

    def forward(self, x, weight=None, groups=1):
        """x (N, C, H, W) or (N, C); `weight` stands in for the layer's own; `groups`: see bn_leaky_relu."""
        layer, bn = self.layer, self.bn
        if weight is None:
            x = layer(x)
        elif self.kind == "dense":
            x = F.linear(x, weight, layer.bias)
        else:
            x = F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
        if bn is not None:
            x = self.ops.bn_leaky_relu(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, self.training,
                                       bn.momentum, bn.eps, self.activation, groups)  # fmt: skip
        elif isinstance(self.activation, float):
            x = F.leaky_relu(x, self.activation)
        elif self.activation:
            x = getattr(torch, self.activation)(x.float())
        x = F.dropout(x, self.dropout, self.training)
        return F.dropout2d(x, self.dropout2d, self.training) if self.dropout2d else x


class Generator(nn.Module):
    """z (N, nz) -> pictures (N, nc, H, W), float32 in [-1, 1]; in [0, 1] for the keras family, which ends in a sigmoid."""

    def __init__(self, c, ops=PLAIN):
        super().__init__()
        self.config, self.base, channels, blocks = c, halvings(c)[1], c.nz, []
        for row in rows_g(c):
            blocks.append(Block(row, channels, c, ops))
            channels = row[1] // self.base**2 if row[0] == "dense" else row[1]
        self.blocks = nn.ModuleList(blocks)
        initialize(self)

    def forward(self, z):
        x = z[:, :, None, None] if self.blocks[0].kind == "up" else z  # (N, nz, 1, 1)
        for block in self.blocks:
            x = block(x)
            if x.dim() == 2:  # (N, C * base * base) -> (N, C, base, base)
                x = x.view(len(x), -1, self.base, self.base)
        return x


class Discriminator(nn.Module):
    """Pictures (N, nc, H, W) -> logits (N,).  Several mini-batches go through at once, each with BatchNorm statistics of
    its own, as D(torch.cat([real, fake]), groups=2)."""

    def __init__(self, c, ops=PLAIN):
        super().__init__()
        self.config, self.ops, channels, blocks = c, ops, c.nc, []
        rows = rows_d(c)
        for i, row in enumerate(rows):
            last = i == len(rows) - 1
            # Keras' networks for CelebA drop features once, before the dense layer; the others after each hidden layer
            dropout = 0.0 if last or (c.family == "keras" and i < len(rows) - 2) else c.dropout
            blocks.append(Block(row, channels, c, ops, dropout, 0.0 if last else c.dropout2d))
            channels = row[1] * (halvings(c)[1] ** 2 if not last and rows[i + 1][0] == "dense" else 1)
        self.blocks = nn.ModuleList(blocks)
        initialize(self)
        for block in self.blocks if c.spectral_norm else []:
            w = block.layer.weight.detach()
            block.register_buffer("u", F.normalize(torch.randn(len(w)), dim=0))
            block.register_buffer("v", F.normalize(torch.randn(w[0].numel()), dim=0))
            for _ in range(15):  # as torch.nn.utils.parametrizations.spectral_norm begins
                spectral_norm([w], [block.u], [block.v], 1e-12, update=True)

    def forward(self, x, groups=1):
        weights = [None] * len(self.blocks)
        if self.config.spectral_norm:
            weights = self.ops.spectral_norm(
                [b.layer.weight for b in self.blocks], [b.u for b in self.blocks], [b.v for b in self.blocks], 1e-12, self.training
            )
        for block, weight in zip(self.blocks, weights, strict=True):
            x = block(x.flatten(1) if block.kind == "dense" else x, weight, groups)
        return x.flatten().float()


def initialize(net):
    """dcgan [2]: weights normal(0, 0.02), BatchNorm's normal(1, 0.02); normal: BatchNorm's 1; keras: Glorot uniform [10]."""
    for block in net.blocks:
        if net.config.init == "keras":
            nn.init.xavier_uniform_(block.layer.weight)
        else:
            nn.init.normal_(block.layer.weight, 0.0, 0.02)
        if block.layer.bias is not None:
            nn.init.zeros_(block.layer.bias)
        if block.bn is not None and net.config.init == "dcgan":
            nn.init.normal_(block.bn.weight, 1.0, 0.02)


def summary(net, x):
    """-> lines: each row's layer, its output shape without N, its trained parameters; and their sum."""
    lines = [type(net).__name__]

    def note(block, _, y):
        layer, bn, act = block.layer, block.bn, block.activation
        what = type(layer).__name__
        what += f" {layer.kernel_size[0]}x{layer.kernel_size[1]}, stride {layer.stride[0]}" if block.kind != "dense" else ""
        what += ", BatchNorm" if bn is not None else ""
        what += "" if act is None else f", {act}" if isinstance(act, str) else f", LeakyReLU {act}" if act else ", ReLU"
        lines.append(f"  {what:<56} {'x'.join(map(str, y.shape[1:])):<12} {sum(p.numel() for p in block.parameters()):>12,}")

    hooks = [block.register_forward_hook(note) for block in net.blocks]
    training = net.training
    with torch.no_grad():
        net.eval()(x)  # eval: no statistic moves
    net.train(training)
    for hook in hooks:
        hook.remove()
    return [*lines, f"  {'parameters':<69} {sum(p.numel() for p in net.parameters()):>12,}"]


# ------------------------------------------------------------------------------------------------ the game


def draw_inputs(c, pictures, step, noise_std, rank, world, device):
    """-> real (n, nc, H, W), z (2, n, nz), noise (3, n, nc, H, W) or None: what a step needs from outside.

    All of it follows from (seed, step), so there is no state to save, and it is drawn for the whole batch and cut to this
    process's n = batch_size / world, so that many processes see what one would."""
    size = c.batch_size
    mine = slice(rank * size // world, (rank + 1) * size // world)
    indices = batch_indices(len(pictures), c.seed, step * size, (step + 1) * size)[mine]
    torch.manual_seed(key(c.seed, "step", step))
    z = torch.randn(2, size, c.nz, device=device)[:, mine]
    real = pictures[indices.to(pictures.device)].to(device, non_blocking=True).float()
    real = (real / 255 if c.family == "keras" else real / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    if c.flips:
        real = torch.where(torch.rand(size, 1, 1, 1, device=device)[mine] < 0.5, real.flip(-1), real)
    noise = None
    if c.noise:
        noise = noise_std * torch.randn(3, size, *real.shape[1:], device=device)[:, mine]
    torch.manual_seed(key(c.seed, "dropout", step, rank))  # what D drops is each process's own
    return real, z, noise


def apply_gradients(opt, loss, world):
    """Adam's step, unless the loss or a gradient is not finite -> whether it was made, a bool on the device: no waiting.
    Over many processes the gradients and losses are averaged first, so that all decide and move alike."""
    grads = [p.grad for p in opt.param_groups[0]["params"]]
    if world > 1:
        flat = torch.cat([loss.detach().view(1), *[g.flatten() for g in grads]])
        dist.all_reduce(flat)
        loss, *averages = (flat / world).split([1, *[g.numel() for g in grads]])
        torch._foreach_copy_(grads, [a.view(g.shape) for a, g in zip(averages, grads, strict=True)])
    good = torch.isfinite(loss.detach().squeeze() + torch.nn.utils.get_total_norm(grads))
    opt.grad_scale, opt.found_inf = None, (~good).float()  # how fused Adam is told to leave everything as it was
    opt.step()
    opt.zero_grad()
    return good


def train_step(c, G, D, ema, opt_g, opt_d, real, z, noise, ema_weight=0.0, world=1):
    """One update of D and one of G -> (6,) on the device: loss_d, loss_g, D(x), D(G(z)), then 1, 0 or, where a number was
    not finite and nothing has changed, 0, 1.  Shapes: draw_inputs.  Nothing in here waits for the device."""
    buffers = [b for net in (G, D) for b in net.buffers() if b.is_floating_point()]  # running statistics, u, v
    kept = [b.clone() for b in buffers]
    at_once = c.update == "simultaneous"
    noise = [0.0] * 3 if noise is None else noise
    bce = F.binary_cross_entropy_with_logits
    precision = functools.partial(torch.autocast, real.device.type, torch.bfloat16, c.precision == "bf16", cache_enabled=False)

    ##########################################################################
    # (1) Update D: maximise log D(x) + log(1 - D(G(z)))
    ##########################################################################
    with precision():
        with torch.set_grad_enabled(c.update != "fresh"):
            fake = G(z[0])
        both = torch.cat([real + noise[0], (fake if at_once else fake.detach()) + noise[1]])
        logits_real, logits_fake = D(both, groups=2).chunk(2)
    loss_real = bce(logits_real, torch.full_like(logits_real, c.real_label))
    loss_fake = bce(logits_fake, torch.zeros_like(logits_fake))
    loss_d = (loss_real + loss_fake) / (2 if c.loss == "mean" else 1)
    loss_d.backward(inputs=list(D.parameters()), retain_graph=at_once)
    if not at_once:
        good = apply_gradients(opt_d, loss_d, world)

    ##########################################################################
    # (2) Update G: maximise log D(G(z)), against the new D
    ##########################################################################
    if not at_once:  # else the same logits serve, from the same weights and the same dropout
        with precision():
            fake = G(z[1]) if c.update == "fresh" else fake
            logits_fake = D(fake + noise[2])
    loss_g = bce(logits_fake, torch.ones_like(logits_fake))
    loss_g.backward(inputs=list(G.parameters()))  # no gradient for D's weights: not needed, not computed
    if at_once:
        good = apply_gradients(opt_d, loss_d, world)
    good = apply_gradients(opt_g, loss_g + torch.where(good, 0.0, torch.inf), world) & good

    torch._foreach_copy_(buffers, [torch.where(good, b, old) for b, old in zip(buffers, kept, strict=True)])
    if ema is not None:
        average(ema, G, ema_weight * good)
    with torch.no_grad():
        numbers = torch.stack([loss_d, loss_g, logits_real.sigmoid().mean(), logits_fake.sigmoid().mean()])
        return torch.cat([torch.where(good, numbers, 0.0), torch.stack([good, ~good]).float()])


@torch.no_grad()
def average(ema, G, weight):
    """Move every weight and running statistic of ema by `weight` (a number or tensor) of the way to G's [8]."""
    new, old = [[t for t in net.state_dict().values() if t.is_floating_point()] for net in (G, ema)]
    way = torch._foreach_sub(new, old)
    torch._foreach_mul_(way, weight)
    torch._foreach_add_(old, way)


# ------------------------------------------------------------------------------------------------ checkpoints


def load_file(path):
    """-> what torch.save wrote there, on the CPU; tensors and plain values only, so that no file can run code."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {path}; give a run's folder or a .pt file of one") from None
    except Exception as e:  # a damaged file can raise anything
        raise UserError(f"{path} is no whole file of this program ({type(e).__name__}); an older snapshot may be") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or not isinstance(saved.get("config"), dict):
        raise UserError(f"{path} was not written by this version of the program (format {FORMAT})")
    return saved


def from_saved(saved, path):
    """-> the Config in a saved file's dict.  Raises UserError if it is not one of ours."""
    try:
        return config(**saved)
    except (TypeError, UserError) as e:
        raise UserError(f"{path} holds a configuration of another version: {e}") from None


def load_generator(path, device="cpu", ops=PLAIN):
    """-> G in eval mode, with its Config as G.config, from a run's folder, checkpoint.pt, generator.pt or a snapshot."""
    path = Path(path)
    saved = load_file(path / "generator.pt" if path.is_dir() else path)
    G = Generator(from_saved(saved["config"], path), ops)
    try:
        G.load_state_dict(saved.get("ema") or saved["G"])
    except (KeyError, RuntimeError) as e:
        raise UserError(f"{path} does not fit its own configuration: {str(e).splitlines()[0]}") from None
    return G.to(device).eval().requires_grad_(False)


def save(path, **contents):
    """Write contents, tensors and plain values, so that path always holds a whole file.  Raises UserError if the disk is full."""
    try:
        with written_whole(path) as file:
            torch.save({"format": FORMAT, **contents}, file)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        path.with_name(f".{path.name}.half").unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {e}; what stood there is intact") from None


# ------------------------------------------------------------------------------------------------ pictures


@torch.inference_mode()
def generate(G, seeds, device="cpu"):
    """-> (len(seeds), nc, H, W) uint8 on the CPU.  The z of a seed comes from its own generator, and pictures are made in
    chunks of one size, so that the same seed gives the same picture whatever is asked for beside it."""
    z = [torch.randn(G.config.nz, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return pictures_of(G, torch.stack(z), device)


@torch.inference_mode()
def pictures_of(G, z, device="cpu", chunk=16):
    """z (n, nz) -> (n, nc, H, W) uint8 on the CPU, by G in eval mode: BatchNorm with its running statistics."""
    training, parts = G.training, []
    G.eval()
    for part in z.split(chunk):
        x = G(F.pad(part, (0, 0, 0, chunk - len(part))).to(device))[: len(part)]
        x = x * 255 if G.config.family == "keras" else (x + 1) * 127.5
        parts.append(x.round().clamp(0, 255).to(torch.uint8).cpu())
    G.train(training)
    return torch.cat(parts)


def grid(x, columns=0):
    """(n, nc, H, W) uint8 -> one Pillow picture, as near to a square as n allows."""
    return T.to_pil_image(torchvision.utils.make_grid(x, columns or math.ceil(math.sqrt(len(x))), padding=2, pad_value=255))


def save_picture(picture, path, **options):
    with written_whole(Path(path)) as file:
        picture.save(file, format=Path(path).suffix[1:].upper().replace("JPG", "JPEG"), **options)


def save_gif(frames, path, milliseconds=120):
    frames = [f.convert("RGB").quantize(128) for f in frames]
    save_picture(frames[0], path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def growth(folder, most=48):
    """samples.gif from the grids of a run: evenly chosen, the last one always."""
    files = sorted((folder / "samples").glob("step_*.png"))
    chosen = sorted({round(i * (len(files) - 1) / (most - 1)) for i in range(most)})
    save_gif([Image.open(files[i]) for i in chosen], folder / "samples.gif")


def curves(rows, path, width=900, height=260):
    """The loss curves as a picture: above the losses of D and G, below D(x) and D(G(z)), against the step."""
    picture = Image.new("RGB", (width, 2 * height), "white")
    draw = ImageDraw.Draw(picture)
    for top, names, colors, highest in ((0, ("loss_d", "loss_g"), ("#c03020", "#2050c0"), None),
                                        (height, ("d_x", "d_gz"), ("#208040", "#a06010"), 1.0)):  # fmt: skip
        bins = [rows[i * len(rows) // 400 : max((i + 1) * len(rows) // 400, i * len(rows) // 400 + 1)] for i in range(400)]
        means = {name: [sum(r[name] for r in b) / len(b) for b in bins if b] for name in names}
        high = highest or max(1.5, *(min(v, 10.0) for name in names for v in means[name]))
        left, right, low, up = 50, width - 20, top + height - 30, top + 25
        for i in range(5):
            y = low - i / 4 * (low - up)
            draw.line([left, y, right, y], "#dddddd")
            draw.text((left - 8, y), f"{i / 4 * high:.2f}", "black", anchor="rm")
            draw.text((left + i / 4 * (right - left), low + 8), f"{round(i / 4 * rows[-1]['step'])}", "black", anchor="mt")
        for i, (name, color) in enumerate(zip(names, colors, strict=True)):
            values = means[name]
            points = [(left + (right - left) * (k + 1) / len(values), low - min(v / high, 1) * (low - up)) for k, v in enumerate(values)]
            draw.line(points, color, 2)
            draw.text((left + 10 + 90 * i, top + 12), name, color, anchor="lm")
    save_picture(picture, path)


# ------------------------------------------------------------------------------------------------ the machine


def choose_device(name, rank=0):
    """-> the torch.device that is named, or the best there is."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{rank}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} cannot be used here: {str(e).splitlines()[0]}; try cpu, or leave it out") from None
    return device


def choose_precision(name, device):
    """-> "bf16" or "fp32"; auto: bf16 where the hardware multiplies it faster, not where it only emulates it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    has = any(getattr(torch.cpu, f"_is_{f}_supported", bool)() for f in ("avx512_bf16", "amx_tile"))
    return "bf16" if device.type == "cpu" and has else "fp32"


def tune(c, device):
    """What always pays, once a process: see PERFORMANCE in the README."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not c.deterministic
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cpu" and sys.platform == "linux":  # glibc: keep large blocks, instead of mapping and clearing anew
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30), libc.mallopt(-1, 1 << 30)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD; bytes


class Stop:
    """Whether to stop: after SIGTERM or Ctrl-C (a second one leaves at once), or when the time is up -> exit code or None."""

    def __init__(self, limit):
        unit = {"s": 1, "m": 60, "h": 3600}
        if limit and not re.fullmatch(r"\d+(\.\d+)?[smh]", limit):
            raise UserError(f"--time-limit {limit!r} is no time; write 90s, 30m or 2h")
        self.end = time.monotonic() + float(limit[:-1]) * unit[limit[-1]] if limit else math.inf
        self.code = None
        self.before = {s: signal.signal(s, self.caught) for s in (signal.SIGTERM, signal.SIGINT)}

    def caught(self, number, _):
        signal.signal(number, signal.SIG_DFL)
        self.code = 128 + number

    def now(self, world):
        code = self.code if self.code else 0 if time.monotonic() > self.end else -1
        if world > 1:  # all processes stop after the same step
            code = torch.tensor(code)
            dist.all_reduce(code, dist.ReduceOp.MAX)
        return None if code < 0 else int(code)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ training


def open_run(c, given):
    """-> (Config, checkpoint or None): a new folder, or where --resume goes on.  `given`: the names set by the user."""
    folder = Path(c.run)
    file = folder / "config.json"
    if not c.resume:
        if file.exists():
            raise UserError(f"{folder} holds a run already; go on with --resume, or name another with --run")
        return c, None
    if not file.exists():
        raise UserError(f"--resume: there is no run in {folder}; name its folder with --run")
    try:
        old = from_saved(json.loads(file.read_text()), file)
    except ValueError:
        raise UserError(f"{file} is damaged; a run cannot go on without it") from None
    for name in given - MAY_CHANGE:
        if getattr(c, name) != getattr(old, name):
            raise UserError(f"--resume cannot change {name} from {getattr(old, name)!r} to {getattr(c, name)!r}; "
                            "leave it out, or start another run with --run")  # fmt: skip
    new = {name: getattr(c, name) for name in given & MAY_CHANGE}
    if "epochs" in given and "steps" not in given:
        new["steps"] = 0
    c = dataclasses.replace(old, **new, run=str(folder), resume=True)
    checkpoint = folder / "checkpoint.pt"
    return c, load_file(checkpoint) if checkpoint.exists() else None  # none: stopped before the first one


def tidy(folder, step):
    """Make the folder what it was at `step`: no later lines, samples or snapshots, no half-written file."""
    rows = read_log(folder, step)
    with written_whole(folder / "log.jsonl") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    for path in [*folder.glob("samples/step_*.png"), *folder.glob("snapshots/generator_*.pt")]:
        if int(re.sub(r"\D", "", path.name)) > step:
            path.unlink()
    for path in [*folder.glob(".*.half"), *folder.glob("*/.*.half")]:
        path.unlink()


def read_log(folder, step=math.inf):
    rows, path = [], folder / "log.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the half line of a run that was killed
            rows += [row for row in [json.loads(line)] if row["step"] <= step]
    return rows


def set_up(c, given):
    """-> the run: its Config, folder, pictures, networks, optimisers and place, as one namespace."""
    run = types.SimpleNamespace(world=int(os.environ.get("WORLD_SIZE", 1)), rank=int(os.environ.get("RANK", 0)), step=0)
    run.device = choose_device(c.device, os.environ.get("LOCAL_RANK", 0))
    if run.world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo")
    c.run = c.run or f"runs/{c.preset}-{Path(c.data).stem if c.data else 'drawn'}"
    run.folder = Path(c.run)
    run.c, saved = c, _ = open_run(c, given)
    c.precision = choose_precision(c.precision, run.device)
    if c.batch_size % run.world:
        raise UserError(f"--batch-size {c.batch_size} cannot be divided among {run.world} processes")
    tune(c, run.device)
    ops = choose_ops(c.fused, run.device)
    say(f"run         {run.folder}, preset {c.preset}, {'goes on' if saved else 'begins'}",
        f"machine     {run.device}, {c.precision}, {'fused kernels' if c.fused else 'plain PyTorch'}, torch {torch.__version__}, "
        f"{run.world} x {torch.get_num_threads()} threads")  # fmt: skip
    run.pictures = load_pictures(c)
    if run.device.type == "cuda" and run.pictures.nbytes < torch.cuda.mem_get_info(run.device)[0] / 2:
        run.pictures = run.pictures.to(run.device)
    run.total = c.steps or math.ceil(c.epochs * len(run.pictures) / c.batch_size)
    c.noise_steps = c.noise_steps or run.total

    torch.manual_seed(key(c.seed, "weights"))
    nets = Generator(c, ops), Discriminator(c, ops)
    if not saved:
        say("", *summary(nets[0], torch.zeros(2, c.nz)), *summary(nets[1], torch.zeros(2, c.nc, c.image_size, c.image_size)), "")
    run.G, run.D = [net.to(run.device, memory_format=torch.channels_last) for net in nets]
    run.ema = copy.deepcopy(run.G).requires_grad_(False) if c.ema else None
    Adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[c.optimizer]
    hyper = dict(betas=(c.beta1, c.beta2), eps=c.adam_eps, weight_decay=c.weight_decay, fused=True)
    run.opt_g, run.opt_d = Adam(run.G.parameters(), c.lr_g, **hyper), Adam(run.D.parameters(), c.lr_d, **hyper)
    run.meters = torch.zeros(2, 6, device=run.device)  # sums of train_step's numbers since the last report, since the epoch began
    if saved:
        for name in STATEFUL:
            if getattr(run, name) is not None:
                getattr(run, name).load_state_dict(saved[name])
        run.meters.copy_(saved["meters"])
        run.step = saved["step"]
    return run


STATEFUL = ("G", "D", "ema", "opt_g", "opt_d")


def save_run(run):
    """checkpoint.pt: everything that the next step depends on.  generator.pt: what drawing needs."""
    common = dict(step=run.step, config=dataclasses.asdict(run.c))
    state = {name: getattr(run, name).state_dict() for name in STATEFUL if getattr(run, name) is not None}
    with open(run.folder / "log.jsonl", "ab") as log:
        os.fsync(log.fileno())  # no line older than the checkpoint may be lost
    save(run.folder / "checkpoint.pt", **common, meters=run.meters, **state)
    save(run.folder / "generator.pt", **common, G=(run.ema or run.G).state_dict())
    run.saved = time.monotonic()


def begin(run):
    """The folder of the run, with what does not change."""
    for name in ("samples", "snapshots"):
        (run.folder / name).mkdir(parents=True, exist_ok=True)
    tidy(run.folder, run.step)
    with written_whole(run.folder / "config.json") as file:
        file.write(json.dumps(dataclasses.asdict(run.c), indent=1).encode())
    first = batch_indices(len(run.pictures), run.c.seed, 0, run.c.samples).to(run.pictures.device)
    save_picture(grid(run.pictures[first].cpu()), run.folder / "samples" / "real.png")
    run.rows = read_log(run.folder)


def report(run, bar, seconds):
    """A line of log.jsonl and the numbers on the bar: the one place where the program waits for the device."""
    values = run.meters[0].tolist()
    run.meters[0].zero_()
    n = values[4]
    if n == 0:
        raise UserError(f"no step since step {run.step - run.c.report_every} had finite losses and gradients; nothing of them "
                        f"entered the weights. Go on from {run.folder / 'checkpoint.pt'} with --precision fp32, or begin again "
                        "with a lower --lr")  # fmt: skip
    row = {"step": run.step, "epoch": run.step * run.c.batch_size // len(run.pictures)}
    row |= {name: round(v / n, 5) for name, v in zip(("loss_d", "loss_g", "d_x", "d_gz"), values, strict=False)}
    row |= {"skipped": int(values[5])} if values[5] else {}
    row["img_s"] = round(run.c.report_every * run.c.batch_size / seconds, 1)
    if run.rank == 0:
        run.rows.append(row)
        with open(run.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
    shown = {"loss_d": "D", "loss_g": "G", "d_x": "D(x)", "d_gz": "D(G(z))"}
    bar.set_postfix({text: f"{row[name]:.3f}" for name, text in shown.items()} | {"img/s": row["img_s"]}, refresh=False)


def sample(run):
    """The grid of the fixed z, which are those of the seeds 0, 1, 2 ..., and the loss curves so far."""
    x = generate(run.ema or run.G, range(run.c.samples), run.device)
    save_picture(grid(x), run.folder / "samples" / f"step_{run.step:06d}.png")
    if run.rows:
        curves(run.rows, run.folder / "losses.png")


def end_epoch(run, epoch):
    """The line of means, a snapshot of G, the growing GIF."""
    loss_d, loss_g, _, _, good, _ = run.meters[1].tolist()
    run.meters[1].zero_()
    epochs = math.ceil(run.total * run.c.batch_size / len(run.pictures))
    say(f"Epoch [{epoch}/{epochs}] | D Loss: {loss_d / max(good, 1):.4f} | G Loss: {loss_g / max(good, 1):.4f}")
    if run.rank == 0:
        snapshots = run.folder / "snapshots"
        save(snapshots / f"generator_{run.step:06d}.pt", step=run.step, config=dataclasses.asdict(run.c),
             G=(run.ema or run.G).state_dict())  # fmt: skip
        for old in sorted(snapshots.glob("generator_*.pt"))[: -run.c.keep or None]:
            old.unlink()
        growth(run.folder)


def train(c, given=frozenset()):
    """Train as the Config says -> the exit code: 0, or 130 or 143 after a signal; saved in each case."""
    stop = Stop(c.time_limit)
    run = set_up(c, given)
    c, main, code = run.c, run.rank == 0, None
    if main:
        begin(run)
    run.saved = since = time.monotonic()
    with progress(run.total, "training", "step", run.step) as bar:
        while run.step < run.total and code is None:
            fade = max(0.0, 1 - run.step / c.noise_steps)
            inputs = draw_inputs(c, run.pictures, run.step, c.noise * fade, run.rank, run.world, run.device)
            ema_weight = 1 - min(c.ema, (1 + run.step) / (10 + run.step))  # shorter at first, or the start would linger
            run.meters += train_step(c, run.G, run.D, run.ema, run.opt_g, run.opt_d, *inputs, ema_weight, run.world)
            run.step += 1
            bar.update()
            if run.step % c.report_every == 0:
                now = time.monotonic()
                report(run, bar, now - since)
                since = now
            epoch = run.step * c.batch_size // len(run.pictures)
            if epoch > (run.step - 1) * c.batch_size // len(run.pictures):
                end_epoch(run, epoch)
            often = run.step < c.sample_every and run.step & (run.step - 1) == 0  # 1, 2, 4, 8 ...
            if main and (often or run.step % c.sample_every == 0 or run.step == run.total):
                sample(run)
            code = stop.now(run.world)
            due = run.step % c.save_every == 0 if c.save_every else time.monotonic() - run.saved > 120
            if main and (due or code is not None or run.step == run.total):
                save_run(run)
    if main:
        growth(run.folder)
        say(f"{'stopped' if run.step < run.total else 'done'} at step {run.step:,} of {run.total:,}; all of it is in {run.folder}",
            *([f"go on with     python dcgan.py --run {run.folder} --resume"] if run.step < run.total else []),
            f"make pictures  python dcgan.py generate {run.folder} --seeds 0-63")  # fmt: skip
    stop.restore()
    return code or 0


# ------------------------------------------------------------------------------------------------ command line


def parse_seeds(text):
    """"0-3,7" -> [0, 1, 2, 3, 7]."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise UserError(f"--seeds {text!r} is no list of seeds; write 0-63 or 3,7,12")
    seeds = []
    for part in text.split(","):
        first, last = (part.split("-") * 2)[:2]
        seeds += range(int(first), int(last) + 1)
    return seeds


def command_generate(args):
    """Pictures of the seeds: one grid, or a folder of single files and their grid."""
    device = choose_device(args.device)
    G, seeds = load_generator(args.source, device), parse_seeds(args.seeds)
    x = generate(G, seeds, device)
    out = Path(args.out or (Path(args.source) if Path(args.source).is_dir() else Path(args.source).parent) / "generated.png")
    if out.suffix.lower() not in SUFFIXES:
        out.mkdir(parents=True, exist_ok=True)
        for seed, picture in zip(seeds, x, strict=True):
            save_picture(T.to_pil_image(picture), out / f"seed_{seed:06d}.png")
        out = out / "grid.png"
    save_picture(grid(x), out)
    say(f"{len(seeds)} pictures: {out}")


def command_interpolate(args):
    """A closed walk through the z of the seeds, on the sphere near which normal z of many dimensions lie [9]."""
    device = choose_device(args.device)
    G, seeds = load_generator(args.source, device), parse_seeds(args.seeds)
    z = [torch.randn(G.config.nz, generator=torch.Generator().manual_seed(s)) for s in seeds]
    path = []
    for a, b in zip(z, z[1:] + z[:1], strict=True):
        angle = torch.arccos(F.cosine_similarity(a, b, dim=0).clamp(-0.9999, 0.9999))
        for t in torch.arange(args.frames) / args.frames:
            path.append((torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle))
    x = pictures_of(G, torch.stack(path), device)
    out = Path(args.out or Path(args.source) / "interpolation.gif")
    scale = max(1, 256 // G.config.image_size)
    save_gif([T.to_pil_image(p).resize([scale * G.config.image_size] * 2, 0) for p in x], out, 60)
    save_picture(grid(x[:: max(1, args.frames // 8)], columns=8), out.with_suffix(".png"))
    say(f"{len(x)} frames: {out}; the strip: {out.with_suffix('.png')}")


def command_info():
    device = choose_device("auto")
    say(f"python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__}",
        f"device: {device}, precision auto is {choose_precision('auto', device)}, {torch.get_num_threads()} threads")  # fmt: skip
    try:
        say(*fused_ops().status())
    except UserError as e:
        say(str(e))


def parser():
    p = argparse.ArgumentParser(
        "dcgan.py", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        description="Train a DCGAN. Other commands: generate, interpolate, info (each with --help).",
        epilog="presets: " + "; ".join(f"{name} ({text})" for name, text in ABOUT.items()),
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    group = p
    for f in dataclasses.fields(Config):
        m = f.metadata
        group = p.add_argument_group(m["group"]) if m["group"] else group
        names = ["--" + f.name.replace("_", "-"), *m["alias"]]
        if f.type is bool:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, help=m["help"])
        else:
            default = f" ({f.default})" if f.default not in ("", 0, -1) else ""
            group.add_argument(*names, type=f.type, choices=m["choices"], help=m["help"] + default, dest=f.name,
                               metavar="|".join(map(str, m["choices"])) if m["choices"] else f.type.__name__.upper())  # fmt: skip
    p.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    return p


def reader(command):
    p = argparse.ArgumentParser(f"dcgan.py {command}", allow_abbrev=False)
    p.add_argument("source", help="a run's folder, checkpoint.pt, generator.pt or snapshot")
    p.add_argument("--seeds", default="0-63" if command == "generate" else "0-5", help="such as 0-63 or 3,7,12")
    p.add_argument("--out", default="", help="a picture file, or (generate) a folder for single files")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu, cuda:1")
    if command == "interpolate":
        p.add_argument("--frames", type=int, default=24, help="from one seed to the next")
    return p


def command_train(argv):
    given = vars(parser().parse_args(argv))
    lr = given.pop("lr", None)
    if lr is not None:
        given = {"lr_g": lr, "lr_d": lr, **given}
    if given.get("download"):
        given["data"] = download(given["download"], given.get("data"))
    data = given.get("data", "")
    default = "demo" if not data else "mnist" if find_idx(Path(data)) else "classic"
    if given.get("resume") and "run" in given:
        return train(Config(**given), frozenset(given))
    return train(config(**{"preset": default, **given}), frozenset(given))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv and argv[0] in ("train", "generate", "interpolate", "info") else ""
    rest = argv[1:] if command else argv
    try:
        if command == "generate":
            command_generate(reader(command).parse_args(rest))
        elif command == "interpolate":
            command_interpolate(reader(command).parse_args(rest))
        elif command == "info":
            command_info()
        else:
            return command_train(rest)
    except UserError as e:
        print(f"dcgan.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""DCGAN in one file: pictures in, a generator of pictures out.

    python dcgan.py                                   drawn faces: no download, some minutes on two CPU cores
    python dcgan.py --data celeb_dataset              a folder, nested folder or .zip of pictures
    python dcgan.py --data celeb_dataset --fused      the same with the fused kernels of csrc/
    python dcgan.py --preset mnist --data mnist_dir   another system: classic, regularized, keras, demo, best
    python dcgan.py --run runs/demo-drawn --resume    go on where a run stopped
    torchrun --nproc-per-node=8 -- dcgan.py ...       the same on many GPUs, or CPU processes
    python dcgan.py generate RUN --seeds 0-63         pictures from a run, a checkpoint or a snapshot
    python dcgan.py interpolate RUN --seeds 3,7,12    a walk through latent space: a GIF and a strip
    python dcgan.py info                              device, versions, kernels

Two networks play a game [1].  G turns noise z into a picture; D tells real pictures x from those of G.  D(x) is
the probability that D gives to x being real.  D maximises log D(x) + log(1 - D(G(z))), G maximises log D(G(z)).

Notation: N pictures of nc channels and H x W pixels are (N, C, H, W); z is (N, nz); a `step` is one update of G;
`logits` are D before its sigmoid; in docstrings `-> x` means that x is returned.

From top to bottom: options, the two ops that have fused kernels, augmentation, the networks, the game that they play;
then small tools, data, checkpoints, pictures, and what runs it all.  No code uses anything further down.
New to GANs?  Begin with `train_step`.

 [1] Goodfellow et al. 2014, Generative adversarial nets, arXiv:1406.2661
 [2] Radford, Metz, Chintala 2015, DCGAN: the networks and their first weights, arXiv:1511.06434
 [3] Miyato et al. 2018, Spectral normalization for GANs, arXiv:1802.05957
 [4] Ioffe, Szegedy 2015, Batch normalization, arXiv:1502.03167
 [5] Salimans et al. 2016, Improved techniques: one-sided label smoothing, arXiv:1606.03498
 [6] Sonderby et al. 2016, Amortised MAP inference: noise on D's input, arXiv:1610.04490
 [7] Heusel et al. 2017, Two time-scale update rule: lr_d is not lr_g, arXiv:1706.08500
 [8] Yazici et al. 2018, Averaging in GAN training: the EMA of G, arXiv:1806.04498
 [9] White 2016, Sampling generative networks: spherical interpolation, arXiv:1609.04468
[10] Glorot, Bengio 2010, Understanding the difficulty of training deep networks: Keras' first weights
[11] Chen et al. 2018, On self modulation for GANs: z acts in all of G, arXiv:1810.01365
[12] Karras et al. 2020, Training GANs with limited data: adaptive augmentation, arXiv:2006.06676
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import gzip
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
import types
import typing
import warnings
import zipfile
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.transforms.v2 import functional as T
from tqdm import tqdm

FORMAT = 1  # of checkpoints and caches: a file of another format is refused, never guessed at
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # processes, and which of them this is: as torchrun sets them
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0
BELOW_1 = 1 - 1e-9  # for options that can be less than 1, not 1
NO_FOUND_INF = {"mps"}  # devices whose fused Adam refuses or ignores found_inf in some releases of torch
NO_ROOM = "not enough memory: train with a smaller --batch-size or --image-size; draw fewer --seeds, or on --device cpu"


class UserError(Exception):
    """Wrong use, unusable data, a full disk: main prints it as one line and exits with 2."""


# ---------------------------------------------------------------------------------------- configuration

# The systems.  A preset is a row of values; what it leaves out is Config's default, and where its source names no
# value it is ours: see the README.
PRESETS = {
    "classic": dict(optimizer="adamw", weight_decay=0.01),  # a PyTorch script on CelebA
    "regularized": dict(  # the PyTorch notebook that adds all that might help
        nz=128, ngf=128, ndf=128, init="normal", flips=True, spectral_norm=True, dropout2d=0.25, update="fresh",
        real_label=0.9, noise=0.1, lr_g=1e-4, lr_d=4e-4, batch_size=128, epochs=60,
    ),
    "keras": dict(  # the TF and Keras scripts on CelebA
        family="keras", fit="squash", nz=128, ngf=128, dropout=0.2, init="keras", update="fresh", loss="mean",
        lr_g=1e-4, lr_d=1e-4, beta1=0.9, adam_eps=1e-7, batch_size=32, epochs=10,
    ),
    "mnist": dict(  # the TF tutorial on MNIST
        family="mnist", image_size=28, nc=1, dropout=0.3, slope=0.3, init="keras", bn_eps=1e-3, bn_momentum=0.01,
        update="simultaneous", lr_g=1e-4, lr_d=1e-4, beta1=0.9, adam_eps=1e-7, batch_size=256, epochs=50, samples=16,
    ),
    "best": dict(  # ours; benchmarks/results/ablation.md says what each part is worth
        family="fine", batch_size=8, lr_d=1.25e-4, beta2=0.99, self_modulation=True, spectral_norm=True, augment=True,
        noise=0.05, noise_steps=-1, flips=True, ema=0.9999, sample_every=500,
    ),
    "demo": dict(  # ours: small, for the drawn faces
        image_size=32, nz=64, ngf=48, ndf=32, spectral_norm=True, flips=True, lr_g=1e-3, lr_d=1e-3, ema=0.998,
        batch_size=32, steps=2500, sample_every=250,
    ),
}  # fmt: skip


def opt(default, help, group=None, alias=(), choices=None, low=0, high=math.inf):
    """A field of Config that is an option of the command line too.  `group` begins a new group; a number can be from
    `low` to `high`, both allowed."""
    about = dict(help=help, group=group, alias=alias, choices=choices, low=low, high=high)
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass
class Config:
    """Every option there is: these defaults < preset < command line."""

    preset: str = opt("classic", "which system; none: as --data suggests", "pictures", choices=list(PRESETS))
    data: str = opt("", "folder, .zip or MNIST idx files; none: drawn faces", alias=["--dataroot"])
    image_size: int = opt(64, "height and width, pixels", alias=["--imageSize"])
    nc: int = opt(3, "channels: 3 colour, 1 grey", choices=[1, 3])
    fit: str = opt("crop", "resize and cut the centre, or squash", choices=["crop", "squash"])
    flips: bool = opt(False, "mirror real pictures at random (half of them); not for pictures of text")
    family: str = opt("dcgan", "shape of the networks; fine: dcgan, more at full size", "networks",
                      choices=["dcgan", "fine", "keras", "mnist"])  # fmt: skip
    nz: int = opt(100, "length of the latent vector z", low=1)
    ngf: int = opt(64, "width of G, channels", low=1)
    ndf: int = opt(64, "width of D, channels", low=1)
    self_modulation: bool = opt(False, "z scales the channels inside G, too [11]")
    init: str = opt("dcgan", "first weights", choices=["dcgan", "normal", "keras"])
    slope: float = opt(0.2, "of LeakyReLU below 0")
    bn_eps: float = opt(1e-5, "BatchNorm: added to the variance", low=1e-12)
    bn_momentum: float = opt(0.1, "BatchNorm: share of a batch in the running statistics", high=1)
    spectral_norm: bool = opt(False, "divide D's weights by their spectral norm [3]")
    dropout: float = opt(0.0, "in D, share of the features", high=1)
    dropout2d: float = opt(0.0, "in D, share of the channels", high=1)
    update: str = opt("reuse", "G's turn: on D's fakes again, on fresh ones, or both nets updated at once",
                      "the game", choices=["reuse", "fresh", "simultaneous"])  # fmt: skip
    loss: str = opt("sum", "of D's real and fake halves", choices=["sum", "mean"])
    real_label: float = opt(1.0, "what D is to say of real pictures; 0.9 smooths [5]", high=1)
    noise: float = opt(0.0, "std of Gaussian noise on D's input [6]")
    noise_steps: int = opt(0, "until it has fallen linearly to 0; 0: all steps of a new run; -1: it stays", low=-1)
    augment: bool = opt(False, "adaptive augmentation of all that D sees, real and fake [12]")
    optimizer: str = opt("adam", "of both networks", choices=["adam", "adamw"])
    lr_g: float = opt(5e-4, "learning rate of G; --lr sets both", high=1)
    lr_d: float = opt(5e-4, "learning rate of D [7]", high=1)
    beta1: float = opt(0.5, "Adam: decay of the mean gradient", high=BELOW_1)
    beta2: float = opt(0.999, "Adam: decay of the mean squared gradient", high=BELOW_1)
    adam_eps: float = opt(1e-8, "Adam: added to its root", low=1e-12)  # 0: 0 / 0 where a gradient is 0
    weight_decay: float = opt(0.0, "of AdamW; with adam it is L2")
    ema: float = opt(0.0, "EMA of G's weights, used for samples: its decay per step; 0: off [8]", high=BELOW_1)
    batch_size: int = opt(64, "pictures a step, over all processes", alias=["--batchSize"], low=1)
    samples: int = opt(64, "pictures in a grid", low=1)
    seed: int = opt(0, "all randomness follows from it", alias=["--manualSeed"], low=-math.inf)
    # from here on: what --resume may change
    run: str = opt("", "its folder (runs/<preset>-<data>)", "the run; --resume may change these", ["--outf"])
    resume: bool = opt(False, "go on from checkpoint.pt in --run")
    epochs: int = opt(20, "passes over the pictures, in all", alias=["--niter"], low=1)
    steps: int = opt(0, "updates of G, in all; instead of --epochs")
    time_limit: str = opt("", "save and stop after 90s, 30m, 2h of training")
    sample_every: int = opt(100, "steps between grids; more often at first", low=1)
    report_every: int = opt(10, "steps between lines of log.jsonl", low=1)
    save_every: int = opt(0, "steps between checkpoints; 0: two minutes")
    keep: int = opt(5, "snapshots of G to keep; there is one an epoch", low=1)
    device: str = opt("auto", "cuda, mps, cpu, cuda:1")
    precision: str = opt("auto", "auto: bf16 where the hardware has it; on CUDA fp32 means TF32",
                         choices=["auto", "fp32", "bf16"])  # fmt: skip
    fused: bool = opt(False, "use the fused kernels of csrc/")
    compile: bool = opt(False, "torch.compile both networks: a minute at first")
    graph: bool = opt(True, "replay the step as one CUDA graph: csrc/, one process, no --compile")
    deterministic: bool = opt(False, "CUDA: the same bits every time, slower")
    workers: int = opt(-1, "processes that decode pictures; -1: one per core from 512 pictures on", low=-1)
    cache: str = opt("runs/cache", "folder of decoded pictures, shared by runs")
    max_bad: float = opt(0.01, "more unreadable pictures than this share stop the start", high=1)
    download: str = opt("", "fetch into --data with torchvision", choices=["", "celeba", "mnist"])

    given = frozenset()  # no annotation, so no option: the names of those that were set explicitly


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
MAY_CHANGE = set(list(FIELDS)[list(FIELDS).index("run") :])  # how long, how often, where: all from `run` on


def halvings(c):
    """-> (n, base) with image_size = base * 2^n.  G begins at base x base and doubles n times; D halves back to it."""
    smallest = {"dcgan": 4, "fine": 4, "keras": 8, "mnist": 7}[c.family]  # base < 2 * smallest, so unique
    sizes = {base << n: (n, base) for n in range(1, 9) for base in range(smallest, 2 * smallest)}
    if c.image_size not in sizes:
        raise UserError(f"image_size is {c.image_size}; with family {c.family} it can be {', '.join(map(str, sizes))}")
    return sizes[c.image_size]


def config(preset="classic", **overrides):
    """-> the Config of a preset with some values set otherwise.  Raises UserError for a wrong name or value."""
    for name in overrides.keys() - FIELDS.keys():
        raise UserError(f"there is no option {name!r}; there are {', '.join(FIELDS)}")
    lengths = {"steps": 0} if "epochs" in overrides else {}  # asking for epochs overrides a preset's steps
    c = Config(**{**PRESETS.get(preset, {}), **lengths, **overrides, "preset": preset})
    for f in FIELDS.values():
        value, m = getattr(c, f.name), f.metadata
        if type(value) is not f.type and not (f.type is float and type(value) is int):
            raise UserError(f"{f.name} is {value!r}; it must be of type {f.type.__name__}")
        if m["choices"] and value not in m["choices"]:
            raise UserError(f"{f.name} cannot be {value!r}; it can be {', '.join(str(x) for x in m['choices'] if x)}")
        if f.type in (int, float) and not (m["low"] <= value <= m["high"] and abs(value) < math.inf):
            allowed = f"from {m['low']} to {m['high']}" if m["high"] < math.inf else f"{m['low']} or more"
            raise UserError(f"{f.name} is {value}; it can be {allowed}")
    if not re.fullmatch(r"(\d+(\.\d+)?[smh])?", c.time_limit):
        raise UserError(f"time_limit is {c.time_limit!r}; write 90s, 30m or 2h")
    halvings(c)  # raises where the networks cannot have this image_size
    c.given = frozenset(overrides)
    return c


def saved_config(values):
    """-> the Config that a file holds.  An option newer than the file is at its default, not its preset's."""
    return config(**dataclasses.asdict(Config()) | values)


# ---------------------------------------------------------------------------------------- the two ops
# In plain PyTorch, as the specification of the fused ones: same names, same arguments, same numbers.


def bn_leaky_relu(x, weight, bias, running_mean, running_var, training, momentum, eps, slope, groups=1):
    """leaky_relu(batch_norm(x), slope) for x (N, C) or (N, C, H, W), in its shape and dtype [4]; slope 0 is ReLU.
    In training each of `groups` equal parts of the batch has statistics of its own: D takes real and fake pictures at
    once, as two parts.  The running statistics move by each part in turn."""
    parts = x.chunk(groups) if training else [x]  # (N / groups, C, H, W) each
    y = [F.batch_norm(part, running_mean, running_var, weight, bias, training, momentum, eps) for part in parts]
    return F.leaky_relu(torch.cat(y) if len(y) > 1 else y[0], slope, inplace=True)


def spectral_norm(weights, us, vs, eps, update):
    """-> [W / sigma] for weights of any shape, each seen as a matrix (out, rest); sigma = u'Wv nears its largest
    singular value [3].  With `update` a power iteration first moves u (out,) and v (rest,), in place."""
    normalized = []
    for weight, u, v in zip(weights, us, vs, strict=True):
        with torch.autocast(weight.device.type, enabled=False):  # bf16 would blur sigma
            matrix = weight.flatten(1)
            if update:
                with torch.no_grad():
                    u.copy_(F.normalize(matrix @ v, dim=0, eps=eps))
                    v.copy_(F.normalize(matrix.T @ u, dim=0, eps=eps))
            sigma = torch.dot(u.clone(), matrix @ v.clone())  # clones: the next forward may precede this backward
            normalized.append(weight / sigma)
    return normalized


# a namespace, as a module cannot be copied: networks are deep-copied with the ops that they hold
PLAIN = types.SimpleNamespace(bn_leaky_relu=bn_leaky_relu, spectral_norm=spectral_norm)


# ---------------------------------------------------------------------------------------- augmentation


def augment(x, p):
    """Pictures (N, nc, H, H), p () -> such pictures, each with probability p turned by up to 14 degrees, shifted by up
    to an eighth of its side, scaled by exp(normal(0, 0.15)) and continued by its mirror image; with p coloured, too."""
    n, size, like = len(x), x.shape[-1], dict(device=x.device, dtype=x.dtype)
    on = (torch.rand(n, 1, 1, **like) < p).to(x.dtype)
    angle = (torch.rand(n, 1, 1, **like) - 0.5) * 0.5 * on  # (N, 1, 1), as all of these
    scale = torch.exp(torch.randn(n, 1, 1, **like) * 0.15 * on)
    dx, dy = (torch.rand(2, n, 1, 1, **like) - 0.5) * (size / 4) * on
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    i = torch.arange(size, **like) - (size - 1) / 2  # pixels, from the centre

    def neighbours(place):  # along one axis: the two pixels that a place lies between, and the share of the second
        place = (place + size / 2).remainder(2 * size)
        place = (torch.minimum(place, 2 * size - place) - 0.5).clamp(0, size - 1)  # the mirror image
        low = place.floor()
        return low.long(), (low + 1).clamp(max=size - 1).long(), (place - low)[:, None]  # (N, H, H) twice, (N, 1, H, H)

    def at(row, column):
        where = (row * size + column).flatten(1)[:, None].expand(-1, x.shape[1], -1)
        return x.flatten(2).gather(2, where).unflatten(2, (size, size))  # (N, nc, H, H)

    # where in x each pixel comes from (so the picture moves the other way); bilinear by hand, because F.grid_sample has
    # no gradient on MPS in some releases of torch, and no deterministic one on CUDA
    y0, y1, way_y = neighbours(sin * i + cos * i[:, None] + dy)
    x0, x1, way_x = neighbours(cos * i - sin * i[:, None] + dx)
    x = torch.lerp(torch.lerp(at(y0, x0), at(y0, x1), way_x), torch.lerp(at(y1, x0), at(y1, x1), way_x), way_y)
    on = (torch.rand(n, 1, 1, 1, **like) < p).to(x.dtype)
    saturation, contrast, light = (std * torch.randn(n, 1, 1, 1, **like) * on for std in (0.4, 0.2, 0.2))
    grey = x.mean(1, keepdim=True)
    x = (grey + (x - grey) * saturation.exp()) * contrast.exp() + light
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------- the networks
# A network is a list of rows, a family a way to write them.


class Row(typing.NamedTuple):
    kind: str  # "dense", "conv", or "up", a transposed convolution
    channels: int  # that come out; a dense row gives (channels, kernel, kernel)
    kernel: int = 4
    stride: int = 2
    padding: int = 1
    bias: bool = False
    bn: bool = False
    activation: str = "leaky_relu"
    dropout: float = 0.0
    dropout2d: float = 0.0


def rows_g(c):
    """The rows of G, from z (N, nz) to pictures (N, nc, H, W)."""
    n, base = halvings(c)
    if c.family in ("dcgan", "fine"):  # [2]: transposed convolutions all the way, from z as a picture of 1 x 1
        first = Row("up", c.ngf << (n - 1), base, 1, 0, bn=True, activation="relu")
        middle = [Row("up", c.ngf << i, bn=True, activation="relu") for i in reversed(range(n - 1))]
        if c.family == "dcgan":
            return [first, *middle, Row("up", c.nc, activation="tanh")]
        last = Row("up", (c.ngf + 1) // 2, bn=True, activation="relu")  # features, which a 3x3 layer makes pixels of
        return [first, *middle, last, Row("conv", c.nc, 3, 1, 1, activation="tanh")]
    if c.family == "keras":  # wider as the picture grows
        first = Row("dense", c.ngf, base, bias=True, activation="none")
        middle = [Row("up", c.ngf << i, bias=True) for i in range(n)]
        return [first, *middle, Row("conv", c.nc, 5, 1, 2, bias=True, activation="sigmoid")]
    first = Row("dense", 4 * c.ngf, base, bn=True)
    second = Row("up", 2 * c.ngf, 5, 1, 2, bn=True)
    middle = [Row("up", c.ngf, 5, 2, 2, bn=True) for _ in range(n - 1)]
    return [first, second, *middle, Row("up", c.nc, 5, 2, 2, activation="tanh")]


def rows_d(c):
    """The rows of D, from pictures (N, nc, H, W) to one logit each."""
    n, base = halvings(c)
    drop = dict(dropout=c.dropout, dropout2d=c.dropout2d)
    if c.family in ("dcgan", "fine"):  # [2]: BatchNorm everywhere but in the first and last
        hidden = [Row("conv", c.ndf << i, bn=i > 0 or c.family == "fine", **drop) for i in range(n)]
        if c.family == "fine":  # it looks at every pixel before it halves
            hidden.insert(0, Row("conv", (c.ndf + 1) // 2, 3, 1, 1, **drop))
            if base > 4:  # halve once more, or each of base x base features judges its surroundings alone
                hidden.append(Row("conv", c.ndf << n, 3, 2, 1, bn=True, **drop))
                base = (base + 1) // 2
        return [*hidden, Row("conv", 1, base, 1, 0, activation="none")]
    if c.family == "keras":  # features are dropped only once, before the dense layer
        hidden = [Row("conv", c.ndf << min(i, 1), bias=True, dropout2d=c.dropout2d) for i in range(n)]
        hidden[-1] = hidden[-1]._replace(dropout=c.dropout)
    else:
        hidden = [Row("conv", c.ndf << i, 5, 2, 2, bias=True, **drop) for i in range(n)]
    return [*hidden, Row("dense", 1, 1, bias=True, activation="none")]


class Block(nn.Module):
    """One row: a dense layer, convolution or transposed convolution, then BatchNorm, the activation and dropout.
    Where it is modulated, z scales the channels that enter [11]."""

    def __init__(self, row, channels, c, ops, modulated=False):
        super().__init__()
        self.row, self.ops = row, ops
        self.slope = {"relu": 0.0, "leaky_relu": c.slope}.get(row.activation)  # None: another activation, or none
        out, k, s, p = row.channels, row.kernel, row.stride, row.padding
        features = out  # those that BatchNorm has statistics of
        if row.kind == "dense":
            features, self.shape = out * k * k, (out, k, k)
            self.layer = nn.Linear(channels, features, row.bias)
        elif row.kind == "conv":
            self.layer = nn.Conv2d(channels, out, k, s, p, bias=row.bias)
        else:  # output_padding: so that a stride of 2 doubles the picture exactly
            self.layer = nn.ConvTranspose2d(channels, out, k, s, p, max(0, s + 2 * p - k), bias=row.bias)
        self.bn = nn.BatchNorm2d(features, c.bn_eps, c.bn_momentum) if row.bn else None  # its state, not its forward
        # weights: normal(0, 0.02) [2], or Glorot's as Keras draws them [10]; BatchNorm's too, where init is dcgan
        if c.init == "keras":
            nn.init.xavier_uniform_(self.layer.weight)
        else:
            nn.init.normal_(self.layer.weight, 0, 0.02)
        if row.bias:
            nn.init.zeros_(self.layer.bias)
        if row.bn and c.init == "dcgan":
            nn.init.normal_(self.bn.weight, 1, 0.02)
        self.scale = nn.Linear(c.nz, channels, bias=False) if modulated else None
        if modulated:
            nn.init.normal_(self.scale.weight, 0, 0.02)

    def forward(self, x, weight=None, groups=1, z=None):
        """x (N, C, H, W), or z (N, nz); `groups` as in bn_leaky_relu; `weight` replaces a dense or conv layer's own."""
        row, layer, bn = self.row, self.layer, self.bn
        weight = layer.weight if weight is None else weight
        if self.scale is not None:
            x = x * (1 + self.scale(z))[..., None, None]
        if row.kind == "dense":
            x = F.linear(x.flatten(1), weight, layer.bias)
        elif row.kind == "conv":
            x = F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
        elif x.dim() == 2:  # up from z, pictures of 1 x 1: a matmul does it
            x = torch.tensordot(x, weight, 1)  # (N, C) x (C, out, k, k) -> (N, out, k, k)
        else:
            x = layer(x)
        if bn is not None:
            state = bn.running_mean, bn.running_var, self.training, bn.momentum, bn.eps
            x = self.ops.bn_leaky_relu(x, bn.weight, bn.bias, *state, self.slope, groups)
        elif self.slope is not None:
            x = F.leaky_relu(x, self.slope)
        elif row.activation != "none":  # the picture itself: in fp32 even under autocast
            x = getattr(torch, row.activation)(x.to(torch.promote_types(x.dtype, torch.float32)))
        x = x.unflatten(1, self.shape) if row.kind == "dense" else x  # (N, C * k * k) -> (N, C, k, k)
        x = F.dropout(x, row.dropout, self.training)
        return F.dropout2d(x, row.dropout2d, self.training)


class Generator(nn.Module):
    """z (N, nz) -> pictures (N, nc, H, W), float32 in [-1, 1]; the keras family ends in a sigmoid: in [0, 1]."""

    def __init__(self, c, ops=PLAIN):
        super().__init__()
        self.config, self.blocks, channels = c, nn.ModuleList(), c.nz
        for i, row in enumerate(rows_g(c)):
            self.blocks.append(Block(row, channels, c, ops, modulated=i > 0 and c.self_modulation))
            channels = row.channels

    def forward(self, z):
        x = z
        for block in self.blocks:
            x = block(x, z=z)
        return x


class Discriminator(nn.Module):
    """Pictures (N, nc, H, W) -> logits (N,).  Several mini-batches go through in one pass, each with BatchNorm
    statistics of its own, as D(torch.cat([real, fake]), groups=2).

    Where c.augment, all that it sees in training is augmented, real and fake, with a probability p that rises while D
    is too sure of real pictures, so that it cannot learn a small data set by heart [12].  p begins at 0, and stays
    below 1, or G would learn to draw augmented ones.  It moves on D's turn only, that is where groups is 2;
    there the first half is real."""

    TARGET, MOST = 0.5, 0.8  # the mean sign of the logits of real pictures that p is steered to; the largest p
    SLOW = 50_000  # real pictures in which p would go from 0 to 1

    def __init__(self, c, ops=PLAIN):
        super().__init__()
        self.config, self.ops, self.blocks, channels = c, ops, nn.ModuleList(), c.nc
        for row in rows_d(c):
            features = channels * halvings(c)[1] ** 2  # of pictures of base x base
            self.blocks.append(Block(row, features if row.kind == "dense" else channels, c, ops))
            channels = row.channels
        for block in self.blocks if c.spectral_norm else []:
            weight = block.layer.weight.detach()
            block.register_buffer("u", F.normalize(torch.randn(len(weight)), dim=0))
            block.register_buffer("v", F.normalize(torch.randn(weight[0].numel()), dim=0))
            for _ in range(15):  # as torch.nn.utils.parametrizations.spectral_norm begins
                spectral_norm([weight], [block.u], [block.v], 1e-12, update=True)
        if c.augment:
            self.register_buffer("p", torch.zeros(()))
            self.register_buffer("sure", torch.zeros(()))  # the moving mean that is steered to TARGET

    def forward(self, x, groups=1):
        augmented = self.config.augment and self.training
        x = augment(x, self.p) if augmented else x
        weights = [block.layer.weight for block in self.blocks]
        if self.config.spectral_norm:
            us, vs = [block.u for block in self.blocks], [block.v for block in self.blocks]
            weights = self.ops.spectral_norm(weights, us, vs, 1e-12, self.training)
        for block, weight in zip(self.blocks, weights, strict=True):
            x = block(x, weight, groups)
        logits = x.flatten().to(torch.promote_types(x.dtype, torch.float32))
        if augmented and groups == 2:
            with torch.no_grad():
                sign = logits[: len(x) // 2].sign().mean()
                if WORLD > 1:  # so that all have one p, which the checkpoint of the first can hold
                    dist.all_reduce(sign)
                self.sure += 0.005 * (sign / WORLD - self.sure)
                way = torch.sign(self.sure - self.TARGET) * (self.config.batch_size / self.SLOW)
                self.p.copy_((self.p + way).clamp(0, self.MOST))  # at once: compiled by torch 2.11 a clamp_ is lost
        return logits


# ---------------------------------------------------------------------------------------- the game


def apply_gradients(optimizer, loss, good):
    """Take Adam's step if `good`, and if the loss and all gradients are finite -> whether so, a bool on the device.
    Over many processes losses and gradients are averaged first, so that all decide and move alike."""
    grads = [p.grad for p in optimizer.param_groups[0]["params"]]
    loss = torch.where(good, loss.detach(), math.nan)  # one that is nan makes the mean of all processes nan
    if WORLD > 1:  # all in one, for each all_reduce costs its delay
        flat = torch.cat([loss.view(1), *[g.flatten() for g in grads]])
        dist.all_reduce(flat)
        loss, *means = (flat / WORLD).split([1, *[g.numel() for g in grads]])
        torch._foreach_copy_(grads, [mean.view(g.shape) for mean, g in zip(means, grads, strict=True)])
    good = torch.isfinite(loss.squeeze() + torch.nn.utils.get_total_norm(grads))
    on_device = good.device.type not in NO_FOUND_INF
    optimizer.found_inf = (~good).float() if on_device else None  # how GradScaler tells a fused Adam to change nothing
    if on_device or good:
        optimizer.step()
    optimizer.zero_grad()
    return good


@torch.no_grad()
def average(ema, G, weight):
    """Move all weights and running statistics of ema by `weight`, a tensor (), of the way to those of G [8]."""
    for old, new in zip(ema.state_dict().values(), G.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, weight.to(old.dtype))


METRICS = ("loss_d", "loss_g", "d_x", "d_gz", "good", "bad")  # of one step; the first four go to log.jsonl, as means


def train_step(c, G, D, ema, opt_g, opt_d, real, z, noise, ema_weight=0.0):
    """One update of D and one of G -> METRICS, (6,) on the device.  With update "reuse", and without noise, EMA, other
    labels and the guard, it is

        fake = G(z)
        loss_d = bce(D(real), 1) + bce(D(fake.detach()), 0)   # then a step of opt_d; detach: G learns nothing from it
        loss_g = bce(D(fake), 1)                              # then a step of opt_g: G wants its fakes called real

    With "fresh", G draws other fakes for its turn; with "simultaneous", both losses come before both updates.

    real (n, nc, H, W).  z (2, n, nz): for the fakes that D learns from, and for G's own where update is fresh.
    noise (3, n, nc, H, W) or zeros: on real pictures, on fakes, on those of G's turn.  ema_weight (): 1 - EMA's decay.

    The guard: nothing may change by a loss, gradient or buffer that is not finite.  `good` says on the device whether
    all was finite so far.  If not, this update and any later one of the step are skipped and the buffers put back; bad
    is 1, all else 0.  An update of D made before stays.  No `if` on a tensor: it would wait for the device.  A CUDA
    graph runs this Python only at the start: to print at each step, use --no-graph."""
    at_once, fresh = c.update == "simultaneous", c.update == "fresh"  # at once: both losses first, then both updates
    bce = F.binary_cross_entropy_with_logits
    good = torch.isfinite(real).all() & torch.isfinite(z).all()
    bf16 = dict(dtype=torch.bfloat16, enabled=c.precision == "bf16", cache_enabled=False)
    precision = functools.partial(torch.autocast, real.device.type, **bf16)
    buffers = [b for net in (G, D) for b in net.buffers() if b.is_floating_point()]  # running statistics, u and v
    before = [b.clone() for b in buffers]  # forward passes move them; put back below if the step is bad

    ##########################################################################
    # (1) Update D: maximise log D(x) + log(1 - D(G(z)))
    ##########################################################################
    with precision():
        with torch.set_grad_enabled(not fresh):  # fresh: G draws others for its turn, these need no graph
            fake = G(z[0])
        both = torch.cat([real + noise[0], (fake if at_once else fake.detach()) + noise[1]])
        logits_real, logits_fake = D(both, groups=2).chunk(2)  # two mini-batches in one pass; (n,) each
    loss_real = bce(logits_real, torch.full_like(logits_real, c.real_label))
    loss_fake = bce(logits_fake, torch.zeros_like(logits_fake))
    loss_d = (loss_real + loss_fake) / (2 if c.loss == "mean" else 1)
    loss_d.backward(inputs=list(D.parameters()), retain_graph=at_once)  # at once: loss_g needs the same graph
    if not at_once:
        good = apply_gradients(opt_d, loss_d, good)

    ##########################################################################
    # (2) Update G: maximise log D(G(z))
    ##########################################################################
    if not at_once:  # against the new D; at once: G learns from D's pass above, the same weights and dropout
        D.requires_grad_(False)  # its weights need no gradient here, and none is computed
        with precision():
            fake = G(z[1]) if fresh else fake
            logits_fake = D(fake + noise[2])
        D.requires_grad_(True)
    loss_g = bce(logits_fake, torch.ones_like(logits_fake))  # not log(1 - D): flat where D is sure they are fake [1]
    loss_g.backward(inputs=list(G.parameters()))
    if buffers:  # a variance can overflow where the loss and the gradients do not
        good = good & torch.isfinite(torch.stack(torch._foreach_norm(buffers, ord=math.inf))).all()
    if at_once:
        good = apply_gradients(opt_d, loss_d, good)
    good = apply_gradients(opt_g, loss_g, good)
    for now, old in zip(buffers, before, strict=True):
        now.copy_(torch.where(good, now, old))
    if ema is not None:
        average(ema, G, ema_weight * good)
    metrics = torch.stack([loss_d, loss_g, logits_real.sigmoid().mean(), logits_fake.sigmoid().mean()]).detach()
    return torch.cat([torch.where(good, metrics, 0.0), torch.stack([good, ~good]).to(metrics.dtype)])


# ---------------------------------------------------------------------------------------- small tools


def key(*parts):
    """-> 63 bits that follow from the parts alone: the seed of everything random, on any machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def say(*lines):
    """Print, on the first process only, and above the progress bar if there is one."""
    if RANK == 0 and sys.stdout:  # None: closed
        code = sys.stdout.encoding or "utf-8"  # names of files can hold what the terminal cannot show
        with contextlib.suppress(OSError):  # a terminal or pipe that has gone stops no run
            tqdm.write("\n".join(lines).encode(code, errors="replace").decode(code), file=sys.stdout)
            sys.stdout.flush()


def progress(total, layout, *, initial=0, every_process=False):
    """A tqdm bar; silent where the output is no terminal, and on all processes but the first or the one that calls."""
    silent = (RANK > 0 and not every_process) or not sys.stderr or None  # None: tqdm asks
    return tqdm(total=total, initial=initial, bar_format=layout, unit="img", disable=silent, dynamic_ncols=True)


@contextlib.contextmanager
def explained(what, *errors):
    """Turn these errors, and running out of memory, into a UserError of one line: `what` it means for the user, and
    in brackets what the error says."""
    try:
        yield
    except (MemoryError, RuntimeError, *errors) as e:
        full = isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "you tried to allocate" in str(e)  # on a CPU
        if not full and not isinstance(e, errors):
            raise
        what = NO_ROOM if full else what
        raise UserError(f"{what} ({type(e).__name__}: {' '.join(str(e).split())[:200]})") from None


@contextlib.contextmanager
def written_whole(path):
    """with written_whole(path) as file: an atomic write.  The binary file gets its name once it is wholly on
    the disk: a reader finds the old one or the new one, never a part."""
    half = path.with_name(f".{path.name}.half")
    with explained(f"cannot write {path}; what stood there before is intact", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(half, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            for wait in (0.1, 0.5, 2):  # Windows replaces no file that a viewer or a virus scanner has open
                with contextlib.suppress(PermissionError):
                    return os.replace(half, path)
                time.sleep(wait)
            os.replace(half, path)
        finally:
            with contextlib.suppress(OSError):  # it is gone already, if all went well
                half.unlink()


# ---------------------------------------------------------------------------------------- data

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
UNREADABLE = {".heic", ".heif", ".avif", ".jxl", ".jp2"}  # pictures in formats that are not read: counted and named
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow reads more, some by running other programs
DRAWN = 8192  # faces in the built-in data set


def draw_face(seed, size):
    """-> a drawn face, a Pillow RGB picture of size x size: all of it, head to glasses, follows from the seed."""
    r = random.Random(seed)  # noqa: S311 - a drawing, not a secret
    skin = r.choice(["#ffe0c4", "#f6c9a0", "#e0a878", "#b97a4a", "#8a5630", "#5c3a20"])
    hair = r.choice(["#1c1410", "#4a2c14", "#8c5a22", "#d8b050", "#b03a20", "#b8b8c0", "#3050c0", "#c040a0"])
    eyes, lips = r.choice(["#2060d0", "#207040", "#60350f"]), r.choice(["#a01828", "#d04050", "#701c28"])
    sky = tuple(r.randrange(120, 256) for _ in range(3))
    s = 4 * size  # drawn four times as large, so that shrinking smooths the edges
    picture = Image.new("RGB", (s, s), sky)
    pen = ImageDraw.Draw(picture)
    x, y, w, h = r.uniform(0.45, 0.55), r.uniform(0.52, 0.58), r.uniform(0.28, 0.34), r.uniform(0.34, 0.40)

    def box(cx, cy, rx, ry):  # around a centre, in units of the head
        return [(x + (cx - rx) * w) * s, (y + (cy - ry) * h) * s, (x + (cx + rx) * w) * s, (y + (cy + ry) * h) * s]

    style = r.choice(["short", "long", "long", "round", "round", "bald"])
    if style in ("long", "round"):
        pen.ellipse(box(0, -0.15, 1.25, 1.05) if style == "long" else box(0, -0.35, 1.35, 1.0), hair)
    if style == "long":
        pen.rectangle(box(0, 0.4, 1.25, 0.55), hair)
    pen.ellipse(box(0, 0, 1, 1), skin)
    if style != "bald":  # what falls over the forehead
        pen.chord(box(0, -0.1, 1.0, 0.95), r.randrange(195, 220), r.randrange(320, 345), hair)
    apart, wide, glasses = r.uniform(0.38, 0.46), r.uniform(0.13, 0.18), r.random() < 0.25
    for side in (-apart, apart):
        pen.ellipse(box(side, -0.08, 0.24, wide), "white")
        pen.ellipse(box(side, -0.08, 0.13, wide), eyes)
        if glasses:
            pen.ellipse(box(side, -0.08, 0.34, 0.27), outline="#101010", width=s // 32)
    if r.random() < 0.5:  # a smile, or an open mouth
        pen.chord(box(0, 0.38, 0.45, 0.32), 5, 175, lips)
    else:
        pen.ellipse(box(0, 0.54, r.uniform(0.2, 0.4), r.uniform(0.1, 0.17)), lips)
    picture = picture.rotate(r.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=sky)
    return picture.resize((size, size), Image.Resampling.BOX)


def find_idx(path):
    """-> MNIST's training pictures: the idx file itself, or the one in a folder, torchvision's too; else None."""
    if path.is_file():
        return path if re.search(r"idx3-ubyte(\.gz)?$", path.name) else None
    folders = (path, path / "raw", path / "MNIST" / "raw")
    found = (file for folder in folders for file in sorted(folder.glob("train-images[-.]idx3-ubyte*")))
    return next(filter(Path.is_file, found), None)


def read_idx(path):
    """-> (n, H, W) uint8, the pictures of an idx file, plain or .gz.  Raises UserError if its header lies."""
    with explained(f"{path} is no whole idx file of pictures; if it should be, fetch it again", Exception):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            magic, n, h, w = np.frombuffer(file.read(16), ">u4").tolist()
            body = file.read(min(n * h * w, 1 << 32) + 1)
        if magic != 0x803 or not body or len(body) != n * h * w:
            raise ValueError(f"{magic:#x}, {n} x {h} x {w} bytes, {len(body):,} read; pictures begin with 0x803")
    return np.frombuffer(body, np.uint8).reshape(n, h, w)


def list_files(root):
    """-> the sorted names of all files below root, except in run folders, whose samples are not data.  Opens none."""
    found, seen = [], set()
    for folder, subfolders, names in os.walk(root, onerror=lambda e: say(f"left out: {e}"), followlinks=True):
        if os.path.realpath(folder) in seen or {"config.json", "log.jsonl"} <= set(names):  # a link that loops, a run
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        paths = [os.path.join(folder, name) for name in names]
        paths = [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]  # or a link to nothing
        found += [path[len(os.path.join(root, "")) :] for path in paths]
    return sorted(found)


def decode(picture, c):
    """A Pillow picture as it was opened, of any mode -> the same in RGB, or grey where nc is 1, and upright."""
    mode = "RGB" if c.nc == 3 else "L"
    if picture.format in ("JPEG", "MPO"):  # comes at 1/2, 1/4 or 1/8 where that will do: up to 4.4 times as fast
        picture.draft(mode, (c.image_size, c.image_size))
    picture.load()  # raises where its pixels are damaged, some formats only the first time
    with contextlib.suppress(Exception):  # a sound picture with damaged EXIF is still a picture
        picture = ImageOps.exif_transpose(picture)  # not in_place: Pillow 9 has no such argument
    if picture.mode[0] in "IF":  # 16 or 32 bits: scaled by what such values can reach
        x = np.nan_to_num(np.asarray(picture, np.float64), posinf=0, neginf=0)
        high = 65535 if picture.mode[0] == "I" else 255 if x.max() > 1 else 1  # floats: of 0 to 255, or 0 to 1
        picture = Image.fromarray((x * (255 / max(x.max(), high))).clip(0, 255).astype(np.uint8))
    elif picture.mode.endswith(("A", "a")) or "transparency" in picture.info:  # over white, as a page would show it
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    elif picture.mode == "LAB":  # Pillow knows no way from there to grey
        picture = picture.convert("RGB")
    return picture if picture.mode == mode else picture.convert(mode)


def fit_picture(picture, c):
    """A Pillow picture -> the same in image_size x image_size: squashed, or the largest square at its centre."""
    size, smooth = (c.image_size, c.image_size), Image.Resampling.BILINEAR  # antialiased
    return ImageOps.fit(picture, size, smooth) if c.fit == "crop" else picture.resize(size, smooth)


class Pictures(torch.utils.data.Dataset):
    """What --data points at.  [i] -> the pixels, the bytes of (H, W, nc) uint8, or a str: why it cannot be read.
    Raises UserError where there is nothing.  `key` names its cache: it follows from the names, sizes and times of the
    files, not from what is in them, and from how they are decoded."""

    def __init__(self, c):
        self.c, self.kind, facts = c, "drawn", DRAWN
        if c.data:
            self.root = (find_idx(Path(c.data)) or Path(c.data)).absolute()
            if not self.root.exists():
                raise UserError(f"--data {c.data}: no such file or folder; give a folder or .zip of pictures")
            self.kind = "folder" if self.root.is_dir() else "idx" if find_idx(self.root) else "zip"
            files = [os.path.join(self.root, name) for name in self.names] if self.kind == "folder" else [self.root]
            infos = [os.stat(file, follow_symlinks=os.path.exists(file)) for file in files]  # or of a link to nothing
            facts = [(str(file), info.st_size, info.st_mtime_ns) for file, info in zip(files, infos, strict=True)]
        self.key = f"{key(FORMAT, 'NHWC', self.kind, c.image_size, c.nc, c.fit, PIL.__version__, facts):016x}"

    @functools.cached_property
    def source(self):  # of a zip each process opens its own: forked ones would share one position in the file
        return zipfile.ZipFile(self.root) if self.kind == "zip" else read_idx(self.root)

    @functools.cached_property
    def names(self):
        """What [i] reads, by name or number.  A zip or idx file is opened for it."""
        if self.kind in ("drawn", "idx"):
            return range(DRAWN if self.kind == "drawn" else len(self.source))
        what = f"--data {self.root} is no folder, .zip or idx file; give one"
        with explained(what, zipfile.BadZipFile, NotImplementedError, ValueError):
            files = list_files(self.root) if self.kind == "folder" else zipfile.ZipFile(self.root).namelist()
        kinds = SUFFIXES | UNREADABLE
        pictures = [name for name in files if os.path.splitext(name)[1].lower() in kinds]
        pictures = [name for name in pictures if not re.search(r"(^|[/\\])\.(?!\.?[/\\])", name)]  # hidden
        if not pictures:
            looked = f"looked for {' '.join(sorted(SUFFIXES))} in all of it, found {len(files)} other files"
            raise UserError(f"--data {self.root}: {looked}; give the folder or .zip of the pictures")
        return pictures

    def open(self, name):
        """-> the Pillow picture, its header read, in most cases not yet decoded."""
        if self.kind == "drawn":
            return draw_face(name, self.c.image_size)
        if self.kind == "idx":
            return Image.fromarray(self.source[name])
        if self.kind == "folder":
            return Image.open(os.path.join(self.root, name), formats=FORMATS)
        size, most = self.source.getinfo(name).file_size, 3 * Image.MAX_IMAGE_PIXELS
        if size > most:
            raise ValueError(f"{size:,} bytes; {most:,} are allowed")
        return Image.open(io.BytesIO(self.source.read(name)), formats=FORMATS)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # decoders warn; what matters they raise
                warnings.simplefilter("error", Image.DecompressionBombWarning)  # by Pillow, from the header alone
                with self.open(self.names[i]) as picture:
                    return fit_picture(decode(picture, self.c), self.c).tobytes()
        except Exception as e:  # decoders raise anything at all: the picture is left out, counted and named
            return f"{self.names[i]}: {type(e).__name__}: {' '.join(str(e).split())}"


def leave_with_parent(_):
    """Run in each worker: it ends with the run.  Else the workers of a killed run would wait for ever at a pipe."""
    parent = multiprocessing.parent_process()  # the run, be the worker forked, spawned or of a fork server
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def decode_all(pictures, c, array, index):
    """Decode in parallel into the file `array`, (n, H, W, nc) uint8 in the order of names; then write `index`, and
    return what is in it: the shape, and what was left out and why."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = c.workers if c.workers >= 0 else cores if len(pictures) >= 512 else 0
    flags = dict(num_workers=workers, worker_init_fn=leave_with_parent)
    # its workers start here: within written_whole an error of theirs would be blamed on the disk
    batches = iter(torch.utils.data.DataLoader(pictures, 32, collate_fn=list, **flags))
    left_out = []
    layout = "decoding {n_fmt}/{total_fmt} [{remaining}, {rate_fmt}] {bar}"
    with written_whole(array) as file, progress(len(pictures), layout, every_process=True) as bar:
        for batch in batches:
            left_out += [x for x in batch if isinstance(x, str)]
            file.write(b"".join(x for x in batch if isinstance(x, bytes)))
            bar.update(len(batch))
    facts = {"shape": [len(pictures) - len(left_out), c.image_size, c.image_size, c.nc], "left_out": left_out}
    with written_whole(index) as file:
        file.write(json.dumps(facts, indent=1).encode())
    return facts


def read_index(array, index):
    """-> what is known of a cache that is whole, else None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads(index.read_text())
        return facts if array.stat().st_size == math.prod(facts["shape"]) else None


def load_pictures(c):
    """-> (n, nc, H, W) uint8, channels last, mapped from the cache, which is first made if these are not in it.
    Raises UserError if more than the share --max-bad of them cannot be read."""
    pictures, cache = Pictures(c), Path(c.cache)
    array, index = cache / f"{pictures.key}.u8", cache / f"{pictures.key}.json"
    cache.mkdir(parents=True, exist_ok=True)
    found = read_index(array, index)
    with contextlib.nullcontext() if found else FileLock(cache / ".lock"):  # one decodes; a dead one's lock is free
        found = facts = found or read_index(array, index)  # it may be there by now
        if not found:
            for half in cache.glob(".*.half"):  # of one that was killed
                half.unlink()
            with explained("decoding stopped, maybe for lack of memory; try --workers 0", RuntimeError, OSError):
                facts = decode_all(pictures, c, array, index)
    shape, bad, size = facts["shape"], facts["left_out"], math.prod(facts["shape"])
    if not size or len(bad) > c.max_bad * (shape[0] + len(bad)):
        what = f"{len(bad)} of {shape[0] + len(bad)} pictures cannot be read; --max-bad allows {c.max_bad:.1%}"
        what += f": repair or remove them, or raise --max-bad; if they can be read by now, delete {index}"
        raise UserError("\n  ".join([what, *bad[:100]]))
    where = f"{'found in' if found else 'decoded into'} {array}, {size / 1e6:.0f} MB"
    say(f"pictures    {shape[0]:,} of {c.data or 'the built-in drawn faces'}, {where}")
    if bad:
        say(f"            {len(bad)} are left out, all named in {index}; such as", *bad[:5])
    return torch.from_file(str(array), size=size, dtype=torch.uint8).view(shape).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch, device):
    generator = torch.Generator().manual_seed(key(seed, "epoch", epoch))
    return torch.randperm(n, generator=generator).to(device)


def batch_indices(n, seed, start, stop, device="cpu"):
    """-> (stop - start,) int64: places start..stop of the endless stream of epochs, each a permutation of the n
    pictures that follows from (seed, epoch).  So every batch is full, and a position is all there is to save."""
    parts = []
    while start < stop:
        epoch, first = divmod(start, n)
        parts.append(permutation(n, seed, epoch, device)[first : first + stop - start])
        start += len(parts[-1])
    return torch.cat(parts)


def download(name, root):
    """Fetch a data set with torchvision into the folder root -> what --data is to be."""
    if name == "mnist":
        fetch, root, by_hand = torchvision.datasets.MNIST, root or "mnist_dir", "put its four idx files there by hand"
    else:
        fetch, root = torchvision.datasets.CelebA, root or "celeb_dataset"
        by_hand = "it needs pip install -e '.[download]'; if the quota of its server is spent, give --data the zip of"
        by_hand += " kaggle datasets download -d jessicali9530/celeba-dataset"
    with explained(f"--download {name} into {root} failed; {by_hand}", Exception):  # no network, gdown or quota
        Path(root).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(root) / ".lock"):  # one process fetches, the others find it there
            fetch(root, download=True)
    return root


def to_range(pixels, c):
    """uint8 -> float32 in the range of G's pictures."""
    return pixels / 255 if c.family == "keras" else pixels / 127.5 - 1


def to_pixels(x, c):
    """The inverse of to_range."""
    return (x * 255 if c.family == "keras" else (x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_inputs(c, pictures, step, device):
    """-> real, z, noise, as train_step takes them: what a step needs from outside.

    It all follows from (seed, step), so there is no state to save; it is drawn for the whole batch and cut to this
    process's n = batch_size / WORLD, so that many processes see what one would."""
    size, here = c.batch_size, slice(RANK * c.batch_size // WORLD, (RANK + 1) * c.batch_size // WORLD)
    pixels = pictures[batch_indices(len(pictures), c.seed, step * size, (step + 1) * size, pictures.device)[here]]
    if device.type == "cuda" and not pixels.is_cuda:  # so that the copy waits for nothing
        pixels = pixels.pin_memory()
    pixels = pixels.to(device, non_blocking=device.type == "cuda")  # elsewhere pixels could be freed before the copy
    chance = dict(generator=torch.Generator(device).manual_seed(key(c.seed, "step", step)), device=device)
    z = torch.randn(2, size, c.nz, **chance)[:, here]
    if c.flips:
        pixels = torch.where(torch.rand(size, 1, 1, 1, **chance)[here] < 0.5, pixels.flip(-1), pixels)
    real = to_range(pixels.contiguous(memory_format=torch.channels_last), c)
    noise = torch.zeros(3, 1, 1, 1, 1, device=device)
    left = 1 - step / c.noise_steps if c.noise_steps > 0 else 1.0  # below 0: it stays
    if c.noise and left > 0:
        noise = c.noise * left * torch.randn(3, size, *real.shape[1:], **chance)[:, here]
    if c.dropout or c.dropout2d or c.augment:
        torch.manual_seed(key(c.seed, "dropout", step, RANK))  # what D drops and augments is each process's own
    return real, z, noise


# ---------------------------------------------------------------------------------------- checkpoints


def save(path, **contents):
    """Write tensors and plain values so that path always holds a whole file."""
    buffer = io.BytesIO()  # torch.save to a file would hide why a write failed
    torch.save({"format": FORMAT, **contents}, buffer)
    with written_whole(path) as file:
        file.write(buffer.getbuffer())


def reading(path):
    """with reading(path): an error from a missing, damaged or foreign file becomes a UserError that names it."""
    if not Path(path).exists():
        raise UserError(f"there is no {path}; give the folder of a run, or a .pt file from one")
    go_on = "to draw, take another, such as one in snapshots/" if str(path).endswith(".pt") else "begin another run"
    return explained(f"{path} is damaged or of another program or version; {go_on}", Exception)


def load(path):
    """-> what `save` wrote, on the CPU, its config as a Config.  Tensors and plain values only: no file runs code."""
    with reading(path):
        archive = zipfile.ZipFile(path)
        # torch.load looks at no checksum, and skips a member that is marked as a folder
        if archive.testzip() or any(member.external_attr for member in archive.infolist()):
            raise ValueError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT or type(saved["step"]) is not int or saved["step"] < 0:
            raise ValueError(f"format {saved['format']}, not {FORMAT}, or an impossible step")
        return {**saved, "config": saved_config(saved["config"])}


def load_generator(path, device="cpu", ops=PLAIN):
    """-> G in eval mode, its Config as G.config, from a run's folder, checkpoint.pt, generator.pt or a snapshot.
    Raises UserError if that is missing, damaged or no file of ours."""
    path = Path(path) / "generator.pt" if Path(path).is_dir() else Path(path)
    saved = load(path)
    with reading(path), torch.device("meta"):  # allocates nothing: a foreign config could ask for any amount
        G = Generator(saved["config"], ops)
        G.load_state_dict(saved["ema"] if "ema" in saved else saved["G"], assign=True)
    return G.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------- pictures


def latent(seeds, nz):
    """-> (len(seeds), nz): the z of a seed comes from a generator of its own, on the CPU."""
    return torch.stack([torch.randn(nz, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.inference_mode()
def draw(G, z, device, precision="fp32", chunk=64):
    """z (n, nz) -> (n, nc, H, W) uint8 on the CPU.  BatchNorm takes its running statistics, and all chunks have one
    size, so that the same z gives the same picture whatever is drawn beside it."""
    training, pictures = G.training, []
    G.eval()
    for part in z.split(chunk):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            x = G(F.pad(part, (0, 0, 0, chunk - len(part))).to(device))
        pictures.append(to_pixels(x[: len(part)], G.config).cpu())
    G.train(training)
    return torch.cat(pictures)


def grid(x, columns=0):
    """(n, nc, H, W) uint8 -> one Pillow picture, as near to a square as n allows."""
    columns = columns or math.ceil(math.sqrt(len(x)))
    return T.to_pil_image(torchvision.utils.make_grid(x, columns, padding=2, pad_value=255))


def save_picture(picture, path, **options):
    with explained(f"cannot write {path}", ValueError), written_whole(path) as file:  # WebP: 16,383 pixels at most
        picture.save(file, format=Image.registered_extensions()[path.suffix.lower()], **options)


def save_gif(frames, path, milliseconds):
    first, *others = (frame.convert("RGB").quantize(128) for frame in frames)
    save_picture(first, path, save_all=True, append_images=others, duration=milliseconds, loop=0)


def numbered(folder, pattern):
    """-> [(step, path)] of a run's files, sorted by step."""
    return sorted((int(m[1]), path) for path in folder.glob(pattern) if (m := re.search(r"_(\d+)\.", path.name)))


def save_growth(folder, most=48):
    """samples.gif: how the grids of a run grew, evenly chosen, the last one always among them."""
    files = [path for _, path in numbered(folder, "samples/step_*.png")]
    if files:
        chosen = files[:: -math.ceil(len(files) / most)][::-1]  # from the last one back
        save_gif([Image.open(file) for file in chosen], folder / "samples.gif", 150)


def save_curves(rows, path):
    """losses.png: above the losses of D and G, below D(x) and D(G(z)), from the first step to the last."""
    first, last = rows[0]["step"], rows[-1]["step"]
    picture = Image.new("RGB", (900, 520), "white")
    pen = ImageDraw.Draw(picture)
    for bottom, names in (230, ("loss_d", "loss_g")), (490, ("d_x", "d_gz")):
        values = torch.tensor([[[row[name] for row in rows] for name in names]])  # (1, 2, rows)
        values = F.adaptive_avg_pool1d(values, min(400, len(rows)))[0]  # means, or the lines would be a blur
        high = 1.0 if "d_x" in names else values.max().clamp(1.4, 8).item()
        for i in range(5):
            x, y = 50 + i * 207, bottom - i * 50
            pen.line([50, y, 878, y], "#dddddd")
            pen.text((42, y), f"{i / 4 * high:.2f}", "black", anchor="rm")
            pen.text((x, bottom + 8), f"{first + i / 4 * (last - first):.0f}", "black", anchor="mt")
        for x, name, color, line in zip((60, 140), names, ("#c03020", "#2050c0"), values, strict=True):
            ys = bottom - 200 * (line / high).clamp(max=1)
            pen.line(torch.stack([torch.linspace(50, 878, len(ys)), ys], 1).flatten().tolist(), color, 2)
            pen.text((x, bottom - 215), name, color, anchor="lm")
    save_picture(picture, path)


# ---------------------------------------------------------------------------------------- the machine


def choose_device(name):
    """-> the torch.device that is named; auto: the best there is.  Raises UserError if it cannot be used."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = best if name == "auto" else name
    with explained(f"--device {name} cannot be used here; this machine has {best}", RuntimeError, AssertionError):
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    return device


def choose_precision(name, device):
    """-> "bf16" or "fp32"; auto: bf16 where the hardware multiplies it, not where it would only be emulated."""
    probes = (getattr(torch.cpu, f"_is_{feature}_supported", lambda: False) for feature in ("avx512_bf16", "amx_tile"))
    if device.type == "cuda":
        has = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has = device.type == "cpu" and any(probe() for probe in probes)
    return name if name != "auto" else "bf16" if has else "fp32"


def fused_ops():
    """-> the module of the fused ops: dcgan_ops where it is installed, but csrc/ beside this file if its sources are
    others, or if it is all there is."""
    here = Path(__file__).resolve().parent / "csrc"

    def sources(folder):
        return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")}

    for name in ("dcgan_ops", "csrc"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            ours = hasattr(module, "bn_leaky_relu")  # not some other csrc
            rival = ours and name == "dcgan_ops" and (here / "bn_leaky_relu.cpp").exists()
            if ours and not (rival and sources(here) != sources(Path(module.__file__).parent)):
                return module
    raise UserError("there are no fused kernels here: pip install -e . in the project, or take --no-fused")


def choose_ops(fused, device):
    """-> PLAIN, or the fused ops, ready for the device: the one place where they come in.  Never a silent fallback."""
    if not fused:
        return PLAIN
    ops = fused_ops()
    with explained("--fused", ops.Unavailable):
        ops.load(device)
    return types.SimpleNamespace(bn_leaky_relu=ops.bn_leaky_relu, spectral_norm=ops.spectral_norm)


def choose_graphed(c, device):
    """-> graphed of csrc/ where a step can be one CUDA graph, else None: Python then launches each kernel."""
    if c.graph and not c.compile and device.type == "cuda" and WORLD == 1:
        with contextlib.suppress(UserError):  # dcgan.py stands alone
            return getattr(fused_ops(), "graphed", None)
    return None


def tune(c, device):
    """Settings that pay in every run, made once a process; and --deterministic."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not c.deterministic
    elif sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # glibc's own switch goes first
        # keep large blocks, or the kernel clears new ones at each step
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, bytes; an older glibc takes 32 MiB at most
            mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


@contextlib.contextmanager
def stopping(limit):
    """with stopping("2h") as code: code() -> 130 or 143 after Ctrl-C or SIGTERM (a second Ctrl-C leaves at once), 0
    after the time limit, None to go on; the same on all processes, after the same step."""
    end = time.monotonic() + (float(limit[:-1]) * {"s": 1, "m": 60, "h": 3600}[limit[-1]] if limit else math.inf)
    first = []  # of the first signal, the code and the moment

    def caught(number, _):
        if not first:
            first.extend([128 + number, time.monotonic()])
        elif time.monotonic() > first[1] + 0.5:  # not before: torchrun and `timeout` send it twice
            os._exit(128 + number)

    def code():
        number = torch.tensor(first[0] if first else 0 if time.monotonic() > end else -1)  # -1: go on
        if WORLD > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)  # what stops one stops all
        return int(number) if number >= 0 else None

    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, caught) for number in numbers}  # only the main thread may set handlers
    try:
        yield code
    finally:
        time.sleep(0.5 if first else 0)  # the second one may still come
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------- training


def open_run(c):
    """-> the Config, and the checkpoint from which --resume goes on, or None.  What c was given overrides the saved."""
    folder, given = Path(c.run), c.given
    if not c.resume:
        what = ("config.json", "*.pt", "snapshots/*.pt", "samples/step_*.png")
        if any(file for pattern in what for file in folder.glob(pattern)):
            raise UserError(f"{folder} holds a run already; go on with --resume, or name another folder with --run")
        return c, None
    with reading(folder / "config.json"):
        old = saved_config(json.loads((folder / "config.json").read_text()))
    given = given if c.noise_steps else given - {"noise_steps"}  # 0: all steps of a new run, and this one is begun
    asked = {name: getattr(c, name) for name in given | {"run", "resume", "time_limit"}}
    lengths = {"steps": 0} if "epochs" in given else {}  # as in config
    c = dataclasses.replace(old, **lengths | asked)
    saved = load(folder / "checkpoint.pt") if any(folder.glob("*.pt")) else None  # None: stopped before its first one
    for name in (name for name in FIELDS if name not in MAY_CHANGE):
        now, begun = getattr(c, name), getattr(saved["config"] if saved else old, name)
        paths = name == "data" and now and begun
        if paths and (not Path(begun).exists() or Path(now).resolve() == Path(begun).resolve()):
            continue  # the same pictures in another place: restore says if they are fewer or more
        if now != begun:
            what = f"{folder / ('checkpoint.pt' if saved else 'config.json')} cannot go on with {name} {now!r}"
            what += f": it began with {begun!r}. {'Leave it out' if name in given else 'Put its own config.json back'}"
            raise UserError(f"{what}, or begin another run with --run")
    return c, saved


def claim(c):
    """with claim(c): makes --download, names c.run, and makes this job the only one that trains in that folder."""
    c.data = download(c.download, c.data) if c.download else c.data
    c.data = c.data and os.path.abspath(c.data)  # --resume may come from another folder
    name = os.path.basename(c.data) if os.path.isdir(c.data) else Path(c.data).stem  # without .zip
    c.run = c.run or f"runs/{c.preset}-{name or 'drawn'}"
    if c.resume and not Path(c.run).is_dir():
        raise UserError(f"--resume: there is no run in {c.run}; name its folder with --run")
    for name in ("run", "cache"):
        if Path(getattr(c, name)).is_file():
            raise UserError(f"--{name} {getattr(c, name)} is a file; name a folder")
    for name in ("data", "cache"):
        if getattr(c, name) and Path(getattr(c, name)).resolve() == Path(c.run).resolve():
            raise UserError(f"--{name} and --run are both {c.run}; name another folder with --run")
    Path(c.run).mkdir(parents=True, exist_ok=True)
    with explained(f"another process trains in {c.run}; wait for it, or name another folder with --run", Timeout):
        lock = FileLock(Path(c.run) / ".lock", timeout=0)  # that of a dead process is free
        return lock.acquire() if RANK == 0 else contextlib.nullcontext()


def summary(net, x):
    """-> lines: for each row what it is, its output shape for one picture or z, and its parameters; then their sum."""
    lines, z = [f"{type(net).__name__:<58} {'output':<12} {'parameters':>12}"], x
    with torch.no_grad():
        for block in copy.deepcopy(net).eval().blocks:  # a copy: no statistic moves
            x, n, row = block(x, z=z), sum(p.numel() for p in block.parameters()), block.row
            layer = row.kind if row.kind == "dense" else f"{row.kind} {row.kernel}x{row.kernel}, stride {row.stride}"
            words = [block.scale is not None and "scaled by z", layer, row.bn and "BatchNorm", row.activation]
            label = ", ".join(word for word in words if word and word != "none")
            lines.append(f"  {label:<56} {'x'.join(map(str, x.shape[1:])):<12} {n:>12,}")
    return [*lines, f"  {'in all':<69} {sum(p.numel() for p in net.parameters()):>12,}"]


def feed(c, device):
    """-> the pictures: (n, nc, H, W) uint8, in the GPU's memory where they fill less than half of what is free."""
    pictures = load_pictures(c)
    if WORLD > 1:
        most = torch.tensor([len(pictures), -len(pictures)])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if most.sum():
            raise UserError(f"one process has {most[0]:,} pictures, another {-most[1]:,}: give all the same --data")
    fits = device.type == "cuda" and pictures.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return pictures.to(device) if fits else pictures


def restore(run, saved):
    """Put a checkpoint into a run that has just been set up."""
    with reading(run.folder / "checkpoint.pt"):
        for name, part in run.stateful.items():
            part.load_state_dict(saved[name])
        for optimizer in (run.opt_g, run.opt_d):
            # what this device asks of Adam: a checkpoint of another one brings its own
            optimizer.param_groups[0].update({name: optimizer.defaults[name] for name in ("fused", "capturable")})
        run.step = saved["step"]
        run.sums.copy_(saved["sums"])
        if saved["pictures"] != len(run.pictures):
            say(f"            these were {saved['pictures']:,} before: what follows is another stream of them")


def set_up(c):
    """-> the run as one namespace: c, folder, device, pictures, G, D, ema, opt_g, opt_d, graphed; step and total, the
    last step; stateful, what a checkpoint holds; sums, of METRICS since the last report and in this epoch.
    `rewind` adds rows, the lines of the log, and variety; `loop` adds reported, step and moment of the last line."""
    if not hasattr(torch.nn.utils, "get_total_norm"):
        raise UserError(f"torch 2.6 or later is needed, this is {torch.__version__}: pip install -U torch torchvision")
    given = c.given
    c, saved = open_run(c)
    device = choose_device(c.device)
    if WORLD > 1 and not dist.is_initialized():  # all processes have looked into the folder before any writes there
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    c.precision = choose_precision(c.precision, device)
    if c.batch_size % WORLD:
        raise UserError(f"--batch-size {c.batch_size} cannot be divided among {WORLD} processes; take a multiple")
    if c.family == "mnist" and c.batch_size == WORLD:
        what = f"--batch-size {c.batch_size} gives each process 1 picture, and BatchNorm of a dense layer needs 2"
        raise UserError(f"{what}: take {2 * WORLD} or more")
    tune(c, device)
    ops, graphed = choose_ops(c.fused, device), choose_graphed(c, device)
    if "graph" in given and c.graph and not graphed:
        what = f"--graph needs csrc/ and one process on CUDA without --compile; here: {WORLD} process(es) on {device}"
        raise UserError(f"{what}: leave --graph out")
    say(f"run         {c.run}, preset {c.preset}, {'goes on' if saved else 'begins'}")
    how = f"{device}, {c.precision}, {'fused kernels' if c.fused else 'plain PyTorch'}"
    how += ", graphed" if graphed else ", not graphed (see --graph)" if device.type == "cuda" else ""
    say(f"machine     {how}, torch {torch.__version__}, {WORLD} x {torch.get_num_threads()} threads")
    if WORLD > 1 and c.batch_size < 8 * WORLD and c.family != "keras":
        here = f"{c.batch_size // WORLD} of --batch-size {c.batch_size} in each process"
        say(f"            {here}, where BatchNorm sees no others: better take a larger one")
    pictures = feed(c, device)

    torch.manual_seed(key(c.seed, "weights"))
    G, D = Generator(c, ops), Discriminator(c, ops)
    if not saved:
        say(*summary(G, torch.zeros(2, c.nz)), *summary(D, torch.zeros(2, c.nc, c.image_size, c.image_size)))
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    Adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[c.optimizer]
    flags = {"fused": True, "capturable": device.type == "cuda"}
    hyper = dict(betas=(c.beta1, c.beta2), eps=c.adam_eps, weight_decay=c.weight_decay, **flags)
    run = types.SimpleNamespace(c=c, folder=Path(c.run), device=device, pictures=pictures, graphed=graphed, G=G, D=D)
    run.ema = copy.deepcopy(G).requires_grad_(False) if c.ema else None
    run.opt_g, run.opt_d = Adam(G.parameters(), c.lr_g, **hyper), Adam(D.parameters(), c.lr_d, **hyper)
    run.stateful = {"G": G, "D": D, "opt_g": run.opt_g, "opt_d": run.opt_d} | ({"ema": run.ema} if c.ema else {})
    run.sums = torch.zeros(2, len(METRICS), device=device)
    run.step, run.total = 0, c.steps or math.ceil(c.epochs * len(pictures) / c.batch_size)
    c.noise_steps = c.noise_steps or run.total
    if saved:
        restore(run, saved)
    return run


def choose_step(run):
    """-> step(real, z, noise, ema_weight) as train_step: as it stands, compiled, or on CUDA as one graph."""
    c, nets = run.c, (run.G, run.D)
    if c.compile:
        nets = [torch.compile(net, dynamic=False) for net in nets]  # other names for the same weights
    step = functools.partial(train_step, c, *nets, run.ema, run.opt_g, run.opt_d)
    if run.graphed:
        inputs = [*draw_inputs(c, run.pictures, run.step, run.device), torch.zeros((), device=run.device)]
        with explained("the step cannot become a CUDA graph: go on with --no-graph", RuntimeError):
            step = run.graphed(step, inputs, run.stateful.values())
    return step


def save_generator(run, path):
    config = dataclasses.asdict(run.c) | dict.fromkeys(("data", "run", "cache"), "")  # such files are given away
    save(path, step=run.step, config=config, G=(run.ema or run.G).state_dict())


def save_run(run):
    """checkpoint.pt: all that the next step depends on.  generator.pt: what drawing needs."""
    with open(run.folder / "log.jsonl", "ab") as log:
        os.fsync(log.fileno())  # the checkpoint relies on its lines, so they go to the disk first
    state = {name: part.state_dict() for name, part in run.stateful.items()}
    state |= {"step": run.step, "sums": run.sums, "pictures": len(run.pictures)}
    save(run.folder / "checkpoint.pt", config=dataclasses.asdict(run.c), **state)
    save_generator(run, run.folder / "generator.pt")


def variety(x):
    """Pictures (n, nc, H, W) -> the median distance to the nearest neighbour; near 0: many look alike."""
    x = x.flatten(1).float()
    return torch.cdist(x, x).fill_diagonal_(math.inf).amin(1).median().item()


def rewind(run):
    """Make the run's folder what it was at run.step: later lines, samples and snapshots go, and what is half written.
    Then write config.json and real.png, and set run.rows and run.variety."""
    folder, log = run.folder, run.folder / "log.jsonl"
    (folder / "snapshots").mkdir(parents=True, exist_ok=True)
    files = numbered(folder, "samples/step_*.png") + numbered(folder, "snapshots/generator_*.pt")
    later = [path for step, path in files if step > run.step]
    for path in [*later, *(half for part in ("", "samples/", "snapshots/") for half in folder.glob(part + ".*.half"))]:
        path.unlink()
    run.rows = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # the half line of a run that was killed
            row = json.loads(line)
            if row["step"] <= run.step:
                run.rows.append(row)
    with written_whole(log) as file:
        file.write("".join(json.dumps(row) + "\n" for row in run.rows).encode())
    with written_whole(folder / "config.json") as file:
        file.write(json.dumps(dataclasses.asdict(run.c), indent=1).encode())
    real = run.pictures[batch_indices(len(run.pictures), run.c.seed, 0, run.c.samples, run.pictures.device)].cpu()
    save_picture(grid(real), folder / "samples" / "real.png")
    once = real[: max(2, len(run.pictures))]  # of few pictures the grid shows some twice, 0 apart
    run.variety = max(1.0, variety(once))  # what warn compares with
    if run.step:  # a kill may have come between checkpoint.pt and this
        save_generator(run, folder / "generator.pt")


def take(sums):
    """-> the means over good steps of what train_step gave, and how many steps were good, bad.  Then the sums are 0
    again.  Reading them waits for the device, which nothing in the loop does at every step."""
    *values, good, bad = sums.tolist()
    sums.zero_()
    means = {name: round(value / max(1, good), 5) for name, value in zip(METRICS, values, strict=False)}
    return means, round(good), round(bad)


def any_good(run, least):
    """-> whether a step since the last report was good.  Raises UserError if none was, and `least` or more were bad."""
    good, skipped = run.sums[0, 4:].long().tolist()
    if not good and skipped >= least:
        what = f"no loss or gradient was finite since step {run.step - skipped}; none entered the weights"
        checkpoint = run.folder / "checkpoint.pt"
        go_on = f"go on from {checkpoint} by --resume --precision fp32, or " if checkpoint.exists() else ""
        raise UserError(f"{what}: {go_on}begin again with a lower --lr")
    return bool(good)


def report(run, bar):
    """A line of log.jsonl and the numbers on the bar."""
    if not any_good(run, min(10, run.total)):  # no number yet: the next line will say how many were skipped
        return
    c, now = run.c, time.monotonic()
    means, _, skipped = take(run.sums[0])
    row = {"step": run.step, "epoch": run.step * c.batch_size // len(run.pictures), **means}
    step, moment = run.reported
    row |= {"img_s": round((run.step - step) * c.batch_size / max(now - moment, 1e-9), 1)}
    row |= {"skipped": skipped} if skipped else {}
    run.reported = run.step, now
    numbers = "D {loss_d:.3f}, G {loss_g:.3f}, D(x) {d_x:.2f}, D(G(z)) {d_gz:.2f}, {img_s:.0f} img/s"
    bar.set_postfix_str(numbers.format(**row), False)
    if RANK == 0:
        run.rows.append(row)
        path = run.folder / "log.jsonl"
        with explained(f"cannot write {path}; what was saved is intact", OSError), open(path, "a") as log:
            log.write(json.dumps(row) + "\n")


def warn(run, x):
    """Say, while it happens, if the numbers or the fixed pictures x show that the game has gone wrong."""
    c, last, share = run.c, run.rows[-20:], variety(x) / run.variety
    if len(last) < 20:
        return
    losses = {name: sorted(row[name] for row in last) for name in ("loss_d", "loss_g")}
    least = -sum(p * math.log(p) for p in (c.real_label, 1 - c.real_label) if p)  # of a D that is always right
    above = losses["loss_d"][10] * (2 if c.loss == "mean" else 1) - least  # the median
    if share < 1 / 3:
        say(f"step {run.step}: G has collapsed, or is very young: its nearest neighbours differ {share:.0%} as much "
            "as real ones. Draw from an older snapshot, or begin anew with a lower --lr-g or a larger "
            "--batch-size")  # fmt: skip
    if above < 0.2:
        brakes = {"--augment": c.augment, "--spectral-norm": c.spectral_norm, "--real-label 0.9": c.real_label < 1}
        brakes["--noise 0.05 --noise-steps -1"] = c.noise and c.noise_steps < 0  # it hides what compression left
        advice = " or ".join(["a lower --lr-d", *(option for option, on in brakes.items() if not on)])
        say(f"step {run.step}: D has won: its loss has long been near the least, and G learns little from it. If the "
            f"pictures get no better, begin anew with {advice}")  # fmt: skip
    if all(values[-1] - values[0] < 1e-3 for values in losses.values()):
        say(f"step {run.step}: the losses are flat: neither network learns. Begin anew with another --lr or --init")


def sample(run):
    """The grid of the fixed z, those of the seeds 0, 1, 2 ..., and the loss curves so far."""
    x = draw(run.ema or run.G, latent(range(run.c.samples), run.c.nz), run.device)
    save_picture(grid(x), run.folder / "samples" / f"step_{run.step:06d}.png")
    if run.rows:
        save_curves(run.rows, run.folder / "losses.png")
        warn(run, x)


def end_epoch(run, epoch):
    """The line of means; a snapshot of G, so that a collapse does not take the last good one with it."""
    means, good, bad = take(run.sums[1])
    epochs = run.total * run.c.batch_size // len(run.pictures)  # whole ones: each has its line
    losses = f"D Loss: {means['loss_d']:.4f} | G Loss: {means['loss_g']:.4f}"
    say(f"Epoch [{epoch}/{epochs}] | {losses if good else f'no number was finite in {bad} steps'}")
    if RANK == 0:
        save_generator(run, run.folder / f"snapshots/generator_{run.step:06d}.pt")
        for _, old in numbered(run.folder, "snapshots/generator_*.pt")[: -run.c.keep]:
            old.unlink()


def loop(run):
    """Train run from its step to its last -> the exit code."""
    step, c, n = choose_step(run), run.c, len(run.pictures)
    if RANK == 0:
        rewind(run)
    saved, code = time.monotonic(), None
    run.reported = run.step, saved
    layout = "{n_fmt}/{total_fmt} [{remaining}{postfix}] {bar}"  # in this order: a narrow terminal cuts off the end
    with stopping(c.time_limit) as stop, progress(run.total, layout, initial=run.step) as bar:
        while run.step < run.total and code is None:
            inputs = draw_inputs(c, run.pictures, run.step, run.device)
            decay = min(c.ema, (1 + run.step) / (10 + run.step))  # shorter at first, or the first weights would linger
            metrics = step(*inputs, torch.full((), 1 - decay, device=run.device))
            if WORLD > 1:  # means over all processes, so that the checkpoint of one serves them all
                dist.all_reduce(metrics)
            run.sums += metrics / WORLD
            run.step += 1
            bar.update()
            if run.step % c.report_every == 0:
                report(run, bar)
            last = run.step == run.total
            if last:  # shorter than the way to a report, it may have seen no number at all
                any_good(run, run.total)
            early = run.step < c.sample_every and run.step & (run.step - 1) == 0  # at 1, 2, 4, 8 ...
            if RANK == 0 and (last or early or run.step % c.sample_every == 0):
                sample(run)
            epoch = run.step * c.batch_size // n
            if epoch > (run.step - 1) * c.batch_size // n:
                end_epoch(run, epoch)
            code = stop()
            due = run.step % c.save_every == 0 if c.save_every else time.monotonic() - saved > 120
            if RANK == 0 and (due or last or code is not None):
                save_run(run)
                saved = time.monotonic()
        if RANK == 0:
            save_growth(run.folder)
            folder = f'"{run.folder}"' if " " in str(run.folder) else run.folder
            done = run.step >= run.total
            say(f"{'done' if done else 'stopped'} at step {run.step:,} of {run.total:,}: {run.folder}")
            say(f"draw more:  python dcgan.py generate {folder} --seeds 0-63")
            say(f"go on:      python dcgan.py --run {folder} --resume{' --epochs N' if done else ''}")
    return code or 0


def train(c):
    """Train as the Config says -> the exit code: 0, or 130 or 143 after a signal; saved in each case.
    Raises UserError for what cannot be: no pictures, no kernels, a folder that is taken, only bad steps."""
    c, preset = copy.copy(c), config(c.preset)  # a copy: the caller's stays as it is
    c.given |= {name for name in FIELDS if getattr(c, name) != getattr(preset, name)}  # and those set after config()
    with claim(c), explained(None):
        return loop(set_up(c))


# ---------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def read_arguments(command, argv, seeds, name, what):
    """What generate and interpolate share -> a function from z to pictures, G's Config, the seeds, and where to write:
    --out, which is `what`, or else `name` beside the weights."""
    p = Parser(f"dcgan.py {command}", allow_abbrev=False)
    p.add_argument("source", type=Path, help="the folder of a run, or its checkpoint.pt, generator.pt or a snapshot")
    p.add_argument("--seeds", default=seeds, help=f"such as 3,7,12 or 0-63 ({seeds})")
    p.add_argument("--out", type=Path, help=f"{what} ({name} beside the weights)")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu, cuda:1")
    p.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16: faster, a shade off (fp32)")
    args = p.parse_args(argv)
    found = [re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part) for part in args.seeds.split(",")]
    ranges = [range(int(m[1]), int(m[2] or m[1]) + 1) for m in found if m]
    if not all(found) or not all(ranges) or sum(map(len, ranges)) > 100_000:
        raise UserError(f"--seeds {args.seeds!r} is no list of 1 to 100,000 seeds; write 0-63 or 3,7,12")
    seeds = [seed for part in ranges for seed in part]
    suffix = args.out.suffix.lower() if args.out else ""
    if suffix in Image.registered_extensions() and suffix not in SUFFIXES:
        raise UserError(f"--out {args.out}: a picture is written as {' '.join(sorted(SUFFIXES))}; or name a folder")
    folder = args.source if args.source.is_dir() else args.source.parent
    device = choose_device(args.device)
    G = load_generator(args.source, device)
    return lambda z: draw(G, z, device, args.precision), G.config, seeds, args.out or folder / name


def generate(argv):
    """Pictures of seeds: one grid, or a folder of single files and their grid."""
    what = "a picture file for one grid, or a folder for single files as well"
    paint, c, seeds, out = read_arguments("generate", argv, "0-63", "generated.png", what)
    x = paint(latent(seeds, c.nz))
    if out.suffix.lower() not in SUFFIXES:
        for seed, picture in zip(seeds, x, strict=True):
            save_picture(T.to_pil_image(picture), out / f"seed_{seed:06d}.png")
        out = out / "grid.png"
    save_picture(grid(x), out)
    say(f"{len(seeds)} pictures: {out}")


def interpolate(argv, frames=24):
    """A closed walk through the z of seeds, on the sphere near which normal z of many dimensions lie [9]."""
    what = "a .gif, or a folder for it; the strip is the .png beside it"
    paint, c, seeds, out = read_arguments("interpolate", argv, "0-5", "interpolation.gif", what)
    z, walk, t = latent(seeds, c.nz), [], torch.arange(frames)[:, None] / frames
    for a, b in zip(z, z.roll(-1, 0), strict=True):
        angle = torch.arccos(F.cosine_similarity(a, b, dim=0).clamp(-0.9999, 0.9999))
        walk.append((torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle))
    x = paint(torch.cat(walk))
    out = out.with_suffix(".gif") if out.suffix.lower() in SUFFIXES else out / "interpolation.gif"
    size = c.image_size * max(1, 256 // c.image_size)
    save_gif([T.to_pil_image(picture).resize((size, size)) for picture in x], out, 60)
    save_picture(grid(x[:: frames // 8], columns=8), out.with_suffix(".png"))
    say(f"{len(x)} frames: {out}; as a strip: {out.with_suffix('.png')}")


def info(argv):
    """The device, the versions, and which kernels are there or why not."""
    Parser("dcgan.py info").parse_args(argv)
    device = choose_device("auto")
    say(f"python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    say(f"device {device}, --precision auto is {choose_precision('auto', device)}, {torch.get_num_threads()} threads")
    try:
        say(*fused_ops().status())
    except UserError as e:
        say(str(e))


def read_options(argv):
    """-> {name: value} of what the command line sets, by a parser that is made from the fields of Config."""
    wide = functools.partial(argparse.HelpFormatter, max_help_position=42, width=120)
    p = Parser("dcgan.py", allow_abbrev=False, formatter_class=wide, argument_default=argparse.SUPPRESS)
    p.usage = "dcgan.py [train] [options]; other commands: generate, interpolate, info, each with its own --help"
    p.epilog = (
        "in brackets: the default, where the preset sets none. Presets: best, for a folder; classic, a PyTorch script "
        "on CelebA; regularized, with all that might help; keras, the TF and Keras scripts; mnist, the TF tutorial; "
        "demo, small"
    )
    group = p
    for f in FIELDS.values():
        m, kind = f.metadata, {"action": argparse.BooleanOptionalAction}
        group = p.add_argument_group(m["group"]) if m["group"] else group
        if f.type is not bool:
            metavar = "|".join(str(x) for x in m["choices"] or [f.type.__name__.upper()] if x)
            kind = {"type": f.type, "choices": m["choices"], "metavar": metavar}
        default = f" ({f.default})" if f.default is not False and f.default not in ("", -1, "classic") else ""
        names = ["--" + f.name.replace("_", "-"), *m["alias"]]  # and the spellings of pytorch/examples
        group.add_argument(*names, dest=f.name, help=m["help"] + default, **kind)
    p.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    given = vars(p.parse_args(argv))
    lr = given.pop("lr", None)
    return given if lr is None else {"lr_g": lr, "lr_d": lr, **given}


def main(argv=None):
    """-> the exit code. 0: done, at the time limit too; 2: one line says why not; 130, 143: after a signal, saved.
    1: another process of the job has died."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["train"]
    commands = {"generate": generate, "interpolate": interpolate, "info": info}
    try:
        if command in commands:
            with explained(None):
                return commands[command](rest) or 0
        given = read_options(rest if command == "train" else [command, *rest])
        data, fetch = given.get("data", ""), given.get("download", "")
        mnist = fetch == "mnist" or (data and find_idx(Path(data)))
        preset = "mnist" if mnist else "best" if data or fetch else "demo"
        c = config(**{"preset": preset, **given})
        c.given = frozenset(given)  # a preset that was only guessed changes no resumed run
        return train(c)
    except (UserError, OSError) as e:
        why = str(e) if RANK == 0 else str(e).partition("\n")[0]  # many processes may say it, so a list is said once
        print(f"dcgan.py: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except RuntimeError as e:  # what gloo and NCCL raise when a process is gone
        why = " ".join(str(e).split())[:200]
        if WORLD == 1 or not re.search("gloo|nccl|connection|socket|timed out", why, re.IGNORECASE):
            raise
        print(f"dcgan.py: process {RANK} stops, for another has died ({why}); go on with --resume", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

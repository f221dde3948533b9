"""What the tests share: tiny networks, small folders of drawn pictures, one warm cache, and no network.

Everything runs on one thread, because the networks here are so small that a second one only costs time; the
tests that are about threads or processes set their own.
"""

import contextlib
import os
import random
import resource
import socket
import sys
import traceback
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # what subprocesses inherit
torch.set_num_threads(1)

import dcgan  # noqa: E402 - after the path to it

PRESETS = sorted(dcgan.PRESETS)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing here may reach out; processes that talk on this machine may."""
    connect = socket.socket.connect

    def only_here(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"the tests have no network; asked for {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)


@pytest.fixture(autouse=True)
def other_working_directory(tmp_path, monkeypatch):
    """Defaults such as runs/ and runs/cache are relative: let none of them land in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One cache folder for all tests, warm after the first that needs a set of pictures."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(cache, tmp_path, faces):
    """-> a maker of small Configs: tiny("mnist", batch_size=8).  They train on `faces`, a few ms a step."""

    def make(preset="classic", **overrides):
        small = dict(image_size=14 if preset == "mnist" else 16, nz=8, ngf=4, ndf=4, batch_size=4, samples=4)
        here = dict(data=str(faces), run=str(tmp_path / "run"), cache=str(cache), device="cpu", workers=0)
        return dcgan.config(preset, **{**small, **here, "precision": "fp32", **overrides})

    return make


def as_options(c):
    """A Config -> the command line that says the same."""
    words = []
    for name, field in dcgan.FIELDS.items():
        value = getattr(c, name)
        if field.type is bool:
            words += ["--" + ("" if value else "no-") + name.replace("_", "-")]
        else:
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


def picture(seed=0, width=20, height=24, mode="RGB"):
    """A Pillow picture with a smooth part, an edge and noise, no symmetry, and all of it from the seed."""
    r = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 / width, y * 255 / height, (x + 2 * y) * 255 / (width + 2 * height)], -1)
    rgb += r.normal(0, 12, rgb.shape)
    rgb[: height // 2, : width // 3] = r.integers(0, 256, 3)
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).convert(mode)


def make_pictures(folder, n=8, suffix=".png", size=(20, 24), first=0):
    """Write n pictures 0000.png, 0001.png ... into a folder, which is made -> their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:04d}{suffix}" for i in range(first, first + n)]
    for i, path in enumerate(paths, first):
        picture(i, *size).save(path)
    return paths


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """A folder of 24 drawn faces."""
    folder = tmp_path_factory.mktemp("pictures") / "faces"
    folder.mkdir()
    for i in range(24):
        dcgan.draw_face(i, 20).save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture
def few_drawn(monkeypatch):
    """The built-in data set, but of 64 faces."""
    monkeypatch.setattr(dcgan, "DRAWN", 64)


@pytest.fixture
def run_main(capfd):
    """-> a caller of main as the command line calls it: run_main("info") -> (code, out, err)."""

    def call(*words):
        capfd.readouterr()
        try:
            code = dcgan.main([str(word) for word in words])
        except SystemExit as e:  # argparse leaves this way
            code = e.code
        out, err = capfd.readouterr()
        return types.SimpleNamespace(code=code or 0, out=out, err=err)

    return call


def load_kernels(ops, device):
    """ops.load, but the test skips where a tool for it is missing; sources that do not compile are a failure."""
    try:
        ops.build.check_torch()
        if not ops.libraries.find(device)[0]:
            ops.build.find_compiler()
            if device == "cuda":
                ops.build.find_cuda()
    except ops.build.CannotBuild as why:
        pytest.skip(f"no fused kernels: {why}")
    ops.load(device)


def real_data(name):
    """-> the path of a real data file or folder, or the test skips: none of it may be kept in the project."""
    places = [os.environ.get("DCGAN_TEST_DATA"), ROOT.parent / "shared" / "data"]
    found = [Path(place) / name for place in places if place and (Path(place) / name).exists()]
    if not found:
        pytest.skip(f"no {name}: set DCGAN_TEST_DATA to the folder that holds it")
    return found[0]


def state(*parts):
    """-> {name: tensor}: a copy of everything in networks and optimisers that a checkpoint holds."""
    found = {}

    def walk(name, value):
        if torch.is_tensor(value):
            found[name] = value.detach().clone()
        elif isinstance(value, dict):
            for k, v in value.items():
                walk(f"{name}.{k}", v)
        elif isinstance(value, list | tuple):
            for k, v in enumerate(value):
                walk(f"{name}.{k}", v)

    for i, part in enumerate(parts):
        if part is not None:
            walk(str(i), part.state_dict())
    return found


def differing(a, b):
    """-> the names of the tensors of two `state`s that are not equal bit for bit."""
    names = sorted(set(a) | set(b))
    return [n for n in names if n not in a or n not in b or not same_bits(a[n], b[n])]


def same_bits(a, b):
    """torch.equal, but a NaN equals itself and -0.0 does not equal 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))


def in_child(work):
    """Run work() in a forked process, which may crash or eat memory -> (exit code, MB by which it grew).
    The exit code is 0, 1 after an exception (printed), or minus the signal that ended it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                work()
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
                os.write(write, str(grown // 1024).encode())
                code = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        grown = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), int(grown or 0)


def flip_bits(data, seed, flips=4):
    """Bytes -> the same with a few bits flipped, or cut short: what bad disks and downloads do."""
    r, damaged = random.Random(seed), bytearray(data)  # noqa: S311 - a damage, not a secret
    for _ in range(r.randint(1, flips)):
        damaged[r.randrange(len(damaged))] ^= 1 << r.randrange(8)
    return bytes(damaged[: r.randrange(len(damaged))] if r.random() < 0.2 else damaged)

"""Where the libraries of dcgan_ops are found, what is said where there are none, and their build on first use."""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import torch

from . import build

HERE = Path(__file__).resolve().parent
RECORD = "_build/install.txt"  # what the install said about each library, one line each
loaded = {}  # kind -> the loaded module


class Unavailable(RuntimeError):
    """One line: why there are no kernels for a device, and the command to run."""


def needed(device):
    """-> the kinds of libraries that a device needs, in order: the schemas are in the CPU library.

    Raises Unavailable where there can be none.
    """
    kind = torch.device(device).type
    if kind not in build.SOURCES:
        raise Unavailable(f"the fused kernels run on cpu and cuda, not on {kind}: leave --fused out")
    try:
        build.check_torch()
    except build.CannotBuild as why:
        raise Unavailable(str(why)) from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise Unavailable("no CUDA device is available to torch: choose --device cpu, or leave --fused out")
    return ["cpu"] if kind == "cpu" else ["cpu", "cuda"]


def load(kind):
    """Load one library, which registers its operators; build it first where there is none that fits.  -> its module"""
    path, _ = find(kind)
    path = str(path or build_here(kind))
    if kind == "cpu" and hasattr(torch.ops.dcgan, "bn_leaky_relu") and path not in torch.ops.loaded_libraries:
        what = f"this process has loaded another copy of these kernels, so {path} cannot be"
        raise Unavailable(f"{what}: import dcgan_ops or csrc from one folder only, or leave --fused out")
    loader = ExtensionFileLoader(f"{__package__}._{kind}", path)
    try:
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
        loader.exec_module(module)
    except ImportError as error:
        raise Unavailable(
            f"the {kind} kernels in {path} do not load ({error}): delete that file and try again, or leave --fused out"
        ) from None
    torch.ops.loaded_libraries.add(path)
    return module


def status() -> list[str]:
    """-> up to three lines for each library: what is there, from where, or why not and what to do.  Builds nothing."""
    lines = []
    for kind in build.SOURCES:
        path, old = find(kind)
        if path:
            facts = build.read_facts(path)
            made = f"compiler {facts['compiler']}" if kind == "cpu" else f"CUDA {facts['cuda']}"
            arch = "" if kind == "cpu" else f" for {facts['architectures']}"
            lines.append(f"{kind}: kernels ready{arch} ({made}, torch {facts['built_with_torch']}): {path}")
            continue
        said = [line for line in _read(HERE / RECORD).splitlines() if line.startswith(f"{kind}: ")]
        if old:
            lines.append(f"{kind}: {old}")
        if said and said[0] != f"{kind}: built":
            lines.append(f"{kind}: at the installation: {said[0].split(': ', 1)[1]}")
        lines.append(f"{kind}: no kernels yet; {_outlook(kind)}")
    return lines


def _outlook(kind):
    """What would happen on first use."""
    try:
        build.check_torch()
        if kind == "cuda" and not torch.cuda.is_available():
            return "no CUDA device is available to torch here"
        build.find_compiler()
        if kind == "cuda":
            build.find_cuda()
    except build.CannotBuild as why:
        return str(why)
    return "the first --fused builds them (or now: pip install -e .)"


def _read(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _key(kind):
    """The folder name of a first-use build: one for each source state, Python, CUDA and set of GPU architectures."""
    name = f"{build.source_hash(kind)}-{sys.implementation.cache_tag}"
    return name if kind == "cpu" else f"{name}-cu{_cuda_major()}-{build.architectures()}".replace(";", "_")


def _cuda_major():
    return str(torch.version.cuda).split(".")[0]


def _roots():
    """Where first-use builds go: beside this file if that can be written, else a cache of the user."""
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch_extensions"
    )
    return [HERE / "_build", *([Path(cache) / "dcgan_ops"] if cache[0] != "~" else [])]  # "~": there is no home


def find(kind):
    """-> (a library that fits these sources and this device or None, why another one does not fit)"""
    why = ""
    places = [HERE, *(root / _key(kind) for root in _roots())]
    for path in (place / build.file_name(kind) for place in places):
        facts = build.read_facts(path)
        if not facts:
            continue
        if facts["sources"] != build.source_hash(kind):
            why = f"{path} is of other sources ({facts['sources']}, not {build.source_hash(kind)})"
        elif kind == "cuda" and facts["cuda"].split(".")[0] != _cuda_major():
            why = f"{path} is of CUDA {facts['cuda']}, torch of CUDA {torch.version.cuda}"
        elif kind == "cuda" and not covers(facts["architectures"]):
            why = f"{path} is compiled for {facts['architectures']}, not for this GPU"
        else:
            return path, ""
    return None, why


def covers(architectures):
    """Whether code for "8.0,9.0+PTX" runs on the GPUs that are here: same major version, or PTX of an older one; code
    for "9.0a", as images for one GPU ask for it, on 9.0 alone."""
    built = re.findall(r"(\d+)\.(\d+)(a?)(\+PTX)?", architectures)
    built = [((int(major), int(minor)), only, ptx) for major, minor, only, ptx in built]
    fits = [[h == a if only else a <= h and (a[0] == h[0] or ptx) for a, only, ptx in built] for h in build.gpus()]
    return all(any(one) for one in fits)


def _writable(folder, lock):
    """Whether files can be made in the folder, and the lock in it be had, which may be of another user, or on a file
    system without locks."""
    from filelock import FileLock  # comes with torch

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / lock).open("a").close()
        with tempfile.TemporaryDirectory(dir=folder) as probe, FileLock(os.path.join(probe, "lock"), timeout=0):
            pass  # nobody else's: if it cannot be had (Timeout is an OSError), there are no locks here
    except (OSError, NotImplementedError):
        return False
    return True


def build_here(kind):
    """Build a library for these sources and this device.  -> its path.

    In a private folder, then moved into place in one step.  The lock, which the system drops when its holder dies,
    saves the others the work, and lets its holder sweep up what one that was killed has left.
    """
    from filelock import FileLock  # comes with torch

    if kind == "cuda" and not covers(build.architectures()):
        what = f"TORCH_CUDA_ARCH_LIST asks for {build.architectures()}"
        raise Unavailable(f"{what}, which not every GPU here can run: unset it")
    root = next((r for r in _roots() if _writable(r, f"{kind}.lock")), None)
    if root is None:
        where = " or ".join(map(str, _roots()))
        raise Unavailable(f"cannot write or lock files in {where}: set TORCH_EXTENSIONS_DIR to a folder where I can")
    target = root / _key(kind) / build.file_name(kind)
    with FileLock(str(root / f"{kind}.lock")):
        for left in root.glob(f"build-{kind}-*"):
            shutil.rmtree(left, ignore_errors=True)
        path, _ = find(kind)
        if path:
            return path  # another process was faster
        print(f"dcgan_ops: building the {kind} kernels, once (up to a minute) ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=f"build-{kind}-", dir=root) as work:
            command = [sys.executable, str(HERE / "build.py"), kind, "--into", work]
            done = subprocess.run(  # noqa: S603 - our own build.py
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            if done.returncode:
                raise Unavailable(_why_not_built(kind, done.stdout, root / f"{kind}.log"))
            target.parent.mkdir(exist_ok=True)
            os.replace(os.path.join(work, build.file_name(kind)), target)
    return target


def _why_not_built(kind, output, log):
    """-> the line of a compiler's output that tells most; all of it goes to the file `log`."""
    with contextlib.suppress(OSError):  # of another user
        log.write_text(output, encoding="utf-8")
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    reason = next((line for line in lines if "cannot build: " in line or "error:" in line), lines[-1])
    return f"the {kind} kernels could not be built: {reason.removeprefix('cannot build: ')} (all of it: {log})"

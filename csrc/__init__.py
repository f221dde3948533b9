"""dcgan_ops: BatchNorm + LeakyReLU and spectral normalisation, each as one op, for CPU and CUDA.

    import dcgan_ops
    dcgan_ops.load("cuda")      # or "cpu": loads the kernels; builds them with ninja where that is still to do
    y = dcgan_ops.bn_leaky_relu(x, weight, bias, running_mean, running_var, True, 0.1, 1e-5, 0.2)
    weights_sn = dcgan_ops.spectral_norm(weights, us, vs, 1e-12, update=True)

The C++ and CUDA files register functional operators `torch.ops.dcgan.*` (schemas.cpp): they change no argument.
This file adds what PyTorch wants to know about them (shapes for torch.compile, gradients), and commits running
statistics and u, v with one copy each.  Numbers, layouts and sources stand at the head of each kernel file.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import torch

from . import build

HERE = Path(__file__).resolve().parent
RECORD = "_build/install.txt"  # what the install said about each library, one line each
_modules = {}  # kind -> the loaded module


class Unavailable(RuntimeError):
    """One line: why there are no kernels for a device, and the command to run."""


# ---------------------------------------------------------------------------------------------- the two ops


def bn_leaky_relu(x, weight, bias, running_mean, running_var, training, momentum, eps, slope, groups=1) -> torch.Tensor:
    """-> leaky_relu(batch_norm(x), slope), like x in shape, dtype and layout.

    Args:
        x: (N, C) or (N, C, H, W), any strides; float32, bfloat16, float16 or float64.
        weight, bias: (C,) in x's dtype or float32, or None.
        running_mean, running_var: (C,), or None (then `training` must be true).  Changed in place in training.
        training: use the statistics of the batch, else the running ones.
        momentum: share of the new statistics in the running ones, 0 to 1.
        eps: added to the variance.
        slope: of the negative side; 0 gives ReLU.
        groups: in training, statistics per contiguous part of the batch; running statistics see them in order.

    Raises:
        ValueError: training with one value per channel, as PyTorch.
        RuntimeError: dtypes, shapes or devices that do not fit; asking for a second derivative.

    Precision: statistics in float64 on the CPU and in float32 on CUDA (float64 for float64), the rest in float32,
    rounded once.  Deterministic on both.  Source: Ioffe and Szegedy 2015.
    """
    _check_device("bn_leaky_relu", x)
    if training and x.dim() >= 2 and x.numel() == x.size(1) * groups:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
            + (f" in {groups} groups" if groups > 1 else "")
        )
    args = (x, weight, bias, running_mean, running_var, training, momentum, eps, slope, groups)
    y, _, _, new_mean, new_var = torch.ops.dcgan.bn_leaky_relu(*args)
    if training and running_mean is not None:
        with torch.no_grad():
            torch._foreach_copy_([running_mean, running_var], [new_mean, new_var])
    return y


def spectral_norm(weights, us, vs, eps, update) -> list[torch.Tensor]:
    """-> [W / sigma(W) for each weight], sigma by one step of power iteration from u and v.

    Args:
        weights: list of (out, in, ...) float32 or float64, contiguous or channels_last; at least one.
        us, vs: lists of (out,) and (in * ...,), unit vectors in the weights' dtype.  Changed in place by `update`.
        eps: lower bound of the norms that u and v are divided by.
        update: advance u and v by one step (training), else leave them.

    Returns:
        Tensors like the weights in shape and layout, in the dtype that convolutions use there: autocast's where
        it is on, else the weights'.

    Raises:
        RuntimeError: dtypes, shapes or devices that do not fit; asking for a second derivative.

    Precision: the iteration runs in the weights' dtype whatever autocast says.  Deterministic.
    Source: Miyato et al. 2018; equals torch.nn.utils.parametrizations.spectral_norm step by step.
    """
    weights, us, vs = list(weights), list(us), list(vs)
    if not weights:
        raise RuntimeError("spectral_norm: give one or more weights, each with its u and v; got none")
    for weight in weights:
        _check_device("spectral_norm", weight)
    out_dtype = None
    if weights[0].dtype == torch.float32:
        device = weights[0].device.type
        out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    scaled, new_us, new_vs, _ = torch.ops.dcgan.spectral_norm(weights, us, vs, eps, update, out_dtype)
    if update:
        with torch.no_grad():
            torch._foreach_copy_(us + vs, new_us + new_vs)
    return scaled


def _check_device(name, tensor):
    kind = tensor.device.type
    if kind not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"{name} runs on cpu and cuda; got a tensor on {kind}: leave --fused out")
    if kind in ("cpu", "cuda") and kind not in _modules:
        load(kind)


# -------------------------------------------------------- what PyTorch wants to know: shapes and derivatives


def _register():
    """Fake kernels and autograd.  Called once, when the operators are there."""
    library = torch.library
    library.register_fake("dcgan::bn_leaky_relu", _bn_fake)
    library.register_fake("dcgan::bn_leaky_relu_backward", _bn_backward_fake)
    library.register_fake("dcgan::spectral_norm", _sn_fake)
    library.register_fake("dcgan::spectral_norm_backward", _sn_backward_fake)
    library.register_autograd("dcgan::bn_leaky_relu", _bn_backward, setup_context=_bn_save)
    library.register_autograd("dcgan::spectral_norm", _sn_backward, setup_context=_sn_save)
    for name in ("bn_leaky_relu", "spectral_norm"):
        library.register_autograd(f"dcgan::{name}_backward", _no_second_derivative(name))


def _dense_like(x, dtype=None):
    """An empty tensor in the layout that dense() of checks.h gives x."""
    order = [0, *range(2, x.dim()), 1]
    if x.is_contiguous() or x.permute(order).is_contiguous():
        return torch.empty_like(x, dtype=dtype)
    last = x.dim() == 4 and x.size(1) > 1 and x.stride(1) == 1
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _bn_fake(x, weight, bias, running_mean, running_var, training, momentum, eps, slope, groups):
    mean = x.new_empty((groups if training else 1, x.size(1)), dtype=_wide(x))
    if training and running_mean is not None:
        new = running_mean.new_empty(x.size(1)), running_var.new_empty(x.size(1))
    else:
        dtype = _wide(x) if running_mean is None else running_mean.dtype
        new = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    return _dense_like(x), mean, torch.empty_like(mean), *new


def _bn_backward_fake(dy, x, weight, bias, mean, invstd, training, slope, groups):
    return (_dense_like(x), x.new_empty(x.size(1), dtype=_wide(x)), x.new_empty(x.size(1), dtype=_wide(x)))


def _bn_save(ctx, inputs, output):
    x, weight, bias, _, _, training, _, _, slope, groups = inputs
    y, mean, invstd, new_mean, new_var = output
    ctx.save_for_backward(x, weight, bias, mean, invstd)
    ctx.rest = training, slope, groups
    ctx.mark_non_differentiable(mean, invstd, new_mean, new_var)
    ctx.set_materialize_grads(False)


def _bn_backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 10
    x, weight, bias, mean, invstd = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.dcgan.bn_leaky_relu_backward(dy, x, weight, bias, mean, invstd, *ctx.rest)
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    return (
        dx if need_x else None,
        dweight.to(weight.dtype) if need_weight else None,
        dbias.to(bias.dtype) if need_bias else None,
        *(None,) * 7,
    )


def _sn_fake(weights, us, vs, eps, update, out_dtype):
    return (
        [_dense_like(w, out_dtype or w.dtype) for w in weights],
        [torch.empty_like(u, memory_format=torch.contiguous_format) for u in us],
        [torch.empty_like(v, memory_format=torch.contiguous_format) for v in vs],
        weights[0].new_empty(len(weights)),
    )


def _sn_backward_fake(grads, weights, us, vs, sigmas):
    return [_dense_like(w) for w in weights]


def _sn_save(ctx, inputs, output):
    weights, out_dtype = inputs[0], inputs[5]
    scaled, new_us, new_vs, sigmas = output
    ctx.save_for_backward(*weights, *new_us, *new_vs, sigmas)
    ctx.dtype = out_dtype or weights[0].dtype
    ctx.mark_non_differentiable(*new_us, *new_vs, sigmas)


def _sn_backward(ctx, grads, *_):
    saved = ctx.saved_tensors
    n = len(saved) // 3
    weights, us, vs, sigmas = saved[:n], saved[n : 2 * n], saved[2 * n : 3 * n], saved[-1]
    grads = [torch.zeros_like(w, dtype=ctx.dtype) if g is None else g for g, w in zip(grads, weights, strict=True)]
    result = torch.ops.dcgan.spectral_norm_backward(grads, list(weights), list(us), list(vs), sigmas)
    nothing = [None] * n
    return result, nothing, nothing, None, None, None


def _no_second_derivative(name):
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{name} has no second derivative (create_graph=True, a gradient penalty): leave --fused out"
        )

    return backward


# ------------------------------------------------------------------------------------ finding and building


def load(device) -> None:
    """Make the ops ready for a device ("cpu", "cuda", "cuda:1" or a torch.device).

    Builds their library where there is none, or one of other sources: once, with ninja, into csrc/_build or, where
    that cannot be written, a user cache.  Any number of processes may do so at once, and any may be killed.

    Raises:
        Unavailable: why there are no kernels for it, and what to do, in one line.
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
    first = not _modules
    for one in ("cpu",) if kind == "cpu" else ("cpu", "cuda"):  # schemas are in the CPU library
        if one not in _modules:
            path, _ = _find(one)
            _modules[one] = _import(one, path or _build(one))
    if first:
        _register()


def status() -> list[str]:
    """-> a line or two for each library: what is there and from where, or why not and what to do.  Builds nothing."""
    lines = []
    for kind in build.SOURCES:
        path, old = _find(kind)
        if path:
            facts = build.read_facts(path)
            made = f"compiler {facts['compiler']}" if kind == "cpu" else f"CUDA {facts['cuda']}"
            arch = "" if kind == "cpu" else f" for {facts['architectures']}"
            lines.append(f"{kind}: kernels ready{arch} ({made}, torch {facts['built_with_torch']}): {path}")
            continue
        said = [line for line in _read(HERE / RECORD).splitlines() if line.startswith(f"{kind}: ")]
        if old:
            lines.append(f"{kind}: {old}")
        if said and "built" not in said[0]:
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
    """The folder name of a first-use build: one for each source state, Python and set of GPU architectures."""
    name = f"{build.source_hash(kind)}-{sys.implementation.cache_tag}"
    return name if kind == "cpu" else f"{name}-{build.architectures()}".replace(";", "_")


def _roots():
    """Where first-use builds go: beside this file if that can be written, else a cache of the user."""
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch_extensions"
    )
    return [HERE / "_build", Path(cache) / "dcgan_ops"]


def _find(kind):
    """-> (a library that fits these sources and this device or None, why another one does not fit)"""
    why = ""
    places = [HERE, *(root / _key(kind) for root in _roots())]
    for path in (place / build.file_name(kind) for place in places):
        facts = build.read_facts(path)
        if not facts:
            continue
        if facts["sources"] != build.source_hash(kind):
            why = f"{path} is of other sources ({facts['sources']}, not {build.source_hash(kind)})"
        elif kind == "cuda" and not _covers(facts["architectures"]):
            why = f"{path} is compiled for {facts['architectures']}, not for this GPU"
        else:
            return path, ""
    return None, why


def _covers(architectures):
    """Whether code for "8.0,9.0+PTX" runs on the GPUs that are here: same major version, or PTX of an older one."""
    if not torch.cuda.is_available():
        return True
    built = [
        (tuple(int(n) for n in one.removesuffix("+PTX").split(".")), one.endswith("+PTX"))
        for one in architectures.split(",")
        if one.removesuffix("+PTX").replace(".", "").isdigit()
    ]
    have = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return all(any((a[0] == h[0] or ptx) and a <= h for a, ptx in built) for h in have)


def _writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _import(kind, path):
    loader = ExtensionFileLoader(f"{__name__}._{kind}", str(path))
    try:
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
        loader.exec_module(module)
    except ImportError as error:
        raise Unavailable(
            f"the {kind} kernels in {path} do not load ({error}): delete that file and try again, or leave --fused out"
        ) from None
    return module


def _build(kind):
    """Build a library for these sources and this device.  -> its path.

    In a private folder, then moved into place in one step; the lock, which the system drops when its holder dies,
    only saves the others the work.
    """
    from filelock import FileLock  # comes with torch

    root = next((r for r in _roots() if _writable(r)), None)
    if root is None:
        raise Unavailable(f"neither {_roots()[0]} nor {_roots()[1]} can be written: set TORCH_EXTENSIONS_DIR")
    target = root / _key(kind) / build.file_name(kind)
    with (
        FileLock(str(root / f"{_key(kind)}.{kind}.lock")),
        tempfile.TemporaryDirectory(prefix="build-", dir=root) as work,
    ):
        path, _ = _find(kind)
        if path:
            return path  # another process was faster
        print(f"dcgan_ops: building the {kind} kernels, once (up to a minute) ...", file=sys.stderr, flush=True)
        command = [sys.executable, str(HERE / "build.py"), kind, "--into", work]
        done = subprocess.run(  # noqa: S603 - our own build.py
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        if done.returncode:
            log = root / f"{kind}.log"
            log.write_text(done.stdout)
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["no output"]
            reason = next((line for line in lines if "cannot build: " in line or "error:" in line), lines[-1])
            raise Unavailable(
                f"the {kind} kernels could not be built: {reason.removeprefix('cannot build: ')} (all of it: {log})"
            )
        target.parent.mkdir(exist_ok=True)
        os.replace(os.path.join(work, build.file_name(kind)), target)
    return target

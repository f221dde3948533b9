"""dcgan_ops: BatchNorm + LeakyReLU and spectral normalisation, each as one op, for CPU and CUDA.

    import dcgan_ops
    dcgan_ops.load("cuda")      # or "cpu": loads the kernels; builds them with ninja where that is still to do
    y = dcgan_ops.bn_leaky_relu(x, weight, bias, running_mean, running_var, True, 0.1, 1e-5, 0.2)
    weights_sn = dcgan_ops.spectral_norm(weights, us, vs, 1e-12, update=True)

The C++ and CUDA files register functional operators `torch.ops.dcgan.*` (schemas.cpp): they change no argument.
This file adds what PyTorch wants to know about them (shapes for torch.compile, gradients), and commits running
statistics and u, v with one copy each.  Numbers, layouts and sources stand at the head of each kernel file.
"""

import threading

import torch
from torch.autograd.forward_ad import unpack_dual

from . import build, libraries
from .graph import graphed
from .libraries import Unavailable, status

__all__ = ["Unavailable", "bn_leaky_relu", "build", "graphed", "load", "spectral_norm", "status"]

_loading = threading.Lock()


def load(device) -> None:
    """Make the ops ready for a device ("cpu", "cuda", "cuda:1" or a torch.device).

    Builds their library where there is none, or one of other sources: once, with ninja, into csrc/_build or, where
    that cannot be written, a user cache.  Any number of threads and processes may do so at once, and any process may
    be killed.  The ops load themselves on first use, but not from within torch.compile: there call this before.

    Raises:
        Unavailable: why there are no kernels for it, and what to do, in one line.
    """
    with _loading:
        for kind in libraries.needed(device):
            if kind not in libraries.loaded:
                module = libraries.load(kind)
                if kind == "cpu":  # which has the schemas
                    _register()
                libraries.loaded[kind] = module  # last: other threads use the ops from here on


# ---------------------------------------------------------------------------------------------- the two ops


def bn_leaky_relu(x, weight, bias, running_mean, running_var, training, momentum, eps, slope, groups=1) -> torch.Tensor:
    """-> leaky_relu(batch_norm(x), slope), like x in shape, dtype and layout.

    Args:
        x: (N, C) or (N, C, H, W), any strides; float32, bfloat16, float16 or float64.
        weight, bias: (C,) in x's dtype or float32 (float64 x: float64 only), or None.
        running_mean, running_var: (C,), or None (then `training` must be true).  Changed in place in training.
        training: use the statistics of the batch, else the running ones.
        momentum: share of the new statistics in the running ones, 0 to 1.
        eps: added to the variance.
        slope: of the negative side, any number; 0 gives ReLU.
        groups: in training, statistics per contiguous part of the batch; running statistics see them in order.

    Raises:
        ValueError: training with one value per channel, as PyTorch.
        RuntimeError: dtypes, shapes or devices that do not fit; asking for a second derivative, a jvp or a transform of
            torch.func (within torch.compile a jvp is not noticed: it gives 0).

    Precision: statistics in float64 on the CPU (16-bit types: of float32 sums of four) and in float32 on CUDA
    (float64 for float64), the rest in float32, rounded once.  Deterministic on both.  Source: Ioffe and Szegedy 2015.
    """
    _check_devices("bn_leaky_relu", (x, weight, bias, running_mean, running_var))
    _check_no_tangents("bn_leaky_relu", (x, weight, bias))
    if training and x.dim() >= 2 and 0 < x.numel() == x.size(1) * groups:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
            + (f" in {groups} groups" if groups > 1 else "")
        )
    running, rest = [running_mean, running_var], (training, momentum, eps, slope, groups if training else 1)
    if _is_eager():
        return _BatchNormLeakyReLU.apply(x, weight, bias, running, *rest)
    y, _, _, *new = torch.ops.dcgan.bn_leaky_relu(x, weight, bias, *running, *rest)
    if training and running_mean is not None:
        with torch.no_grad():
            torch._foreach_copy_(running, new)
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
        RuntimeError: dtypes, shapes or devices that do not fit; asking for a second derivative, a jvp or a transform of
            torch.func (within torch.compile a jvp is not noticed: it gives 0).

    Precision: the iteration runs in the weights' dtype or a wider one, whatever autocast says.  Deterministic.
    Source: Miyato et al. 2018; equals torch.nn.utils.parametrizations.spectral_norm step by step.
    """
    weights, us, vs = list(weights), list(us), list(vs)
    if not weights:
        raise RuntimeError("spectral_norm: give one or more weights, each with its u and v; got none")
    _check_devices("spectral_norm", weights + us + vs)
    _check_no_tangents("spectral_norm", weights)
    out_dtype = None
    if weights[0].dtype == torch.float32:
        device = weights[0].device.type
        on = device != "meta" and torch.is_autocast_enabled(device)  # which raises for meta
        out_dtype = torch.get_autocast_dtype(device) if on else None
    if _is_eager():
        return list(_SpectralNorm.apply(us, vs, eps, update, out_dtype, *weights))
    scaled, new_us, new_vs, _ = torch.ops.dcgan.spectral_norm(weights, us, vs, eps, update, out_dtype)
    if update:
        with torch.no_grad():
            torch._foreach_copy_(us + vs, new_us + new_vs)
    return scaled


def _check_devices(name, tensors):
    """One device for all, where the kernels run, and loaded.  The dispatcher would take one meta tensor for a sign that
    all are, compute nothing, and return memory as it came."""
    kinds = {t.device.type for t in tensors if t is not None}
    for kind in kinds - {"cpu", "cuda", "meta"}:
        raise RuntimeError(f"{name} runs on cpu and cuda; got a tensor on {kind}: leave --fused out")
    if len(kinds) > 1:
        raise RuntimeError(f"{name} got tensors on {' and '.join(sorted(kinds))}; give all on one device")
    (kind,) = kinds
    kind = "cpu" if kind == "meta" else kind  # whose library has the shapes, too
    if kind not in libraries.loaded:
        load(kind)


def _check_no_tangents(name, tensors):
    """Without this PyTorch would take the ops for constants and give 0, for it knows no formula of theirs."""
    if torch.compiler.is_compiling():
        return
    if any(t is not None and unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(f"{name} has no forward-mode derivative (jvp, make_dual): leave --fused out")


# -------------------------------------------------------- what PyTorch wants to know: shapes and derivatives


def _register():
    """Fake kernels and autograd, once the operators are there."""
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
    _check_no_tangents("bn_leaky_relu", (dy,))
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
    _check_no_tangents("spectral_norm", grads)
    weights, us, vs, sigmas = saved[:n], saved[n : 2 * n], saved[2 * n : 3 * n], saved[-1]
    grads = [torch.zeros_like(w, dtype=ctx.dtype) if g is None else g for g, w in zip(grads, weights, strict=True)]
    result = torch.ops.dcgan.spectral_norm_backward(grads, list(weights), list(us), list(vs), sigmas)
    nothing = [None] * n
    return result, nothing, nothing, None, None, None


# What register_autograd makes of the ops, without its walks through their arguments: these cost more than the kernels
# where tensors are small.  torch.compile, which pays for them once, and torch.jit.trace get the ops themselves.


def _is_eager():
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()


class _BatchNormLeakyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running, training, momentum, eps, slope, groups):
        rest = training, momentum, eps, slope, groups
        y, mean, invstd, *new = torch.ops.dcgan.bn_leaky_relu(x, weight, bias, *running, *rest)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.rest = training, slope, groups
        if training and running[0] is not None:
            torch._foreach_copy_(running, new)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _bn_backward(ctx, dy)[:9]  # the running statistics are one argument here


class _SpectralNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, us, vs, eps, update, out_dtype, *weights):
        scaled, new_us, new_vs, sigmas = torch.ops.dcgan.spectral_norm(weights, us, vs, eps, update, out_dtype)
        ctx.save_for_backward(*weights, *new_us, *new_vs, sigmas)
        ctx.dtype = out_dtype or weights[0].dtype
        if update:
            torch._foreach_copy_(us + vs, new_us + new_vs)
        return tuple(scaled)

    @staticmethod
    def backward(ctx, *grads):
        return *(None,) * 5, *_sn_backward(ctx, grads)[0]


def _no_second_derivative(name):
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{name} has no second derivative (create_graph=True, a gradient penalty): leave --fused out"
        )

    return backward

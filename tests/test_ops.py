"""The fused ops against plain PyTorch: values, gradients, layouts, dtypes, and the company they must keep.

The same tests run on the CPU and, where one is present, on a CUDA device.  The rule for numbers needs no tolerance
by hand: the error against fp64 is at most twice that of plain PyTorch in the same dtype, or one unit in the last
place of the result at its scale.  On CUDA, where both sum in fp32, each in its own order, it is twice that.
"""

import copy
import functools
import io
import itertools
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import load_kernels
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrizations import spectral_norm as parametrize

import dcgan

ops = dcgan.fused_ops()
HAS_CUDA = torch.cuda.is_available()
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device here")])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
D_WEIGHTS = [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]


@pytest.fixture(scope="module", params=["cpu", CUDA])
def device(request):
    load_kernels(ops, request.param)
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)
    torch.backends.cudnn.allow_tf32 = False  # or the nets' convolutions would hide what is compared


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def channels_last(x):
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def assert_close(ours, plain, exact, what="", scale=0.0):
    """max |ours - exact| <= max(2 max |plain - exact|, one unit in the last place at `scale`, that of exact or of
    what it is a difference of); twice that on CUDA."""
    if exact.numel() == 0:
        return
    scale, unit = max(scale, exact.abs().max().item()), torch.finfo(ours.dtype).eps
    if ours.dtype == torch.float64:
        unit = 1e-11  # there `exact` is itself a computation in fp64
    limit = max(2 * (plain.double() - exact).abs().max().item(), unit * scale) * (2 if ours.is_cuda else 1)
    error = (ours.double() - exact).abs().max().item()
    assert error <= limit, f"{what}: error {error:.3e}, allowed {limit:.3e}, scale {scale:.3e}"


# ------------------------------------------------------------------------------------------------ bn_leaky_relu


class Case:
    """One call of bn_leaky_relu with all that it reads: fused, plain, and plain in fp64."""

    def __init__(self, x, affine=True, running=True, training=True, slope=0.2, groups=1, dy=None, weight_dtype=None):
        dtype = weight_dtype or wide(x.dtype)

        def vector():
            return torch.randn(x.size(1), device=x.device).to(dtype)

        self.x, self.rest = x, (training, 0.1, 1e-5, slope, groups)
        self.weight, self.bias = (vector(), vector()) if affine else (None, None)  # gamma is negative too
        self.mean, self.var = (vector() * 0.1, vector().abs() + 0.5) if running else (None, None)
        self.dy = torch.randn(x.shape, device=x.device).to(x.dtype) if dy is None else dy

    def run(self, function, dtype=None):
        """-> (y, dx, dweight, dbias, running mean, running var), computed by `function` in dtype, or in their own."""

        def leaf(t):
            return None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()

        def buffer(t):
            return None if t is None else t.to(dtype or t.dtype, copy=True)

        x, weight, bias, mean, var = (
            leaf(self.x),
            leaf(self.weight),
            leaf(self.bias),
            buffer(self.mean),
            buffer(self.var),
        )
        y = function(x, weight, bias, mean, var, *self.rest)
        leaves = [t for t in (x, weight, bias) if t is not None]
        grads = torch.autograd.grad(y, leaves, self.dy.to(dtype or self.dy.dtype))
        return y.detach(), *grads, *([] if weight is not None else [None, None]), mean, var

    def check(self, gradients=True):
        """All six results obey the rule.  -> those of the fused op"""
        exact = self.run(dcgan.bn_leaky_relu, torch.float64)
        if gradients:  # where z is within rounding of 0, its slope is a matter of taste: no gradient from there
            self.dy = self.dy * (exact[0].abs() > 1e-3 * exact[0].abs().max()).to(self.dy.dtype)
            exact = self.run(dcgan.bn_leaky_relu, torch.float64)
        ours, plain = self.run(ops.bn_leaky_relu), self.run(dcgan.bn_leaky_relu)
        names = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
        for name, a, b, c in zip(names, ours, plain, exact, strict=True):
            assert (a is None) == (c is None)
            if c is not None and (gradients or not name.startswith("d")):
                assert a.dtype == b.dtype and a.shape == b.shape, name
                # a mean of fp32 sums is as exact as its values are large, and 0.1 of it enters the running one
                scale = 0.1 * self.x.abs().max().item() if self.x.is_cuda and name == "running_mean" else 0.0
                assert_close(a, b, c, f"{name} of x {tuple(self.x.shape)} {self.x.dtype} {self.x.stride()}", scale)
        return ours


SHAPES = [
    (16, 8, 8, 8),
    (9, 5, 7, 3),
    (32, 33),
    (4, 130, 4, 4),
    (2, 3, 65, 33),
    (6, 700, 2, 2),
    (50, 1, 3, 3),
    (5, 4, 9),
]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bn_training(device, shape, dtype, layout):
    x = (torch.randn(shape, device=device) * 2 + 1).to(dtype)
    x = channels_last(x) if layout == "channels_last" else x
    y, dx = Case(x).check()[:2]
    assert y.stride() == x.stride() and dx.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (7, 6), (1, 4, 1, 1)], ids=str)
def test_bn_eval(device, shape, dtype):
    case = Case(torch.randn(shape, device=device).to(dtype), training=False)
    mean, var = case.check()[4:]
    assert torch.equal(mean, case.mean) and torch.equal(var, case.var)
    Case(channels_last(case.x), training=False, affine=False).check()


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, 2.0])
def test_bn_slopes(device, slope):
    Case(torch.randn(8, 6, 5, 5, device=device), slope=slope).check()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bn_negative_slope(device, layout):
    """PyTorch refuses it in place only, as dcgan.bn_leaky_relu does it; the op keeps x and needs no such rule."""
    x = torch.randn(8, 6, 5, 5, device=device, dtype=torch.float64)
    case = Case(channels_last(x) if layout == "channels_last" else x, slope=-0.5)

    def plain(x, weight, bias, mean, var, training, momentum, eps, slope, groups):
        return F.leaky_relu(F.batch_norm(x, mean, var, weight, bias, training, momentum, eps), slope)

    torch.testing.assert_close(case.run(ops.bn_leaky_relu), case.run(plain), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("affine, running", list(itertools.product([True, False], repeat=2)))
def test_bn_without_parameters_or_statistics(device, affine, running):
    Case(torch.randn(8, 6, 5, 5, device=device), affine=affine, running=running).check()


def test_bn_weight_without_bias_and_zero_gamma(device):
    case = Case(torch.randn(8, 6, 5, 5, device=device))
    case.weight[1] = 0
    case.check()
    x, weight = case.x, case.weight
    y = ops.bn_leaky_relu(x, weight, None, None, None, *case.rest)
    torch.testing.assert_close(y, dcgan.bn_leaky_relu(x, weight, torch.zeros_like(weight), None, None, *case.rest))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bn_parameters_in_half(device, dtype):
    ours = Case(torch.randn(32, 6, 5, 5, device=device).to(dtype), weight_dtype=dtype).run(ops.bn_leaky_relu)
    assert all(t.dtype == dtype for t in ours)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("groups", [2, 3])
def test_bn_groups(device, groups, layout):
    x = torch.cat([torch.randn(4, 5, 6, 6, device=device) * (g + 1) + g for g in range(groups)])
    x = channels_last(x) if layout == "channels_last" else x
    case = Case(x, groups=groups)
    case.check()
    rest = case.rest[:-1]
    parts = [ops.bn_leaky_relu(part, case.weight, case.bias, case.mean, case.var, *rest) for part in x.chunk(groups)]
    mean, var = case.mean, case.var  # moved by the parts in order
    again = Case(x, groups=groups)
    again.weight, again.bias = case.weight, case.bias
    assert torch.equal(torch.cat(parts), again.run(ops.bn_leaky_relu)[0])
    assert mean.isfinite().all() and var.isfinite().all()


STRIDES = {
    "sliced batch": lambda x: x[::2],
    "sliced channels": lambda x: x[:, 1:5],
    "sliced picture": lambda x: x[:, :, 1:, :-1],
    "transposed": lambda x: x.transpose(2, 3),
    "offset 1": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "channels sliced in channels_last": lambda x: channels_last(x)[:, 1:4],
    "batch sliced in channels_last": lambda x: channels_last(x)[1:],
    "expanded": lambda x: x[:, :, :1].expand(-1, -1, 6, -1),
}


@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bn_strides_of_x_and_of_the_gradient(device, name, dtype):
    change = STRIDES[name]
    x = change(torch.randn(10, 6, 7, 9, device=device).to(dtype))
    Case(x).check()
    Case(x.contiguous(), dy=change(torch.randn(10, 6, 7, 9, device=device).to(dtype))).check()


def test_bn_gradient_of_a_sum_is_expanded(device):
    x = torch.randn(8, 6, 5, 5, device=device)
    Case(x, dy=torch.ones((), device=device).expand(x.shape)).check()


def test_bn_one_value_per_channel_raises_as_in_pytorch(device):
    for shape in ((1, 4), (1, 4, 1, 1)):
        x = torch.randn(shape, device=device)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            F.batch_norm(x, None, None, training=True)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            ops.bn_leaky_relu(x, None, None, None, None, True, 0.1, 1e-5, 0.2)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ops.bn_leaky_relu(torch.randn(2, 4, device=device), None, None, None, None, True, 0.1, 1e-5, 0.2, 2)


def test_bn_empty_batch(device):
    x = torch.randn(0, 4, 3, 3, device=device, requires_grad=True)
    weight, mean, var = (torch.ones(4, device=device, requires_grad=n == 0) for n in range(3))
    y = ops.bn_leaky_relu(x, weight, weight, mean, var, True, 0.1, 1e-5, 0.2)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape and not weight.grad.any()
    assert torch.equal(mean, torch.ones_like(mean)) and torch.equal(var, torch.ones_like(var))


def test_bn_constant_channels(device):
    x = torch.full((8, 3, 4, 4), 7.25, device=device)
    x[:, 1] = -1e6
    case = Case(x)
    y, *_, mean, var = case.check(gradients=False)
    assert_close(y, y, F.leaky_relu(case.bias, 0.2).double().view(1, 3, 1, 1).expand(y.shape), "y is the bias")


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, -1])
def test_bn_infinite_values_spoil_their_channel_only(device, value, place):
    x = torch.randn(8, 3, 4, 4, device=device)
    x[place, 1, place, place] = value
    case = Case(x)
    ours, plain = case.run(ops.bn_leaky_relu), case.run(dcgan.bn_leaky_relu)
    for a, b in zip(ours, plain, strict=True):
        finite = a.isfinite()  # inf - inf is NaN or is not met, by the order of the sums
        assert torch.equal(finite, b.isfinite())
        torch.testing.assert_close(a[finite], b[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bn_in_eval_mode_infinite_values_have_pytorchs_gradient(device, value, layout):
    x = torch.randn(8, 3, 4, 4, device=device)
    x[2, 1, 0, 3] = value
    case = Case(channels_last(x) if layout == "channels_last" else x, training=False)
    ours, plain = case.run(ops.bn_leaky_relu)[1], case.run(dcgan.bn_leaky_relu)[1]
    assert plain.isfinite().all()
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bn_far_from_zero_and_with_outliers(device, dtype, layout):
    """Where sum(x^2) - mean^2 would cancel.  The mean is kept in x's dtype: what it loses there is allowed too."""
    x = torch.randn(32, 4, 8, 8, device=device, dtype=dtype)
    x[:, 1] += 1000
    x[:, 2] = x[:, 2] * 1e-3 - 5
    x[0, 3, 0, 0] = 1e5  # the very value that a shift might be taken from
    case = Case(channels_last(x) if layout == "channels_last" else x)
    case.weight.fill_(1)
    ours, exact = case.run(ops.bn_leaky_relu), case.run(dcgan.bn_leaky_relu, torch.float64)
    lost = (
        torch.finfo(dtype).eps
        * (32 if dtype == torch.float64 else 1)
        * (x.double().mean((0, 2, 3)).abs() / x.double().std((0, 2, 3)) + 1)
    )
    assert ((ours[0] - exact[0]).abs().amax((0, 2, 3)) <= lost * exact[0].abs().amax((0, 2, 3))).all()
    torch.testing.assert_close(ours[5], exact[5].to(dtype), rtol=32 * torch.finfo(dtype).eps, atol=0)


def test_bn_fuzz(device):
    pick = random.Random(1)  # noqa: S311
    for _ in range(60):
        shape = (pick.randint(2, 20), pick.randint(1, 40), *(pick.randint(1, 12) for _ in range(2)))
        x = torch.randn(shape, device=device).to(pick.choice(DTYPES)) * pick.choice([0.01, 1, 30])
        x = pick.choice([lambda t: t, channels_last, *STRIDES.values()])(x) if min(shape[1:]) >= 6 else x
        if x.numel() // max(x.size(1), 1) > 1:
            Case(x, training=pick.random() < 0.8, affine=pick.random() < 0.8, slope=pick.choice([0, 0.2])).check()


def test_bn_partial_gradients(device):
    x, weight, bias = (
        torch.randn(6, 4, 5, 5, device=device),
        torch.randn(4, device=device),
        torch.randn(4, device=device),
    )
    for wanted in itertools.product([False, True], repeat=3):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight, bias), wanted, strict=True)]
        y = ops.bn_leaky_relu(*leaves, None, None, True, 0.1, 1e-5, 0.2)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.square().sum().backward()
        assert [t.grad is not None for t in leaves] == list(wanted)


def test_bn_two_forwards_before_one_backward(device):
    """D(real) + D(fake): each backward uses the statistics of its own forward."""
    real, fake = torch.randn(6, 4, 5, 5, device=device), torch.randn(6, 4, 5, 5, device=device) * 3
    results = []
    for function in (ops.bn_leaky_relu, dcgan.bn_leaky_relu):
        weight, bias = (
            torch.ones(4, device=device, requires_grad=True),
            torch.zeros(4, device=device, requires_grad=True),
        )
        mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
        y = [function(x, weight, bias, mean, var, True, 0.1, 1e-5, 0.2) for x in (real, fake)]
        (y[0].square().mean() + y[1].exp().mean()).backward()
        results.append((weight.grad, bias.grad, mean, var))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
def test_bn_gradcheck(device, training):
    def vector():
        return torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)

    x = torch.randn(4, 3, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    mean, var = torch.zeros(3, dtype=torch.float64, device=device), torch.ones(3, dtype=torch.float64, device=device)

    def function(x, weight, bias):
        return ops.bn_leaky_relu(x, weight, bias, mean.clone(), var.clone(), training, 0.1, 1e-5, 0.2, 2)

    assert torch.autograd.gradcheck(function, (x, vector(), vector()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", [7, 64])  # fewer than 8 values in a line go another way than the rest
def test_bn_reads_and_writes_each_number_of_16_bits(device, dtype, side):
    x = torch.arange(2**16).to(torch.int16).view(dtype)
    x = torch.cat([x, x[: -len(x) % side]]).view(-1, 1, side, 1).to(device)
    mean, var = torch.zeros(1, device=device), torch.ones(1, device=device)
    y = ops.bn_leaky_relu(x, None, None, mean, var, False, 0.1, 0.0, 1.0)
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------ spectral_norm


def iteration_state(shapes, device, dtype=torch.float32, layout=torch.contiguous_format):
    weights = [torch.randn(s, device=device, dtype=dtype) * 0.05 for s in shapes]
    weights = [w.to(memory_format=layout) if w.dim() == 4 else w for w in weights]
    us = [F.normalize(torch.randn(w.size(0), device=device, dtype=dtype), dim=0) for w in weights]
    vs = [F.normalize(torch.randn(w[0].numel(), device=device, dtype=dtype), dim=0) for w in weights]
    return weights, us, vs


def run_sn(function, weights, us, vs, update, dtype=None, grads=None):
    """-> weights_sn, us, vs, gradients, as one flat list"""
    weights = [w.detach().to(dtype or w.dtype).requires_grad_() for w in weights]
    us, vs = ([t.to(dtype or t.dtype, copy=True) for t in ts] for ts in (us, vs))
    scaled = function(weights, us, vs, 1e-12, update)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(w.shape, generator=generator).to(s) for w, s in zip(weights, scaled, strict=True)]
    return [*(s.detach() for s in scaled), *us, *vs, *torch.autograd.grad(scaled, weights, grads)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("update", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shapes", [D_WEIGHTS, [(7, 3, 3, 5), (5, 11), (1, 1, 1, 1), (130, 67, 1, 1)]], ids=["D", "odd"]
)
def test_sn_values_and_gradients(device, shapes, dtype, update, layout):
    weights, us, vs = iteration_state(shapes, device, dtype, layout)
    ours = run_sn(ops.spectral_norm, weights, us, vs, update)
    plain = run_sn(dcgan.spectral_norm, weights, us, vs, update)
    exact = run_sn(dcgan.spectral_norm, weights, us, vs, update, torch.float64)
    n = len(weights)
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape
        # a gradient is G / sigma less its part along u v', all of it where W is one number
        scale = (exact[i % n] / weights[i % n]).abs().max().item() if i >= 3 * n else 0.0
        assert_close(a, b, c, f"result {i}", scale)
    assert all(a.stride() == w.stride() for a, w in zip(ours, weights, strict=False))
    assert all(a.stride() == w.stride() for a, w in zip(ours[-len(weights) :], weights, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_sn_equals_the_parametrization_step_by_step(device, layout):
    layers = [parametrize(nn.Conv2d(s[1], s[0], s[2:], bias=False).to(memory_format=layout)) for s in D_WEIGHTS[:3]]
    layers = [layer.to(device).double() for layer in layers]
    norms = [layer.parametrizations.weight for layer in layers]
    weights = [n.original.detach().clone(memory_format=torch.preserve_format) for n in norms]
    us, vs = [n[0]._u.clone() for n in norms], [n[0]._v.clone() for n in norms]
    for step in range(6):
        training = step not in (2, 5)
        for layer in layers:
            layer.train(training)
        for a, layer, n, u, v in zip(
            ops.spectral_norm(weights, us, vs, 1e-12, training), layers, norms, us, vs, strict=True
        ):
            torch.testing.assert_close(a, layer.weight.detach(), rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(u, n[0]._u, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(v, n[0]._v, rtol=1e-12, atol=1e-14)
        with torch.no_grad():  # an optimiser's step
            for w, n in zip(weights, norms, strict=True):
                change = torch.randn_like(w) * 0.01
                w += change
                n.original += change


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sn_output_in_autocasts_dtype(device, dtype):
    weights, us, vs = iteration_state(D_WEIGHTS[:3], device)
    expected = run_sn(ops.spectral_norm, weights, us, vs, True)
    with torch.autocast(device, dtype=dtype):
        ours = run_sn(ops.spectral_norm, weights, us, vs, True)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        if i < 3:
            # one rounding, of the same number; CUDA multiplies by 1 / sigma: of its neighbour
            assert a.dtype == dtype
            torch.testing.assert_close(a, b.to(dtype), rtol=torch.finfo(dtype).eps if a.is_cuda else 0, atol=0)
        elif i < 9:
            assert torch.equal(a, b)  # u and v never see autocast
        else:
            assert a.dtype == torch.float32
            torch.testing.assert_close(
                a, b, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps * b.abs().max().item()
            )
    doubles = [t.double() for t in weights], [t.double() for t in us], [t.double() for t in vs]
    with torch.autocast(device, dtype=dtype):
        assert ops.spectral_norm(*doubles, 1e-12, False)[0].dtype == torch.float64  # which autocast leaves alone


def test_sn_many_layers_and_strided_weights(device):
    shapes = [(i % 7 + 1, i % 5 + 2, 3, 3) for i in range(37)]
    weights, us, vs = iteration_state(shapes, device)
    weights[3] = torch.randn(12, 9, 3, 3, device=device)[::4, 1:6]  # neither row-major nor channels_last
    us[3], vs[3] = torch.randn(3, device=device), torch.randn(45, device=device)
    ours, plain, exact = (
        run_sn(f, weights, us, vs, True, d)
        for f, d in ((ops.spectral_norm, None), (dcgan.spectral_norm, None), (dcgan.spectral_norm, torch.float64))
    )
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert_close(a, b, c, f"result {i}")


def test_sn_two_forwards_before_one_backward(device):
    """The backward of the first forward must use its own u and v, which the second has moved on."""
    results = []
    for function in (ops.spectral_norm, dcgan.spectral_norm):
        torch.manual_seed(1)
        weights, us, vs = iteration_state([(6, 4, 3, 3), (5, 7)], device, torch.float64)
        weights = [w.requires_grad_() for w in weights]
        first, second = function(weights, us, vs, 1e-12, True), function(weights, us, vs, 1e-12, True)
        (sum(w.square().sum() for w in first) + sum(w.exp().sum() for w in second)).backward()
        results.append([w.grad for w in weights] + us + vs)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_sn_gradient_of_some_layers_only(device):
    weights, us, vs = iteration_state([(6, 4, 3, 3), (5, 7), (3, 3)], device)
    weights = [w.requires_grad_(i != 1) for i, w in enumerate(weights)]
    scaled = ops.spectral_norm(weights, us, vs, 1e-12, True)
    scaled[0].square().sum().backward()
    assert weights[0].grad is not None and weights[1].grad is None
    assert weights[2].grad is None or not weights[2].grad.any()


def test_sn_gradcheck(device):
    weights, us, vs = iteration_state([(3, 2, 2, 2), (2, 5)], device, torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        leaves = [(w.to(memory_format=layout) if w.dim() == 4 else w).requires_grad_() for w in weights]
        assert torch.autograd.gradcheck(lambda *w: tuple(ops.spectral_norm(w, us, vs, 1e-12, False)), leaves)  # noqa: B023


def test_sn_zero_weight(device):
    """|W'u| = 0: both divide by sigma = 0."""
    weights, us, vs = iteration_state([(3, 4)], device)
    ours, plain = (run_sn(f, [w * 0 for w in weights], us, vs, True) for f in (ops.spectral_norm, dcgan.spectral_norm))
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_sn_nan_is_seen_where_pytorch_shows_it(device):
    weights, us, vs = iteration_state([(6, 4, 3, 3)], device)
    weights[0][0, 0, 0, 0] = float("nan")
    ours, plain = (run_sn(f, weights, us, vs, True) for f in (ops.spectral_norm, dcgan.spectral_norm))
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


# ---------------------------------------------------------------------------------------- the company they keep


def bn_args(device, **changes):
    args = {
        "x": torch.randn(6, 4, 3, 5, device=device, requires_grad=True),
        "weight": torch.randn(4, device=device, requires_grad=True),
        "bias": torch.randn(4, device=device, requires_grad=True),
        "running_mean": torch.zeros(4, device=device),
        "running_var": torch.ones(4, device=device),
        "training": True, "momentum": 0.1, "eps": 1e-5, "slope": 0.2, "groups": 2,
    }  # fmt: skip
    return tuple({**args, **changes}.values())


@pytest.mark.parametrize(
    "changes",
    [{}, {"training": False}, {"weight": None, "bias": None}, {"running_mean": None, "running_var": None}],
    ids=["training", "eval", "no parameters", "no statistics"],
)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "bf16"])
def test_bn_opcheck(device, changes, layout):
    x = torch.randn(6, 8, 3, 5, device=device)
    x = {
        "nchw": x[:, :4].contiguous(),
        "channels_last": channels_last(x)[:, :4],
        "sliced": x[:, 2:6],
        "bf16": x[:, :4].bfloat16(),
    }[layout]
    torch.library.opcheck(torch.ops.dcgan.bn_leaky_relu.default, bn_args(device, x=x.requires_grad_(), **changes))


def test_bn_backward_opcheck(device):
    x, weight, bias, mean, var, *rest = bn_args(device)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    _, mean, invstd, _, _ = torch.ops.dcgan.bn_leaky_relu(x, weight, bias, mean, var, *rest)
    args = (torch.randn_like(x), x, weight, bias, mean, invstd, True, 0.2, 2)
    torch.library.opcheck(torch.ops.dcgan.bn_leaky_relu_backward.default, args)


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_sn_opcheck(device, layout, out_dtype):
    weights, us, vs = iteration_state([(4, 3, 2, 2), (1, 5)], device, layout=layout)
    args = ([w.requires_grad_() for w in weights], us, vs, 1e-12, True, out_dtype)
    torch.library.opcheck(torch.ops.dcgan.spectral_norm.default, args)
    weights = [w.detach() for w in weights]
    scaled, us, vs, sigmas = torch.ops.dcgan.spectral_norm(weights, *args[1:])
    grads = [torch.randn_like(s) for s in scaled]
    torch.library.opcheck(torch.ops.dcgan.spectral_norm_backward.default, (grads, weights, us, vs, sigmas))


class Net(nn.Module):
    """A discriminator in small, with the functions given."""

    def __init__(self, bn, sn):
        super().__init__()
        self.bn, self.sn = bn, sn
        self.w1, self.w2 = nn.Parameter(torch.randn(8, 3, 4, 4) * 0.1), nn.Parameter(torch.randn(4, 8, 4, 4) * 0.1)
        self.gamma, self.beta = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))
        for i, w in ((1, self.w1), (2, self.w2)):
            self.register_buffer(f"u{i}", F.normalize(torch.randn(w.size(0)), dim=0))
            self.register_buffer(f"v{i}", F.normalize(torch.randn(w[0].numel()), dim=0))

    def forward(self, x):
        w1, w2 = self.sn([self.w1, self.w2], [self.u1, self.u2], [self.v1, self.v2], 1e-12, self.training)
        x = F.conv2d(x, w1, stride=2, padding=1)
        x = self.bn(x, self.gamma, self.beta, self.mean, self.var, self.training, 0.1, 1e-5, 0.2)
        return F.conv2d(x, w2, stride=2, padding=1)


def loss_of(net, real, fake):
    return F.softplus(-net(real)).mean() + F.softplus(net(fake)).mean()


def results_of(net, run, real, fake):
    run(net, real, fake).backward()
    return [*(p.grad.clone() for p in net.parameters()), *(b.clone() for b in net.buffers())]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compile_whole_graph(device, autocast, layout):
    """fullgraph=True, two forwards before one backward, buffers committed once each: the same numbers as eager."""
    real, fake = (torch.randn(8, 3, 16, 16, device=device).to(memory_format=layout) for _ in range(2))
    net = Net(ops.bn_leaky_relu, ops.spectral_norm).to(device, memory_format=layout)
    twin = copy.deepcopy(net)

    def step(net, real, fake):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            return loss_of(net, real, fake).float()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(results_of(net, step, real, fake), results_of(twin, compiled, real, fake), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compile_with_inductor(device):
    real, fake = (torch.randn(8, 3, 16, 16, device=device) for _ in range(2))
    net = Net(ops.bn_leaky_relu, ops.spectral_norm).to(device)
    twin = copy.deepcopy(net)
    compiled = torch.compile(loss_of, fullgraph=True)
    for a, b in zip(results_of(net, loss_of, real, fake), results_of(twin, compiled, real, fake), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_net_equals_plain_net_in_fp64(device, training):
    real, fake = (torch.randn(8, 3, 16, 16, device=device, dtype=torch.float64) for _ in range(2))
    fused = Net(ops.bn_leaky_relu, ops.spectral_norm).to(device, torch.float64).train(training)
    plain = Net(dcgan.bn_leaky_relu, dcgan.spectral_norm).to(device, torch.float64).train(training)
    plain.load_state_dict(fused.state_dict())
    for _ in range(20):
        results = [results_of(net, loss_of, real, fake) for net in (fused, plain)]
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            for net in (fused, plain):
                for p in net.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None


def test_u_and_v_advance_once_per_training_forward(device):
    net = Net(ops.bn_leaky_relu, ops.spectral_norm).to(device).double()
    weights, us, vs = [net.w1, net.w2], [net.u1.clone(), net.u2.clone()], [net.v1.clone(), net.v2.clone()]
    x = torch.randn(8, 3, 16, 16, device=device, dtype=torch.float64)
    for _ in range(3):
        net(x).sum().backward()
        dcgan.spectral_norm(weights, us, vs, 1e-12, True)
        torch.testing.assert_close([net.u1, net.u2, net.v1, net.v2], us + vs)
    net.eval()
    net(x)
    torch.testing.assert_close([net.u1, net.u2, net.v1, net.v2], us + vs)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_for_any_number_of_threads(threads):
    load_kernels(ops, "cpu")
    x = channels_last(torch.randn(128, 64, 16, 16))
    weights, us, vs = iteration_state(D_WEIGHTS, "cpu")
    before = torch.get_num_threads()

    def run():
        torch.manual_seed(5)
        return [
            *Case(x).run(ops.bn_leaky_relu),
            *Case(x.contiguous()).run(ops.bn_leaky_relu),
            *run_sn(ops.spectral_norm, weights, us, vs, True),
        ]

    try:
        torch.set_num_threads(4)
        expected = run()
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(expected, run(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_second_derivative_is_refused(device):
    x, weight, bias, mean, var, *rest = bn_args(device)
    (grad,) = torch.autograd.grad(
        ops.bn_leaky_relu(x, weight, bias, mean, var, *rest).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative.*leave --fused out"):
        grad.sum().backward()
    weights, us, vs = iteration_state([(4, 3)], device)
    (scaled,) = ops.spectral_norm([weights[0].requires_grad_()], us, vs, 1e-12, True)
    (grad,) = torch.autograd.grad(scaled.square().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*leave --fused out"):
        grad.sum().backward()


def test_forward_mode_is_refused(device):
    """Else PyTorch takes the ops for constants: tangents of 0, without a word."""
    x, weight, bias, mean, var, *rest = bn_args(device)
    with pytest.raises(RuntimeError, match="bn_leaky_relu has no forward-mode derivative.*leave --fused out"):
        torch.func.jvp(lambda t: ops.bn_leaky_relu(t, weight, bias, mean, var, *rest), (x,), (x,))
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        ops.bn_leaky_relu(x, forward_ad.make_dual(weight, weight), bias, mean, var, *rest)
    weights, us, vs = iteration_state([(4, 3)], device)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="spectral_norm has no forward-mode derivative"):
        ops.spectral_norm([forward_ad.make_dual(weights[0], weights[0])], us, vs, 1e-12, True)


def test_forward_mode_over_a_backward_is_refused(device):
    x, weight, bias, mean, var, *rest = bn_args(device)
    weights, us, vs = iteration_state([(4, 3)], device)
    for name in ("bn_leaky_relu", "spectral_norm"):
        with forward_ad.dual_level():
            if name == "bn_leaky_relu":
                of, y = x, ops.bn_leaky_relu(x, weight, bias, mean, var, *rest)
            else:
                of, y = weights[0].requires_grad_(), ops.spectral_norm(weights, us, vs, 1e-12, True)[0]
            dual = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
            with pytest.raises(RuntimeError, match=f"{name} has no forward-mode derivative"):
                torch.autograd.grad(y, of, dual)


def test_a_meta_tensor_among_others_is_refused(device):
    """Else the dispatcher takes all for meta tensors, and y is whatever lay in memory."""
    x, weight, bias, mean, var, *rest = bn_args(device)
    with pytest.raises(RuntimeError, match=f"bn_leaky_relu got tensors on {device} and meta"):
        ops.bn_leaky_relu(x, weight.to("meta"), bias, mean, var, *rest)
    with pytest.raises(RuntimeError, match=f"bn_leaky_relu got tensors on {device} and meta"):
        ops.bn_leaky_relu(x, weight, bias, mean, var.to("meta"), *rest)
    weights, us, vs = iteration_state([(4, 3), (2, 5)], device)
    for i, part in enumerate((weights, us, vs)):
        parts = [weights, us, vs]
        parts[i] = [part[0], part[1].to("meta")]
        with pytest.raises(RuntimeError, match=f"spectral_norm got tensors on {device} and meta"):
            ops.spectral_norm(*parts, 1e-12, False)


FIRST_USE = """
import sys, threading, time, warnings
sys.path.insert(0, sys.argv[1])
import torch, dcgan
warnings.simplefilter("error")
ops, called, grads, started = dcgan.fused_ops(), [], [], threading.Event()
load, register = ops.libraries.load, ops._register
rest = None, None, None, None, True, 0.1, 1e-5, 0.2
def slow():
    called.append("too late" if "cpu" in ops.libraries.loaded else "register")
    started.set()
    time.sleep(0.5)
    register()
def first_use():
    x = torch.arange(12.0).view(3, 4).requires_grad_()
    ops.load("cpu")
    torch.ops.dcgan.bn_leaky_relu(x, *rest, 1)[0].square().sum().backward()
    grads.append(x.grad)
ops._register, ops.libraries.load = slow, lambda kind: (called.append(kind), load(kind))[1]
if sys.argv[2] == "meta":
    print(ops.bn_leaky_relu(torch.ones(3, 4, device="meta"), *rest).shape)
threads = [threading.Thread(target=first_use) for _ in range(4)]
for thread in threads:
    thread.start()
    started.wait()  # the others come while the first one is not yet ready
for thread in threads:
    thread.join()
print(len(grads), all(torch.equal(grad, grads[0]) for grad in grads), *called)
"""


@pytest.mark.parametrize("how", ["threads", "meta"])
def test_the_first_use_may_come_from_many_threads_or_be_of_shapes_alone(how):
    load_kernels(ops, "cpu")  # so that none is built below
    command = [sys.executable, "-c", FIRST_USE, str(Path(dcgan.__file__).parent), how]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "Exception" not in done.stderr, done.stderr  # in a thread
    assert done.stdout.splitlines() == [*(["torch.Size([3, 4])"] if how == "meta" else []), "4 True cpu register"]


def test_spectral_norm_takes_shapes_alone_though_autocast_knows_no_meta():
    state = [torch.ones(shape, device="meta") for shape in ((6, 5, 4, 4), (6,), (80,))]
    (scaled,) = ops.spectral_norm(*([t] for t in state), 1e-12, True)
    assert scaled.is_meta and scaled.shape == (6, 5, 4, 4)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_a_sigma_whose_square_no_float32_holds_has_gradients(device, size):
    weights, us, vs = iteration_state([(6, 5)], device)
    exact = [t.double() for t in (weights[0], us[0], vs[0])]
    weight = (weights[0] * size).requires_grad_()
    (scaled,) = ops.spectral_norm([weight], us, vs, 1e-12 * size, False)
    wide = exact[0].requires_grad_()
    (expected,) = dcgan.spectral_norm([wide], [exact[1]], [exact[2]], 1e-12, False)
    dy = torch.randn_like(scaled)
    (ours,) = torch.autograd.grad(scaled, weight, dy)
    (theirs,) = torch.autograd.grad(expected, wide, dy.double())
    torch.testing.assert_close((ours.double() * size), theirs, rtol=1e-4, atol=1e-5)


def test_a_network_in_eval_mode_can_be_traced(device):
    x, weight, bias, mean, var = (t.detach() for t in bn_args(device)[:5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        traced = torch.jit.trace(lambda t: ops.bn_leaky_relu(t, weight, bias, mean, var, False, 0.1, 1e-5, 0.2), x)
        torch.jit.save(traced, io.BytesIO())
    torch.testing.assert_close(traced(x + 1), ops.bn_leaky_relu(x + 1, weight, bias, mean, var, False, 0.1, 1e-5, 0.2))


def test_statistics_are_not_differentiable(device):
    _, *others = torch.ops.dcgan.bn_leaky_relu(*bn_args(device))
    assert not any(t.requires_grad for t in others)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"x": torch.ones(6, 4, dtype=torch.int32)},
            "needs float32, bfloat16, float16 or float64; got Int: leave --fused out",
        ),
        ({"x": torch.ones(6)}, "x must be"),
        ({"weight": torch.ones(5)}, r"weight must have shape \(4,\).*got \(5\)"),
        ({"weight": torch.ones(4, dtype=torch.float64)}, "weight must be Float like x; got Double: cast it"),
        (
            {"x": torch.ones(6, 4).half(), "bias": torch.ones(4).double()},
            "bias must be Half like x or Float; got Double",
        ),
        ({"running_var": None}, "both running_mean and running_var"),
        ({"running_mean": None, "running_var": None, "training": False}, "eval mode needs"),
        ({"groups": 4}, "groups must divide the batch of 6; got groups = 4"),
    ],
)
def test_bn_errors(device, changes, message):
    changes = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
    with pytest.raises(RuntimeError, match=message):
        ops.bn_leaky_relu(*bn_args(device, **changes))


def test_groups_mean_nothing_in_eval_mode_whatever_their_number(device):
    args = bn_args(device, training=False)
    assert torch.equal(ops.bn_leaky_relu(*args[:-1], 4), ops.bn_leaky_relu(*args))  # of 6 pictures


def test_sn_errors(device):
    weights, us, vs = iteration_state([(4, 3, 2, 2), (5, 7)], device)
    for args, message in [
        (([], [], []), "one or more weights"),
        ((weights, us, vs[:1]), "2 weights, 2 us, 1 vs"),
        ((weights, us[::-1], vs), r"a weight of \(4, 3, 2, 2\) needs u of shape \(4,\)"),
        (
            ([w.bfloat16() for w in weights], us, vs),
            "needs float32 or float64 weights; got BFloat16: leave --fused out",
        ),
        ((weights, [u.double() for u in us], vs), "u and v must be Float like their weight; got Double"),
        (([weights[0], weights[1].double()], us, vs), "one dtype"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.spectral_norm(*args, 1e-12, True)


@pytest.mark.parametrize("name", ["bias", "running_mean", "running_var"])
def test_bn_vectors_of_another_length_are_named(device, name):
    with pytest.raises(RuntimeError, match=rf"{name} must have shape \(4,\).*got \(5\)"):
        ops.bn_leaky_relu(*bn_args(device, **{name: torch.ones(5, device=device)}))


def test_v_of_another_length_is_named(device):
    weights, us, vs = iteration_state([(4, 3, 2, 2), (5, 7)], device)
    with pytest.raises(RuntimeError, match=r"a weight of \(5, 7\) needs .* and v of \(7,\); got .* \(8\)"):
        ops.spectral_norm(weights, us, [vs[0], torch.ones(8, device=device)], 1e-12, True)


def test_backward_refuses_what_is_not_of_its_forward(device):
    weights, us, vs = iteration_state([(4, 3, 2, 2), (5, 7)], device)
    backward, ones = torch.ops.dcgan.spectral_norm_backward, functools.partial(torch.ones, device=device)
    with pytest.raises(RuntimeError, match="sigmas must be those"):
        backward(weights, weights, us, vs, ones(3))
    with pytest.raises(RuntimeError, match="gradient 1 has shape"):
        backward([weights[0], ones(6, 7)], weights, us, vs, ones(2))
    with pytest.raises(RuntimeError, match="dy must be"):
        torch.ops.dcgan.bn_leaky_relu_backward(ones(7, 4), ones(6, 4), None, None, ones(1, 4), ones(1, 4), True, 0.2, 1)


def test_gradients_of_two_dtypes_are_named(device):
    weights, us, vs = iteration_state([(4, 3, 2, 2), (5, 7)], device)
    grads = [torch.ones_like(weights[0]), torch.ones_like(weights[1]).bfloat16()]
    with pytest.raises(RuntimeError, match="all gradients must have one dtype; got Float and BFloat16"):
        torch.ops.dcgan.spectral_norm_backward(grads, weights, us, vs, torch.ones(2, device=device))


def test_other_devices_are_named():
    with pytest.raises(ops.Unavailable, match="not on mps: leave --fused out"):
        ops.load("mps")


# -------------------------------------------------------------------------------------------------- CUDA only


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device here")
class TestCuda:
    def setup_method(self):
        load_kernels(ops, "cuda")

    def capture(self, layout, seed):
        torch.manual_seed(seed)
        net = Net(ops.bn_leaky_relu, ops.spectral_norm).cuda().to(memory_format=layout)
        real, fake = (torch.randn(32, 3, 16, 16, device="cuda").to(memory_format=layout) for _ in range(2))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                loss_of(net, real, fake).backward()
        torch.cuda.current_stream().wait_stream(stream)
        state, graph = copy.deepcopy(net.state_dict()), torch.cuda.CUDAGraph()
        for p in net.parameters():
            p.grad = None
        with torch.cuda.graph(graph):
            loss_of(net, real, fake).backward()

        def replay(memory=(real, fake)):  # what the graph reads must live as long as it
            net.load_state_dict(state)
            for p in net.parameters():
                p.grad.zero_()
            graph.replay()
            torch.cuda.synchronize()
            return [t.clone() for t in [*(p.grad for p in net.parameters()), *net.buffers()]]

        twin = copy.deepcopy(net)
        twin.load_state_dict(state)
        for p in twin.parameters():
            p.grad = None
        return replay, results_of(twin, loss_of, real, fake)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
    def test_graphs_replayed_in_turn(self, layout):
        """Two graphs, 100 replays each, bitwise equal: no workspace is shared and nothing is added in any order."""
        torch.backends.cudnn.deterministic = True
        (first, eager1), (second, eager2) = self.capture(layout, 1), self.capture(layout, 2)
        expected1, expected2 = first(), second()
        torch.testing.assert_close([expected1, expected2], [eager1, eager2])
        for _ in range(100):
            assert all(torch.equal(a, b) for a, b in zip(first(), expected1, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(second(), expected2, strict=True))

    def test_side_stream_behind_a_long_kernel(self):
        x, weights = torch.randn(64, 64, 16, 16, device="cuda"), [torch.randn(64, 64, 4, 4, device="cuda")]
        us, vs = [torch.randn(64, device="cuda")], [torch.randn(1024, device="cuda")]

        def run(x):
            y = ops.bn_leaky_relu(x, None, None, None, None, True, 0.1, 1e-5, 0.2)
            return y, *ops.spectral_norm(weights, us, vs, 1e-12, False)

        expected, late, stream = run(x), torch.zeros_like(x), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(x)
            got = run(late)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_repeats_are_bitwise_equal(self):
        for shape in [(128, 128, 16, 16), (128, 512, 4, 4), (3, 7, 5, 5), (100_000, 9)]:
            for layout in (lambda x: x, channels_last):
                case = Case(layout(torch.randn(shape, device="cuda")))
                first = case.run(ops.bn_leaky_relu)
                for _ in range(20):
                    assert all(torch.equal(a, b) for a, b in zip(case.run(ops.bn_leaky_relu), first, strict=True))

    @pytest.mark.slow
    def test_more_than_two_to_the_31_elements(self):
        x = torch.zeros(2**15 + 8, 256, 16, 17, device="cuda", dtype=torch.bfloat16)
        x[-1] = torch.randn(256, 16, 17, device="cuda").bfloat16()
        y = ops.bn_leaky_relu(x, None, None, None, None, True, 0.1, 1e-5, 0.2)
        few = x[-8:].float()
        mean, square = few.sum((0, 2, 3)) / (x.numel() // 256), few.square().sum((0, 2, 3)) / (x.numel() // 256)
        expected = F.leaky_relu((few - mean.view(-1, 1, 1)) / (square - mean**2 + 1e-5).sqrt().view(-1, 1, 1), 0.2)
        torch.testing.assert_close(y[-8:].float(), expected, rtol=1e-2, atol=1e-2)

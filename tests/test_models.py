"""The networks' room: shapes, parameter counts, ranges and first weights of every preset, and the two ops."""

import math
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import PRESETS, differing, state
from torch import nn
from torch.nn.utils import parametrizations

import dcgan

# Of each layer: what comes out for one z or picture, and its parameters (its BatchNorm's too), counted by hand.
LAYERS = {
    "classic": (
        [
            ("512x4x4", 100 * 512 * 16 + 2 * 512),
            ("256x8x8", 512 * 256 * 16 + 2 * 256),
            ("128x16x16", 256 * 128 * 16 + 2 * 128),
            ("64x32x32", 128 * 64 * 16 + 2 * 64),
            ("3x64x64", 64 * 3 * 16),
        ],
        [
            ("64x32x32", 3 * 64 * 16),
            ("128x16x16", 64 * 128 * 16 + 2 * 128),
            ("256x8x8", 128 * 256 * 16 + 2 * 256),
            ("512x4x4", 256 * 512 * 16 + 2 * 512),
            ("1x1x1", 512 * 16),
        ],
    ),
    "regularized": (
        [
            ("1024x4x4", 128 * 1024 * 16 + 2 * 1024),
            ("512x8x8", 1024 * 512 * 16 + 2 * 512),
            ("256x16x16", 512 * 256 * 16 + 2 * 256),
            ("128x32x32", 256 * 128 * 16 + 2 * 128),
            ("3x64x64", 128 * 3 * 16),
        ],
        [
            ("128x32x32", 3 * 128 * 16),
            ("256x16x16", 128 * 256 * 16 + 2 * 256),
            ("512x8x8", 256 * 512 * 16 + 2 * 512),
            ("1024x4x4", 512 * 1024 * 16 + 2 * 1024),
            ("1x1x1", 1024 * 16),
        ],
    ),
    "keras": (
        [
            ("128x8x8", 128 * 8192 + 8192),
            ("128x16x16", 128 * 128 * 16 + 128),
            ("256x32x32", 128 * 256 * 16 + 256),
            ("512x64x64", 256 * 512 * 16 + 512),
            ("3x64x64", 512 * 3 * 25 + 3),
        ],
        [
            ("64x32x32", 3 * 64 * 16 + 64),
            ("128x16x16", 64 * 128 * 16 + 128),
            ("128x8x8", 128 * 128 * 16 + 128),
            ("1x1x1", 8192 + 1),
        ],
    ),
    "mnist": (
        [
            ("256x7x7", 100 * 12544 + 2 * 12544),
            ("128x7x7", 256 * 128 * 25 + 2 * 128),
            ("64x14x14", 128 * 64 * 25 + 2 * 64),
            ("1x28x28", 64 * 25),
        ],
        [("64x14x14", 64 * 25 + 64), ("128x7x7", 64 * 128 * 25 + 128), ("1x1x1", 128 * 49 + 1)],
    ),
    "best": (  # the family `fine`; from the second layer of G on, z scales what enters
        [
            ("512x4x4", 100 * 512 * 16 + 2 * 512),
            ("256x8x8", 512 * 256 * 16 + 2 * 256 + 100 * 512),
            ("128x16x16", 256 * 128 * 16 + 2 * 128 + 100 * 256),
            ("64x32x32", 128 * 64 * 16 + 2 * 64 + 100 * 128),
            ("32x64x64", 64 * 32 * 16 + 2 * 32 + 100 * 64),
            ("3x64x64", 32 * 3 * 9 + 100 * 32),
        ],
        [
            ("32x64x64", 3 * 32 * 9),
            ("64x32x32", 32 * 64 * 16 + 2 * 64),
            ("128x16x16", 64 * 128 * 16 + 2 * 128),
            ("256x8x8", 128 * 256 * 16 + 2 * 256),
            ("512x4x4", 256 * 512 * 16 + 2 * 512),
            ("1x1x1", 512 * 16),
        ],
    ),
}
PARAMETERS = {  # as the sources count them, without running statistics
    "keras": (3_979_651, 404_801),
    "classic": (3_576_704, 2_765_568),
    "mnist": (2_305_472, 212_865),
    "regularized": (13_117_184, 11_036_160),
    "demo": (568_224, 167_808),
    "best": (3_706_528, 2_796_256),
}


def networks(preset="classic", **overrides):
    c = dcgan.config(preset, **overrides)
    torch.manual_seed(0)
    return c, dcgan.Generator(c), dcgan.Discriminator(c)


def count(net):
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def layers(net, x):
    """-> [(shape as in LAYERS, parameters)] of each block of a network, from a forward pass."""
    found = []
    hooks = [
        block.register_forward_hook(lambda block, _, y: found.append((tuple(y.shape[1:]), count(block))))
        for block in net.blocks
    ]
    net.eval()(x)
    [hook.remove() for hook in hooks]
    return found


@pytest.mark.parametrize("preset", LAYERS)
def test_every_layer_has_the_shape_and_parameters_of_its_source(preset):
    c, G, D = networks(preset)
    for net, x, expected in (
        (G, torch.randn(1, c.nz), LAYERS[preset][0]),
        (D, torch.zeros(1, c.nc, c.image_size, c.image_size), LAYERS[preset][1]),
    ):
        found = layers(net, x)
        assert [n for _, n in found] == [n for _, n in expected]
        for (shape, _), (words, _) in zip(found, expected, strict=True):  # a dense layer of G may come out flat
            assert math.prod(shape) == math.prod(map(int, words.split("x")))
            assert len(shape) == 1 or "x".join(map(str, shape)) == words
    assert (count(G), count(D)) == PARAMETERS[preset]


@pytest.mark.parametrize("preset", PARAMETERS)
def test_the_parameters_are_counted(preset):
    _, G, D = networks(preset)
    assert (count(G), count(D)) == PARAMETERS[preset] and set(PARAMETERS) == set(PRESETS)


@pytest.mark.parametrize("preset", LAYERS)
def test_the_summary_names_each_layer_its_shape_and_parameters(preset):
    c, G, D = networks(preset, ngf=8, ndf=8)
    for net, x in ((G, torch.randn(2, c.nz)), (D, torch.zeros(2, c.nc, c.image_size, c.image_size))):
        net.train()
        before = state(net)
        lines = dcgan.summary(net, x)
        assert net.training and not differing(before, state(net))
        expected = layers(net, x)
        assert len(lines) == len(expected) + 2
        for line, (shape, n) in zip(lines[1:-1], expected, strict=True):
            words = line.split()
            assert words[-1] == f"{n:,}" and words[-2] == "x".join(map(str, shape))
            assert re.match(r" *(scaled by z, )?(dense|conv|up)", line)
        assert type(net).__name__ in lines[0] and lines[-1].split()[-1] == f"{count(net):,}"


def test_the_summary_tells_what_follows_each_layer():
    c, G, D = networks("classic", ngf=4, ndf=4)
    lines = dcgan.summary(G, torch.randn(1, c.nz)) + dcgan.summary(D, torch.zeros(1, 3, 64, 64))
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "up 4x4, stride 1, BatchNorm, relu 32x4x4" in text
    assert "up 4x4, stride 2, tanh 3x64x64" in text
    assert "conv 4x4, stride 2, leaky_relu 4x32x32" in text
    assert "conv 4x4, stride 2, BatchNorm, leaky_relu 8x16x16" in text
    assert "conv 4x4, stride 1 1x1x1" in text


# ---------------------------------------------------------------------------------------- sizes and ranges


@pytest.mark.parametrize(
    "size, last", [(28, (256, 4, 4)), (40, (512, 3, 3)), (48, (512, 3, 3)), (64, (512, 4, 4)), (96, (1024, 3, 3))]
)
def test_d_of_best_judges_from_the_whole_picture(size, last):
    """D's last layer weighs at most 4 x 4 places, linearly, and each of them has seen half of the side or more."""
    c, G, D = networks("best", image_size=size)
    x = torch.zeros(1, c.nc, size, size)
    *_, (shape, _), (logit, _) = layers(D, x)
    assert shape == last and logit == (1, 1, 1)
    y = x.requires_grad_()
    for block in D.blocks[:-1]:
        y = block(y)
    y[0, :, 1, 1].sum().backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 >= size / 2


@pytest.mark.parametrize("nc", [1, 3])
@pytest.mark.parametrize("size", [28, 32, 48, 64, 96, 128])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_works_at_every_usual_size(preset, size, nc):
    c, G, D = networks(preset, image_size=size, nc=nc, nz=4, ngf=2, ndf=2)
    x = G(torch.randn(2, 4))
    assert x.shape == (2, nc, size, size) and x.dtype == torch.float32
    low = 0 if preset == "keras" else -1
    assert low <= x.min() and x.max() <= 1
    logits = D(x)
    assert logits.shape == (2,) and logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad is not None for net in (G, D) for p in net.parameters())


def trained_g(preset):
    """A small G as load_generator gives it, with running statistics that are not 0 and 1, and five z."""
    _, G, _ = networks(preset, ngf=4, image_size=28 if preset == "mnist" else 16)
    z = dcgan.latent(range(5), G.config.nz)
    with torch.no_grad():
        G(z)
    return G.eval().requires_grad_(False).to(memory_format=torch.channels_last), z


@pytest.mark.parametrize("preset", PRESETS)
def test_g_can_be_exported_for_any_number_of_z(preset):
    G, z = trained_g(preset)
    exported = torch.export.export(G, (z[:2],), dynamic_shapes=[{0: torch.export.Dim("n")}])
    assert torch.equal(exported.module()(z), G(z))


@pytest.mark.parametrize("preset", PRESETS)
def test_g_as_onnx_draws_the_same(preset, tmp_path):
    pytest.importorskip("onnxscript", reason='draws outside of PyTorch: pip install -e ".[onnx]"')
    runtime = pytest.importorskip("onnxruntime")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("README: torch 2.11 or later")
    G, z = trained_g(preset)
    torch.onnx.export(G, (z[:2],), tmp_path / "G.onnx", dynamo=True, dynamic_shapes=[{0: "n"}])  # as in the README
    (x,) = runtime.InferenceSession(tmp_path / "G.onnx").run(None, {"z": z.numpy()})
    torch.testing.assert_close(torch.from_numpy(x), G(z), rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", LAYERS)
def test_self_modulation_lets_z_scale_what_enters_each_layer_of_g_but_the_first(preset):
    c, G, D = networks(preset, self_modulation=True, ngf=8, ndf=8)
    _, without, other_d = networks(preset, self_modulation=False, ngf=8, ndf=8)
    entering = [row.channels for row in dcgan.rows_g(c)[:-1]]
    assert count(G) == count(without) + c.nz * sum(entering) and count(D) == count(other_d)
    z, scales = torch.randn(3, c.nz), [block.scale.weight for block in G.blocks[1:]]
    assert [tuple(scale.shape) for scale in scales] == [(n, c.nz) for n in entering]
    assert all(abs(scale.std() - 0.02) < 0.004 for scale in scales)
    missing = without.load_state_dict(G.state_dict(), strict=False)
    assert not missing.missing_keys and all(name.endswith("scale.weight") for name in missing.unexpected_keys)
    x = without.blocks[0](z[:, :, None, None])  # the first layer as it stands, the others by hand
    for block, scale in zip(without.blocks[1:], scales, strict=True):
        x = block(x + x * (z @ scale.T)[:, :, None, None])
    torch.testing.assert_close(G(z), x)
    G(z).square().mean().backward()
    assert all(scale.grad.abs().max() > 0 for scale in scales)
    assert ["scaled by z" in line for line in dcgan.summary(G, z)[1:-1]] == [False] + [True] * len(scales)
    for scale in scales:
        scale.data.zero_()
    assert torch.equal(G(z), without(z))


def augmented_by_torch(x, p):
    """What dcgan.augment is to give, by affine_grid and grid_sample, with the same random numbers."""
    n, chance = len(x), dict(dtype=x.dtype)
    on = (torch.rand(n, 1, 1, **chance) < p).to(x.dtype)
    angle = (torch.rand(n, 1, 1, **chance) - 0.5) / 2 * on
    scale = torch.exp(torch.randn(n, 1, 1, **chance) * 0.15 * on)
    right, down = (torch.rand(2, n, 1, 1, **chance) - 0.5) / 2 * on  # grid_sample's unit is half a side
    rows = [scale * angle.cos(), -scale * angle.sin(), right, scale * angle.sin(), scale * angle.cos(), down]
    places = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, places, padding_mode="reflection", align_corners=False)
    on = (torch.rand(n, 1, 1, 1, **chance) < p).to(x.dtype)
    saturation, contrast, light = (std * torch.randn(n, 1, 1, 1, **chance) * on for std in (0.4, 0.2, 0.2))
    grey = x.mean(1, keepdim=True).expand_as(x)
    return torch.lerp(grey, x, saturation.exp()) * contrast.exp() + light


@pytest.mark.parametrize("shape", [(32, 3, 16, 16), (32, 1, 28, 28), (8, 3, 65, 65)])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_augmentation_is_what_grid_sample_would_do(shape, p):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    results = []
    for augment in (dcgan.augment, augmented_by_torch):
        torch.manual_seed(3)
        y = augment(x, torch.tensor(p))
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-10)
    changed = (results[0][0] - x).abs().amax((1, 2, 3)) > 1e-9
    low, high = {0.0: (0, 0), 0.5: (1, len(x)), 1.0: (len(x), len(x))}[p]
    assert low <= changed.sum() <= high


def test_each_picture_is_augmented_by_itself():
    x = torch.rand(1, 3, 16, 16).expand(2000, -1, -1, -1)
    torch.manual_seed(0)
    same = (dcgan.augment(x, torch.tensor(0.3)) - x).abs().amax((1, 2, 3)) < 1e-5
    assert abs(same.float().mean() - 0.7**2) < 0.04  # neither turned nor coloured


@pytest.mark.parametrize("preset", LAYERS)
def test_the_more_often_d_knows_a_real_picture_the_more_is_augmented(preset):
    c, _, D = networks(preset, augment=True, ngf=8, ndf=8)
    both = torch.randn(8, c.nc, c.image_size, c.image_size)
    for sure, moves in (1.0, c.batch_size / D.SLOW), (0.0, -c.batch_size / D.SLOW):
        D.p.fill_(0.3), D.sure.fill_(sure)
        logits = D(both, groups=2)
        assert D.p.item() == pytest.approx(0.3 + moves, abs=1e-7)
        assert D.sure.item() == pytest.approx(sure + 0.005 * (logits[:4].sign().mean().item() - sure), abs=1e-6)
    D.p.fill_(D.MOST), D.sure.fill_(1)
    D(both, groups=2)
    assert D.p.item() == pytest.approx(D.MOST)
    before = D.sure.clone()
    D(both), D.eval()(both, groups=2)  # G's turn; no training
    assert torch.equal(D.sure, before) and torch.equal(D.p, torch.tensor(D.MOST))


def test_what_d_sees_is_augmented_in_training_alone():
    c, _, D = networks("best", augment=True, ngf=8, ndf=8)
    _, _, plain = networks("best", augment=False, ngf=8, ndf=8)
    assert D.state_dict().keys() - plain.state_dict().keys() == {"p", "sure"}
    plain.load_state_dict(D.state_dict(), strict=False)
    x = torch.randn(4, 3, 64, 64)
    D.p.fill_(1)
    assert torch.equal(D.eval()(x), plain.eval()(x))
    assert (D.train()(x) - plain.train()(x)).abs().max() > 1e-3


def test_p_stays_between_its_limits_which_are_these():
    _, _, D = networks("best", augment=True, ngf=8, ndf=8)
    assert (D.TARGET, D.MOST, D.SLOW) == (0.5, 0.8, 50_000)
    x = torch.randn(4, 3, 64, 64)
    for sure, p, expected in ((-1.0, 0.0, 0.0), (2.0, 0.8, 0.8)):
        D.sure.fill_(sure)
        D.p.fill_(p)
        D(x, groups=2)
        assert D.p.item() == pytest.approx(expected)


def test_p_of_two_processes_moves_by_their_mean(monkeypatch):
    _, _, D = networks("best", augment=True, ngf=8, ndf=8)
    x, moved = torch.randn(4, 3, 64, 64), []
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.mul_(2))  # both say the same
    for world in (1, 2):
        monkeypatch.setattr(dcgan, "WORLD", world)
        D.sure.zero_()
        D(x, groups=2)
        moved.append(D.sure.item())
    assert moved[0] == moved[1] != 0


@pytest.mark.parametrize("preset", PRESETS)
def test_a_size_that_cannot_work_says_which_sizes_can(preset):
    with pytest.raises(dcgan.UserError) as e:
        dcgan.config(preset, image_size=17)
    said = {int(n) for n in re.findall(r"\d+", str(e.value).split("can be")[1])}
    assert {28, 32, 48, 64, 96, 128} <= said and "17" in str(e.value)
    for size in range(1, 257):
        try:
            dcgan.config(preset, image_size=size)
            works = True
        except dcgan.UserError:
            works = False
        assert works == (size in said), size


@pytest.mark.parametrize("preset", PRESETS)
def test_pictures_and_g_have_one_range(preset):
    c, G, _ = networks(preset, ngf=2, ndf=2)
    pixels = torch.arange(256, dtype=torch.uint8)
    x = dcgan.to_range(pixels, c)
    low = 0.0 if preset == "keras" else -1.0
    assert (x.min(), x.max()) == (low, 1.0) and x.dtype == torch.float32
    assert torch.equal(x.diff().sign(), torch.ones(255))
    assert torch.equal(dcgan.to_pixels(x, c), pixels)
    assert torch.equal(dcgan.to_pixels(torch.tensor([low - 1, 2.0]), c), torch.tensor([0, 255], dtype=torch.uint8))
    with torch.no_grad():  # far out, so that the last activation shows its ends
        G.blocks[-1].layer.weight.normal_(0, 1e4)
        y = G(torch.randn(8, c.nz))
    assert y.min() == low and y.max() == 1.0


@pytest.mark.parametrize("preset", PRESETS)
def test_pictures_leave_g_in_fp32_under_autocast(preset):
    c, G, _ = networks(preset, ngf=8, ndf=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert G(torch.randn(2, c.nz)).dtype == torch.float32


# ---------------------------------------------------------------------------------------- first weights


@pytest.mark.parametrize("preset", ["classic", "regularized"])
def test_first_weights_are_normal_as_in_the_paper(preset):
    _, *nets = networks(preset, ngf=32, ndf=32)
    for net in nets:
        for block in net.blocks:
            weight = block.layer.weight
            margin = 4 / math.sqrt(weight.numel())  # four standard errors
            assert abs(weight.mean()) < 0.02 * margin and abs(weight.std() / 0.02 - 1) < margin
    bns = [block.bn for net in nets for block in net.blocks if block.bn is not None]
    scale = torch.cat([bn.weight for bn in bns])
    assert len(bns) == 7 and all((bn.bias == 0).all() for bn in bns)
    if preset == "classic":
        assert abs(scale.mean() - 1) < 0.004 and abs(scale.std() / 0.02 - 1) < 0.15
    else:
        assert (scale == 1).all()


@pytest.mark.parametrize("preset", ["keras", "mnist"])
def test_first_weights_are_glorots_as_in_keras(preset):
    _, *nets = networks(preset, ngf=16, ndf=16)
    for net in nets:
        for block in net.blocks:
            weight = block.layer.weight
            a, b, area = weight.shape[0], weight.shape[1], weight[0, 0].numel()
            limit = math.sqrt(6 / (a * area + b * area))
            assert 0.97 * limit < weight.abs().max() <= limit
            assert abs(weight.std() / (limit / math.sqrt(3)) - 1) < 4 / math.sqrt(weight.numel())
            assert block.layer.bias is None or (block.layer.bias == 0).all()
            assert block.bn is None or ((block.bn.weight == 1).all() and (block.bn.bias == 0).all())


def test_batchnorm_has_kerass_numbers_in_mnist_and_pytorchs_elsewhere():
    for preset, expected in (("mnist", (1e-3, 0.01)), ("classic", (1e-5, 0.1)), ("regularized", (1e-5, 0.1))):
        _, G, D = networks(preset, ngf=2, ndf=2)
        bns = [m for net in (G, D) for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert bns and {(bn.eps, bn.momentum) for bn in bns} == {expected}


def test_where_batchnorm_biases_and_slopes_are():
    """(BatchNorm, bias, activation, slope) of every layer, as in the sources."""
    relu, leaky, steep = ("relu", 0.0), ("leaky_relu", 0.2), ("leaky_relu", 0.3)
    tanh, sigmoid, none = ("tanh", None), ("sigmoid", None), ("none", None)
    hidden = [(False, False, *leaky), *[(True, False, *leaky)] * 3, (False, False, *none)]
    expected = {
        "classic": ([*[(True, False, *relu)] * 4, (False, False, *tanh)], hidden),
        "regularized": ([*[(True, False, *relu)] * 4, (False, False, *tanh)], hidden),
        "keras": (
            [(False, True, *none), *[(False, True, *leaky)] * 3, (False, True, *sigmoid)],
            [*[(False, True, *leaky)] * 3, (False, True, *none)],
        ),
        "mnist": (
            [*[(True, False, *steep)] * 3, (False, False, *tanh)],
            [*[(False, True, *steep)] * 2, (False, True, *none)],
        ),
    }
    for preset, pair in expected.items():
        _, *nets = networks(preset, ngf=2, ndf=2)
        for net, rows in zip(nets, pair, strict=True):
            found = [(b.bn is not None, b.layer.bias is not None, b.row.activation, b.slope) for b in net.blocks]
            assert found == rows, preset


@pytest.mark.parametrize(
    ("preset", "features", "channels"),
    [("keras", [0, 0, 0.2, 0], [0, 0, 0, 0]), ("mnist", [0.3, 0.3, 0], [0, 0, 0]),
     ("regularized", [0] * 5, [0.25] * 4 + [0]), ("classic", [0] * 5, [0] * 5)],
)  # fmt: skip
def test_dropout_is_where_the_sources_have_it(preset, features, channels):
    _, G, D = networks(preset, ngf=2, ndf=2)
    assert [block.row.dropout for block in D.blocks] == features
    assert [block.row.dropout2d for block in D.blocks] == channels
    assert not any(block.row.dropout or block.row.dropout2d for block in G.blocks)


@pytest.mark.parametrize(("option", "share"), [("dropout", 0.5), ("dropout2d", 0.5)])
def test_dropout_drops_in_training_alone(option, share):
    _, _, D = networks("classic", ndf=64, image_size=32, **{option: share})
    kept = []
    D.blocks[0].register_forward_hook(lambda _, __, y: kept.append((y != 0).float()))
    D(torch.randn(8, 3, 32, 32))
    by_channel = kept[0].mean((2, 3))
    assert abs(kept[0].mean() - (1 - share)) < 0.1
    assert ((by_channel == 0) | (by_channel == 1)).all() == (option == "dropout2d")
    D.eval()(torch.randn(8, 3, 32, 32))
    assert kept[1].mean() == 1


# ---------------------------------------------------------------------------------------- names


def test_a_weight_has_one_name_whatever_computes_it():
    _, G, D = networks("regularized", ngf=2, ndf=2)
    other = dcgan.Discriminator(D.config, ops=object())  # functions are swapped, not modules
    assert list(D.state_dict()) == list(other.state_dict())
    _, _, plain = networks("regularized", ngf=2, ndf=2, spectral_norm=False)
    assert set(D.state_dict()) - set(plain.state_dict()) == {f"blocks.{i}.{x}" for i in range(5) for x in "uv"}
    assert set(plain.state_dict()) < set(D.state_dict())
    names = {f"blocks.{i}.layer.weight" for i in range(5)}
    names |= {f"blocks.{i}.bn.{x}" for i in range(4) for x in ("weight", "bias")}
    assert {name for name, _ in G.named_parameters()} == names


# ---------------------------------------------------------------------------------------- spectral norm


def twins(make):
    """-> a layer of torch's own spectral norm, and ours of the same weight, u and v."""
    torch.manual_seed(1)
    theirs = parametrizations.spectral_norm(make().double())
    inner = theirs.parametrizations.weight
    ours = inner.original.detach().clone().requires_grad_()
    return theirs, inner, ours, inner[0]._u.clone(), inner[0]._v.clone()


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 8, 4), lambda: nn.Conv2d(8, 1, 4), lambda: nn.Linear(12, 5)])
def test_spectral_norm_is_torchs_step_by_step(make):
    theirs, inner, ours, u, v = twins(make)
    for step in range(6):
        update = step != 4  # once in eval mode: nothing moves
        theirs.train(update)
        before = u.clone(), v.clone()
        weight = theirs.weight
        (found,) = dcgan.spectral_norm([ours], [u], [v], 1e-12, update)
        torch.testing.assert_close(found, weight, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(u, inner[0]._u, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(v, inner[0]._v, rtol=1e-12, atol=1e-14)
        same = torch.equal(before[0], u) and torch.equal(before[1], v)
        assert same if not update else not same or len(u) == 1  # one row has nothing to iterate
        way = torch.randn_like(found)
        (expected,) = torch.autograd.grad((weight * way).sum(), inner.original)
        (gradient,) = torch.autograd.grad((found * way).sum(), ours)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            inner.original.sub_(gradient, alpha=0.1)
            ours.sub_(gradient, alpha=0.1)


def test_spectral_norm_takes_many_layers_and_shapes_at_once():
    torch.manual_seed(0)
    weights = [torch.randn(8, 3, 4, 4), torch.randn(1, 8, 4, 4), torch.randn(6, 10)]
    us, vs = [torch.randn(len(w)) for w in weights], [torch.randn(w[0].numel()) for w in weights]
    for _ in range(200):
        normalized = dcgan.spectral_norm(weights, us, vs, 1e-12, True)
    for weight, w in zip(weights, normalized, strict=True):
        assert w.shape == weight.shape
        torch.testing.assert_close(torch.linalg.matrix_norm(w.flatten(1), 2), torch.tensor(1.0), rtol=1e-3, atol=0)


def test_two_forwards_may_precede_one_backward():
    """u and v move in place at each forward; a gradient of an earlier one must not see it."""
    torch.manual_seed(0)
    weight = torch.randn(4, 6, requires_grad=True)
    u, v = F.normalize(torch.randn(4), dim=0), F.normalize(torch.randn(6), dim=0)
    (first,) = dcgan.spectral_norm([weight], [u], [v], 1e-12, True)
    (expected,) = torch.autograd.grad(first.square().sum(), weight, retain_graph=True)
    dcgan.spectral_norm([weight], [u], [v], 1e-12, True)
    (found,) = torch.autograd.grad(first.square().sum(), weight)
    assert torch.equal(found, expected)


def test_d_begins_near_the_true_spectral_norm_and_every_layer_has_it():
    _, _, D = networks("regularized", ndf=8)
    for block in D.blocks:
        sigma = block.u @ block.layer.weight.flatten(1) @ block.v
        true = torch.linalg.matrix_norm(block.layer.weight.flatten(1), 2)
        assert 0.9 < sigma / true <= 1.0001  # fifteen iterations, as torch begins
    used = []
    for block in D.blocks:
        block.register_forward_pre_hook(lambda _, args: used.append(args[1]))
    D.eval()(torch.randn(2, 3, 64, 64))
    assert all(0.99 < torch.linalg.matrix_norm(w.flatten(1), 2) < 1.12 for w in used) and len(used) == 5


def test_u_and_v_move_in_training_alone():
    _, _, D = networks("regularized", ndf=4)
    x = torch.randn(2, 3, 64, 64)
    before = state(D)
    D.eval()(x)
    assert not differing(before, state(D))
    D.train()(x)
    moved = {name.split(".")[-1] for name in differing(before, state(D))}
    assert moved == {"u", "v", "running_mean", "running_var"}


# ---------------------------------------------------------------------------------------- BatchNorm + LeakyReLU


def batch_norm_case(shape, groups):
    g = torch.Generator().manual_seed(len(shape) + groups)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    c = shape[1]
    x = (rand(*shape) * 2 + 1).requires_grad_()
    return x, rand(c).requires_grad_(), rand(c).requires_grad_(), rand(c), rand(c).abs() + 0.1, rand(*shape)


@pytest.mark.parametrize("slope", [0.0, 0.2, 0.3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 4)])
def test_bn_leaky_relu_is_torchs_two_modules(shape, training, slope):
    x, weight, bias, mean, var, way = batch_norm_case(shape, 1)
    bn = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5, eps=1e-3, momentum=0.3).double().train(training)
    with torch.no_grad():
        bn.weight.copy_(weight), bn.bias.copy_(bias), bn.running_mean.copy_(mean), bn.running_var.copy_(var)
    expected = nn.LeakyReLU(slope)(bn(x))
    wanted = torch.autograd.grad((expected * way).sum(), [x, bn.weight, bn.bias])
    found = dcgan.bn_leaky_relu(x, weight, bias, mean, var, training, 0.3, 1e-3, slope)
    gradients = torch.autograd.grad((found * way).sum(), [x, weight, bias])
    close = dict(rtol=1e-12, atol=1e-12)
    assert found.shape == x.shape and found.dtype == x.dtype
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(gradients, wanted, **close)
    torch.testing.assert_close((mean, var), (bn.running_mean, bn.running_var), **close)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 3, 4)])
def test_groups_are_passes_one_after_the_other(shape, groups):
    x, weight, bias, mean, var, way = batch_norm_case(shape, groups)
    mean2, var2 = mean.clone(), var.clone()
    parts = [dcgan.bn_leaky_relu(p, weight, bias, mean2, var2, True, 0.1, 1e-5, 0.2) for p in x.chunk(groups)]
    wanted = torch.autograd.grad((torch.cat(parts) * way).sum(), [x, weight, bias])
    found = dcgan.bn_leaky_relu(x, weight, bias, mean, var, True, 0.1, 1e-5, 0.2, groups)
    gradients = torch.autograd.grad((found * way).sum(), [x, weight, bias])
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((mean, var), (mean2, var2), rtol=1e-12, atol=1e-12)
    one = dcgan.bn_leaky_relu(x, weight, bias, mean2, var2, True, 0.1, 1e-5, 0.2)
    assert not torch.allclose(one, found)  # or the groups would mean nothing


def test_groups_mean_nothing_in_eval_mode():
    x, weight, bias, mean, var, _ = batch_norm_case((6, 5), 2)
    one = dcgan.bn_leaky_relu(x, weight, bias, mean, var, False, 0.1, 1e-5, 0.2)
    assert torch.equal(dcgan.bn_leaky_relu(x, weight, bias, mean, var, False, 0.1, 1e-5, 0.2, 2), one)


@pytest.mark.parametrize("spectral", [False, True])
def test_d_of_both_batches_in_one_pass_is_d_of_each(spectral):
    """Real and fake are mini-batches of their own; spectral norm's u and v move once for the pass."""
    _, _, D = networks("classic", ndf=4, image_size=16, spectral_norm=spectral)
    D = D.double()
    other = dcgan.Discriminator(D.config).double()
    other.load_state_dict(D.state_dict())
    real, fake = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)
    both = D(torch.cat([real, fake]), groups=2)
    first = other(real)
    if spectral:
        for block, moved in zip(other.blocks, D.blocks, strict=True):
            assert torch.equal(block.u, moved.u)
        torch.testing.assert_close(both[:4], first)
        return
    torch.testing.assert_close(both, torch.cat([first, other(fake)]))
    a, b = state(D), state(other)
    for name in a:
        torch.testing.assert_close(a[name], b[name])
    assert not torch.allclose(both, dcgan.Discriminator.forward(D, torch.cat([real, fake])))

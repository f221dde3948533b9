"""The room of the training step: it equals one written by hand, and a number that is not finite never gets in.

What a run then does and says: test_numbers.py.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import PRESETS, differing, state
from torch import nn

import dcgan

# What each source sets: optimiser, (lr_g, lr_d), betas, eps, weight decay, update, target of real pictures, halves.
GAMES = {
    "classic": (torch.optim.AdamW, (5e-4, 5e-4), (0.5, 0.999), 1e-8, 0.01, "reuse", 1.0, 1),
    "regularized": (torch.optim.Adam, (1e-4, 4e-4), (0.5, 0.999), 1e-8, 0.0, "fresh", 0.9, 1),
    "keras": (torch.optim.Adam, (1e-4, 1e-4), (0.9, 0.999), 1e-7, 0.0, "fresh", 1.0, 2),
    "mnist": (torch.optim.Adam, (1e-4, 1e-4), (0.9, 0.999), 1e-7, 0.0, "simultaneous", 1.0, 1),
}


@pytest.fixture
def start(tiny, tmp_path):
    """-> a starter of runs as train starts them: start("mnist") -> its networks, optimisers, pictures."""
    number = itertools.count()

    def make(preset="classic", dtype=torch.float64, **overrides):
        run = dcgan.set_up(tiny(preset, run=str(tmp_path / f"run{next(number)}"), **overrides))
        for net in (run.G, run.D, run.ema):
            if net is not None:
                net.to(dtype)
        return run

    return make


def inputs_of(run, step=0):
    dtype = next(run.G.parameters()).dtype
    real, z, noise = dcgan.draw_inputs(run.c, run.pictures, step, run.device)
    return real.to(dtype), z.to(dtype), [n.to(dtype) if torch.is_tensor(n) else n for n in noise]


def step_of(run, real, z, noise, weight=0.0):
    return dcgan.train_step(run.c, run.G, run.D, run.ema, run.opt_g, run.opt_d, real, z, noise, weight)


def everything(run):
    return state(run.G, run.D, run.ema, run.opt_g, run.opt_d)


# ---------------------------------------------------------------------------------------- the same, by hand


class Mask(nn.Module):
    """Dropout that was drawn elsewhere."""

    def forward(self, x):
        return x * self.masks.pop(0)


def networks_by_hand(preset):
    """G and D of each system for pictures of 16 x 16 (mnist 14 x 14), nz 8 and width 4, layer after layer."""
    if preset == "keras":
        return nn.Sequential(
            nn.Linear(8, 256), nn.Unflatten(1, (4, 8, 8)),
            nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(4, 3, 5, 1, 2), nn.Sigmoid(),
        ), nn.Sequential(
            nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), Mask(), nn.Linear(256, 1),
        )  # fmt: skip
    if preset == "mnist":
        return nn.Sequential(
            nn.Linear(8, 784, bias=False), nn.BatchNorm1d(784, 1e-3, 0.01), nn.LeakyReLU(0.3),
            nn.Unflatten(1, (16, 7, 7)),
            nn.ConvTranspose2d(16, 8, 5, 1, 2, bias=False), nn.BatchNorm2d(8, 1e-3, 0.01), nn.LeakyReLU(0.3),
            nn.ConvTranspose2d(8, 1, 5, 2, 2, 1, bias=False), nn.Tanh(),
        ), nn.Sequential(
            nn.Conv2d(1, 4, 5, 2, 2), nn.LeakyReLU(0.3), Mask(), nn.Flatten(), nn.Linear(196, 1),
        )  # fmt: skip
    drop = [Mask()] if preset == "regularized" else []
    return nn.Sequential(
        nn.Unflatten(1, (8, 1, 1)),
        nn.ConvTranspose2d(8, 8, 4, 1, 0, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False), nn.Tanh(),
    ), nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.LeakyReLU(0.2), *drop,
        nn.Conv2d(4, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), *[Mask() for _ in drop],
        nn.Conv2d(8, 1, 4, bias=False), nn.Flatten(),
    )  # fmt: skip


class ByHand:
    """One of the four systems as its source has it: D(real) and D(fake) apart, no fusing, no guard."""

    def __init__(self, preset, run):
        self.preset = preset
        self.G, self.D = (net.double() for net in networks_by_hand(preset))
        for mine, theirs in ((self.G, run.G), (self.D, run.D)):
            for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
                a.data.copy_(b.data)
        Adam, lrs, betas, eps, decay, self.update, self.real_label, self.halves = GAMES[preset]
        self.opt_g, self.opt_d = (
            Adam(net.parameters(), lr, betas=betas, eps=eps, weight_decay=decay, foreach=False)
            for net, lr in zip((self.G, self.D), lrs, strict=True)
        )
        self.uv = [(block.u.clone(), block.v.clone()) for block in run.D.blocks if hasattr(block, "u")]

    def normalized(self):
        """One power iteration for each convolution of D -> {name: W / sigma}."""
        weights = {}
        convolutions = [(n, p) for n, p in self.D.named_parameters() if p.dim() == 4]
        for (name, weight), (u, v) in zip(convolutions, self.uv, strict=False):
            matrix = weight.detach().reshape(len(weight), -1)
            u.copy_(matrix @ v / (matrix @ v).norm())
            v.copy_(matrix.T @ u / (matrix.T @ u).norm())
            weights[name] = weight / (u @ weight.reshape(len(weight), -1) @ v)
        return weights

    def d(self, x, weights, masks):
        for module, mask in zip([m for m in self.D if isinstance(m, Mask)], masks, strict=True):
            module.masks = [mask.flatten(1) if self.preset == "keras" else mask]
        return torch.func.functional_call(self.D, weights, (x,)).view(-1)

    def step(self, real, z, noise, masks):
        """masks: of each dropout of D, first over real and fake together, then over the fakes that G learns from."""
        bce, n = nn.BCEWithLogitsLoss(), len(real)
        joint, later = masks[: len(masks) // (1 if self.update == "simultaneous" else 2)], masks
        later = masks[len(joint) :]
        self.G.zero_grad()
        self.D.zero_grad()
        weights = self.normalized()
        fake = self.G(z[0])
        logits_real = self.d(real + noise[0], weights, [m[:n] for m in joint])
        detached = fake if self.update == "simultaneous" else fake.detach()
        logits_fake = self.d(detached + noise[1], weights, [m[n:] for m in joint])
        loss_d = bce(logits_real, torch.full_like(logits_real, self.real_label))
        loss_d = (loss_d + bce(logits_fake, torch.zeros(n).double())) / self.halves
        if self.update == "simultaneous":
            loss_g = bce(logits_fake, torch.ones(n).double())
            gradients = torch.autograd.grad(loss_g, list(self.G.parameters()), retain_graph=True)
            loss_d.backward()
            for p, gradient in zip(self.G.parameters(), gradients, strict=True):
                p.grad = gradient
            self.opt_d.step()
            self.opt_g.step()
        else:
            loss_d.backward()
            self.opt_d.step()
            fake = self.G(z[1]) if self.update == "fresh" else fake
            logits_fake = self.d(fake + noise[2], self.normalized(), later)
            loss_g = bce(logits_fake, torch.ones(n).double())
            self.G.zero_grad()
            loss_g.backward()
            self.opt_g.step()
        return torch.stack([loss_d, loss_g, logits_real.sigmoid().mean(), logits_fake.sigmoid().mean()]).detach()


@pytest.fixture
def masks(monkeypatch):
    """-> the list to which every dropout adds what it multiplied with."""
    drawn = []

    def dropped(channels):
        def dropout(x, p, training=True):
            if not p or not training:
                return x
            shape = (*x.shape[:2], 1, 1) if channels else x.shape
            drawn.append((torch.rand(shape) >= p).to(x.dtype) / (1 - p))
            return x * drawn[-1]

        return dropout

    monkeypatch.setattr(F, "dropout", dropped(False))
    monkeypatch.setattr(F, "dropout2d", dropped(True))
    return drawn


@pytest.mark.parametrize("preset", GAMES)
def test_three_steps_equal_three_written_by_hand(preset, start, masks):
    run = start(preset, steps=5)
    other = ByHand(preset, run)
    for step in range(3):
        real, z, noise = inputs_of(run, step)
        masks.clear()
        found = step_of(run, real, z, noise)
        expected = other.step(real, z, noise, masks)
        close = dict(rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found[:4], expected, **close)
        assert found[4:].tolist() == [1, 0]
        for mine, theirs in ((run.G, other.G), (run.D, other.D)):
            for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b, **close)
            means = [b for name, b in theirs.named_buffers() if "running" in name]
            for a, b in zip((b for n, b in mine.named_buffers() if "running" in n), means, strict=True):
                torch.testing.assert_close(a, b, **close)
        for block, (u, v) in zip(run.D.blocks, other.uv, strict=False):
            torch.testing.assert_close((block.u, block.v), (u, v), **close)
    assert bool(other.uv) == (preset == "regularized")
    assert bool(masks) == (preset != "classic")


@pytest.mark.parametrize("preset", GAMES)
def test_the_optimisers_are_set_as_the_sources_set_them(preset, start):
    run = start(preset)
    Adam, lrs, betas, eps, decay, update, real_label, halves = GAMES[preset]
    for opt, net, lr in ((run.opt_g, run.G, lrs[0]), (run.opt_d, run.D, lrs[1])):
        (group,) = opt.param_groups
        assert type(opt) is Adam and not group["amsgrad"]
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (lr, betas, eps, decay)
        assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]
    assert (run.c.update, run.c.real_label, run.c.loss) == (update, real_label, "mean" if halves == 2 else "sum")
    assert run.ema is None


def test_the_rest_of_each_preset_is_as_in_its_source():
    names = "image_size nc fit nz flips noise dropout dropout2d spectral_norm batch_size epochs samples"
    rows = {
        "classic": (64, 3, "crop", 100, False, 0.0, 0.0, 0.0, False, 64, 20, 64),
        "regularized": (64, 3, "crop", 128, True, 0.1, 0.0, 0.25, True, 128, 60, 64),
        "keras": (64, 3, "squash", 128, False, 0.0, 0.2, 0.0, False, 32, 10, 64),
        "mnist": (28, 1, "crop", 100, False, 0.0, 0.3, 0.0, False, 256, 50, 16),
        "best": (64, 3, "crop", 100, True, 0.05, 0.0, 0.0, True, 8, 20, 64),
    }
    for preset, row in rows.items():
        c = dcgan.config(preset)
        assert tuple(getattr(c, name) for name in names.split()) == row, preset
    best, demo = dcgan.config("best"), dcgan.config("demo")
    assert (best.lr_g, best.lr_d, best.beta1, best.beta2, best.ema) == (5e-4, 1.25e-4, 0.5, 0.99, 0.9999)
    assert best.family == "fine" and best.self_modulation and best.augment
    assert best.noise_steps == -1 and best.sample_every == 500
    assert (demo.lr_g, demo.lr_d, demo.ema, demo.batch_size, demo.steps) == (1e-3, 1e-3, 0.998, 32, 2500)
    assert demo.flips and demo.spectral_norm and demo.sample_every == 250


def test_another_seed_has_other_first_weights(tiny, tmp_path):
    a, b, c = (dcgan.set_up(tiny(seed=seed, run=str(tmp_path / name))) for seed, name in ((0, "a"), (0, "b"), (1, "c")))
    assert not differing(state(a.G, a.D), state(b.G, b.D)) and len(differing(state(a.G), state(c.G))) >= 5


# ---------------------------------------------------------------------------------------- who learns from what


@pytest.mark.parametrize(("update", "passes"), [("reuse", 1), ("fresh", 2), ("simultaneous", 1)])
def test_g_draws_once_or_twice_a_step(update, passes, start):
    run, count = start(update=update), []
    run.G.register_forward_hook(lambda *_: count.append(1))
    step_of(run, *inputs_of(run))
    assert len(count) == passes


@pytest.mark.parametrize(("update", "depends"), [("reuse", True), ("fresh", True), ("simultaneous", False)])
def test_g_learns_against_the_new_d_unless_both_move_at_once(update, depends, start):
    moved = []
    for lr_d in (1e-9, 0.1):
        run = start(update=update, lr_d=lr_d, spectral_norm=False)
        step_of(run, *inputs_of(run))
        moved.append(state(run.G))
    assert bool(differing(*moved)) == depends


@pytest.mark.parametrize("update", ["reuse", "fresh", "simultaneous"])
def test_what_d_learns_does_not_depend_on_gs_step(update, start):
    moved = []
    for lr_g in (1e-9, 0.1):
        run = start(update=update, lr_g=lr_g)
        step_of(run, *inputs_of(run))
        moved.append({name: p.clone() for name, p in run.D.named_parameters()})
    assert not differing(*moved)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_gradient_of_ds_weights_is_computed_for_g(preset, start):
    run, counts = start(preset), {}
    for name, net in (("G", run.G), ("D", run.D)):
        for i, p in enumerate(net.parameters()):
            p.register_hook(lambda _, key=(name, i): counts.update({key: counts.get(key, 0) + 1}))
    step_of(run, *inputs_of(run))
    assert set(counts.values()) == {1}  # each network's weights once a step
    assert len(counts) == sum(1 for net in (run.G, run.D) for _ in net.parameters())


def test_nothing_is_left_of_the_gradients(start):
    run = start()
    step_of(run, *inputs_of(run))
    assert all(p.grad is None for net in (run.G, run.D) for p in net.parameters())


@pytest.mark.parametrize("real_label", [0.9, 1.0])
def test_only_what_d_says_of_real_pictures_is_smoothed(real_label, start):
    run, logits = start(real_label=real_label, update="simultaneous"), []
    run.D.register_forward_hook(lambda _, __, y: logits.append(y.detach().clone()))
    loss_d, loss_g = step_of(run, *inputs_of(run))[:2]
    real, fake = logits[0].sigmoid().chunk(2)
    expected = -(real_label * real.log() + (1 - real_label) * (1 - real).log()).mean() - (1 - fake).log().mean()
    torch.testing.assert_close(loss_d, expected)
    torch.testing.assert_close(loss_g, -fake.log().mean())


def test_noise_falls_to_nothing_and_each_pass_has_its_own(start):
    run = start(noise=0.5, steps=10, batch_size=24)
    assert run.c.noise_steps == 10  # the length at the start, kept when the run is made longer
    stds = []
    for step in range(12):
        _, _, noise = dcgan.draw_inputs(run.c, run.pictures, step, run.device)
        stds.append(float(noise.std()) if torch.is_tensor(noise) else max(noise))
        if step == 0:
            assert noise.shape == (3, 24, 3, 16, 16) and abs(noise.mean()) < 0.01
            assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[1], noise[2])
    assert stds[:10] == pytest.approx([0.5 * (1 - step / 10) for step in range(10)], rel=0.02)
    assert stds[10:] == [0, 0]


def test_noise_reaches_d_and_not_g(start):
    run, seen = start(noise=0.5, steps=10), []
    run.D.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    real, z, noise = inputs_of(run)
    fake = run.G(z[0]).detach()
    step_of(run, real, z, noise)
    torch.testing.assert_close(seen[0], torch.cat([real + noise[0], fake + noise[1]]))
    torch.testing.assert_close(seen[1], fake + noise[2])


# ---------------------------------------------------------------------------------------- the mean of G


def test_the_mean_of_g_is_its_formula(start):
    run = start("classic", ema=0.9)
    assert not differing(state(run.ema), state(run.G))
    for step in range(3):
        before = state(run.ema)
        step_of(run, *inputs_of(run, step), 0.25)
        G, after = state(run.G), state(run.ema)
        for name, old in before.items():
            expected = 0.75 * old + 0.25 * G[name] if old.is_floating_point() else old
            torch.testing.assert_close(after[name], expected)
        assert any("running_var" in name for name in differing(before, after))
    assert differing(state(run.ema), state(run.G))
    assert not any(p.requires_grad for p in run.ema.parameters())


def test_the_mean_forgets_the_start_sooner(tiny, monkeypatch):
    """decay = min(ema, (1 + step) / (10 + step)): in a short run the first weights would linger otherwise."""
    weights, train_step = [], dcgan.train_step
    monkeypatch.setattr(dcgan, "train_step", lambda *a: weights.append(a[-1]) or train_step(*a))
    assert dcgan.train(tiny(ema=0.5, steps=12)) == 0
    assert weights == pytest.approx([1 - min(0.5, (1 + k) / (10 + k)) for k in range(12)])


# ---------------------------------------------------------------------------------------- numbers that go wrong


POISONS = {
    "NaN in one z": lambda real, z: z[0, 1].fill_(float("nan")),
    "infinity in one number of z": lambda real, z: z[0, 2, 3].fill_(float("inf")),
    "NaN in the z of the fresh fakes": lambda real, z: z[1, 0, 0].fill_(float("nan")),
    "NaN in one real picture": lambda real, z: real[1, 0, 5, 5].fill_(float("nan")),
    "infinity in one real picture": lambda real, z: real[2, :, 3].fill_(float("-inf")),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_number_that_is_not_finite_leaves_every_tensor_as_it_was(preset, poison, start):
    run = start(preset, torch.float32, ema=0.9, steps=9)
    assert step_of(run, *inputs_of(run, 0), 0.1)[4:].tolist() == [1, 0]
    before = everything(run)
    assert any("step" in name for name in before) and any(name.startswith("2.") for name in before)
    real, z, noise = inputs_of(run, 1)
    POISONS[poison](real, z)
    assert step_of(run, real, z, noise, 0.1).tolist() == [0, 0, 0, 0, 0, 1]
    assert not differing(before, everything(run))
    found = step_of(run, *inputs_of(run, 2), 0.1)  # and life goes on
    assert found[4:].tolist() == [1, 0] and found.isfinite().all()
    assert differing(before, everything(run))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_very_first_step_may_be_the_bad_one(preset, start):
    run = start(preset, torch.float32, steps=9)
    before = state(run.G, run.D)
    real, z, noise = inputs_of(run)
    real[0, 0, 0, 0] = float("nan")
    assert step_of(run, real, z, noise).tolist() == [0, 0, 0, 0, 0, 1]
    assert not differing(before, state(run.G, run.D))
    assert all(t.isfinite().all() for t in everything(run).values())
    assert not any(t.any() for name, t in everything(run).items() if name.endswith("step"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_gradient_that_overflows_moves_nothing_either(preset, start):
    """All inputs are finite, and so may the losses be: only the gradients are not."""
    run = start(preset, torch.float32, ema=0.9, steps=9)
    step_of(run, *inputs_of(run, 0), 0.1)
    before = everything(run)
    for p in (next(run.G.parameters()), next(run.D.parameters())):
        hook = p.register_hook(lambda g: g + float("inf"))
        assert step_of(run, *inputs_of(run, 1), 0.1)[5] == 1
        hook.remove()
        after = everything(run)
        assert all(t.isfinite().all() for t in after.values())
        moved = {name[0] for name in differing(before, after)}
        if p is next(run.D.parameters()) or run.c.update == "simultaneous":
            assert p is next(run.G.parameters()) or not moved
        assert not moved & {"0", "2", "3"}  # G, its mean and its optimiser
        before = after


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("preset", PRESETS)
def test_bf16_computes_in_bf16_and_keeps_everything_in_fp32(preset, start):
    run = start(preset, torch.float32, precision="bf16", ema=0.9, steps=9)
    other = start(preset, torch.float32, precision="fp32", ema=0.9, steps=9)
    kinds = []
    run.D.blocks[0].register_forward_hook(lambda _, __, y: kinds.append(y.dtype))
    a, b = (step_of(r, *inputs_of(r), 0.1) for r in (run, other))
    assert kinds[0] == torch.bfloat16 and a.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    assert not torch.equal(a, b)
    assert {t.dtype for name, t in everything(run).items()} <= {torch.float32, torch.int64}

"""The room of the presets whose sources are in Keras: three steps of each equal three of the same in Keras.

    pip install -e ".[test,keras]" && python -m pytest tests/test_keras.py

Without TensorFlow it is skipped.  The networks have their full size and all is fp64.  Weights go over by what they
mean: a dense layer's rows from H x W x C to C x H x W, kernels from (k, k, in, out) to PyTorch's order.  What is not
the same is set right here, and all but the last named in the README:

- mnist: `same` padding of a 5x5 layer with stride 2 is 1 before and 2 after, here 2 and 1.  So the two networks are
  each other's mirror image in both directions: all is the same where pictures and kernels are turned by 180 degrees.
- Keras adds Adam's epsilon to sqrt(v), PyTorch to sqrt(v / (1 - beta2^t)).
- Keras' moving variance counts N, PyTorch's N - 1.
- dropout is random, and 0 here; where it stands is held by test_step.py and test_models.py.
- TensorFlow rounds betas and slopes to fp32, in fp64 too: here they are such that fp32 holds them.
"""

import math
import os

import numpy as np
import pytest
import torch

import dcgan

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="holds two presets against Keras: pip install tensorflow")
L = tf.keras.layers
N = 6  # pictures a step
BETAS = 1 - 2**-3, 1 - 2**-10

# of each learnt layer of G, of D: None, or (H, W, C) of what its units or inputs are as a picture
FOLDED = {"keras": ([(8, 8, 128)] + [None] * 4, [None] * 3 + [(8, 8, 128)]),
          "mnist": ([(7, 7, 256)] + [None] * 3, [None] * 2 + [(7, 7, 128)])}  # fmt: skip


@pytest.fixture(autouse=True)
def double():
    before = tf.keras.config.floatx()
    tf.keras.config.set_floatx("float64")
    yield
    tf.keras.config.set_floatx(before)


def networks_of_keras(preset):
    """G and D as the source writes them, but for D's dropout."""
    if preset == "keras":
        up = [layer for n in (128, 256, 512) for layer in (L.Conv2DTranspose(n, 4, 2, "same"), L.LeakyReLU(0.2))]
        down = [layer for n in (64, 128, 128) for layer in (L.Conv2D(n, 4, 2, "same"), L.LeakyReLU(0.2))]
        G = [L.Input((128,)), L.Dense(8 * 8 * 128), L.Reshape((8, 8, 128)), *up]
        D = [L.Input((64, 64, 3)), *down, L.Flatten(), L.Dense(1)]
        G += [L.Conv2D(3, 5, padding="same", activation="sigmoid")]
    else:
        G = [L.Input((100,)), L.Dense(7 * 7 * 256, use_bias=False), L.BatchNormalization(), L.LeakyReLU()]
        G += [L.Reshape((7, 7, 256))]
        for n, stride in ((128, 1), (64, 2)):
            G += [L.Conv2DTranspose(n, 5, stride, "same", use_bias=False), L.BatchNormalization(), L.LeakyReLU()]
        G += [L.Conv2DTranspose(1, 5, 2, "same", use_bias=False, activation="tanh")]
        D = [L.Input((28, 28, 1))]
        for n in (64, 128):
            D += [L.Conv2D(n, 5, 2, "same"), L.LeakyReLU()]
        D += [L.Flatten(), L.Dense(1)]
    return tf.keras.Sequential(G), tf.keras.Sequential(D)


def folded(t, shape, turned):
    """(H * W * C, ...) -> (C * H * W, ...)."""
    t = t.reshape(*shape, -1)
    t = t.flip(0, 1) if turned else t
    return t.permute(2, 0, 1, 3).reshape(math.prod(shape), -1)


def parameters_of_keras(net, shapes, turned):
    """-> {what PyTorch calls it: the tensor}, as blocks of dcgan.py have them: `0.layer.weight`, `0.bn.bias` ..."""
    found, block = {}, -1

    def vector(t):
        """A bias, or a number a unit of BatchNorm: of the units of a dense layer, or of channels."""
        return folded(t, shapes[block], turned).view(-1) if len(t) == math.prod(shapes[block] or [0]) else t

    for layer in net.layers:
        weights = {w.name: torch.from_numpy(w.numpy().copy()) for w in layer.weights}
        if "kernel" in weights:
            block += 1
            kernel, shape = weights["kernel"], shapes[block]
            if kernel.dim() == 4:  # (k, k, in, out), transposed: (k, k, out, in); both become the other way round
                kernel = (kernel.flip(0, 1) if turned else kernel).permute(3, 2, 0, 1)
            elif kernel.shape[1] == 1:  # ends D: its inputs are a picture
                kernel = folded(kernel, shape, turned).T
            else:
                kernel = folded(kernel.T, shape, turned)
            found[f"{block}.layer.weight"] = kernel
            if "bias" in weights:
                found[f"{block}.layer.bias"] = vector(weights["bias"])
        elif "gamma" in weights:
            names = dict(gamma="weight", beta="bias", moving_mean="running_mean", moving_variance="running_var")
            for theirs, ours in names.items():
                found[f"{block}.bn.{ours}"] = vector(weights[theirs])
    return found


def pictures_of_keras(x, turned):
    """(N, C, H, W) -> (N, H, W, C), as Keras has it."""
    return (x.flip(2, 3) if turned else x).permute(0, 2, 3, 1).numpy()


def step_of_keras(preset, G, D, opt_g, opt_d, real, z):
    """-> D's loss, G's loss, as the sources play the game."""
    bce = tf.keras.losses.BinaryCrossentropy(from_logits=True)
    if preset == "mnist":  # both losses first, then both updates
        with tf.GradientTape() as tape_g, tf.GradientTape() as tape_d:
            fake = G(z[0], training=True)
            on_real, on_fake = D(real, training=True), D(fake, training=True)
            loss_g = bce(tf.ones_like(on_fake), on_fake)
            loss_d = bce(tf.ones_like(on_real), on_real) + bce(tf.zeros_like(on_fake), on_fake)
        of_g = tape_g.gradient(loss_g, G.trainable_variables)
        of_d = tape_d.gradient(loss_d, D.trainable_variables)
        opt_g.apply_gradients(zip(of_g, G.trainable_variables, strict=True))
        opt_d.apply_gradients(zip(of_d, D.trainable_variables, strict=True))
        return float(loss_d), float(loss_g)
    both = tf.concat([G(z[0], training=True), real], 0)  # one batch: the mean of both halves
    with tf.GradientTape() as tape:
        loss_d = bce(np.concatenate([np.zeros((N, 1)), np.ones((N, 1))]), D(both, training=True))
    opt_d.apply_gradients(zip(tape.gradient(loss_d, D.trainable_variables), D.trainable_variables, strict=True))
    with tf.GradientTape() as tape:
        loss_g = bce(np.ones((N, 1)), D(G(z[1], training=True), training=True))
    opt_g.apply_gradients(zip(tape.gradient(loss_g, G.trainable_variables), G.trainable_variables, strict=True))
    return float(loss_d), float(loss_g)


@pytest.mark.parametrize("preset", ["keras", "mnist"])
def test_three_steps_equal_three_of_keras(preset, tiny):
    torch.manual_seed(0)
    tf.keras.utils.set_random_seed(0)
    full = {name: getattr(dcgan.config(preset), name) for name in ("image_size", "nz", "ngf", "ndf", "nc")}
    slope = float(np.float32(dcgan.config(preset).slope))
    exact = dict(slope=slope, beta1=BETAS[0], beta2=BETAS[1])
    run = dcgan.set_up(tiny(preset, **full, **exact, batch_size=N, dropout=0.0))
    ours, theirs = (run.G.double(), run.D.double()), networks_of_keras(preset)
    optimizers = [tf.keras.optimizers.Adam(1e-4, *BETAS) for _ in ours]
    turned = preset == "mnist"
    for net, other, shapes in zip(ours, theirs, FOLDED[preset], strict=True):
        assert sum(p.numel() for p in net.parameters()) == sum(math.prod(w.shape) for w in other.trainable_weights)
        weights = parameters_of_keras(other, shapes, turned)
        assert {f"blocks.{name}" for name in weights} == {n for n in net.state_dict() if "num_batches" not in n}
        for name, t in weights.items():
            net.state_dict()[f"blocks.{name}"].copy_(t)

    for t in range(1, 4):
        real = torch.rand(N, full["nc"], full["image_size"], full["image_size"], dtype=torch.float64)
        z = torch.randn(2, N, full["nz"], dtype=torch.float64)
        noise = torch.zeros(3, 1, 1, 1, 1, dtype=torch.float64)
        found = dcgan.train_step(run.c, *ours, None, run.opt_g, run.opt_d, real, z, noise)
        for optimizer in optimizers:
            optimizer.epsilon = 1e-7 * math.sqrt(1 - BETAS[1] ** t)
        expected = step_of_keras(preset, *theirs, *optimizers, pictures_of_keras(real, turned), z.numpy())
        torch.testing.assert_close(found[:2], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
        for net, other, shapes in zip(ours, theirs, FOLDED[preset], strict=True):
            for name, right in parameters_of_keras(other, shapes, turned).items():
                if "running_var" in name:  # how far it has moved from 1
                    n = N * {"0": 1, "1": 49, "2": 196}[name[0]]
                    right = 0.99**t + (right - 0.99**t) * n / (n - 1)
                mine = net.state_dict()[f"blocks.{name}"]  # a step of Adam is up to 1e-4 long
                torch.testing.assert_close(mine, right, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")

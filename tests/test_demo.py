"""The demo is worth looking at: benchmarks/demo.py tells drawn faces from blobs and from one face repeated."""

import runpy
from pathlib import Path

import pytest
import torch

import dcgan

DEMO = runpy.run_path(str(Path(__file__).resolve().parents[1] / "benchmarks" / "demo.py"))


@pytest.fixture(scope="module")
def faces():
    return torch.stack([dcgan.T.pil_to_tensor(dcgan.draw_face(i, 32)) for i in range(512)])


def passes(x, drawn):
    return min(DEMO["shares"](x, drawn).values()) >= DEMO["ENOUGH"]


def test_other_drawn_faces_pass(faces):
    assert passes(faces[256:], faces[:256])


def test_an_untrained_generator_fails(faces):
    c = dcgan.config("demo")
    assert not passes(dcgan.draw(dcgan.Generator(c), dcgan.latent(range(256), c.nz), "cpu"), faces[:256])


def test_a_collapsed_generator_fails(faces):
    assert not passes(faces[:1].expand(256, -1, -1, -1), faces[256:])
    assert not passes(faces[:16].repeat(16, 1, 1, 1), faces[256:])  # sixteen faces, over and over


def test_noise_and_blobs_fail(faces):
    noise = torch.randint(0, 256, (256, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    assert not passes(noise.to(torch.uint8), faces[:256])
    blurred = dcgan.T.gaussian_blur(faces[:256], [15, 15], [5.0, 5.0])
    assert not passes(blurred, faces[256:])


@pytest.mark.slow
def test_the_whole_demo_passes_within_five_minutes(tmp_path):
    assert dcgan.main(["--run", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--time-limit", "5m"]) == 0
    assert dcgan.load(tmp_path / "run" / "checkpoint.pt")["step"] == dcgan.config("demo").steps
    assert DEMO["main"](tmp_path / "run") == 0

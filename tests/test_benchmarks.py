"""The benchmarks run, their reference is the recipe it claims to be, and trying them out leaves no trace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

import augmentation  # noqa: E402 - after the path to it
import step as steps  # noqa: E402
from common import dcgan, table  # noqa: E402


def written():
    return {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}


@pytest.mark.parametrize("script", ["step.py", "data.py", "generate.py"])
def test_a_quick_run_works_and_writes_nothing(script, tmp_path):
    before = written()
    command = [sys.executable, ROOT / "benchmarks" / script, "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout or "ImageFolder" in done.stdout
    assert written() == before and list(tmp_path.iterdir()) == []


def networks_of_both():
    """The reference's networks and dcgan.py's `classic`, with the same weights."""
    torch.manual_seed(0)
    theirs = steps.reference_networks(width=8)
    c = dcgan.config("classic", ngf=8, ndf=8, precision="fp32", optimizer="adam", weight_decay=0.0)
    ours = dcgan.Generator(c), dcgan.Discriminator(c)
    for a, b in zip(theirs, ours, strict=True):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            y.data.copy_(x)
    return c, theirs, ours


def test_the_reference_trains_the_networks_of_classic():
    c, (G, D), (our_G, our_D) = networks_of_both()
    z = torch.randn(4, c.nz)
    fake = G(z[:, :, None, None])
    torch.testing.assert_close(fake, our_G(z))
    torch.testing.assert_close(D(fake).flatten(), our_D(fake).sigmoid())


def numbers_of_reference(levers):
    _, (G, D), _ = networks_of_both()
    Adam = torch.optim.Adam
    opt_g, opt_d = Adam(G.parameters(), 2e-4, betas=(0.5, 0.999)), Adam(D.parameters(), 2e-4, betas=(0.5, 0.999))
    torch.manual_seed(1)
    real = torch.rand(4, 3, 64, 64) * 2 - 1
    torch.manual_seed(2)
    numbers = steps.reference_step(G, D, opt_g, opt_d, real, levers)
    return numbers, real, [p.detach() for net in (G, D) for p in net.parameters()]


def test_a_step_of_dcgan_is_a_step_of_the_reference():
    numbers, real, weights = numbers_of_reference(())
    c, _, (G, D) = networks_of_both()
    hyper = dict(betas=(0.5, 0.999), fused=True)
    opt_g, opt_d = torch.optim.Adam(G.parameters(), 2e-4, **hyper), torch.optim.Adam(D.parameters(), 2e-4, **hyper)
    torch.manual_seed(2)
    z = torch.randn(4, c.nz, 1, 1).view(1, 4, c.nz).expand(2, 4, c.nz)
    got = dcgan.train_step(c, G, D, None, opt_g, opt_d, real, z, [torch.zeros(())] * 3)
    torch.testing.assert_close(got[:2], torch.tensor(numbers[:2]), atol=1e-4, rtol=1e-4)
    for a, b in zip(weights, [*G.parameters(), *D.parameters()], strict=True):
        assert (a - b).abs().mean() < 2e-6  # Adam's first step is 2e-4 whatever the gradient


@pytest.mark.parametrize("lever", ["one pass", "D frozen for G"])
def test_a_lever_changes_the_time_and_not_the_numbers(lever):
    (plain, _, weights), (numbers, _, others) = numbers_of_reference(()), numbers_of_reference((lever,))
    torch.testing.assert_close(torch.tensor(numbers), torch.tensor(plain), atol=1e-4, rtol=1e-4)
    assert max((a - b).abs().mean() for a, b in zip(weights, others, strict=True)) < 2e-6


def test_the_chart_takes_the_figures_of_the_step(tmp_path):
    chart = pytest.importorskip("chart", reason="the chart needs matplotlib", exc_type=ImportError)
    row = {"name": "reference", "precision": "fp32", "allocator": "default", "preset": "reference"}
    rows = [{**row, "img/s": 100.0, "ratio": 1.0}, {**row, "preset": "classic", "img/s": 200.0, "ratio": 2.0}]
    chart.draw(
        json.loads(json.dumps({"device": "a CPU", "cores": 2, "groups": {"all": {"rows": rows}}})),
        tmp_path / "step.png",
    )
    assert (tmp_path / "step.png").stat().st_size > 5000


def test_a_table_has_a_cell_for_every_column_and_none_for_nothing():
    rows = [{"a": 1, "b": None}, {"a": 2, "b": 3}]
    lines = table(rows, {"first": "a", "twice": lambda row: 2 * row["a"], "second": "b"})
    assert lines == ["| first | twice | second |", "|---|---|---|", "| 1 | 2 |  |", "| 2 | 4 | 3 |"]


def test_augmentation_leaves_all_or_nothing_as_it_was():
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(augmentation.augment(x, torch.tensor(0.0)), x, atol=1e-5, rtol=0)
    y = augmentation.augment(x, torch.tensor(1.0))
    assert y.shape == x.shape and y.isfinite().all() and (y - x).abs().mean((1, 2, 3)).min() > 0.01


def test_the_more_often_d_knows_a_real_picture_the_more_is_augmented():
    D = augmentation.Augmented(dcgan.config("best", image_size=16, ndf=4))
    both = torch.randn(8, 3, 16, 16)
    for sure, moves in (1.0, 4 / augmentation.SPEED), (0.0, -4 / augmentation.SPEED):
        D.p.fill_(0.3), D.sure.fill_(sure)
        D(both, groups=2)
        assert D.p.item() == pytest.approx(0.3 + moves, abs=1e-7)
    p = D.p.clone()
    D(both), D.eval()(both, groups=2)  # G's turn; no training
    assert torch.equal(D.p, p)


def test_a_run_with_augmentation_goes_on_as_if_it_had_never_stopped(faces, cache, tmp_path, monkeypatch):
    for name in ("draw_inputs", "Discriminator"):
        monkeypatch.setattr(dcgan, name, getattr(dcgan, name))  # put back afterwards
    monkeypatch.setattr(augmentation, "TARGET", -1.0)  # p rises with each step, to 0.5 in the end
    monkeypatch.setattr(augmentation, "SPEED", 64)
    words = "--preset best --image-size 16 --nz 8 --ngf 4 --ndf 4 --samples 4 --workers 0 --device cpu --precision fp32"
    for name, steps_in_all in ("a", "4"), ("b", "2"):
        more = ["--data", str(faces), "--cache", str(cache), "--run", str(tmp_path / name), "--steps", steps_in_all]
        assert augmentation.main([*words.split(), *more]) == 0
    assert augmentation.main(["--run", str(tmp_path / "b"), "--resume", "--steps", "4"]) == 0
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab")
    assert a["D"]["p"] == 0.5 and a["step"] == b["step"] == 4
    assert all(torch.equal(a["D"][name], b["D"][name]) for name in a["D"])

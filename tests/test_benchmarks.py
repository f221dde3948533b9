"""The benchmarks run, their reference is the recipe it claims to be, and trying them out leaves no trace."""

import dataclasses
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

import data  # noqa: E402 - after the path to it
import jpeg  # noqa: E402
import ops as kernels  # noqa: E402
import step as steps  # noqa: E402
from common import dcgan, table  # noqa: E402


def written():
    return {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}


def ratios(printed, unit):
    """-> [(the ratio of a row's table, the same from the figures beside it)]; the first row is what all are against."""
    lines = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if line.startswith("| ")]
    head = next(line for line in lines if unit in line)
    rows = [dict(zip(head, line, strict=True)) for line in lines if len(line) == len(head) and line != head]
    against = next(name for name in head if name.startswith("x "))
    return [(float(row[against]), float(rows[0][unit]) / float(row[unit])) for row in rows]


def test_no_script_hides_a_module_of_python():
    """A script's folder comes first on the path.  Python 3.14 has a package `compression`, which gzip imports."""
    scripts = {path.stem for folder in ("", "benchmarks", "tests") for path in (ROOT / folder).glob("*.py")}
    assert "jpeg" in scripts and not scripts & (sys.stdlib_module_names | {"compression", "annotationlib"})


@pytest.mark.parametrize("script", ["step.py", "data.py", "generate.py"])
def test_a_quick_run_works_and_writes_nothing(script, tmp_path):
    before = written()
    command = [sys.executable, ROOT / "benchmarks" / script, "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout or "ImageFolder" in done.stdout
    assert written() == before and list(tmp_path.iterdir()) == []
    if script == "data.py":  # a rate, of which more is better; two rounds, whose ratios it takes the median of
        per_round = {}
        for name, rate in re.findall(r"round \d: (.*): ([\d,]+) a CPU second", done.stdout):
            per_round.setdefault(name, []).append(float(rate.replace(",", "")))
        first = next(iter(per_round.values()))
        expected = [statistics.median(a / b for a, b in zip(x, first, strict=True)) for x in per_round.values()]
        pairs = zip((ratio for ratio, _ in ratios(done.stdout, "pictures a CPU second")), expected, strict=True)
    else:  # milliseconds, of which fewer are better; one round
        pairs = ratios(done.stdout, "ms a step" if script == "step.py" else "ms")
    for ratio, expected in pairs:
        assert ratio == pytest.approx(expected, rel=0.03, abs=0.006)  # by figures that are rounded


def test_too_few_pictures_to_measure_are_one_line(tmp_path):
    dcgan.draw_face(0, 32).save(tmp_path / "1.jpg")
    command = [sys.executable, ROOT / "benchmarks" / "data.py", "--data", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 2 and "has fewer than 128 .jpg or .jpeg files" in done.stderr.splitlines()[-1]


def test_pictures_of_one_name_in_two_folders_are_two(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "faces" / folder).mkdir(parents=True)
        dcgan.draw_face(ord(folder), 32).save(tmp_path / "faces" / folder / "1.jpg")
    (tmp_path / "many").mkdir()
    many = data.repeated(tmp_path / "faces", tmp_path / "many", 3)
    assert len(list(many.iterdir())) == 6


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


def test_what_the_ops_are_worth_in_a_step_stands_under_their_own_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "ROOT", tmp_path)
    assert kernels.in_the_step("cpu") == ["not measured: python benchmarks/step.py"]
    row = {"name": "dcgan.py", "precision": "bf16", "allocator": "kept", "batch": 4, "ms": 6, "round ms": [6, 8, 5]}
    fused = {**row, "name": "dcgan.py + fused", "ms": 4, "round ms": [4, 4, 5]}
    others = [{**row, "precision": "fp32"}, {**fused, "allocator": "default"}]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    groups = {"all": {"about": {"commit": "abc"}, "rows": [row, *others, fused]}}
    (tmp_path / "benchmarks" / "results" / "step_cpu.json").write_text(json.dumps({"groups": groups}))
    assert kernels.in_the_step("cpu")[2:] == ["| dcgan.py | bf16 | 4 | 6 | 4 | 1.50x | abc |"]


def test_a_table_has_a_cell_for_every_column_and_none_for_nothing():
    rows = [{"a": 1, "b": None}, {"a": 2, "b": 3}]
    lines = table(rows, {"first": "a", "twice": lambda row: 2 * row["a"], "second": "b"})
    assert lines == ["| first | twice | second |", "|---|---|---|", "| 1 | 2 |  |", "| 2 | 4 | 3 |"]


# ---------------------------------------------------------------------------------------- what JPEG leaves


class Left(torch.nn.Module):
    """In place of D: the mean of the left half of what it sees."""

    def __init__(self, c):
        super().__init__()
        self.config = c

    def forward(self, x):
        return x[..., : x.shape[-1] // 2].mean((1, 2, 3))


@pytest.mark.parametrize("preset", ["best", "keras", "mnist"])
def test_jpeg_costs_a_picture_little_and_more_at_low_quality(preset, tiny):
    x = dcgan.load_pictures(tiny(preset))[:4]
    fine, coarse = (jpeg.after_jpeg(x, quality) for quality in (95, 5))
    assert fine.shape == coarse.shape == x.shape and fine.dtype == torch.uint8
    off = [(y.float() - x.float()).abs().mean().item() for y in (fine, coarse)]
    assert 0 < off[0] < 4 and off[1] > 2 * off[0]


def test_d_sees_the_same_pictures_before_and_after_jpeg_under_the_runs_noise(tiny):
    c = tiny("best", noise=0.5, noise_steps=-1)
    G, originals = dcgan.Generator(c).eval(), dcgan.load_pictures(c)
    found = jpeg.logits(Left(c), G, originals, 5, 10, 95)
    assert [len(x) for x in found.values()] == [12] * 4  # whole mini-batches of 4
    real, compressed, fakes, _ = found.values()
    assert (compressed - real).abs().max() < 0.03
    straight = dataclasses.replace(c, flips=False)
    real, z, noise = dcgan.draw_inputs(straight, originals, 5, torch.device("cpu"))
    torch.testing.assert_close(found["pictures scaled to this size"][:4], Left(c)(real + noise[0]))
    fake = dcgan.to_range(dcgan.draw(G, z[0], "cpu", chunk=4), c)
    torch.testing.assert_close(fakes[:4], Left(c)(fake + noise[0]))


def test_a_run_is_asked_what_it_makes_of_jpeg(tiny, faces, cache, capsys):
    run = Path(tiny("best").run)
    small = dict(
        image_size=16, nz=8, ngf=4, ndf=4, batch_size=4, steps=2, device="cpu", data=faces, cache=cache, run=run
    )
    words = [str(word) for name, value in small.items() for word in ("--" + name.replace("_", "-"), value)]
    assert dcgan.main(["--preset", "best", *words]) == 0
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    saved["D"]["p"].fill_(0.7)
    torch.save(saved, run / "checkpoint.pt")
    D, step = jpeg.load_discriminator(run)
    assert D.training and D.p == 0 and step == 2
    before = sorted(run.rglob("*"))
    capsys.readouterr()
    jpeg.main([str(run), "--data", str(faces), "--pictures", "8", "--cache", str(cache)])
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("|")]
    assert len(rows) == 6 and all(word in said for word in ("| fakes after JPEG |", "taken for real", "JPEG is"))
    assert sorted(run.rglob("*")) == before


def test_the_share_of_jpeg_is_a_share_of_what_d_sees_between_pictures_and_fakes(tiny, capsys, monkeypatch):
    c = tiny("best")
    levels = {"pictures": 2.0, "the same after JPEG": 3.0, "fakes": -1.0, "fakes after JPEG": 0.0}
    found = {row: torch.tensor([level - 1, level + 1]) for row, level in levels.items()}
    monkeypatch.setattr(jpeg, "logits", lambda *_: found)
    monkeypatch.setattr(jpeg, "load_discriminator", lambda _: (dcgan.Discriminator(c), 0))
    monkeypatch.setattr(jpeg.dcgan, "load_generator", lambda _: None)
    jpeg.main([c.run, "--data", c.data, "--cache", c.cache])
    said = capsys.readouterr().out
    assert "fakes, JPEG is 25%." in said  # 3 - 2 of 3 - -1
    assert "| the same after JPEG | 0.93 | 3.00 | 1.00 |" in said and "| fakes | 0.31 | -1.00 | 0.00 |" in said

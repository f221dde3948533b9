"""The command line's room: what it takes, what it writes where, and what it says when it cannot."""

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import signal
import struct
import sys
import threading
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PRESETS, as_options, in_child, make_pictures
from PIL import Image, ImageSequence
from torchvision.transforms.v2 import functional as T

import dcgan

SMALL = "--image-size 16 --nz 8 --ngf 4 --ndf 4 --batch-size 8 --samples 5 --device cpu --precision fp32 --workers 0"


@pytest.fixture(scope="session")
def trained(tmp_path_factory, faces, cache):
    """A run of 14 steps, four and two thirds epochs, with an EMA -> its folder, what it printed, its exit code."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = [*SMALL.split(), "--data", faces, "--cache", cache, "--run", folder, "--ema", "0.5", "--lr", "0.01"]
    words += [
        "--preset",
        "classic",
        "--steps",
        14,
        "--report-every",
        2,
        "--sample-every",
        4,
        "--save-every",
        5,
        "--keep",
        2,
        "--noise",
        0.1,
    ]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = dcgan.main([str(word) for word in words])
    return types.SimpleNamespace(folder=folder, out=out.getvalue(), err=err.getvalue(), code=code)


@pytest.fixture
def small(faces, cache, tmp_path):
    """-> the words of a small run in tmp_path/run, and more."""
    words = [*SMALL.split(), "--data", faces, "--cache", cache, "--run", tmp_path / "run"]
    return lambda *more: [*words, *more]


def pixels(path):
    return T.pil_to_tensor(Image.open(path).convert("RGB"))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def frames_of(path):
    return [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(path))]


# ---------------------------------------------------------------------------------------- options


def test_the_classic_spellings_work():
    words = "--dataroot d --batchSize 8 --imageSize 32 --niter 3 --lr 0.1 --outf o --manualSeed 7 --beta1 0.4 --nz 9"
    expected = dict(
        data="d", batch_size=8, image_size=32, epochs=3, lr_g=0.1, lr_d=0.1, run="o", seed=7, beta1=0.4, nz=9
    )
    assert dcgan.read_options(words.split()) == expected


def test_lr_sets_both_rates_and_a_rate_of_its_own_stands_above_it():
    assert dcgan.read_options(["--lr-d", "4e-4", "--lr", "1e-4"]) == {"lr_g": 1e-4, "lr_d": 4e-4}


def test_what_is_not_given_is_not_set():
    assert dcgan.read_options([]) == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_field_of_config_is_an_option(preset):
    c = dcgan.config(preset, data="some data", seed=3, resume=True, ema=0.25)
    given = dcgan.read_options(as_options(c))
    assert given == dataclasses.asdict(c)
    assert dcgan.config(**given) == c


def test_every_switch_can_be_set_both_ways():
    for name, field in dcgan.FIELDS.items():
        if field.type is bool:
            word = name.replace("_", "-")
            assert dcgan.read_options([f"--{word}"]) == {name: True}
            assert dcgan.read_options([f"--no-{word}"]) == {name: False}


@pytest.mark.parametrize("columns", ["80", "200"])
def test_help_is_a_screen_and_a_half_and_tells_all(columns, run_main, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    done = run_main("--help")
    lines = done.out.splitlines()
    assert done.code == 0 and done.err == "" and len(lines) <= 76
    for name, field in dcgan.FIELDS.items():
        assert f"--{name.replace('_', '-')}" in done.out
        assert field.metadata["help"] and " ".join(field.metadata["help"].split()) in " ".join(done.out.split())
    about = " ".join(done.out.split("Presets:")[1].split())
    assert all(f"{preset}, " in about for preset in PRESETS)
    assert all(word in done.out for word in ("generate", "interpolate", "info"))


def test_values_stand_above_the_preset_and_the_preset_above_the_defaults():
    c = dcgan.config("mnist", lr_g=0.5)
    assert (c.lr_g, c.lr_d, c.beta2, c.nc) == (0.5, 1e-4, 0.999, 1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(colour=3), "colour.*nz"),
        (dict(nc=2), "nc.*2.*1, 3"),
        (dict(preset="nope"), "nope.*classic"),
        (dict(nz="64"), "nz.*'64'.*int"),
        (dict(flips=1), "flips.*bool"),
        (dict(nz=0), "nz.*0"),
        (dict(dropout=float("nan")), "dropout.*nan"),
    ],
)
def test_a_config_that_cannot_be_is_refused_from_python_too(wrong, said):
    with pytest.raises(dcgan.UserError, match=said):
        dcgan.config(**wrong)
    assert dcgan.config(lr_g=1).lr_g == 1  # a whole number is a fine rate


def test_none_of_what_there_must_be_one_of_is_refused():
    for name in ["nz", "ngf", "ndf", "batch_size", "epochs", "samples", "sample_every", "report_every", "keep"]:
        with pytest.raises(dcgan.UserError, match=f"{name} is 0"):
            dcgan.config(**{name: 0})


@pytest.mark.parametrize("name", ["ema", "beta1", "beta2"])
def test_a_mean_that_would_never_move_is_refused(name):
    assert dcgan.config(**{name: 0.99999})
    with pytest.raises(dcgan.UserError, match=name):
        dcgan.config(**{name: 1})


def test_true_is_no_number_and_a_seed_may_be_negative():
    with pytest.raises(dcgan.UserError, match="nz is True"):
        dcgan.config(nz=True)
    assert dcgan.config(seed=-5).seed == -5


@pytest.fixture
def chosen(monkeypatch):
    """-> what main would have trained: a list of Configs."""
    configs = []
    monkeypatch.setattr(dcgan, "train", lambda c: configs.append(c) or 0)
    return configs


@pytest.mark.parametrize("word", [[], ["train"]])
def test_the_preset_follows_from_the_data(word, chosen, run_main, faces, tmp_path):
    (tmp_path / "mnist_dir" / "MNIST" / "raw").mkdir(parents=True)
    idx = tmp_path / "mnist_dir" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    idx.write_bytes(struct.pack(">IIII", 0x803, 1, 28, 28) + bytes(784))
    run_main(*word)
    run_main(*word, "--data", faces)
    run_main(*word, "--data", tmp_path / "mnist_dir")
    run_main(*word, "--data", idx)
    run_main(*word, "--data", tmp_path / "mnist_dir", "--preset", "keras")
    assert [c.preset for c in chosen] == ["demo", "best", "mnist", "mnist", "keras"]
    assert chosen[0].data == ""


# ---------------------------------------------------------------------------------------- a run and its folder


def test_a_run_ends_well_and_says_what_it_resolved(trained):
    assert trained.code == 0 and trained.err == ""  # the bar stays away from what is no terminal
    for words in (
        rf"run +{trained.folder}, preset classic",
        r"cpu, fp32, plain PyTorch, torch \d",
        r"pictures +24 of .*faces",
        r"Generator +output +parameters",
        r"Discriminator +output +parameters",
        r"in all +1,752",
        r"done at step 14 of 14",
        rf"dcgan.py generate {trained.folder}",
    ):
        assert re.search(words, trained.out), words
    assert "\r" not in trained.out and "\x1b" not in trained.out


def test_each_epoch_has_its_line(trained):
    found = re.findall(r"^Epoch \[(\d)/(\d)\] \| D Loss: (\d+\.\d{4}) \| G Loss: (\d+\.\d{4})$", trained.out, re.M)
    assert [(k, n) for k, n, _, _ in found] == [(str(k), "4") for k in (1, 2, 3, 4)]  # and 2 steps of a fifth
    assert trained.out.count("Epoch [") == 4


@pytest.mark.parametrize(("batch", "lines"), [(7, ["1/2", "2/2"]), (64, ["2/2"])])
def test_as_many_epochs_are_announced_as_there_are(batch, lines, small, run_main):
    """24 pictures: the last batch of 7 reaches into an epoch that is not trained; one of 64 holds two epochs."""
    done = run_main(*small("--epochs", 2, "--batch-size", batch))
    assert re.findall(r"^Epoch \[(\d/\d)\]", done.out, re.M) == lines


def test_an_epochs_line_holds_the_means_of_its_steps(tmp_path, small, run_main):
    done = run_main(*small("--epochs", 2, "--report-every", 1))
    rows = log_of(tmp_path / "run")
    found = re.findall(r"D Loss: (\S+) \| G Loss: (\S+)", done.out)
    assert len(rows) == 6 and len(found) == 2
    for (loss_d, loss_g), part in zip(found, (rows[:3], rows[3:]), strict=True):
        assert float(loss_d) == pytest.approx(sum(row["loss_d"] for row in part) / 3, abs=1e-4)
        assert float(loss_g) == pytest.approx(sum(row["loss_g"] for row in part) / 3, abs=1e-4)


def test_a_runs_folder_is_laid_out_as_promised(trained):
    files = sorted(str(p.relative_to(trained.folder)) for p in trained.folder.rglob("*") if p.is_file())
    steps = [1, 2, 4, 8, 12, 14]  # often at first, then every --sample-every, and the last
    expected = ["checkpoint.pt", "config.json", "generator.pt", "log.jsonl", "losses.png", "samples.gif"]
    expected += [f"samples/step_{step:06d}.png" for step in steps] + ["samples/real.png"]
    expected += [f"snapshots/generator_{step:06d}.pt" for step in (9, 12)]  # of 3, 6, 9, 12: --keep 2
    drawn = ("generated", "interpolation")  # other tests draw beside them
    assert [f for f in files if f != ".lock" and not f.startswith(drawn)] == sorted(expected)


def test_the_log_has_a_line_a_report(trained):
    rows = log_of(trained.folder)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 14]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 2, 3, 4, 4]
    for row in rows:
        assert list(row) == ["step", "epoch", "loss_d", "loss_g", "d_x", "d_gz", "img_s"]
        assert 0 < row["d_x"] < 1 and 0 < row["d_gz"] < 1 and row["img_s"] > 0
        assert 0 < row["loss_d"] < 20 and 0 < row["loss_g"] < 20


def test_config_json_is_the_config(trained):
    words = json.loads((trained.folder / "config.json").read_text())
    assert set(words) == set(dcgan.FIELDS)
    c = dcgan.config(**words)
    assert (c.preset, c.ema, c.lr_g, c.lr_d, c.run) == ("classic", 0.5, 0.01, 0.01, str(trained.folder))


def test_every_picture_opens_and_samples_have_the_layout_of_the_real_ones(trained):
    real = Image.open(trained.folder / "samples" / "real.png")
    assert real.size == (3 * 18 + 2, 2 * 18 + 2)  # five pictures of 16 x 16, two pixels around each
    grids = sorted((trained.folder / "samples").glob("step_*.png"))
    for path in grids:
        assert pixels(path).shape[1:] == (real.height, real.width)
    assert not torch.equal(pixels(grids[0]), pixels(grids[-1]))
    assert pixels(trained.folder / "losses.png").float().std() > 5  # something is drawn
    frames = frames_of(trained.folder / "samples.gif")
    assert len(frames) == len(grids) and frames[0].size == real.size
    last = pixels(grids[-1]).int() - T.pil_to_tensor(frames[-1]).int()
    assert last.abs().float().mean() < 8  # of a GIF's few colours


def test_the_real_pictures_beside_the_samples_are_the_streams_first(trained, faces):
    c = dcgan.config(**json.loads((trained.folder / "config.json").read_text()))
    with contextlib.redirect_stdout(io.StringIO()):
        pictures = dcgan.load_pictures(c)
    first = pictures[dcgan.batch_indices(24, c.seed, 0, 5)]
    assert torch.equal(pixels(trained.folder / "samples" / "real.png"), T.pil_to_tensor(dcgan.grid(first)))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_from_the_command_line(preset, small, run_main, tmp_path):
    size = ["--image-size", 14] if preset == "mnist" else []
    done = run_main(*small("--preset", preset, "--steps", 3, *size))
    assert done.code == 0 and done.err == "", done.err
    G = dcgan.load_generator(tmp_path / "run")
    assert not G.training and G.config.preset == preset
    grid = Image.open(tmp_path / "run" / "samples" / "step_000003.png")
    assert grid.size == Image.open(tmp_path / "run" / "samples" / "real.png").size
    generated = run_main("generate", tmp_path / "run", "--seeds", "0-3", "--device", "cpu")
    assert generated.code == 0 and Image.open(tmp_path / "run" / "generated.png").size[0] > 2 * G.config.image_size


def test_what_a_run_says_at_its_end_can_be_typed(small, run_main, tmp_path):
    run = tmp_path / "my faces"
    done = run_main(*small("--run", run, "--steps", 1))
    assert done.code == 0 and done.out.count(f' "{run}" ') == 2  # draw more, go on


def test_a_run_has_a_name_by_itself(small, run_main, faces, cache, few_drawn):
    words = ["--steps", "1", *small()[:-2]]  # all but --run
    assert run_main(*words).code == 0
    assert Path("runs/best-faces/generator.pt").exists()
    words[words.index("--data") + 1] = ""
    assert run_main(*words).code == 0
    assert Path("runs/demo-drawn/generator.pt").exists()


def test_epochs_that_are_asked_for_stand_above_the_steps_of_a_preset(small, run_main):
    """demo's length is a number of steps."""
    assert dcgan.config("demo").steps and dcgan.config("demo", epochs=3).steps == 0
    assert "done at step 3 of 3" in run_main(*small("--epochs", 1, "--batch-size", 8)).out


def test_steps_stand_above_epochs(small, run_main, tmp_path):
    assert "done at step 2 of 2" in run_main(*small("--steps", 2, "--epochs", 9)).out


@pytest.mark.parametrize("n", [1, 3, 8])
def test_sets_no_larger_than_a_batch_train_too(n, small, run_main, tmp_path):
    make_pictures(tmp_path / "few", n)
    done = run_main(*small("--data", tmp_path / "few", "--steps", 4))
    assert done.code == 0 and "done at step 4" in done.out


@pytest.mark.parametrize("samples", [1, 2, 65])
def test_a_grid_may_hold_any_number(samples, small, run_main, tmp_path):
    assert run_main(*small("--steps", 1, "--samples", samples)).code == 0
    sizes = {Image.open(p).size for p in (tmp_path / "run" / "samples").glob("*.png")}
    assert len(sizes) == 1


def test_on_a_terminal_of_80_columns_a_bar_shows_the_numbers(small, run_main, monkeypatch):
    drawn, real = [], dcgan.tqdm

    def terminal(*a, **k):
        return real(*a, **{**k, "disable": False, "file": Lines(drawn), "mininterval": 0, "miniters": 1, "ncols": 80})

    class Lines(io.StringIO):
        def __init__(self, to):
            super().__init__()
            self.to = to

        def write(self, text):
            self.to.append(text)

    terminal.write = real.write
    monkeypatch.setattr(dcgan, "tqdm", terminal)
    assert run_main(*small("--steps", 6, "--report-every", 2)).code == 0
    text = "".join(drawn)
    assert all(word in text for word in ("D(x)", "D(G(z))", "img/s", "6/6"))
    assert re.search(r"D [0-9.]+, G [0-9.]+", text) or ("D=" in text and "G=" in text)
    numbers = [found[0] for found in re.finditer(r"6/6 \[\d\d:\d\d, D [^\]]* img/s\]", text)]  # the time that is left
    assert numbers and max(map(len, numbers)) <= 80 - 11  # and so it is at 12345/50000 with hours to go


@pytest.mark.parametrize("n", [47, 48, 49, 97, 150])
def test_how_a_run_grew_ends_with_its_last_grid(n, tmp_path):
    (tmp_path / "samples").mkdir()
    for i in range(n):
        Image.new("L", (2, 2), i + 1).save(tmp_path / f"samples/step_{i:06d}.png")
    dcgan.save_growth(tmp_path)
    frames = [f.convert("L").getpixel((0, 0)) for f in ImageSequence.Iterator(Image.open(tmp_path / "samples.gif"))]
    assert n / 4 < len(frames) <= 48 and frames[-1] == n and frames == sorted(frames)


def test_gifs_go_round_for_ever(tmp_path):
    dcgan.save_gif([Image.new("RGB", (4, 4), color) for color in ("red", "blue")], tmp_path / "a.gif", 60)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0 and gif.info["duration"] == 60


def test_the_curves_rise_where_the_numbers_do(tmp_path):
    rows = [dict(step=i, loss_d=i / 10, loss_g=1.0, d_x=i / 20, d_gz=0.0) for i in range(21)]
    dcgan.save_curves(rows, tmp_path / "x.png")
    x = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    red = (x[..., 0] > 150) & (x[..., 1] < 90) & (x[..., 2] < 90)
    for top, bottom in ((25, 235), (285, 495)):  # loss_d above, D(x) below: from the lowest line to the highest
        left, right = (np.nonzero(red[top:bottom, column])[0].mean() for column in (60, 860))
        assert left > right + 150


def test_the_rate_is_in_pictures_a_second(tiny, monkeypatch):
    now, plain = [0.0], dcgan.train_step
    monkeypatch.setattr(dcgan, "train_step", lambda *a: now.__setitem__(0, now[0] + 2) or plain(*a))
    monkeypatch.setattr(dcgan, "time", types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: None))
    c = tiny(steps=4, report_every=2)
    assert dcgan.train(c) == 0 and [row["img_s"] for row in log_of(Path(c.run))] == [c.batch_size / 2] * 2


def test_a_folder_with_a_dot_in_its_name_keeps_what_follows_it(small, run_main, faces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(faces, "faces.v2")
    assert run_main(*small("--data", "faces.v2", "--run", "", "--steps", 1)).code == 0
    assert (tmp_path / "runs" / "best-faces.v2" / "generator.pt").exists()


def test_python_may_call_what_the_command_line_calls(tiny, capsys):
    c = tiny(steps=2)
    assert dcgan.train(c) == 0
    G = dcgan.load_generator(c.run)
    x = G(torch.randn(3, 8))
    assert x.shape == (3, 3, 16, 16) and not x.requires_grad


# ---------------------------------------------------------------------------------------- generate


@pytest.fixture
def generate(run_main, tmp_path):
    """-> generate(source, seeds) -> {seed: pixels}."""

    def make(source, seeds):
        out = tmp_path / f"out {len(list(tmp_path.iterdir()))}"
        done = run_main("generate", source, "--seeds", seeds, "--out", out, "--device", "cpu")
        assert done.code == 0 and str(out) in done.out, done.err
        assert (out / "grid.png").exists()
        return {int(p.stem.split("_")[1]): pixels(p) for p in out.glob("seed_*.png")}

    return make


def test_generate_draws_the_grid_that_training_drew(trained, run_main, tmp_path):
    done = run_main("generate", trained.folder, "--seeds", "0-4", "--out", tmp_path / "g.png", "--device", "cpu")
    assert done.code == 0
    assert torch.equal(pixels(tmp_path / "g.png"), pixels(trained.folder / "samples" / "step_000014.png"))


def test_generate_reads_a_run_a_checkpoint_a_generator_or_a_snapshot(trained, generate):
    run = generate(trained.folder, "0-3")
    assert list(sorted(run)) == [0, 1, 2, 3] and run[0].shape == (3, 16, 16)
    for name in ("checkpoint.pt", "generator.pt"):
        other = generate(trained.folder / name, "0-3")
        assert all(torch.equal(run[seed], other[seed]) for seed in run)
    snapshot = generate(trained.folder / "snapshots" / "generator_000012.pt", "0-3")
    assert not torch.equal(run[0], snapshot[0])


def test_a_seed_has_one_picture_whatever_is_asked_beside_it(trained, generate):
    many = generate(trained.folder, "0-40")
    assert sorted(many) == list(range(41))
    for seeds in ("7", "40,7", "7-9,3", "5-23"):
        for seed, picture in generate(trained.folder, seeds).items():
            assert torch.equal(picture, many[seed]), (seeds, seed)
    assert len({p.numpy().tobytes() for p in many.values()}) == 41


def test_seeds_are_drawn_in_the_order_asked_for(trained, run_main, tmp_path):
    run_main("generate", trained.folder, "--seeds", "9,2", "--out", tmp_path / "a.png", "--device", "cpu")
    run_main("generate", trained.folder, "--seeds", "2,9", "--out", tmp_path / "b.png", "--device", "cpu")
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert torch.equal(a[:, 2:18, 2:18], b[:, 2:18, 20:36]) and torch.equal(a[:, 2:18, 20:36], b[:, 2:18, 2:18])


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.gif", "a.bmp", "a.PNG", "new/folder/a.png"])
def test_the_grid_is_written_as_its_name_says(name, trained, run_main, tmp_path):
    assert run_main("generate", trained.folder, "--seeds", "1-4", "--out", tmp_path / name, "--device", "cpu").code == 0
    assert Image.open(tmp_path / name).size == (38, 38)
    assert Image.open(tmp_path / name).format == {"jpg": "JPEG"}.get(name[-3:], name.split(".")[1].upper())


def test_without_out_the_grid_lies_in_the_run(trained, run_main):
    assert run_main("generate", trained.folder).code == 0
    assert Image.open(trained.folder / "generated.png").size == (8 * 18 + 2, 8 * 18 + 2)


def test_a_new_generator_of_the_same_weights_draws_the_same(trained):
    """Pixels do not depend on the process's random state or on training beside it."""
    G = dcgan.load_generator(trained.folder)
    torch.manual_seed(99)
    a = dcgan.draw(G, dcgan.latent([3, 4], 8), "cpu")
    torch.randn(7)
    b = dcgan.draw(dcgan.load_generator(trained.folder / "generator.pt"), dcgan.latent([4], 8), "cpu")
    assert torch.equal(a[1], b[0]) and a.dtype == torch.uint8


def test_bf16_draws_the_same_faces_a_shade_off(trained):
    G, z = dcgan.load_generator(trained.folder), dcgan.latent(range(20), 8)
    a, b = dcgan.draw(G, z, "cpu"), dcgan.draw(G, z, "cpu", "bf16")
    assert 0 < (a.float() - b.float()).abs().mean() < 3
    assert torch.equal(dcgan.draw(G, z[7:8], "cpu", "bf16")[0], b[7])  # whatever is drawn beside it


# ---------------------------------------------------------------------------------------- interpolate


def test_interpolate_walks_from_seed_to_seed_and_back(trained, run_main, generate, tmp_path):
    out = tmp_path / "walk.gif"
    done = run_main("interpolate", trained.folder, "--seeds", "3,7,12", "--out", out, "--device", "cpu")
    assert done.code == 0 and str(out) in done.out
    frames = frames_of(out)
    assert len(frames) == 3 * 24 and frames[0].size == (256, 256)
    strip = pixels(out.with_suffix(".png"))
    assert strip.shape == (3, 3 * 18 + 2, 8 * 18 + 2)  # a row for each pair of seeds
    singles = generate(trained.folder, "3,7,12")
    for row, seed in enumerate((3, 7, 12)):  # each row begins at its seed
        cell = strip[:, 2 + 18 * row : 18 + 18 * row, 2:18]
        assert (cell.int() - singles[seed].int()).abs().max() <= 1


def test_the_walk_stays_where_normal_z_lie(monkeypatch, trained, run_main):
    walks, draw = [], dcgan.draw
    monkeypatch.setattr(dcgan, "draw", lambda G, z, *how: walks.append(z) or draw(G, z, *how))
    assert run_main("interpolate", trained.folder, "--seeds", "0-3", "--device", "cpu").code == 0
    (z,) = walks
    ends = z[::24].norm(dim=1)
    assert (z.norm(dim=1) > 0.9 * ends.min()).all() and (z.norm(dim=1) < 1.1 * ends.max()).all()
    steps = (z - z.roll(1, 0)).norm(dim=1)
    assert steps.max() < 0.25 * ends.max()  # no jump, from the last to the first neither
    assert Image.open(trained.folder / "interpolation.gif").n_frames == 96


@pytest.mark.parametrize("out, gif", [("w.png", "w.gif"), ("w", "w/interpolation.gif"), (".", "interpolation.gif")])
def test_a_walk_is_written_as_its_name_says(out, gif, trained, run_main, tmp_path):
    assert run_main("interpolate", trained.folder, "--seeds", "3,7", "--out", out, "--device", "cpu").code == 0
    assert (tmp_path / gif).exists() and (tmp_path / gif).with_suffix(".png").exists()


def test_a_grid_too_large_for_its_format_is_one_line(trained, run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(dcgan, "grid", lambda x, columns=0: Image.new("RGB", (20000, 2)))
    done = run_main("generate", trained.folder, "--seeds", "1", "--out", tmp_path / "x.webp", "--device", "cpu")
    assert "x.webp" in one_line(done) and not (tmp_path / "x.webp").exists()


def test_names_that_the_terminal_cannot_show_end_no_run(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    dcgan.say("pictures of \u65e5\u672c")
    assert out.buffer.getvalue().strip() == b"pictures of ??"


@pytest.mark.parametrize("seeds", ["5", "5,5"])
def test_a_walk_of_one_seed_stands_still(seeds, trained, run_main, generate, tmp_path):
    out = tmp_path / "w.gif"
    assert run_main("interpolate", trained.folder, "--seeds", seeds, "--out", out, "--device", "cpu").code == 0
    strip, single = pixels(out.with_suffix(".png")), generate(trained.folder, "5")[5]
    for column in range(8):
        cell = strip[:, 2:18, 2 + 18 * column : 18 + 18 * column]
        assert (cell.int() - single.int()).abs().max() <= 1


def test_info_tells_device_versions_and_kernels(run_main):
    done = run_main("info")
    assert done.code == 0 and done.err == ""
    assert f"torch {torch.__version__}" in done.out and "device " in done.out and "--precision auto is" in done.out
    assert len(done.out.splitlines()) >= 3  # the last: which kernels are there, or why not


# ---------------------------------------------------------------------------------------- one line and exit code 2


# what is wrong: (the command line, in a folder that `odd_folder` filled; what its one line must hold)
WRONG = {
    "missing folder": ("--data nowhere", "nowhere.*no such"),
    "empty folder": ("--data empty", "empty.*looked for.*found 0"),
    "folder without pictures": ("--data words", r"\.jpg.*found 1"),
    "zip without pictures": ("--data words.zip", "found 1"),
    "no archive": ("--data notes.txt", "notes.txt.*zip"),
    "unknown preset": ("--preset nope", "nope.*classic.*demo"),
    "unknown option": ("--colour 3", "--colour"),
    "abbreviated option": ("--ng 4 --steps 1", "--ng"),
    "unknown command": ("draw", "draw"),
    "wrong size": ("--image-size 17", "17.*64"),
    "no number": ("--nz many", "--nz.*many"),
    "zero batch": ("--batch-size 0", "batch_size.*0"),
    "two channels": ("--nc 2", "2.*1.*3"),
    "negative rate": ("--lr -1", "lr_[gd].*-1"),
    "dropout of more than all": ("--dropout 1.5", "dropout.*1.5"),
    "rate that is no number": ("--lr-d nan", "lr_d.*nan"),
    "mean that forgets nothing": ("--beta1 1", "beta1.*1"),
    "noise beyond all": ("--noise inf", "noise is inf; it can be 0 or more"),
    "BatchNorm of constants": ("--bn-eps 0", "bn_eps is 0.0; it can be 1e-12 or more"),
    "a division by zero": ("--adam-eps 0", "adam_eps is 0.0; it can be 1e-12 or more"),
    "EMA that never moves": ("--ema 1.5", "ema.*1.5"),
    "negative steps": ("--steps -1", "steps.*-1"),
    "time limit": ("--time-limit soon", "soon.*90s"),
    "device": ("--device abacus", "abacus"),
    "device without numbers": ("--device meta", "meta"),
    "rate beyond all": ("--lr-g 1e9", "lr_g.*1000000000.*to 1"),
    "BatchNorm of one": ("--preset mnist --batch-size 1", "batch-size.*2"),
    "resume of nothing": ("--run none --resume", "none"),
    "generate from nothing": ("generate none", "none"),
    "seeds beyond all": ("generate none --seeds " + 5000 * "9", "seeds.*100,000"),
    "run that is a file": ("--run notes.txt --steps 1", "--run notes.txt is a file; name a folder"),
    "cache that is a file": ("--cache notes.txt --steps 1", "--cache notes.txt is a file; name a folder"),
    "run among the pictures": ("--data words --run words", "words.*name another folder"),
    "run among decoded pictures": ("--run words --cache ./words", "--cache and --run.*name another folder"),
    "generate from a text": ("generate notes.txt", "notes.txt"),
    "generate without a run": ("generate", "source"),
    "interpolate from nothing": ("interpolate none", "none"),
}


@pytest.fixture
def odd_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "list.csv").write_text("a,b")
    (tmp_path / "notes.txt").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "words.zip", "w") as archive:
        archive.writestr("list.csv", "a,b")


def one_line(done):
    assert done.code == 2
    assert done.err.startswith("dcgan.py: ") and done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    assert "Traceback" not in done.err + done.out
    return done.err


@pytest.mark.parametrize("what", WRONG)
def test_wrong_use_is_one_line_and_exit_code_2(what, odd_folder, run_main, few_drawn):
    words, expected = WRONG[what]
    assert re.search(expected, one_line(run_main(*words.split())))


def test_what_may_be_long_is_said_by_one_process_only(tmp_path, run_main, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"no picture")
    told = run_main("--data", tmp_path, "--workers", 0, "--run", tmp_path / "run").err.splitlines()
    monkeypatch.setattr(dcgan, "RANK", 1)
    assert run_main("--data", tmp_path, "--workers", 0, "--run", tmp_path / "run").err.splitlines() == told[:1]
    assert len(told) == 4


@pytest.mark.parametrize(
    "seeds", ["a", "", "5-3", "1-2-3", "-1", "3,", "1.5", "0-99999999999", "9" * 20, "0-9,5-3", "0-100000"]
)
@pytest.mark.parametrize("command", ["generate", "interpolate"])
def test_wrong_seeds_are_one_line_and_exit_code_2(seeds, command, trained, run_main, tmp_path):
    done = run_main(command, trained.folder, f"--seeds={seeds}", "--out", tmp_path / "x.png")
    assert "--seeds" in one_line(done)
    assert not (tmp_path / "x.png").exists()


def test_what_cannot_be_written_is_one_line_and_exit_code_2(trained, run_main, tmp_path):
    (tmp_path / "file").write_text("no folder")
    done = run_main("generate", trained.folder, "--seeds", "1", "--out", tmp_path / "file" / "x.png", "--device", "cpu")
    assert "file" in one_line(done)


def test_nothing_is_written_over_a_run_that_is_there(trained, run_main, small, tmp_path):
    def contents():
        drawn = ("generated", "interpolation", ".lock")
        return {p: p.read_bytes() for p in trained.folder.rglob("*") if p.is_file() and not p.name.startswith(drawn)}

    before = contents()
    line = one_line(run_main(*small("--run", trained.folder, "--steps", 1)))
    assert "--resume" in line and "--run" in line and str(trained.folder) in line
    assert contents() == before


def test_more_bad_pictures_than_allowed_is_exit_code_2_with_the_list(small, run_main, tmp_path):
    make_pictures(tmp_path / "p", 3)
    (tmp_path / "p" / "broken.jpg").write_bytes(b"no picture")
    done = run_main(*small("--data", tmp_path / "p", "--steps", 1))
    assert done.code == 2 and "--max-bad" in done.err.splitlines()[0] and "broken.jpg" in done.err
    assert "Traceback" not in done.err


# ---------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize("most", [1 << 30, 1 << 25])  # what a new glibc takes, and an older one
def test_glibc_is_told_to_keep_large_blocks(most, monkeypatch, tiny):
    """One that takes no threshold of a gigabyte would keep its first one, 128 KiB, and be slower than untold."""
    told = {}

    def mallopt(parameter, value):
        if parameter == -3 and value > most:
            return 0
        told[parameter] = value
        return 1

    monkeypatch.setattr(dcgan.ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")  # the user has decided
    dcgan.tune(tiny("classic"), torch.device("cpu"))
    assert told == {}
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    dcgan.tune(tiny("classic"), torch.device("cpu"))
    assert told == {-3: most, -1: 1 << 30}


def test_whichever_process_decodes_shows_its_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(dcgan, "RANK", 1)
    for shown in (True, False):
        with dcgan.progress(10, "{n_fmt}", every_process=shown) as bar:
            assert bar.disable is not shown


@pytest.mark.parametrize("device", ["cuda", "cpu", "python"])
def test_no_room_on_the_device_is_one_line_that_says_what_to_do(device, small, run_main, monkeypatch, tmp_path):
    def train_step(*_):
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        _ = torch.empty(1 << 60, dtype=torch.uint8) if device == "cpu" else bytearray(1 << 60)

    monkeypatch.setattr(dcgan, "train_step", train_step)
    line = one_line(run_main(*small("--run", tmp_path / "run", "--steps", 1)))
    assert "smaller --batch-size" in line and ("2.00 GiB" in line or device != "cuda")


@pytest.mark.parametrize("command", ["generate", "interpolate"])
def test_no_room_for_drawn_pictures_is_one_line_too(command, trained, run_main, monkeypatch):
    monkeypatch.setattr(dcgan, "grid", lambda *_, **__: bytearray(1 << 60))
    line = one_line(run_main(command, trained.folder, "--seeds", "0-3"))
    assert "not enough memory" in line and "draw fewer --seeds" in line


def test_an_error_of_the_program_is_not_called_a_lack_of_memory(small, monkeypatch, tmp_path):
    def train_step(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(dcgan, "train_step", train_step)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        dcgan.main([str(word) for word in small("--run", tmp_path / "run", "--steps", 1)])


def test_closed_output_stops_no_run(tiny, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert dcgan.train(tiny(steps=2)) == 0 and dcgan.main(["info"]) == 0


def test_torch_too_old_is_one_line(tiny, monkeypatch):
    monkeypatch.delattr(torch.nn.utils, "get_total_norm")
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(dcgan.UserError, match="torch 2.6 or later is needed, this is 2.5.1: pip install -U torch"):
        dcgan.train(tiny())


def test_a_pipe_that_closes_stops_no_run(small, tmp_path):
    """python dcgan.py ... | head: the reader goes, the run goes on and is saved."""

    def write_to_nobody():
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        sys.stdout = os.fdopen(1, "w")
        assert dcgan.main([str(word) for word in small("--run", tmp_path / "run", "--steps", 3)]) == 0

    assert in_child(write_to_nobody)[0] == 0
    assert dcgan.load(tmp_path / "run" / "checkpoint.pt")["step"] == 3


def test_no_room_for_a_checkpoint_is_not_called_damage(small, run_main, monkeypatch, tmp_path):
    words = small("--run", tmp_path / "run", "--steps", 1)
    assert run_main(*words).code == 0

    def load_state_dict(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", load_state_dict)
    line = one_line(run_main("--run", tmp_path / "run", "--resume", "--steps", 2))
    assert "not enough memory" in line and "2.00 GiB" in line and "damaged" not in line


def test_generate_in_bf16_draws_in_bf16(trained, run_main, tmp_path):
    out, G, z = tmp_path / "g.png", dcgan.load_generator(trained.folder), dcgan.latent(range(9), 8)
    words = ["--seeds", "0-8", "--precision", "bf16", "--out", out, "--device", "cpu"]
    assert run_main("generate", trained.folder, *words).code == 0
    expected = [T.pil_to_tensor(dcgan.grid(dcgan.draw(G, z, "cpu", how))) for how in ("bf16", "fp32")]
    assert torch.equal(pixels(out), expected[0]) and not torch.equal(*expected)


# ---------------------------------------------------------------------------------------- import


def test_import_has_no_side_effects(tmp_path):
    """No file, no word, no CUDA, no seed, no thread, no handler: who imports dcgan.py gets names and nothing else."""
    words = tmp_path.parent / f"{tmp_path.name}.words"

    def facts():
        return (
            (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), torch.get_default_dtype()),
            (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()),
            (torch.backends.cudnn.benchmark, torch.cuda.is_initialized(), list(warnings.filters)),
            [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
            (dict(os.environ), os.getcwd(), threading.active_count()),
        )

    def import_again():  # in a child of its own, so that the other tests keep the module they have
        with open(words, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            torch.manual_seed(12345)
            random.seed(1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            del sys.modules["dcgan"]
            before = facts()
            import dcgan as again

            assert facts() == before and again is not dcgan

    assert in_child(import_again)[0] == 0, words.read_text()
    assert words.read_text() == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["faces.pdf", "faces.AVIF"])
def test_a_picture_of_a_kind_that_is_not_written_is_no_folder(name, tmp_path):
    with pytest.raises(dcgan.UserError, match=f"{name}: a picture is written as .bmp .*; or name a folder"):
        dcgan.generate([str(tmp_path), "--out", str(tmp_path / name)])
    with pytest.raises(dcgan.UserError, match="there is no"):  # a folder: then the run is looked for
        dcgan.generate([str(tmp_path), "--out", str(tmp_path / "faces.v2")])

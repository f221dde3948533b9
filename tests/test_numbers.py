"""What goes wrong in the game is said while it happens, with a hint; and a run whose numbers are no numbers stops with
its last good checkpoint.  (That no such number reaches a weight is tested in test_step.py.)"""

import json
import re
import types

import pytest
import torch

import dcgan
from runs import rows, same, saved, snapshot, stop_after

pytest_plugins = "runs"


def losses(n=40, **columns):
    """n rows of a healthy log, some of whose columns follow a function of the step."""
    healthy = {
        "loss_d": lambda i: 1.2 + 0.1 * (i % 3),
        "loss_g": lambda i: 1.0 + 0.1 * (i % 5),
        "d_x": lambda i: 0.6 + 0.02 * (i % 2),
        "d_gz": lambda i: 0.4 - 0.02 * (i % 2),
    }
    made = [{name: f(i) for name, f in (healthy | columns).items()} for i in range(n)]
    return [{"step": 10 * (i + 1), "epoch": 0, "img_s": 1.0, **row} for i, row in enumerate(made)]


def pictures(spread, n=16):
    """uint8 pictures that differ from each other by `spread` in each pixel."""
    generator = torch.Generator().manual_seed(0)
    return (128 + spread * torch.randn(n, 3, 8, 8, generator=generator)).clamp(0, 255).to(torch.uint8)


def said(capsys, rows, x=None, real=None, **options):
    """-> what warn says of a log and the fixed pictures."""
    capsys.readouterr()
    variety = dcgan.variety(pictures(60) if real is None else real)
    c = dcgan.config(**options)
    run = types.SimpleNamespace(c=c, rows=rows, step=rows[-1]["step"] if rows else 1, variety=variety)
    dcgan.warn(run, pictures(60) if x is None else x)
    return capsys.readouterr().out


def hints(text):
    """The options that a warning names: each must exist."""
    found = re.findall(r"--([a-z0-9-]+)", text)
    assert found and {name.replace("-", "_") for name in found} <= set(dcgan.FIELDS) | {"lr"}, text
    return found


def test_a_healthy_run_is_silent(capsys):
    assert said(capsys, losses()) == ""


@pytest.mark.parametrize("n", [1, 2, 5, 19])
def test_a_short_log_is_no_reason_to_warn(capsys, n):
    assert said(capsys, losses(n), pictures(0)) == ""
    assert said(capsys, losses(n, loss_d=lambda i: 0.001, loss_g=lambda i: 9.0)) == ""


def test_d_has_won_is_said_with_a_hint(capsys):
    out = said(capsys, losses(loss_d=lambda i: 1.5 if i % 10 == 5 else 0.01, loss_g=lambda i: 9 + i % 2))
    assert out.startswith("step 400: ") and "D has won" in out and out.count("\n") == 1
    assert "lr-d" in hints(out)


def test_what_is_on_already_is_no_hint(capsys):
    won = losses(loss_d=lambda i: 0.01, loss_g=lambda i: 9 + i % 2)
    noise = ["noise", "noise-steps"]
    assert hints(said(capsys, won, augment=True, spectral_norm=True)) == ["lr-d", "real-label", *noise]
    on = dict(augment=True, spectral_norm=True, noise=0.05)
    assert hints(said(capsys, won, **on, noise_steps=-1)) == ["lr-d", "real-label"]
    assert hints(said(capsys, won, **on, noise_steps=9)) == ["lr-d", "real-label", *noise]  # it has fallen
    won = losses(loss_d=lambda i: 0.4, loss_g=lambda i: 9 + i % 2)
    assert hints(said(capsys, won, augment=True, real_label=0.9)) == ["lr-d", "spectral-norm", *noise]


def test_d_that_wins_only_now_and_then_has_not_won(capsys):
    assert said(capsys, losses(loss_d=lambda i: 0.8 if i % 2 else 0.01)) == ""
    assert said(capsys, losses(loss_d=lambda i: 0.01 if i < 20 else 1 + i % 3)) == ""  # it did, long ago


@pytest.mark.parametrize("loss, real_label, least", [("sum", 1.0, 0.0), ("sum", 0.9, 0.3251), ("mean", 1.0, 0.0)])
def test_how_far_d_is_ahead_is_seen_with_every_kind_of_loss(capsys, loss, real_label, least):
    """A label of 0.9 leaves a D that is always right its entropy, and a mean of two halves is half of their sum."""
    for above, wins in (0.15, True), (0.25, False):
        value = (least + above) / (2 if loss == "mean" else 1)
        log = losses(loss_d=lambda i, value=value: value, loss_g=lambda i: 9 + i % 2)
        assert ("D has won" in said(capsys, log, loss=loss, real_label=real_label)) == wins


def test_g_has_collapsed_is_said_with_a_hint(capsys):
    one, four_kinds = pictures(60)[:1].expand(16, -1, -1, -1), pictures(60, 4).repeat(4, 1, 1, 1)
    for x in pictures(0), pictures(2), pictures(15), one, four_kinds:
        out = said(capsys, losses(), x)
        assert out.startswith("step 400: ") and "G has collapsed" in out and out.count("\n") == 1
        assert "snapshot" in out and hints(out)


@pytest.mark.parametrize("spread", [20, 30, 60])
def test_pictures_that_differ_are_no_collapse(capsys, spread):
    assert said(capsys, losses(), pictures(spread)) == ""


def test_real_pictures_that_hardly_differ_make_no_collapse_of_g(capsys):
    """The measure is how much the real ones differ."""
    assert said(capsys, losses(), pictures(3), real=pictures(3)) == ""
    assert said(capsys, losses(), pictures(60, 1), real=pictures(60, 1)) == ""


def test_flat_losses_are_said_with_a_hint(capsys):
    out = said(capsys, losses(loss_d=lambda i: 1.38629, loss_g=lambda i: 0.69315 + 1e-5 * (i % 2)))
    assert out.startswith("step 400: ") and "flat" in out and out.count("\n") == 1 and hints(out)


def test_one_flat_loss_is_not_both(capsys):
    assert said(capsys, losses(loss_d=lambda i: 1.38629)) == ""


# In a run: the numbers come from training itself.


def with_losses(monkeypatch, loss_d, loss_g):
    """Training whose step reports these losses, and moves as always."""
    plain = dcgan.train_step

    def train_step(*args):
        numbers = plain(*args).clone()
        numbers[0], numbers[1] = loss_d, loss_g
        return numbers

    monkeypatch.setattr(dcgan, "train_step", train_step)


@pytest.mark.parametrize("loss_d, loss_g, words", [(0.001, 9.0, "D has won"), (1.386, 0.693, "flat")])
def test_a_run_says_so_while_it_trains(arguments, tmp_path, monkeypatch, capsys, loss_d, loss_g, words):
    with_losses(monkeypatch, loss_d, loss_g)
    assert dcgan.main(arguments(tmp_path / "run", "--steps 24 --report-every 1 --sample-every 24")) == 0
    assert words in capsys.readouterr().out


def test_a_run_whose_g_draws_one_picture_says_so(arguments, tmp_path, monkeypatch, capsys):
    plain = dcgan.draw
    monkeypatch.setattr(dcgan, "draw", lambda *args: plain(*args)[:1].expand(4, -1, -1, -1))
    assert dcgan.main(arguments(tmp_path / "run", "--steps 24 --sample-every 8 --report-every 1")) == 0
    assert "G has collapsed" in capsys.readouterr().out


@pytest.mark.parametrize("n", [1, 2, 9])
def test_equal_or_few_pictures_stop_no_run(arguments, tmp_path, capsys, n):
    """One picture, or copies of one: foolish, but no reason for a traceback."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(n):
        dcgan.draw_face(0, 16).save(data / f"{i}.png")
    argv = arguments(tmp_path / "run", "--steps 4 --sample-every 2 --report-every 1")
    argv[argv.index("--data") + 1] = str(data)
    assert dcgan.main(argv) == 0


@pytest.mark.parametrize("n, collapsed", [(1, False), (3, True)])
def test_fewer_pictures_than_a_grid_has_are_compared_once_each(arguments, tmp_path, monkeypatch, capsys, n, collapsed):
    """Else each real one would have its own copy beside it, and no G could be less varied.  One alone tells nothing."""
    data, plain = tmp_path / "data", dcgan.draw
    data.mkdir()
    for i in range(n):
        dcgan.draw_face(i, 16).save(data / f"{i}.png")

    def draw(*args):  # nearly the same eight times
        x = plain(*args)[:1].repeat(8, 1, 1, 1)
        x[:, 0, 0] = torch.arange(8, dtype=torch.uint8)[:, None]
        return x

    argv = arguments(tmp_path / "run", "--steps 24 --sample-every 24 --report-every 1 --samples 8")
    argv[argv.index("--data") + 1] = str(data)
    monkeypatch.setattr(dcgan, "draw", draw)
    assert dcgan.main(argv) == 0
    assert ("G has collapsed" in capsys.readouterr().out) == collapsed


# Numbers that are none.


def poison(monkeypatch, after, until=10**9):
    """NaN in z from one step to another."""
    plain = dcgan.draw_inputs

    def draw_inputs(c, pictures, step, device):
        real, z, noise = plain(c, pictures, step, device)
        return real, z * float("nan") if after <= step < until else z, noise

    monkeypatch.setattr(dcgan, "draw_inputs", draw_inputs)


def finite(value):
    if torch.is_tensor(value):
        return bool(torch.isfinite(value).all())
    return all(map(finite, value.values())) if isinstance(value, dict) else True


def test_a_diverged_run_stops_and_names_the_good_checkpoint(arguments, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 6)
        assert dcgan.main(arguments(run, "--steps 40 --report-every 4 --save-every 3 --sample-every 20")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(run / "checkpoint.pt") in error and "--resume" in error
    hints(error)
    checkpoint = dcgan.load(run / "checkpoint.pt")
    assert 6 <= checkpoint["step"] <= 20  # ten bad steps, at the next report
    for name in ("G", "D", "ema", "opt_g", "opt_d", "sums"):
        assert finite(checkpoint[name]), name
    dcgan.load_generator(run)
    # it goes on where the numbers are good again
    assert dcgan.main(["--run", str(run), "--resume", "--steps", "20"]) == 0
    assert rows(run)[-1]["step"] == 20 and finite(saved(run / "checkpoint.pt"))


@pytest.mark.parametrize("asked", [False, True])
def test_nothing_in_the_checkpoint_moved_while_the_numbers_were_bad(arguments, tmp_path, monkeypatch, capsys, asked):
    """asked: the fused Adam of MPS takes no found_inf in some releases, so there the host decides."""
    runs = [tmp_path / name for name in "ab"]
    assert dcgan.main(arguments(runs[0], "--steps 6 --noise-steps 40")) == 0
    poison(monkeypatch, 6)
    if asked:
        plain = torch.optim.Adam.step

        def step(self, *args):
            assert self.found_inf is None
            return plain(self, *args)

        monkeypatch.setattr(torch.optim.Adam, "step", step)
        monkeypatch.setattr(dcgan, "NO_FOUND_INF", {"cpu"})
    assert dcgan.main(arguments(runs[1], "--steps 40 --noise-steps 40 --report-every 3 --save-every 8")) == 2
    a, b = (torch.load(run / "checkpoint.pt", weights_only=True) for run in runs)
    assert (a["step"], b["step"]) == (6, 16)
    for name in ("G", "D", "ema", "opt_g", "opt_d"):
        same(a[name], b[name], name)


def test_a_run_that_diverges_before_its_first_checkpoint_names_none(arguments, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    poison(monkeypatch, 0)
    assert dcgan.main(arguments(run, "--steps 40 --report-every 4")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "finite" in error
    assert "checkpoint.pt" not in error or (run / "checkpoint.pt").exists(), "there is no such file yet"


@pytest.mark.parametrize("length", ["--steps 9", "--steps 30 --report-every 100", "--steps 1 --report-every 1"])
def test_a_run_of_nothing_but_bad_steps_is_never_done(arguments, tmp_path, monkeypatch, capsys, length):
    """Be it shorter than ten steps, or than the way to its first report; and no epoch has losses that nobody saw."""
    poison(monkeypatch, 0)
    assert dcgan.main(arguments(tmp_path / "run", length)) == 2
    said = capsys.readouterr()
    assert "since step 0" in said.err and "done" not in said.out and "D Loss" not in said.out
    epochs = [line for line in said.out.splitlines() if line.startswith("Epoch")]
    assert all("no number was finite in" in line for line in epochs)
    assert bool(epochs) == ("--steps 1 " not in length)


def test_bad_steps_at_the_end_of_a_good_run_do_not_undo_it(arguments, tmp_path, monkeypatch):
    poison(monkeypatch, 8)
    assert dcgan.main(arguments(tmp_path / "run", "--steps 28 --report-every 16 --save-every 100")) == 0
    assert finite(saved(tmp_path / "run" / "checkpoint.pt"))


def test_a_few_bad_steps_are_counted_and_the_run_goes_on(arguments, tmp_path, monkeypatch):
    run = tmp_path / "run"
    poison(monkeypatch, 5, 7)  # steps 6 and 7 of the second report
    assert dcgan.main(arguments(run, "--steps 12 --report-every 4")) == 0
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line.get("skipped", 0) for line in lines] == [0, 2, 0]
    assert all(0 < line["loss_d"] < 10 for line in lines)  # means of the good steps, and valid JSON


@pytest.mark.parametrize("every", [1, 2])
def test_a_few_bad_steps_between_two_reports_stop_no_run(arguments, tmp_path, monkeypatch, every):
    """However often it reports: a line comes with the next number, and counts them."""
    poison(monkeypatch, 4, 9)
    assert dcgan.main(arguments(tmp_path / "run", f"--steps 12 --report-every {every}")) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [i for i in range(every, 13, every) if i <= 4 or i >= 10]
    assert sum(line.get("skipped", 0) for line in lines) == 5 and all(0 < line["loss_d"] < 10 for line in lines)


@pytest.mark.parametrize("preset", ["best", "mnist"])
def test_a_variance_that_overflows_reaches_no_checkpoint(arguments, tmp_path, monkeypatch, preset):
    """The loss and every gradient are finite, for BatchNorm divides by what overflows."""
    plain = dcgan.draw_inputs

    def draw_inputs(c, pictures, step, device):
        real, z, noise = plain(c, pictures, step, device)
        return real, z * 1e30 if step == 5 else z, noise

    monkeypatch.setattr(dcgan, "draw_inputs", draw_inputs)
    assert dcgan.main(arguments(tmp_path / "run", "--steps 8 --ema 0.9 --report-every 4", preset=preset)) == 0
    assert finite(saved(tmp_path / "run" / "checkpoint.pt"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line.get("skipped", 0) for line in lines] == [0, 1]


def test_bad_steps_around_a_stop_are_counted_once(arguments, tmp_path, monkeypatch):
    """The sums of a report that a stop cuts in two are in the checkpoint."""
    poison(monkeypatch, 5, 7)
    assert dcgan.main(arguments(tmp_path / "whole", "--steps 12 --report-every 4")) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert dcgan.main(arguments(tmp_path / "run", "--steps 12 --report-every 4")) == 143
    assert dcgan.main(["--run", str(tmp_path / "run"), "--resume"]) == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert snapshot(tmp_path / "run").keys() >= {"log.jsonl", "checkpoint.pt"}

"""N steps in one go are k steps, a stop, --resume and N - k steps: to the bit, whatever stopped the run."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import types
from pathlib import Path

import pytest
import torch

import dcgan
from runs import leftovers, rows, same, same_run, saved, snapshot, stop_after

pytest_plugins = "runs"

STEPS = 13  # 104 places of the stream: two whole epochs of 36 and most of a third
OFTEN = f"--steps {STEPS} --report-every 4 --sample-every 6 --save-every 5 --keep 2"
EDGES = [
    1,
    5,
    7,
    8,
    9,
    12,
]  # the first; a save's; between two reports; a report's; an epoch's (72 = 9 * 8); the last but one


@pytest.fixture(scope="session")
def whole(tmp_path_factory, data, cache):
    """-> a function that gives the folder of an uninterrupted run; made once for each command line."""
    made = {}

    def whole(arguments, *more, preset="demo"):
        name = " ".join([preset, *map(str, more)])
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / "run"
            assert dcgan.main(arguments(made[name], *more, preset=preset)) == 0
        return made[name]

    return whole


def stop_and_resume(arguments, folder, steps, *more, preset="demo"):
    """A run that SIGTERM stops at each of `steps`, and that is taken up again each time."""
    for resume, step in enumerate(steps):
        with pytest.MonkeyPatch.context() as monkeypatch:
            stop_after(monkeypatch, step)
            argv = ["--run", str(folder), "--resume"] if resume else arguments(folder, *more, preset=preset)
            assert dcgan.main(argv) == 143
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == step
    assert dcgan.main(["--run", str(folder), "--resume"]) == 0
    assert leftovers(folder) == []


@pytest.mark.parametrize("preset", dcgan.PRESETS)
def test_every_preset_goes_on_as_if_it_had_never_stopped(arguments, whole, tmp_path, preset):
    stop_and_resume(arguments, tmp_path / "run", EDGES, OFTEN, preset=preset)
    same_run(whole(arguments, OFTEN, preset=preset), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS))
@pytest.mark.parametrize("preset", dcgan.PRESETS)
def test_every_preset_goes_on_from_each_single_step(arguments, whole, tmp_path, preset, step):
    stop_and_resume(arguments, tmp_path / "run", [step], OFTEN, preset=preset)
    same_run(whole(arguments, OFTEN, preset=preset), tmp_path / "run")


@pytest.mark.slow
def test_two_threads_go_on_to_the_bit_as_well(arguments, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert dcgan.main(arguments(tmp_path / "whole", OFTEN, "--ngf 16 --ndf 16")) == 0
        stop_and_resume(arguments, tmp_path / "run", [7], OFTEN, "--ngf 16 --ndf 16")
    finally:
        torch.set_num_threads(threads)
    same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    "options",
    [
        "--precision bf16",
        "--precision bf16 --noise 0.3 --ema 0.9 --self-modulation",
        "--noise 0.2 --noise-steps 10 --flips",  # the noise ends between the stop and the end
        "--spectral-norm --dropout2d 0.3 --update fresh",
        "--update simultaneous --ema 0 --noise 0",
        "--update simultaneous --dropout2d 0.3 --spectral-norm",
        "--nc 1 --optimizer adamw --weight-decay 0.1 --loss mean --real-label 0.9",
    ],
)
def test_every_ingredient_goes_on(arguments, whole, tmp_path, options):
    stop_and_resume(arguments, tmp_path / "run", [7], OFTEN, options)
    same_run(whole(arguments, OFTEN, options), tmp_path / "run")


@pytest.mark.parametrize("preset", ["demo", "mnist"])
def test_augmentation_goes_on(arguments, tmp_path, preset, monkeypatch):
    monkeypatch.setattr(dcgan.Discriminator, "TARGET", -1.0)  # p rises from the first step on
    monkeypatch.setattr(dcgan.Discriminator, "SLOW", 10)
    assert dcgan.main(arguments(tmp_path / "whole", OFTEN, "--augment", preset=preset)) == 0
    stop_and_resume(arguments, tmp_path / "run", [7], OFTEN, "--augment", preset=preset)
    same_run(tmp_path / "whole", tmp_path / "run")
    assert saved(tmp_path / "run" / "checkpoint.pt")["D"]["p"] == pytest.approx(dcgan.Discriminator.MOST)


@pytest.fixture(scope="session")
def kernels():
    """Skips where the fused kernels cannot be had."""
    try:
        return dcgan.choose_ops(True, torch.device("cpu"))
    except dcgan.UserError as e:
        pytest.skip(f"no fused kernels: {e}")


@pytest.mark.parametrize("preset", dcgan.PRESETS)
def test_fused_kernels_go_on_too(kernels, arguments, whole, tmp_path, preset):
    stop_and_resume(arguments, tmp_path / "run", [5, 7], OFTEN, "--fused", preset=preset)
    same_run(whole(arguments, OFTEN, "--fused", preset=preset), tmp_path / "run")


def test_a_plain_run_is_taken_up_with_fused_kernels_and_back(kernels, arguments, tmp_path):
    assert dcgan.main(arguments(tmp_path, OFTEN, "--steps 5")) == 0
    assert dcgan.main(["--run", str(tmp_path), "--resume", "--fused", "--steps", "9"]) == 0
    assert dcgan.main(["--run", str(tmp_path), "--resume", "--no-fused", "--steps", str(STEPS)]) == 0
    assert saved(tmp_path / "checkpoint.pt")["step"] == STEPS


def test_a_run_ended_by_steps_is_extended_by_steps(arguments, whole, tmp_path):
    # the noise falls over the length at the first start; a length of its own makes both runs the same experiment
    noise = "--noise-steps 13"
    assert dcgan.main(arguments(tmp_path, OFTEN, noise, "--steps 6")) == 0
    assert dcgan.main(["--run", str(tmp_path), "--resume", "--steps", str(STEPS)]) == 0
    for name in ("checkpoint.pt", "generator.pt"):  # samples: the first end drew one that the whole run does not
        same(saved(whole(arguments, OFTEN, noise) / name), saved(tmp_path / name), name)
    same(rows(whole(arguments, OFTEN, noise)), rows(tmp_path), "log.jsonl")


def test_a_run_ended_by_epochs_is_extended_by_epochs(arguments, tmp_path):
    options = "--noise-steps 13 --report-every 4 --sample-every 6"
    epochs = "--steps 0 --epochs"
    assert dcgan.main(arguments(tmp_path / "a", options, epochs, 2)) == 0
    assert saved(tmp_path / "a" / "checkpoint.pt")["step"] == 9
    assert dcgan.main(["--run", str(tmp_path / "a"), "--resume", "--epochs", "3"]) == 0
    assert dcgan.main(arguments(tmp_path / "b", options, epochs, 3)) == 0
    for name in ("checkpoint.pt", "generator.pt"):
        same(saved(tmp_path / "b" / name), saved(tmp_path / "a" / name), name)
    same(rows(tmp_path / "b"), rows(tmp_path / "a"), "log.jsonl")


def test_epochs_extend_a_run_that_steps_had_limited(arguments, tmp_path):
    assert dcgan.main(arguments(tmp_path, "--steps 3")) == 0
    assert dcgan.main(["--run", str(tmp_path), "--resume", "--epochs", "2"]) == 0
    assert saved(tmp_path / "checkpoint.pt")["step"] == 9


def test_the_noise_falls_over_the_length_that_the_run_had_at_its_start(arguments, tmp_path, monkeypatch):
    """Extending a run must not bring back noise that had ended."""
    assert dcgan.main(arguments(tmp_path, "--noise 0.5 --steps 4")) == 0
    noises, plain = [], dcgan.draw_inputs
    monkeypatch.setattr(dcgan, "draw_inputs", lambda *a: noises.append(plain(*a)[2]) or plain(*a))
    assert dcgan.main(["--run", str(tmp_path), "--resume", "--steps", "6"]) == 0
    assert [noise.flatten().tolist() for noise in noises] == [[0.0] * 3] * 2


def test_from_python_a_resumed_run_takes_what_its_config_sets(arguments, tmp_path):
    assert dcgan.main(arguments(tmp_path, "--steps 2")) == 0
    assert dcgan.train(dcgan.config("demo", run=str(tmp_path), resume=True, steps=4)) == 0
    assert saved(tmp_path / "checkpoint.pt")["step"] == 4
    with pytest.raises(dcgan.UserError, match="seed"):
        dcgan.train(dcgan.config("demo", run=str(tmp_path), resume=True, seed=9))


def test_from_python_a_value_that_is_the_preset_s_is_taken_too(arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(dcgan.PRESETS, "demo", dcgan.PRESETS["demo"] | {"steps": 4})
    assert dcgan.main(arguments(tmp_path, "--steps 2")) == 0
    assert dcgan.train(dcgan.config("demo", run=str(tmp_path), resume=True, steps=4)) == 0
    assert saved(tmp_path / "checkpoint.pt")["step"] == 4
    c = dcgan.config("demo", run=str(tmp_path), resume=True)
    c.steps = 6  # set by hand
    assert dcgan.train(c) == 0 and saved(tmp_path / "checkpoint.pt")["step"] == 6


def test_a_time_limit_stops_it_and_resume_goes_on(arguments, whole, tmp_path, monkeypatch, capsys):
    now, plain = [0.0], dcgan.train_step

    def a_second_a_step(*args):
        now[0] += 1
        return plain(*args)

    monkeypatch.setattr(dcgan, "train_step", a_second_a_step)
    clock = types.SimpleNamespace(**{name: getattr(dcgan.time, name) for name in ("time", "sleep")})
    clock.monotonic = lambda: now[0]
    monkeypatch.setattr(dcgan, "time", clock)
    assert dcgan.main(arguments(tmp_path / "run", OFTEN, "--time-limit 4.5s")) == 0
    assert saved(tmp_path / "run" / "checkpoint.pt")["step"] == 5
    assert "stopped at step 5 of 13" in capsys.readouterr().out
    # what a user types next must finish the run: the limit was one of that start, not of the run
    assert dcgan.main(["--run", str(tmp_path / "run"), "--resume"]) == 0
    assert saved(tmp_path / "run" / "checkpoint.pt")["step"] == STEPS
    same_run(whole(arguments, OFTEN), tmp_path / "run")


def test_ctrl_c_is_as_good_as_sigterm(arguments, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert dcgan.main(arguments(tmp_path / "run", OFTEN)) == 130
    assert dcgan.main(["--run", str(tmp_path / "run"), "--resume"]) == 0
    same_run(whole(arguments, OFTEN), tmp_path / "run")


def test_a_fresh_process_goes_on_with_nothing_but_the_folder(arguments, whole, tmp_path, monkeypatch, start):
    """Nothing that a resumed run needs may live in the process that began it."""
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert dcgan.main(arguments(tmp_path / "run", OFTEN)) == 143
    run = start(["--run", tmp_path / "run", "--resume"])
    assert run.wait() == 0, run.output
    same_run(whole(arguments, OFTEN), tmp_path / "run")


# ------------------------------------------------------------------------------------------------ what may change


def another(name):
    """-> a value for an option that differs from the one of the test's run."""
    f, old = dcgan.FIELDS[name], getattr(dcgan.config("demo"), name)
    if f.metadata["choices"]:
        return next(choice for choice in f.metadata["choices"] if choice != old)
    return {bool: not old, int: 8 if name in ("nz", "ngf", "ndf") else 3, float: 0.123, str: "/elsewhere"}[f.type]


def vars_of(argv):
    return {name: value for name, value in dcgan.read_options(argv).items() if name != "preset"}


FIXED = [name for name in dcgan.FIELDS if name not in dcgan.MAY_CHANGE]


@pytest.fixture(scope="module")
def short(tmp_path_factory, data, cache):
    """A run of 3 steps that nobody may touch."""
    folder = tmp_path_factory.mktemp("short") / "run"
    tiny = "--preset demo --image-size 16 --nz 6 --ngf 4 --ndf 4 --batch-size 8 --samples 4 --workers 0 --steps 3"
    assert dcgan.main([*tiny.split(), "--data", str(data), "--cache", str(cache), "--run", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", FIXED)
def test_what_makes_the_experiment_cannot_change(short, name, capsys):
    value, before = another(name), snapshot(short)
    value = {"image_size": 32, "noise_steps": 9}.get(name, value)
    flag = "--" + name.replace("_", "-")
    words = [flag, str(value)] if not isinstance(value, bool) else [flag if value else "--no-" + flag[2:]]
    capsys.readouterr()
    assert dcgan.main(["--run", str(short), "--resume", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error and repr(value) in error, error
    assert snapshot(short) == before


def test_a_checkpoint_of_another_preset_is_named_as_that(short, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    assert dcgan.main(arguments(tmp_path / "other", "--steps 1", preset="keras")) == 0
    shutil.copy(tmp_path / "other" / "checkpoint.pt", run)
    capsys.readouterr()
    assert dcgan.main(["--run", str(run), "--resume", "--steps", "9"]) == 2
    error = capsys.readouterr().err
    assert "checkpoint.pt cannot go on with preset 'demo': it began with 'keras'. Put its own config.json back" in error
    assert dcgan.main(["--run", str(run), "--resume", "--preset", "demo"]) == 2
    assert "it began with 'keras'. Leave it out" in capsys.readouterr().err


def test_what_was_given_again_unchanged_is_no_change(short, data):
    argv = ["--preset", "demo", "--image-size", "16", "--nz", "6", "--seed", "0", "--batch-size", "8"]
    for path in (data, data / ".." / data.name):
        assert dcgan.main([*argv, "--data", str(path), "--run", str(short), "--resume"]) == 0


def test_pictures_that_were_moved_can_be_named_anew(arguments, tmp_path, data, capsys):
    run, here, there = tmp_path / "run", tmp_path / "here", tmp_path / "there"
    shutil.copytree(data, here)
    argv = [*arguments(run, "--steps 2"), "--data", str(here)]
    assert dcgan.main(argv) == 0
    go_on = ["--run", str(run), "--resume", "--steps", "4", "--data", str(there)]
    shutil.copytree(data, there)
    assert dcgan.main(go_on) == 2 and "data" in capsys.readouterr().err  # the old ones are there: these are others
    shutil.rmtree(here)
    assert dcgan.main(go_on) == 0 and dcgan.load(run / "checkpoint.pt")["config"].data == str(there)


def test_pictures_that_are_gone_are_not_replaced_by_drawn_ones(arguments, tmp_path, data, capsys):
    here = tmp_path / "here"
    shutil.copytree(data, here)
    assert dcgan.main(arguments(tmp_path / "run", "--steps 1", "--data", here)) == 0
    shutil.rmtree(here)
    assert dcgan.main(["--run", str(tmp_path / "run"), "--resume", "--steps", "2", "--data", ""]) == 2
    assert "cannot go on with data ''" in capsys.readouterr().err


def test_the_options_that_may_change_do(arguments, tmp_path):
    """Lengths, time limit, device, precision, fused, workers, intervals: the names of all, new values of most."""
    promised = "epochs steps time_limit device precision fused workers sample_every report_every save_every keep cache"
    assert set(promised.split()) <= dcgan.MAY_CHANGE
    assert dcgan.main(arguments(tmp_path / "run", OFTEN, "--steps 4")) == 0
    (tmp_path / "run").rename(tmp_path / "elsewhere")  # a run may be moved
    changes = "--steps 8 --time-limit 2h --device cpu --precision bf16 --workers 0 --sample-every 3 --report-every 2 "
    argv = [*changes.split(), "--save-every", "1", "--keep", "1", "--cache", str(tmp_path / "cache")]
    assert dcgan.main(["--run", str(tmp_path / "elsewhere"), "--resume", *argv]) == 0
    run = tmp_path / "elsewhere"
    assert [row["step"] for row in rows(run)] == [4, 6, 8]
    assert (run / "samples" / "step_000006.png").exists() and any((tmp_path / "cache").iterdir())
    config = json.loads((run / "config.json").read_text())
    assert config["precision"] == "bf16" and config["run"] == str(run)
    assert len(list((run / "snapshots").iterdir())) == 1


def test_a_resumed_run_keeps_its_precision_unless_auto_is_given(arguments, tmp_path, monkeypatch):
    run, has = tmp_path / "run", ["fp32"]  # what the hardware has
    monkeypatch.setattr(dcgan, "choose_precision", lambda name, device: has[0] if name == "auto" else name)
    assert dcgan.main(arguments(run, "--steps 1 --precision auto")) == 0
    has[0] = "bf16"  # another machine
    for steps, more, expected in (("2", [], "fp32"), ("3", ["--precision", "auto"], "bf16")):
        assert dcgan.main(["--run", str(run), "--resume", "--steps", steps, *more]) == 0
        assert dcgan.load(run / "checkpoint.pt")["config"].precision == expected


def test_without_save_every_there_is_a_checkpoint_every_two_minutes(arguments, tmp_path, monkeypatch):
    now, saves, step, save = [0.0], [], dcgan.train_step, dcgan.save_run
    monkeypatch.setattr(dcgan, "time", types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: None))
    monkeypatch.setattr(dcgan, "train_step", lambda *a: now.__setitem__(0, now[0] + 50) or step(*a))
    monkeypatch.setattr(dcgan, "save_run", lambda run: saves.append(run.step) or save(run))
    assert dcgan.main(arguments(tmp_path / "run", "--steps 8")) == 0
    assert saves == [3, 6, 8]


def test_a_preset_is_kept_whatever_the_default_of_the_next_start_would_be(arguments, tmp_path):
    """--run and --resume are enough: nobody has to repeat the preset or the data."""
    assert dcgan.main(arguments(tmp_path / "run", "--steps 2", preset="keras")) == 0
    assert dcgan.main(["--run", str(tmp_path / "run"), "--resume", "--steps", "3"]) == 0
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["config"]["preset"] == "keras"


def test_a_run_goes_on_where_it_was_not_where_the_default_would_be(arguments, tmp_path, monkeypatch):
    """--device auto of the command line is no wish to leave the run's device."""
    chosen, plain = [], dcgan.choose_device
    monkeypatch.setattr(dcgan, "choose_device", lambda name: plain(chosen.append(name) or name))
    assert dcgan.main(arguments(tmp_path / "run", "--steps 2 --device cpu")) == 0
    assert dcgan.main(["--run", str(tmp_path / "run"), "--resume", "--steps", "3"]) == 0
    assert chosen == ["cpu", "cpu"]


def test_the_first_rate_after_a_resume_counts_its_own_steps(arguments, tmp_path, monkeypatch):
    """A report that comes one step after the resume has one step's pictures in its time."""
    assert dcgan.main(arguments(tmp_path / "run", "--steps 3 --report-every 4")) == 0
    clock = iter(range(10**6))  # a second passes at each look
    monkeypatch.setattr(dcgan, "time", types.SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda s: None))
    assert dcgan.main(["--run", str(tmp_path / "run"), "--resume", "--steps", "8"]) == 0
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["img_s"] for line in lines)
    assert 0.5 < first / second < 2


# ------------------------------------------------------------------------------------------------ the folder


def test_lines_samples_and_snapshots_past_the_checkpoint_are_cut(arguments, whole, tmp_path):
    """A run killed after its last checkpoint has left more behind than the checkpoint knows."""
    run = tmp_path / "run"
    assert dcgan.main(arguments(run, OFTEN, "--steps 5 --noise-steps 13")) == 0
    old = (run / "checkpoint.pt").read_bytes()
    assert dcgan.main(["--run", str(run), "--resume", "--steps", "11"]) == 0
    (run / "checkpoint.pt").write_bytes(old)  # now the folder is ahead of it
    (run / "log.jsonl").write_text((run / "log.jsonl").read_text() + '{"step": 12, "epo')
    (run / "samples" / ".step_000011.png.half").write_bytes(b"half")
    (run / ".checkpoint.pt.half").write_bytes(b"half")
    (run / "cache").mkdir()  # as of `--run runs`: another process may be writing there
    (run / "cache" / ".pictures.u8.half").write_bytes(b"half")
    files = []

    def look():
        files.extend(str(p.relative_to(run)) for p in run.rglob("*"))
        files.append((run / "log.jsonl").read_text())

    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_after(monkeypatch, 6, look)  # before the first step after the checkpoint
        assert dcgan.main(["--run", str(run), "--resume", "--steps", str(STEPS)]) == 0
    *files, log = files
    assert [json.loads(line)["step"] for line in log.splitlines()] == [4]
    assert [f for f in files if f.endswith(".half")] == ["cache/.pictures.u8.half"]
    shutil.rmtree(run / "cache")
    numbers = [int(Path(f).stem.split("_")[1]) for f in files if Path(f).stem[-6:].isdigit()]
    assert max(numbers) <= 5 and numbers
    options = OFTEN, "--noise-steps 13"
    same(saved(whole(arguments, *options) / "checkpoint.pt"), saved(run / "checkpoint.pt"), "checkpoint.pt")
    same(rows(whole(arguments, *options)), rows(run), "log.jsonl")


def test_a_second_start_in_the_folder_of_a_run_touches_nothing(short, arguments, capsys):
    before = snapshot(short)
    assert dcgan.main(arguments(short)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--resume" in error and str(short) in error
    assert snapshot(short) == before


def test_a_checkpoint_without_its_config_is_not_overwritten(short, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes((short / "checkpoint.pt").read_bytes())
    before = snapshot(run)
    assert dcgan.main(arguments(run, "--steps 1")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert snapshot(run) == before


def test_a_config_alone_is_a_run_that_is_not_overwritten(short, arguments, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy(short / "config.json", tmp_path / "run")
    assert dcgan.main(arguments(tmp_path / "run", "--steps 1")) == 2 and "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("kept", ["snapshots/generator_000004.pt", "samples/step_000004.png"])
def test_what_is_left_of_a_run_is_not_overwritten(kept, short, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    (run / kept).parent.mkdir(parents=True)
    (run / kept).write_bytes((short / "checkpoint.pt").read_bytes())
    before = snapshot(run)
    assert dcgan.main(arguments(run, "--steps 1")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert snapshot(run) == before


def test_resume_without_a_run_says_so(tmp_path, capsys):
    assert dcgan.main(["--run", str(tmp_path / "nowhere"), "--resume"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_a_run_stopped_before_its_first_checkpoint_begins_again(arguments, whole, tmp_path):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_after(monkeypatch, 4, lambda: (_ for _ in ()).throw(dcgan.UserError("the power went")))
        assert dcgan.main(arguments(run, OFTEN, "--save-every 99")) == 2
    assert not (run / "checkpoint.pt").exists() and (run / "samples" / "step_000002.png").exists()
    assert dcgan.main(["--run", str(run), "--resume", "--save-every", "5"]) == 0
    same_run(whole(arguments, OFTEN), run)


def test_what_makes_the_experiment_cannot_change_before_the_first_checkpoint_either(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    assert dcgan.main(arguments(run, "--steps 2")) == 0
    for file in run.rglob("*.pt"):
        file.unlink()
    assert dcgan.main(["--run", str(run), "--resume", "--preset", "keras"]) == 2
    assert "preset 'keras'" in capsys.readouterr().err


def test_after_an_error_the_same_process_may_try_again(arguments, tmp_path, monkeypatch):
    """A notebook keeps the exception, and with it what the frames hold."""
    c, kept = dcgan.config("demo", **vars_of(arguments(tmp_path / "run", "--steps 2"))), []
    with monkeypatch.context() as patch:
        patch.setattr(dcgan, "choose_step", lambda run: (_ for _ in ()).throw(dcgan.UserError("no room")))
        try:
            dcgan.train(c)
        except dcgan.UserError as e:
            kept.append(e)
    assert kept and dcgan.train(c) == 0


def test_a_run_leaves_the_callers_config_as_it_was(arguments, tmp_path):
    c = dcgan.config("regularized", **vars_of(arguments(tmp_path / "run", "--steps 2", preset="regularized")))
    before = dataclasses.asdict(c)
    assert dcgan.train(c) == 0 and dataclasses.asdict(c) == before


def test_a_thread_may_train(arguments, tmp_path):
    codes, c = [], dcgan.config("demo", **vars_of(arguments(tmp_path / "run", "--steps 2")))
    thread = threading.Thread(target=lambda: codes.append(dcgan.train(c)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_checkpoint_that_was_moved_away_does_not_cost_the_snapshots(arguments, tmp_path, capsys):
    """A damaged checkpoint's message points at snapshots/: they must not go when it is taken away."""
    run = tmp_path / "run"
    assert dcgan.main(arguments(run, OFTEN)) == 0
    (run / "checkpoint.pt").rename(tmp_path / "damaged.pt")
    before = snapshot(run)
    assert dcgan.main(["--run", str(run), "--resume"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert snapshot(run) == before


def test_files_of_the_users_own_in_the_folder_do_no_harm(arguments, tmp_path):
    assert dcgan.main(arguments(tmp_path, "--steps 2")) == 0
    own = [tmp_path / "snapshots" / "generator_best.pt", tmp_path / "samples" / "step_nice.png", tmp_path / "notes.txt"]
    for file in own:
        file.write_bytes(b"mine")
    assert dcgan.main(["--run", str(tmp_path), "--resume", "--steps", "3"]) == 0
    assert [file.read_bytes() for file in own] == [b"mine"] * 3


def test_a_log_that_was_damaged_costs_only_its_own_lines(arguments, tmp_path):
    run = tmp_path / "run"
    assert dcgan.main(arguments(run, "--steps 4 --report-every 1")) == 0
    lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    (run / "log.jsonl").write_bytes(lines[0] + b"\0\0\0\xff\xfe\n" + b"null\n7\n" + lines[1][:9] + b"\n" + lines[3])
    assert dcgan.main(["--run", str(run), "--resume", "--steps", "5"]) == 0
    assert [row["step"] for row in rows(run)] == [1, 4, 5]


def test_snapshots_and_samples_keep_their_order_beyond_a_million_steps(arguments, tmp_path):
    """step_1000000 comes before step_999999 in the alphabet: the newest would be thrown away."""
    run = tmp_path / "run"
    assert dcgan.main(arguments(run, "--steps 2 --keep 2")) == 0
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    checkpoint["step"] = 999_995
    torch.save(checkpoint, run / "checkpoint.pt")
    assert dcgan.main(["--run", str(run), "--resume", "--steps", "1000010", "--sample-every", "1"]) == 0
    kept = sorted(int(p.stem.split("_")[1]) for p in (run / "snapshots").iterdir())
    assert len(kept) == 2 and min(kept) >= 1_000_000, kept


def test_pictures_that_changed_between_two_starts_are_mentioned(arguments, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(12):
        dcgan.draw_face(i, 16).save(data / f"{i}.png")
    argv = arguments(tmp_path / "run", "--steps 2")
    argv[argv.index("--data") + 1] = str(data)
    assert dcgan.main(argv) == 0
    (data / "3.png").unlink()
    capsys.readouterr()
    assert dcgan.main(["--run", str(tmp_path / "run"), "--resume", "--steps", "4"]) == 0
    out = capsys.readouterr().out
    assert "12" in out and "11" in out, out
    assert saved(tmp_path / "run" / "checkpoint.pt")["step"] == 4


def test_a_checkpoint_of_a_gpu_goes_on_here(short, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    for name in ("opt_g", "opt_d"):
        saved[name]["param_groups"][0].update(capturable=True, fused=None)
    torch.save(saved, run / "checkpoint.pt")
    run = dcgan.set_up(dcgan.config("demo", run=str(run), resume=True))
    for group in (run.opt_g.param_groups[0], run.opt_d.param_groups[0]):
        assert group["fused"] and not group["capturable"]


def test_the_log_is_on_the_disk_before_the_checkpoint_that_relies_on_it(arguments, tmp_path, monkeypatch):
    done, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name) or fsync(fd))
    assert dcgan.main(arguments(tmp_path / "run", "--steps 2 --report-every 1 --sample-every 99")) == 0
    assert done[done.index(".checkpoint.pt.half") - 1] == "log.jsonl"


def test_half_a_snapshot_is_swept(short, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    (run / "snapshots" / ".generator_000099.pt.half").write_bytes(b"half")
    assert dcgan.main(["--run", str(run), "--resume"]) == 0 and not list(run.rglob("*.half"))


def test_it_goes_on_from_any_folder(arguments, tmp_path, data, monkeypatch):
    shutil.copytree(data, tmp_path / "here" / "pictures")
    monkeypatch.chdir(tmp_path / "here")
    assert dcgan.main([*arguments("run", "--steps 2"), "--data", "pictures"]) == 0
    monkeypatch.chdir(tmp_path)
    assert dcgan.main(["--run", "here/run", "--resume", "--steps", "4"]) == 0
    given_away = dcgan.load(tmp_path / "here" / "run" / "generator.pt")
    assert given_away["step"] == 4 and not given_away["config"].data + given_away["config"].run


def test_the_command_of_the_start_goes_on_though_it_names_no_length_of_the_noise(arguments, tmp_path, capsys):
    argv = arguments(tmp_path / "run", "--noise 0.1 --noise-steps 0")
    assert dcgan.main([*argv, "--steps", "2"]) == 0 and dcgan.main([*argv, "--steps", "4", "--resume"]) == 0
    assert dcgan.load(tmp_path / "run" / "checkpoint.pt")["config"].noise_steps == 2
    assert dcgan.main([*argv, "--steps", "4", "--resume", "--noise-steps", "3"]) == 2
    assert "noise_steps 3: it began with 2" in capsys.readouterr().err

"""A run can be killed at any instant, by kill -9, a signal, a full disk or a clock: the next start goes on, and what
comes out in the end is to the bit what an undisturbed run makes."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import in_child

import dcgan
from runs import leftovers, rows, same, same_run, saved

pytest_plugins = "runs"

OFTEN = "--steps 12 --report-every 2 --sample-every 4 --save-every 2 --keep 2 --max-bad 0.1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """An undisturbed run, and its cache of pictures."""
    from runs import one_warm

    folder = tmp_path_factory.mktemp("whole")
    run = one_warm().start(command(folder, data, folder / "cache"), folder / "output.txt")
    assert run.wait() == 0, run.output
    return folder


def command(run, data, cache, *more):
    tiny = (
        "--preset demo --image-size 16 --nz 8 --ngf 4 --ndf 4 --batch-size 8 --samples 4 --precision fp32 --workers 0"
    )
    where = ["--data", data, "--cache", cache, "--run", run / "run"]
    return [*tiny.split(), *OFTEN.split(), *where, *" ".join(map(str, more)).split()]


def again(folder, data, cache, *more):
    """The command that a script would use after a kill: resume what is there, else begin."""
    begun = (folder / "run" / "config.json").exists()
    return [*command(folder, data, cache, *more), *(["--resume"] if begun else [])]


def finish(start, folder, data, cache, whole):
    """The next start must end well, and leave what an undisturbed run leaves."""
    if (folder / "run" / "checkpoint.pt").exists():
        dcgan.load(folder / "run" / "checkpoint.pt")  # raises unless it is whole
    run = start(again(folder, data, cache))
    assert run.wait() == 0, run.output
    assert "Traceback" not in run.output
    same_run(whole / "run", folder / "run")
    assert leftovers(folder, cache) == []
    same_cache(whole / "cache", cache)


def same_cache(a, b):
    whole_a, whole_b = (sorted(p for p in folder.glob("*.*") if p.name != ".lock") for folder in (a, b))
    assert len(whole_a) == 2
    assert [p.relative_to(a) for p in whole_a] == [p.relative_to(b) for p in whole_b]
    for one, other in zip(whole_a, whole_b, strict=True):
        assert one.read_bytes() == other.read_bytes(), other


# ------------------------------------------------------------------------------------------------ kill -9


def kill_at_random(start, folder, data, cache, seed, kills):
    """One run, killed so many times at any moment of its life, from the first line on."""
    r, lasts, hits = random.Random(seed), 0.3, 0  # noqa: S311 - moments, not secrets
    for _ in range(kills):
        run = start(again(folder, data, cache))
        moment = time.monotonic() + r.uniform(0, lasts)
        while time.monotonic() < moment and run.poll() is None:
            time.sleep(0.001)
        if run.poll() is None:
            run.signal(signal.SIGKILL)
            assert run.wait() in (0, -signal.SIGKILL), run.output
            there = (folder / "run" / "checkpoint.pt").exists()  # on a slow machine not at first
            hits, lasts = hits + there, lasts if there else lasts * 1.5
        else:  # it was done: begin anew
            assert run.code == 0, run.output
            lasts = max(0.1, lasts * 0.8)
            shutil.rmtree(folder / "run")
            if r.random() < 0.5:
                shutil.rmtree(cache)
    assert hits  # or no resume after a kill was seen


def test_a_dozen_kills_at_random_moments_cost_nothing(start, tmp_path, data, whole):
    kill_at_random(start, tmp_path, data, tmp_path / "cache", 0, 12)
    finish(start, tmp_path, data, tmp_path / "cache", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_hundred_kills_at_random_moments_cost_nothing(start, tmp_path, data, whole, seed):
    kill_at_random(start, tmp_path, data, tmp_path / "cache", seed, 10)
    finish(start, tmp_path, data, tmp_path / "cache", whole)


def test_a_kill_at_the_disk_is_survived_wherever_it_falls(start, tmp_path, data, whole):
    """Just before each fsync, rename, unlink and mkdir there is: of the cache, the log, the samples, the checkpoint.
    A run dies at the 1st of them, the next start at its 2nd, then at its 4th ..., until one gets to its end."""
    number, kills = 1, 0
    while True:
        run = start(again(tmp_path, data, tmp_path / "cache"), f"die_at:{number}")
        if run.wait() == 0:
            break
        assert run.code == -signal.SIGKILL, run.output
        number, kills = number + 1 + number // 6, kills + 1
    assert kills >= 8
    finish(start, tmp_path, data, tmp_path / "cache", whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 100))
def test_a_kill_at_each_single_touch_of_the_disk_is_survived(start, tmp_path, data, whole, number):
    run = start(again(tmp_path, data, tmp_path / "cache"), f"die_at:{number}")
    assert run.wait() in (0, -signal.SIGKILL), run.output
    finish(start, tmp_path, data, tmp_path / "cache", whole)


@pytest.mark.parametrize("seed", range(3))
def test_half_a_file_is_never_taken_for_a_whole_one(start, tmp_path, data, whole, seed):
    """Killed with half of the bytes written: of the pictures, index, log, config, a sample, checkpoint, snapshot."""
    killed = 0
    for number in range(1 + seed, 60, 3 if seed else 5):
        run = start(again(tmp_path, data, tmp_path / "cache"), f"die_writing:{number}")
        if run.wait() == 0:
            break
        assert run.code == -signal.SIGKILL, run.output
        killed += 1
    assert killed >= 3
    finish(start, tmp_path, data, tmp_path / "cache", whole)


def test_a_cache_build_with_many_workers_is_killed_and_built_again(start, tmp_path, data, whole):
    """The workers of a dead process let go of the cache's lock, and what they had begun is swept away."""
    run = start(again(tmp_path, data, tmp_path / "cache", "--workers 2"), "slow_pictures:0.3")
    run.until(lambda: list((tmp_path / "cache").rglob("*.half")), 30)
    time.sleep(0.2)
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    begun = time.monotonic()
    finish(start, tmp_path, data, tmp_path / "cache", whole)
    assert time.monotonic() - begun < 20


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
def test_the_workers_of_a_killed_build_go_with_it(start, tmp_path, data):
    """They would wait for ever at a pipe that nobody reads, hundreds of megabytes each."""
    argv = again(tmp_path, data, tmp_path / "cache", "--workers 2 --image-size 64")
    run = start(argv, "slow_pictures:0.1")
    run.until(lambda: list((tmp_path / "cache").rglob("*.half")), 30)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    run.until(lambda: len(children.read_text().split()) >= 2, 10)
    time.sleep(0.5)  # they have asked for their end by now
    workers = [Path(f"/proc/{pid}/stat") for pid in children.read_text().split()]
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL

    def alive(stat):
        with contextlib.suppress(OSError):
            return stat.read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    until = time.monotonic() + 2
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, workers))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
@pytest.mark.parametrize("how", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])  # Python 3.14's, macOS'
def test_workers_that_were_not_forked_go_with_a_killed_build_too(how, tmp_path):
    """Their parent is not the run, but a server of forks that outlives it."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, multiprocessing\nsys.path.insert(0, {str(Path(dcgan.__file__).parent)!r})\nimport dcgan\n"
        f"if __name__ == '__main__':\n    multiprocessing.set_start_method({how!r})\n    dcgan.main(sys.argv[1:])\n"
    )
    argv = [sys.executable, script, *command(tmp_path, "", tmp_path / "cache", "--workers 2 --image-size 128")]
    mark = f"DCGAN_TEST={tmp_path}".encode()
    run = subprocess.Popen(  # noqa: S603 - our own script
        [str(word) for word in argv], env={**os.environ, "DCGAN_TEST": str(tmp_path)}, stdout=subprocess.DEVNULL
    )

    def left():
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") and status != "Z":
                    found.append(int(pid))
        return found

    try:
        half, until = tmp_path / "cache", time.monotonic() + 60
        while not any(file.stat().st_size for file in half.glob(".*.half")) and time.monotonic() < until:
            time.sleep(0.05)
        assert any(half.glob(".*.half"))
        assert len(left()) > 2  # the run and its workers
        run.kill()
        run.wait()
        until = time.monotonic() + 30
        while left() and time.monotonic() < until:
            time.sleep(0.05)
        assert left() == []
    finally:
        for pid in left():
            os.kill(pid, signal.SIGKILL)


def test_what_a_killed_build_left_goes_when_other_pictures_are_built(start, tmp_path, data):
    """A half cache of another data set may be gigabytes: nobody would ever look for it."""
    run = start(command(tmp_path, data, tmp_path / "cache"), "die_writing:1")
    assert run.wait() == -signal.SIGKILL
    assert leftovers(tmp_path)
    more = tmp_path / "more"
    shutil.copytree(data, more)
    dcgan.draw_face(99, 16).save(more / "one_more.png")
    run = start(command(tmp_path / "other", more, tmp_path / "cache"))
    assert run.wait() == 0, run.output
    assert leftovers(tmp_path) == []


# ------------------------------------------------------------------------------------------------ caches gone bad


@pytest.mark.parametrize(
    "damage", ["no index", "empty index", "half an index", "short pictures", "no pictures", "empty"]
)
def test_a_damaged_cache_is_built_again(start, tmp_path, data, whole, damage):
    cache = tmp_path / "cache"
    shutil.copytree(whole / "cache", cache)
    index, pictures = next(cache.glob("*.json")), next(cache.glob("*.u8"))
    if damage == "no index":
        index.unlink()
    elif damage == "empty index":
        index.write_bytes(b"")
    elif damage == "half an index":
        index.write_bytes(index.read_bytes()[:20])
    elif damage == "short pictures":
        os.truncate(pictures, 1000)
    elif damage == "no pictures":
        pictures.unlink()
    else:
        index.unlink(), pictures.unlink()
    finish(start, tmp_path, data, cache, whole)


# ------------------------------------------------------------------------------------------------ disks


def one_line(run, *words):
    assert run.wait() == 2, run.output
    errors = [line for line in run.output.splitlines() if line.startswith("dcgan.py: ")]
    assert len(errors) == 1 and "Traceback" not in run.output, run.output
    assert all(word in errors[0] for word in words), errors
    return errors[0]


def test_a_full_disk_costs_no_checkpoint(start, tmp_path, data, whole):
    """Whichever file it is that no longer fits: one line names it, and all that was whole stays."""
    run = tmp_path / "run"
    assert start(command(tmp_path, data, whole / "cache", "--steps 4 --noise-steps 12")).wait() == 0
    good = (run / "checkpoint.pt").read_bytes()
    for fault in (  # "/log.jsonl": the line that a report appends
        f"small_files:{len(good) - 1} small_files:900 no_space:checkpoint no_space:config.json no_space:log.jsonl "
        "no_space:/log.jsonl no_space:generator no_space:losses no_space:samples.gif"
    ).split():
        line = one_line(start(["--run", run, "--resume", "--steps", "12"], fault))
        assert "File too large" in line or "No space left on device" in line
        assert str(run) in line and fault.split(":")[1].strip("0123456789") in line, "which file does not fit"
        if "small" in fault or "checkpoint" in fault:
            assert (run / "checkpoint.pt").read_bytes() == good
        dcgan.load(run / "checkpoint.pt"), dcgan.load(run / "generator.pt")
        assert leftovers(tmp_path) == []
    assert start(["--run", run, "--resume", "--steps", "12"]).wait() == 0
    for name in ("checkpoint.pt", "generator.pt"):
        same(saved(whole / "run" / name), saved(run / name))
    same(rows(whole / "run"), rows(run))


def test_no_room_for_the_cache_is_one_line_and_no_half_cache(start, tmp_path, data):
    one_line(start(command(tmp_path, data, tmp_path / "cache"), "small_files:5000"), ".u8", "File too large")
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("where", ["run", "cache"])
def test_a_folder_that_cannot_be_written_is_one_line(start, tmp_path, data, whole, where):
    """Below a file nobody can write, not even root, whom permissions do not stop."""
    (tmp_path / "file").write_text("no folder")
    places = {"run": tmp_path / "fine", "cache": whole / "cache"} | {where: tmp_path / "file"}
    one_line(start(command(places["run"], data, places["cache"])), str(tmp_path / "file"))


# ------------------------------------------------------------------------------------------------ signals


@pytest.fixture
def begun(start, tmp_path, data, whole):
    """-> a function that starts a run and waits until it has made some steps."""

    def begun(*faults, steps=4):
        run = start(again(tmp_path, data, whole / "cache"), *faults)
        log = tmp_path / "run" / "log.jsonl"
        run.until(lambda: log.exists() and log.read_text().count("\n") >= steps // 2)
        return run

    return begun


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_within_a_step_and_has_its_exit_code(begun, start, tmp_path, data, whole, number, code):
    run = begun("slow_steps:0.1")
    asked = time.monotonic()
    run.signal(number)
    assert run.wait(5) == code, run.output
    assert time.monotonic() - asked < 5
    step = saved(tmp_path / "run" / "checkpoint.pt")["step"]
    assert 4 <= step < 12 and f"stopped at step {step}" in run.output
    assert "Traceback" not in run.output
    finish(start, tmp_path, data, whole / "cache", whole)


def test_a_signal_sent_twice_at_once_is_one_signal(begun, start, tmp_path, data, whole):
    """`timeout` sends SIGTERM to its child and again to the group; torchrun and scancel do the like: still saved."""
    run = begun("slow_steps:0.2")
    step = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"]
    for _ in range(3):
        run.signal(signal.SIGTERM)
        time.sleep(0.02)
    assert run.wait(5) == 143, run.output
    assert saved(tmp_path / "run" / "checkpoint.pt")["step"] >= step
    finish(start, tmp_path, data, whole / "cache", whole)


def test_a_second_ctrl_c_leaves_at_once(begun, start, tmp_path, data, whole):
    """For instance during a save to a slow disk."""
    run = begun("slow_saves:20", steps=2)
    run.until((tmp_path / "run" / "saving").exists)
    run.signal(signal.SIGINT)
    time.sleep(1.2)
    assert run.poll() is None
    run.signal(signal.SIGINT)
    assert run.wait(2) == 130, run.output
    assert "Traceback" not in run.output
    (tmp_path / "run" / "saving").unlink()
    finish(start, tmp_path, data, whole / "cache", whole)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_during_the_cache_build_leaves_soon(start, tmp_path, data, whole, number, code, workers):
    """There is nothing to save yet, and the build may take minutes more."""
    slow = f"slow_pictures:{0.1 if workers else 0.5}"  # 18 s in all; a worker finishes the batch that it has begun
    run = start(command(tmp_path, data, tmp_path / "cache", "--workers", workers), slow)
    run.until(lambda: list((tmp_path / "cache").rglob("*.half")), 30)
    time.sleep(1)  # the workers are there: while Python forks, it may lose a Ctrl-C
    run.signal(number)
    assert run.wait(5) in (code, -number), run.output  # to a shell both are the same
    assert "Traceback" not in run.output, run.output
    assert not (tmp_path / "run" / "config.json").exists()
    finish(start, tmp_path, data, tmp_path / "cache", whole)


def test_a_time_limit_of_zero_saves_and_is_no_failure(start, tmp_path, data, whole):
    run = start(command(tmp_path, data, whole / "cache", "--time-limit 0s"))
    assert run.wait() == 0, run.output
    assert saved(tmp_path / "run" / "checkpoint.pt")["step"] <= 1
    run = start(["--run", tmp_path / "run", "--resume"])  # the line that the first one has printed
    assert run.wait() == 0
    assert saved(tmp_path / "run" / "checkpoint.pt")["step"] == 12, "the limit of the first start stopped the second"
    same_run(whole / "run", tmp_path / "run")


def test_a_time_limit_holds(start, tmp_path, data, whole):
    run = start(command(tmp_path, data, whole / "cache", "--time-limit 1s"), "slow_steps:0.25")
    assert run.wait(60) == 0, run.output
    assert 1 <= saved(tmp_path / "run" / "checkpoint.pt")["step"] < 12


@pytest.mark.parametrize("limit, seconds", [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5h", 5400)])
def test_a_time_limit_has_its_unit(limit, seconds, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(dcgan, "time", types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: None))
    with dcgan.stopping(limit) as code:
        for now[0], expected in ((seconds - 1, None), (seconds + 1, 0)):
            assert code() == expected


def test_a_signal_that_comes_again_just_after_the_end_kills_nobody():
    def work():
        with dcgan.stopping("") as code:
            os.kill(os.getpid(), signal.SIGTERM)
            assert code() == 143
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(0.3)

    assert in_child(work)[0] == 0


def test_signals_are_given_back_when_train_returns_or_raises(arguments, tmp_path, monkeypatch):
    """In a notebook the next Ctrl-C belongs to the notebook again."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert dcgan.main(arguments(tmp_path / "run", "--steps 1")) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert dcgan.main(arguments(tmp_path / "run", "--steps 1")) == 2  # there is a run
    monkeypatch.setattr(dcgan, "train_step", lambda *_: torch.zeros(6)[:5].add(float("nan")).view(7))
    with pytest.raises(RuntimeError):
        dcgan.main(arguments(tmp_path / "other", "--steps 1"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ------------------------------------------------------------------------------------------------ two at once


def test_two_runs_in_one_folder_are_one_too_many(begun, start, tmp_path, data, whole):
    first = begun("slow_steps:0.3", steps=2)
    before = (tmp_path / "run" / "log.jsonl").read_text()
    for argv in (["--run", tmp_path / "run", "--resume"], again(tmp_path, data, whole / "cache")):
        one_line(start(argv), str(tmp_path / "run"))
        assert (tmp_path / "run" / "log.jsonl").read_text().startswith(before)
    assert first.wait() == 0, first.output
    same_run(whole / "run", tmp_path / "run")


def test_of_two_runs_started_together_in_one_folder_one_trains(start, tmp_path, data, whole):
    both = [start(command(tmp_path, data, tmp_path / "cache"), "slow_steps:0.05") for _ in range(2)]
    codes = sorted(run.wait() for run in both)
    assert codes == [0, 2], [run.output for run in both]
    same_run(whole / "run", tmp_path / "run")
    assert start(["--run", tmp_path / "run", "--resume"]).wait() == 0  # no lock outlives its process


def test_two_runs_share_one_cache_build(start, tmp_path, data, whole):
    cache = tmp_path / "cache"
    runs = [start(command(tmp_path / name, data, cache), "slow_pictures:0.02") for name in "ab"]
    assert [run.wait() for run in runs] == [0, 0], [run.output for run in runs]
    assert sorted(word for run in runs for word in ("decoded into", "found in") if word in run.output) == [
        "decoded into",
        "found in",
    ]
    for name in "ab":
        same_run(whole / "run", tmp_path / name / "run")
    same_cache(whole / "cache", cache)


@pytest.mark.slow
def test_a_killed_kernel_build_is_built_again(tmp_path):
    """The first use of --fused compiles for a minute: whoever kills that finds no half library, no lock, no rubbish."""
    source = Path(dcgan.__file__).resolve().parent / "csrc"
    shutil.copytree(source, tmp_path / "csrc", ignore=shutil.ignore_patterns("_build", "*.so", "__pycache__"))
    command = [sys.executable, "-c", "import csrc, torch; csrc.load(torch.device('cpu'))"]
    env = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    for seconds in (0.5, 4, 10):
        build = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=-3, stderr=-3, start_new_session=True)  # noqa: S603
        end = time.monotonic() + 120
        while not list((tmp_path / "csrc").glob("_build/build-*")) and build.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            build.wait(seconds)
        if build.poll() is None:
            os.killpg(build.pid, signal.SIGKILL)
        assert build.wait() in (0, -signal.SIGKILL)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)  # noqa: S603
    if "could not be built" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "csrc").glob("_build/build-*")) == []

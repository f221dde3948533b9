"""Many processes train as one: equal weights, each picture once an epoch, one that writes; and none waits for the dead.
The processes are forked from a warm one and talk by gloo; the last tests start them by torchrun, as a user does."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import dcgan
from runs import free_port, leftovers, rows, same, same_run, saved

pytest_plugins = "runs"

OFTEN = "--report-every 2 --sample-every 4 --save-every 3"
TWO = "--steps 9 " + OFTEN  # 9 steps of 8: two epochs of the 36 pictures


@pytest.fixture
def together(start, tmp_path):
    """-> a function that starts one run in many processes: [Run of rank 0, ...]."""

    def together(argv, world=2, watch=None, faults=()):
        port = free_port()
        watched = [[f"watch:{tmp_path / watch}{rank}.pt"] if watch else [] for rank in range(world)]
        return [start(argv, *watched[rank], *faults, rank=rank, world=world, port=port) for rank in range(world)]

    return together


def done(runs, codes=(0,)):
    """All of them end, well."""
    for run in runs:
        assert run.wait() in codes, "\n".join(run.output for run in runs)
        assert "Traceback" not in run.output, run.output


def near(a, b, most, where=""):
    """Two states, equal but for rounding."""
    for name in a:
        if isinstance(a[name], dict):
            near(a[name], b[name], most, f"{where}/{name}")
        elif torch.is_tensor(a[name]):
            difference = (a[name].double() - b[name].double()).abs().max().item()
            assert difference <= most, f"{where}/{name}: {difference:.3g}"


def test_two_processes_are_one_run(together, arguments, tmp_path):
    """Equal weights, each picture once an epoch, one cache build, one writer, the noise of one."""
    options = "--flips --update fresh --noise 0.2 --augment"
    argv = arguments(tmp_path / "two", TWO, "--cache", tmp_path / "cache", options)
    runs = together(argv, watch="rank")
    done(runs)
    assert "training" not in runs[1].output and runs[1].output.strip() == "", runs[1].output
    assert "4 of --batch-size 8 in each process, where BatchNorm sees no others" in runs[0].output
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))

    parameters = [name for name in a["G"] if "running" not in name and "num_batches" not in name]
    assert len(parameters) > 3
    for net in "G", "D", "ema":  # BatchNorm's statistics are each process's own
        names = [name for name in a[net] if "running" not in name and "num_batches" not in name]
        same({n: a[net][n] for n in names}, {n: b[net][n] for n in names}, net)
    for opt in "opt_g", "opt_d":
        same(a[opt], b[opt], opt)
    assert a["D"]["sure"] != 0 and any("running" in name for name in a["G"])
    assert not torch.equal(a["G"]["blocks.0.bn.running_mean"], b["G"]["blocks.0.bn.running_mean"])
    same(saved(tmp_path / "two" / "checkpoint.pt")["G"], a["G"], "rank 0's statistics are the saved ones")

    assert sorted([a["decoded"], b["decoded"]]) == [0, 1]
    assert a["wrote"] and b["wrote"] == []

    done(together(arguments(tmp_path / "one", TWO, "--flips --update fresh --noise 0.2"), world=1, watch="alone"))
    alone = torch.load(tmp_path / "alone0.pt", weights_only=True)
    for step in range(9):  # both halves are what one process would see, noise, flips and all
        same(torch.cat([a["real"][step], b["real"][step]]), alone["real"][step], f"step {step}")
        same(torch.cat([a["noise"][step], b["noise"][step]], 1), alone["noise"][step], f"step {step}")
    assert torch.cat([a["noise"][0], b["noise"][0]]).unique(dim=0).shape[0] == 6  # none is given twice


def test_each_picture_is_seen_once_an_epoch(together, arguments, tmp_path):
    argv = arguments(tmp_path / "run", TWO, "--no-flips", preset="classic")
    done(together(argv, watch="rank"))
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["real"] for rank in range(2))
    stream = torch.cat([torch.cat(pair) for pair in zip(a, b, strict=True)]).flatten(1)
    assert len(stream) == 72 and len(stream.unique(dim=0)) == 36
    assert len(stream[:36].unique(dim=0)) == len(stream[36:].unique(dim=0)) == 36


def test_two_processes_train_as_one_would(together, arguments, tmp_path):
    """Where there is no BatchNorm and no dropout, to rounding: weights, optimisers and the log."""
    options = "--steps 6 --dropout 0 --noise 0.1 --noise-steps 9", OFTEN
    done(together(arguments(tmp_path / "two", *options, preset="keras")))
    done(together(arguments(tmp_path / "one", *options, preset="keras"), world=1))
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    near({name: one[name] for name in "GD"}, {name: two[name] for name in "GD"}, 2e-6)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=2e-5)


def test_a_run_goes_on_to_the_bit_with_as_many_processes(together, arguments, tmp_path):
    """A stop in the middle of a report: what each process has summed up is not lost."""
    options = TWO, "--spectral-norm --dropout2d 0.2"
    done(together(arguments(tmp_path / "whole", *options)))
    runs = together(arguments(tmp_path / "run", *options), faults=["stop_at:5"])
    done(runs, (143,))
    assert saved(tmp_path / "run" / "checkpoint.pt")["step"] == 5
    done(together(["--run", tmp_path / "run", "--resume"]))
    same_run(tmp_path / "whole", tmp_path / "run")
    assert leftovers(tmp_path) == []


def test_a_run_goes_on_with_another_number_of_processes(together, arguments, tmp_path):
    options = "--dropout 0 --noise-steps 9", OFTEN
    done(together(arguments(tmp_path / "one", "--steps 9", *options, preset="keras"), world=1))
    done(together(arguments(tmp_path / "run", "--steps 3", *options, preset="keras"), world=4))
    done(together(["--run", tmp_path / "run", "--resume", "--steps", "5"], world=1))
    done(together(["--run", tmp_path / "run", "--resume", "--steps", "9"], world=2))
    one, run = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "run"))
    near({name: one[name] for name in "GD"}, {name: run[name] for name in "GD"}, 5e-6)
    lines = [row["step"] for row in rows(tmp_path / "run")]
    assert lines == [2, 4, 6, 8]


def test_a_batch_that_cannot_be_divided_is_refused(together, arguments, tmp_path):
    runs = together(arguments(tmp_path / "run", "--steps 2 --batch-size 7"))
    done(runs, (2,))
    for run in runs:  # a line each: torchrun shows whichever ends first
        assert run.output.count("dcgan.py: ") == 1 and run.output.count("\n") == 1, run.output
        assert "batch-size 7" in run.output and "2 processes" in run.output
    assert not (tmp_path / "run" / "config.json").exists()


def test_processes_with_unequal_pictures_are_refused(together, arguments, tmp_path):
    """Two machines with a copy of the data each, one of them cut short: they would learn from different streams."""
    runs = together(arguments(tmp_path / "run", "--steps 2"), faults=["fewer_in_rank_1:3"])
    done(runs, (2,))
    for run in runs:
        assert re.search(r"one process has \d+ pictures, another 3: give all", run.output), run.output
    assert not (tmp_path / "run" / "config.json").exists()


def test_bad_numbers_of_one_process_move_none(together, arguments, tmp_path):
    """NaN in the share of one process: all of them decide alike, and stay equal."""
    argv = arguments(tmp_path / "run", "--steps 6 --report-every 6")
    runs = together(argv, watch="rank", faults=["nan_in_rank_1:3"])
    done(runs)
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for opt in "opt_g", "opt_d":
        same(a[opt], b[opt], opt)
    assert rows(tmp_path / "run")[0]["skipped"] == 1
    assert all(torch.isfinite(t).all() for t in a["G"].values())


def test_what_overflows_in_one_process_is_put_back_in_all(together, arguments, tmp_path):
    """Only that process sees its running statistics; u and v, the averaged G and the count are everybody's."""
    argv = arguments(tmp_path / "run", "--steps 6 --report-every 6 --spectral-norm --ema 0.9", preset="classic")
    runs = together(argv, watch="rank", faults=["huge_in_rank_1:3"])
    done(runs)
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for name, t in a["D"].items():
        if name.endswith((".u", ".v", "weight", "bias")):
            assert torch.equal(t, b["D"][name]), name
    for name, t in a["ema"].items():
        if "running" not in name:
            assert torch.equal(t, b["ema"][name]), name
    for state in a, b:
        assert all(torch.isfinite(t).all() for name in ("G", "D", "ema") for t in state[name].values())
    assert rows(tmp_path / "run")[0]["skipped"] == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_process_takes_the_run_down_with_a_message(together, arguments, tmp_path, rank):
    runs = together(arguments(tmp_path / "run", OFTEN, "--steps 100000"))
    runs[0].until(lambda: (tmp_path / "run" / "checkpoint.pt").exists())
    runs[rank].signal(signal.SIGKILL)
    assert runs[rank].wait() == -signal.SIGKILL
    other = runs[1 - rank]
    assert other.wait(20) == 1, other.output
    assert "dcgan.py: " in other.output and "Traceback" not in other.output, other.output
    dcgan.load(tmp_path / "run" / "checkpoint.pt")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_process_stops_and_saves_all(together, arguments, tmp_path, rank):
    runs = together(arguments(tmp_path / "run", OFTEN, "--steps 100000"))
    log = tmp_path / "run" / "log.jsonl"
    runs[0].until(lambda: log.exists() and log.read_text().count("\n") > 1)
    runs[rank].signal(signal.SIGTERM)
    done(runs, (143,))
    step = saved(tmp_path / "run" / "checkpoint.pt")["step"]
    assert f"stopped at step {step:,}" in runs[0].output


# ------------------------------------------------------------------------------------------------ torchrun


@contextlib.contextmanager
def torchrun(argv, output, world=2):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
    command += [f"--master-port={free_port()}", "--", dcgan.__file__, *map(str, argv)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(output, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env)  # noqa: S603
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # which takes its workers along
            process.wait(60)


def wait_for(process, ready, output, seconds=120):
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < end, output.read_text()
        time.sleep(0.05)


def test_torchrun_passes_sigterm_on_and_all_is_saved(arguments, start, tmp_path):
    output, log = tmp_path / "output.txt", tmp_path / "run" / "log.jsonl"
    with torchrun(arguments(tmp_path / "run", OFTEN, "--steps 100000 --save-every 100000"), output) as process:
        wait_for(process, lambda: log.exists() and log.read_text().count("\n") > 1, output)
        process.send_signal(signal.SIGTERM)
        process.wait(40)
    text = output.read_text()
    step = saved(tmp_path / "run" / "checkpoint.pt")["step"]
    assert f"stopped at step {step:,}" in text and text.count("go on:") == 1, text
    assert step >= rows(tmp_path / "run")[-1]["step"]
    assert leftovers(tmp_path) == []
    alone = start(["--run", tmp_path / "run", "--resume", "--steps", step + 2])
    assert alone.wait() == 0, alone.output


def children(pid):
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)  # noqa: S603, S607
    return [int(word) for word in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_torchrun_ends_when_a_process_is_killed(arguments, tmp_path, which):
    output, log = tmp_path / "output.txt", tmp_path / "run" / "log.jsonl"
    with torchrun(arguments(tmp_path / "run", OFTEN, "--steps 100000"), output) as process:
        wait_for(process, lambda: log.exists() and log.read_text().count("\n") > 1, output)
        workers = sorted(children(process.pid))
        assert len(workers) == 2
        os.kill(workers[which], signal.SIGKILL)
        assert process.wait(60) not in (0, None)
    assert "SIGKILL" in output.read_text() or "Signal 9" in output.read_text()
    dcgan.load(tmp_path / "run" / "checkpoint.pt")


@pytest.mark.slow
def test_ctrl_c_to_the_whole_group_is_saved(arguments, tmp_path):
    """A terminal's Ctrl-C reaches torchrun, and torchrun tells its workers: by then some have heard it already."""
    output, log = tmp_path / "output.txt", tmp_path / "run" / "log.jsonl"
    with torchrun(arguments(tmp_path / "run", OFTEN, "--steps 100000 --save-every 100000"), output) as process:
        wait_for(process, lambda: log.exists() and log.read_text().count("\n") > 1, output)
        for pid in [*children(process.pid), process.pid]:
            os.kill(pid, signal.SIGINT)
        process.wait(40)
    assert f"stopped at step {saved(tmp_path / 'run' / 'checkpoint.pt')['step']:,}" in output.read_text()

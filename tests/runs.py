"""Runs of dcgan.py for the tests: tiny ones in this process, or in processes forked from a warm one, which has imported
torch already: such a run starts in milliseconds and can be killed.  A pytest plugin: pytest_plugins = "runs".
(PYTEST_DONT_REWRITE: its asserts speak for themselves.)"""

import atexit
import builtins
import contextlib
import functools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pytest  # noqa: E402
import torch  # noqa: E402

import dcgan  # noqa: E402

TINY = {  # of each preset: seconds become milliseconds, and no kind of layer is lost
    "classic": "--image-size 16 --nz 8 --ngf 4 --ndf 4",
    "regularized": "--image-size 16 --nz 8 --ngf 4 --ndf 4",
    "keras": "--image-size 16 --nz 8 --ngf 4 --ndf 4",
    "mnist": "--image-size 14 --nz 8 --ngf 4 --ndf 4",
    "demo": "--image-size 16 --nz 8 --ngf 4 --ndf 4",
    "best": "--image-size 16 --nz 8 --ngf 4 --ndf 4",
}
N = 36  # pictures: at 8 a step an epoch ends within a batch, 4.5 steps long


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of drawn faces."""
    folder = tmp_path_factory.mktemp("faces")
    for i in range(N):
        dcgan.draw_face(i, 16).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def arguments(data, cache):
    """-> a function that gives the command line of a tiny run."""

    def arguments(run, *more, preset="demo"):
        tiny = f"--preset {preset} {TINY[preset]} --batch-size 8 --samples 4 --workers 0 --precision fp32"
        where = ["--data", str(data), "--cache", str(cache), "--run", str(run)]
        return [*tiny.split(), *where, *" ".join(map(str, more)).split()]

    return arguments


# ------------------------------------------------------------------------------------------------ comparing runs


def same(a, b, where=""):
    """Equal to the bit, types and all; `where` leads to what differs."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if torch.is_tensor(a):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        assert torch.equal(*bits), f"{where} differs by {(a.double() - b.double()).abs().max():.3g}"
    elif isinstance(a, dict):
        assert list(a) == list(b), f"{where}: {list(a)} and {list(b)}"
        for name in a:
            same(a[name], b[name], f"{where}/{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    else:
        assert a == b, f"{where}: {a!r} and {b!r}"


def saved(path):
    """-> what a file holds, but for the options that --resume may change."""
    contents = torch.load(path, weights_only=True)
    contents["config"] = {k: v for k, v in contents["config"].items() if k not in dcgan.MAY_CHANGE}
    return contents


def rows(run):
    """-> log.jsonl without its one column of time."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "img_s"} for line in lines]


def same_run(a, b):
    """All that two runs have left behind is equal: weights and states to the bit, pictures to the byte."""
    files = [{p.relative_to(run) for p in Path(run).rglob("*") if p.is_file()} for run in (a, b)]
    assert {f for f in files[0] ^ files[1] if f.name != ".lock"} == set()
    for file in sorted(files[0]):
        if file.suffix == ".pt":
            same(saved(a / file), saved(b / file), str(file))
        elif file.suffix in (".png", ".gif"):
            assert (a / file).read_bytes() == (b / file).read_bytes(), file
    same(rows(a), rows(b), "log.jsonl")


def leftovers(*folders):
    """-> the half written files and folders in them."""
    return [str(p) for folder in folders for p in Path(folder).rglob("*") if p.name.endswith(".half")]


def snapshot(folder):
    """-> {name: bytes} of all files: to see that nothing was touched."""
    files = (p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# ------------------------------------------------------------------------------------------------ stopping


def stop_after(monkeypatch, step, act=lambda: os.kill(os.getpid(), signal.SIGTERM)):
    """Let a signal arrive in this process in the middle of the training step that ends at `step`."""
    plain = dcgan.draw_inputs

    def draw_inputs(c, pictures, now, device):
        if now == step - 1:
            act()
        return plain(c, pictures, now, device)

    monkeypatch.setattr(dcgan, "draw_inputs", draw_inputs)


# ------------------------------------------------------------------------------------------------ warm processes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Run:
    """A run in a process of its own."""

    def __init__(self, warm, pid, output):
        self.warm, self.pid, self.file, self.code = warm, pid, output, None

    def signal(self, number):
        os.kill(self.pid, number)  # a zombie until we ask for its code: the id cannot be another's yet

    def poll(self):
        if self.code is None:
            self.code = self.warm.ask(wait=self.pid)
        return self.code

    def wait(self, seconds=60):
        """-> the exit code, negative after a signal.  One that hangs is killed and fails the test."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                self.wait()
                raise AssertionError(f"still running after {seconds} s:\n{self.output}")
            time.sleep(0.005)
        return self.code

    @property
    def output(self):
        return self.file.read_text(errors="replace")

    def until(self, ready, seconds=60):
        """Wait until ready() while the run goes on."""
        end = time.monotonic() + seconds
        while not ready():
            assert self.poll() is None, f"ended with {self.code}:\n{self.output}"
            assert time.monotonic() < end, self.output
            time.sleep(0.005)


class Warm:
    """A process that has imported dcgan and forks itself into runs."""

    def __init__(self):
        env = os.environ | {"OMP_NUM_THREADS": "1"}  # no thread is alive at the fork
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, env=env, text=True, stdin=-1, stdout=-1)  # noqa: S603

    def ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, argv, output, *faults, rank=0, world=1, port=0):
        """Start dcgan.main(argv); `faults` are names of functions below, "name:argument"."""
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        request = dict(argv=[str(a) for a in argv], output=str(output), faults=faults, env=env)
        return Run(self, self.ask(**request), Path(output))


@functools.cache
def one_warm():
    warm = Warm()
    atexit.register(warm.process.kill)
    return warm


@pytest.fixture
def start(tmp_path):
    """-> a function that starts a run in a process of its own; what a test leaves running is killed."""
    runs = []

    def start(argv, *faults, **ranks):
        runs.append(one_warm().start(argv, tmp_path / f"output{len(runs)}.txt", *faults, **ranks))
        return runs[-1]

    yield start
    for run in runs:
        if run.poll() is None:
            run.signal(signal.SIGKILL)
            run.wait()


# Faults: what a test wants to go wrong in the process of a run.


def die_at(number, names=("fsync", "replace", "rename", "unlink", "mkdir")):
    """kill -9 just before the number-th time that something on the disk gets its name, loses it or is made safe."""
    left = [int(number)]

    def wrap(plain):
        def call(*args, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **options)

        return call

    for name in names:
        setattr(os, name, wrap(getattr(os, name)))


def die_writing(number):
    """kill -9 with only half of the bytes of the number-th file written that is to get its name when it is whole."""
    left, plain = [int(number)], dcgan.written_whole

    class Half:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            data = bytes(data)
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def written_whole(path):
        left[0] -= 1
        with plain(path) as file:
            yield Half(file) if left[0] == 0 else file

    dcgan.written_whole = written_whole


def small_files(size):
    """A disk on which no file can grow beyond so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))


def no_space(name):
    """A disk that is full when a file of this name is written: /dev/full says so as a real one does, at the flush."""
    plain = builtins.open

    def full(file, mode="r", *args, **options):
        return plain("/dev/full" if name in str(file) and mode[0] in "wa" else file, mode, *args, **options)

    builtins.open = full


def slow_pictures(seconds):
    plain = dcgan.Pictures.open

    def open(self, name):
        time.sleep(float(seconds))
        return plain(self, name)

    dcgan.Pictures.open = open


def slow_steps(seconds):
    plain = dcgan.train_step

    def train_step(*args):
        time.sleep(float(seconds))
        return plain(*args)

    dcgan.train_step = train_step


def slow_saves(seconds):
    plain = dcgan.save

    def save(path, **contents):
        if path.name == "checkpoint.pt":
            path.with_name("saving").touch()
            time.sleep(float(seconds))
            path.with_name("saving").unlink()
        plain(path, **contents)

    dcgan.save = save


def stop_at(step):
    """SIGTERM to the last process while it makes this step."""
    plain = dcgan.draw_inputs

    def draw_inputs(c, pictures, now, device):
        if now == int(step) - 1 and dcgan.RANK == dcgan.WORLD - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(c, pictures, now, device)

    dcgan.draw_inputs = draw_inputs


def fewer_in_rank_1(n):
    plain = dcgan.load_pictures
    dcgan.load_pictures = lambda c: plain(c)[: int(n)] if dcgan.RANK == 1 else plain(c)


def nan_in_rank_1(step):
    """A real picture that is not a number, in one process only."""
    plain = dcgan.draw_inputs

    def draw_inputs(c, pictures, now, device):
        real, z, noise = plain(c, pictures, now, device)
        if now == int(step) and dcgan.RANK == 1:
            real[0, 0, 0, 0] = float("nan")
        return real, z, noise

    dcgan.draw_inputs = draw_inputs


def huge_in_rank_1(step):
    """A z whose variance overflows, in one process only: its loss and its gradients stay finite."""
    plain = dcgan.draw_inputs

    def draw_inputs(c, pictures, now, device):
        real, z, noise = plain(c, pictures, now, device)
        return real, z * 1e30 if now == int(step) and dcgan.RANK == 1 else z, noise

    dcgan.draw_inputs = draw_inputs


def watch(file):
    """Keep what this process saw: its share of pictures and noise, its last state, what it decoded and wrote."""
    seen = {"real": [], "noise": [], "decoded": 0, "wrote": []}
    set_up, decode_all, draw_inputs, plain = dcgan.set_up, dcgan.decode_all, dcgan.draw_inputs, builtins.open

    def decode(*args):
        seen["decoded"] += 1
        facts = decode_all(*args)
        seen["wrote"].clear()  # the cache is anybody's to build
        return facts

    def inputs(*args):
        real, z, noise = draw_inputs(*args)
        seen["real"].append(real.clone())
        seen["noise"].append(torch.as_tensor(noise).clone())
        return real, z, noise

    def note(path, mode="r", *args, **options):
        if mode[0] in "wax":
            seen["wrote"].append(str(path))
        return plain(path, mode, *args, **options)

    def keep(*args):
        run = set_up(*args)
        atexit.register(lambda: torch.save(seen | {name: p.state_dict() for name, p in run.stateful.items()}, file))
        return run

    dcgan.set_up, dcgan.decode_all, dcgan.draw_inputs, builtins.open = keep, decode, inputs, note


def serve():
    """The warm process: a request a line, an answer a line."""
    children = set()
    multiprocessing.set_start_method("fork", force=True)  # its workers are to know the faults; from 3.14 on no default
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            children.discard(pid)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                become(**request)
            children.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def become(argv, output, faults, env):
    """Of the forked process: be a run, as `python dcgan.py` would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    null, file = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for old, new in ((null, 0), (file, 1), (file, 2)):
        os.dup2(old, new)
    os.environ.update({name: str(value) for name, value in env.items()})
    dcgan.RANK, dcgan.WORLD = env["RANK"], env["WORLD_SIZE"]
    for fault in faults:
        name, _, argument = fault.partition(":")
        globals()[name](argument)
    code = 1
    try:
        code = dcgan.main(argv)
    except SystemExit as e:
        code = e.code
    except BaseException:  # what python would print
        sys.excepthook(*sys.exc_info())
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
        sys.stdout.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    sys.modules["runs"] = sys.modules["__main__"]
    serve()

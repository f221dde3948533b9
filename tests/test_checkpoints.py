"""A damaged, foreign or hostile checkpoint costs one clear line: it is never taken for whole, never runs code, and
nothing is overwritten because of it."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import in_child

import dcgan
from runs import same, snapshot

pytest_plugins = "runs"

MARK = "code_from_a_checkpoint_ran"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, cache):
    """A run of 3 steps, all parts in its checkpoint: EMA, running statistics, u and v."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    tiny = "--preset demo --spectral-norm --image-size 16 --nz 8 --ngf 4 --ndf 4 --batch-size 8 --samples 4 --steps 3"
    argv = [*tiny.split(), "--workers", "0", "--data", str(data), "--cache", str(cache), "--run", str(folder)]
    assert dcgan.main(argv) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def refused(run, capsys, *words, argv=None):
    """main says one line with these words, exits with 2, and leaves every file as it was; so does load."""
    before = snapshot(run)
    capsys.readouterr()
    assert dcgan.main([str(a) for a in argv or ["--run", run, "--resume", "--steps", "5"]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dcgan.py: ") and error.count("\n") == 1 and len(error) < 1000, error
    assert all(str(word) in error for word in words), error
    assert snapshot(run) == before


def damaged(file):
    """True: refused by one line.  False: taken, but then equal to what was written, bit for bit."""
    try:
        got = dcgan.load(file)
    except dcgan.UserError as e:
        assert str(file) in str(e) and "\n" not in str(e) and len(str(e)) < 1000
        return True
    return got


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["checkpoint.pt", "generator.pt"])
def test_a_truncated_file_is_refused_at_every_length(run, name):
    whole = (run / name).read_bytes()
    r = random.Random(0)  # noqa: S311
    lengths = {0, 1, 2, 3, 4, 10, 30, 100, *(len(whole) - n for n in (1, 2, 22, 100)), *r.sample(range(len(whole)), 40)}
    for length in lengths:
        (run / name).write_bytes(whole[:length])
        assert damaged(run / name) is True, f"the first {length} of {len(whole)} bytes were taken for a whole file"


def flips(run, name, positions):
    """Flip bytes of a file one by one; none may change what is loaded."""
    whole = bytearray((run / name).read_bytes())
    good, found = dcgan.load(run / name), 0
    for at in positions(len(whole)):
        whole[at] ^= 0xFF
        (run / name).write_bytes(whole)
        whole[at] ^= 0xFF
        got = damaged(run / name)
        if got is True:
            found += 1
        else:
            same(got, good, f"byte {at}")
    return found


@pytest.mark.parametrize("name", ["checkpoint.pt", "generator.pt"])
def test_a_flipped_byte_is_found_or_harmless(run, name):
    sampled = random.Random(1)  # noqa: S311
    assert flips(run, name, lambda size: sampled.sample(range(size), 120)) > 10


@pytest.mark.slow
def test_each_single_flipped_byte_is_found_or_harmless(run):
    assert flips(run, "generator.pt", range) > 100


def test_a_flipped_bit_in_a_weight_is_found(run, capsys):
    """torch.load itself does not look at the checksums."""
    for name, command in ("checkpoint.pt", None), ("generator.pt", ["generate", run, "--seeds", "0"]):
        saved = torch.load(run / name, weights_only=True)
        weight = next(t for t in saved["G"].values() if t.numel() > 100)
        bytes_of = bytes(weight.untyped_storage())  # in the order of the file, channels_last
        whole = bytearray((run / name).read_bytes())
        whole[whole.index(bytes_of) + 50] ^= 1
        (run / name).write_bytes(whole)
        refused(run, capsys, run / name, argv=command)


def test_a_weight_that_calls_itself_a_folder_is_no_random_memory(run):
    """One flipped bit of the zip's directory, under no checksum: torch then returns what was in memory."""
    whole = bytearray((run / "generator.pt").read_bytes())
    entries = [m.start() for m in re.finditer(rb"PK\x01\x02", whole)]
    assert len(entries) > 5
    for entry in entries:
        whole[entry + 38] ^= 0x10
        (run / "generator.pt").write_bytes(whole)
        whole[entry + 38] ^= 0x10
        assert damaged(run / "generator.pt") is True


@pytest.mark.parametrize("what", ["empty", "text", "zip", "jpeg", "folder", "random", "old torch", "link that loops"])
def test_what_is_no_checkpoint_is_refused(run, capsys, what):
    file = run / "checkpoint.pt"
    file.unlink()
    if what == "empty":
        file.touch()
    elif what == "text":
        file.write_text("<html>404: not found</html>\n" * 9)  # what a download may leave
    elif what == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("../../outside", "climbs out")
    elif what == "jpeg":
        shutil.copy(run / "samples" / "real.png", file)
    elif what == "folder":
        file.mkdir()
    elif what == "random":
        file.write_bytes(random.Random(2).randbytes(5000))  # noqa: S311
    elif what == "old torch":
        torch.save({"format": dcgan.FORMAT}, file, _use_new_zipfile_serialization=False)
    else:
        file.symlink_to(file.name)
    refused(run, capsys, file)
    refused(run, capsys, file, argv=["generate", file, "--seeds", "0"])
    assert not (run.parent / "outside").exists()


# ------------------------------------------------------------------------------------------------ foreign


def rewrite(file, **changes):
    saved = torch.load(file, weights_only=True)
    for name, value in changes.items():
        if value is None:
            del saved[name]
        elif isinstance(value, dict):
            saved[name].update(value)
        else:
            saved[name] = value
    torch.save(saved, file)


@pytest.mark.parametrize("number", [0, dcgan.FORMAT + 1, -1, "1", None, 1.5])
def test_another_format_is_refused(run, capsys, number):
    rewrite(run / "checkpoint.pt", format=number)
    refused(run, capsys, "checkpoint.pt")


@pytest.mark.parametrize("preset", ["classic", "regularized", "keras", "mnist"])
def test_a_checkpoint_of_another_preset_is_refused(run, trained, arguments, tmp_path, capsys, preset):
    assert dcgan.main(arguments(tmp_path / "other", "--steps 1", preset=preset)) == 0
    shutil.copy(tmp_path / "other" / "checkpoint.pt", run / "checkpoint.pt")
    refused(run, capsys, "checkpoint.pt")


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"lr_g": 0.1}, {"preset": "classic"}, {"noise": 0.9}, {"dropout2d": 0.7}]
)
def test_a_checkpoint_of_another_experiment_with_equal_shapes_is_refused(run, capsys, change):
    rewrite(run / "checkpoint.pt", config=change)
    refused(run, capsys, *change)


@pytest.mark.parametrize("name", ["G", "D", "ema", "opt_g", "opt_d", "step", "sums", "config"])
def test_a_checkpoint_that_lacks_a_part_is_refused(run, capsys, name):
    rewrite(run / "checkpoint.pt", **{name: None})
    refused(run, capsys, "checkpoint.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"step": "7"},
        {"step": -1},
        {"step": torch.ones(3)},
        {"sums": torch.zeros(5)},
        {"G": {"blocks.0.layer.weight": torch.zeros(1)}},
        {"G": {"blocks.0.layer.weight": "no tensor"}},
        {"G": {"another": torch.zeros(1)}},
        {"opt_g": {"state": {}, "param_groups": []}},
        {"opt_d": {"state": "none"}},
    ],
    ids=str,
)
def test_parts_of_the_wrong_kind_are_refused(run, capsys, change):
    rewrite(run / "checkpoint.pt", **change)
    refused(run, capsys, "checkpoint.pt")


# ------------------------------------------------------------------------------------------------ hostile


class Bomb:
    """What is loaded by a careless pickle.load runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def bombs(folder):
    """-> {name: bytes} of files that would make the mark if anything in them were run."""
    command = f"touch {folder / MARK}"
    whole, hidden, legacy = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"format": dcgan.FORMAT, "config": Bomb(command)}, whole)
    torch.save({"format": dcgan.FORMAT, "G": {"weight": torch.zeros(3), "x": [Bomb(command)]}}, hidden)
    torch.save({"format": dcgan.FORMAT, "step": Bomb(command)}, legacy, _use_new_zipfile_serialization=False)
    return {
        "a pickle": pickle.dumps({"format": dcgan.FORMAT, "config": Bomb(command)}),
        "protocol 0": f"cos\nsystem\n(S'{command}'\ntR.".encode(),
        "torch": whole.getvalue(),
        "torch, deep inside": hidden.getvalue(),
        "torch of old": legacy.getvalue(),
    }


@pytest.mark.parametrize("name", ["a pickle", "protocol 0", "torch", "torch, deep inside", "torch of old"])
@pytest.mark.parametrize("place", ["checkpoint.pt", "generator.pt", "snapshots/generator_000003.pt"])
def test_a_hand_made_pickle_runs_nothing(run, capsys, name, place):
    (run / place).write_bytes(bombs(run.parent)[name])
    with pytest.raises(dcgan.UserError):
        dcgan.load(run / place)
    with pytest.raises(dcgan.UserError):
        dcgan.load_generator(run / place)
    for command in "generate", "interpolate":
        refused(run, capsys, run / place, argv=[command, run / place, "--seeds", "0-2"])
    if place == "checkpoint.pt":
        refused(run, capsys, run / place)
    assert not (run.parent / MARK).exists()


def test_the_bombs_would_go_off_in_a_careless_reader(tmp_path):
    """Else the test above could not fail."""
    for name, contents in bombs(tmp_path).items():
        (tmp_path / MARK).unlink(missing_ok=True)
        load = pickle.loads if not name.startswith("torch") else torch.load  # noqa: S301
        options = {} if load is pickle.loads else {"weights_only": False}
        load(contents if load is pickle.loads else io.BytesIO(contents), **options)
        assert (tmp_path / MARK).exists(), name


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(("fsync", os.fstat(fd).st_size)) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(("rename", os.path.getsize(a))) or replace(a, b))
    with dcgan.written_whole(tmp_path / "f") as file:
        file.write(b"x" * 100)
    assert done == [("fsync", 100), ("rename", 100)]


def test_a_half_file_that_cannot_be_removed_hides_nothing(tmp_path, monkeypatch):
    def unlink(*_, **__):
        raise PermissionError("held by a scanner")

    monkeypatch.setattr(Path, "unlink", unlink)
    with dcgan.written_whole(tmp_path / "good") as file:
        file.write(b"all of it")
    assert (tmp_path / "good").read_bytes() == b"all of it"
    with pytest.raises(KeyboardInterrupt), dcgan.written_whole(tmp_path / "never"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("times", [2, 99])
def test_a_file_that_another_program_has_open_gets_its_name_a_little_later(times, tmp_path, monkeypatch):
    """On Windows: a viewer of losses.png, a virus scanner."""
    left, waited, replace = [times], [], os.replace

    def held(a, b):
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(13, "Access is denied")
        replace(a, b)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(time, "sleep", waited.append)
    expected = (
        pytest.raises(dcgan.UserError, match="cannot write.*intact.*Access is denied")
        if times > 9
        else contextlib.nullcontext()
    )
    with expected, dcgan.written_whole(tmp_path / "f") as file:
        file.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == (["f"] if times < 9 else [])
    assert len(waited) == min(times, 3) and sum(waited) < 5


HOSTILE = [
    {"ngf": 2**40},
    {"ngf": 2**20, "image_size": 256},
    {"ngf": 1600},  # small enough to be had
    {"ngf": 10**30},
    {"nz": -1},
    {"nz": "8"},
    {"nz": 8.0},
    {"ngf": True},
    {"ngf": [4]},
    {"ngf": None},
    {"image_size": 2**31},
    {"image_size": 0},
    {"image_size": -16},
    {"image_size": float("nan")},
    {"nc": 10**9},
    {"family": "../../etc/passwd"},
    {"family": ["dcgan"]},
    {"preset": "__class__"},
    {"preset": {}},
    {"slope": "os.system"},
    {"bn_eps": float("nan")},
    {"samples": 10**12},
    {"batch_size": 0},
    {"__class__": "x"},
    {"no such option": 1},
    {5: 6},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_hostile_values_in_a_checkpoint_are_one_line(run, capsys, change):
    """Whoever draws from a stranger's file gets pictures or one line: no traceback, no code, no memory gone."""
    rewrite(run / "generator.pt", config=change)

    def read():
        try:
            G = dcgan.load_generator(run / "generator.pt")
        except dcgan.UserError as e:
            assert "\n" not in str(e) and len(str(e)) < 1000
        else:  # a value that drawing does not depend on
            assert dcgan.draw(G, dcgan.latent([0], 8), torch.device("cpu")).shape == (1, 3, 16, 16)

    code, grown = in_child(read)
    assert code == 0 and grown < 200  # MB


CONFIGS = ["", "{", "[]", "null", "7", '"x"', "[" * 100_000, '{"preset": 1}', '{"ngf": "64"}', '{"epochs": "x"}']
CONFIGS += [
    '{"preset": "demo", "nz": 1e999}',
    '{"preset": "demo", "steps": -5}',
    '{"seed": 1.5}',
    '{"lr_g": NaN}',
    "\0" * 99,
]


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:30] or "empty")
def test_a_config_that_is_none_is_one_line(run, capsys, text):
    (run / "config.json").write_text(text)
    refused(run, capsys, run)


def test_a_config_file_of_another_language_is_one_line(run, capsys):
    (run / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(run, capsys, "config.json")


def test_an_option_younger_than_the_run_is_off_in_it_whatever_its_preset_says_now(run):
    """Runs of `best` from before it had self-modulation and augmentation draw and go on as they were."""
    config = json.loads((run / "config.json").read_text()) | {"preset": "best"}
    for name in ("self_modulation", "augment"):
        assert getattr(dcgan.config("best"), name) and not config.pop(name)
    assert dcgan.config("best").family != config["family"]  # which each of them names
    before = dcgan.load_generator(run)
    for file in run.rglob("*.pt"):
        saved = torch.load(file, weights_only=True)
        torch.save({**saved, "config": config}, file)
    (run / "config.json").write_text(json.dumps(config))
    after, z = dcgan.load_generator(run), torch.randn(4, config["nz"])
    assert after.config.preset == "best" and not (after.config.self_modulation or after.config.augment)
    assert torch.equal(before(z), after(z))
    assert dcgan.main(["--run", str(run), "--resume", "--steps", "4"]) == 0
    assert dcgan.load(run / "checkpoint.pt")["step"] == 4


def test_options_given_from_a_stranger_s_config_reach_no_shell(run, capsys):
    """A run's folder may come from anyone: the paths in it are looked up, and that is all."""
    config = json.loads((run / "config.json").read_text())
    config["data"] = f"$(touch {run.parent / MARK}); `touch {run.parent / MARK}`"
    (run / "config.json").write_text(json.dumps(config))
    refused(run, capsys, "$(touch")
    assert not (run.parent / MARK).exists()


# ------------------------------------------------------------------------------------------------ the source


def sources():
    root = Path(dcgan.__file__).resolve().parent
    return [root / "dcgan.py", root / "setup.py", *root.glob("csrc/*.py"), *root.glob("benchmarks/*.py")]


def test_weights_only_everywhere():
    """The default is True since torch 2.6, but a default may be changed by an environment variable."""
    for file in sources():
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", file.read_text() if file.exists() else ""):
            assert "weights_only=True" in call, f"{file.name}: {call}"


def test_the_environment_cannot_switch_the_safety_off(run, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (run / "checkpoint.pt").write_bytes(bombs(run.parent)["torch"])
    with pytest.raises(dcgan.UserError):
        dcgan.load(run / "checkpoint.pt")
    assert not (run.parent / MARK).exists()


def test_a_checkpoint_holds_tensors_and_plain_values_only(run):
    def walk(value):
        assert value is None or isinstance(value, torch.Tensor | dict | list | tuple | str | int | float), type(value)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []:
            walk(part)

    for file in run.rglob("*.pt"):
        walk(torch.load(file, weights_only=True))

"""No shell, no foreign pickle, nothing written outside: what a linter can see of it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dcgan

pytest_plugins = "runs"

ROOT = Path(dcgan.__file__).resolve().parent
SOURCES = [file for file in (ROOT / "dcgan.py", ROOT / "setup.py", *sorted(ROOT.glob("csrc/*.py"))) if file.exists()]


def calls(file):
    """-> (name as written, call) of all calls in a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_the_security_rules_of_ruff_are_clean():
    try:
        version = subprocess.run([sys.executable, "-m", "ruff", "--version"], capture_output=True)  # noqa: S603
    except OSError:
        pytest.skip("ruff is not installed")
    if version.returncode:
        pytest.skip("ruff is not installed: pip install -e '.[test]'")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "S", *map(str, SOURCES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_each_exception_from_the_rules_is_argued(file):
    for number, line in enumerate(file.read_text().splitlines(), 1):
        for rest in re.findall(r"# noqa(.*)", line):
            assert re.match(r": [A-Z]+\d+(, [A-Z]+\d+)* - \w+", rest), f"{file.name}:{number} says no reason"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_no_shell_and_no_evaluated_text(file):
    bad = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "marshal.loads"}
    bad |= {"subprocess.getoutput", "subprocess.getstatusoutput", "np.load", "numpy.load", "torch.jit.load"}
    for name, call in calls(file):
        assert name not in bad, f"{file.name}:{call.lineno} calls {name}"
        shell = [k.value for k in call.keywords if k.arg == "shell"]
        assert not shell or ast.unparse(shell[0]) == "False", f"{file.name}:{call.lineno} starts a shell"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_torch_load_takes_weights_only(file):
    for name, call in calls(file):
        if name.endswith("torch.load") or name == "load_state_dict_from_url":
            options = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert options.get("weights_only") == "True", f"{file.name}:{call.lineno}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_no_archive_is_unpacked(file):
    """Members are read, one by one, into memory: a path that climbs out has nowhere to climb."""
    for name, call in calls(file):
        assert name.split(".")[-1] not in ("extract", "extractall", "unpack_archive"), f"{file.name}:{call.lineno}"


def test_dcgan_starts_no_program_and_opens_no_connection():
    text = (ROOT / "dcgan.py").read_text()
    for module in ("subprocess", "socket", "urllib", "requests", "pickle", "shelve", "marshal"):
        assert not re.search(rf"^\s*(import|from) {module}\b", text, re.M), module


def test_a_zip_whose_names_climb_out_writes_nothing_outside(arguments, tmp_path):
    import io
    import zipfile

    face = io.BytesIO()
    dcgan.draw_face(0, 16).save(face, "PNG")
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    names = ["../up.png", "../../../upper.png", "/tmp/absolute_dcgan.png", "a/../../b.png", "C:\\windows.png", "ok.png"]  # noqa: S108
    with zipfile.ZipFile(inside / "faces.zip", "w") as archive:
        for name in names:
            archive.writestr(name, face.getvalue())
    argv = arguments(inside / "run", "--steps 1")
    argv[argv.index("--data") + 1] = str(inside / "faces.zip")
    assert dcgan.main(argv) == 0
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(inside)]
    assert outside == [] and not Path("/tmp/absolute_dcgan.png").exists()  # noqa: S108

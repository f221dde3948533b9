"""How the kernels are built, found and refused: each row of the table in csrc/README.md, and the literal install.

What takes minutes (installs, builds) is marked slow: pytest tests/test_build.py -m slow
"""
# ruff: noqa: S603

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path

import _distutils_hack
import pytest
import setuptools
import torch
from conftest import load_kernels

import dcgan

ROOT = Path(__file__).resolve().parents[1]
ops = dcgan.fused_ops()
build = ops.build
try:
    build.check_torch()
except build.CannotBuild as why:
    pytest.skip(str(why), allow_module_level=True)

USE = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("dcgan_ops", "csrc/__init__.py", submodule_search_locations=["csrc"])
ops = importlib.util.module_from_spec(spec)
sys.modules["dcgan_ops"] = ops
spec.loader.exec_module(ops)
import torch
try:
    ops.load("cpu")
except ops.Unavailable as why:
    print("UNAVAILABLE", why)
else:
    x = torch.randn(4, 3, 5, 5)
    y = ops.bn_leaky_relu(x, None, None, None, None, True, 0.1, 1e-5, 0.2)
    expected = torch.nn.functional.leaky_relu(torch.nn.functional.batch_norm(x, None, None, training=True), 0.2)
    torch.testing.assert_close(y, expected)
    print("WORKS")
print(*ops.status(), sep="\\n")
"""


@pytest.fixture
def project(tmp_path):
    """-> a copy of what a clone would hold, without anything built."""
    target = tmp_path / "project"
    target.mkdir()
    for name in ("dcgan.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    shutil.copytree(ROOT / "csrc", target / "csrc", ignore=shutil.ignore_patterns("_build", "*.so", "__pycache__"))
    return target


@pytest.fixture
def venv(tmp_path):
    """-> a fresh environment, not activated, with the packages of this one in sight."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    lib = tmp_path / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (lib / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv"


OURS = ("PYTHONPATH", "DCGAN_KERNELS", "TORCH_EXTENSIONS_DIR")  # of the environment: a test sets its own


def environment(**changes):
    return {**{k: v for k, v in os.environ.items() if k not in OURS}, **changes}


def use(project, python=sys.executable, **changes):
    """-> what USE prints, run in the project."""
    done = subprocess.run(
        [python, "-c", USE], cwd=project, env=environment(**changes), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(project, venv, *flags, **changes):
    done = subprocess.run(
        [venv / "bin" / "python", "-m", "pip", "install", *flags, "."],
        cwd=project, env=environment(**changes), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def no_compiler(tmp_path):
    """-> a PATH with the tools of an ordinary system but no compiler"""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "env", "uname", "ldconfig", "git"):
        if shutil.which(tool):
            (folder / tool).symlink_to(shutil.which(tool))
    return {"PATH": str(folder), "CXX": "", "CC": ""}


# --------------------------------------------------------------------------------------------- what is found


def test_a_library_carries_its_facts():
    ops.load("cpu")
    path, why = ops.libraries.find("cpu")
    facts = build.read_facts(path)
    assert not why and facts == json.loads(ops.libraries.loaded["cpu"].facts)
    assert facts["sources"] == build.source_hash("cpu") and facts["torch_target"] == build.TARGET


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are ELF files on Linux")
def test_a_part_of_a_library_has_no_facts(tmp_path):
    """pip copies it in pieces: what loads one that is not whole dies of SIGBUS."""
    ops.load("cpu")
    path, _ = ops.libraries.find("cpu")
    data, part = path.read_bytes(), tmp_path / path.name
    for size in (0, 60, *(len(data) * percent // 100 for percent in (50, 80, 90, 99)), len(data) - 1):
        part.write_bytes(data[:size])
        assert build.read_facts(part) == {}
    part.write_bytes(data)
    assert build.read_facts(part) == build.read_facts(path) != {}


@pytest.mark.parametrize("headers", ["include", "targets/x86_64-linux/include"])  # the latter as conda-forge has them
def test_a_toolkit_is_found_by_its_compiler_and_headers(headers, tmp_path, monkeypatch):
    home = tmp_path / "toolkit"
    (home / headers).mkdir(parents=True)
    (home / "bin").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(home))
    (home / headers / "cuda_runtime.h").touch()
    with contextlib.suppress(build.CannotBuild):  # another one may be here
        assert build.cuda_home() != str(home)
    (home / "bin" / "nvcc").touch()
    assert build.cuda_home() == str(home)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_source_is_hashed(project, kind):
    spec = importlib.util.spec_from_file_location("other_build", project / "csrc" / "build.py")
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    before = other.source_hash(kind)
    assert before == build.source_hash(kind)
    mine = [*(p for p in (project / "csrc").iterdir() if p.suffix in (".cpp", ".h", ".cu", ".cuh"))]
    changed = set()
    for path in mine:
        text = path.read_text()
        path.write_text(text + "\n// edited\n")
        if other.source_hash(kind) != before:
            changed.add(path.name)
        path.write_text(text)
    lines = [line for p in mine if p.name in changed for line in p.read_text().splitlines()]
    included = {line.split('"')[1] for line in lines if line.startswith('#include "')}
    assert set(build.SOURCES[kind]) <= changed and included <= changed


def test_other_flags_are_other_kernels(monkeypatch):
    for name in ("CXX_FLAGS", "NVCC_FLAGS"):
        before = [build.source_hash(kind) for kind in build.SOURCES]
        monkeypatch.setattr(build, name, [*getattr(build, name), "-O1"])
        assert all(build.source_hash(kind) != old for kind, old in zip(build.SOURCES, before, strict=True))


def test_a_stale_library_is_passed_by(project):
    ops.load("cpu")
    path, _ = ops.libraries.find("cpu")
    shutil.copy(path, project / "csrc" / build.file_name("cpu"))
    assert "WORKS" in use(project)  # the very same sources: nothing to build
    with (project / "csrc" / "schemas.cpp").open("a") as file:
        file.write("// edited\n")
    said = use(project, CXX="no-such-compiler")
    assert "UNAVAILABLE" in said and "CXX names no-such-compiler" in said and "is of other sources" in said


def test_a_damaged_library_says_what_to_do(project):
    ops.load("cpu")
    whole = ops.libraries.find("cpu")[0].read_bytes()
    at = whole.index(b"dcgan-ops-facts")
    (project / "csrc" / build.file_name("cpu")).write_bytes(whole[at : at + 1000])
    said = use(project)
    assert "UNAVAILABLE" in said and "do not load" in said and "delete that file" in said


def test_no_compiler_is_one_line(project, tmp_path):
    said = use(project, XDG_CACHE_HOME=str(tmp_path / "cache"), **no_compiler(tmp_path))
    (line,) = [line for line in said.splitlines() if line.startswith("UNAVAILABLE")]
    assert "no C++ compiler found" in line and "install g++" in line and "leave --fused out" in line
    assert "cpu: no kernels yet; no C++ compiler found" in said


@pytest.fixture
def only(monkeypatch, tmp_path):
    """-> a function that leaves these programs on the PATH, all empty; what use_compiler sets is undone at the end."""

    def leave(*names):
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        for name in ("CC", "CXX", "CXXFLAGS", "LDSHARED"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)

    return leave


def test_a_compiler_of_another_name_is_what_torch_will_call(only):
    """torch calls c++ where CXX names none: here there is only a clang++."""
    only("clang++", "cc", "gcc")
    build.use_compiler()
    assert os.environ["CXX"] == "clang++"


@pytest.mark.parametrize("cxx", ["g++ -isystem /x", "ccache g++ -isystem /x", "/usr/bin/ccache g++ -isystem /x"])
def test_a_compiler_with_flags_or_a_launcher_is_taken_apart(cxx, only, monkeypatch):
    """torch takes CXX for the name of one program."""
    only("g++", "cc", "gcc")
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("CXXFLAGS", "-g")
    build.use_compiler()
    assert os.environ["CXX"] == "g++" and os.environ["CXXFLAGS"].split() == ["-isystem", "/x", "-g"]


def test_without_a_home_nothing_is_built_in_the_current_folder(monkeypatch):
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry in passwd
    assert ops.libraries._roots() == [ops.libraries.HERE / "_build"]


def test_a_file_system_without_locks_is_passed_over(monkeypatch, tmp_path):
    from filelock import FileLock

    def no_locks(*_):
        raise OSError(37, "No locks available")

    assert ops.libraries._writable(tmp_path, "cpu.lock")
    with FileLock(tmp_path / "cpu.lock"):
        assert ops.libraries._writable(tmp_path, "cpu.lock")  # held by another: worth waiting for
    monkeypatch.setattr("fcntl.flock", no_locks)
    assert not ops.libraries._writable(tmp_path, "cpu.lock")


def test_kernels_installed_from_other_sources_are_not_those_beside_dcgan_py(project, monkeypatch):
    """After a git pull, or from a second checkout."""
    old = types.SimpleNamespace(__file__=str(project / "csrc" / "__init__.py"), bn_leaky_relu=None)
    monkeypatch.setitem(sys.modules, "dcgan_ops", old)
    assert dcgan.fused_ops() is old
    with open(project / "csrc" / "columns.h", "a") as file:
        file.write("// changed")
    assert Path(dcgan.fused_ops().__file__) == ROOT / "csrc" / "__init__.py"


def test_another_csrc_beside_dcgan_py_is_not_ours(monkeypatch, tmp_path):
    """Many extensions of torch have a folder of that name."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "__init__.py").touch()
    ours = types.SimpleNamespace(__file__=ops.__file__, bn_leaky_relu=None)
    monkeypatch.setitem(sys.modules, "dcgan_ops", ours)
    monkeypatch.setattr(dcgan, "__file__", str(tmp_path / "dcgan.py"))
    assert dcgan.fused_ops() is ours
    monkeypatch.setitem(sys.modules, "dcgan_ops", types.ModuleType("dcgan_ops"))  # a folder without anything in it
    monkeypatch.setitem(sys.modules, "csrc", types.ModuleType("csrc"))
    with pytest.raises(dcgan.UserError, match="no fused kernels here"):
        dcgan.fused_ops()


@pytest.mark.parametrize("where, asked", [("/scratch/build-env-x", True), ("/opt/venv", False), ("/scratched", False)])
def test_an_active_environment_is_asked_only_where_the_build_has_one_of_its_own(where, asked, monkeypatch):
    """pip runs the Python that it installs for; conda's base, active beside it, is another."""
    spec = importlib.util.spec_from_file_location("other_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    pythons = []
    monkeypatch.setattr(setup.tempfile, "gettempdir", lambda: "/scratch")
    gone = types.SimpleNamespace(stdout="")
    monkeypatch.setattr(setup.subprocess, "run", lambda command, **_: pythons.append(command[0]) or gone)
    monkeypatch.setattr(setup.sys, "prefix", where)
    monkeypatch.setenv("CONDA_PREFIX", "/conda")
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert list(setup.environment_paths()) == []
    assert pythons == [sys.executable, *(["/conda/bin/python"] if asked else [])]


def test_two_copies_of_the_kernels_in_one_process_are_one_line(project):
    load_kernels(ops, "cpu")
    path, _ = ops.libraries.find("cpu")
    shutil.copy(path, project / "csrc")
    code = (
        f"import sys, dcgan\ndcgan.fused_ops().load('cpu')\nsys.path.insert(0, {str(project)!r})\n"
        "for name in [n for n in sys.modules if n.split('.')[0] in ('csrc', 'dcgan_ops')]: del sys.modules[name]\n"
        "import csrc\nassert 'project' in csrc.__file__\n"
        "try: csrc.load('cpu')\nexcept csrc.Unavailable as why: print('SAID', why)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "SAID this process has loaded another copy" in done.stdout, done


def test_windows_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(build.CannotBuild, match="not written for Windows: work in WSL, or leave --fused out"):
        build.find_compiler()


def test_old_torch_is_one_line(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    with pytest.raises(ops.Unavailable, match="need torch 2.11 or later, this is 2.10.1: update torch, or leave"):
        ops.load("cpu")
    monkeypatch.setattr(ops.libraries, "find", lambda kind: (None, None))
    assert any("need torch 2.11" in line for line in ops.status())


def test_what_the_installation_said_is_told_though_it_says_built(monkeypatch, tmp_path):
    record, why = tmp_path / "install.txt", "torch 2.13.0 is built without CUDA: install a CUDA build of torch first"
    record.write_text(f"cpu: built\ncuda: {why}\n")
    monkeypatch.setattr(ops.libraries, "RECORD", record)
    monkeypatch.setattr(ops.libraries, "find", lambda kind: (None, None))
    told = [line for line in ops.status() if "at the installation" in line]
    assert told == [f"cuda: at the installation: {why}"]


def test_cuda_refusals(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(build.CannotBuild, match="built without CUDA: install a CUDA build"):
        build.find_cuda()
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    (home / "bin" / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.1'\n")
    (home / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    with pytest.raises(build.CannotBuild, match="is of CUDA 12.4, torch is built for CUDA 13.2: set CUDA_HOME"):
        build.find_cuda()
    monkeypatch.setattr(torch.version, "cuda", "12.8")  # another minor version will do
    assert build.find_cuda() == (str(home), "12.4")


def test_architectures_cover():
    def covers(built, capability):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            patch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
            patch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"])
            return ops.libraries.covers(built)

    assert covers("8.0,9.0+PTX", (8, 6)) and covers("8.0,9.0+PTX", (9, 0)) and covers("8.0,9.0+PTX", (12, 0))
    assert not covers("8.0,9.0+PTX", (7, 5)) and not covers("9.0", (10, 0)) and not covers("8.6", (8, 0))
    assert covers("9.0a", (9, 0)) and covers("8.0,9.0a", (8, 9))  # as NVIDIA's images ask
    assert not covers("9.0a", (9, 1)) and not covers("10.0a", (9, 0)) and not covers("", (9, 0))


@pytest.mark.parametrize(
    "asked, list",
    [("", "7.5"), ("9.0a", "9.0a"), ("9.0f", "9.0"), ("8.0, 9.0+PTX", "8.0;9.0+PTX"), ("8.6;", "8.6"),
     ("Hopper", "7.5"), ("Ampere;8.9", "8.9"), ("native", "7.5")],
)  # fmt: skip
def test_architectures_asked_for(monkeypatch, asked, list):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    assert build.architectures() == list
    if not ops.libraries.covers(list):  # said before a minute of compiling
        with pytest.raises(ops.Unavailable, match="which not every GPU here can run: unset it"):
            ops.libraries.build_here("cuda")


def test_a_gpu_that_this_torch_cannot_use_stands_in_no_ones_way(monkeypatch):
    """An old one for the screen beside the one that computes."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (6, 1)][index])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "sm_120", "compute_120"])
    assert build.architectures() == "9.0" and ops.libraries.covers("8.0,9.0+PTX")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_50", "sm_90"])  # as torch for CUDA 12.6
    assert build.architectures() == "6.1;9.0" and not ops.libraries.covers("8.0,9.0+PTX")


def test_a_cuda_library_of_another_cuda_is_passed_by(monkeypatch, tmp_path):
    monkeypatch.setattr(ops.libraries, "HERE", tmp_path)
    facts = {"sources": build.source_hash("cuda"), "cuda": "12.6", "architectures": "9.0"}
    (tmp_path / build.file_name("cuda")).write_bytes(b"dcgan-ops-facts " + json.dumps(facts).encode())
    monkeypatch.setattr(ops.libraries, "_roots", lambda: [])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "is of CUDA 12.6, torch of CUDA 13.0" in ops.libraries.find("cuda")[1]
    key = ops.libraries._key("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")  # of one major version: they go together
    assert ops.libraries.find("cuda")[0]
    assert ops.libraries._key("cuda") != key  # two environments on one checkout build beside each other
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert ops.libraries._key("cuda") == key.replace("cu13", "cu12")


def test_a_cuda_library_that_fails_leaves_the_cpu_whole(project):
    """Asking for CUDA first, in vain, must not cost the CPU ops their gradients."""
    ops.load("cpu")
    shutil.copy(ops.libraries.find("cpu")[0], project / "csrc" / build.file_name("cpu"))
    first = "torch.cuda.is_available = lambda: True\ntry: ops.load('cuda')\nexcept Exception: print('NO CUDA')\n"
    last = "print('GRADIENT', torch.autograd.grad(y.sum(), x))"
    code = USE.replace("try:\n", first + "try:\n", 1).replace("5, 5)", "5, 5, requires_grad=True)", 1) + last
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=environment(CUDA_HOME="/nowhere", CXX="no-such-compiler"),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "NO CUDA" in said.stdout and "WORKS" in said.stdout and "GRADIENT" in said.stdout, said.stderr


def test_what_a_killed_build_left_is_swept(monkeypatch, tmp_path):
    """By the next build of the same library only: another one may be at work beside it."""
    for name in ("build-cpu-killed", "build-cuda-at-work"):
        (tmp_path / name / "temp").mkdir(parents=True)
    monkeypatch.setattr(ops.libraries, "_roots", lambda: [tmp_path])
    monkeypatch.setattr(ops.libraries, "HERE", tmp_path)  # no library, and no build.py to run
    with pytest.raises(ops.Unavailable, match="the cpu kernels could not be built: .*all of it: "):
        ops.libraries.build_here("cpu")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["build-cuda-at-work"]


def test_kernels_option_is_checked(project):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=project,
        env=environment(DCGAN_KERNELS="yes"),
        capture_output=True,
    )
    assert done.returncode and b"DCGAN_KERNELS is auto, cpu, off or require; got 'yes'" in done.stderr


def test_required_kernels_without_torch_are_one_line(project, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    (tmp_path / "site").mkdir()
    for package in (setuptools, _distutils_hack):
        (tmp_path / "site" / package.__name__).symlink_to(os.path.dirname(package.__file__))
    alone = {"VIRTUAL_ENV": "", "CONDA_PREFIX": "", "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", "setup.py", "build_ext"],
        cwd=project, env=environment(DCGAN_KERNELS="require") | alone,
        capture_output=True, text=True,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert done.returncode and "cpu: left out: this build sees no torch" in last, done.stderr


@pytest.mark.skipif(not shutil.which("nvcc") or torch.version.cuda is None, reason="no nvcc, or torch without CUDA")
def test_a_gpu_younger_than_the_toolkit(project):
    command = [sys.executable, "csrc/build.py", "cuda", "--into", "out"]
    asked = environment(TORCH_CUDA_ARCH_LIST="99.0")
    done = subprocess.run(command, cwd=project, env=asked, capture_output=True, text=True)
    assert done.returncode and "set TORCH_CUDA_ARCH_LIST=9.0+PTX" in done.stderr.splitlines()[-1], done.stderr


# -------------------------------------------------------------------------------------------------- compiling


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
@pytest.mark.skipif(
    torch.version.cuda is None, reason="torch is built without CUDA: its headers may lack what CUDA needs"
)
@pytest.mark.parametrize("source", [s for s in build.SOURCES["cuda"] if s.endswith(".cu")])
def test_cuda_sources_compile(source, tmp_path):
    """For sm_80 and sm_90, so that they cannot rot where there is no GPU; not optimised, which takes long."""
    home = build.cuda_home()
    include = Path(torch.__file__).parent / "include"
    command = [
        f"{home}/bin/nvcc",
        "-std=c++20",
        *build.COMMON,
        "-Xptxas=-O0",
        "--threads=2",
        "-Xcompiler=-fPIC",
        "-DUSE_CUDA",
    ]
    command += [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)] + [f"-I{include}", f"-I{home}/include"]
    done = subprocess.run(
        [*command, "-c", ROOT / "csrc" / source, "-o", tmp_path / "x.o"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")
def test_the_module_takes_the_pybind11_of_torch_2_11(tmp_path):
    """Which refuses to be included beside the stable ABI; at the installation there may be no other."""
    (tmp_path / "pybind11").mkdir()
    (tmp_path / "pybind11" / "pybind11.h").write_text(
        "#ifdef TORCH_TARGET_VERSION\n#error refused\n#endif\n"
        "struct M { const char *&doc(), *&attr(const char *); };\n#define PYBIND11_MODULE(name, m) void f(M m)\n"
    )
    command = ["c++", "-fsyntax-only", *build.COMMON, f"-I{tmp_path}", "-DTORCH_EXTENSION_NAME=_cpu", "module.cpp"]
    done = subprocess.run(command, cwd=ROOT / "csrc", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_plain_loops_for_other_compilers(project):
    """Without target_clones, as on other processors: the same results."""
    assert "WORKS" in use(project, DCGAN_NO_CLONES="1")


@pytest.mark.slow
def test_first_use_by_two_at_once_and_after_a_kill(project):
    first = subprocess.Popen([sys.executable, "-c", USE], cwd=project, env=environment(), start_new_session=True)
    while not list(project.glob("csrc/_build/build-*/temp/**/*.o.d")) and first.poll() is None:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    both = [
        subprocess.Popen([sys.executable, "-c", USE], cwd=project, env=environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert all("WORKS" in process.communicate(timeout=900)[0] for process in both)
    assert len(list(project.glob("csrc/_build/*/*.so"))) == 1


def test_a_lock_that_cannot_be_taken_sends_the_build_to_the_next_place(tmp_path):
    """It may be another user's.  The one here cannot be opened by anyone, not even by root."""
    (tmp_path / "cpu.lock").mkdir()
    assert not ops.libraries._writable(tmp_path, "cpu.lock") and ops.libraries._writable(tmp_path, "cuda.lock")


@pytest.mark.slow
def test_first_use_where_the_package_cannot_be_written(project, tmp_path):
    (project / "csrc" / "_build").write_text("in the way")
    assert "WORKS" in use(project, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").glob("torch_extensions/dcgan_ops/*/*.so"))


@pytest.mark.slow
def test_a_source_that_does_not_compile(project):
    with (project / "csrc" / "schemas.cpp").open("a") as file:
        file.write("this is no C++\n")
    said = use(project)
    (line,) = [line for line in said.splitlines() if line.startswith("UNAVAILABLE")]
    assert "could not be built" in line and "schemas.cpp" in line and "error" in line


# ------------------------------------------------------------------------------------------------- installing


@pytest.mark.slow
def test_pip_install_editable(project, venv):
    """Literally; with the torch that is there, without any environment variable, in an environment not activated."""
    code, said = install(project, venv, "-e")
    assert code == 0, said
    record = (project / "csrc" / "_build" / "install.txt").read_text()
    assert "cpu: built" in record
    if torch.version.cuda and shutil.which("nvcc"):
        assert "cuda: built" in record
    code = "import dcgan_ops; dcgan_ops.load('cpu'); print(*dcgan_ops.status(), sep='\\n')"
    done = subprocess.run(
        [venv / "bin" / "python", "-c", code], cwd="/", env=environment(), capture_output=True, text=True
    )
    assert str(project / "csrc" / build.file_name("cpu")) in done.stdout, done.stderr


@pytest.mark.slow
def test_pip_install_copies_the_sources_too(project, venv):
    code, said = install(project, venv, DCGAN_KERNELS="cpu")
    assert code == 0, said
    shutil.rmtree(project)
    code = "import dcgan_ops; dcgan_ops.load('cpu'); print(*dcgan_ops.status(), sep='\\n')"
    done = subprocess.run(
        [venv / "bin" / "python", "-c", code], cwd="/", env=environment(), capture_output=True, text=True
    )
    assert "cpu: kernels ready" in done.stdout and str(venv) in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_pip_install_without_a_compiler(project, venv, tmp_path):
    bare = no_compiler(tmp_path)
    code, said = install(project, venv, "-e", **bare)
    assert code == 0, said
    assert "cpu: left out: no C++ compiler found" in (project / "csrc" / "_build" / "install.txt").read_text()
    code, said = install(project, venv, "-e", DCGAN_KERNELS="require", **bare)
    assert code != 0 and "DCGAN_KERNELS=require" in said and "no C++ compiler found" in said


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc") or torch.version.cuda is None, reason="no nvcc, or torch without CUDA")
def test_pip_install_with_a_cuda_source_that_does_not_compile(project, venv):
    with (project / "csrc" / "spectral_norm_cuda.cu").open("a") as file:
        file.write("this is no CUDA\n")
    code, said = install(project, venv, "-e")
    assert code == 0, said
    record = (project / "csrc" / "_build" / "install.txt").read_text()
    assert "cpu: built" in record and "cuda: did not compile" in record and "error" in record

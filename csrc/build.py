"""How the two libraries of dcgan_ops are compiled: the CPU kernels (_cpu) and the CUDA kernels (_cuda).

setup.py imports this for `pip install`; dcgan_ops runs it for the first use (`python build.py cpu --into DIR`).
Both go through torch's cpp_extension with the same sources and flags.  Importing it needs neither torch nor
setuptools.

Two libraries, because a CUDA library that does not load must not take the CPU kernels with it.  Both use torch's
stable ABI of 2.11 only: one build serves torch 2.11 and every later version.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = {
    "cpu": ["module.cpp", "schemas.cpp", "bn_leaky_relu.cpp", "spectral_norm.cpp"],
    "cuda": ["module.cpp", "bn_leaky_relu_cuda.cu", "spectral_norm_cuda.cu"],
}
OLDEST_TORCH = (2, 11)
TARGET = "0x020b000000000000"  # the ABI of torch 2.11
COMMON = ["-O3", f"-DTORCH_TARGET_VERSION={TARGET}"]
# loops become vectors only where no errno and no floating-point trap can be observed; a * b + c rounds once
CXX_FLAGS = [*COMMON, "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden"]
NVCC_FLAGS = [*COMMON, "--threads=2"]
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"  # where no GPU says which: Ampere, Hopper, and through PTX what follows


class CannotBuild(RuntimeError):
    """One line: why a library cannot be built here, and what to do."""


def source_hash(kind):
    """-> 12 hex digits that change with every source and fixed flag; a library carries those it was built from."""
    headers = {"checks.h", *(path.name for path in HERE.glob("*.h" if kind == "cpu" else "*.cuh"))}
    digest = hashlib.sha256(repr((CXX_FLAGS, NVCC_FLAGS)).encode())
    for name in SOURCES[kind] + sorted(headers):
        digest.update(name.encode() + (HERE / name).read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:12]


def file_name(kind):
    return f"_{kind}{sysconfig.get_config_var('EXT_SUFFIX')}"


def read_facts(path):
    """-> what module.cpp wrote into the library, read from the file without loading it; {} if there is none, or if the
    file is not whole: pip copies it in pieces, and to load a part of it is a SIGBUS, no error."""
    try:
        data = Path(path).read_bytes()
        if data.startswith(b"\x7fELF"):  # 64 bits, little-endian; the table of sections is its end
            table, size, count = (int.from_bytes(data[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
            data = data if len(data) >= table + size * count else b""
        found = re.search(rb'dcgan-ops-facts (\{"sources".*?\})', data)
        return json.loads(found[1]) if found else {}
    except (OSError, ValueError):
        return {}


# ------------------------------------------------------------------------------------- what this machine has


def check_torch():
    import torch

    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise CannotBuild(
            f"the fused kernels need torch 2.11 or later, this is {torch.__version__}: "
            "update torch, or leave --fused out"
        )


def words_of_cxx():
    """-> compiler and flags, without a launcher: of "ccache g++ -m64" g++ and -m64."""
    launchers = ("ccache", "sccache", "distcc")
    return [word for word in os.environ.get("CXX", "").split() if os.path.basename(word) not in launchers]


def find_compiler():
    """-> the C++ compiler: what CXX names, else the usual ones."""
    if sys.platform == "win32":
        raise CannotBuild("the fused kernels are not written for Windows: work in WSL, or leave --fused out")
    named = words_of_cxx()[:1]
    found = [c for c in named or ("c++", "g++", "clang++") if shutil.which(c)]
    if not found:
        raise CannotBuild(
            f"no C++ compiler found ({'CXX names ' + named[0] if named else 'c++, g++, clang++'}): install g++ "
            "(apt install g++, dnf install gcc-c++) or set CXX, or leave --fused out"
        )
    return found[0]


def use_compiler():
    """Let torch and setuptools find that compiler, and ninja of this environment."""
    cxx = find_compiler()
    if flags := words_of_cxx()[1:]:  # torch takes all of CXX for the name of one program
        os.environ["CXXFLAGS"] = " ".join([*flags, os.environ.get("CXXFLAGS", "")])
    if os.environ.get("CXX"):
        os.environ["CXX"] = cxx
    if not shutil.which("c++"):  # which torch calls where CXX is not set
        os.environ.setdefault("CXX", cxx)
    if not shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]):
        os.environ.setdefault("CC", cxx)  # this Python was compiled with one that is not here
        os.environ.setdefault("CXX", cxx)
        os.environ.setdefault("LDSHARED", f"{cxx} -shared")
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")


def cuda_home():
    """-> the CUDA toolkit: a folder with both bin/nvcc and the headers (nvcc on PATH may be a wrapper script)."""
    on_path = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if on_path:
        guesses.insert(2, os.path.dirname(os.path.dirname(os.path.realpath(on_path))))
    for home in filter(None, guesses):
        headers = (*Path(home).glob("include/cuda_runtime.h"), *Path(home).glob("targets/*/include/cuda_runtime.h"))
        if os.path.isfile(f"{home}/bin/nvcc") and headers:  # the second place is conda-forge's
            return home
    raise CannotBuild(
        f"no CUDA toolkit found ({'only ' + on_path if on_path else 'no nvcc'}; looked at CUDA_HOME, PATH and "
        "/usr/local/cuda): install one and set CUDA_HOME, or leave --fused out"
    )


def find_cuda():
    """-> (toolkit folder, nvcc's version such as "13.0"), of the CUDA that torch is built for."""
    import torch

    if torch.version.cuda is None:
        raise CannotBuild(f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch first")
    home, wanted = cuda_home(), torch.version.cuda
    nvcc = [f"{home}/bin/nvcc", "--version"]
    text = subprocess.run(nvcc, capture_output=True, text=True).stdout  # noqa: S603 - the toolkit's own, no shell
    release = re.search(r"release (\d+)\.(\d+)", text)
    if not release:
        raise CannotBuild(f"{home}/bin/nvcc does not run: set CUDA_HOME to a toolkit that works")
    if release[1] != wanted.split(".")[0]:
        raise CannotBuild(
            f"nvcc in {home} is of CUDA {release[1]}.{release[2]}, torch is built for CUDA {wanted}: "
            f"set CUDA_HOME to a toolkit of CUDA {wanted.split('.')[0]}"
        )
    return home, f"{release[1]}.{release[2]}"


def gpus():
    """-> the compute capabilities of the GPUs that are here, (major, minor), sorted.  Those older than any that this
    torch was built for, such as one for the screen, are left out: it cannot use them."""
    import torch

    if not torch.cuda.is_available():
        return []
    built = [divmod(int(name[3:]), 10) for name in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", name)]
    have = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return sorted(gpu for gpu in have if gpu >= min(built, default=gpu))


def architectures():
    """-> what to compile CUDA for: the numbers in TORCH_CUDA_ARCH_LIST (a name, such as Hopper, tells load() nothing,
    and the f of 10.0f torch does not know), else the GPUs that are here, else the default."""
    asked = re.findall(r"\d+\.\d+a?(?:\+PTX)?", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if asked:
        return ";".join(asked)
    return ";".join(f"{major}.{minor}" for major, minor in gpus()) or DEFAULT_ARCHITECTURES


# ------------------------------------------------------------------------------------------------- the build


def extension(kind, folder):
    """-> the setuptools Extension dcgan_ops._cpu or dcgan_ops._cuda; `folder` holds the sources.

    Raises CannotBuild where it is known beforehand that it cannot be compiled here.
    """
    check_torch()
    use_compiler()
    home, cuda = find_cuda() if kind == "cuda" else (None, "none")
    if kind == "cuda":
        os.environ["CUDA_HOME"] = home  # where cpp_extension is not imported yet, it reads this
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    import torch
    from torch.utils import cpp_extension

    if kind == "cuda":
        cpp_extension.CUDA_HOME = home
    facts = {
        "SOURCES": source_hash(kind),
        "CUDA": cuda,
        "ARCHITECTURES": architectures().replace(";", ",") if kind == "cuda" else "none",
        "TORCH": torch.__version__,
    }
    defines = [f"-DDCGAN_{name}={value}" for name, value in facts.items()]
    if os.environ.get("DCGAN_NO_CLONES"):
        defines.append("-DDCGAN_NO_CLONES")
    flags = {"cxx": CXX_FLAGS + defines, "nvcc": NVCC_FLAGS}
    make = cpp_extension.CUDAExtension if kind == "cuda" else cpp_extension.CppExtension
    return make(
        f"dcgan_ops._{kind}",
        [os.path.join(folder, name) for name in SOURCES[kind]],
        include_dirs=pybind11_include(),
        extra_compile_args=flags,
    )


def pybind11_include():
    try:
        import pybind11

        return [pybind11.get_include()]
    except ImportError:
        return []  # torch brings a copy of the headers


def build_command(say):
    """-> the build_ext command: each library on its own; say(kind, "built" or why not)."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildEach(BuildExtension):
        def build_extensions(self):
            wanted, self.extensions, folder = self.extensions, [], self.build_temp
            built, compiler = [], dict(vars(self.compiler))
            for one in wanted:
                kind = one.name.rsplit("_", 1)[1]
                self.extensions, self.build_temp = [one], os.path.join(folder, kind)
                with output_to_file() as output:
                    try:
                        super().build_extensions()
                        built.append(one)
                        why = None
                    except (Exception, SystemExit) as error:  # torch and setuptools raise what they like
                        why = f"{error}" or type(error).__name__
                lines = [line.strip() for line in (output.text + (why or "")).splitlines() if line.strip()]
                # with the colon: the command, which ninja repeats, may hold -Werror=...
                fatal = [line for line in lines if re.search(r"\bfatal( error)?\s*:", line)]  # nvcc's stands first
                errors = [line for line in lines if re.search(r"\berror( \w+)?\s*:", line, re.I)]
                telling = (fatal or errors or [why or ""])[0][:200]
                new = re.search("nsupported gpu arch|Unknown CUDA arch", telling)  # a GPU younger than the toolkit
                hint = ": set TORCH_CUDA_ARCH_LIST=9.0+PTX, or take a newer toolkit and torch" if new else ""
                say(kind, f"did not compile: {telling}{hint}" if why else "built")
                vars(self.compiler).clear()
                vars(self.compiler).update(compiler)  # torch wraps its methods anew for each
            self.extensions = built

    return BuildEach


@contextlib.contextmanager
def output_to_file():
    """Collect what compilers print, for the line that says why; then print it."""
    result, saved = types.SimpleNamespace(text=""), [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield result
        finally:
            sys.stdout.flush()
            for number, old in zip((1, 2), saved, strict=True):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            result.text = file.read().decode(errors="replace")
            print(result.text, end="", flush=True)


def main(kind, into):
    """Build one library into the folder `into`.  What dcgan_ops does on first use, in a process of its own."""
    from setuptools import Distribution

    into = os.path.abspath(into)
    os.chdir(HERE.parent)  # setuptools wants relative paths to sources
    said = {}
    dist = Distribution({"name": "dcgan_ops", "ext_modules": [extension(kind, HERE.name)]})
    dist.cmdclass["build_ext"] = build_command(said.__setitem__)
    build = dist.get_command_obj("build_ext")
    build.build_temp, build.build_lib = os.path.join(into, "temp"), os.path.join(into, "lib")
    build.ensure_finalized()
    build.run()
    if said[kind] != "built":
        raise SystemExit(f"cannot build: {said[kind]}")
    os.replace(os.path.join(into, "lib", "dcgan_ops", file_name(kind)), os.path.join(into, file_name(kind)))


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[3])
    except CannotBuild as why:
        raise SystemExit(f"cannot build: {why}") from None

"""pip install -e . : builds the fused kernels against the torch that is installed, and never fails for want of them.

pip builds in an environment of its own, where the torch of the user is hidden.  So this file is its own build
backend (pyproject.toml): it asks the Python that pip runs for the paths of the real environment and imports torch
from there.  Nothing is downloaded that is there already, and the installed torch is never changed.  Where there is
no torch yet, no compiler, or a kernel that does not compile, the rest installs, a line says why, `python dcgan.py
info` repeats it, and the first --fused builds what is missing.

    DCGAN_KERNELS=auto      what can be built (the default)
                  cpu       the CPU kernels only
                  off       none
                  require   all that this torch can use; anything missing is an error
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
KINDS = ("cpu", "cuda")

# ------------------------------------------------------------------------------------- the environment behind pip


def environment_paths():
    """Yield the sys.path of each environment that this may be an installation into; not that of pip's build."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")}
    pythons = [sys.executable]
    if Path(tempfile.gettempdir()).resolve() in Path(sys.prefix).resolve().parents:  # python -m build
        pythons += [f"{os.environ[v]}/bin/python" for v in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(v)]
    for python in pythons:
        ask = "import sys, json; print(json.dumps([sys.version_info[:2], sys.path]))"
        try:
            done = subprocess.run(  # noqa: S603 - this interpreter, no shell
                [python, "-c", ask], env=env, cwd=os.path.dirname(python), capture_output=True, text=True, timeout=60
            )
            version, paths = json.loads(done.stdout)
        except (OSError, ValueError, subprocess.SubprocessError):
            continue
        if tuple(version) == sys.version_info[:2]:
            yield [path for path in paths if os.path.isdir(path) and path != os.path.dirname(python)]


def expose(module):
    """Make `import module` work, from the real environment if need be.  -> whether it does."""
    if importlib.util.find_spec(module) is None:
        for paths in environment_paths():
            if any(os.path.isdir(os.path.join(path, module)) for path in paths):
                sys.path.extend(path for path in paths if path not in sys.path)
                importlib.invalidate_caches()
                break
    return importlib.util.find_spec(module) is not None


# ------------------------------------------------------------------------------------------ hooks of PEP 517, 660


def get_requires_for_build_wheel(config_settings=None):
    """setuptools, if there is none that knows the licence of pyproject.toml; of the versions that torch takes."""
    wanted = "setuptools>=77"
    if expose("torch"):
        for line in importlib.metadata.requires("torch") or ():
            limit = re.match(r"setuptools\s*\(?([<>=!~0-9.,\s]+)", line)
            wanted += f",{limit[1].strip()}" if limit else ""
    if expose("setuptools"):
        version = importlib.metadata.version("setuptools")
        if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) >= (77, 0):
            return []
    return [wanted]


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel


def hook(name):
    def call(*args, **kwargs):
        expose("setuptools")
        from setuptools import build_meta

        return getattr(build_meta, name)(*args, **kwargs)

    return call


build_wheel = hook("build_wheel")
build_editable = hook("build_editable")
build_sdist = hook("build_sdist")
prepare_metadata_for_build_wheel = hook("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = hook("prepare_metadata_for_build_editable")

# ------------------------------------------------------------------------------------------------------ the build

record = {}  # kind -> one line: "built", or why not


def say(kind, text):
    record[kind] = text
    print(f"[dcgan_ops] {kind}: {text}", file=sys.stderr, flush=True)


def load_build():
    spec = importlib.util.spec_from_file_location("dcgan_ops_build", HERE / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernels():
    """-> (extensions to build, commands of setup that build them); says why one is left out."""
    asked = os.environ.get("DCGAN_KERNELS", "auto")
    if asked not in ("auto", "cpu", "off", "require"):
        raise SystemExit(f"DCGAN_KERNELS is auto, cpu, off or require; got {asked!r}")
    if asked == "off" or not expose("torch"):
        why = "DCGAN_KERNELS=off" if asked == "off" else "this build sees no torch (uv: --no-build-isolation)"
        for kind in KINDS:
            say(kind, f"left out: {why}")
        return [], {}
    build, extensions = load_build(), []
    for kind in KINDS:
        if kind == "cuda" and asked == "cpu":
            say(kind, "left out: DCGAN_KERNELS=cpu")
            continue
        try:
            extensions.append(build.extension(kind, "csrc"))
        except Exception as why:  # a torch that does not import must not stop the rest
            say(kind, f"left out: {why}")
    if not extensions:
        return [], {}
    return extensions, {"build_ext": recording(build.build_command(say))}


def recording(command):
    """build_ext that also leaves `record` in the package, where status() finds it."""

    class BuildAndRecord(command):
        def run(self):
            super().run()
            write_record("csrc" if self.inplace or self.editable_mode else f"{self.build_lib}/dcgan_ops")

    return BuildAndRecord


def write_record(package):
    path = HERE / package / "_build" / "install.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{kind}: {text}\n" for kind, text in record.items()))


def requirements():
    """-> what pip shall install.  A torch that is there stays: torchvision, if missing, must be the one that fits."""
    torch = "torch>=2.6"
    if expose("torch") and importlib.util.find_spec("torchvision") is None:
        torch = "torch==" + importlib.metadata.version("torch").split("+")[0]
    return [torch, "torchvision>=0.21", "numpy", "ninja", "pybind11", "tqdm"]


def main():
    from setuptools import setup

    builds = {"build_ext", "bdist_wheel", "editable_wheel", "develop", "install", "build"} & set(sys.argv)
    extensions, commands = kernels() if builds else ([], {})
    setup(
        py_modules=["dcgan"],
        packages=["dcgan_ops"],
        package_dir={"dcgan_ops": "csrc"},
        package_data={"dcgan_ops": ["*.cpp", "*.h", "*.cu", "*.cuh", "*.md"]},
        install_requires=requirements(),
        ext_modules=extensions,
        cmdclass=commands,
    )
    if builds and not extensions and "bdist_wheel" not in builds:
        write_record("csrc")
    missing = [f"{kind}: {text}" for kind, text in record.items() if text != "built"]
    if os.environ.get("DCGAN_KERNELS") == "require" and builds and missing:
        if expose("torch") and not any(line.startswith("cpu") for line in missing):
            import torch

            if not torch.version.cuda:
                return  # no CUDA kernels for a torch that could not use them
        raise SystemExit("DCGAN_KERNELS=require: " + "; ".join(missing))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()

"""What the benchmarks of the step, the data and the drawing share: the machine's facts, medians, tables, results."""

import contextlib
import datetime
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import dcgan  # noqa: E402, F401 - after the path to it; the benchmarks take it from here


def facts(device, note=""):
    """-> what a figure is worth nothing without: device, versions, commit, command."""
    got = {"device": cpu_name(), "cores": cores()}
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch finds no CUDA device here; leave it out to measure the CPU")
        got = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        query = output("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader")
        got["driver, power limit"] = query
    commit = output("git", "rev-parse", "--short", "HEAD")
    changed = output("git", "status", "--porcelain", "--", "dcgan.py", "csrc", "benchmarks/*.py")
    return got | {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit + (" with changes" if changed else ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "note": note,
    }


def cores():
    """-> how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags")).split()
        has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
        return f"{name} ({', '.join(has)})"
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def output(*command):
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # noqa: S603 - our own words
    except OSError:
        return ""
    return done.stdout.strip()


def median_of(values):
    """-> the median, and the distance between the largest and the smallest as a share of it."""
    median = statistics.median(values)
    return median, (max(values) - min(values)) / median


def peak_memory():
    """-> MB: the most that this process has held."""
    with contextlib.suppress(OSError, TypeError):  # Linux: ru_maxrss begins at the peak of whoever started the process
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1.024e-3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e3 if sys.platform == "linux" else 1e6)


def table(rows, columns):
    """rows of dicts -> lines of Markdown; columns {heading: name of the value, or a function of the row}."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [get(row) if callable(get) else row.get(get) for get in columns.values()]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return lines


def write(name, title, about, lines, **results):
    """results/<name>.json with everything, results/<name>.md to read."""
    out = ROOT / "benchmarks" / "results" / name
    out.parent.mkdir(exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({**about, **results}, indent=1) + "\n")
    told = [f"{key} {value}" for key, value in about.items() if value and key not in ("command", "note")]
    head = [f"# {title}", "", f"`{about['command']}`: {'; '.join(told)}. {about['note']}".strip(), ""]
    out.with_suffix(".md").write_text("\n".join([*head, *lines]) + "\n")
    print(f"written: {out}.json and .md")

"""The way from picture files to batches, against the loader that everybody begins with.

    python benchmarks/data.py --data FOLDER       pictures in folders of the folder, as ImageFolder wants them
    python benchmarks/data.py                     drawn ones of CelebA's size, 178x218
    python benchmarks/data.py --quick             a few of those, to see that it runs; writes nothing

The reference is torchvision's ImageFolder, which decodes with Pillow, with Resize, CenterCrop, ToTensor and Normalize,
shuffled and collated by a DataLoader.  dcgan.py decodes once into a cache (`build`) and trains from there (`epoch`:
batches as a training step gets them, in random order, scaled, with their noise z).  Compared are pictures per second
of CPU time, of all processes together, so that it holds per core.  Rows take turns (of an "epoch" row, five at a
time); a figure is the median over the rounds, its spread (largest - smallest) / median.  The allocator keeps memory,
as in training, for all rows: by default an epoch takes up to twice as long in some processes.  Writes
results/data_cpu.json and .md.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import resource
import statistics
import tempfile
import time
import zipfile
from pathlib import Path
from unittest import mock

import torch
from common import cores, dcgan, facts, median_of, peak_memory, table, write
from torchvision import datasets, transforms

BATCH = 128


def draw_pictures(folder, n, width=178, height=218):
    """Write n drawn faces as JPEGs into a folder of the folder."""
    (folder / "faces").mkdir()
    for i in range(n):
        face = dcgan.draw_face(i, height // 4).resize((height, height))
        face.crop((0, 0, width, height)).save(folder / "faces" / f"{i:06d}.jpg", quality=92)


def image_folder(root, size, workers):
    """An epoch of the reference -> how many pictures it took."""
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    pictures = datasets.ImageFolder(root, transforms.Compose([*steps, transforms.Normalize((0.5,) * 3, (0.5,) * 3)]))
    return sum(len(x) for x, _ in torch.utils.data.DataLoader(pictures, BATCH, True, num_workers=workers))


def quietly(work, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return work(*args)


def build(data, size, workers):
    """Decode into a new cache -> how many pictures."""
    with tempfile.TemporaryDirectory() as cache:
        c = dcgan.config("classic", data=str(data), image_size=size, cache=cache, workers=workers)
        return len(quietly(dcgan.load_pictures, c))


def epoch(c, pictures, number):
    """An epoch of batches out of the cache -> how many pictures."""
    steps = len(pictures) // c.batch_size
    for step in range(number * steps, (number + 1) * steps):
        dcgan.draw_inputs(c, pictures, step, torch.device("cpu"))
    return steps * c.batch_size


def cpu_time():
    """-> seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def timed(work):
    """-> pictures per second of CPU time, and of wall time; `work` gives how many it took."""
    cpu, wall = cpu_time(), time.perf_counter()
    n = work()
    return n / (cpu_time() - cpu), n / (time.perf_counter() - wall)


def measure_memory(pipe, data):
    """In a process of its own: by how many MB the most memory it ever held grows while it builds a cache."""
    with tempfile.TemporaryDirectory() as small:
        quietly(draw_pictures, Path(small), 64)
        build(small, 64, 0)  # decoders and their buffers are in memory before it counts
    before = peak_memory()
    pipe.send((build(data, 64, 0), peak_memory() - before))


def memory_of(data):
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure_memory, args=(theirs, data))
    process.start()
    theirs.close()  # so that recv ends where the process dies
    n, grown = ours.recv()
    process.join()
    return {"pictures": n, "array MB": round(n * 3 * 64 * 64 / 1e6, 1), "memory grew by MB": round(grown, 1)}


def repeated(data, folder, times):
    """A folder in which every picture of `data` stands several times, by links."""
    for i, (n, path) in itertools.product(range(times), enumerate(sorted(Path(data).rglob("*.jp*g")))):
        (folder / f"{i}_{n}_{path.name}").symlink_to(path.resolve())
    return folder


def warm_start(data, cache):
    """-> what a start with a whole cache takes, while opening a picture is an error."""
    c = dcgan.config("classic", data=str(data), cache=cache)
    times = []
    with mock.patch("PIL.Image.open", side_effect=AssertionError("a picture was opened")):
        for _ in range(5):
            start = time.perf_counter()
            pictures = quietly(dcgan.load_pictures, c)
            dcgan.draw_inputs(c, pictures, 0, torch.device("cpu"))
            times.append(time.perf_counter() - start)
    ms = statistics.median(times) * 1e3
    return {"pictures": len(pictures), "ms to the first batch": round(ms, 1), "opened": 0}


def the_rows(folder, archive, cache, size):
    """-> {row: a function that does it once}"""
    c = dcgan.config("classic", data=str(folder), image_size=size, cache=cache, batch_size=BATCH, precision="fp32")
    pictures, epochs = quietly(dcgan.load_pictures, c), itertools.count()
    flipped = dcgan.config("classic", flips=True, batch_size=BATCH)
    noisy = dataclasses.replace(flipped, noise=0.05, noise_steps=-1)  # as `best` has it, drawn anew for each picture
    return {
        "ImageFolder + PIL, no processes besides": lambda: image_folder(folder, size, 0),
        f"ImageFolder + PIL, {cores()} processes": lambda: image_folder(folder, size, cores()),
        "build, no processes besides": lambda: build(folder, size, 0),
        f"build, {cores()} processes": lambda: build(folder, size, cores()),
        "build from a .zip": lambda: build(archive, size, 0),
        "epoch": lambda: sum(epoch(c, pictures, next(epochs)) for _ in range(5)),
        "epoch, half of them mirrored": lambda: sum(epoch(flipped, pictures, next(epochs)) for _ in range(5)),
        "epoch, mirrored, with noise": lambda: sum(epoch(noisy, pictures, next(epochs)) for _ in range(5)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder of folders of JPEGs; none: drawn ones")
    parser.add_argument("--drawn", type=int, default=4000, help="how many to draw")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    options = parser.parse_args()
    about = facts("cpu", options.note)
    torch.set_num_threads(1)
    if multiprocessing.get_start_method() == "forkserver":  # Python 3.14: cpu_time() would not see its workers
        multiprocessing.set_start_method("fork", force=True)
    dcgan.tune(dcgan.config("demo"), torch.device("cpu"))  # as training does, for all rows: memory is kept
    if options.quick:
        options.data, options.drawn, options.rounds = None, 2 * BATCH, 1
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for name in ("drawn", "cache", "many"):
            (scratch / name).mkdir()
        folder = options.data or scratch / "drawn"
        if not options.data:
            draw_pictures(folder, options.drawn)
        if sum(1 for _ in folder.rglob("*.jp*g")) < BATCH:
            parser.error(f"{folder} has fewer than {BATCH} .jpg or .jpeg files")
        archive = scratch / "pictures.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(folder.rglob("*.jp*g")):
                file.write(path, path.relative_to(folder))
        rows = the_rows(folder, archive, str(scratch / "cache"), 64)
        got = {name: [] for name in rows}
        for turn in range(options.rounds + 1):
            for name, work in rows.items():
                rates = timed(work)
                if turn or options.quick:  # the first time warms up the files' pages and the decoders
                    got[name].append(rates)
                    print(f"  round {turn}: {name}: {rates[0]:,.0f} a CPU second", flush=True)
        base, results = next(iter(got.values())), []
        for name, rates in got.items():
            cpu, spread = median_of([rate for rate, _ in rates])
            ratio = statistics.median(a / b for (a, _), (b, _) in zip(rates, base, strict=True))
            wall = statistics.median(rate for _, rate in rates)
            row = {"name": name, "pictures a CPU second": round(cpu), "spread": round(spread, 3)}
            results.append({**row, "ratio": round(ratio, 2), "pictures a second": round(wall), "rounds": len(rates)})
        warm = warm_start(folder, str(scratch / "cache"))
        memory = [memory_of(folder)]
        memory += [] if options.quick else [memory_of(repeated(folder, scratch / "many", 4))]
    columns = {
        "row": "name", "pictures a CPU second": "pictures a CPU second", "spread": lambda r: f"{r['spread']:.0%}",
        "x ImageFolder": "ratio", "pictures a second": "pictures a second",
    }  # fmt: skip
    what = f"{warm['pictures']:,} {'JPEGs of ' + folder.name if options.data else 'drawn JPEGs, 178x218'}, to 64x64."
    lines = [what, "", *table(results, columns), ""]
    ms = warm["ms to the first batch"]
    lines += [f"Start with a warm cache: {ms} ms to the first batch; no picture is opened.", ""]
    lines += ["Memory while a cache is built, without the process as it was before:", ""]
    lines += table(memory, {name: name for name in memory[0]})
    print(*lines, sep="\n")
    if not options.quick:
        write("data_cpu", f"The data path on {about['device']}", about, lines, rows=results, warm=warm, memory=memory)


if __name__ == "__main__":
    main()

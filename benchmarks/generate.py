"""Pictures a second from a generator: dcgan.draw against the plain eager one.

    python benchmarks/generate.py                 on the CPU, all cores and one thread
    python benchmarks/generate.py --device cuda   on a GPU
    python benchmarks/generate.py --quick         tiny, to see that it runs; writes nothing

The reference is the generator of pytorch/examples in eval mode, eager, fp32, NCHW, all pictures in one batch, turned
to uint8 and copied to the CPU: what dcgan.draw gives, too, in chunks of one size, so that no picture depends on
what is drawn beside it.  Both have the same random weights, and draw the same pictures, or nothing is timed.  Each
allocator setting has a process of its own; rows take turns, medians with spread as in step.py.
Writes benchmarks/results/generation_<device>.json and .md.
"""

import argparse
import multiprocessing
import statistics

import torch
from common import cores, dcgan, facts, median_of, table, write
from step import reference_networks, timed


@torch.inference_mode()
def plain(G, z):
    x = G(z[:, :, None, None])
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def measure(pipe, device, threads, allocator, n, width, rounds, seconds):
    """In a process of its own -> {row: seconds for n pictures, one of each round}"""
    torch.set_num_threads(threads)
    if allocator == "kept":
        dcgan.tune(dcgan.config("demo"), torch.device("cpu"))
    c = dcgan.config("classic", ngf=width, bn_momentum=1.0)  # so that one pass sets the statistics
    reference, G = reference_networks(width=width)[0].eval().to(device), dcgan.Generator(c)
    z = dcgan.latent(range(n), c.nz)
    with torch.no_grad():
        G(z[:16])
    ours = [layer for block in G.blocks for layer in (block.layer, block.bn) if layer is not None]
    for theirs, layer in zip((layer for layer in reference if len(layer.state_dict())), ours, strict=True):
        theirs.load_state_dict(layer.state_dict())
    G = G.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    far = (plain(reference, z[:16].to(device)).int() - dcgan.draw(G, z[:16], device).int()).abs().max().item()
    if far > (1 if device == "cpu" else 8):  # of 255; on a GPU TF32 may blur either
        raise SystemExit(f"the two draw pictures that are {far} of 255 apart: not timed")
    rows = {
        "reference, fp32": lambda: plain(reference, z.to(device)),
        "dcgan.draw, fp32": lambda: dcgan.draw(G, z, device),
        "dcgan.draw, bf16": lambda: dcgan.draw(G, z, device, "bf16"),
    }
    times = {name: [] for name in rows}
    for run in rows.values():
        run(), run()
    for _ in range(rounds):
        for name, run in rows.items():
            times[name].append(timed(run, device, seconds))
    pipe.send(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--pictures", type=int, help="at a time (64, on a GPU 1,024)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    options = parser.parse_args()
    about, device = facts(options.device, options.note), options.device
    n, width = options.pictures or (64 if device == "cpu" else 1024), 64
    if options.quick:
        n, width, options.rounds, options.seconds = 4, 8, 1, 0.0
    context, results = multiprocessing.get_context("spawn"), []
    settings = [(threads, allocator) for threads in dict.fromkeys((cores(), 1)) for allocator in ("default", "kept")]
    if device == "cuda" or options.quick:
        settings = [(cores(), "torch's" if device == "cuda" else "default")]
    for threads, allocator in settings:
        ours, theirs = context.Pipe()
        args = (theirs, device, threads, allocator, n, width, options.rounds, options.seconds)
        process = context.Process(target=measure, args=args)
        process.start()
        theirs.close()  # so that recv ends where the process dies
        times = ours.recv()
        process.join()
        base = next(iter(times.values()))
        for name, got in times.items():
            median, spread = median_of(got)
            ratio = statistics.median(a / b for a, b in zip(base, got, strict=True))
            results.append({"name": name, "threads": threads, "allocator": allocator, "pictures": n,
                            "ms": round(median * 1e3, 2), "spread": round(spread, 3), "img/s": round(n / median, 1),
                            "ratio": round(ratio, 3), "rounds": len(got)})  # fmt: skip
    columns = {
        "row": "name", "threads": "threads", "allocator": "allocator", "pictures at a time": "pictures", "ms": "ms",
        "spread": lambda r: f"{r['spread']:.0%}", "img/s": "img/s", "x reference": "ratio",
    }  # fmt: skip
    lines = ["Networks of `classic`, 64x64, ngf 64.", "", *table(results, columns)]
    print(*lines, sep="\n")
    if not options.quick:
        write(f"generation_{device}", f"Drawing pictures on {about['device']}", about, lines, rows=results)


if __name__ == "__main__":
    main()

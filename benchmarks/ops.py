"""The fused ops against eager PyTorch and torch.compile: time, bandwidth, launches, memory.  Losing rows stay.

    python benchmarks/ops.py                      on the CPU, one thread; about 10 minutes
    python benchmarks/ops.py --device cuda        on a GPU, in CUDA graph replay
    python benchmarks/ops.py --small              the shapes of `best` at its batch of 8; writes nothing
    python benchmarks/ops.py --quick              a few rows, to see that it runs; writes nothing

Every forward result is checked against eager PyTorch before it is timed (for gradients see tests/test_ops.py).  The
variants of a row run in turn: what the machine does besides hits all of them.  On the CPU in bursts of four calls, of
which the first is not counted, so that each finds in the caches what it left there itself; time is the CPU time of the
one thread that works, once with the allocator as it comes and once with memory kept between calls, as dcgan.py trains.
On a GPU a CUDA graph of ten calls is replayed.  A figure is the median, its spread the distance between the quartiles.
Bytes are those that the fused algorithm must move (csrc/bn_leaky_relu.cpp, csrc/spectral_norm.cpp), the share is of a
large copy measured in the same run.
Writes benchmarks/results/ops_<device>.json and .md.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from common import ROOT, dcgan, facts, table, write
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as parametrize

D_SHAPES = [(128, 128, 16, 16), (128, 256, 8, 8), (128, 512, 4, 4)]  # the BatchNorms of D at batch 128, ndf 64
LARGE = [(128, 256, 64, 64), (512, 512, 32, 32)]  # synthetic, far larger than the L2 cache of a GPU
SMALL = [(8, 512, 4, 4), (8, 256, 8, 8), (8, 128, 16, 16), (8, 64, 32, 32), (8, 32, 64, 64)]  # `best`, as G draws
WEIGHTS = [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]  # D, ndf 64
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def eager(x, weight, bias, mean, var, inplace=False):
    return F.leaky_relu(F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5), 0.2, inplace)


# ------------------------------------------------------------------------------------------------ measuring


def measure_cpu(variants, seconds):
    """-> {name: list of ms}: thread CPU time, the variants in turn, in bursts."""
    for run in variants.values():
        run(), run()
    times, end = {name: [] for name in variants}, time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 15:
        for name, run in variants.items():
            run()
            for _ in range(3):
                start = time.thread_time()
                run()
                times[name].append((time.thread_time() - start) * 1e3)
    return times


def measure_cuda(variants, seconds):
    """-> {name: list of ms}: device time of one call, from replays of a CUDA graph of ten calls."""
    graphs = {}
    for name, run in variants.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(10):
                run()
    times, end = {name: [] for name in variants}, time.perf_counter() + seconds
    begin, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 15:
        for name, graph in graphs.items():
            begin.record()
            graph.replay()
            done.record()
            done.synchronize()
            times[name].append(begin.elapsed_time(done) / 10)
    return times


def copy_bandwidth(device, seconds):
    """-> GB/s of reading and writing 256 MB."""
    a = torch.ones(1 << 26, device=device)
    b = torch.empty_like(a)
    measure = measure_cuda if device == "cuda" else measure_cpu
    return 2 * a.nbytes / statistics.median(measure({"copy": lambda: b.copy_(a)}, seconds)["copy"]) / 1e6


def kept_bytes(forward):
    """-> bytes that live between forward and backward: the output and all that is saved, each storage once."""
    storages = {}

    def note(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = forward()
    for t in out if isinstance(out, (list, tuple)) else [out]:
        note(t)
    return sum(storages.values())


def launches(run, device):
    """-> kernels and copies that one call puts on the device; None on the CPU."""
    if device != "cuda":
        return None
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)


# ------------------------------------------------------------------------------------------------- the rows


def bn_variants(shape, dtype, layout, device, compiled):
    """-> ({variant: forward}, leaves, gradient)"""
    x = torch.randn(shape, device=device).to(dtype).to(memory_format=LAYOUTS[layout]).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.randn(shape[1], device=device, dtype=wide).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(shape[1], device=device, dtype=wide), torch.ones(shape[1], device=device, dtype=wide)
    args = (x, weight, bias, mean, var)
    fused = dcgan.fused_ops().bn_leaky_relu
    forwards = {
        "eager": lambda: eager(*args),
        "eager in place": lambda: eager(*args, inplace=True),
        "fused": lambda: fused(*args, True, 0.1, 1e-5, 0.2),
    }
    if compiled:
        torch.compiler.reset()
        function = torch.compile(eager, fullgraph=True, dynamic=False)
        forwards["compile"] = lambda: function(*args)
    return forwards, (x, weight, bias), torch.randn_like(x)


def sn_variants(layout, device, compiled):
    layers = [parametrize(nn.Conv2d(s[1], s[0], s[2:], bias=False)).to(device) for s in WEIGHTS]
    layers = [layer.to(memory_format=LAYOUTS[layout]) for layer in layers]
    norms = [layer.parametrizations.weight for layer in layers]
    weights = [n.original for n in norms]

    def of(function):
        us, vs = [n[0]._u.clone() for n in norms], [n[0]._v.clone() for n in norms]
        return lambda: function(weights, us, vs, 1e-12, True)

    forwards = {
        "eager": lambda: [layer.weight for layer in layers],  # torch's own parametrization
        "plain": of(dcgan.spectral_norm),
        "fused": of(dcgan.fused_ops().spectral_norm),
    }
    if compiled:
        torch.compiler.reset()
        forwards["compile"] = of(torch.compile(dcgan.spectral_norm, fullgraph=True, dynamic=False))
    return forwards, weights, [torch.randn_like(w) for w in weights]


def directions(forwards, leaves, gradient):
    """-> {"forward": {variant: run}, "forward + backward": {...}}"""

    def both(forward):
        return lambda: torch.autograd.grad(forward(), leaves, gradient)

    def alone(forward):
        def run():
            with torch.no_grad():
                return forward()

        return run

    return {
        "forward": {name: alone(f) for name, f in forwards.items()},
        "forward + backward": {name: both(f) for name, f in forwards.items()},
    }


def check(forwards, dtype):
    """The variants agree before they are timed."""
    results = {name: run() for name, run in forwards.items()}
    results = {name: [r] if isinstance(r, torch.Tensor) else r for name, r in results.items()}
    for name, result in results.items():
        for ours, eagers in zip(result, results["eager"], strict=True):
            error, scale = (ours.double() - eagers.double()).abs().max().item(), eagers.abs().max().item()
            most = 64 if dtype in (torch.float32, torch.float64) else 4  # two roundings, to 16 bits
            if not error <= most * torch.finfo(dtype).eps * max(1.0, scale):
                raise SystemExit(f"{name} is off by {error:.1e} at scale {scale:.1e}: not timed")


def rows_of(op, shape, dtype, layout, device, options, allocator, peak):
    compiled = options.compile and allocator != "default" and dtype in (torch.float32, torch.bfloat16)
    if op == "bn_leaky_relu":
        forwards, leaves, gradient = bn_variants(shape, dtype, layout, device, compiled)
        size = leaves[0].nbytes
    else:
        forwards, leaves, gradient = sn_variants(layout, device, compiled)
        size = sum(w.nbytes for w in leaves)
    moved = {"forward": 3 * size, "forward + backward": (8 if op == "bn_leaky_relu" else 7) * size}
    check(forwards, dtype)
    measure = measure_cuda if device == "cuda" else measure_cpu
    for direction, runs in directions(forwards, leaves, gradient).items():
        times = measure(runs, options.seconds)
        base = statistics.median(times["eager"])
        for name, values in times.items():
            low, median, high = statistics.quantiles(values, n=4)
            rate = moved[direction] / median / 1e6
            yield {
                "op": op, "shape": list(shape) if shape else "D, 5 layers", "dtype": str(dtype).removeprefix("torch."),
                "layout": layout, "direction": direction, "allocator": allocator, "variant": name,
                "ms": round(median, 4), "spread_ms": round(high - low, 4), "runs": len(values),
                "times_eager": round(base / median, 2), "gb_s": round(rate, 1), "share_of_copy": round(rate / peak, 2),
                "launches": launches(runs[name], device),
                "kept_mb": round(kept_bytes(forwards[name]) / 1e6, 1) if "back" in direction else None,
            }  # fmt: skip


def summary(rows):
    """-> lines: for each allocator, layout, dtype and direction, eager against fused summed over D's three shapes."""
    lines = []
    keys = sorted({(r["op"], r["allocator"], r["dtype"], r["layout"], r["direction"]) for r in rows})
    for key in keys:
        own = [r for r in rows if (r["op"], r["allocator"], r["dtype"], r["layout"], r["direction"]) == key]
        own = [r for r in own if r["op"] == "spectral_norm" or tuple(r["shape"]) in D_SHAPES]
        total = {v: sum(r["ms"] for r in own if r["variant"] == v) for v in dict.fromkeys(r["variant"] for r in own)}
        if total.get("fused"):
            ratios = ", ".join(f"{total[v] / total['fused']:.2f}x {v}" for v in total if v != "fused")
            lines.append(f"| {' | '.join(key)} | {total['fused']:.2f} | {ratios} |")
    return lines


def losses(rows):
    """-> lines: where the fused op takes longer than eager PyTorch, by how much, and the spread of both."""
    lines = []
    for r in (r for r in rows if r["variant"] == "fused" and r["times_eager"] < 1):
        same = ("op", "shape", "dtype", "layout", "direction", "allocator")
        eager = next(e for e in rows if e["variant"] == "eager" and all(e[k] == r[k] for k in same))
        times = f"{r['ms']} ms +- {r['spread_ms']} against {eager['ms']} +- {eager['spread_ms']}"
        lines.append(f"- {', '.join(str(r[k]) for k in same)}: {times}")
    return lines or ["- none"]


def in_the_step(device):
    """-> lines: what the ops are worth in a whole step of training, from what step.py has measured."""
    measured = ROOT / "benchmarks" / "results" / f"step_{device}.json"
    groups = json.loads(measured.read_text())["groups"] if measured.exists() else {}
    found = []
    for group in (groups[name] for name in ("all", "presets") if name in groups):
        rows = {(r["name"], r["precision"], r["allocator"]): r for r in group["rows"]}
        for (name, precision, allocator), fused in rows.items():
            plain = rows.get((name.replace(" + fused", ""), precision, allocator))
            if " + fused" in name and plain:
                ratio = statistics.median(a / b for a, b in zip(plain["round ms"], fused["round ms"], strict=True))
                more = {"with --fused": fused["ms"], "faster by": f"{ratio:.2f}x", "commit": group["about"]["commit"]}
                found.append({"row of step.py": plain["name"], "ms a step": plain["ms"], **plain, **more})
    names = ["row of step.py", "precision", "batch", "ms a step", "with --fused", "faster by", "commit"]
    return table(found, {name: name for name in names}) if found else ["not measured: python benchmarks/step.py"]


def to_markdown(rows, whole_step):
    lines = ["Summed over D's three BatchNorms, and over its five weights:", ""]
    lines += ["| op | allocator | dtype | layout | direction | fused ms | fused is faster by |", "|" + "---|" * 7]
    lines += [*summary(rows), "", "In a whole step of training, by step.py (the median of each round's ratio):", ""]
    lines += [*whole_step, "", "Slower than eager PyTorch:", "", *losses(rows), ""]
    names = ["op", "shape", "dtype", "layout", "direction", "allocator", "variant", "ms", "spread_ms", "times_eager"]
    names += ["gb_s", "share_of_copy", "launches", "kept_mb"]
    lines += ["All rows; `kept` is what lives between forward and backward:", ""]
    return [*lines, *table(rows, {name: name for name in names})]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row's variants together")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    options = parser.parse_args()
    device = options.device
    dcgan.fused_ops().load(device)
    if device == "cpu":
        torch.set_num_threads(1)
    if options.quick:
        options.compile, options.seconds = False, 0.2
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    cases = [
        ("bn_leaky_relu", s, t, la) for t in dtypes[: 1 if options.quick else 4] for la in LAYOUTS for s in D_SHAPES
    ]
    if device == "cuda":
        cases += [("bn_leaky_relu", s, t, la) for t in dtypes[:2] for la in LAYOUTS for s in LARGE]
    cases += [("spectral_norm", None, torch.float32, la) for la in LAYOUTS]
    if options.small:
        cases = [("bn_leaky_relu", s, t, "channels_last") for t in dtypes[:2] for s in SMALL]
    whole_step = in_the_step(device)  # now: if its file is damaged, no measurement is lost
    rows, peak = [], copy_bandwidth(device, options.seconds)
    for allocator in ["torch's"] if device == "cuda" else ["default", "kept"]:
        if allocator == "kept":
            if sys.platform != "linux":  # glibc's, or none
                continue
            dcgan.tune(dcgan.config("demo"), torch.device("cpu"))
        for op, shape, dtype, layout in cases:
            torch.manual_seed(0)
            for row in rows_of(op, shape, dtype, layout, device, options, allocator, peak):
                rows.append(row)
                print(
                    *(f"{row[k]}" for k in ("op", "shape", "dtype", "layout", "direction", "allocator", "variant")),
                    end=" ",
                )
                print(f"{row['ms']:.3f} ms +- {row['spread_ms']:.3f}, {row['times_eager']:.2f}x eager", flush=True)
    print(*summary(rows), sep="\n")
    if options.quick or options.small:
        return
    about = facts(device, options.note) | {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "hash of the kernels": dcgan.fused_ops().build.source_hash(device),
        "a copy, GB/s": round(peak, 1),
    }
    write(f"ops_{device}", f"Fused ops on {about['device']}", about, to_markdown(rows, whole_step), rows=rows)


if __name__ == "__main__":
    main()

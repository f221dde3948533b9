"""The training step against the recipe that everybody begins with, each lever alone and all of them together.

    python benchmarks/step.py                     on the CPU: all cores, then one thread; about 20 minutes
    python benchmarks/step.py --device cuda       on a GPU
    python benchmarks/step.py --quick             tiny networks, to see that it runs; writes nothing

The reference is the recipe of pytorch/examples, dcgan/main.py, written out below: eager, fp32 (on a GPU TF32), NCHW,
sigmoid and BCE, D(real) and D(fake) in two passes with two backwards, plain Adam, all five numbers read back each
step, and the allocator as it comes.  All rows train the networks of that recipe (ngf = ndf = 64) on batches of 128
64x64 pictures that lie in memory.  The reference gets its real batch ready; dcgan.py's rows gather and scale theirs,
flip them where the preset does, and read their numbers as training does, every ten steps.

Rows take turns, round after round (A B C A B C); a row's time is the median over the rounds, its ratio the median of
the rounds' ratios, the spread is (slowest - fastest) / median.  glibc's allocator can be set only once a process, so
each setting has a process of its own, and these take turns as well.  Useful FLOPs leave out what no one needs (D's
weight gradients in the step of G); the peak is the fastest large matmul of that precision, in the first process.
Writes benchmarks/results/step_<device>.json and .md.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import re
import statistics
import time
import types

import torch
from common import ROOT, cores, dcgan, facts, median_of, table, write
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode

# ------------------------------------------------------------------------------------------------ the reference


def reference_networks(nz=100, width=64):
    """-> G and D of pytorch/examples, for 64x64 pictures."""
    up = [nn.ConvTranspose2d(nz, 8 * width, 4, 1, 0, bias=False), nn.BatchNorm2d(8 * width), nn.ReLU(True)]
    for a, b in ((8, 4), (4, 2), (2, 1)):
        up += [nn.ConvTranspose2d(a * width, b * width, 4, 2, 1, bias=False), nn.BatchNorm2d(b * width), nn.ReLU(True)]
    G = nn.Sequential(*up, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())
    down = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for a, b in ((1, 2), (2, 4), (4, 8)):
        down += [nn.Conv2d(a * width, b * width, 4, 2, 1, bias=False), nn.BatchNorm2d(b * width)]
        down += [nn.LeakyReLU(0.2, True)]
    D = nn.Sequential(*down, nn.Conv2d(8 * width, 1, 4, 1, 0, bias=False), nn.Sigmoid())
    for layer in (*G, *D):
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
        elif hasattr(layer, "weight"):
            nn.init.normal_(layer.weight, 0.0, 0.02)
    return G, D


def joint(D, real, fake):
    """The lever "one pass": D of both mini-batches at once, BatchNorm's statistics still of each alone."""
    x = torch.cat([real, fake])
    for layer in D:
        x = torch.cat([layer(part) for part in x.chunk(2)]) if isinstance(layer, nn.BatchNorm2d) else layer(x)
    return x.chunk(2)


def reference_step(G, D, opt_g, opt_d, real, levers=(), nz=100):
    """One step of the recipe -> its five numbers; a lever changes only what its name says."""
    n, device = len(real), real.device
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled="bf16" in levers)

    def bce(probability, label):
        return nn.functional.binary_cross_entropy(probability.float().view(-1), torch.full((n,), label, device=device))

    # (1) Update D
    D.zero_grad()
    if "one pass" in levers:
        with autocast():
            fake = G(torch.randn(n, nz, 1, 1, device=device))
            p_real, p_fake = joint(D, real, fake.detach())
        loss_real, loss_fake = bce(p_real, 1.0), bce(p_fake, 0.0)
        (loss_real + loss_fake).backward()
    else:
        with autocast():
            p_real = D(real)
        loss_real = bce(p_real, 1.0)
        loss_real.backward()
        with autocast():
            fake = G(torch.randn(n, nz, 1, 1, device=device))
            p_fake = D(fake.detach())
        loss_fake = bce(p_fake, 0.0)
        loss_fake.backward()
    opt_d.step()

    # (2) Update G
    G.zero_grad()
    D.requires_grad_("D frozen for G" not in levers)
    with autocast():
        p_again = D(fake)
    loss_g = bce(p_again, 1.0)
    loss_g.backward()
    D.requires_grad_(True)
    opt_g.step()
    return [x.item() for x in (loss_real + loss_fake, loss_g, p_real.mean(), p_fake.mean(), p_again.mean())]


def make_reference(row, device, size):
    """-> a function that takes one step of the reference with the levers of the row."""
    levers = {*row["levers"], row["precision"]}
    G, D = (net.to(device) for net in reference_networks(width=size["width"]))
    if "spectral norm" in levers:
        for layer in D:
            if isinstance(layer, nn.Conv2d):
                spectral_norm(layer)
    real = torch.rand(size["batch"], 3, 64, 64, device=device) * 2 - 1
    if "channels_last" in levers:
        G, D, real = (x.to(memory_format=torch.channels_last) for x in (G, D, real))
    hyper = dict(lr=2e-4, betas=(0.5, 0.999), fused=True if "fused Adam" in levers else None)
    opt_g, opt_d = torch.optim.Adam(G.parameters(), **hyper), torch.optim.Adam(D.parameters(), **hyper)
    # no CUDA graphs: D's second call would overwrite what its first one gave, which its backward still needs
    modes = {"compile": {}, "max-autotune": {"mode": "max-autotune-no-cudagraphs"}}
    for lever, options in modes.items():
        if lever in levers:
            torch._dynamo.config.recompile_limit = 64  # counted over all rows of this process
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # a row that says compiled is compiled
            G, D = torch.compile(G, **options), torch.compile(D, **options)
    return functools.partial(reference_step, G, D, opt_g, opt_d, real, levers)


# --------------------------------------------------------------------------------------------------------- ours


def make_ours(row, device, size):
    """-> a function that takes one step of dcgan.py, with its inputs before and its report after."""
    given = {"precision": row["precision"], "device": device, "graph": False, **row["options"]}
    if size["tiny"]:
        given |= {"ngf": size["width"], "ndf": size["width"]}
    if row["preset"] == "classic" or size["tiny"]:
        given["batch_size"] = size["batch"]
    c = dcgan.config(row["preset"], **given)
    c.noise_steps = 1 << 30  # the input's noise, where there is any, never ends
    run = types.SimpleNamespace(c=c, device=torch.device(device), step=0)
    run.graphed = dcgan.choose_graphed(c, run.device)
    ops = dcgan.choose_ops(c.fused, run.device)
    torch.manual_seed(0)
    run.G, run.D = dcgan.Generator(c, ops), dcgan.Discriminator(c, ops)
    run.G, run.D = (net.to(device, memory_format=torch.channels_last) for net in (run.G, run.D))
    run.ema = dcgan.copy.deepcopy(run.G).requires_grad_(False) if c.ema else None
    Adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[c.optimizer]
    hyper = dict(betas=(c.beta1, c.beta2), eps=c.adam_eps, weight_decay=c.weight_decay, fused=True)
    hyper["capturable"] = device == "cuda"
    run.opt_g, run.opt_d = Adam(run.G.parameters(), c.lr_g, **hyper), Adam(run.D.parameters(), c.lr_d, **hyper)
    run.stateful = {"G": run.G, "D": run.D, "opt_g": run.opt_g, "opt_d": run.opt_d}
    run.stateful |= {"ema": run.ema} if c.ema else {}
    run.pictures = torch.randint(0, 256, (16 * c.batch_size, c.nc, c.image_size, c.image_size), dtype=torch.uint8)
    run.pictures = run.pictures.to(device, memory_format=torch.channels_last)  # as the cache gives them
    if c.graph and not run.graphed:
        raise SystemExit(f"{row['name']} would not be graphed here: build csrc/ (pip install -e .)")
    run.sums = torch.zeros(6, device=device)
    step, numbers = dcgan.choose_step(run), itertools.count(1)

    def once():
        n, weight = next(numbers), torch.full((), 1 - c.ema, device=run.device)
        run.sums += step(*dcgan.draw_inputs(c, run.pictures, n, run.device), weight)
        if n % c.report_every == 0:
            dcgan.take(run.sums)

    return once


# -------------------------------------------------------------------------------------------------------- rows


def reference(*levers, precision="fp32", allocator="default"):
    name = " + ".join(["reference", *levers])
    return dict(name=name, levers=levers, precision=precision, allocator=allocator, preset="reference", options={})


def ours(precision="fp32", allocator="kept", preset="classic", **options):
    words = [name.replace("_", " ") if value is True else f"{name} {value}" for name, value in options.items()]
    name = " + ".join([f"dcgan.py {preset}" if preset != "classic" else "dcgan.py", *words])
    return dict(name=name, levers=(), precision=precision, allocator=allocator, preset=preset, options=options)


def the_rows(device, compiled, tiny):
    """-> {group: rows}; the first row of a group is what its ratios are against."""
    if tiny:
        rows = [reference(), reference("one pass", "D frozen for G", "fused Adam", "channels_last", precision="bf16")]
        return {"all": [*rows, ours(spectral_norm=True), ours("bf16", allocator="default")]}
    levers = ("channels_last", "D frozen for G", "one pass", "fused Adam", "spectral norm")
    alone = [reference(lever) for lever in levers]
    alone += [reference(precision="bf16"), reference("channels_last", precision="bf16")]
    alone += [] if device == "cuda" else [reference(allocator="kept"), reference(allocator="kept", precision="bf16")]
    stacked = [ours(p, **o) for p in ("fp32", "bf16") for o in ({}, {"fused": True})]
    stacked += [ours("bf16", spectral_norm=True, **o) for o in ({}, {"fused": True})]
    stacked += [ours("fp32", spectral_norm=True)]
    if device == "cpu":
        stacked += [ours("fp32", allocator="default"), ours("bf16", allocator="default")]
    else:
        more = ({}, {"fused": True}, {"spectral_norm": True, "fused": True})
        stacked += [ours("bf16", graph=True, **o) for o in more]
    compiles = [reference("compile"), reference("compile", "channels_last", precision="bf16")]
    compiles += [ours("fp32", compile=True), ours("bf16", compile=True), ours("bf16", compile=True, fused=True)]
    if device == "cuda":
        compiles += [reference("max-autotune", "channels_last", precision="bf16")]
    one = [ours("fp32"), ours("bf16"), ours("bf16", fused=True), ours("bf16", spectral_norm=True)]
    one = [reference(), reference(precision="bf16"), reference("channels_last", precision="bf16"), *one]
    presets = []
    for preset in dcgan.PRESETS:
        presets += [ours("fp32", preset=preset), ours("bf16", preset=preset), ours("bf16", preset=preset, fused=True)]
    more = [ours("bf16", preset=preset, graph=True, fused=True) for preset in dcgan.PRESETS] if device == "cuda" else []
    groups = {"all": [reference(), *alone, *stacked]}
    groups |= {"compiled": [reference(), *compiles, ours("bf16")]} if compiled else {}
    return groups | ({"one thread": one} if device == "cpu" else {}) | {"presets": presets + more}


# ---------------------------------------------------------------------------------------------------- measuring


def matmul_rate(precision, device, seconds=1.0):
    """-> FLOP/s of the fastest of some large matmuls."""
    best, end = 0.0, time.perf_counter() + seconds
    sizes = (1024, 2048, 4096) if device == "cpu" else (4096, 8192)
    while True:
        for n in sizes:
            a = torch.randn(n, n, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
            b = a.clone()
            for _ in range(3):
                start = time.perf_counter()
                a @ b
                if device == "cuda":
                    torch.cuda.synchronize()
                best = max(best, 2 * n**3 / (time.perf_counter() - start))
            if time.perf_counter() > end:
                return best


KINDS = {  # the first that fits the name of an operator or of a GPU's kernel
    "BatchNorm, with its activation where fused": r"batch_?norm|bn_leaky_relu|bn_",
    "norms: spectral, of the gradients": r"spectral|lpnorm|aten::(mv|dot|linalg_vector_norm)|gemv|power",
    "convolution, backward": r"convolution_backward|dgrad|wgrad",
    "convolution and matmul, forward": r"conv|addmm|aten::mm|linear|gemm|cutlass|xmma|cudnn|implicit",
    "activation": r"relu|tanh|sigmoid|threshold",
    "optimiser": r"adam|optimizer|multi_tensor|foreach|aten::lerp_",
    "copies and layout": r"copy|aten::(cat|to|clone|index|flip|where)|CatArray|nchw|nhwc|Memcpy|Memset",
}


def profiled(step, device, steps):
    """-> ({kind: ms a step}, operators or, on a GPU, launches a step)"""
    cuda = torch.autograd.DeviceType.CUDA
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    events = profile.key_averages()
    if device == "cuda":
        events = [e for e in events if e.device_type == cuda and not e.key.startswith("Optimizer")]
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for e in events:
        kind = next((kind for kind, names in KINDS.items() if re.search(names, e.key, re.IGNORECASE)), "other")
        spent[kind] += (e.self_device_time_total if device == "cuda" else e.self_cpu_time_total) / (1e3 * steps)
    return {kind: round(ms, 2) for kind, ms in spent.items()}, round(sum(e.count for e in events) / steps)


def worker(pipe, device, threads, allocator, size):
    """A process with one setting of the allocator: answers what it is asked until it is told to end."""
    torch.set_num_threads(threads)
    if device == "cuda" or allocator == "kept":
        dcgan.tune(dcgan.config("demo"), dcgan.choose_device(device))
    steps = {}
    with contextlib.suppress(EOFError, BrokenPipeError):  # the one who asks has gone
        answer(pipe, device, size, steps)


def answer(pipe, device, size, steps):
    for row, what in iter(pipe.recv, None):
        if what == "peak":
            pipe.send(matmul_rate(row, device))
            continue
        key = repr(row)
        if key not in steps:
            torch.manual_seed(0)
            steps[key] = (make_reference if row["preset"] == "reference" else make_ours)(row, device, size)
            for _ in range(1 if size["tiny"] else 2):
                steps[key]()
        step = steps[key]
        if what == "flops":
            with FlopCounterMode(display=False) as counter:
                step()
            pipe.send(counter.get_total_flops())
        elif what in ("profile", "count"):
            pipe.send(profiled(step, device, 3 if what == "profile" else 1))
        else:
            pipe.send(timed(step, device, what))
    pipe.send(None)


def timed(step, device, seconds):
    """-> seconds a step, over as many steps as fill `seconds`, at least two."""
    if device == "cuda":
        torch.cuda.synchronize()
    n, start = 0, time.perf_counter()
    while n < 2 or time.perf_counter() - start < seconds:
        for _ in range(20 if device == "cuda" else 1):
            step()
            n += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def measure(rows, threads, options, size, profiles=()):
    """-> the rows with their figures, {row: profile}, {precision: peak}."""
    context, asked = multiprocessing.get_context("spawn"), {}
    settings = {"torch's"} if options.device == "cuda" else {row["allocator"] for row in rows}
    for setting in sorted(settings):
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(theirs, options.device, threads, setting, size), daemon=True)
        process.start()
        asked[setting] = ours, process

    def ask(row, what, setting=None):
        pipe, process = asked[setting or ("torch's" if options.device == "cuda" else row["allocator"])]
        pipe.send((row, what))
        while not pipe.poll(1):
            if not process.is_alive():
                raise SystemExit(f"the process that measures {row} has died")
        return pipe.recv()

    first = sorted(settings)[0]
    peaks = {p: ask(p, "peak", first) for p in sorted({row["precision"] for row in rows})} if not size["tiny"] else {}
    times = [[] for _ in rows]
    for turn in range(options.rounds):
        for row, got in zip(rows, times, strict=True):
            got.append(ask(row, options.seconds))
            print(f"  round {turn + 1}: {row['name']}, {row['precision']}: {got[-1] * 1e3:.1f} ms", flush=True)
    results = []
    for row, got in zip(rows, times, strict=True):
        median, spread = median_of(got)
        same = next((r for r in results if r["preset"] == row["preset"]), None)
        pictures, flops = size["batch"], size.get("flops")
        if row["preset"] not in ("reference", "classic") and not size["tiny"]:
            pictures = dcgan.config(row["preset"]).batch_size
            flops = same["gflop a picture"] * 1e9 * pictures if same else ask(row, "flops")
        elif not flops:
            row_of_ours = next(r for r in rows if r["preset"] == "classic" and not r["options"].get("compile"))
            flops = size["flops"] = ask(row_of_ours, "flops")
        _, launches = ask(row, "count")
        ratio = statistics.median(a / b for a, b in zip(times[0], got, strict=True))
        share = flops / median / peaks[row["precision"]] if peaks else None
        results.append({
            **row, "allocator": "torch's" if options.device == "cuda" else row["allocator"], "threads": threads,
            "batch": pictures, "ms": round(median * 1e3, 2), "spread": round(spread, 3),
            "img/s": round(pictures / median, 1), "ratio": round(ratio, 3), "share of peak": share and round(share, 3),
            "gflop a picture": round(flops / pictures / 1e9, 3), "operators": launches, "rounds": len(got),
            "round ms": [round(t * 1e3, 2) for t in got],
        })  # fmt: skip
    kinds = {f"{row['name']}, {row['precision']}": ask(row, "profile")[0] for row in rows if row in profiles}
    for pipe, process in asked.values():
        pipe.send(None)
        process.join(20)
    return results, kinds, peaks


COLUMNS = {
    "row": "name", "precision": "precision", "allocator": "allocator", "batch": "batch", "ms a step": "ms",
    "spread": lambda r: f"{r['spread']:.0%}", "img/s": "img/s", "x reference": "ratio",
    "of peak": lambda r: None if r["share of peak"] is None else f"{r['share of peak']:.0%}", "operators": "operators",
}  # fmt: skip


TITLES = {
    "all": "Each lever alone, and all together",
    "compiled": "Against torch.compile",
    "one thread": "On one thread",
    "presets": "Every preset at its own batch size, classic at 128",
}


def to_markdown(groups, device):
    lines = []
    for group, title in TITLES.items():
        if group not in groups:
            continue
        found, columns = groups[group], dict(COLUMNS)
        if device == "cuda":
            columns["launches"] = columns.pop("operators")
        if group == "presets":
            columns.pop("x reference")
            columns["useful GFLOP a picture"] = "gflop a picture"
        about, rows = found["about"], found["rows"]
        rates = ", ".join(f"{precision} {rate / 1e9:,.0f} GFLOP/s" for precision, rate in found["peaks"].items())
        run = f"`{about['command']}` at {about['commit']}, {about['date']}, {rows[0]['threads']} thread(s)"
        gflop = "" if group == "presets" else f"; {rows[0]['gflop a picture']} useful GFLOP a picture"
        lines += [f"## {title}", "", f"{run}; peak: {rates}{gflop}. {about['note']}".strip(), ""]
        lines += [*table(rows, columns), ""]
    where = "of the GPU, by kernel" if device == "cuda" else "of the calling thread, by operator"
    kinds = groups["all"]["kinds"] if "all" in groups else {}
    lines += ["## Where the time goes", "", f"ms a step {where}; the profiler's own cost is in it.", ""]
    seen = [{"kind": kind, **{row: spent[kind] for row, spent in kinds.items()}} for kind in [*KINDS, "other"]]
    return [*lines, *table(seen, {name: name for name in ("kind", *kinds)})]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="a row's turn lasts at least so long")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--only", choices=list(TITLES), help="this table; the others stay as they were")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    options = parser.parse_args()
    about, size = facts(options.device, options.note), dict(width=64, batch=128, tiny=False)
    if options.quick:
        size, options.rounds, options.seconds = dict(width=8, batch=4, tiny=True), 1, 0.0
    shown = [reference(), ours("fp32"), ours("bf16"), ours("bf16", fused=True)]
    shown += [ours("bf16", graph=True, fused=True)] if options.device == "cuda" else []
    old = ROOT / "benchmarks" / "results" / f"step_{options.device}.json"
    groups = json.loads(old.read_text())["groups"] if options.only and old.exists() else {}
    for group, rows in the_rows(options.device, options.compile, options.quick).items():
        if options.only in (None, group):
            threads = 1 if group == "one thread" or options.quick else cores()
            rows, kinds, peaks = measure(rows, threads, options, size, shown if group == "all" else ())
            groups[group] = {"about": about, "peaks": peaks, "rows": rows, "kinds": kinds}
            print(*table(rows, COLUMNS), sep="\n", flush=True)
            if not options.quick:  # after each group: a row that fails must not cost the others
                lines = to_markdown(groups, options.device)
                write(f"step_{options.device}", f"The training step on {about['device']}", about, lines, groups=groups)


if __name__ == "__main__":
    main()

"""How good are a run's pictures?  FID, KID, precision and recall, with all that another needs to get the same numbers.

    pip install -e .[eval]
    python benchmarks/quality.py score runs/best-celeba --reals celeb_dataset.zip --weights fid_inception.pth
    python benchmarks/quality.py compare A.json B.json        by what factor, if the two may be compared at all
    python benchmarks/quality.py table                        quality.md from all that was scored
    python benchmarks/quality.py all --faces celeb_dataset.zip --mnist mnist_dir --weights fid_inception.pth
                                                              trains and scores every row of the table: for a GPU

Weights: the FID Inception of 2015-12-05 as a state dict (pytorch-fid's pt_inception-2015-12-05-6726825d.pth); nothing
is downloaded here.  What a figure depends on is its fingerprint: the real pictures, the fakes' number and seeds, the
resizing, the weights, the precision.  Two figures of different fingerprints cannot be compared, and `compare` and
`table` do not.  Fakes are uint8 and never a JPEG.  Beside each figure stands its floor: what real pictures, as many as
there are fakes (at most half of them), get against all others.  Grey pictures are scored as RGB, and MNIST's digits
by a small classifier.

 FID                Heusel et al. 2017, arXiv:1706.08500, from 2048 features of Inception (pool3)
 KID                Binkowski et al. 2018, arXiv:1801.01401, 100 subsets of at most 1,000
 precision, recall  Kynkaanniemi et al. 2019, arXiv:1904.06991, 3 neighbours, in the same features, not VGG's
 nearest            is a picture copied?  The distance from a fake to the nearest real picture, by pixels and by
                    features, over that from a real picture to the nearest other: medians of 1,000.  A copy is near 0.
                    Suspects: the share of fakes, as they are or mirrored, at less than half of either median.
"""

import argparse
import dataclasses
import gzip
import hashlib
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import dcgan  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quality"
PROTOCOL = dict(features="torch-fidelity inception-v3-compat 2048", resize="TF 1 bilinear to 299x299")
FEW = 1000  # pictures whose nearest neighbours are looked for
COPIED = "--optimizer adam --weight-decay 0 --lr 2e-4 --beta1 0.5 --beta2 0.999 --no-flips --ema 0.999"
COARSE = "--family dcgan --lr-d 2.5e-4 --noise 0"  # best until 2026-11-29
PLAIN = f"{COARSE} --no-augment --no-self-modulation"  # until 2026-11-28
FACES = {  # the table: name -> preset, options; every row sees as many pictures
    "copied recipe": ("classic", COPIED),  # pytorch/examples
    **{name: (name, "") for name in ("classic", "regularized", "keras", "best")},
    # what each ingredient of best is worth, and what may not matter; that of EMA: best is scored with and without
    "best without augmentation": ("best", "--no-augment"),
    "best without self-modulation": ("best", "--no-self-modulation"),
    "best without full-size layers": ("best", "--family dcgan"),
    "best without noise": ("best", "--noise 0"),
    "coarse best": ("best", COARSE),
    "plain best": ("best", PLAIN),
    "best without spectral norm": ("best", "--no-spectral-norm"),
    "best without flips": ("best", "--no-flips"),
    "best at batch 16": ("best", "--batch-size 16"),
    "best at batch 64": ("best", "--batch-size 64"),
    "best at lr_d 2.5e-4": ("best", "--lr-d 2.5e-4"),
    "best at lr_g 2e-4 and lr_d 5e-5": ("best", "--lr-g 2e-4 --lr-d 5e-5"),
    "best at beta2 0.999": ("best", "--beta2 0.999"),
    "best at EMA 0.998": ("best", "--ema 0.998"),
    "best in fp32": ("best", "--precision fp32"),
    "best with fused kernels": ("best", "--fused"),
    "former best": ("best", f"{PLAIN} --batch-size 16 --lr-d 5e-4 --ema 0.998"),  # the preset until 2026-11-27
}
DIGITS = {  # as FACES, by epochs; without flips, since a mirrored digit is none
    "mnist": ("mnist", ""),
    "best on digits": ("best", "--image-size 28 --nc 1 --no-flips --epochs 10"),
    "best on digits at nz 8": ("best", "--image-size 28 --nc 1 --no-flips --nz 8 --epochs 10"),
}


def sha256(data):
    return hashlib.sha256(data).hexdigest()[:16]


# ---------------------------------------------------------------------------------------- features and figures


def inception(path, device, layer="2048"):
    """-> pictures (N, 3, H, W) uint8 -> a tuple of (N, 2048), from a state dict.  torch-fidelity wants every name it
    knows: `fc`, which no figure here uses, becomes 0, and BatchNorm's weight, which TensorFlow left out, 1."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    what = f"{path} is no state dict of the FID Inception: give pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
    with dcgan.explained(what, Exception):
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        if "Mixed_7c.branch1x1.conv.weight" not in state:
            raise ValueError(f"it has {', '.join(map(str, [*state][:3]))} ...")
    state = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
    for name in [name for name in state if name.endswith("bn.running_var")]:
        state.setdefault(name.replace("running_var", "weight"), torch.ones_like(state[name]))
    state.setdefault("fc.weight", torch.zeros(1008, 2048))
    state.setdefault("fc.bias", torch.zeros(1008))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, f"{folder}/weights.pth")
        net = FeatureExtractorInceptionV3("inception", [layer], feature_extractor_weights_path=f"{folder}/weights.pth")
    # features and distances are to be those of any other machine
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return net.to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def features(net, x, device, precision="fp32"):
    """x (n, 1 or 3, H, W) uint8 -> (n, 2048) float32 on the CPU."""
    out = []
    chunk = 16 if device.type == "cpu" else 256
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with bf16, dcgan.progress(len(x), "features {n_fmt}/{total_fmt} [{remaining}, {rate_fmt}] {bar}") as bar:
        for part in x.split(chunk):
            out.append(net(part.expand(-1, 3, -1, -1).to(device))[0].float().cpu())
            bar.update(len(part))
    return torch.cat(out)


def figures(fake, real, device="cpu"):
    """Features (n, 2048) and (m, 2048) -> {name: number}; torch-fidelity does the sums, in double precision for FID and
    KID, and measures distances on the device."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    statistics = (fid_features_to_statistics(x.double()) for x in (fake, real))
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    size = min(1000, len(fake), len(real))
    kid = kid_features_to_metric(fake.double(), real.double(), kid_subset_size=size, verbose=False)
    there = (x.to(device) for x in (fake, real))
    prc = prc_features_to_metric(*there, save_cpu_ram=True, prc_batch_size=4096, verbose=False)
    kid = {"kid": kid["kernel_inception_distance_mean"], "kid_std": kid["kernel_inception_distance_std"]}
    return {"fid": fid, **kid, "precision": prc["precision"], "recall": prc["recall"]}


def nearest(x, others, device="cpu", itself=False):
    """x (n, d), others (m, d) -> distances (n,) and places (n,) of the nearest.  `itself`: x are the first n others."""
    found = []
    for start in range(0, len(x), 250):
        part = x[start : start + 250].to(device).float().flatten(1)
        distances = [torch.cdist(part, o.to(device).float().flatten(1)).cpu() for o in others.split(2000)]
        distances = torch.cat(distances, 1)
        if itself:
            distances[torch.arange(len(part)), start + torch.arange(len(part))] = torch.inf
        found.append(distances.min(1))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def nearness(fake, real, of, page, device="cpu"):
    """-> how near fakes are to real pictures, as a share of how near those are to each other.  `of`: the features of
    fakes, of real pictures, of fakes mirrored.  The page: in each row four times a fake, the real picture nearest by
    pixels, the one nearest by features.  It shows training pictures."""
    n = min(FEW, len(fake), len(real))
    numbers, shown = {}, [fake[: min(32, n)].expand(-1, 3, -1, -1)]
    suspects = torch.zeros(n, dtype=torch.bool)
    for name, a, b, mirrored in (("pixels", fake, real, fake[:n].flip(-1)), ("features", *of)):
        distances, places = nearest(a[:n], b, device)
        either_way = torch.minimum(distances, nearest(mirrored[:n], b, device)[0])
        between = nearest(b[:n], b, device, itself=True)[0].median()
        suspects |= either_way < between / 2
        numbers[name] = (distances.median() / between).item()
        numbers[f"{name}_fake"], numbers[f"{name}_real"] = distances.median().item(), between.item()
        shown.append(real[places[:32]].expand(-1, 3, -1, -1))
    numbers["suspects"] = suspects.float().mean().item()
    dcgan.save_picture(dcgan.grid(torch.stack(shown, 1).flatten(0, 1), columns=12), page)
    return numbers


# ---------------------------------------------------------------------------------------- digits


def classifier():
    """-> a net: digits (N, 1, 28, 28) in [0, 1] -> logits (N, 10)."""
    first = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))


def read_digits(folder, part):
    """-> pictures (n, 1, 28, 28) in [0, 1] and labels (n,) of `train` or `t10k` in a folder of MNIST's idx files."""
    found = []
    for what in ("images[-.]idx3", "labels[-.]idx1"):
        path = next(filter(Path.is_file, sorted(Path(folder).glob(f"{part}-{what}-ubyte*"))), None)
        if not path:  # Kaggle has folders of these names beside the files
            name = f"{part}-{what}-ubyte".replace("[-.]", "-")
            raise ValueError(f"digits need all four of MNIST's files: {folder} has no {name}")
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = bytearray(file.read())
        found.append(torch.frombuffer(data[4 + 4 * data[3] :], dtype=torch.uint8))  # data[3] dimensions, 4 bytes each
    return found[0].view(-1, 1, 28, 28) / 255, found[1].long()


def train_classifier(folder, path, device, epochs=3):
    """-> the classifier in eval mode, from the cache or trained now; its accuracy on the 10,000 test pictures."""
    torch.manual_seed(0)
    net = classifier().to(device)
    if path.exists():
        net.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    else:
        x, y = read_digits(folder, "train")
        steps = epochs * (len(x) // 100)
        opt = torch.optim.Adam(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps)
        for batch in torch.cat([torch.randperm(len(x)) for _ in range(epochs)]).split(100)[:steps]:
            F.cross_entropy(net(x[batch].to(device)), y[batch].to(device)).backward()
            opt.step()
            opt.zero_grad()
            schedule.step()
        with dcgan.written_whole(path) as file:
            torch.save(net.state_dict(), file)
    net.eval()
    x, y = read_digits(folder, "t10k")
    return net, (classify(net, x, device).argmax(1) == y).float().mean().item()


@torch.inference_mode()
def classify(net, x, device):
    """Digits (n, 1, 28, 28) in [0, 1] -> probabilities (n, 10) on the CPU."""
    return torch.cat([net(part.to(device)).softmax(1).cpu() for part in x.split(500)])


def resized(x, size):
    """Pictures (n, 1, H, W) of 0 to 255 -> (n, 1, size, size), whole numbers as a file would hold them."""
    same = x.shape[-1] == size
    return x if same else F.interpolate(x.float(), (size, size), mode="bilinear", antialias=True).round().clamp(0, 255)


def digits(x, folder, path, device):
    """Fakes (n, 1, H, W) uint8 -> the share of each digit, and of pictures that a classifier is 0.9 sure of; that share
    of the real test digits, too, once they were as large as these."""
    net, accuracy = train_classifier(folder, path, device)
    if accuracy < 0.99:
        what = f"the classifier is right in {accuracy:.2%} of the test pictures, and 99% are needed"
        raise ValueError(f"{what}: these are not MNIST's digits, or {path} is not theirs; then remove it and try again")
    real = resized(read_digits(folder, "t10k")[0] * 255, x.shape[-1])
    found = (classify(net, resized(pictures, 28) / 255, device) for pictures in (x, real))
    of_fakes, of_reals = (probabilities.max(1) for probabilities in found)
    confident, confident_real = ((sure >= 0.9).float().mean().item() for sure, _ in (of_fakes, of_reals))
    shares = (torch.bincount(of_fakes.indices, minlength=10) / len(x)).tolist()
    return {"confident": confident, "confident_real": confident_real, "shares": shares, "accuracy": accuracy}


# ---------------------------------------------------------------------------------------- score


def load_raw(run, device):
    """-> G itself, not its EMA, from a run's checkpoint."""
    saved = dcgan.load(Path(run) / "checkpoint.pt")
    G = dcgan.Generator(saved["config"])
    G.load_state_dict(saved["G"])
    return G.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def minutes(folder, c):
    """-> minutes of training by a run's log, without its pauses; None if there is no log."""
    log = Path(folder) / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    seconds, before = 0, 0
    for row in rows:  # each of as many steps as came before it: report_every may have changed at a resume
        seconds += (row["step"] - before) * c.batch_size / row["img_s"] if row["img_s"] else 0
        before = row["step"]
    return seconds / 60 or None


def machine(device):
    """-> the processor in words, and the versions."""
    file = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", file.read_text()) if file.exists() else None
    cpu = f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}; torch {torch.__version__}"


def by_inception(fake, real, args, device, page):
    """-> all that is measured with Inception's features, with its floor and its fingerprint."""
    from torch_fidelity import __version__

    fingerprint = dict(
        PROTOCOL, reals=len(real), reals_sha256=sha256(real.contiguous().numpy()), size=list(real.shape[1:]),
        fakes=args.fakes, seeds=f"0-{args.fakes - 1}",
        weights_sha256=sha256(args.weights.read_bytes()), precision=args.precision,
    )  # fmt: skip
    net, options = inception(args.weights, device), (device, args.precision)
    of_reals = {k: v for k, v in fingerprint.items() if k not in ("fakes", "seeds")} | {"torch_fidelity": __version__}
    cached = Path(args.cache) / f"features_{sha256(json.dumps(of_reals).encode())}.pt"
    if not cached.exists():
        found = features(net, real, *options)
        with dcgan.written_whole(cached) as file:
            torch.save(found, file)
    real_features = torch.load(cached, weights_only=True)
    fake_features = features(net, fake, *options)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    n = min(args.fakes, len(real) // 2)
    some, others = real_features[order].split([n, len(real) - n])
    floors = cached.with_name(f"{cached.stem}_{n}.json")
    if not floors.exists():
        numbers = figures(some, others, device) | {"pictures": n}
        with dcgan.written_whole(floors) as file:
            file.write(json.dumps(numbers).encode())
    of = fake_features, real_features[order], features(net, fake[:FEW].flip(-1), *options)
    return {
        **figures(fake_features, real_features, device), "floor": json.loads(floors.read_text()),
        "nearest": nearness(fake, real[order], of, page, device),
        "fingerprint": fingerprint, "torch_fidelity": __version__,
    }  # fmt: skip


def score(args):
    """Score a run or a file of weights, and write all about it into one JSON."""
    source, device = Path(args.source), dcgan.choose_device(args.device)
    Path(args.cache).mkdir(parents=True, exist_ok=True)
    dcgan.tune(dcgan.config(), device)
    folder = source if source.is_dir() else source.parent
    G = load_raw(folder, device) if args.raw else dcgan.load_generator(source, device)
    file = folder / "checkpoint.pt" if args.raw else source if source.is_file() else folder / "generator.pt"
    c, step = G.config, dcgan.load(file)["step"]
    default = folder.name + (" without EMA" if args.raw else "")
    if source.is_file() and source.name != "generator.pt":
        default = f"{folder.parent.name if folder.name == 'snapshots' else folder.name} {source.stem}"
    idx = dcgan.find_idx(args.reals) if c.nc == 1 else None  # digits
    if not args.weights and not idx:
        raise ValueError("score needs --weights, the FID Inception, for all but MNIST's digits")
    fake = dcgan.draw(G, dcgan.latent(range(args.fakes), c.nz), device)
    result = {
        "name": args.name or default, "preset": c.preset, "pictures": step * c.batch_size, "seed": c.seed,
        "weights": "G" if args.raw or not c.ema else f"EMA {c.ema}",
        "parameters": sum(p.numel() for p in G.parameters()), "fakes": args.fakes,
    }  # fmt: skip
    if idx:
        try:
            result["digits"] = digits(fake, idx.parent, Path(args.cache) / "classifier.pt", device)
            print(f"confident  {result['digits']['confident']:.2%} of the digits")
        except ValueError as e:  # other pictures of MNIST's form, such as clothes, have an FID all the same
            if not args.weights:
                raise
            print(f"no digits  {e}")
    if args.weights:
        real = dcgan.load_pictures(dataclasses.replace(c, data=str(args.reals), cache=str(args.cache)))
        result |= by_inception(fake, real, args, device, folder / "nearest.png")
        for k in ("fid", "kid", "precision", "recall"):
            print(f"{k:<10} {result[k]:.4f}, the floor {result['floor'][k]:.4f}")
        near = result["nearest"]
        print(f"nearest    {near['pixels']:.2f} by pixels, {near['features']:.2f} by features")
        print(f"suspects   {near['suspects']:.1%}, as they are or mirrored")
    result |= {"minutes": minutes(folder, c), "training": dataclasses.asdict(c)}
    for private in ("data", "run", "cache"):  # paths of one machine
        result["training"].pop(private)
    result["machine"] = machine(device) + (f"; {args.note}" if args.note else "")
    out = args.out / f"{result['name'].replace(' ', '_').replace(',', '')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    dcgan.save_picture(dcgan.grid(fake[:64]), out.with_suffix(".png"))
    print(f"written    {out}")


# ---------------------------------------------------------------------------------------- compare, table, all


def protocol(result):
    """-> all that a FID depends on but the fakes: two of different protocols cannot be compared."""
    if "fid" not in result:
        raise ValueError(f"{result['name']} has no FID: it was scored without --weights")
    return result["fingerprint"] | {"torch_fidelity": result["torch_fidelity"]}


def compare(a, b):
    """-> FID of b over FID of a.  Raises ValueError if their protocols differ, and says in what."""
    one, other = protocol(a), protocol(b)
    differing = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    if differing:
        what = "; ".join(f"{name} {one.get(name)} and {other.get(name)}" for name in differing)
        raise ValueError(f"these figures cannot be compared, their protocols differ: {what}")
    return b["fid"] / a["fid"]


def spread(values, digits):
    """-> the mean, and in brackets the values, where there are several."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{v:.{digits}f}' for v in values)})"


COLUMNS = ["recipe", "pictures seen", "weights", "seeds", "FID", "KID x 1000", "precision", "recall",
           "nearest by pixels", "by features", "suspects", "minutes"]  # fmt: skip


def table_row(same):
    """Results of one recipe, one length and several seeds -> the cells of a row."""
    first = same[0]
    cells = [first["name"].split(" seed ")[0], f"{first['pictures']:,}", first["weights"]]
    cells += [", ".join(str(r["seed"]) for r in same)]
    cells += [spread([r["fid"] for r in same], 1), spread([1000 * r["kid"] for r in same], 1)]
    cells += [spread([r[k] for r in same], 3) for k in ("precision", "recall")]
    cells += [spread([r["nearest"][k] for r in same], 2) for k in ("pixels", "features")]
    cells += [", ".join(f"{r['nearest']['suspects']:.1%}" if "suspects" in r["nearest"] else "-" for r in same)]
    return [*cells, ", ".join(f"{r['minutes']:.0f}" if r["minutes"] else "-" for r in same)]


def table(results):
    """[what score wrote] -> lines of Markdown: a table for each fingerprint."""
    lines = ["# Quality", "", "Written by `python benchmarks/quality.py table`; the head of that file says what the "
             "columns are. Figures of different tables cannot be compared."]  # fmt: skip
    groups = {}
    for r in results:
        if "fid" in r:
            groups.setdefault(json.dumps(protocol(r), sort_keys=True), []).append(r)
    for group in groups.values():
        f, floor, rows = group[0]["fingerprint"], group[0]["floor"], {}
        for r in group:
            rows.setdefault((r["pictures"], r["name"].split(" seed ")[0], r["weights"]), []).append(r)
        taken = f"{floor['pictures']:,}" if "pictures" in floor else "half"
        last = [f"{taken} of the reals, the floor", "", "", "", f"{floor['fid']:.1f}", f"{1000 * floor['kid']:.1f}"]
        last += [f"{floor['precision']:.3f}", f"{floor['recall']:.3f}", "1", "1", "", ""]
        lines += ["", f"## {f['fakes']:,} fakes against {f['reals']:,} pictures of {'x'.join(map(str, f['size']))}", ""]
        table = [COLUMNS, ["---"] * len(COLUMNS), *(table_row(rows[key]) for key in sorted(rows)), last]
        lines += [f"| {' | '.join(cells)} |" for cells in table]
        lines += ["", "Fingerprint: " + "; ".join(f"{name} {value}" for name, value in f.items()) + "."]
        machines = sorted({f"{r['machine']}; torch-fidelity {r['torch_fidelity']}" for r in group})
        lines += ["", f"Measured on {', and on '.join(machines)}."]
    if any("digits" in r for r in results):
        lines += ["", "## Digits", "", "Confident: the classifier is 0.9 sure, or more. Of real ones: of the test "
                  "digits, resized as the fakes were.", ""]  # fmt: skip
        head = ["recipe", "pictures seen", "seed", "fakes", "confident", "of real ones", *"0123456789"]
        head += ["classifier right", "minutes"]
        lines += [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head))]
        for r in (r for r in results if "digits" in r):
            d, time = r["digits"], f"{r['minutes']:.0f}" if r["minutes"] else "-"
            cells = [r["name"].split(" seed ")[0], f"{r['pictures']:,}", str(r["seed"]), f"{r['fakes']:,}"]
            cells += [f"{d['confident']:.1%}", f"{d['confident_real']:.1%}" if "confident_real" in d else "-"]
            cells += [*(f"{s:.1%}" for s in d["shares"]), f"{d['accuracy']:.2%}", time]
            lines += [f"| {' | '.join(cells)} |"]
        lines += ["", f"Measured on {', and on '.join(sorted({r['machine'] for r in results if 'digits' in r}))}."]
    return [*lines, ""]


def train_and_score_all(args):
    """Train every row of the table with each seed, unless its run is there already, and score it.  A row that fails
    does not stop the others; being told to stop does."""
    rows, failed = FACES | DIGITS, []
    if not args.mnist and DIGITS.keys() & set(args.rows or ()):
        raise ValueError("--rows of digits need --mnist, the folder of MNIST's idx files")
    inception(args.weights, torch.device("cpu"))  # what scoring needs is to be missed now, not after the first row
    for name in args.rows or rows:
        preset, options = rows[name]
        data = args.mnist if name in DIGITS else args.faces
        for seed in args.seeds if data else []:
            c = dcgan.config(preset, **dcgan.read_options(options.split()))
            length = f"--steps {args.pictures // c.batch_size}" if name in FACES else f"--epochs {c.epochs}"
            folder = ROOT / "runs" / f"quality_{name.replace(' ', '_').replace(',', '')}_{seed}"
            words = [*f"--preset {preset} --seed {seed} {length} {options}".split(), "--data", data, "--run", folder]
            if (folder / "config.json").exists():
                words += ["--resume"]
                there = dataclasses.replace(c, run=str(folder), resume=True, seed=seed)
                there.given = dcgan.FIELDS.keys() - dcgan.MAY_CHANGE - {"data", "noise_steps"}
                try:  # it may have begun when this row was another: then it is refused
                    dcgan.open_run(there)
                except dcgan.UserError as e:
                    print(e)
                    failed.append(f"{name} seed {seed}")
                    continue
            code = subprocess.run([sys.executable, ROOT / "dcgan.py", *words, "--cache", args.cache]).returncode  # noqa: S603
            if code in (130, 143):
                raise SystemExit(code)
            if code:
                failed.append(f"{name} seed {seed}")
                continue
            words = ["score", folder, "--reals", data, "--weights", args.weights, "--cache", args.cache]
            words = [*map(str, words), "--fakes", str(args.fakes), "--precision", args.precision, "--note", args.note]
            scores = [["--name", f"{name} seed {seed}"]]
            if name in ("copied recipe", "best"):
                scores += [["--name", f"{name} without EMA seed {seed}", "--raw"]]
            for score in scores:
                try:
                    main([*words, *score])
                    torch.cuda.empty_cache()  # the next row trains in another process
                except (SystemExit, RuntimeError) as e:
                    print(e)
                    failed.append(score[1])
    main(["table"])
    if failed:
        raise ValueError(f"without {', '.join(failed)}: they could not be trained or scored, see above")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="command", required=True)
    a = commands.add_parser("score", help="a run -> a JSON of figures and a grid of samples")
    a.add_argument("source", help="the folder of a run, or its generator.pt or a snapshot")
    a.add_argument("--reals", type=Path, required=True, help="the pictures to be like: a folder, .zip or idx files")
    a.add_argument("--name", default="", help="of its row; 'NAME seed N' makes one row of several seeds (the folder's)")
    a.add_argument("--raw", action="store_true", help="score G itself where the run has an EMA")
    a.add_argument("--device", default="auto", help="cuda, cpu")
    b = commands.add_parser("all", help="train and score every row")
    b.add_argument("--faces", type=Path, required=True, help="the folder or .zip of faces")
    b.add_argument("--mnist", type=Path, help="the folder of MNIST's idx files")
    b.add_argument("--pictures", type=int, default=2_000_000, help="that each row of faces sees (2,000,000)")
    b.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the runs of each row (0 1)")
    names = [*FACES, *DIGITS]
    b.add_argument("--rows", nargs="+", metavar="ROW", choices=names, help=f"{', '.join(names)} (all of these)")
    for q in (a, b):
        q.add_argument("--note", default="", help="a word on the circumstances, kept with the name of the machine")
        q.add_argument("--weights", type=Path, required=q is b, help="the FID Inception; none: only the digits")
        q.add_argument("--fakes", type=int, default=10_000, help="pictures to draw (10,000)")
        q.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the features; bf16: for CPUs")
        q.add_argument("--cache", type=Path, default=ROOT / "runs" / "cache", help="where features of reals are kept")
    t = commands.add_parser("table", help="the JSONs -> quality.md beside their folder")
    for q in (a, t):
        q.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSONs")
    d = commands.add_parser("compare", help="two JSONs -> the ratio of their FID, or why there is none")
    d.add_argument("files", type=Path, nargs=2)
    args = p.parse_args(argv)
    try:
        if args.command == "score":
            score(args)
        elif args.command == "all":
            train_and_score_all(args)
        elif args.command == "table":
            results = [json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]
            args.out.with_suffix(".md").write_text("\n".join(table(results)))
        else:
            one, other = (json.loads(path.read_text()) for path in args.files)
            print(f"{other['name']} has {compare(one, other):.2f} times the FID of {one['name']}")
    except (dcgan.UserError, ValueError, OSError, ImportError) as e:
        sys.exit(f"quality.py: {e}")


if __name__ == "__main__":
    main()

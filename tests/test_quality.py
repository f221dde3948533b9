"""benchmarks/quality.py: figures of known distributions, fingerprints that keep unlike figures apart, a run scored."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import real_data
from PIL import Image

import dcgan

pytest.importorskip("torch_fidelity", reason="no torch-fidelity: pip install -e .[eval]")
QUALITY = runpy.run_path(str(Path(__file__).resolve().parents[1] / "benchmarks" / "quality.py"))
CPU = torch.device("cpu")


def normal(n, d=16, mean=0.0, std=1.0, seed=0):
    return mean + std * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def result(name="a", seed=0, fid=10.0, pictures=1000, **fingerprint):
    """What `score` writes, as far as `table` and `compare` read it."""
    figures = dict(fid=fid, kid=0.01, precision=0.5, recall=0.4)
    return {
        "name": f"{name} seed {seed}", "seed": seed, "pictures": pictures, "weights": "G", "minutes": 1.0, **figures,
        "floor": dict(fid=1.0, kid=0.0, precision=0.8, recall=0.8), "nearest": dict(pixels=1.0, features=1.1),
        "fingerprint": dict(reals=20, fakes=10, size=[3, 8, 8], reals_sha256="x") | fingerprint, "machine": "m",
        "torch_fidelity": "1",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------- figures


def test_fid_of_gaussians_is_what_the_formula_says():
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) = d (3^2 + (2 - 1)^2), for samples of exactly these moments."""
    x = normal(300, 4).double()
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), (x - x.mean(0)).T, upper=False).T
    assert QUALITY["figures"](3 + 2 * x, x.flip(0))["fid"] == pytest.approx(4 * 10, rel=1e-6)


def test_equal_distributions_are_at_the_floor():
    numbers = QUALITY["figures"](normal(400, 4), normal(400, 4, seed=1))
    assert numbers["fid"] < 0.2
    assert abs(numbers["kid"]) < 0.05
    assert numbers["precision"] > 0.9 and numbers["recall"] > 0.9


def test_precision_and_recall_tell_a_collapse_from_noise():
    real = normal(400, 4)
    collapsed = QUALITY["figures"](normal(400, 4, std=0.05, seed=1), real)
    assert collapsed["precision"] > 0.95 and collapsed["recall"] < 0.05
    noise = QUALITY["figures"](normal(400, 4, std=10, seed=1), real)
    assert noise["precision"] < 0.1


def test_kid_grows_with_the_distance():
    real, near, far = normal(400), normal(400, mean=0.3, seed=1), normal(400, mean=0.6, seed=1)
    kid = [QUALITY["figures"](x, real)["kid"] for x in (near, far)]
    assert 0.05 < kid[0] < kid[1] / 2


# ---------------------------------------------------------------------------------------- nearest


def test_a_copy_is_found_and_a_picture_is_not_its_own_neighbour():
    real = torch.randint(0, 256, (600, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    distances, places = QUALITY["nearest"](real[[17, 503]], real)
    assert places.tolist() == [17, 503] and distances.max() < 0.1
    distances, places = QUALITY["nearest"](real[:300], real, itself=True)
    assert (places != torch.arange(300)).all() and distances.min() > 100


def test_copies_are_near_0_and_other_pictures_near_1(tmp_path):
    """and the page goes where it is told to, for it shows training pictures."""
    x = torch.randint(0, 256, (400, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    f, page = normal(400), tmp_path / "nearest.png"
    copied = QUALITY["nearness"](x[:100], x[:200], (f[:100], f[:200], f[:100]), page)
    other = QUALITY["nearness"](x[200:300], x[:200], (f[200:300], f[:200], f[300:]), page)
    assert copied["pixels"] < 0.01 and copied["features"] < 0.01 and copied["suspects"] == 1
    assert other["pixels"] == pytest.approx(1, abs=0.1) and other["features"] == pytest.approx(1, abs=0.1)
    assert other["suspects"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["nearest.png"]


def test_suspects_are_counted_mirrored_too_by_pixels_and_by_features(tmp_path):
    x = torch.randint(0, 256, (400, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    f, fake, of_fakes, mirrored = normal(400), x[200:300].clone(), normal(100, seed=1), normal(100, seed=2)
    fake[:10], fake[10:30] = x[:10], x[10:30].flip(-1)
    of_fakes[30:35], mirrored[35:40] = f[30:35], f[35:40]
    found = QUALITY["nearness"](fake, x[:200], (of_fakes, f[:200], mirrored), tmp_path / "nearest.png")
    assert found["suspects"] == pytest.approx(0.40) and found["pixels"] == pytest.approx(1, abs=0.1)


# ---------------------------------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("other", [dict(fakes=11), dict(reals_sha256="y"), dict(precision="bf16")])
def test_figures_of_different_fingerprints_are_not_compared(other):
    assert QUALITY["compare"](result(fid=10.0), result(fid=4.0)) == 0.4
    with pytest.raises(ValueError, match=f"cannot be compared.*{next(iter(other))}"):
        QUALITY["compare"](result(), result(**other))


def test_compare_says_so_in_one_line_and_fails(tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, fakes in zip(files, (10, 20), strict=True):
        file.write_text(json.dumps(result(fakes=fakes)))
    with pytest.raises(SystemExit, match="quality.py: .*fakes 10 and 20"):
        QUALITY["main"](["compare", *map(str, files)])


def test_other_versions_and_digits_are_not_compared():
    """0.4.0-beta of torch-fidelity swaps precision and recall."""
    with pytest.raises(ValueError, match="cannot be compared.*torch_fidelity 1 and 2"):
        QUALITY["compare"](result(), result() | {"torch_fidelity": "2"})
    digits = {"name": "mnist seed 0", "digits": {}}
    with pytest.raises(ValueError, match="mnist seed 0 has no FID.*--weights"):
        QUALITY["compare"](result(), digits)
    lines = QUALITY["table"]([result(), result() | {"torch_fidelity": "2"}])
    assert sum(line.startswith("## ") for line in lines) == 2


def test_the_table_keeps_fingerprints_apart_and_seeds_together():
    lines = QUALITY["table"]([result(), result(seed=1, fid=20.0), result(pictures=2000), result("b", fakes=11)])
    assert len([line for line in lines if line.startswith("## ")]) == 2
    rows = [line for line in lines if line.startswith(("| a", "| b"))]
    assert len(rows) == 3 and "0, 1 | 15.0 (10.0, 20.0)" in rows[0]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


# ---------------------------------------------------------------------------------------- digits


@pytest.mark.parametrize("size", [28, 32])
def test_the_shares_of_digits_are_counted(size, monkeypatch, tmp_path):
    """A stand-in for the classifier: the digit is 1/25 of the mean, and it is sure of it where the picture is grey."""

    def net(x):
        assert x.shape[1:] == (1, 28, 28) and x.min() >= 0 and x.max() <= 1
        sure = 20.0 * (x.flatten(1).std(1) < 1e-3)
        return F.one_hot((x.mean((1, 2, 3)) * 255 / 25).round().long(), 10) * sure[:, None]

    def grey(*digits):
        return torch.tensor([25 * digit for digit in digits]).view(-1, 1, 1, 1).expand(-1, 1, size, size).clone()

    fake, real = grey(3, 3, 3, 7).to(torch.uint8), grey(1, 2)[..., :28, :28] / 255
    fake[2, 0, : size // 2], real[1, 0, 0] = 250, 0  # unsure
    globals_ = QUALITY["digits"].__globals__
    monkeypatch.setitem(globals_, "train_classifier", lambda *_: (net, 0.995))
    monkeypatch.setitem(globals_, "read_digits", lambda *_: (real, None))
    found = QUALITY["digits"](fake, tmp_path, tmp_path / "c.pt", CPU)
    assert found["confident"] == 0.75 and found["shares"][3] == 0.5 and found["shares"][7] == 0.25
    assert found["confident_real"] == 0.5 and found["accuracy"] == 0.995
    monkeypatch.setitem(globals_, "train_classifier", lambda *_: (net, 0.98))
    with pytest.raises(ValueError, match="right in 98"):
        QUALITY["digits"](fake, tmp_path, tmp_path / "c.pt", CPU)


@pytest.mark.parametrize("preset, size", [("mnist", 28), ("best", 28), ("best", 32)])
def test_digits_are_scored_without_inception(preset, size, tiny, tmp_path, monkeypatch):
    c = tiny(preset=preset, data=str(real_data("mnist")), image_size=size, nc=1, steps=1)
    assert dcgan.train(c) == 0
    monkeypatch.setitem(QUALITY["digits"].__globals__, "train_classifier", lambda *_: (classifier.eval(), 0.995))
    classifier = QUALITY["classifier"]()
    where = ["--reals", c.data, "--cache", c.cache, "--out", str(tmp_path / "quality"), "--note", "in a test"]
    QUALITY["main"](["score", c.run, *where, "--fakes", "20", "--name", "mnist seed 5"])
    found = json.loads((tmp_path / "quality" / "mnist_seed_5.json").read_text())
    assert sum(found["digits"]["shares"]) == pytest.approx(1) and "fid" not in found
    QUALITY["main"](["table", "--out", str(tmp_path / "quality")])
    lines = (tmp_path / "quality.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 3 and len({line.count("|") for line in rows}) == 1 and lines[-1].endswith("in a test.")
    assert rows[2].startswith(f"| mnist | {c.batch_size} | {c.seed} | 20 | ")


def test_digits_and_labels_belong_together():
    x, y = QUALITY["read_digits"](real_data("mnist"), "t10k")
    assert x.shape == (10_000, 1, 28, 28) and x.max() == 1 and y.bincount().tolist()[:3] == [980, 1135, 1032]


def test_digits_of_other_layouts_are_read_and_missing_files_named(tmp_path):
    """Kaggle's: a dot in the names, and folders of the other names beside the files."""
    (tmp_path / "t10k-images-idx3-ubyte").mkdir()
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (2, 28, 28))
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(header + bytes([255]) * 2 * 28 * 28)
    with pytest.raises(ValueError, match=tmp_path.name + " has no t10k-labels-idx1-ubyte"):
        QUALITY["read_digits"](tmp_path, "t10k")
    (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 3, 7]))
    x, y = QUALITY["read_digits"](tmp_path, "t10k")
    assert x.shape == (2, 1, 28, 28) and x.min() == 1 and y.tolist() == [3, 7]


# ---------------------------------------------------------------------------------------- a run, scored


def test_a_run_is_scored(tiny, tmp_path, monkeypatch, capsys):
    """With a stand-in for Inception, so that no weights are needed: each file, each figure, no path of this machine."""
    c = tiny(steps=6, ema=0.9)
    assert dcgan.train(c) == 0
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"weights")
    stand_in = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8))
    globals_ = QUALITY["score"].__globals__
    monkeypatch.setitem(globals_, "inception", lambda *_: lambda x: (stand_in(x.float() / 255),))
    where = ["--reals", c.data, "--weights", str(weights), "--cache", c.cache, "--out", str(tmp_path / "quality")]
    for more in ([], ["--raw"]):
        QUALITY["main"](["score", c.run, *where, "--fakes", "20", *more])
    QUALITY["main"](["score", f"{c.run}/snapshots/generator_000006.pt", *where, "--fakes", "20"])
    QUALITY["main"](["score", f"{c.run}/checkpoint.pt", *where, "--fakes", "20", "--raw"])
    names = ("run", "run_without_EMA", "run_generator_000006", "run_checkpoint")
    a, b, same, raw = (json.loads((tmp_path / "quality" / f"{name}.json").read_text()) for name in names)
    assert same["fid"] == a["fid"] and raw["fid"] == b["fid"]
    assert a["weights"] == "EMA 0.9" and b["weights"] == "G" and a["fid"] != b["fid"]
    assert a["floor"]["pictures"] == 12 and a["nearest"]["suspects"] <= 1
    assert a["fingerprint"] == b["fingerprint"] and a["fingerprint"]["reals"] == 24 and a["pictures"] == 24
    assert (tmp_path / "quality" / "run.png").exists() and (Path(c.run) / "nearest.png").exists()
    assert str(tmp_path) not in json.dumps(a)
    QUALITY["main"](["table", "--out", str(tmp_path / "quality")])
    assert "| run | 24 | EMA 0.9 |" in (tmp_path / "quality.md").read_text()
    with pytest.raises(SystemExit, match="needs --weights"):
        QUALITY["main"](["score", c.run, "--reals", c.data, "--out", str(tmp_path / "quality")])
    with pytest.raises(SystemExit, match="nothing_here"):
        QUALITY["main"](["score", str(tmp_path / "nothing_here"), *where])


def test_minutes_are_those_of_the_log_whatever_lay_between_its_lines(tiny, tmp_path):
    c = tiny("classic", batch_size=10, report_every=50)
    rows = [{"step": step, "img_s": 5.0} for step in (10, 20, 30, 80, 130)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert QUALITY["minutes"](tmp_path, c) == pytest.approx(130 * 10 / 5 / 60)


def test_few_real_pictures_have_a_page_too(tmp_path):
    fake, real = torch.randint(256, (2, 40, 3, 8, 8), dtype=torch.uint8)
    features = [torch.randn(n, 16) for n in (40, 5, 40)]
    assert QUALITY["nearness"](fake, real[:5], features, tmp_path / "page.png")["pixels"] > 0
    assert Image.open(tmp_path / "page.png").size == (12 * 10 + 2, 2 * 10 + 2)  # 5 rows of 3, 12 in a line


def test_every_row_is_trained_and_scored(monkeypatch, tmp_path):
    """`all` writes command lines that dcgan.py reads, on the right pictures, each row as long as the others."""
    trained, scored, argv = [], [], ["all", "--faces", "f.zip", "--mnist", "m", "--seeds", "7", "--weights"]
    with pytest.raises(SystemExit, match="need --mnist"):  # no row that is asked for is left out without a word
        QUALITY["main"](["all", "--faces", "f.zip", "--rows", "best", "mnist", "--weights", __file__])
    with pytest.raises(SystemExit, match="w.pth is no state dict .*No such file"):  # before anything is trained
        QUALITY["main"]([*argv, str(tmp_path / "w.pth")])
    (tmp_path / "w.pth").touch()
    argv += [str(tmp_path / "w.pth")]
    with pytest.raises(SystemExit, match="w.pth is no state dict of the FID Inception"):
        QUALITY["main"](argv)
    monkeypatch.setitem(QUALITY["main"].__globals__, "inception", lambda *_: None)
    codes = iter([2, *[0] * 100])  # the first row fails

    def run(words):
        trained.append([str(w) for w in words[2:]])
        return subprocess.CompletedProcess(words, next(codes))

    monkeypatch.setattr(QUALITY["subprocess"], "run", run)

    def score(words):
        scored.append(words)
        if "keras seed 7" in words:  # as one that cannot be scored
            sys.exit("quality.py: no room")

    everything = QUALITY["main"]
    monkeypatch.setitem(QUALITY["main"].__globals__, "main", score)
    with pytest.raises(SystemExit, match="without copied recipe seed 7, keras seed 7:"):
        everything([*argv, "--pictures", "64000"])
    faces, digits = len(QUALITY["FACES"]), len(QUALITY["DIGITS"])
    assert len(trained) == faces + digits and len(scored) == faces + digits + 1  # once without EMA, the table
    for i, words in enumerate(trained):
        given = dcgan.read_options(words)
        c = dcgan.config(**given)
        assert c.data == ("f.zip" if i < faces else "m") and c.seed == 7
        if i < faces:
            assert c.steps * c.batch_size == 64000
        else:
            assert (c.nc, c.image_size, c.flips, c.steps) == (1, 28, False, 0)
    assert sum("--raw" in words for words in scored) == 1 and scored[-1] == ["table"]
    codes = iter([0, 130])
    with pytest.raises(SystemExit, match="130"):  # Ctrl-C
        everything(argv)


def test_a_row_that_was_begun_goes_on_unless_it_was_another(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(QUALITY["main"].__globals__, "ROOT", tmp_path)
    folder = tmp_path / "runs" / "quality_best_7"
    folder.mkdir(parents=True)
    trained = []

    def run(words):
        trained.append([str(w) for w in words[2:]])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(QUALITY["subprocess"], "run", run)
    everything = QUALITY["main"]
    monkeypatch.setitem(everything.__globals__, "main", lambda _: None)
    monkeypatch.setitem(everything.__globals__, "inception", lambda *_: None)
    (tmp_path / "w.pth").touch()
    argv = ["all", "--faces", "f.zip", "--weights", str(tmp_path / "w.pth"), "--seeds", "7", "--rows", "best"]
    argv += ["--pictures", "8000"]
    for c in (dcgan.config("best", seed=7, steps=1000), dcgan.config("best", seed=7, batch_size=16)):
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(c)))
        if c.batch_size == 8:
            everything(argv)
    with pytest.raises(SystemExit, match="without best seed 7"):
        everything(argv)
    assert len(trained) == 1 and "--resume" in trained[0]
    assert "batch_size 8: it began with 16" in capsys.readouterr().out


def test_pictures_of_mnists_form_that_are_no_digits_have_an_fid(tiny, tmp_path, monkeypatch, capsys):
    c = tiny(preset="mnist", data=str(real_data("mnist")), image_size=28, nc=1, steps=1)
    assert dcgan.train(c) == 0
    globals_ = QUALITY["score"].__globals__
    found = {k: 0.25 for k in ("fid", "kid", "precision", "recall")}
    near = {"pixels": 1.0, "features": 1.0, "suspects": 0.0}
    monkeypatch.setitem(globals_, "train_classifier", lambda *_: (QUALITY["classifier"](), 0.91))
    monkeypatch.setitem(globals_, "by_inception", lambda *_: {**found, "floor": found, "nearest": near})
    words = ["score", c.run, "--reals", c.data, "--cache", c.cache, "--out", str(tmp_path / "quality"), "--fakes", "4"]
    with pytest.raises(SystemExit, match="not MNIST's digits"):
        QUALITY["main"](words)
    QUALITY["main"]([*words, "--weights", "w.pth", "--name", "clothes"])
    assert "no digits" in capsys.readouterr().out
    result = json.loads((tmp_path / "quality" / "clothes.json").read_text())
    assert result["fid"] == 0.25 and "digits" not in result


@pytest.mark.slow
def test_the_features_are_those_of_the_library(tmp_path):
    """The state dict lacks what torch-fidelity wants by name; one of other names is refused, not filled up."""
    path = real_data("fid_inception_fp16.pth")
    net = QUALITY["inception"](path, CPU)
    x = torch.stack([dcgan.T.pil_to_tensor(dcgan.draw_face(i, 64)) for i in range(2)])
    one, both = QUALITY["features"](net, x[:1], CPU), QUALITY["features"](net, x, CPU, "bf16")
    assert one.shape == (1, 2048) and (one >= 0).all()
    assert (both[0] - one[0]).norm() < 0.05 * one.norm() and (both[1] - one[0]).norm() > 0.1 * one.norm()
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(dcgan.UserError, match="no state dict of the FID Inception"):
        QUALITY["inception"](tmp_path / "other.pth", CPU)


@pytest.mark.slow
def test_the_published_example_is_reproduced():
    """The examples in the source of torchmetrics (commit 0659d59): FID of 64 features 12.7202, KID of 2,048 features
    0.0337, on noise drawn from one seed after the network was built.  KID's subsets are others there."""
    path = real_data("fid_inception_fp16.pth")
    for layer, name, published, tolerance in (("64", "fid", 12.7202, 0.001), ("2048", "kid", 0.0337, 0.02)):
        torch.manual_seed(123)
        net = QUALITY["inception"](path, CPU, layer)
        ranges = ((0, 200), (100, 255))
        pictures = [torch.randint(*r, (100, 3, 299, 299), dtype=torch.uint8) for r in ranges]
        features = [QUALITY["features"](net, x, CPU) for x in pictures]
        assert QUALITY["figures"](*features)[name] == pytest.approx(published, rel=tolerance)

"""Does D know real pictures by what JPEG left in them?  G cannot draw that, so such a D wins whatever G does.

    python benchmarks/jpeg.py RUN --data celeb_dataset
    python benchmarks/jpeg.py RUN --data celeb_dataset --quality 85 --pictures 2000

DATA: pictures of the run's kind, best several times as large as its own.  Scaled to its size they stand for pictures
that no JPEG has touched there.  D gets each of them as it is, and after JPEG of --quality, colour at full resolution;
and as many fakes of G (of its EMA, if it has one), as they are and after JPEG.  D works as in a step of training:
BatchNorm takes the statistics of each mini-batch, the run's noise is on its input; only mirroring and augmentation are
off.

A D that looks at what is drawn says the same before and after.  The more the first two rows differ, the more of D's
lead is about files, not faces; `--noise 0.05 --noise-steps -1` hides that from it.  On the CPU; writes nothing but the
decoded pictures, as a run would.
"""

import argparse
import dataclasses
import io
from pathlib import Path

import torch
from common import ROOT, dcgan, table
from PIL import Image
from torchvision.transforms.v2 import functional as T


def after_jpeg(x, quality):
    """(n, nc, H, W) uint8 -> the same pictures, written as JPEG and read again."""
    pictures = []
    for one in x:
        file = io.BytesIO()
        T.to_pil_image(one).save(file, "JPEG", quality=quality, subsampling=0)
        pictures.append(T.pil_to_tensor(Image.open(file)))
    return torch.stack(pictures)


def load_discriminator(folder):
    """-> D of a run's checkpoint in training mode, its augmentation at p = 0, and the step that it has reached."""
    saved = dcgan.load(Path(folder) / "checkpoint.pt")
    D = dcgan.Discriminator(saved["config"])
    D.load_state_dict(saved["D"])
    if saved["config"].augment:
        D.p.zero_()  # it moves only where a mini-batch holds both real pictures and fakes
    return D.train(), saved["step"]


@torch.no_grad()
def logits(D, G, originals, step, pictures, quality):
    """-> {row: D's logits of `pictures` or a few more, as the steps from `step` on would see them}"""
    c, device, rows = dataclasses.replace(D.config, flips=False), torch.device("cpu"), {}
    for now in range(step, step + -(-pictures // c.batch_size)):
        real, z, noise = dcgan.draw_inputs(c, originals, now, device)
        fake = dcgan.draw(G, z[0], device, chunk=c.batch_size)
        seen = {
            "pictures scaled to this size": real,
            "the same after JPEG": dcgan.to_range(after_jpeg(dcgan.to_pixels(real, c), quality), c),
            "fakes": dcgan.to_range(fake, c),
            "fakes after JPEG": dcgan.to_range(after_jpeg(fake, quality), c),
        }
        for row, x in seen.items():
            rows.setdefault(row, []).append(D(x + noise[0]))
    return {row: torch.cat(found) for row, found in rows.items()}


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run, with its checkpoint.pt")
    parser.add_argument("--data", required=True, help="folder or .zip of larger pictures of the same kind")
    parser.add_argument("--quality", type=int, default=95, help="of JPEG, 1 to 100 (95)")
    parser.add_argument("--pictures", type=int, default=1000, help="how many of each row (1000)")
    parser.add_argument("--cache", default=str(ROOT / "runs" / "cache"), help="folder of decoded pictures")
    options = parser.parse_args(args)
    (D, step), G = load_discriminator(options.run), dcgan.load_generator(options.run)
    originals = dcgan.load_pictures(dataclasses.replace(D.config, data=options.data, cache=options.cache))
    found = logits(D, G, originals, step, options.pictures, options.quality)
    rows = []
    for row, x in found.items():
        values = {"D(x)": x.sigmoid().mean(), "mean logit": x.mean(), "taken for real": (x > 0).float().mean()}
        rows.append({"": row} | {name: f"{value:.2f}" for name, value in values.items()})
    print("\n".join(table(rows, {name: name for name in rows[0]})))
    real, compressed, fakes, _ = (x.mean().item() for x in found.values())
    share = (compressed - real) / (compressed - fakes)
    print(f"\nOf what D sees between pictures after JPEG {options.quality} and fakes, JPEG is {share:.0%}.")


if __name__ == "__main__":
    try:
        main()
    except dcgan.UserError as e:
        raise SystemExit(f"jpeg.py: {e}") from None

"""Are a run's drawn faces faces, and are they many?  A number for each part, as a share of what the drawn ones have.

    python dcgan.py && python benchmarks/demo.py runs/demo-drawn

Of 512 pictures, seeds 0-511, beside 512 drawn ones, those of an untrained G and one picture repeated:
    sky, hair, skin   variety: the standard deviation over pictures of a region's mean colour
    eyes, mouth       contrast: within the boxes of the eyes, and of the mouth against the cheeks
    unlike            distance of a picture to the one most like it in its set, so that a few faces repeated fail
A set passes where every share is at least 0.7.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dcgan  # noqa: E402

REGIONS = {  # top, bottom, left, right in 32nds of the picture, where most drawn faces have the part
    "sky": (0, 3, 0, 32),
    "hair": (6, 9, 13, 19),
    "skin": (19, 21, 14, 18),
}
EYES, MOUTH, CHEEKS = (14, 18, 10, 22), (22, 26, 13, 19), (18, 21, 12, 20)
ENOUGH = 0.7


def cut(x, box):
    """(N, 3, H, W) -> the part of it in a box of 32nds."""
    top, bottom, left, right = (round(edge * x.shape[-1] / 32) for edge in box)
    return x[:, :, top:bottom, left:right]


def measure(x):
    """(N, 3, H, W) uint8 -> {name: number}, absolute."""
    x = x.float() / 255
    numbers = {name: cut(x, box).mean((2, 3)).std(0).mean().item() for name, box in REGIONS.items()}
    numbers["eyes"] = cut(x, EYES).mean(1).flatten(1).std(1).mean().item()
    mouth, cheeks = cut(x, MOUTH).mean((2, 3)), cut(x, CHEEKS).mean((2, 3))
    numbers["mouth"] = (mouth - cheeks).abs().mean().item()
    distances = torch.cdist(x.flatten(1), x.flatten(1)).fill_diagonal_(torch.inf)
    numbers["unlike"] = distances.min(1).values.mean().item()
    return numbers


def shares(x, drawn):
    """-> {name: share of what the drawn pictures have}, both (N, 3, H, W) uint8."""
    of, whole = measure(x), measure(drawn)
    return {name: of[name] / whole[name] for name in whole}


def main(run, n=512):
    G = dcgan.load_generator(run)
    z = dcgan.latent(range(n), G.config.nz)
    size = G.config.image_size
    faces = [dcgan.T.pil_to_tensor(dcgan.draw_face(dcgan.DRAWN + i, size)) for i in range(2 * n)]  # none it has seen
    drawn, others = torch.stack(faces[:n]), torch.stack(faces[n:])
    made = dcgan.draw(G, z, "cpu")
    sets = {
        "drawn, others": others,
        "this run": made,
        "first weights": dcgan.draw(dcgan.Generator(G.config), z, "cpu"),
        "one face repeated": made[:1].expand(n, -1, -1, -1),
    }
    passes = {}
    for i, (what, x) in enumerate(sets.items()):
        values = shares(x, drawn)
        passes[what] = min(values.values()) >= ENOUGH
        if i == 0:
            print(f"{'':<18}" + "".join(f"{name:>8}" for name in values))
        verdict = "passes" if passes[what] else "fails"
        print(f"{what:<18}" + "".join(f"{value:>8.2f}" for value in values.values()) + f"  {verdict}")
    return 0 if passes["this run"] else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/demo.py RUN, the folder or generator of a demo run")
    try:
        sys.exit(main(sys.argv[1]))
    except dcgan.UserError as e:
        sys.exit(f"demo.py: {e}")

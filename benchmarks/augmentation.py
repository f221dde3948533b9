"""A trial that is not in dcgan.py: adaptive augmentation, for data sets so small that D learns them by heart.

    python benchmarks/augmentation.py --data FACES.zip --fused       options as of dcgan.py, and a run as any other

All that D sees, real and fake, is turned, scaled, shifted and coloured with a probability p, so that no picture comes
twice.  G learns from what D says of augmented fakes; as long as p stays below 1, what it draws is not augmented.  p is
steered: it rises while D is too sure of the real pictures, the mean sign of its logits above TARGET, and falls below.
p is 0 at first, so that a young D is not held back.  p and that mean are buffers of D: a checkpoint has them, so that
such a run goes on by this program only (--resume); dcgan.py generates from it as from any other.
benchmarks/results/ablation.md says what it brought.  Karras et al. 2020, arXiv:2006.06676.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dcgan  # noqa: E402

TARGET, MOST = 0.5, 0.8  # of the mean sign; of p
SPEED = 50_000  # real pictures in which p would go from 0 to 1


def augment(x, p):
    """Pictures (N, nc, H, W), p () -> float32 of the same shape: each with probability p turned by up to 14 degrees,
    scaled (the logarithm has a std of 0.15) and shifted by up to an eighth of its side; with p coloured, too."""
    n, chance = len(x), dict(device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        on = (torch.rand(n, **chance) < p).float()
        angle, scale = (torch.rand(n, **chance) - 0.5) * 0.5 * on, torch.exp(torch.randn(n, **chance) * 0.15 * on)
        shift = (torch.rand(n, 2, **chance) - 0.5) * 0.5 * on[:, None]
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
        places = F.affine_grid(rows, list(x.shape), align_corners=False)
        x = F.grid_sample(x, places, padding_mode="reflection", align_corners=False)
        on = (torch.rand(n, 1, 1, 1, **chance) < p).float()
        saturation, contrast, light = (std * torch.randn(n, 1, 1, 1, **chance) * on for std in (0.4, 0.2, 0.2))
        grey = x.mean(1, keepdim=True)
        x = (grey + (x - grey) * saturation.exp()) * contrast.exp() + light
        return x.contiguous(memory_format=torch.channels_last)


class Augmented(dcgan.Discriminator):
    """A Discriminator that augments what it is given in training."""

    def __init__(self, c, ops=dcgan.PLAIN):
        super().__init__(c, ops)
        self.register_buffer("p", torch.zeros(()))
        self.register_buffer("sure", torch.zeros(()))  # the moving mean sign of the logits of real pictures

    def forward(self, x, groups=1):
        if not self.training:
            return super().forward(x, groups)
        logits = super().forward(augment(x, self.p), groups)
        if groups == 2:  # D's turn: the first half is real
            with torch.no_grad():
                self.sure += 0.005 * (logits[: len(x) // 2].sign().mean() - self.sure)
                self.p += torch.sign(self.sure - TARGET) * (len(x) // 2 / SPEED)
                self.p.clamp_(0, MOST)
        return logits


def main(argv=None):
    plain = dcgan.draw_inputs

    def draw_inputs(c, pictures, step, device):
        torch.manual_seed(dcgan.key(c.seed, "augment", step, dcgan.RANK))  # as all else it follows from (seed, step)
        return plain(c, pictures, step, device)

    dcgan.draw_inputs, dcgan.Discriminator = draw_inputs, Augmented
    return dcgan.main(argv)


if __name__ == "__main__":
    sys.exit(main())

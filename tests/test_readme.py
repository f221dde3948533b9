"""What the README shows is what the program does."""

import re
from pathlib import Path

import pytest
import torch

import dcgan

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("preset", dcgan.PRESETS)
def test_the_table_of_shapes_is_what_the_networks_have(preset):
    c = dcgan.config(preset)
    pictures = torch.zeros(1, c.nc, c.image_size, c.image_size)
    for net, x in ((dcgan.Generator(c), torch.zeros(1, c.nz)), (dcgan.Discriminator(c), pictures)):
        *rows, last = dcgan.summary(net, x)[1:]
        shapes = ["x".join(map(str, x.shape[1:])), *(row.split()[-2] for row in rows)]
        line = f"| `{preset}` {type(net).__name__[0]} | {' → '.join(shapes)} | {last.split()[-1]} |"
        assert line in README


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r'^pip install -e "\.\[test\]".*$', README, re.M)
    assert len(commands) == 1 and commands[0].endswith("python -m pytest")
    script = (ROOT / ".ci" / "run").read_text()
    assert "command=$(grep -m1 '^pip install -e" in script and 'bash -euo pipefail -c "$command"' in script


def test_every_option_in_the_readme_exists():
    used = set(re.findall(r"(?<![\w-])--([a-zA-Z][\w-]+)", README))
    options = {name.replace("_", "-") for name in dcgan.FIELDS} | {"lr", "seeds", "out"}
    options |= {f"no-{name}".replace("_", "-") for name, f in dcgan.FIELDS.items() if f.type is bool}
    options |= {alias.removeprefix("--") for f in dcgan.FIELDS.values() for alias in f.metadata["alias"]}
    elsewhere = {"help", "check", "nproc-per-node", "faces", "mnist", "weights"}  # the last three: quality.py
    assert used - options - elsewhere == set()


def test_every_file_that_the_readme_links_to_is_there():
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_the_first_screen_is_short_and_has_pictures_and_a_command():
    first = README[: README.index("## ")].splitlines()
    assert len(first) <= 40
    assert any(".png" in line for line in first) and any("python dcgan.py" in line for line in first)


@pytest.mark.parametrize("line", re.findall(r"^(?:.*&& )?(python dcgan\.py .*?|torchrun .*?) *(?:#.*)?$", README, re.M))
def test_every_command_of_the_readme_is_one_that_the_program_takes(line):
    """Values, too: a preset or a size that does not exist would be refused."""
    words = line[line.index("dcgan.py") + 8 :].split()
    if words[:1] == ["generate"] or words[:1] == ["interpolate"]:
        assert re.fullmatch(r"(RUN|runs/[\w-]+)( --seeds [\d,-]+)?( --out faces(\.png|/))?", " ".join(words[1:]))
    elif words != ["--help"]:
        dcgan.config(**{"preset": "best", **dcgan.read_options(words)})

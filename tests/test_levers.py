"""The room of speed's levers: compiled, graphed, joined; each trains as the plain step does.  (bf16: test_step.py;
the fused ops: test_ops.py.)  Without a GPU the graph is played by a stand-in that runs the step again."""

import contextlib
import functools
import types

import pytest
import torch
from conftest import PRESETS, differing, load_kernels, state

import csrc.graph
import dcgan

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def start(tiny, tmp_path):
    """-> a starter of runs, all from the same first weights, in float64."""

    def make(preset, name, **overrides):
        c = tiny(preset, run=str(tmp_path / name), ema=0.9, **overrides)
        run = dcgan.set_up(c)
        for net in (run.G, run.D, run.ema):
            net.double()
        return run

    return make


def inputs_of(run, step, draw_inputs=dcgan.draw_inputs):
    real, z, noise = draw_inputs(run.c, run.pictures, step, run.device)
    return real.double(), z.double(), noise.double(), torch.tensor(0.1, dtype=torch.float64, device=run.device)


def everything(run):
    return state(run.G, run.D, run.ema, run.opt_g, run.opt_d)


def far(a, b):
    """-> the largest difference of two `everything`s, relative to the size of each tensor."""
    assert set(a) == set(b)
    return max(((a[n].double() - b[n].double()).abs().max() / (1 + b[n].abs().max())).item() for n in a)


@pytest.mark.parametrize("preset", PRESETS)
def test_twenty_compiled_steps_are_twenty_plain_ones(preset, start, monkeypatch):
    """Traced and differentiated by torch.compile; the code that it would write comes in the slow test."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    plain, compiled = start(preset, "plain"), start(preset, "compiled", compile=True)
    assert not differing(everything(plain), everything(compiled))
    steps = dcgan.choose_step(plain), dcgan.choose_step(compiled)
    for i in range(20):
        numbers = [step(*inputs_of(run, i)) for step, run in zip(steps, (plain, compiled), strict=True)]
        assert torch.allclose(*numbers, rtol=1e-6, atol=0) and numbers[0][4] == 1
    assert far(everything(compiled), everything(plain)) < 1e-6
    assert not any("_orig_mod" in name for name in compiled.G.state_dict())  # checkpoints know nothing of it


@pytest.mark.parametrize("preset", PRESETS)
def test_twenty_fused_steps_are_twenty_plain_ones(preset, start):
    load_kernels(dcgan.fused_ops(), "cpu")
    runs = start(preset, "plain"), start(preset, "fused", fused=True)
    steps = [dcgan.choose_step(run) for run in runs]
    for i in range(20):
        numbers = [step(*inputs_of(run, i)) for step, run in zip(steps, runs, strict=True)]
        assert torch.allclose(*numbers, rtol=1e-10, atol=0) and numbers[0][4] == 1
    assert far(everything(runs[1]), everything(runs[0])) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("preset", ["classic", "regularized", "mnist"])
def test_compiled_for_this_machine_it_is_the_same_step(preset, fused, start):
    torch._dynamo.reset()
    plain, compiled = start(preset, "plain", fused=fused), start(preset, "compiled", fused=fused, compile=True)
    steps = dcgan.choose_step(plain), dcgan.choose_step(compiled)
    for i in range(20):
        for step, run in zip(steps, (plain, compiled), strict=True):
            step(*inputs_of(run, i))
    if preset != "mnist" and preset != "regularized":  # what their dropout drops, compiled code draws in its own way
        assert far(everything(compiled), everything(plain)) < 1e-6
    assert all(t.isfinite().all() for t in everything(compiled).values() if t.is_floating_point())


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_in_a_step_asks_for_a_value_or_leaves_the_device(preset, tiny, monkeypatch):
    """On "meta", where tensors have a shape and no values: what would wait for a GPU, break a capture, or mix tensors
    of the CPU with those of a GPU, raises here.  The optimisers are torch's and stay outside."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # there is none for meta
    c = tiny(preset, ema=0.9, augment=True, dropout=0.1, dropout2d=0.1, noise=0.1)
    with torch.device("meta"):
        G, D, ema = dcgan.Generator(c), dcgan.Discriminator(c), dcgan.Generator(c)

    def optimizer(net):
        return types.SimpleNamespace(
            param_groups=[{"params": list(net.parameters())}], step=lambda: None, zero_grad=net.zero_grad
        )

    n, picture = c.batch_size, (c.nc, c.image_size, c.image_size)
    shapes = (n, *picture), (2, n, c.nz), (3, n, *picture), ()
    inputs = [torch.randn(shape, device="meta") for shape in shapes]
    numbers = dcgan.train_step(c, G, D, ema, optimizer(G), optimizer(D), *inputs)
    assert numbers.is_meta and numbers.shape == (len(dcgan.METRICS),)


class StandIn:
    """What torch.cuda offers for graphs, on the CPU: the capture runs the step, a replay runs it again."""

    def __init__(self, step):
        self.plain, self.calls = step, []
        here, side = (types.SimpleNamespace(name=name, wait_stream=lambda other: None) for name in ("here", "side"))
        self.Stream, self.current_stream = (lambda: side), (lambda: here)
        self.stream = self.device = contextlib.nullcontext
        self.CUDAGraph, self.streams_set = (lambda: self), []
        self.breaks = True
        self.set_stream = self.streams_set.append

    @contextlib.contextmanager
    def graph(self, graph, stream):
        try:
            yield
        except BaseException:
            if not self.breaks:
                raise
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904 - as CUDA's does

    def step(self, *inputs):
        self.calls.append((inputs, self.plain(*inputs)))
        return self.calls[-1][1]

    def replay(self):
        inputs, numbers = self.calls[-1]  # the captured one: the same memory every time
        numbers.copy_(self.plain(*inputs))


@pytest.mark.parametrize("begun", [0, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_graph_trains_as_the_plain_step_and_its_capture_changes_nothing(preset, begun, start, monkeypatch):
    plain, other = start(preset, "plain"), start(preset, "graph")
    step, play = dcgan.choose_step(plain), dcgan.choose_step(other)
    for i in range(begun):  # optimisers that have a state already, and such that have none
        step(*inputs_of(plain, i)), play(*inputs_of(other, i))
    stand_in = StandIn(play)
    monkeypatch.setattr(csrc.graph, "torch", types.SimpleNamespace(
        cuda=stand_in, no_grad=torch.no_grad, is_tensor=torch.is_tensor))  # fmt: skip
    before, given, found = everything(other), inputs_of(other, begun), []
    replay = csrc.graph.graphed(stand_in.step, given, other.stateful.values())
    assert len(stand_in.calls) == 4
    after = everything(other)
    assert not differing({n: t for n, t in after.items() if n in before}, before)
    assert not any(t.any() for n, t in after.items() if n not in before)  # Adam's state, as it begins
    for i in range(begun, begun + 5):
        found.append(replay(*inputs_of(other, i)))
        assert torch.equal(step(*inputs_of(plain, i)), found[-1])
    assert not differing(everything(plain), everything(other))
    assert len(torch.stack(found).unique(dim=0)) == 5  # the numbers of a step outlive the next one
    assert all(map(torch.equal, given, inputs_of(other, begun)))  # nothing was copied into what the caller holds


def own_words():
    try:
        raise RuntimeError("that of another library")
    except RuntimeError:
        raise RuntimeError("its own words")  # noqa: B904 - as steps do that say it better


def not_permitted():
    raise RuntimeError("not permitted when stream is capturing")


def wrong_type():
    raise TypeError("no tensor")


@pytest.mark.parametrize("breaks", [True, False])  # the capture, so that its end raises as well
@pytest.mark.parametrize("fail, kind, words", [
    (not_permitted, RuntimeError, "capturing"), (own_words, RuntimeError, "its own words"),
    (wrong_type, TypeError, "no tensor"),
])  # fmt: skip
def test_a_step_that_cannot_be_captured_leaves_all_as_it_was_and_says_why(
    fail, kind, words, breaks, start, monkeypatch
):
    run = start("best", "run")
    step = dcgan.choose_step(run)
    calls = []

    def fails(*inputs):
        step(*inputs)
        calls.append(inputs)
        if len(calls) == 4:  # not while it warms up
            fail()

    stand_in = StandIn(fails)
    stand_in.breaks = breaks
    monkeypatch.setattr(csrc.graph, "torch", types.SimpleNamespace(
        cuda=stand_in, no_grad=torch.no_grad, is_tensor=torch.is_tensor))  # fmt: skip
    before = everything(run)
    with pytest.raises(kind, match=words):
        csrc.graph.graphed(fails, inputs_of(run, 0), run.stateful.values())
    assert stand_in.streams_set == [stand_in.current_stream()]  # not the one of the capture
    after = everything(run)
    assert not differing({n: t for n, t in after.items() if n in before}, before)
    assert not any(t.any() for n, t in after.items() if n not in before)


def test_the_shapes_of_a_step_are_one_shape_or_broadcast_to_it_when_the_noise_ends(tiny):
    """What a graph has captured must take what comes later."""
    c = tiny("classic", noise=0.1, noise_steps=2)
    pictures = dcgan.load_pictures(c)
    first, later = (dcgan.draw_inputs(c, pictures, step, torch.device("cpu")) for step in (0, 5))
    for x, y in zip(first, later, strict=True):
        x.copy_(y)
    assert first[2].any() == 0 and first[2].shape[0] == 3


@pytest.mark.parametrize("fused", [False, True])
def test_fused_takes_the_ops_of_csrc_and_nothing_else_does(fused, start):
    ops = dcgan.fused_ops()
    load_kernels(ops, "cpu")
    run, expected = start("regularized", "run", fused=fused), ops if fused else dcgan.PLAIN
    for held in (run.D.ops, *(block.ops for net in (run.G, run.D) for block in net.blocks)):
        assert held.bn_leaky_relu is expected.bn_leaky_relu and held.spectral_norm is expected.spectral_norm


def test_compile_compiles_both_networks(start, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda net, **_: seen.append(net) or net)
    run = start("classic", "run", compile=True)
    dcgan.choose_step(run)
    assert seen == [run.G, run.D]


def test_a_graphed_run_steps_by_what_graphed_gives(start):
    run = start("classic", "run")
    run.graphed = lambda step, inputs, parts: (step, len(inputs), [*parts])
    step, inputs, parts = dcgan.choose_step(run)
    assert step.func is dcgan.train_step and inputs == 4 and parts == [*run.stateful.values()]


@pytest.mark.parametrize("has, auto", [((True, False), "bf16"), ((False, True), "bf16"), ((False, False), "fp32")])
def test_auto_is_bf16_where_the_processor_multiplies_it(has, auto, monkeypatch):
    for name, value in zip(("avx512_bf16", "amx_tile"), has, strict=True):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda value=value: value, raising=False)
    cpu = torch.device("cpu")
    assert dcgan.choose_precision("auto", cpu) == auto and dcgan.choose_precision("fp32", cpu) == "fp32"


@pytest.mark.parametrize("capability, auto", [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bf16_from_ampere_on(capability, auto, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dcgan.choose_precision("auto", torch.device("cuda")) == auto


def test_a_process_takes_the_gpu_of_its_own_on_its_machine(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(dcgan, "RANK", 11)  # the fourth process of the second machine
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(()))
    assert dcgan.choose_device("cuda") == torch.device("cuda:3")


@pytest.mark.parametrize("on", [False, True])
def test_deterministic_asks_torch_for_it(on, tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends, "cudnn", types.SimpleNamespace())
    monkeypatch.setattr(torch.backends, "cuda", types.SimpleNamespace(matmul=types.SimpleNamespace()))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that what is set here is undone
    dcgan.tune(tiny(deterministic=on), torch.device("cuda:0"))
    assert asked == [True] * on and torch.backends.cudnn.benchmark is not on
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


def test_a_graph_without_cuda_is_refused_in_one_line(arguments_of, run_main):
    done = run_main(*arguments_of("--graph"))
    assert done.code == 2 and "--graph needs csrc/ and one process on CUDA" in done.err and done.err.count("\n") == 1


def test_a_step_is_graphed_where_it_can_be_and_nobody_said_otherwise(tiny, monkeypatch):
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert dcgan.choose_graphed(tiny("classic"), cuda) is dcgan.fused_ops().graphed
    assert dcgan.choose_graphed(tiny("classic"), cpu) is None
    assert dcgan.choose_graphed(tiny("classic", graph=False), cuda) is None
    assert dcgan.choose_graphed(tiny("classic", compile=True), cuda) is None
    monkeypatch.setattr(dcgan, "WORLD", 2)
    assert dcgan.choose_graphed(tiny("classic"), cuda) is None
    monkeypatch.undo()

    def none():
        raise dcgan.UserError("there are no fused kernels here")

    monkeypatch.setattr(dcgan, "fused_ops", none)  # dcgan.py alone
    assert dcgan.choose_graphed(tiny("classic"), cuda) is None


@pytest.fixture
def arguments_of(faces, cache, tmp_path):
    small = "--preset demo --image-size 16 --nz 8 --ngf 4 --ndf 4 --batch-size 4 --samples 4 --workers 0 --steps 2"
    return lambda *more: [
        *small.split(),
        "--device",
        "cpu",
        "--data",
        faces,
        "--cache",
        cache,
        "--run",
        tmp_path,
        *more,
    ]


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_cuda_graph_trains_as_the_plain_step(preset, fused, start, monkeypatch):
    options = dict(device="cuda", fused=fused, deterministic=True)
    runs = [start(preset, f"graph {graph}", graph=graph, **options) for graph in (False, True)]
    before = everything(runs[1])
    monkeypatch.setattr(dcgan, "draw_inputs", lambda *_: inputs_of(runs[1], 0)[:3])  # what is captured: float64 too
    steps = [dcgan.choose_step(run) for run in runs]
    assert not differing({n: t for n, t in everything(runs[1]).items() if n in before}, before)
    for i in range(20):
        numbers = [step(*inputs_of(run, i)) for step, run in zip(steps, runs, strict=True)]
        assert torch.allclose(*numbers, rtol=1e-6, atol=1e-9)
    assert far(everything(runs[1]), everything(runs[0])) < 1e-6


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("more", [(), ("--fused",), ("--no-graph",), ("--noise", "0.1", "--noise-steps", "3")])
def test_a_run_on_cuda_goes_on_where_it_stopped(arguments_of, run_main, more):
    on_cuda = ["--device", "cuda", *more]
    begun = run_main(*arguments_of(*on_cuda))
    assert begun.code == 0 and (", graphed, " in begun.out) == ("--no-graph" not in more)
    gone_on = run_main(*arguments_of(*on_cuda, "--resume", "--steps", "5"))
    assert gone_on.code == 0 and "done at step 5 of 5" in gone_on.out

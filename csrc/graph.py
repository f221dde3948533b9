"""A training step as one CUDA graph: what was hundreds of launches from Python becomes one.

    step = graphed(step, inputs, parts)      once; trains nothing
    numbers = step(*inputs)                  as before, on new inputs of the same shapes

Nothing in the step may wait for the device, and what changes from step to step has to be a tensor among the inputs:
Python's numbers are baked in at the capture.  Adam needs capturable=True.
"""

import torch
from torch import nn


def graphed(step, inputs, parts):
    """-> a function that does what step(*inputs) does, by replaying it as captured.

    Args:
        step: takes CUDA tensors, returns one; may change networks and optimisers in place.
        inputs: tensors; later ones are copied into these, so each is of the same shape or broadcasts to it.
        parts: the networks and optimisers that `step` changes.  Warm-up and capture train them a few steps, so
            every parameter, buffer and optimiser state is put back; state created there is reset to zero, where
            Adam's begins.  Random states move on: seed before the next step.

    Raises: what `step` raises, such as a RuntimeError from CUDA if something in it cannot be captured; the tensors of
        `parts` are as they were.
    Source: pytorch.org/docs/stable/notes/cuda.html, whole-network capture.
    """
    parts = list(parts)
    before = {tensor: tensor.detach().clone() for tensor in _tensors(parts)}
    inputs = [x.clone() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(inputs[0].device):  # streams are of the device that is current
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            # no capture on the default stream, nor of what is done only once (cuDNN's choice of algorithms, the
            # optimisers' states): so a few steps on a stream of our own first, then the capture on the same one
            try:
                with torch.cuda.stream(side):
                    for _ in range(3):
                        step(*inputs)
            finally:
                here.wait_stream(side)
            raised = None
            try:
                with torch.cuda.graph(graph, stream=side):
                    try:
                        numbers = step(*inputs)
                    except BaseException as error:
                        raised = error
                        raise
            except BaseException as error:  # the end of a broken capture raises as well, and leaves `side` current
                torch.cuda.set_stream(here)
                raise raised or error from None
    finally:
        with torch.no_grad():
            for tensor in _tensors(parts):
                tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()

    def replay(*new):
        for x, y in zip(inputs, new, strict=True):
            x.copy_(y)
        graph.replay()
        return numbers.clone()

    replay.keeps = step, parts  # the graph knows their memory by its address only
    return replay


def _tensors(parts):
    """-> all that a step can change in networks and optimisers."""
    found = []
    for part in parts:
        if isinstance(part, nn.Module):
            found += [*part.parameters(), *part.buffers()]
        else:
            found += [t for state in part.state.values() for t in state.values() if torch.is_tensor(t)]
    return found

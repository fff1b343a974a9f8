"""Records forward and backward of a training step once as a CUDA graph, and replays them.

A step of a ViT launches thousands of kernels. Where they are short (small models, low precision) the host cannot launch
them as fast as the GPU runs them; a graph is one launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARMUP, WARMUP_DDP = 2, 11
"""Calls before the recording: they compile, set up libraries and make the optimizer's state. DDP makes its buckets anew
in the second, and times the first ten, which cannot be recorded."""


class Graphed:
    """Calls a function as it is at first, then records it and replays the recording.

    The function must do the same work on the GPU at every call, on inputs of the same shapes, and never wait for the
    GPU. What it leaves in memory (gradients) is written to the same place by each replay.

    Args:
        function: tensors on the CPU or the GPU -> a tensor on the GPU.
        before_recording: drops what earlier calls left, so that the recording makes it in the graph's own memory, and
            nothing keeps that memory when the recording is given up.
        device: the CUDA device.
        stream: for several processes, on which all of it happens. DDP's hooks run on the stream on which DDP was made,
            and what waits for a stream outside of the recording cannot be recorded.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        before_recording: Callable[[], None],
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._function, self._before, self._device = function, before_recording, device
        self._stream, self._warmup = stream, WARMUP if stream is None else WARMUP_DDP
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output = torch.empty(0)

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def forget(self) -> None:
        """Gives the recording's memory back, all that the function needs at its peak; the next call records again."""
        if self._graph is None:
            return
        self._graph.reset()
        self._graph, self._inputs, self._output = None, [], torch.empty(0)
        self._before()
        torch.cuda.empty_cache()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result; after the recording always the same tensor, overwritten by the next call."""
        if self._calls < self._warmup:
            self._calls += 1
            return self._on_stream(inputs)
        if self._graph is None:
            self._graph = self._record(inputs)
        for static, new in zip(self._inputs, inputs, strict=True):
            if static.shape != new.shape:  # copy_ would spread a smaller one over it
                raise ValueError(f"input of shape {tuple(new.shape)}: {tuple(static.shape)} was recorded")
            static.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._output

    def _on_stream(self, inputs: tuple[Tensor, ...]) -> Tensor:
        if self._stream is None:
            return self._function(*inputs)
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            output = self._function(*inputs)
        here.wait_stream(self._stream)
        return output

    def _record(self, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        self._before()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # the graph has a pool of its own
        self._inputs = [torch.empty_like(x, device=self._device) for x in inputs]
        graph = torch.cuda.CUDAGraph()
        # only this thread's calls are checked: other threads may use CUDA at the same time
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._output = self._function(*self._inputs)
        return graph

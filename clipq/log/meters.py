"""Speed: images a second, time that the device waits for data, memory, floating-point operations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# Dense bf16/fp16 tensor-core peak from the vendors' data sheets, FLOP/s; longer names first.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense 16-bit peak of a GPU in FLOP/s; None for a CPU or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def flops_per_pair(model: nn.Module, image_size: tuple[int, int], context_length: int) -> float:
    """Floating-point operations of one training step for one image-text pair: forward and backward, no recomputation.

    Counted by torch over the model's real shapes (matrix products, convolutions, attention) in training mode, so that
    patch dropout counts; nothing is computed. The backward of a matrix product is two of its size.
    """
    training = model.training
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        on_fake: dict[str, Tensor] = {n: fake.from_tensor(p) for n, p in model.named_parameters()}
        on_fake |= {n: fake.from_tensor(b) for n, b in model.named_buffers()}
        device = next(iter(on_fake.values())).device
        image = torch.empty(1, 3, *image_size, device=device)
        text = torch.zeros(1, context_length, dtype=torch.long, device=device)
        counter = FlopCounterMode(display=False)
        # Fused attention has no count of its own on every device and version of torch; its two products have.
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            torch.func.functional_call(model, on_fake, (image, text))
    model.train(training)
    return 3.0 * counter.get_total_flops()


class Meter:
    """Clock of a training run. Pauses (evaluation, checkpoints) count neither as training nor as waiting.

    Args:
        seconds: training time of the run before a resume.
        device: whose memory is reported.
        flops_per_image: of one pair, forward and backward; None where unknown.
        world_size: images are counted over all ranks, the peak too.
    """

    def __init__(self, *, seconds: float, device: torch.device, flops_per_image: float | None, world_size: int) -> None:
        self._device = device
        self._flops = flops_per_image
        self._peak = peak_flops(device)
        self._world_size = world_size
        self._before = seconds
        self._start = self._mark = time.perf_counter()
        self._paused = self._paused_in_interval = 0.0
        self._waited = 0.0
        self._waits: list[tuple[float, torch.cuda.Event, torch.cuda.Event]] = []
        """Of a GPU: seconds of a wait, the end of the step before and the begin of the one after."""
        self._end: torch.cuda.Event | None = None
        self._images = 0

    def seconds(self) -> float:
        """Training time of the run so far, earlier parts of a resumed run included."""
        return self._before + time.perf_counter() - self._start - self._paused

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch. It counts as far as the device has nothing else to do meanwhile: a GPU is often
        still busy with the steps before."""
        start = time.perf_counter()
        yield
        waited = time.perf_counter() - start
        if self._end is None:
            self._waited += waited
        else:
            self._waits.append((waited, self._end, self._event()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training."""
        start = time.perf_counter()
        yield
        pause = time.perf_counter() - start
        self._paused += pause
        self._paused_in_interval += pause

    def count(self, images: int) -> None:
        """Notes the images of one step over all ranks, after the last of its work was given to the device."""
        self._images += images
        if self._device.type == "cuda":
            self._end = self._event()

    def interval(self) -> dict[str, float | None]:
        """Speed since the last call: images_per_second, data_wait (share of time), memory_gib (peak), mfu (share).

        All work must be done that the device was given: the caller has read what came of the steps.
        """
        for waited, end, begin in self._waits:
            self._waited += min(waited, end.elapsed_time(begin) / 1000)
        self._waits.clear()
        now = time.perf_counter()
        elapsed = max(now - self._mark - self._paused_in_interval, 1e-9)
        rate = self._images / elapsed
        mfu = None
        if self._flops and self._peak:
            mfu = rate * self._flops / (self._peak * self._world_size)
        row = {
            "images_per_second": rate,
            "data_wait": min(1.0, self._waited / elapsed),
            "memory_gib": self._memory_gib(),
            "mfu": mfu,
        }
        self._mark, self._paused_in_interval, self._waited, self._images = now, 0.0, 0.0, 0
        return row

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _memory_gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        import resource  # not on every platform, and only the CPU needs it

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

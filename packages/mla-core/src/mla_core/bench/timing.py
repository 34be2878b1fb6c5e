"""Clocks: eager calls on the host or a GPU, and replays of a captured CUDA graph.

Samples go round all data sets of a workload, on a GPU each of them whole, so that what is timed is
cold in the last level cache whenever the sets together exceed it. A clock answers with microseconds
*per call*.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mla_core.testing.sync import no_sync

Call = Callable[[int], torch.Tensor]

#: A GPU sample lasts at least this long, so that the resolution of events does not matter.
_MIN_GPU_SAMPLE_US = 500.0


class Clock(Protocol):
    """Times one contender on one workload."""

    def sample(self) -> float:
        """Run at least one data set; return microseconds per call."""
        ...


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and spread of some samples."""

    median: float
    p10: float
    p90: float


def summarise(samples: Sequence[float]) -> Summary:
    """Return median and deciles; a single sample is its own spread."""
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0])
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Summary(statistics.median(samples), deciles[0], deciles[-1])


class HostClock:
    """Wall-clock time of eager calls on the CPU, one data set per sample, in turn."""

    def __init__(self, call: Call, num_sets: int) -> None:
        self._call, self._num_sets = call, num_sets
        self._next = 0

    def sample(self) -> float:
        """Time the next data set."""
        start = time.perf_counter()
        self._call(self._next)
        elapsed = time.perf_counter() - start
        self._next = (self._next + 1) % self._num_sets
        return elapsed * 1e6


class EventClock:
    """Time between two CUDA events around eager calls, launch gaps included."""

    def __init__(self, call: Call, num_sets: int) -> None:
        self._call, self._num_sets = call, num_sets
        self._tours = _tours_for(self._tour_us())

    def sample(self) -> float:
        """Time some tours over all data sets."""
        return self._tour_us(self._tours) / (self._tours * self._num_sets)

    def _tour_us(self, tours: int = 1) -> float:
        def run() -> None:
            for _ in range(tours):
                for i in range(self._num_sets):
                    self._call(i)

        return _elapsed_us(run)


class GraphClock:
    """Time of replays of one CUDA graph that holds a tour over all data sets.

    ``outputs`` are the tensors the captured calls write, one for each data set.
    """

    def __init__(self, call: Call, num_sets: int) -> None:
        # A call that waits for the device is refused before a capture would break on it.
        with no_sync():
            call(0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(0)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.outputs = [call(i) for i in range(num_sets)]
        # The graph holds addresses, not tensors: what the call owns must live as long.
        self._call = call
        self._num_sets = num_sets
        self.replay()
        self._tours = _tours_for(_elapsed_us(self.replay))

    def replay(self) -> None:
        """Run the captured tour once."""
        self._graph.replay()

    def sample(self) -> float:
        """Time some replays."""

        def run() -> None:
            for _ in range(self._tours):
                self.replay()

        return _elapsed_us(run) / (self._tours * self._num_sets)


def _elapsed_us(run: Callable[[], None]) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds * 1e3


def _tours_for(tour_us: float) -> int:
    return max(1, round(_MIN_GPU_SAMPLE_US / max(tour_us, 1.0)))

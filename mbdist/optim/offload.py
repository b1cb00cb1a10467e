"""Accumulators in host memory, on the device only while they are used.

The copies run on a stream of their own, in the order in which they are asked for: an accumulator is fetched while its
signal is on the wire, and goes back while the backward pass continues.
"""

from __future__ import annotations

import torch


class HostMemory:
    """Copies tensors between host memory (pinned, where the device is a GPU) and a device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._streams = torch.get_device_module(device)
        self._copying = self._streams.Stream(device)
        self._fetched: dict[torch.Tensor, torch.Tensor] = {}  # by host tensor

    def zeros(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor that lives on the host."""
        return torch.zeros(size, dtype=dtype, pin_memory=self._device.type == "cuda")

    def fetch(self, host: torch.Tensor) -> None:
        """Start to copy it to the device."""
        if host not in self._fetched:
            with self._streams.stream(self._copying):
                self._fetched[host] = torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)

    def on_device(self, host: torch.Tensor) -> torch.Tensor:
        """The copy that was fetched, or is now."""
        self.fetch(host)
        current = self._streams.current_stream(self._device)
        current.wait_stream(self._copying)
        values = self._fetched.pop(host)
        self._used_on(values, current)
        return values

    def put_back(self, host: torch.Tensor, values: torch.Tensor) -> None:
        """Start to copy changed values to the host."""
        self._copying.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._copying):
            host.copy_(values, non_blocking=True)
        self._used_on(values, self._copying)

    def settle(self) -> None:
        """Wait until the host has everything. To be called before it looks at a tensor, or changes it."""
        if self._device.type == "cuda":
            self._copying.synchronize()

    def _used_on(self, values: torch.Tensor, stream: torch.Stream) -> None:
        if self._device.type == "cuda":
            values.record_stream(stream)  # its memory is not given away before the stream is done with it

"""Hosts on this machine: network namespaces joined by veth pairs, with uplinks as slow as wanted."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mbdist.errors import UserError

INTERFACE = "eth0"  # of every host


@dataclass(frozen=True)
class Host:
    namespace: str
    address: str

    def command(self, arguments: list[str]) -> list[str]:
        """The command that runs there."""
        return ["ip", "netns", "exec", self.namespace, *arguments]


def sent_bytes() -> int:
    """Bytes that the host of this process has sent, headers included, as the kernel counts them."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counters.split()[8])
    raise RuntimeError(f"there is no interface {INTERFACE} here")


@contextlib.contextmanager
def joined_hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts on one bridge, removed at the end. Raises UserError where namespaces cannot be made."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        raise UserError("bench comm makes network namespaces: run it as root, with iproute2 (ip, tc) installed")
    prefix = f"mbdist-{os.getpid()}"
    hub = f"{prefix}-hub"
    hosts = [Host(f"{prefix}-{i}", f"10.99.0.{i + 1}") for i in range(count)]
    try:
        _run("ip", "netns", "add", hub)
        _run("ip", "-n", hub, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", hub, "link", "set", "br0", "up")
        for i, host in enumerate(hosts):
            _run("ip", "netns", "add", host.namespace)
            peer = ["peer", "name", INTERFACE, "netns", host.namespace]
            _run("ip", "-n", hub, "link", "add", f"v{i}", "type", "veth", *peer)
            _run("ip", "-n", hub, "link", "set", f"v{i}", "master", "br0", "up")
            _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            _run("ip", "-n", host.namespace, "link", "set", INTERFACE, "up")
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        yield hosts
    finally:
        for namespace in [hub, *(host.namespace for host in hosts)]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def set_rate(hosts: list[Host], mbit: int | None) -> None:
    """Let every host send at most so many Mbit/s (a token bucket); None for no limit."""
    for host in hosts:
        if mbit is None:
            remove = ["tc", "-n", host.namespace, "qdisc", "del", "dev", INTERFACE, "root"]
            subprocess.run(remove, capture_output=True, check=False)
        else:
            bucket = ["rate", f"{mbit}mbit", "burst", "128kb", "latency", "400ms"]
            _run("tc", "-n", host.namespace, "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *bucket)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip()}; bench comm needs network namespaces")

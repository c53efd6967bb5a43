"""Hardware to plan for: a catalogue by name, and this machine.

What fits is `plan`; what the machine's kernel says is `machine`.

Source: data sheets of the devices (dense bfloat16 peak, link bandwidth in one direction) and of the vendors' own
systems of eight (DGX H100 and H200: eight ports of 400 Gbit/s, DGX A100: eight of 200, DGX-1: four of 100).
"""

import math
import re
import sys
from dataclasses import dataclass, replace
from typing import Literal, Self

from peftscale import machine
from peftscale.errors import ConfigError

_RESERVED_BYTES = {"cuda": 1_500_000_000, "cpu": 500_000_000}  # context and buffers; interpreter and libraries


@dataclass(frozen=True, slots=True)
class Hardware:
    """Devices of one kind."""

    name: str
    kind: Literal["cuda", "cpu"]
    num_devices: int
    """GPUs, or machines without one, whose ranks share the memory."""
    memory_bytes: int
    """Of one device. Catalogue: the name's GB as 10^9, a little less than there is."""
    peak_tflops: float = 0.0
    """Dense bfloat16; 0 where it is not known."""
    link_gbytes_per_s: float = 0.0
    """Between devices of a node, one direction; 0 where it is not known."""
    network_gbytes_per_s: float = 0.0
    """Into a node of eight devices over all of its ports together; 0 where it is not known. Clusters differ more than
    devices do."""
    devices_per_node: int = 8
    network_ports: int = 1
    """Ports that the rate is of. A node of fewer devices is taken to have its part of them, at least one."""
    num_cores: int | None = None
    is_all: bool = True
    """False when detected: a worker sees the devices it was given, and those of its node alone."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """'8xH100-80GB', 'A100-40GB', 'cpu-24GB', '2xcpu-64GB'.

        Raises:
            ConfigError: not of that form, or a device that is not in the catalogue.
        """
        match = re.fullmatch(r"(?:(\d+)x)?(.+)", text.strip(), re.IGNORECASE)
        count, device = (int(match[1] or 1), match[2]) if match else (0, text)
        if cpu := re.fullmatch(r"cpu-(\d+)GB", device, re.IGNORECASE):
            memory, rates, ports = int(cpu[1]), (0.0, 0.0, 0.0), 1
            name, kind = f"cpu-{memory}GB", "cpu"
        else:
            name = next((known for known in _CATALOGUE if known.lower() == device.lower()), "")
            memory, *speeds, ports = _CATALOGUE.get(name, (0, 0.0, 0.0, 0.0, 1))
            rates, kind = (speeds[0], speeds[1], speeds[2]), "cuda"
        if count < 1 or memory < 1:
            raise ConfigError(
                f"--hardware: cannot plan for {text!r}; expected <count>x<device> with one of {', '.join(_CATALOGUE)}, "
                f"or cpu-<memory>GB, for example 8xH100-80GB or cpu-24GB."
            )
        return cls(name, "cpu" if kind == "cpu" else "cuda", count, memory * 10**9, *rates, network_ports=ports)

    @property
    def label(self) -> str:
        """As `parse` reads it."""
        return f"{self.num_devices}x{self.name}" if self.num_devices > 1 else self.name

    @property
    def into_node_gbytes_per_s(self) -> float:
        """`network_gbytes_per_s` of a node of `devices_per_node`."""
        ports = max(1, self.network_ports * min(self.devices_per_node, 8) // 8)
        return self.network_gbytes_per_s * ports / self.network_ports

    def ranks_per_node(self, world: int) -> int:
        """Of `world` ranks those that share a node; a machine without GPUs is one."""
        return min(world, self.devices_per_node) if self.kind == "cuda" else math.ceil(world / self.num_devices)

    def with_nodes_of(self, node_ranks: int, *, world: int) -> Self:
        """The same, where so many of `world` ranks are known to share a node."""
        if self.kind == "cuda":
            return replace(self, devices_per_node=node_ranks)
        return replace(self, num_devices=max(1, world // node_ranks))

    def rank_bytes(self, world: int) -> int:
        """Memory that one of `world` ranks may fill."""
        if self.kind == "cuda":
            return self.memory_bytes - _RESERVED_BYTES["cuda"]
        return self.memory_bytes // self.ranks_per_node(world) - _RESERVED_BYTES["cpu"]


# Memory GB, dense bfloat16 TFLOP/s, link GB/s, network GB/s into a node of eight, and ports of it.
_CATALOGUE: dict[str, tuple[int, float, float, float, int]] = {
    "H100-80GB": (80, 989.0, 450.0, 400.0, 8),
    "H200-141GB": (141, 989.0, 450.0, 400.0, 8),
    "A100-40GB": (40, 312.0, 300.0, 200.0, 8),
    "A100-80GB": (80, 312.0, 300.0, 200.0, 8),
    "L40S-48GB": (48, 362.0, 32.0, 12.5, 1),  # no such system: one port of 100 Gbit/s
    "RTX4090-24GB": (24, 165.0, 32.0, 12.5, 1),  # the same
    "V100-32GB": (32, 125.0, 150.0, 50.0, 4),  # float16; it has no bfloat16 units
}


def detect(*, cuda: bool | None = None) -> Hardware:
    """This machine.

    Args:
        cuda: look for CUDA devices through torch. None: only if torch is imported already, so that a laptop's
            `plan` stays quick.
    """
    if cuda or (cuda is None and "torch" in sys.modules):
        import torch

        if torch.cuda.is_available():
            found = torch.cuda.get_device_properties(0)
            short = next((known for known in _CATALOGUE if known.split("-")[0] in found.name.replace(" ", "")), "")
            _, tflops, link, network, ports = _CATALOGUE.get(short, (0, 0.0, 0.0, 0.0, 1))
            return Hardware(
                name=found.name,
                kind="cuda",
                num_devices=torch.cuda.device_count(),
                memory_bytes=found.total_memory,
                peak_tflops=tflops,
                link_gbytes_per_s=link,
                network_gbytes_per_s=network,
                devices_per_node=torch.cuda.device_count(),
                network_ports=ports,
                num_cores=machine.num_cpus(),
                is_all=False,
            )
    memory = machine.memory_bytes()
    return Hardware(f"cpu-{round(memory / 1e9)}GB", "cpu", 1, memory, num_cores=machine.num_cpus(), is_all=False)

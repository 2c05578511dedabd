"""The machine's limits: device copy bandwidth, what a launch costs, and what the launch of a graph costs.

python3 -m benchmarks.gpu.ceilings FILE.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import captured, race
from benchmarks.gpu.store import spread

COPY_MEGABYTES = (64, 256, 1024)
NODES = (1, 10, 100)


def copy_bandwidth() -> dict[str, Any]:
    """GB/s of a copy from device memory to device memory, bytes read and written counted, by size in MB."""
    found = {}
    for megabytes in COPY_MEGABYTES:
        sets = [tuple(torch.randn(megabytes << 18, device="cuda") for _ in range(2)) for _ in range(2)]
        times = race({"copy": lambda source, target: target.copy_(source)}, sets, graph=False)["copy"]
        found[str(megabytes)] = spread([2 * (megabytes << 20) / us * 1e-3 for us in times["raw"]])
    return found


def launch_latencies() -> dict[str, Any]:
    """Microseconds on the host for a launch, and on the device from one small kernel to the next."""
    x = torch.zeros(1, device="cuda")
    host, device = [], race({"add": lambda: x.add_(1)}, [()] * 100, graph=False)["add"]
    for _ in range(15):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            x.add_(1)
        host.append((time.perf_counter() - start) * 1e4)
    return {"host_us": spread(host), "device_us": device}


def graph_latencies() -> dict[str, Any]:
    """For graphs of so many small kernels: the host's microseconds for a replay, the device's from replay to replay."""
    x, found = torch.zeros(1, device="cuda"), {}
    for nodes in NODES:

        def some(nodes: int = nodes) -> None:
            for _ in range(nodes):
                x.add_(1)

        graph, host = captured(some), []
        for _ in range(15):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                graph.replay()
            host.append((time.perf_counter() - start) / 20 * 1e6)
        found[str(nodes)] = {
            "host_us": spread(host),
            "device_us": race({"replay": graph.replay}, [()] * 20, graph=False)["replay"],
        }
    return found


def main(file: Path) -> None:
    """Measures all and writes the file; prints the medians."""
    found = {"copy_gb_per_s": copy_bandwidth(), "launch": launch_latencies(), "graph": graph_latencies()}
    file.write_text(json.dumps(found), encoding="utf-8")
    print("copy GB/s:", {size: entry["median"] for size, entry in found["copy_gb_per_s"].items()})
    print("launch us:", {where: entry["median"] for where, entry in found["launch"].items()})
    print("graph launch us:", {nodes: entry["host_us"]["median"] for nodes, entry in found["graph"].items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))

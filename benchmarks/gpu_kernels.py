"""Times the CUDA kernels against plain PyTorch on the same GPU, and what inference is made of: render and network.

    python benchmarks/gpu_kernels.py [--repeats 30] [--json F]

CUDA events, medians of `--repeats` calls after five to warm up. Results were compared with the oracle by the parity
tests (tests/cuda_emulation/test_public_ops.py, `-k gpu`), which tools/gpu_check.sh runs first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from posemap_fast import ops
from posemap_fast.apr import APRConfig, PoseFrame, build_aprnet
from posemap_fast.backends import why_not
from posemap_fast.fields import FieldConfig, NeRFP
from posemap_fast.geometry import Camera, SceneFrame
from posemap_fast.ops import HashGridSpec, MLPSpec
from posemap_fast.render import OccupancyConfig, RenderConfig, Renderer, render_views

Call = Callable[[], object]
DEVICE = torch.device("cuda")


def milliseconds(call: Call, repeats: int) -> float:
    """Median time of a call by CUDA events."""
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def on_reference(call: Call) -> Call:
    """The same call on plain torch."""

    def run() -> object:
        with ops.use_backend("reference"):
            return call()

    return run


def op_cases() -> Iterator[tuple[str, Call]]:
    """Forward, and forward with backward, of the ops at the sizes of cpu_kernels.py."""
    spec, n = HashGridSpec(), 1 << 18
    x = torch.rand(n, 3, device=DEVICE)
    table = torch.randn(spec.n_entries, 2, device=DEVICE, requires_grad=True)
    cotangent = torch.randn(spec.output_dim, n, device=DEVICE).t()
    yield "hash_encode forward", lambda: ops.hash_encode(x, table.detach(), spec)
    yield "hash_encode forward+backward", lambda: torch.autograd.grad(ops.hash_encode(x, table, spec), table, cotangent)
    mlp = MLPSpec((32, 64, 64, 16))
    rows = torch.randn(1 << 17, 32, device=DEVICE, requires_grad=True)
    params = (torch.randn(mlp.n_params, device=DEVICE) / 8).requires_grad_()
    grad = torch.randn(1 << 17, 16, device=DEVICE)
    yield "fused_mlp forward", lambda: ops.fused_mlp(rows.detach(), params.detach(), mlp)
    yield (
        "fused_mlp forward+backward",
        lambda: torch.autograd.grad(ops.fused_mlp(rows, params, mlp), (rows, params), grad),
    )
    rays, per_ray = 4096, 64
    total = rays * per_ray
    starts = (torch.arange(per_ray, device=DEVICE) / per_ray).repeat(rays)
    offsets = torch.arange(rays + 1, device=DEVICE) * per_ray
    sigmas = (3 * torch.rand(total, device=DEVICE)).requires_grad_()
    rgbs = torch.rand(total, 3, device=DEVICE, requires_grad=True)
    features = torch.randn(total, 256, device=DEVICE, requires_grad=True)

    def composite() -> torch.Tensor:
        out = ops.composite(sigmas, starts, starts + 1 / per_ray, rgbs, offsets, features, early_stop_eps=0.0)
        return out.features.sum() + out.rgb.sum()

    yield "composite 256 forward", torch.no_grad()(composite)
    yield "composite 256 forward+backward", lambda: torch.autograd.grad(composite(), (sigmas, rgbs, features))


def view(backbone: str, backend: str) -> Call:
    """RGB, depth and PoseMap of a 240x427 view of a random half-filled field."""
    frame = SceneFrame(scale=0.25, offset=torch.full((3,), 0.5))
    torch.manual_seed(0)
    sizes = FieldConfig(backbone=backbone, finest_resolution=1024, log2_hashmap_size=19, init_density=30.0)
    nerfp = NeRFP(sizes, frame).to(DEVICE)
    config = RenderConfig(backend=backend, steps_per_unit=512, occupancy=OccupancyConfig(resolution=128))
    renderer = Renderer(config, frame, near=0.01)
    renderer.occupancy.to(DEVICE)
    camera = Camera(427, 240, 380.0, 380.0, 213.5, 120.0)
    pose = torch.eye(4, device=DEVICE)[None]
    codes = torch.zeros(1, sizes.appearance_dim, device=DEVICE)
    return lambda: render_views(renderer, nerfp, pose, camera, appearance=codes)


def network(repeats: int) -> dict[str, Any]:
    """VGG-16, one 480x854 image, half precision, in a CUDA graph."""
    config = dataclasses.replace(APRConfig(), backbone="vgg16", head="gap_linear", input_size=(480, 854))
    net = build_aprnet(config, PoseFrame((0.0, 0.0, 0.0), 1.0)).to(DEVICE).half().eval()
    image = torch.rand(1, 3, 480, 854, device=DEVICE).half().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(3):
            net.head(net.backbone(image))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            net.head(net.backbone(image))
    return {
        "case": "VGG-16 480x854 half, CUDA graph",
        "ms": milliseconds(graph.replay, repeats),
        "peer": "",
        "ratio": "",
    }


def main() -> int:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", metavar="F", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_kernels: torch sees no GPU here", file=sys.stderr)
        return 3
    rows: list[dict[str, Any]] = []

    def add(case: str, call: Call, peer: str, peer_call: Call) -> None:
        ours, theirs = milliseconds(call, arguments.repeats), milliseconds(peer_call, arguments.repeats)
        rows.append({"case": case, "ms": ours, "peer": peer, "ratio": theirs / ours})
        print(rows[-1], flush=True)

    for case, call in op_cases():
        add(case, call, "plain torch", on_reference(call))
    ours = view("native", "native")
    peers = [("tcnn", "nerfacc"), ("reference", "native")]
    for field, backend in peers:
        reason = why_not(field, DEVICE) or why_not(backend, DEVICE)
        if reason is None:
            add("view 240x427, RGB + depth + PoseMap", ours, f"{field} + {backend}", view(field, backend))
        else:
            print(f"not run: {field} + {backend}: {reason}")
    rows.append(network(arguments.repeats))
    if arguments.json:
        about = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "repeats": arguments.repeats}
        arguments.json.write_text(json.dumps({"schema": 1, "metadata": about, "results": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Image in, pose out: every backbone at the paper's image sizes, in the ways in which torch and others can run it.

The peer of each mode is `eager fp32`: the network as plain PyTorch runs it, float32 in the default memory format. A
timed run goes from images (B, 3, H, W) float32 to the poses (B, 12) in the pose frame; resizing and the nearest
rotation are in `infer/localizer`, which times what a user calls. Weights are random, but heads answer as trained ones
do: untrained they give the mean pose whatever the image shows, and any mode would pass.

A new mode is one entry of `MODES`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from posemap_fast.apr import BACKBONES, APRConfig, APRNet, PoseFrame, build_aprnet, use_winograd
from posemap_fast.bench.case import FAMILIES, BenchContext, Comparison, Skipped
from posemap_fast.bench.verify import relative_error, worst_error
from posemap_fast.errors import BackendError
from posemap_fast.geometry import Camera
from posemap_fast.localize import ErrorModel, PoseRegressor
from posemap_fast.optional import OptionalLibrary
from posemap_fast.render import posemap_shape
from posemap_fast.seeding import step_generator

__all__ = ["MODES", "Forward", "Mode", "Regressor"]

_FP32 = "fp32"
_PEER = "eager fp32"
_PRECISIONS = {_FP32: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GPU_ONLY = "fp16"  # most CPUs have no arithmetic in it
_LARGE, _SMALL = "vgg16", "compact"
_HEAD_OF = {_LARGE: "gap_linear"}  # the paper's; the others have the preset's
_SMOKE_BACKBONES = (_SMALL, "resnet18")
_LEAST_TOLERANCE = 1e-3  # relative, of poses whose entries are about 1: a millimetre per metre, a twentieth of a degree
_TF32_EPS = 2.0**-10  # GPUs round the inputs of float32 convolutions to it, as torch asks them to by default
_FAST_FLOPS = {"cpu": 1e10, "cuda": 1e12}  # of a run that takes less than 50 ms
_FAST_REPEATS, _SLOW_REPEATS = 12, 5

Forward = Callable[[torch.Tensor], torch.Tensor]
"""Images (B, 3, H, W) float32 in [0, 1] -> poses (B, 12) float32, row-major [R | t] in the pose frame."""


class _Shape(NamedTuple):
    """Of the images."""

    height: int
    width: int
    batch: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}/batch{self.batch}"

    def images(self, step: int, device: torch.device) -> torch.Tensor:
        """(batch, 3, height, width) float32 in [0, 1), others for each step."""
        rng = step_generator(0, "infer", step)
        return torch.rand(self.batch, 3, self.height, self.width, generator=rng).to(device)


_MAIN = _Shape(240, 427, 1)
_PAPER = _Shape(480, 854, 1)
_CPU_SHAPES = (_MAIN, _PAPER, _MAIN._replace(batch=8))
_SHAPES = {"cpu": _CPU_SHAPES, "cuda": (*_CPU_SHAPES, _PAPER._replace(batch=8))}
_BUILT_SHAPES = {"cpu": _MAIN, "cuda": _PAPER}
_SMOKE_SHAPE = _Shape(48, 64, 1)
_PAPER_NOTES: dict[str, float | str] = {"paper_ms": 6.27, "paper": "VGG-16 at 480x854 on an RTX 4090"}


class Regressor(nn.Module):
    """`APRNet.regress` with the backbone in a precision of its own, which copies that backbone.

    The head stays in float32: it costs nothing, and half precision would round its answer to 4 mm per metre.
    """

    def __init__(self, net: APRNet, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.backbone = copy.deepcopy(net.backbone).to(dtype)
        self.head = copy.deepcopy(net.head)
        self.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float32 -> (B, 12) float32."""
        return self.head(self.backbone(images.to(self.dtype), with_taps=False).final.float())


@dataclass(frozen=True)
class Mode:
    """A way to run a network.

    Attributes:
        make: the network, which is the mode's own, and an example of the images -> what runs images of that shape.
        devices: that it runs on.
        precisions: that it runs in.
        is_built: making it takes seconds: it is done at one size only (the paper's on GPUs), not in the smoke run.
    """

    make: Callable[[Regressor, torch.Tensor], Forward]
    devices: tuple[str, ...] = ("cpu", "cuda")
    precisions: tuple[str, ...] = tuple(_PRECISIONS)
    is_built: bool = False

    def runs(self, precision: str, shape: _Shape, context: BenchContext) -> bool:
        """Whether it is to be timed so."""
        device = context.device.type
        is_possible = device in self.devices and precision in self.precisions
        is_slow_to_get = self.is_built and (context.is_smoke or shape != _BUILT_SHAPES[device])
        return is_possible and not is_slow_to_get and (device, precision) != ("cpu", _GPU_ONLY)


def _eager(net: Regressor, images: torch.Tensor) -> Forward:
    return net


def _channels_last(net: Regressor, images: torch.Tensor) -> Forward:
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda images: net(images.contiguous(memory_format=torch.channels_last))


def _winograd(net: Regressor, images: torch.Tensor) -> Forward:
    """As a localizer answers on a CPU."""
    use_winograd(net)
    return _channels_last(net, images)


def _compiled(net: Regressor, images: torch.Tensor) -> Forward:
    """Inductor with the weights as constants: batch norms are folded and convolutions repacked once."""
    torch.compiler.reset()  # else torch gives up compiling after eight networks of one class
    options: dict[str, Any] = {"freezing": True, "triton.cudagraphs": images.is_cuda}
    compiled = torch.compile(_channels_last(net, images), fullgraph=True, dynamic=False, options=options)
    try:
        compiled(images)
    except RuntimeError as error:
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BackendError(
            f"torch.compile fails here ({cause}); on CPUs it needs a C++ compiler such as g++"
        ) from error
    return compiled


def _cuda_graph(net: Regressor, images: torch.Tensor) -> Forward:
    """All kernels of one pass launched at once; the weights and the place of the images are fixed."""
    forward, given = _channels_last(net, images), images.clone(memory_format=torch.channels_last)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # cuDNN chooses its algorithms before the capture
        for _ in range(3):
            forward(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        poses = forward(given)

    def replay(images: torch.Tensor) -> torch.Tensor:
        given.copy_(images)
        graph.replay()
        return poses

    return replay


def _onnxruntime(net: Regressor, images: torch.Tensor) -> Forward:
    *_, runtime = [library.load() for library in _ONNX]
    program = torch.onnx.export(net, (images,), dynamo=True, verbose=False)
    assert program is not None
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads would slow the peer
    model = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


_ONNX = [
    OptionalLibrary(name, "pip install onnx onnxscript onnxruntime", "ready-made, no GPU needed", needs_cuda=False)
    for name in ("onnx", "onnxscript", "onnxruntime")
]
MODES: dict[str, Mode] = {
    "eager": Mode(_eager, devices=("cuda",), precisions=("bf16", "fp16")),
    "channels_last": Mode(_channels_last),
    "winograd": Mode(_winograd, devices=("cpu",), precisions=(_FP32,), is_built=True),
    "compile": Mode(_compiled, is_built=True),
    "cuda_graph": Mode(_cuda_graph, devices=("cuda",)),
    "onnxruntime": Mode(_onnxruntime, devices=("cpu",), precisions=(_FP32,), is_built=True),
}


@torch.no_grad()
def _poses(forward: Forward, images: torch.Tensor) -> torch.Tensor:
    """What `forward` makes of the images, without gradients, as users ask and as freezing needs."""
    return forward(images)


def _random_net(backbone: str, device: torch.device) -> APRNet:
    """Random weights; the entries of its poses vary by 1 about the mean pose, as those of a trained network do."""
    config = APRConfig(backbone=backbone, head=_HEAD_OF.get(backbone, APRConfig.head))
    net = build_aprnet(config, PoseFrame()).eval().requires_grad_(False)
    output = net.head.output
    moves = _poses(Regressor(net), _SMOKE_SHAPE.images(0, torch.device("cpu"))) - output.bias
    output.weight.div_(moves.square().mean().sqrt())
    return net.to(device)


def _count_flops(net: nn.Module, images: torch.Tensor) -> float:
    """Of the convolutions and linear layers for all images, two per multiply-add; the first image is run.

    By hooks, because torch's own counter imports the whole compiler.
    """
    counts: list[int] = []
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _, out: counts.append(2 * out.numel() * m.weight[0].numel()))
    _poses(net, images[:1])
    return float(sum(counts) * len(images))


def _tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Four times the rounding of the backbone's numbers: the many errors of its layers partly cancel in the sums."""
    eps = _TF32_EPS if (dtype, device.type) == (torch.float32, "cuda") else torch.finfo(dtype).eps
    return max(_LEAST_TOLERANCE, 4 * eps)


@functools.lru_cache(maxsize=1)
def _plain(net: APRNet) -> Regressor:
    """The peer and reference of all modes."""
    return Regressor(net)


@functools.lru_cache(maxsize=1)
def _expected(reference: Forward, shape: _Shape, device: torch.device) -> torch.Tensor:
    """Once for all modes: a large network takes seconds."""
    return _poses(reference, shape.images(1, device))


def _error(forward: Forward, reference: Forward, shape: _Shape, device: torch.device) -> float:
    """On images that neither was made with."""
    return relative_error([_poses(forward, shape.images(1, device))], [_expected(reference, shape, device)])


def _repeats(n_flops: float, context: BenchContext) -> int:
    return _FAST_REPEATS if n_flops < _FAST_FLOPS[context.device.type] else _SLOW_REPEATS


def _of_mode(
    case: str, mode: Mode, net: APRNet, dtype: torch.dtype, shape: _Shape, n_flops: float, context: BenchContext
) -> Comparison | Skipped:
    """One mode in one precision against eager float32; skipped when the mode cannot be had here."""
    images, reference = shape.images(0, context.device), _plain(net)
    begin = time.perf_counter()
    try:
        forward = torch.no_grad()(mode.make)(Regressor(net, dtype), images)
    except BackendError as error:
        return Skipped(case, str(error))
    notes: dict[str, float | str] = {"build_s": time.perf_counter() - begin} if mode.is_built else {}
    return Comparison(
        name=case,
        run=functools.partial(_poses, forward, images),
        verify=functools.partial(_error, forward, reference, shape, context.device),
        tolerance=_tolerance(dtype, context.device),
        peers={_PEER: functools.partial(_poses, reference, images)},
        work=shape.batch,
        work_unit="images",
        n_flops=n_flops,
        notes=notes | (_PAPER_NOTES if case.startswith(f"infer/{_LARGE}/{_PAPER}/") else {}),
        min_repeats=_repeats(n_flops, context),
    )


def _backbone_family(backbone: str, context: BenchContext) -> Iterator[Comparison | Skipped]:
    """One backbone in all shapes, precisions and modes."""
    if context.is_smoke and backbone not in _SMOKE_BACKBONES:
        yield Skipped(f"infer/{backbone}", "left out of the smoke run, which has the small backbones")
        return
    net = _random_net(backbone, context.device)
    for shape in (_SMOKE_SHAPE,) if context.is_smoke else _SHAPES[context.device.type]:
        n_flops = _count_flops(Regressor(net), shape.images(0, context.device))
        for (name, mode), (precision, dtype) in itertools.product(MODES.items(), _PRECISIONS.items()):
            case = f"infer/{backbone}/{shape}/{precision}/{name}"
            if context.wants(case) and mode.runs(precision, shape, context):
                yield _of_mode(case, mode, net, dtype, shape, n_flops, context)


for _name in BACKBONES:
    FAMILIES.register(f"infer/{_name}")(functools.partial(_backbone_family, _name))


@FAMILIES.register("infer/small_backbone")
def small_backbone(context: BenchContext) -> Iterator[Comparison]:
    """The small backbone against the paper's, both channels last in float32."""
    shape = _SMOKE_SHAPE if context.is_smoke else _MAIN
    images = shape.images(0, context.device)
    plain = {name: Regressor(_random_net(name, context.device)) for name in (_SMALL, _LARGE)}
    tuned = {name: _channels_last(copy.deepcopy(net), images) for name, net in plain.items()}
    n_flops = _count_flops(plain[_SMALL], images)
    yield Comparison(
        name=f"infer/{_SMALL}/{shape}/{_FP32}/against_{_LARGE}",
        run=functools.partial(_poses, tuned[_SMALL], images),
        verify=lambda: max(_error(tuned[name], plain[name], shape, context.device) for name in plain),
        tolerance=_tolerance(torch.float32, context.device),
        peers={_LARGE: functools.partial(_poses, tuned[_LARGE], images)},
        work=shape.batch,
        work_unit="images",
        n_flops=n_flops,
        min_repeats=_repeats(n_flops, context),
    )


_CAMERA = Camera(640, 480, 550.0, 550.0, 320.0, 240.0)
_MAP_SIZE = (240, 180)  # width, height that the preset `cpu` renders maps for
_INPUT_SIZE = (96, 128)  # of the preset's network at this aspect ratio


def _localizer(context: BenchContext) -> PoseRegressor:
    """As the preset `cpu` trains it, with calibrated errors; its weights are random."""
    cells = posemap_shape(_CAMERA.resized(*_MAP_SIZE))
    config = APRConfig(input_size=_INPUT_SIZE, pose_from="posemap", posemap_cells=cells)
    net = build_aprnet(config, PoseFrame(), camera=_CAMERA).to(context.device)
    errors = ErrorModel(torch.zeros(0, 4, 4), torch.ones(2, 4, dtype=torch.float64), scale=1.0)
    calibration = {key: {"0.68": 1.0} for key in ("t", "r")}
    return PoseRegressor(net, config, _CAMERA, {"calibration": calibration}, errors)


@FAMILIES.register("infer/localizer")
def localizer(context: BenchContext) -> Iterator[Comparison]:
    """What a user calls, from a decoded image to the pose with its errors; the peer is the network's part of it."""
    regressor = _localizer(context)
    plain = copy.deepcopy(regressor.net).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    width, height = (64, 48) if context.is_smoke else (_CAMERA.width, _CAMERA.height)
    rng = step_generator(0, "infer/image")
    image = torch.randint(256, (height, width, 3), generator=rng, dtype=torch.uint8)
    whole = image.to(context.device).permute(2, 0, 1)[None].contiguous() / 255
    resized = regressor.net.resized(whole).contiguous(memory_format=torch.channels_last)

    def c2w(net: APRNet, images: torch.Tensor) -> torch.Tensor:
        return _poses(lambda images: net(images).c2w, images)

    network = functools.partial(c2w, regressor.net, resized)
    yield Comparison(
        name=f"infer/localizer/{height}x{width}",
        run=lambda: regressor.localize(image),
        verify=lambda: worst_error(
            [lambda: [regressor.localize(image).c2w[None]], lambda: [network().cpu()]],
            lambda: [c2w(plain, whole).cpu()],
        ),
        tolerance=_tolerance(torch.float32, context.device),
        peers={"network alone": network},
        work_unit="images",
        n_flops=_count_flops(regressor.net, resized),
        min_repeats=_FAST_REPEATS,
    )

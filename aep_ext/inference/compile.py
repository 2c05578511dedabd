"""``compile``: a network for inference on the fastest engine at hand."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aep_ext.inference.backends import BACKENDS, build, missing
from aep_ext.inference.backends.engine import Engine, Settings
from aep_ext.inference.compiled_net import CompiledNet, difference
from aep_ext.inference.gated_net import GatedNet
from aep_ext.inference.segments import Segment, cut, segment_inputs
from aep_ext.surgery.multi_exit import MultiExitNet

_ENGINES = ("openvino", "onnxruntime")  # on the CPU, float32
_AUTO = (*_ENGINES, "eager")
_ROUNDS = 9  # in which several backends are timed
_TOLERANCE = {"float32": 1e-3, "engine": 0.1}


def compile(
    net: MultiExitNet | GatedNet,
    example: Tensor,
    backend: str | Sequence[str] = "auto",
    *,
    threads: int | None = None,
    precision: str = "float32",
    batches: Sequence[int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> CompiledNet | GatedNet:
    """Compiles the stages up to every exit, with its head, on an inference engine, and keeps the network's interface.

    ``net`` itself is left as it is; the result holds a copy, in eval mode, of what it was. Before anything is returned
    the engine's logits are compared with the network's on ``example``.

    Inputs that are not finite are not promised the network's logits: OpenVINO's ReLU maps NaN to 0, so that a sample of
    NaN may get finite logits there, and leave at a gate where the network's would not.

    Args:
        net: full, pruned or gated, in either mode. "openvino" and "onnxruntime" take float32 networks on the CPU;
            "inductor" and "eager" take all.
        example: images (N, C, H, W), N >= 1, in the network's dtype and on its device. Channels, height and width are
            fixed by it, the batch is not. Real images make the comparison worth more than noise.
        backend: "openvino", "onnxruntime", "inductor" (torch.compile with frozen weights: compiles for minutes, needs a
            C++ compiler) or "eager" (torch, BatchNorm folded). Of several names those that work are timed on the
            example in turn, and the fastest is kept; "auto" stands for all but "inductor".
        threads: of an engine; default ``torch.get_num_threads()`` now. "inductor" and "eager" follow torch's number.
        precision: "float32", or "engine": what the engine thinks best (OpenVINO computes in bfloat16 on CPUs that have
            it; logits then move in the second or third digit).
        batches: batch sizes that get stages compiled for them alone, usually faster than those for any batch, which
            there always are; each costs another copy of the packed weights. Default: 1 and the example's.
        progress: is given a line as each backend is built and timed, for instance ``print``. Default: lines on standard
            error where that is a terminal, else nothing.

    Returns:
        A :class:`CompiledNet`; for a gated net a :class:`GatedNet` around it, with its policy as it is.

    Raises:
        TypeError: ``net`` or ``example`` is not what it should be.
        ValueError: a name, number, shape, dtype or device is not.
        ImportError: the package of a backend that was named is missing.
        RuntimeError: the backend that was named cannot run the network, or none can (with the engines' reasons); or its
            logits differ absurdly from the network's: by more than 1e-3 of the largest (at least of 1; 0.1 for
            ``precision="engine"`` and for half precision), or by not being finite.
    """
    several = backend == "auto" or not isinstance(backend, str)
    listed = (backend,) if isinstance(backend, str) else tuple(dict.fromkeys(backend))
    names = _AUTO if backend == "auto" else listed
    full = _check(net.net if isinstance(net, GatedNet) else net, example, names, precision)
    threads = torch.get_num_threads() if threads is None else threads
    batches = (1, len(example)) if batches is None else batches
    for name, values in (("threads", [threads]), ("batches", batches)):
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"compile: {name} must be whole numbers of at least 1, got {value!r}")
    reference = copy.deepcopy(full).eval().requires_grad_(False)
    segments = cut(reference)
    example = example.detach().resolve_neg().contiguous()
    inputs = segment_inputs(segments, example)
    settings = Settings(threads, precision, tuple(sorted(set(batches))))
    engines: dict[str, Engine] = {}
    gaps: dict[str, float] = {}
    notices: list[str] = []
    progress = _to_terminal if progress is None else progress
    for name in names:
        progress(f"compile: {name}: building {len(segments)} stages for batches of {_listed(settings.batches)} and any")
        try:
            engines[name], gaps[name] = _build(name, segments, inputs, settings, reference)
        except Exception as error:
            if not several:
                raise
            notices.append(f"{name}: {_reason(error)}")
            progress(f"compile: {name}: left out: {_reason(error)}")
    if not engines:
        raise RuntimeError(f"compile: no backend can run this network: {'; '.join(notices)}")
    if several:
        progress(f"compile: timing {_listed(list(engines))} on {len(example)} images")
    timings = _time_in_turn(engines, example, len(segments)) if several else {}
    chosen = min(timings, key=timings.__getitem__) if timings else names[0]
    if backend == "auto" and list(engines) == ["eager"]:
        notices.append("eager is all there is: pip install 'aep_ext[openvino]' or 'aep_ext[onnxruntime]' for an engine")
    measured = "".join(f", {name} {milliseconds:.3g} ms" for name, milliseconds in timings.items())
    progress(f"compile: done, on {chosen}{measured}")
    compiled = CompiledNet(
        reference,
        engines[chosen],
        example,
        backend=chosen,
        threads=threads,
        timings=timings,
        notices=[*notices, *engines[chosen].notices],
        max_logit_difference=gaps[chosen],
    )
    if not isinstance(net, GatedNet):
        return compiled
    gated = GatedNet(compiled, net.policy)
    gated.calibration = net.calibration
    return gated


def _to_terminal(line: str) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _check(net: object, example: Tensor, names: Sequence[str], precision: str) -> MultiExitNet:
    if not isinstance(net, MultiExitNet):
        raise TypeError(f"compile: net must be a MultiExitNet, got {type(net).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"compile: example must be a torch.Tensor, got {type(example).__name__}")
    if example.layout != torch.strided:
        raise TypeError(f"compile: example must be a dense (strided) tensor, got {example.layout}")
    if example.dim() != 4 or min(example.shape) < 1:
        raise ValueError(f"compile: example must have shape [N, C, H, W], none of them 0, got {list(example.shape)}")
    if not names or not set(names) <= set(BACKENDS):
        raise ValueError(f"compile: backend must be auto, or of {', '.join(BACKENDS)}, got {', '.join(names)!r}")
    if precision not in _TOLERANCE:
        raise ValueError(f"compile: precision must be one of {', '.join(_TOLERANCE)}, got {precision!r}")
    anchor = next((p for p in net.parameters() if p.is_floating_point()), None)
    if anchor is not None and (example.dtype, example.device) != (anchor.dtype, anchor.device):
        found = f"{example.dtype} on {example.device}"
        raise ValueError(f"compile: example must be {anchor.dtype} on {anchor.device} like the network, got {found}")
    return net


def _build(
    name: str, segments: Sequence[Segment], inputs: Sequence[Tensor], settings: Settings, reference: MultiExitNet
) -> tuple[Engine, float]:
    """The engine, and how far its logits are from the network's: on every kind of batch that it was compiled for."""
    example, absent = inputs[0], missing(name)
    if absent:
        raise ImportError(f"compile: {absent}")
    if name in _ENGINES and (example.device.type != "cpu" or example.dtype != torch.float32):
        raise ValueError(
            f"compile: backend '{name}' must be given a float32 network on the CPU, got {example.dtype} on "
            f"{example.device} (backends 'inductor' and 'eager' take it)"
        )
    try:
        engine = build(name, segments, inputs, settings)
    except Exception as error:
        raise RuntimeError(f"compile: backend '{name}' cannot run this network: {_reason(error)}") from error
    gap, scale = 0.0, 1.0
    # One sample, the example's batch, and a batch that nothing was compiled for alone.
    for n in sorted({1, len(example), *settings.batches, max(len(example), 1, *settings.batches) + 1}):
        x = example[torch.arange(n, device=example.device) % len(example)]
        with torch.no_grad():
            wanted = reference.exit_logits(x)
        found = engine.exit_logits(x, len(segments))
        gap = max(gap, difference(found, wanted))
        scale = max(scale, float(torch.where(wanted.isfinite(), wanted, 0).abs().max()))
    single = example.dtype in (torch.float32, torch.float64)
    tolerance = _TOLERANCE[settings.precision if single else "engine"]
    if not gap <= tolerance * scale:
        raise RuntimeError(
            f"compile: backend '{name}' must give the network's logits up to {tolerance * scale:.3g}, got a "
            f"difference of {gap:.3g}"
        )
    return engine, gap


def _time_in_turn(engines: dict[str, Engine], example: Tensor, exits: int) -> dict[str, float]:
    """Median milliseconds of every exit's logits on the example; the engines take turns."""

    def run(engine: Engine) -> float:
        start = time.perf_counter()
        engine.exit_logits(example, exits)
        if example.is_cuda:
            torch.cuda.synchronize(example.device)
        return (time.perf_counter() - start) * 1e3

    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(_ROUNDS):
        for name, engine in engines.items():
            run(engine)  # after another engine's turn the caches are cold, which no user's loop will meet
            times[name].append(run(engine))
    return {name: statistics.median(values) for name, values in times.items()}


def _reason(error: BaseException) -> str:
    """An engine's message in one line."""
    return " ".join(str(error).split())[:500] or type(error).__name__

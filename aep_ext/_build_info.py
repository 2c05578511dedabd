"""``build_info()``: what was built, what runs, what is missing and why."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from aep_ext import _load

# Optional packages by the extra that brings them.
OPTIONAL_PACKAGES: dict[str, tuple[str, ...]] = {
    "train": ("lightning", "sklearn", "matplotlib", "PIL", "jinja2"),
    "models": ("torchvision", "timm"),
    "export": ("safetensors",),
}
_BACKENDS = {"native": "native module", "reference": "pure-torch reference"}


@dataclass(frozen=True)
class BuildInfo:
    """What ``aep info`` prints. ``str()`` gives the readable form, :meth:`to_dict` one that JSON takes."""

    version: str
    backend: str  # "native" or "reference"
    python: str
    torch: str
    torch_cuda: str | None  # CUDA version that torch was built with
    gpu: str | None
    built_for_torch: str | None
    kind: str | None  # "cpu", "cuda", "none"; None: never built
    compiler: str | None
    parallel: str | None
    isa_built: tuple[str, ...]
    isa_in_use: str | None
    isa_supported: tuple[str, ...]  # those of the ones built that this machine can run
    cuda_compiler: str | None
    cuda_arch: tuple[str, ...]
    missing: tuple[str, ...] = field(default=())  # one sentence each: what is missing and why

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain lists, strings and None."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        torch_kind = f"CUDA {self.torch_cuda}" if self.torch_cuda else "CPU"
        cuda_kernels = f"nvcc {self.cuda_compiler}, {', '.join(self.cuda_arch)}" if self.cuda_compiler else "none"
        rows = [
            ("aep_ext", f"{self.version}, runs on the {_BACKENDS[self.backend]}"),
            ("python", self.python),
            ("torch", f"{self.torch} ({torch_kind})"),
            ("GPU", self.gpu or "none"),
            ("built", _built_line(self)),
            ("compiler", self.compiler or "-"),
            ("threads", self.parallel or "-"),
            ("instruction sets", f"built {', '.join(self.isa_built) or '-'}; in use {self.isa_in_use or '-'}"),
            ("CUDA kernels", cuda_kernels),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        lines += [f"{'' if i else 'missing':<{width}}  {text}" for i, text in enumerate(self.missing)]
        return "\n".join(lines)


def _built_line(info: BuildInfo) -> str:
    if info.kind is None:
        return "not built for this Python"
    if info.kind == "none":
        return "as pure Python"
    return f"with {'CPU and CUDA' if info.kind == 'cuda' else 'CPU'} kernels for torch {info.built_for_torch}"


def _missing(record: dict[str, Any]) -> list[str]:
    """What is not there, one sentence each, most important first."""
    found = list(record.get("notices", ()))
    if _load.reason and _load.reason not in "; ".join(found):
        found.insert(0, _load.reason)
    if _load.extension is not None and _load.extension.isa_notice():
        found.append(_load.extension.isa_notice())
    for extra, packages in OPTIONAL_PACKAGES.items():
        absent = [name for name in packages if importlib.util.find_spec(name) is None]
        if absent:
            found.append(f"{', '.join(absent)} not installed: pip install 'aep_ext[{extra}]'")
    return found


def build_info() -> BuildInfo:
    """Describe this installation.

    Returns:
        BuildInfo: version, torch, compiler, instruction sets built and in use, CUDA version and architectures, and one
        sentence for everything that is missing. Never raises for a missing part: that is what it is there to report.
    """
    from aep_ext._version import __version__

    record = _load.record
    module = _load.extension
    return BuildInfo(
        version=__version__,
        backend="native" if module is not None else "reference",
        python=f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        built_for_torch=record.get("torch"),
        kind=record.get("kind"),
        compiler=record.get("compiler"),
        parallel=record.get("parallel"),
        isa_built=tuple(record.get("isa_built", ())),
        isa_in_use=module.isa_in_use() if module is not None else None,
        isa_supported=tuple(module.isa_supported().split(",")) if module is not None else (),
        cuda_compiler=record.get("cuda_compiler"),
        cuda_arch=tuple(record.get("cuda_arch", ())),
        missing=tuple(_missing(record)),
    )

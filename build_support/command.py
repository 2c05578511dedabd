"""setuptools' build_ext command, with CMake in place of setuptools' own compiler calls."""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

from build_support.native import MODULE_NAME, RECORD_NAME, build_into
from build_support.plan import ROOT, BuildError


class BuildNative(build_ext):
    """Puts `_C` and its record into the package: into the source tree for an editable install, else into the wheel."""

    def run(self) -> None:
        try:
            build_into(self._package_folder())
        except (BuildError, RuntimeError, ValueError) as error:
            raise PlatformError(str(error)) from None

    def _package_folder(self) -> Path:
        return ROOT / "aep_ext" if self.inplace or self.editable_mode else Path(self.build_lib, "aep_ext")

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in names the native sources

    def get_outputs(self) -> list[str]:
        folder = self._package_folder()
        return [str(folder / name) for name in (MODULE_NAME, RECORD_NAME) if (folder / name).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

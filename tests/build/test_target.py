"""torch is found where it will be used, also where build isolation hides it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build_support import target


def test_the_version_file_is_read_and_torch_is_not_imported(make_site):
    found = target.find_torch([str(make_site("2.15.0+cu132", "13.2"))])
    assert (found.version, found.public_version, found.cuda) == ("2.15.0+cu132", "2.15.0", "13.2")
    assert found.is_supported


def test_the_first_torch_on_the_path_counts(make_site):
    first, second = make_site("2.13.0", name="first"), make_site("2.11.0", name="second")
    assert target.find_torch([str(first), str(second)]).version == "2.13.0"


@pytest.mark.parametrize(
    ("version", "supported"),
    [("2.11.0", True), ("2.10.9", False), ("3.0.0a0+git1", True), ("1.13.1", False), ("unknown", False)],
)
def test_old_versions_are_known(version, supported):
    assert target.Torch(version, None, Path("torch")).is_supported is supported


def test_no_torch(tmp_path):
    (tmp_path / "torch").mkdir()  # a folder of that name, with nothing in it
    assert target.find_torch([str(tmp_path)]) is None


def test_pip_isolation_is_recognised_by_its_folder():
    assert target.pip_isolated(["/tmp/pip-build-env-x1y2/overlay/lib/python3.12/site-packages"])
    assert not target.pip_isolated(["/home/me/.cache/builds/.tmpAB/lib/python3.12/site-packages"])


def test_pip_isolation_shows_the_targets_folders(monkeypatch, make_site):
    site = make_site()
    monkeypatch.setattr(sys, "path", ["/tmp/pip-build-env-x/site"])
    monkeypatch.setattr(target, "target_site_dirs", lambda: [str(site)])
    assert target.find_torch().version == "2.13.0+cpu"


def test_other_isolation_stays_closed(monkeypatch, make_site):
    """uv and `build` run in an environment of their own: its folders are not the target's, and are not searched."""
    site = make_site()
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(target, "target_site_dirs", lambda: [str(site)])
    assert target.find_torch() is None


def test_the_targets_folders_are_those_of_this_python():
    folders = target.target_site_dirs()
    searched = {str(Path(entry).resolve()) for entry in [*folders, *sys.path]}
    assert str(Path(torch.__file__).resolve().parent.parent) in searched
    assert all(Path(entry).is_dir() for entry in folders)


def test_a_closed_virtual_environment_does_not_show_the_base(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / "pyvenv.cfg").write_text("home = x\ninclude-system-site-packages = false\n", encoding="utf-8")
    assert not target._sees_base_packages()
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = true\n", encoding="utf-8")
    assert target._sees_base_packages()
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert target._sees_base_packages()


def test_the_probe_gives_torchs_own_paths():
    found = target.find_torch()
    paths = target.probe_paths(found)
    assert paths["cxx11_abi"] in (0, 1)
    assert any(Path(folder, "torch", "library.h").is_file() for folder in paths["include_dirs"])
    assert any(Path(folder).glob("libc10*") for folder in paths["library_dirs"])


def test_a_torch_that_cannot_be_imported_is_reported(monkeypatch, make_site):
    site = make_site()
    broken = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback ...\nOSError: libc10.so: no such file\n")
    monkeypatch.setattr(target.subprocess, "run", lambda *args, **kwargs: broken)
    with pytest.raises(RuntimeError, match=r"torch 2\.13\.0\+cpu in .* cannot be imported .*libc10"):
        target.probe_paths(target.find_torch([str(site)]))

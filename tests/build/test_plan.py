"""Which kind of build is chosen, on every kind of machine and for every wish."""

from __future__ import annotations

import pytest

from build_support import plan as planning
from build_support.plan import BuildError, Plan, make_plan


def _plan(env, torch, toolkit=None, cuda_sources=True) -> Plan:
    return make_plan(
        env, find_torch=lambda: torch, find_toolkit=lambda torch_folder: toolkit, cuda_sources=cuda_sources
    )


def test_cpu_torch_gives_a_cpu_build_and_nothing_to_remark(compiler_env, cpu_torch, toolkit):
    plan = _plan(compiler_env, cpu_torch, toolkit)
    assert (plan.kind, plan.notices, plan.toolkit) == ("cpu", (), None)


def test_cuda_torch_without_nvcc_gives_a_cpu_build_and_one_notice(compiler_env, cuda_torch):
    plan = _plan(compiler_env, cuda_torch)
    assert plan.kind == "cpu"
    assert len(plan.notices) == 1
    assert "nvcc was not found" in plan.notices[0]
    assert "13.2" in plan.notices[0]


def test_cuda_torch_with_nvcc_gives_a_cuda_build(compiler_env, cuda_torch, toolkit):
    plan = _plan(compiler_env | {"TORCH_CUDA_ARCH_LIST": "9.0"}, cuda_torch, toolkit)
    assert (plan.kind, plan.toolkit, plan.architectures, plan.notices) == ("cuda", toolkit, "9.0", ())


def test_nvcc_of_another_major_version_is_not_used(compiler_env, cuda_torch, toolkit):
    old = planning.cuda.Toolkit(toolkit.home, toolkit.nvcc, "12.8")
    plan = _plan(compiler_env, cuda_torch, old)
    assert plan.kind == "cpu"
    assert "12.8" in plan.notices[0]
    assert "13.2" in plan.notices[0]


def test_a_tree_without_cuda_sources_says_so(compiler_env, cuda_torch, toolkit):
    plan = _plan(compiler_env, cuda_torch, toolkit, cuda_sources=False)
    assert plan.kind == "cpu"
    assert "has no CUDA kernels" in plan.notices[0]


@pytest.mark.parametrize("wish", [{"AEP_BUILD": "cuda"}, {"FORCE_CUDA": "1"}])
def test_cuda_that_cannot_be_had_is_an_error(compiler_env, cpu_torch, cuda_torch, toolkit, wish):
    with pytest.raises(BuildError, match=r"torch 2\.13\.0\+cpu is built without CUDA"):
        _plan(compiler_env | wish, cpu_torch, toolkit)
    with pytest.raises(BuildError, match="nvcc was not found"):
        _plan(compiler_env | wish, cuda_torch)


def test_cpu_can_be_chosen_beside_a_cuda_torch(compiler_env, cuda_torch, toolkit):
    plan = _plan(compiler_env | {"AEP_BUILD": "CPU"}, cuda_torch, toolkit)
    assert plan.kind == "cpu"
    assert plan.notices == ("no CUDA kernels: built with AEP_BUILD=cpu",)


def test_none_needs_neither_torch_nor_compiler():
    plan = _plan({"PATH": "", "AEP_BUILD": "none"}, None)
    assert plan.kind == "none"
    assert "AEP_BUILD=none" in plan.notices[0]


def test_without_a_compiler_the_package_is_pure_python_unless_more_was_asked_for(cpu_torch):
    plan = _plan({"PATH": ""}, cpu_torch)
    assert plan.kind == "none"
    assert "no C++ compiler" in plan.notices[0]
    with pytest.raises(BuildError, match="AEP_BUILD=cpu needs a C\\+\\+ compiler"):
        _plan({"PATH": "", "AEP_BUILD": "cpu"}, cpu_torch)


def test_wishes_that_make_no_sense(compiler_env, cpu_torch):
    with pytest.raises(BuildError, match="AEP_BUILD must be cpu, cuda or none, got 'gpu'"):
        _plan(compiler_env | {"AEP_BUILD": "gpu"}, cpu_torch)
    with pytest.raises(BuildError, match="contradict"):
        _plan(compiler_env | {"AEP_BUILD": "cpu", "FORCE_CUDA": "1"}, cpu_torch)


def test_an_old_torch_is_refused_rather_than_replaced(compiler_env, cpu_torch):
    old = planning.target.Torch("2.9.1", None, cpu_torch.folder)
    with pytest.raises(BuildError, match=r"needs torch>=2\.11, torch 2\.9\.1 is installed"):
        _plan(compiler_env, old)


def test_a_native_package_asks_for_the_torch_it_fits(compiler_env, cpu_torch):
    """The public version: an installed 2.13.0+cpu satisfies it, so pip brings no other torch and no CUDA packages."""
    assert _plan(compiler_env, cpu_torch).install_requires[0] == "torch==2.13.0"
    assert _plan({"AEP_BUILD": "none"}, cpu_torch).install_requires[0] == "torch>=2.11"


def test_torch_is_a_build_requirement_only_where_there_is_none(compiler_env, cpu_torch, monkeypatch):
    monkeypatch.setattr(planning, "make_plan", lambda env: _plan(env, None))
    monkeypatch.setattr(planning.target, "pip_isolated", lambda: True)
    assert planning.build_requires(compiler_env)[0] == "torch>=2.11"
    assert planning.build_requires({"AEP_BUILD": "none"}) == []
    assert planning.build_requires({"AEP_BUILD": "nonsense"}) == []
    monkeypatch.setattr(planning, "make_plan", lambda env: _plan(env, cpu_torch))
    assert planning.build_requires(compiler_env) == []


def test_other_isolation_fetches_no_torch_of_its_own(compiler_env, monkeypatch):
    """uv and `build` hide the target: a torch fetched for the build could be another than the one it will run with."""
    monkeypatch.setattr(planning, "make_plan", lambda env: _plan(env, None))
    monkeypatch.setattr(planning.target, "pip_isolated", lambda: False)
    assert planning.build_requires(compiler_env) == []


def test_the_compiler_can_be_named(make_script):
    named = make_script("my-c++", "exit 0")
    assert planning.why_no_compiler({"CXX": f"{named} -m64", "PATH": ""}) is None
    assert "no-such-compiler" in planning.why_no_compiler({"CXX": "no-such-compiler", "PATH": ""})
    assert "cannot be understood" in planning.why_no_compiler({"CXX": "c++ 'a", "PATH": ""})


def test_a_compiler_that_does_not_compile_is_none(make_script, cpu_torch):
    """A wrapper without its compiler, a compiler without its library, or one that is too old for C++20."""
    env = {"PATH": str(make_script("c++", "echo 'no C++20 here' >&2; exit 3").parent)}
    plan = _plan(env, cpu_torch)
    assert (plan.kind, plan.install_requires[0]) == ("none", "torch>=2.11")
    assert "does not compile C++20 (status 3: no C++20 here)" in plan.notices[0]
    with pytest.raises(BuildError, match="AEP_BUILD=cpu needs a C\\+\\+ compiler, but the C\\+\\+ compiler"):
        _plan(env | {"AEP_BUILD": "cpu"}, cpu_torch)

"""Which kind of build is chosen, on every kind of machine and for every wish."""

from __future__ import annotations

import pytest

from build_support import cuda, plan, target
from build_support.plan import BuildError, Plan, make_plan


def _plan(env, torch, toolkit=None, gpus=()) -> Plan:
    return make_plan(
        env, find_torch=lambda: torch, find_toolkit=lambda torch_folder: toolkit, find_gpus=lambda: list(gpus)
    )


def test_cpu_torch_gives_a_cpu_build_and_nothing_to_remark(compiler_env, cpu_torch, toolkit):
    built = _plan(compiler_env, cpu_torch, toolkit, ["9.0"])
    assert (built.kind, built.notices, built.toolkit) == ("cpu", (), None)


def test_without_a_gpu_no_cuda_is_compiled_and_the_notice_says_how_to_have_it(compiler_env, cuda_torch, toolkit):
    built = _plan(compiler_env, cuda_torch, toolkit)
    assert (built.kind, built.toolkit) == ("cpu", None)
    (notice,) = built.notices
    assert "no GPU was found" in notice and "FORCE_CUDA=1" in notice


def test_with_a_gpu_cuda_is_compiled_for_it(compiler_env, cuda_torch, toolkit, monkeypatch):
    monkeypatch.setattr(cuda, "_output", lambda command: "compute_80\ncompute_89\ncompute_90\ncompute_100")
    built = _plan(compiler_env, cuda_torch, toolkit, ["8.9"])
    assert (built.kind, built.toolkit, built.architectures, built.notices) == ("cuda", toolkit, "8.9", ())
    assert _plan(compiler_env | {"FORCE_CUDA": "1"}, cuda_torch, toolkit, ["8.9"]).architectures == "8.9"
    listed = compiler_env | {"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
    assert _plan(listed, cuda_torch, toolkit, ["8.9"]).architectures == "8.0;9.0+PTX"


def test_forced_without_a_gpu_it_is_compiled_for_the_default_list(compiler_env, cuda_torch, toolkit, monkeypatch):
    monkeypatch.setattr(cuda, "_output", lambda command: "compute_80\ncompute_90\ncompute_100")
    built = _plan(compiler_env | {"FORCE_CUDA": "1"}, cuda_torch, toolkit)
    assert (built.kind, built.architectures) == ("cuda", "8.0;9.0;10.0+PTX")


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, r"nvcc was not found .*13\.2"), ("12.8", r"nvcc is of CUDA 12\.8, .* of CUDA 13\.2: .* must agree")],
)
def test_a_gpu_without_a_fitting_nvcc_gives_a_notice_and_with_force_cuda_an_error(
    compiler_env, cuda_torch, toolkit, version, reason
):
    found = version and cuda.Toolkit(toolkit.home, toolkit.nvcc, version)
    built = _plan(compiler_env, cuda_torch, found, ["9.0"])
    assert built.kind == "cpu"
    with pytest.raises(BuildError, match=reason) as caught:
        _plan(compiler_env | {"FORCE_CUDA": "1"}, cuda_torch, found)
    assert built.notices[0].removeprefix("no CUDA kernels: ") in str(caught.value)


def test_force_cuda_beside_a_cpu_torch_is_an_error(compiler_env, cpu_torch, toolkit):
    with pytest.raises(BuildError, match=r"torch 2\.13\.0\+cpu is built without CUDA"):
        _plan(compiler_env | {"FORCE_CUDA": "1"}, cpu_torch, toolkit)


def test_cuda_can_be_left_out_beside_a_gpu(compiler_env, cuda_torch, toolkit):
    built = _plan(compiler_env | {"FORCE_CUDA": "0"}, cuda_torch, toolkit, ["9.0"])
    assert (built.kind, built.notices) == ("cpu", ("no CUDA kernels: built with FORCE_CUDA=0",))


def test_pure_python_needs_neither_torch_nor_compiler():
    built = _plan({"PATH": "", "AEP_NO_EXTENSIONS": "1"}, None)
    assert built.kind == "none"
    assert "AEP_NO_EXTENSIONS=1" in built.notices[0]


def test_without_a_compiler_the_package_is_pure_python(cpu_torch, cuda_torch):
    built = _plan({"PATH": ""}, cpu_torch)
    assert built.kind == "none"
    assert "no C++ compiler" in built.notices[0]
    with pytest.raises(BuildError, match=r"FORCE_CUDA=1 needs a C\+\+ compiler"):
        _plan({"PATH": "", "FORCE_CUDA": "1"}, cuda_torch)


def test_a_compiler_that_does_not_compile_is_none(make_script, cpu_torch):
    """A wrapper without its compiler, a compiler without its library, or one that is too old for C++20."""
    built = _plan({"PATH": str(make_script("c++", "echo 'no C++20 here' >&2; exit 3").parent)}, cpu_torch)
    assert (built.kind, built.install_requires[0]) == ("none", "torch>=2.11")
    assert "does not compile C++20 (status 3: no C++20 here)" in built.notices[0]


def test_the_compiler_can_be_named(make_script):
    named = make_script("my-c++", "exit 0")
    assert plan.why_no_compiler({"CXX": f"{named} -m64", "PATH": ""}) is None
    assert "no-such-compiler" in plan.why_no_compiler({"CXX": "no-such-compiler", "PATH": ""})
    assert "cannot be understood" in plan.why_no_compiler({"CXX": "c++ 'a", "PATH": ""})


def test_wishes_that_make_no_sense(compiler_env, cpu_torch):
    with pytest.raises(BuildError, match="FORCE_CUDA must be 0 or 1, got 'gpu'"):
        _plan(compiler_env | {"FORCE_CUDA": "gpu"}, cpu_torch)
    with pytest.raises(BuildError, match="contradict"):
        _plan(compiler_env | {"AEP_NO_EXTENSIONS": "1", "FORCE_CUDA": "1"}, cpu_torch)


def test_an_old_torch_is_refused_rather_than_replaced(compiler_env, cpu_torch):
    with pytest.raises(BuildError, match=r"needs torch>=2\.11, torch 2\.9\.1 is installed"):
        _plan(compiler_env, target.Torch("2.9.1", None, cpu_torch.folder))


def test_a_native_package_asks_for_the_torch_it_fits(compiler_env, cpu_torch):
    """The public version: an installed 2.13.0+cpu satisfies it, so pip brings no other torch and no CUDA packages."""
    assert _plan(compiler_env, cpu_torch).install_requires[0] == "torch==2.13.0"
    assert _plan({"AEP_NO_EXTENSIONS": "1"}, cpu_torch).install_requires[0] == "torch>=2.11"


def test_torch_is_a_build_requirement_only_where_pip_sees_none(compiler_env, cpu_torch, monkeypatch):
    monkeypatch.setattr(plan, "make_plan", lambda env: _plan(env, None))
    monkeypatch.setattr(target, "pip_isolated", lambda: True)
    assert plan.build_requires(compiler_env) == ["torch>=2.11"]
    assert plan.build_requires({"AEP_NO_EXTENSIONS": "1"}) == []
    assert plan.build_requires(compiler_env | {"FORCE_CUDA": "nonsense"}) == []
    # uv and `build` hide the target: a torch fetched for the build could be another than the one it will run with.
    monkeypatch.setattr(target, "pip_isolated", lambda: False)
    assert plan.build_requires(compiler_env) == []
    monkeypatch.setattr(target, "pip_isolated", lambda: True)
    monkeypatch.setattr(plan, "make_plan", lambda env: _plan(env, cpu_torch))
    assert plan.build_requires(compiler_env) == []

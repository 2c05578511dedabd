"""How contestants are timed and compared, and that the rivals compute what the reference computes."""

from __future__ import annotations

import itertools

import pytest
import torch

from aep_ext.ops import reference
from benchmarks import bandwidth, rivals
from benchmarks.cases import Case, cases, feature_map, input_sets, logits_sets
from benchmarks.memory import peak
from benchmarks.racing import (
    Rotation,
    compare,
    condense_times,
    inputs_on_cpu,
    no_garbage_collection,
    pace,
    quartile_range,
)


def test_inputs_rotate():
    seen = []
    Rotation(seen.append, [(1,), (2,), (3,)]).round(7)
    assert seen == [1, 2, 3, 1, 2, 3, 1]


def test_one_interruption_does_not_decide_the_calls_of_a_round():
    """A clock that jumps by 50 ms once, while the length of a round is measured."""
    ticks = itertools.count()
    clock = {"now": 0.0}

    def advance() -> None:
        clock["now"] += 10e-6 + (0.05 if next(ticks) == 64 else 0.0)

    turn = Rotation(advance, [()], lambda: clock["now"])
    calls, seconds = pace(turn, 1.5e-3)
    assert calls == 150
    assert seconds == pytest.approx(1.5e-3)
    assert pace(Rotation(lambda: clock.update(now=clock["now"] + 2.0), [()], turn.clock))[0] == 1


def test_paired_ratios_do_not_feel_a_change_of_pace():
    """The machine becomes three times as slow half way; the paired ratio and its spread do not notice."""
    pace = [1.0] * 5 + [3.0] * 5
    own = [1e-6 * p for p in pace]
    info = condense_times(own, {"eager": [2e-6 * p for p in pace], "inductor": [1.5e-6 * p for p in pace]}, ())
    assert info["paired_ratio_eager"] == pytest.approx(2.0)
    assert info["iqr_eager"] == pytest.approx(0.0, abs=1e-12)
    assert info["ratio_best_rival"] == pytest.approx(1.5)
    assert info["paired_ratio_best_eager"] == pytest.approx(2.0)


def test_the_best_eager_rival_is_none_of_the_others():
    times = {"slow": [4.0], "quick": [3.0], "inductor": [1.0], "reference": [0.5], "copy": [0.1]}
    info = condense_times([1.0], times, ceilings=("copy",))
    assert (info["best_eager"], info["ratio_best_eager"], info["ratio_best_rival"]) == ("quick", 3.0, 0.5)
    assert info["ratio_copy"] == 0.1


def test_quartile_range():
    assert quartile_range([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert quartile_range([1.0]) == 0.0


def test_another_result_names_the_contestant():
    with pytest.raises(AssertionError, match="eager: "):
        compare(torch.tensor([1.0]), torch.tensor([1.1]), None, 1e-4, 1e-5, "eager")
    compare((torch.tensor([1.0]), None), [torch.tensor([1.0]), None], None, 0, 0, "eager")


def test_garbage_collection_comes_back():
    import gc

    with no_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_tensors_are_found_in_lists():
    meta = torch.empty(1, device="meta")
    assert inputs_on_cpu([([torch.zeros(1)], 2.0)])
    assert not inputs_on_cpu([(1, [meta])])


def test_memory_peaks_are_counted():
    x = torch.randn(1 << 18)  # 1 MiB

    def two_at_once() -> torch.Tensor:
        y = x * 2
        return y + 1

    found = peak(two_at_once)
    assert 2 << 20 <= found.peak < (2 << 20) + 4096
    assert 1 << 20 <= found.held < (1 << 20) + 4096


def test_bandwidth_is_a_number_of_gigabytes(monkeypatch):
    monkeypatch.setattr(bandwidth, "BYTES", 8 << 20)
    monkeypatch.setattr(bandwidth, "REPEATS", 2)
    found = bandwidth.measure()
    assert 0.05 < found["read"] < 5000
    assert 0.05 < found["copy"] < 5000


def test_an_id_that_is_no_case_is_refused():
    assert Case((4, 8), "out", "bfloat16", "strided", 0).id == "4x8-out-bfloat16-strided-allthreads"
    with pytest.raises(ValueError, match="no such case: 4x9"):
        cases([(4, 8)], goal=["4x9"])
    marks = {p.id: [m.name for m in p.marks] for p in cases([(4, 8)], goal=["4x8"], quick=["4x8"], huge=[(9, 9)])}
    assert len(marks) == 12 + 4
    assert marks["4x8"] == ["goal", "quick"]
    assert marks["9x9-bfloat16"] == ["matrix"]


def test_the_number_of_input_sets():
    assert [input_sets(n) for n in (160, 4 << 20, 16 << 20, 1 << 30)] == [8, 4, 2, 1]


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_rivals_agree_with_the_reference(layout):
    case = Case((3, 5, 7), layout=layout)
    logits, weights, target = logits_sets(case, "cpu")[0]
    expected = reference.ensemble(logits, weights)
    for rival in (rivals.ensemble_naive, rivals.ensemble_einsum, rivals.ensemble_product):
        torch.testing.assert_close(rival(logits, weights), expected)
    expected = tuple(reference.ensemble_stats(logits, weights))
    for rival in (rivals.stats_naive, rivals.stats_eager, rivals.stats_fusable):
        torch.testing.assert_close(rival(logits, weights), expected)
    expected = reference.joint_cross_entropy(logits, target, weights).loss
    torch.testing.assert_close(rivals.loss_summed(logits, target, weights.tolist()), expected)
    torch.testing.assert_close(rivals.loss_flat(logits, target, weights), expected)
    expected = reference.subset_correct(logits, weights, target)
    assert torch.equal(rivals.subsets_published(logits, weights, target), expected)
    assert torch.equal(rivals.subsets_product(logits, weights, target), expected)


def test_head_and_gate_rivals_agree_with_the_reference():
    features = [feature_map(6, 4, 3, Case((6,), layout=layout), "cpu") for layout in ("channels_last", "strided")]
    weights, biases = [torch.randn(5, 4) for _ in features], [torch.randn(5) for _ in features]
    expected = reference.multi_exit_linear_head(features, weights, biases)
    heads = [rivals.ExitHead(w, b) for w, b in zip(weights, biases, strict=True)]
    torch.testing.assert_close(rivals.head_naive(features, heads), expected)
    torch.testing.assert_close(rivals.head_mean(features, weights, biases), expected)
    running, logits, indices = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6)
    state = torch.zeros(6, 0, dtype=torch.int64)
    r = reference.gate(features[0], running, 0.3, indices, state, logits, weight=0.7, threshold=0.5)
    expected = r.features[: r.count], r.running[: r.count], r.indices, r.stats
    for rival in (rivals.gate_naive, rivals.gate_eager):
        torch.testing.assert_close(rival(features[0], running, indices, logits, 0.7, 0.5), expected)

from __future__ import annotations

import json
import math

import pytest
import torch
from aep_ext.termination import DataIdentity, ExitCache, exit_costs
from synthetic_exits import cache_of, logits_and_labels

from aep_ext import ops
from aep_ext.surgery import networks


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return networks.build("resnet_small", 4, in_channels=1)


def batches(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 1, 16, 16, generator=generator), torch.randint(0, 4, (n,), generator=generator), "extra")
        for n in sizes
    ]


def test_collect_keeps_every_exits_logits_in_the_loaders_order(net):
    loader = batches([3, 5, 1])
    net.train()
    net.stages[0].eval()
    modes = [part.training for part in net.modules()]
    seen = []
    cache = ExitCache.collect(net, loader, role="calibration", progress=seen.append)
    assert [part.training for part in net.modules()] == modes and seen == [3, 8, 9]
    net.eval()
    with torch.no_grad():
        expected = torch.cat([net.exit_logits(x) for x, _, _ in loader], dim=1)
    torch.testing.assert_close(cache.logits, expected, rtol=0, atol=0)
    assert torch.equal(cache.target, torch.cat([y for _, y, _ in loader]))
    assert torch.equal(cache.weights, net.output_weights) and cache.exit_ids == tuple(net.exit_ids)
    assert not cache.logits.is_inference() and len(cache) == 9 and cache.num_classes == 4
    half = ExitCache.collect(net, loader, role="calibration", half=True)
    assert half.logits.dtype == torch.float16 and half.identity == cache.identity
    with pytest.raises(ValueError, match=r"ExitCache.collect: logits must be within \+-65504 for half storage"):
        ExitCache.collect(net, [(1e9 * loader[0][0], loader[0][1])], role="calibration", half=True)


def test_collect_restores_the_network_after_an_error(net):
    net.train()
    with pytest.raises(ValueError, match=r"labels must be within 0..3, got 9..9 in batch 0"):
        ExitCache.collect(net, [(torch.zeros(1, 1, 16, 16), torch.tensor([9]))], role="calibration")
    with pytest.raises(TypeError, match=r"loader must yield \(x, y\) batches, got Tensor"):
        ExitCache.collect(net, [torch.zeros(1, 1, 16, 16)], role="calibration")
    with pytest.raises(ValueError, match="at least one sample, got none"):
        ExitCache.collect(net, [], role="calibration")
    with pytest.raises(TypeError, match="must be a MultiExitNet, got Linear"):
        ExitCache.collect(torch.nn.Linear(1, 1), [], role="calibration")
    assert net.training and net.stages[0].training


def test_prefixes_are_the_operators_ensembles():
    cache = cache_of(4, 33)
    for e, prefix in enumerate(cache.prefixes()):
        expected = (
            ops.ensemble(cache.logits[: e + 1].contiguous(), cache.weights[: e + 1]) / cache.weights[: e + 1].sum()
        )
        torch.testing.assert_close(prefix, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(prefix, cache.running[e])
    assert cache.running is cache.running  # computed once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit_logits": torch.zeros(2, 3)}, r"exit_logits must have shape \[E, N, K\].*got \[2, 3\]"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, r"target must be integers of shape \[3\], got torch.int64"),
        ({"target": torch.zeros(3)}, r"integers of shape \[3\], got torch.float32"),
        ({"target": torch.tensor([0, 5, 1])}, r"within 0..4, got 0..5"),
        ({"target": torch.tensor([0, -1, 1])}, r"within 0..4, got -1..1"),
        ({"weights": [1.0]}, "weights must be 2 positive numbers"),
        ({"weights": [1.0, 0.0]}, "weights must be 2 positive numbers"),
        ({"role": ""}, "role must be a name"),
        ({"exit_ids": [0]}, "exit_ids must have 2 entries, got 1"),
        ({"exit_logits": torch.full((2, 3, 5), 1e39, dtype=torch.float64)}, r"within \+-3.40282e\+38 for float32"),
        ({"role": 3}, "role must be a name"),
        ({"exit_logits": torch.full((2, 3, 5), 1e6), "half": True}, r"within \+-65504 for half storage, got 1e\+06"),
    ],
)
def test_what_is_no_cache(change, message):
    given = {
        "exit_logits": torch.zeros(2, 3, 5),
        "target": torch.zeros(3, dtype=torch.int64),
        "weights": [1.0, 1.0],
        "role": "calibration",
    } | change
    with pytest.raises(ValueError, match=message):
        ExitCache.from_logits(**given)


def test_logits_that_are_no_floats():
    with pytest.raises(TypeError, match="exit_logits must be a floating tensor, got torch.int64"):
        ExitCache.from_logits(torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1), [1.0], role="x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_another_type(dtype):
    logits, target = logits_and_labels(2, 6)
    logits[0, 0, 0], logits[1, 1, 1] = math.nan, -math.inf
    cache = ExitCache.from_logits(logits.to(dtype), target.to(torch.uint8), [1, 2], role="calibration")
    assert cache.logits.dtype == torch.float32 and cache.target.dtype == torch.int64
    torch.testing.assert_close(cache.logits, logits.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), r"ExitCache.collect: labels must be within 0..3, got 0..4 in batch 1"),
        (torch.tensor([-1, 0]), r"labels must be within 0..3, got -1..0 in batch 1"),
        (
            torch.tensor([0.0, 1.0]),
            r"labels must be integers of shape \[2\], got torch.float32 of shape \[2\] in batch 1",
        ),
        (
            torch.tensor([[0], [1]]),
            r"labels must be integers of shape \[2\], got torch.int64 of shape \[2, 1\] in batch 1",
        ),
        (torch.tensor([0]), r"labels must be integers of shape \[2\], got torch.int64 of shape \[1\] in batch 1"),
        (None, "labels must be integers, got NoneType in batch 1"),
    ],
)
def test_a_bad_label_ends_the_pass_at_once(net, labels, message):
    seen = []

    def loader():
        yield torch.zeros(2, 1, 16, 16), torch.tensor([0, 1])
        yield torch.zeros(2, 1, 16, 16), labels
        seen.append("more")
        yield torch.zeros(2, 1, 16, 16), torch.tensor([0, 1])

    with pytest.raises((ValueError, TypeError), match=message):
        ExitCache.collect(net, loader(), role="calibration")
    assert seen == []


def test_roles_and_fractions_of_a_split():
    cache = cache_of(2, 10)
    with pytest.raises(ValueError, match="fractions must be positive and sum to at most 1"):
        cache.split([math.nan], seed=0)
    for wrong in ("", 3):
        with pytest.raises(ValueError, match="role must be a name"):
            cache.split([0.5], seed=0, roles=[wrong])
        with pytest.raises(ValueError, match="role must be a name"):
            cache.select([0], role=wrong)


def test_the_cache_owns_its_memory():
    logits, target = logits_and_labels(2, 4)
    cache = ExitCache.from_logits(logits, target, [1.0, 1.0], role="calibration")
    before = cache.logits.clone()
    shared = ExitCache.from_logits(logits, target, [1.0, 1.0], role="calibration", copy=False)
    logits.zero_()
    assert torch.equal(cache.logits, before) and not shared.logits.any()


def test_split_is_seeded_disjoint_and_complete():
    cache = cache_of(2, 101)
    first, second = cache.split([0.3, 0.7], seed=5, roles=["calibration", "test"])
    again, _ = cache.split([0.3, 0.7], seed=5)
    other, _ = cache.split([0.3, 0.7], seed=6)
    assert (len(first), len(second), first.role, second.role) == (30, 71, "calibration", "test")
    assert first.identity == again.identity and first.identity.sha256 != other.identity.sha256
    assert sorted([*first.hashes.tolist(), *second.hashes.tolist()]) == sorted(cache.hashes.tolist())
    assert not set(first.hashes.tolist()) & set(second.hashes.tolist())
    state = torch.get_rng_state()
    cache.split([0.5], seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="sum to at most 1"):
        cache.split([0.5, 0.6], seed=0)
    with pytest.raises(ValueError, match="roles must have 1 entries, got 2"):
        cache.split([0.5], seed=0, roles=["a", "b"])
    assert len(cache.select(cache.target == 0)) == int((cache.target == 0).sum())
    assert len(cache.select([])) == 0


def test_identity_sees_order_labels_and_shared_samples():
    cache = cache_of(3, 3000)
    shuffled = cache.select(torch.randperm(3000))
    assert shuffled.identity.sha256 != cache.identity.sha256 and shuffled.identity.sketch == cache.identity.sketch
    relabelled = ExitCache.from_logits(cache.logits, (cache.target + 1) % 5, cache.weights, role="calibration")
    other = cache_of(3, 3000, seed=1)
    quarter, rest = cache.split([0.25, 0.75], seed=0)
    few = cache.select(range(60))
    for mine, theirs, expected in [
        (cache, cache, True),
        (cache, shuffled, True),
        (cache, quarter, True),
        (quarter, cache, True),
        (cache, few, True),
        (few, cache, True),
        (quarter, rest, False),
        (cache, relabelled, False),
        (cache, other, False),
    ]:
        assert mine.identity.overlaps(theirs.identity, theirs.hashes) is expected
    assert cache.identity.shared_with(quarter.hashes) == pytest.approx(0.25, abs=0.1)
    stored = json.loads(json.dumps(cache.identity.to_dict()))
    assert DataIdentity.from_dict(stored) == cache.identity
    assert str(cache.identity).startswith("calibration (3000 samples, ")


@pytest.mark.parametrize("samples", [1, 5, 20, 100, 1000])
def test_a_small_part_of_a_large_set_is_recognised(samples):
    cache = cache_of(2, 20_000)
    part = cache.select(torch.randperm(20_000)[:samples], role="test")
    assert cache.identity.overlaps(part.identity, part.hashes) and part.identity.overlaps(cache.identity, cache.hashes)
    # Mixed among others: from one in a hundred on.
    fresh = cache_of(2, 2000, seed=1, role="test")
    for shared, expected in ((20, True), (1, False)):
        logits = torch.cat([cache.logits[:, 7 : 7 + shared], fresh.logits[:, shared:]], dim=1)
        target = torch.cat([cache.target[7 : 7 + shared], fresh.target[shared:]])
        mixed = ExitCache.from_logits(logits, target, cache.weights, role="test")
        assert cache.identity.overlaps(mixed.identity, mixed.hashes) is expected
        assert mixed.identity.overlaps(cache.identity, cache.hashes) is expected
    # From a file only the sketch is known: one in a hundred of the samples, or a part that holds some of the sketch.
    stored = DataIdentity.from_dict(cache.identity.to_dict())
    assert stored.hashes is None and stored == cache.identity
    if samples == 1000:
        assert stored.overlaps(part.identity, part.hashes)
    holds_one = cache.select(cache.hashes == min(cache.hashes))
    assert stored.overlaps(holds_one.identity, holds_one.hashes)


def test_save_and_load(tmp_path):
    pytest.importorskip("safetensors", reason="files need safetensors")
    cache = cache_of(3, 17)
    path = cache.save(tmp_path / "folder" / "validation", metadata={"net": "small"})
    assert path.name == "validation.safetensors"
    assert sorted(p.name for p in path.parent.iterdir()) == ["validation.json", "validation.safetensors"]
    loaded = ExitCache.load(path)
    for name in ("logits", "target", "weights"):
        assert torch.equal(getattr(loaded, name), getattr(cache, name))
    assert loaded.identity == cache.identity and loaded.exit_ids == cache.exit_ids
    assert json.loads(path.with_suffix(".json").read_text())["metadata"] == {"net": "small"}
    half = ExitCache.from_logits(cache.logits, cache.target, cache.weights, role="test", half=True)
    half.save(path)
    assert ExitCache.load(path).logits.dtype == torch.float16 and ExitCache.load(path).role == "test"
    cache_of(3, 5).save(tmp_path / "other")
    (tmp_path / "other.safetensors").replace(path)
    with pytest.raises(ValueError, match="must be the file that validation.json names"):
        ExitCache.load(path)
    with pytest.raises(TypeError, match="metadata must be JSON-able"):
        cache.save(tmp_path / "bad", metadata={"x": object()})
    assert not (tmp_path / "bad.safetensors").exists()
    with pytest.raises(FileNotFoundError, match="absent.safetensors must be in the folder"):
        ExitCache.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"must end in .safetensors, got 'x.pt'"):
        cache.save(tmp_path / "x.pt")
    (tmp_path / "other.safetensors").touch()
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="must have format"):
        ExitCache.load(tmp_path / "other")
    description = path.with_suffix(".json")
    half.save(path)
    values = json.loads(description.read_text())
    for broken in ({k: v for k, v in values.items() if k != "identity"}, values | {"identity": {"role": "test"}}):
        description.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="ExitCache.load: validation.json must describe a cache, got"):
            ExitCache.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="files need safetensors")
    path = cache_of(2, 5).save(tmp_path / "cache")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        cache_of(2, 6).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_exit_costs_are_those_of_the_prefixes(net):
    from aep_ext.pruning import count_macs, prune

    costs = exit_costs(net, (1, 16, 16))
    for e in range(net.num_exits):
        assert costs[e] == count_macs(prune(net, range(e + 1)), (1, 16, 16))
    assert list(costs) == sorted(costs)

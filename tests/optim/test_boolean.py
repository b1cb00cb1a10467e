"""The Boolean optimizer against an oracle in one process, and the same bits for every sharding of the same signals."""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from mbdist.checkpoint import Checkpoint, CheckpointWriter
from mbdist.comm.codecs import CODECS
from mbdist.comm.communicator import Communicator
from mbdist.comm.flip_exchange import ReplicatedPlanes
from mbdist.comm.partition import WordPartition
from mbdist.config.checkpoint import CheckpointConfig
from mbdist.config.comm import CommConfig
from mbdist.config.optimizers import BooleanOptimizerConfig
from mbdist.errors import UserError
from mbdist.model.linear import MultiBooleanLinear
from mbdist.optim import BooleanOptimizer
from mbdist.optim.boolean import adapted
from mbdist.optim.offload import HostMemory
from mbdist_kernels import pack_signs, popcount, unpack_signs

SHAPES = {"a": (5, 33), "b": (40, 64), "tiny": (1, 3)}  # the last: fewer words than ranks
CONTRIBUTIONS = 24  # micro-batches of a step over all ranks: divisible by 1, 2, 3, 4, 6 and 8 ranks
STEPS = 6


def make_layers():
    generator = torch.Generator().manual_seed(5)
    layers = {}
    for name, (m, n) in SHAPES.items():
        layer = MultiBooleanLinear(n, m, 2, bias=False)
        for plane in layer.planes:
            plane.data = pack_signs(torch.randn(m, n, generator=generator))
        layer.scale_out.data = torch.rand(2, m, generator=generator) + torch.tensor([[1.2], [0.5]])
        layer.scale_in.data = torch.rand(2, n, generator=generator) + 0.5
        layers[name] = layer
    return layers


def inputs_of(name, step, contribution):
    """x and dY of one micro-batch: a function of the global contribution number alone."""
    m, n = SHAPES[name]
    generator = torch.Generator().manual_seed(m * 7919 + n * 104729 + step * 1009 + contribution)
    x, noise = torch.randn(6, n, generator=generator), torch.randn(6, m, generator=generator)
    drift = torch.randn(m, n, generator=torch.Generator().manual_seed(m)) / n**0.5  # what all micro-batches agree on
    return x, (x @ drift.T + noise) / 72


def store_of(optimizer):
    planes = [layer.planes for layer in optimizer.layers.values()]
    return ReplicatedPlanes(planes, optimizer.partitions, optimizer.communicator)


def run(communicator, config, codec="fp32", steps=STEPS, save=None, resume=None):
    """Planes, flips of every step, quantiles of the accumulators. ``save``: a folder, for the state after step 1, where
    the run ends. ``resume``: goes on from it."""
    layers = make_layers()
    ranks = communicator.world_size
    optimizer = BooleanOptimizer(
        layers,
        config,
        CommConfig(codec=codec, bucket_mb=1e-3),
        communicator,
        2 * steps,
        CONTRIBUTIONS // ranks,
        seed=3,
    )
    optimizer.store = store_of(optimizer)
    flips, first = [], 0
    if resume is not None:
        saved = Checkpoint(resume)
        first = saved.step
        for (name, layer), k in itertools.product(layers.items(), range(2)):
            if f"plane/{name}.plane_{k}" in saved:
                layer.planes[k].data.copy_(saved.whole(f"plane/{name}.plane_{k}", layer.planes[k]))
        for entry in optimizer.accumulated:
            entry.accumulator.fill_(9)
        optimizer.load_state(saved.state["boolean"], saved)
    for step in range(first, steps):
        if save is not None and step == 2:
            writer = CheckpointWriter(save, CheckpointConfig(), communicator, lambda *_, **__: None)
            writer.save(step, optimizer.state_pieces(), {"step": step, "boolean": optimizer.shared_state()})
            writer.wait()
            break
        for a in range(CONTRIBUTIONS // ranks):
            for name, layer in layers.items():
                x, grad_y = inputs_of(name, step, a * ranks + communicator.rank)
                layer(x).backward(grad_y)
            optimizer.finish_micro_batch()
        assert optimizer.all_finite(torch.zeros(()))
        flips.append(dict(optimizer.step().flips))
        assert optimizer.store.check_replicas(optimizer.plane_names) is None
    planes = {name: torch.stack(list(layer.planes)) for name, layer in layers.items()}
    return planes, flips, optimizer.accumulator_quantiles()


def run_in_group(config, codec, files):
    return run(Communicator(60), config, codec, **files)


def _in_another_order():
    layers = make_layers()
    optimizer = BooleanOptimizer(
        layers,
        BooleanOptimizerConfig(),
        CommConfig(codec="fp32"),
        Communicator(60),
        total_steps=4,
        micro_batches=1,
        seed=0,
    )
    for name in reversed(layers) if dist.get_rank() else layers:
        layers[name](inputs_of(name, 0, 0)[0]).sum().backward()
    with pytest.raises(UserError, match=r"order in which backward passes go .* on worker 0, but .* on worker 1"):
        optimizer.finish_micro_batch()


def test_layers_in_another_order_are_found_before_a_signal_is_sent(tmp_path):
    run_on_ranks(2, tmp_path, _in_another_order)


def _differing():
    communicator = Communicator(60)
    planes = [layer.planes for layer in make_layers().values()]
    partitions = [WordPartition(of_layer[0].numel(), communicator.world_size) for of_layer in planes]
    store = ReplicatedPlanes(planes, partitions, communicator)
    names = [f"{name}.{k}" for name in SHAPES for k in range(2)]
    same = store.check_replicas(names)
    if communicator.rank == 1:
        planes[1][1].data[0, 0] ^= 4
    return same, store.check_replicas(names)


def test_the_replica_check_names_the_first_plane_that_differs(tmp_path):
    assert run_on_ranks(2, tmp_path, _differing) == [(None, "b.1")] * 2


COMMON = {"signal": "curvature", "step_size": 4.0, "max_step": 1.0, "max_flip_rate": 0.02, "warmup_fraction": 0.0}
CURVATURE = BooleanOptimizerConfig(planes="levels", guard=0.5, decay=0.9, adapt_step_size=True, **COMMON)
RAW = BooleanOptimizerConfig(
    planes="last",
    signal="raw",
    step_size=30.0,
    adapt_step_size=False,
    max_step=1.0,
    max_flip_rate=1.0,
    warmup_fraction=0.0,
    guard=0.0,
    decay=1.0,
)
MODES = {
    "levels": CURVATURE,
    "raw": RAW,
    "all": BooleanOptimizerConfig(planes="all", adapt_step_size=False, decay=0.8, **COMMON),
    "alternating": BooleanOptimizerConfig(planes="alternating", alternate_every=2, accumulator="int4", **COMMON),
    "first by rms": BooleanOptimizerConfig(planes=[0], accumulator="fp32", **{**COMMON, "signal": "rms"}),
    "evidence": BooleanOptimizerConfig(planes="last", **{**COMMON, "signal": "evidence"}),
    "in turns": BooleanOptimizerConfig(planes="last", turns=2, **{**COMMON, "signal": "evidence"}),
}


@pytest.mark.parametrize(
    ("mode", "codec"),
    [
        *((mode, "fp32") for mode in MODES),
        *(("levels", codec) for codec in CODECS if codec != "fp32"),
        ("evidence", "sign"),
        ("evidence", "int4"),
        ("raw", "sign"),
    ],
)
def test_same_flips_for_any_number_of_ranks(tmp_path, mode, codec):
    config = MODES[mode]
    alone, flips_alone, quantiles_alone = run(Communicator(), config, codec)
    assert sum(sum(step.values()) for step in flips_alone) > 20, "the test must see flips"
    for world_size in (2, 3, 4, 6, 8) if mode == "evidence" else (2, 3, 4):
        for planes, flips, quantiles in run_on_ranks(world_size, tmp_path, run_in_group, config, codec, {}):
            assert flips == flips_alone and quantiles == quantiles_alone
            for name in SHAPES:
                assert torch.equal(planes[name], alone[name]), name


@pytest.mark.parametrize("planes", ["levels", "last", "all"])
def test_no_step_flips_more_than_the_cap(planes):
    """Also where so many stand at the highest rank that none may flip without the lottery."""
    config = BooleanOptimizerConfig(**COMMON, planes=planes, guard=0.0).model_copy(update={"step_size": 1000.0})
    _, flips, _ = run(Communicator(), config)
    for step in flips[1:]:
        for name, count in step.items():
            m, n = SHAPES[name.partition(".")[0]]
            assert count <= 0.02 * m * n
    assert sum(sum(step.values()) for step in flips) > 20


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ranks", "then"), [(1, 1), (3, 2)])
def test_a_checkpoint_restores_a_run_exactly_on_any_number_of_ranks(tmp_path, mode, ranks, then):
    expected, flips, quantiles = run(Communicator(), MODES[mode])
    for number, files in ((ranks, {"save": tmp_path / "saved"}), (then, {"resume": tmp_path / "saved/step_2"})):
        if number == 1:
            found = [run(Communicator(), MODES[mode], **files)]
        else:
            found = run_on_ranks(number, tmp_path, run_in_group, MODES[mode], "fp32", files)
    for planes, resumed_flips, resumed_quantiles in found:
        assert resumed_flips == flips[2:] and resumed_quantiles == quantiles
        for name in SHAPES:
            assert torch.equal(expected[name], planes[name])


def test_matrices_in_turns_send_and_flip_in_their_steps_alone():
    sent = {}
    for turns in (1, 2, 4):
        communicator = Communicator()
        config = CURVATURE.model_copy(update={"turns": turns})
        layers = make_layers()
        optimizer = BooleanOptimizer(layers, config, CommConfig(codec="fp32"), communicator, 16, 1, seed=3)
        optimizer.store = store_of(optimizer)
        taken = []
        send = optimizer.reduction.send

        def noted(entry, *rest, send=send, taken=taken):
            taken.append(entry)
            send(entry, *rest)

        optimizer.reduction.send = noted
        for step in range(8):
            kept = [entry.accumulator.clone() for entry in optimizer.accumulated]
            taken.clear()
            for name, layer in layers.items():
                x, grad_y = inputs_of(name, step, 0)
                layer(x).backward(grad_y)
            optimizer.finish_micro_batch()
            assert optimizer.all_finite(torch.zeros(()))
            flips = optimizer.step().flips
            sent[turns] = sent.get(turns, 0) + len(taken)
            turn = [name for number, name in enumerate(layers) if number % turns == step % turns]
            assert [entry.name for entry in taken] == ([] if step == 0 else turn)
            assert list(flips) == ([] if step == 0 else turn)
            for entry, before in zip(optimizer.accumulated, kept, strict=True):
                same = torch.equal(entry.accumulator, before)
                assert same == (step == 0 or entry.name not in turn) or entry.name == "tiny"
    assert sent[1] == 7 * len(SHAPES) and sent[2] < 0.6 * sent[1] and sent[4] < 0.3 * sent[1]


@pytest.mark.parametrize("mode", MODES)
def test_accumulators_on_the_host_change_nothing(tmp_path, monkeypatch, mode):
    """The copies as they are on a GPU, between two places of a CPU's memory."""
    expected, flips, _ = run(Communicator(), MODES[mode])
    made = []

    def host_memory(optimizer):
        made.append(HostMemory(optimizer.device))
        return made[-1]

    monkeypatch.setattr(BooleanOptimizer, "_host_memory", host_memory)
    run(Communicator(), MODES[mode], save=tmp_path / "saved")
    for files, first in (({}, 0), ({"resume": tmp_path / "saved/step_2"}, 2)):
        planes, found, _ = run(Communicator(), MODES[mode], **files)
        assert found == flips[first:]
        assert all(torch.equal(expected[name], planes[name]) for name in SHAPES)
    assert len(made) == 3 and not any(memory._fetched for memory in made), "what is fetched is used"


def test_first_curvature_step_only_measures():
    _, flips, _ = run(Communicator(), CURVATURE, steps=1)
    assert sum(flips[0].values()) == 0


def test_raw_rule_flips_what_the_paper_says():
    """One step of the raw rule without cap: exactly the bits with eta * q * B >= 1 flip, up to the rounding of 1/64."""
    config = RAW.model_copy(update={"step_size": 1.0})
    layer = MultiBooleanLinear(64, 32, 2, bias=False)
    for plane in layer.planes:
        plane.data = pack_signs(torch.randn(32, 64))
    layer.scale_out.data, layer.scale_in.data = torch.rand(2, 32) + 0.5, torch.rand(2, 64) + 0.5
    communicator = Communicator()
    optimizer = BooleanOptimizer({"l": layer}, config, CommConfig(codec="fp32"), communicator, 10, 1, seed=0)
    optimizer.store = store_of(optimizer)
    x, grad_y = torch.randn(20, 64), torch.randn(20, 32) / 5
    before = unpack_signs(layer.planes[1].data, 64)
    layer(x).backward(grad_y)
    optimizer.finish_micro_batch()
    assert optimizer.all_finite(torch.zeros(()))
    report = optimizer.step()
    flipped = unpack_signs(layer.planes[1].data, 64) != before
    gain = (grad_y.T @ x) * layer.scale_out[1][:, None] * layer.scale_in[1] * before
    assert flipped[gain > 1 + 1 / 32].all() and not flipped[gain < 1 - 1 / 32].any()
    assert report.flips["l.plane_1"] == int(flipped.sum()) > 50
    expected_beta = (1 << 15) - round(int(flipped.sum()) / (32 * 64) * (1 << 15))
    assert optimizer.accumulated[0].beta_q15 == expected_beta  # beta = 1 - share of bits just flipped


@pytest.mark.parametrize("rule", ["curvature", "evidence", "raw"])
def test_signal_is_q_in_the_unit_of_its_rule(rule):
    """G times the factors is eta q / (s^2 h), eta q / (s sqrt(h / T)) or eta q, h of the smoothed batch statistics, and
    what a step is predicted to gain takes q back from it."""
    torch.manual_seed(0)
    layer = MultiBooleanLinear(64, 32, 2, bias=False)
    for plane in layer.planes:
        plane.data = pack_signs(torch.randn(32, 64))
    layer.scale_out.data, layer.scale_in.data = torch.rand(2, 32) + 0.5, -torch.rand(2, 64) - 0.5
    config = BooleanOptimizerConfig(planes="last", signal=rule, step_size=0.25)
    optimizer = BooleanOptimizer({"l": layer}, config, CommConfig(codec="fp32"), Communicator(), 10, 1, seed=0)
    x, dy = torch.randn(50, 64), torch.randn(50, 32)
    optimizer.curvature.add(0, dy.double().square().sum(0), x.double().square().sum(0), 50)
    optimizer.curvature.absorb(50, 1.0)
    (signal,) = optimizer.signals(layer)
    row, column = signal.row_factor, signal.column_factor
    g = (dy.T @ x).double()
    s = torch.outer(layer.scale_out[1].double(), layer.scale_in[1].double())
    h = torch.outer(dy.double().square().sum(0), x.double().square().sum(0))
    cost = s**2 * h
    unit = {"curvature": cost, "evidence": (cost / 50).sqrt(), "raw": torch.ones(())}[rule]
    found = g * torch.outer(row, column).double()
    torch.testing.assert_close(found, 0.25 * g * s / unit, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found / 0.25 * optimizer.curvature.unit(cost, rule), g * s, rtol=1e-4, atol=1e-6)


def test_a_signal_that_is_not_finite_is_seen_and_changes_nothing():
    layers = make_layers()
    communicator = Communicator()
    optimizer = BooleanOptimizer(layers, RAW, CommConfig(codec="fp32"), communicator, 10, 1, seed=0)
    before = {name: layer.planes[1].data.clone() for name, layer in layers.items()}
    x, grad_y = inputs_of("b", 0, 0)
    grad_y[0, 0] = torch.inf
    layers["b"](x).backward(grad_y)
    optimizer.finish_micro_batch()
    assert not optimizer.all_finite(torch.zeros(()))
    optimizer.skip()
    assert optimizer.all_finite(torch.zeros(())), "the next step starts clean"
    assert not optimizer.all_finite(torch.tensor(torch.nan)), "a loss that is not finite counts too"
    for name, layer in layers.items():
        assert torch.equal(layer.planes[1].data, before[name])


def _one_step(codec, value):
    """(whether the step is whole, accumulators) where column 0 of rank 1's dY is this value throughout."""
    layers = make_layers()
    communicator = Communicator(60)
    optimizer = BooleanOptimizer(layers, RAW, CommConfig(codec=codec), communicator, 10, 1, seed=0)
    for name, layer in layers.items():
        x, grad_y = inputs_of(name, 0, communicator.rank)
        if communicator.rank == 1:
            grad_y[:, 0] = value
        layer(x).backward(grad_y)
    optimizer.finish_micro_batch()
    whole = optimizer.all_finite(torch.zeros(()))
    if not whole:
        optimizer.skip()
    return whole, [entry.accumulator for entry in optimizer.accumulated]


@pytest.mark.parametrize("codec", CODECS)
def test_a_row_of_one_rank_that_is_not_finite_skips_the_step_everywhere_and_counts_as_zeros(tmp_path, codec):
    expected = run_on_ranks(2, tmp_path, _one_step, codec, 0.0)
    assert all(whole and any(part.any() for part in parts) for whole, parts in expected)
    for value in (torch.nan, torch.inf, -torch.inf):
        found = run_on_ranks(2, tmp_path, _one_step, codec, value)
        for (whole, parts), (_, with_zeros) in zip(found, expected, strict=True):
            assert not whole
            assert all(torch.equal(part, same) for part, same in zip(parts, with_zeros, strict=True))


def test_state_of_another_run_is_refused(tmp_path):
    layers = make_layers()
    optimizer = BooleanOptimizer(layers, RAW, CommConfig(codec="fp32"), Communicator(), 10, 1, seed=0)
    state = optimizer.shared_state()
    state["accumulators"]["other"] = state["accumulators"].pop("a.plane_1")
    optimizer.store = store_of(optimizer)
    writer = CheckpointWriter(tmp_path, CheckpointConfig(), Communicator(), lambda *_, **__: None)
    writer.save(2, optimizer.state_pieces(), {"step": 2})
    writer.wait()
    with pytest.raises(UserError, match="other layers"):
        optimizer.load_state(state, Checkpoint(tmp_path / "step_2"))


def test_an_int4_accumulator_takes_half_a_byte_here_and_in_a_checkpoint(tmp_path):
    optimizers = {}
    for name in ("int8", "int4"):
        config = RAW.model_copy(update={"accumulator": name})
        optimizer = BooleanOptimizer(make_layers(), config, CommConfig(codec="fp32"), Communicator(), 10, 1, seed=0)
        optimizer.store = store_of(optimizer)
        optimizers[name] = optimizer
    weights = sum(32 * layer.planes[0].numel() for layer in optimizers["int8"].layers.values())
    assert optimizers["int8"].state_bytes()["accumulators"] == weights
    assert optimizers["int4"].state_bytes()["accumulators"] == weights // 2
    pieces = optimizers["int4"].state_pieces()
    assert sum(piece.values.nbytes for piece in pieces if piece.name.startswith("accumulator/")) == weights // 2
    writer = CheckpointWriter(tmp_path, CheckpointConfig(), Communicator(), lambda *_, **__: None)
    writer.save(2, optimizers["int8"].state_pieces(), {"step": 2})
    writer.wait()
    with pytest.raises(UserError, match=r"accumulators of torch.int8, and boolean.accumulator = int4"):
        optimizers["int4"].load_state(optimizers["int8"].shared_state(), Checkpoint(tmp_path / "step_2"))


def test_the_step_size_keeps_a_few_candidates_for_every_move():
    """From 100 times too large a step: the crowd of candidates thins out to what ranks can tell apart."""
    settings = {**COMMON, "step_size": 50.0, "max_step": 0.5}
    config = BooleanOptimizerConfig(planes="last", adapt_step_size=True, decay=0.9, **settings)
    torch.manual_seed(0)
    layer = make_layers()["b"]
    optimizer = BooleanOptimizer({"b": layer}, config, CommConfig(codec="fp32"), Communicator(), 1000, 1, seed=0)
    optimizer.store = store_of(optimizer)
    crowding = []
    for step in range(60):
        x, grad_y = inputs_of("b", step, 0)
        layer(x).backward(grad_y)
        optimizer.finish_micro_batch()
        assert optimizer.all_finite(torch.zeros(()))
        crowding.append(optimizer.step().candidates.get("b.plane_1", 0) / int(0.02 * layer.num_weights))
    assert max(crowding[:10]) > 6 and max(crowding[-10:]) < 5, crowding
    assert optimizer.accumulated[0].step_size < 25
    assert adapted(1.0, 3.0, 1.0) == 1.0 == adapted(0.95, 0.0, 1.0)


def flips_of_steady_and_noisy_signals(signal, steps, drift, micro_batches=1, codec="fp32", **settings):
    """Share of a plane that flipped in so many steps; the gradient's mean has the sign of the first bits, so that all
    should flip, and is so much of the noise's standard deviation a token."""
    m, n, tokens = 32, 64, 64
    layer = MultiBooleanLinear(n, m, 1, bias=False)
    layer.planes[0].data = pack_signs(torch.randn(m, n))
    before = layer.planes[0].data.clone()
    settings = {"max_flip_rate": 1.0, "warmup_fraction": 0.0, "planes": "last", "signal": signal, **settings}
    optimizer = BooleanOptimizer(
        {"layer": layer},
        BooleanOptimizerConfig(**settings),
        CommConfig(codec=codec),
        Communicator(60, alone=True),
        10**6,
        1,
        seed=0,
    )
    optimizer.store = store_of(optimizer)
    wanted = unpack_signs(before, n)
    for _ in range(steps):
        for _ in range(micro_batches):
            x = torch.randn(tokens, n)
            layer(x).backward((torch.randn(tokens, m) + drift * x @ wanted.T) / (tokens * micro_batches))
            optimizer.finish_micro_batch()
        optimizer.all_finite(torch.zeros(()))
        optimizer.step()
    return popcount(before ^ layer.planes[0].data) / (m * n)


def test_evidence_is_never_filled_up_by_noise():
    """At 5 standard errors noise flips next to nothing in any number of steps; votes without decay fill up."""
    torch.manual_seed(0)
    assert flips_of_steady_and_noisy_signals("evidence", 300, 0, step_size=0.2) < 2e-3
    assert flips_of_steady_and_noisy_signals("evidence", 300, 0, micro_batches=8, step_size=0.2) < 2e-3
    assert flips_of_steady_and_noisy_signals("evidence", 300, 0, codec="sign", step_size=0.2) < 2e-3
    assert flips_of_steady_and_noisy_signals("curvature", 120, 0, step_size=8.0) > 0.1


def test_a_steady_signal_is_found_by_evidence():
    torch.manual_seed(0)
    assert flips_of_steady_and_noisy_signals("evidence", 100, 0.2, step_size=0.2) > 0.75
    assert flips_of_steady_and_noisy_signals("evidence", 40, 0.2, micro_batches=4, step_size=0.2) > 0.75
    assert flips_of_steady_and_noisy_signals("evidence", 150, 0.2, codec="sign", step_size=0.2) > 0.75


@pytest.mark.parametrize("codec", ["fp32", "sign"])
def test_evidence_is_in_standard_deviations_of_what_the_codec_delivers(codec):
    """The steps' own noise, as it arrives at an accumulator, is one standard error."""
    torch.manual_seed(0)
    m, n, tokens = 96, 128, 64
    layer = MultiBooleanLinear(n, m, 1, bias=False)
    layer.planes[0].data = pack_signs(torch.randn(m, n))
    config = BooleanOptimizerConfig(step_size=0.2, max_step=1.0, accumulator="fp32")
    optimizer = BooleanOptimizer({"l": layer}, config, CommConfig(codec=codec), Communicator(), 10**6, 1, seed=0)
    optimizer.store = store_of(optimizer)
    for _ in range(30):
        layer(torch.randn(tokens, n)).backward(torch.randn(tokens, m) / tokens)
        optimizer.finish_micro_batch()
        optimizer.all_finite(torch.zeros(()))
        optimizer.step()
    entry = optimizer.accumulated[0]
    deviation = entry.accumulator.float().std().item() / optimizer.format.threshold
    assert deviation == pytest.approx(0.2, rel=0.12)


def test_layers_without_a_chosen_plane_only_measure_curvature():
    """A budget of bits gives matrices different numbers of planes."""
    layers = make_layers()
    layers["wide"] = MultiBooleanLinear(33, 5, 3, bias=False)
    config = BooleanOptimizerConfig(planes=[2], **COMMON)
    optimizer = BooleanOptimizer(layers, config, CommConfig(codec="fp32"), Communicator(), 4, 1, seed=0)
    assert [entry.name for entry in optimizer.accumulated] == ["wide.plane_2"]
    x, grad_y = inputs_of("a", 0, 0)
    layers["a"](x).backward(grad_y)
    optimizer.finish_micro_batch()
    assert optimizer.curvature.sums.sum() > 0
    with pytest.raises(UserError, match="no layer has such a plane"):
        BooleanOptimizer(make_layers(), config, CommConfig(codec="fp32"), Communicator(), 4, 1, seed=0)

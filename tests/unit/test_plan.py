"""`cosmos-fast plan`: its counts by hand, its search."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cosmos_fast.config import TrainConfig, load_config
from cosmos_fast.engine.estimate import estimate
from cosmos_fast.engine.plan import Forecast, Layout, assume, best_stage, forecast, stages_of
from cosmos_fast.engine.plan.forecast import transfer_ms
from cosmos_fast.engine.plan.memory import loss_bytes, memory_bytes, state_bytes
from cosmos_fast.engine.plan.traffic import (
    Transfer,
    loss_transfers,
    original_gathers,
    original_loss_bytes,
    received_bytes,
    state_transfers,
)
from cosmos_fast.model.flops import sample_flops
from cosmos_fast.recipes import get_recipe

PARAMETERS = 152_398_338  # ViT-B/16 with the COSMOS heads
GIB = 2**30


def paper(*overrides: str) -> TrainConfig:
    return load_config(get_recipe("cc12m_vit_b_16"), overrides)


def layout(ranks: int, stage: int, batch_size: int = 32, accumulate_steps: int = 1, **more) -> Layout:
    return Layout(ranks=ranks, stage=stage, batch_size=batch_size, accumulate_steps=accumulate_steps, **more)


def predicted(config: TrainConfig, chosen: Layout, **rates: float) -> Forecast:
    return forecast(config, chosen, assume("h100", "bf16", rates), gpus_per_node=8, parameters=PARAMETERS)


def purposes(transfers: list[Transfer]) -> dict[str, Transfer]:
    return {one.purpose: one for one in transfers}


def test_a_ring_by_hand() -> None:
    gathered, summed = (Transfer("x", kind, 1, 1000) for kind in ("all_gather", "all_reduce"))
    assert gathered.received_bytes(4) == 750
    assert Transfer("x", "reduce_scatter", 1, 1000).received_bytes(4) == 750
    assert summed.received_bytes(4) == 1500
    rates = assume("h100", "bf16", {"link_gb_s": 100, "network_gb_s": 10, "link_share": 0.5, "latency_us": 7})
    large = replace(gathered, full_bytes=10**9, calls=3)
    assert transfer_ms(large, 8, rates, gpus_per_node=8) == pytest.approx(3 * 3 * 0.007 + 875e6 / 50e9 * 1e3)
    assert transfer_ms(large, 16, rates, gpus_per_node=8) == pytest.approx(3 * 4 * 0.007 + 937.5e6 / 5e9 * 1e3)


def test_bytes_of_the_losses_by_hand() -> None:
    """128 ranks x 32 of ViT-B/16: 2 + 4 views of 512 fp16 numbers gathered, 2 come back in fp32."""
    chosen = layout(128, stage=0)
    found = loss_transfers(paper(), chosen)
    share, samples = 127 / 128, 4096
    by_name = purposes(found)
    assert by_name["loss: student's columns"].received_bytes(128) == 2 * 512 * 2 * samples * share
    assert by_name["loss: teacher's views"].received_bytes(128) == 4 * 512 * 2 * samples * share
    assert by_name["loss: gradient of the columns"].received_bytes(128) == 2 * 512 * 4 * samples * share
    assert original_loss_bytes(paper(), chosen) == 160 * 512 * 4 * samples * share
    assert original_loss_bytes(paper(), chosen) / received_bytes(found, 128) > 20
    assert loss_transfers(paper(), layout(1, stage=0)) == []
    assert original_gathers(paper(), layout(4, stage=0, accumulate_steps=3)) == 480  # of three losses
    assert original_gathers(load_config(get_recipe("demo_clip")), chosen) == 2


def test_micro_batches_share_a_loss_or_have_their_own() -> None:
    apart, together = (
        layout(4, stage=0, batch_size=8, accumulate_steps=3, all_negatives=value) for value in (False, True)
    )
    assert (apart.loss_batch, apart.losses, together.loss_batch, together.losses) == (32, 3, 96, 1)
    for one, other in zip(loss_transfers(paper(), apart), loss_transfers(paper(), together), strict=True):
        sums = 2 * 4 * 2 * 4 if "merging" in one.purpose else 0  # both terms' sums go along: 2 calls more, 4 ranks
        assert one.full_bytes == other.full_bytes + sums
        assert one.calls == 3 * other.calls
    assert loss_bytes(paper(), together) > 2 * loss_bytes(paper(), apart)
    one, other = predicted(paper(), apart), predicted(paper(), together)
    assert one.compute_ms["recompute"] == 0
    assert other.compute_ms["recompute"] == pytest.approx(2 / 3 * other.compute_ms["student"])
    assert other.compute_ms["loss"] == pytest.approx(3 * one.compute_ms["loss"])


def test_plain_clip_keeps_the_average_and_does_not_run_it() -> None:
    clip = load_config(get_recipe("demo_clip"))
    chosen = layout(4, stage=1)
    assert state_bytes(clip, 1000, chosen)["teacher"] == 1000 + 4000
    assert state_bytes(clip, 1000, layout(4, stage=0))["teacher"] == 4000
    assert not any("teacher" in name for name in purposes([*loss_transfers(clip, chosen)]))
    assert not any("teacher" in name for name in purposes(state_transfers(clip, 1000, chosen)))
    assert predicted(clip, chosen).compute_ms["teacher"] == 0


def test_memory_of_one_fp32_rank_is_the_estimate_of_train() -> None:
    config = paper("run.batch_size=8", "run.precision=fp32")
    needs = estimate(config, "fp32")
    found = memory_bytes(config, needs.parameters, layout(1, stage=0, batch_size=8, precision="fp32"))
    assert found["weights"] == needs.weights_bytes
    assert found["gradients"] == needs.gradients_bytes
    assert found["optimizer"] == needs.optimizer_bytes
    assert found["teacher"] == needs.teacher_bytes
    assert found["activations"] == needs.activations_bytes
    assert found["masters"] == 0


def test_all_images_of_a_step_lie_on_the_gpu() -> None:
    steps = (1, 2, 8)
    found = [memory_bytes(paper(), PARAMETERS, layout(8, 1, accumulate_steps=count)) for count in steps]
    image = 3 * (2 * 224**2 + 6 * 96**2) * 2
    assert [each["input"] for each in found] == [count * 32 * image for count in (2, 2, 8)]
    assert len({each["activations"] for each in found}) == 1


def test_stages_divide_what_they_say() -> None:
    one, ranks = 4 * PARAMETERS, 64
    found = [state_bytes(paper(), PARAMETERS, layout(ranks, stage, precision="fp32")) for stage in range(4)]
    part = 4 * -(-PARAMETERS // ranks)
    assert [each["optimizer"] for each in found] == [2 * one, 2 * part, 2 * part, 2 * part]
    assert [each["masters"] for each in found] == [0, part, part, part]
    assert [each["weights"] for each in found] == [one, one, one, one + part]  # gathered and kept
    totals = [sum(each.values()) for each in found]
    assert totals[:3] == sorted(totals[:3], reverse=True)
    large = [state_bytes(paper(), 10 * PARAMETERS, layout(ranks, stage, precision="fp32")) for stage in (2, 3)]
    assert large[1]["weights"] * ranks == pytest.approx(large[0]["weights"])
    halves = state_bytes(paper(), PARAMETERS, layout(ranks, 0, precision="bf16"))
    assert halves["weights"] == one + 2 * PARAMETERS  # autocast's copies


def test_gradients_are_added_up_once_a_step_or_once_a_micro_batch() -> None:
    sizes = [
        purposes(state_transfers(paper(), PARAMETERS, layout(8, stage, accumulate_steps=4)))["gradients"].full_bytes
        for stage in range(4)
    ]
    assert sizes == [4 * PARAMETERS, 4 * PARAMETERS, 16 * PARAMETERS, 16 * PARAMETERS]
    assert state_transfers(paper(), PARAMETERS, layout(1, stage=3)) == []


def test_deepspeeds_own_keys_count() -> None:
    chosen = layout(8, stage=1)
    plain, other = (
        purposes(state_transfers(paper(*overrides), PARAMETERS, chosen))["gradients"]
        for overrides in (
            (),
            ("deepspeed.communication_data_type=bf16", "deepspeed.zero_optimization.reduce_bucket_size=10000000"),
        )
    )
    assert (plain.calls, other.calls) == (4, 16)
    assert plain.full_bytes == 2 * other.full_bytes
    for value, calls in (("5e7", 4), ("auto", 1)):
        config = paper(f"deepspeed.zero_optimization.reduce_bucket_size={value}")
        assert purposes(state_transfers(config, PARAMETERS, chosen))["gradients"].calls == calls


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_offloaded_optimizer_lies_in_the_hosts_memory(stage: int) -> None:
    chosen, key = layout(8, stage), "deepspeed.zero_optimization.offload_optimizer.device"
    own = 4 * -(-PARAMETERS // 8) if stage else 0
    beside, moved = (state_bytes(paper(*settings), PARAMETERS, chosen) for settings in ((), (f"{key}=cpu",)))
    assert {name: beside[name] - moved[name] for name in beside} == {
        **{"weights": 0, "masters": own, "gradients": own, "optimizer": 2 * own, "teacher": own}
    }
    assert state_bytes(paper(f"{key}=none"), PARAMETERS, chosen) == beside
    assert stage == 0 or moved["masters"] == moved["optimizer"] == 0


def test_time_of_the_computing_by_hand() -> None:
    config = paper("compute.checkpoint_activations=mlp")
    chosen = layout(16, stage=1, batch_size=64)
    found = predicted(config, chosen, mfu=0.5, hbm_share=0.5)
    counted = sample_flops(config.model, config.data.views, global_batch=1024)
    per_ms = 989.4e9 * 0.5
    assert found.compute_ms["teacher"] == pytest.approx(64 * counted.teacher_forward / per_ms)
    backward = counted.student_backward + counted.student_forward / 3
    assert found.compute_ms["backward"] == pytest.approx(64 * backward / per_ms)
    assert found.compute_ms["optimizer"] == pytest.approx(1e3 * PARAMETERS / 16 * 40 / (3350e9 * 0.5))
    assert found.samples_per_s == pytest.approx(1e3 * 1024 / found.step_ms)
    assert found.mfu_pct < 50
    assert predicted(config, chosen, mfu=0.25).compute_ms["teacher"] == pytest.approx(2 * found.compute_ms["teacher"])
    short = predicted(config, chosen, global_caption_tokens=40, local_caption_tokens=20)
    assert short.flops < found.flops


def test_computing_hides_what_may_run_beside_it() -> None:
    chosen = layout(16, stage=1)
    none, half, slow = (
        predicted(paper(), chosen, overlap=value, network_gb_s=rate) for value, rate in ((0, 400), (0.5, 400), (0.5, 1))
    )
    assert none.exposed_ms == pytest.approx(sum(none.transfer_ms))
    assert none.step_ms == pytest.approx(sum(none.compute_ms.values()) + sum(none.transfer_ms))
    hideable = sum(ms for one, ms in zip(half.transfers, half.transfer_ms, strict=True) if one.beside)
    assert 0 < hideable < half.compute_ms["backward"] / 2  # so all of it is hidden
    assert half.exposed_ms == pytest.approx(sum(half.transfer_ms) - hideable)
    hidden = sum(slow.transfer_ms) - slow.exposed_ms  # as much as half of the computing holds
    teacher = next(ms for one, ms in zip(slow.transfers, slow.transfer_ms, strict=True) if one.beside == "student")
    assert hidden == pytest.approx(min(teacher, slow.compute_ms["student"] / 2) + slow.compute_ms["backward"] / 2)


def test_the_batch_is_split_until_it_fits() -> None:
    rates = assume("h100", "bf16")
    small = stages_of(paper(), 128, 4096, rates, precision="bf16", gpus_per_node=8)
    assert all((one.layout.batch_size, one.layout.accumulate_steps) == (32, 1) for one in small)
    large = stages_of(paper(), 8, 32768, rates, precision="bf16", gpus_per_node=8)
    for one in large:
        assert one.fits
        assert one.layout.global_batch == 32768
        doubled = replace(
            one.layout, batch_size=2 * one.layout.batch_size, accumulate_steps=one.layout.accumulate_steps // 2
        )
        assert not forecast(paper(), doubled, rates, 8).fits
    hopeless = stages_of(paper(), 8, 32768, replace(rates, memory_gb=4), precision="bf16", gpus_per_node=8)
    assert not any(one.fits for one in hopeless)
    assert best_stage(hopeless).total_gib == min(one.total_gib for one in hopeless)


def test_the_best_stage_is_the_lowest_of_equals() -> None:
    rates = assume("h100", "bf16")
    stages = stages_of(paper(), 128, 4096, rates, precision="bf16", gpus_per_node=8)
    assert max(one.step_ms for one in stages) < 1.5 * min(one.step_ms for one in stages)

    def slower(one: Forecast, factor: float) -> Forecast:
        return replace(one, compute_ms={"student": 100.0 * factor}, exposed_ms=0.0)

    first, second, *rest = (slower(one, factor) for one, factor in zip(stages, (1.005, 1.0, 1.2, 1.3), strict=True))
    assert best_stage([first, second, *rest]) is first
    assert best_stage([slower(first, 1.02), second, *rest]) is second
    assert best_stage([replace(first, limit_gib=0.0), second, *rest]) is second


def test_a_teacher_in_parts() -> None:
    """Gathered for each micro-batch, without the poolers; two blocks and the embeddings at a time."""
    chosen = layout(8, stage=1, accumulate_steps=3)
    config = paper("run.teacher_copy=parts")
    found = purposes(state_transfers(config, PARAMETERS, chosen))["teacher, block by block"]
    block, around_texts = 12 * 512**2 + 13 * 512, 49408 * 512 + 77 * 512 + 512 * 512 + 2 * 512
    poolers = PARAMETERS - found.full_bytes // 12
    assert 0.01 < poolers / PARAMETERS < 0.03
    assert (found.calls, found.beside) == (3 * 26, "teacher")
    whole, parts = (state_bytes(one, PARAMETERS, chosen) for one in (paper(), config))
    own = 4 * -(-PARAMETERS // 8)
    assert whole["teacher"] == own + 4 * PARAMETERS
    assert parts["teacher"] == own + 4 * (around_texts + 2 * block)
    assert state_bytes(config, PARAMETERS, layout(8, stage=0))["teacher"] == 4 * PARAMETERS

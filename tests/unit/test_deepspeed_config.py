"""The section `deepspeed`: DeepSpeed's own keys over a generated base, checked here because DeepSpeed ignores many."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos_fast.config import dump_config, load_config
from cosmos_fast.config.deepspeed import KNOWN, OWNED, deepspeed_json
from cosmos_fast.engine.build import divides_work
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.ranks import Ranks
from tests.tiny_run import make_trainer, tiny_config

STAGE = "deepspeed.zero_optimization.stage"


def test_keys_lie_over_the_generated_base(tmp_path: Path) -> None:
    offload = "deepspeed.zero_optimization.offload_optimizer"
    config = tiny_config(tmp_path, f"{STAGE}=3", f"{offload}.device=cpu", "deepspeed.comms_logger={enabled: true}")
    made = deepspeed_json(config)
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert made["zero_optimization"]["reduce_bucket_size"] == 50_000_000  # of the base, beside what was set
    assert made["comms_logger"] == {"enabled": True}
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_clipping"]) == (config.run.batch_size, 0.0)
    assert deepspeed_json(tiny_config(tmp_path))["zero_optimization"]["stage"] == 1


def test_the_section_survives_a_file(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, f"{STAGE}=2", "deepspeed.communication_data_type=bf16")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert load_config(path, [f"{STAGE}=0"]).deepspeed["zero_optimization"]["stage"] == 0
    assert config.deepspeed["zero_optimization"]["stage"] == 2  # an override leaves what it is laid over


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("deepspeed.zero_optimisation.stage=3", "'deepspeed.zero_optimisation': did you mean 'deepspeed.zero_optimiz"),
        ("deepspeed.zero_optimization.stag=3", "did you mean 'deepspeed.zero_optimization.stage'"),
        ("deepspeed.zero_optimization.offload_optimizer.devise=cpu", "offload_optimizer.device'"),
        ("deepspeed.timers.throughput.enable=true", "'deepspeed.timers.throughput.enabled'"),
        ("deepspeed.gradient_clipping=1.0", "set optimizer.clip_norm"),
        ("deepspeed.train_batch_size=64", "set run.batch_size"),
        ("deepspeed.bf16.enabled=true", "set run.precision"),
        ("deepspeed.zero_optimization=3", "is a section"),
        ("deepspeed.steps_per_print.every=3", "is a value, not a section"),
        *(
            (
                f"deepspeed.zero_optimization.{key}={value}",
                f"set it to a whole number, such as 5e7, of {least} or above",
            )
            for key, value, least in (
                ("reduce_bucket_size", "0", 1),
                ("reduce_bucket_size", "-1", 1),
                ("reduce_bucket_size", "many", 1),
                ("reduce_bucket_size", "true", 1),
                ("reduce_bucket_size", "null", 1),
                ("reduce_bucket_size", ".inf", 1),
                ("allgather_bucket_size", "5e-7", 0),
                ("stage3_max_live_parameters", "-1e9", 0),
                ("offload_optimizer.buffer_count", "1.5", 0),
            )
        ),
        ("deepspeed.steps_per_print=0", "deepspeed.steps_per_print is 0: set it to a whole number"),
        ("deepspeed.steps_per_print=x", "deepspeed.steps_per_print is 'x': set it to a whole number"),
        (f"{STAGE}=4", "use 0, 1, 2 or 3"),
        (f"{STAGE}=two", "use 0, 1, 2 or 3"),
        ("deepspeed.zero_optimization.offload_optimizer.device=nvme", "use none or cpu"),
        ("deepspeed.zero_optimization.offload_param.device=cpu", "set deepspeed.zero_optimization.offload_optimizer"),
        ("run.engine=deepseed", "run.engine"),
        ("run.teacher_copy=half", "run.teacher_copy"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        tiny_config(tmp_path, override)
    assert said in str(caught.value)


def test_numbers_in_deepspeeds_notation_are_numbers(tmp_path: Path) -> None:
    given = {"reduce_bucket_size": "5e7", "allgather_bucket_size": "2.0e+8", "sub_group_size": "auto"}
    given |= {"stage3_prefetch_bucket_size": "0", "offload_optimizer.buffer_count": "'4'"}
    config = tiny_config(tmp_path, *(f"deepspeed.zero_optimization.{key}={value}" for key, value in given.items()))
    made = deepspeed_json(config)["zero_optimization"]
    numbers = [made[key] for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")]
    assert numbers == [50_000_000, 200_000_000, 0]
    assert all(type(number) is int for number in numbers)
    assert made["offload_optimizer"]["buffer_count"] == 4
    assert made["sub_group_size"] == "auto"


def test_a_key_is_known_or_owned() -> None:
    assert not set(KNOWN) & set(OWNED)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("compute.optimizer=torch", "set compute.optimizer=fused"),
        ("compute.compile=true", "compute.compile needs weights that stay"),
        ("compute.linear=fp8", "compute.linear=fp8 needs weights that stay"),
    ],
)
def test_what_weights_that_move_leave_no_room_for(override: str, said: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, f"{STAGE}=3", override)
    with pytest.raises(UserError, match=said):
        divides_work(config, Ranks(0, 2))
    assert not divides_work(config, Ranks())
    if "optimizer" not in override:
        assert divides_work(tiny_config(tmp_path, f"{STAGE}=2", override), Ranks(0, 2))


def test_what_has_no_process_group_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set run\.engine=plain"):
        make_trainer(tiny_config(tmp_path, "run.engine=deepspeed"))


def test_who_divides_the_work(tmp_path: Path) -> None:
    two = Ranks(0, 2)
    assert [divides_work(tiny_config(tmp_path), ranks) for ranks in (Ranks(), two)] == [False, True]
    assert divides_work(tiny_config(tmp_path, "run.engine=deepspeed"), Ranks())
    assert not divides_work(tiny_config(tmp_path, "run.engine=plain"), Ranks())
    with pytest.raises(UserError, match=r"run\.engine=auto"):
        divides_work(tiny_config(tmp_path, "run.engine=plain"), two)

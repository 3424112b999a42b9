"""Keys of DeepSpeed that a run may set, and who owns the others.

The section `deepspeed` of a configuration is a tree of DeepSpeed's own keys, laid over what `deepspeed_json` generates
from the rest of the configuration. DeepSpeed ignores keys that it does not know; here they are refused.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cosmos_fast.config.checks import require
from cosmos_fast.utils.errors import UserError

if TYPE_CHECKING:
    from cosmos_fast.config.train import TrainConfig

DEFAULT_STAGE = 1

# Whole numbers of DeepSpeed's schema, with the least that each may be.
_LEAST = {
    "reduce_bucket_size": 1,
    "steps_per_print": 1,
    **dict.fromkeys(
        (
            *("allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size", "buffer_count"),
            *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
            *("stage3_max_live_parameters", "stage3_max_reuse_distance"),
        ),
        0,
    ),
}

# A dict stands for a section, None for a value.
KNOWN: dict[str, Any] = {
    "zero_optimization": {
        **dict.fromkeys(
            (
                *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size"),
                *("use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size", "overlap_comm"),
                *("round_robin_gradients", "sub_group_size", "stage3_prefetch_bucket_size"),
                *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
                *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_use_all_reduce_for_fetch_params"),
                "log_trace_cache_warnings",
            )
        ),
        "offload_optimizer": dict.fromkeys(("device", "pin_memory", "buffer_count")),
    },
    "communication_data_type": None,
    "steps_per_print": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "dump_state": None,
    "log_level": None,
    "comms_logger": dict.fromkeys(("enabled", "verbose", "prof_all", "debug", "prof_ops")),
    "flops_profiler": dict.fromkeys(
        ("enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file", "recompute_fwd_factor")
    ),
    "timers": {"throughput": dict.fromkeys(("enabled", "synchronized"))},
}

# Key of DeepSpeed -> where this program has it.
OWNED = {
    "train_batch_size": "run.batch_size (a rank) and run.accumulate_steps",
    "train_micro_batch_size_per_gpu": "run.batch_size",
    "gradient_accumulation_steps": "run.accumulate_steps",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "activation_checkpointing": "compute.checkpoint_activations",
    "tensorboard": "run.tensorboard",
    "wandb": "run.wandb",
    "checkpoint": "run.checkpoint_every_steps",
    **dict.fromkeys(("fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types"), "run.precision"),
}


def check_deepspeed(given: Mapping[str, Any]) -> None:
    """UserError for a key that is unknown or owned elsewhere, or a value that cannot work."""
    section = given.get("zero_optimization")
    require(
        not (isinstance(section, Mapping) and "offload_param" in section),
        "deepspeed.zero_optimization.offload_param is not supported, because all weights are gathered for the backward "
        "pass: set deepspeed.zero_optimization.offload_optimizer.device=cpu",
    )
    _check_keys(given, KNOWN, ())
    zero = given.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    require(
        type(stage) is int and 0 <= stage <= 3,
        f"deepspeed.zero_optimization.stage is {stage!r}: use 0, 1, 2 or 3",
    )
    device = zero.get("offload_optimizer", {}).get("device", "none")
    require(
        device in ("none", "cpu"),
        f"deepspeed.zero_optimization.offload_optimizer.device is {device!r}: use none or cpu",
    )
    _with_numbers(given, "deepspeed")


def deepspeed_json(config: TrainConfig) -> dict[str, Any]:
    """What DeepSpeed is given: generated, with the keys of the section `deepspeed` on top.

    Accumulation is 1 there because the trainer says itself which backward pass is the last of a step.
    """
    base = {
        "train_micro_batch_size_per_gpu": config.run.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": DEFAULT_STAGE,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 200_000_000,
            "memory_efficient_linear": False,
        },
    }
    return _merged(base, _with_numbers(config.deepspeed, "deepspeed"))


def zero_stage(config: TrainConfig) -> int:
    """The ZeRO stage of a run on several ranks."""
    stage: int = deepspeed_json(config)["zero_optimization"]["stage"]
    return stage


def offloads_optimizer(config: TrainConfig) -> bool:
    """Whether what the optimizer works on lies in the host's memory, from stage 1 on."""
    zero: dict[str, Any] = config.deepspeed.get("zero_optimization", {})
    return bool(zero.get("offload_optimizer", {}).get("device") == "cpu")


def _with_numbers(given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Numbers in place of such text as 5e7, which YAML takes for a string; UserError for one that cannot be meant."""
    result: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, Mapping):
            result[key] = _with_numbers(value, f"{path}.{key}")
        elif key in _LEAST and value != "auto":
            result[key] = _whole_number(f"{path}.{key}", value, _LEAST[key])
        else:
            result[key] = value
    return result


def _whole_number(name: str, value: Any, least: int) -> int:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    require(
        number.is_integer() and number >= least,
        f"{name} is {value!r}: set it to a whole number, such as 5e7, of {least} or above, or to auto",
    )
    return value if isinstance(value, int) else int(number)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def _check_keys(given: Mapping[str, Any], known: Mapping[str, Any], path: tuple[str, ...]) -> None:
    for key, value in given.items():
        name = ".".join(("deepspeed", *path, str(key)))
        if not path and key in OWNED:
            raise UserError(f"{name} is not set here: set {OWNED[key]}, from which it is generated")
        if key not in known:
            near = difflib.get_close_matches(str(key), [*known], n=1, cutoff=0.0)
            raise UserError(
                f"unknown configuration key {name!r}: did you mean {'.'.join(('deepspeed', *path, *near))!r}?"
            )
        if isinstance(known[key], dict):
            require(isinstance(value, Mapping), f"{name} is a section: set one of its keys, not {value!r}")
            _check_keys(value, known[key], (*path, str(key)))
        else:
            require(not isinstance(value, Mapping), f"{name} is a value, not a section: {value!r} does not fit")

"""A whole training run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from cosmos_fast.config.checks import (
    require,
    require_choice,
    require_multiple,
    require_not_negative,
    require_positive,
)
from cosmos_fast.config.compute import ComputeConfig
from cosmos_fast.config.data import DataConfig, SourceConfig
from cosmos_fast.config.deepspeed import check_deepspeed
from cosmos_fast.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. lr: peak learning rate. weight_decay: decoupled. clip_norm: limit of the global gradient norm, or None."""

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.5
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        require_positive("optimizer", self, "lr", "eps")
        require_not_negative("optimizer", self, "weight_decay")
        require(all(0.0 <= b < 1.0 for b in self.betas), f"optimizer.betas is {self.betas}: each lies in [0, 1)")
        if self.clip_norm is not None:
            require_positive("optimizer", self, "clip_norm")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up over warmup_steps optimizer steps, then half a cosine down to 0 at the last step."""

    warmup_steps: int = 2000

    def __post_init__(self) -> None:
        require_not_negative("schedule", self, "warmup_steps")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The teacher: teacher <- decay * teacher + (1 - decay) * student, each step; "cosine" raises decay to 1."""

    decay: float = 0.999
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        require(0.0 <= self.decay <= 1.0, f"ema.decay is {self.decay}: it lies between 0 and 1")
        require_choice("ema.schedule", self.schedule, ("constant", "cosine"))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, on what, and what is written.

    out_dir: parent of the run folder `<out_dir>/<name>`. epochs: passes over the data; max_steps, where set, replaces
    it (optimizer steps; the schedules span it). batch_size: samples a rank and micro-batch. accumulate_steps:
    micro-batches an optimizer step. negatives: what each sample is held against: "micro", the samples of its
    micro-batch; "all", those of the whole step, as if it were one batch, for a second forward pass of all micro-batches
    but one. tower_gradients: of a run over W ranks: "exact", those of one process with all samples; "original", 1/W of
    them, but all of the temperatures', as the original's gathers leave it. world_size_hint: ranks the recipe was
    published with (0: any). published_batch: samples a step that it was published with, on all ranks; another number
    is warned of (0: none is). engine: what divides the work among ranks; "auto" is DeepSpeed where there are several.
    teacher_copy: of a teacher that ZeRO has divided, what its forward pass runs on: "whole", a copy of all weights,
    gathered once a step; "parts", block by block, gathered in the pass; "auto", parts on
    CPUs with one micro-batch a step, where they were measured to be faster and smaller; else where the copy is much of
    a rank's memory.
    threads: CPU threads, None leaves torch's choice. *_every_steps: optimizer steps, 0 means never (a checkpoint is
    always written at the end). checkpoint_async: write checkpoints while training goes on; "auto" does where
    training is on GPUs. keep_checkpoints: newest ones kept; besides those, each whose step is a multiple of
    keep_every_steps (0: none), and the one with the largest keep_best, a number of the "eval" rows such as
    teacher_t2i_r1; with a minus before it, the smallest. max_nonfinite_steps: steps in a row with NaN or Inf
    before the run stops. collective_timeout_s: how long a rank waits for the others before it ends; longer than rank 0
    takes to save and evaluate. watchdog_s: seconds without a sign of life after which a rank writes down where it hangs
    and ends, so that its launcher can start it anew; twice that before the first step is done, and in evaluation and
    saving; 0 waits for ever.
    """

    out_dir: str = "runs"
    epochs: float | None = 32
    max_steps: int | None = None
    batch_size: int = 64
    accumulate_steps: int = 1
    negatives: Literal["micro", "all"] = "micro"
    tower_gradients: Literal["exact", "original"] = "exact"
    world_size_hint: int = 0
    published_batch: int = 0
    engine: Literal["auto", "plain", "deepspeed"] = "auto"
    teacher_copy: Literal["auto", "whole", "parts"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"
    threads: int | None = None
    collective_timeout_s: float = 1800.0
    watchdog_s: float = 900.0
    log_every_steps: int = 20
    checkpoint_every_steps: int = 1000
    checkpoint_async: str | bool = "auto"
    keep_checkpoints: int = 2
    keep_every_steps: int = 0
    keep_best: str | None = None
    evaluate_every_steps: int = 0
    max_nonfinite_steps: int = 10
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        positive = ("batch_size", "accumulate_steps", "log_every_steps", "keep_checkpoints", "max_nonfinite_steps")
        require_positive("run", self, *positive)
        require_positive("run", self, "collective_timeout_s")
        require_not_negative("run", self, "world_size_hint", "published_batch")
        require_not_negative("run", self, "checkpoint_every_steps", "keep_every_steps", "evaluate_every_steps")
        wanted = self.checkpoint_async
        require(wanted in ("auto", True, False), f"run.checkpoint_async is {wanted!r}: use one of auto, on, off")
        require(self.keep_best != "", "run.keep_best is empty: name a number of the eval rows, or set it to null")
        require_choice("run.negatives", self.negatives, ("micro", "all"))
        require_choice("run.tower_gradients", self.tower_gradients, ("exact", "original"))
        require_choice("run.engine", self.engine, ("auto", "plain", "deepspeed"))
        require_choice("run.teacher_copy", self.teacher_copy, ("auto", "whole", "parts"))
        require_choice("run.precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        require_not_negative("run", self, "watchdog_s")
        for name in ("epochs", "max_steps", "threads"):
            if getattr(self, name) is not None:
                require_positive("run", self, name)
        require(
            self.epochs is not None or self.max_steps is not None,
            "run.epochs and run.max_steps are both empty: set one to say when training ends",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation during training.

    data: sources for retrieval on held-out shards, None for none. benchmarks: names of published sets, as
    `cosmos-fast eval sets` lists them, and their folders. batch_size: samples a forward. precision: of the models'
    matrix products, whatever run.precision is; "auto" is bf16 on GPUs that have it. max_samples: evaluate the first so
    many only; of a published set so many that are spread over it.
    """

    data: tuple[SourceConfig, ...] | None = None
    benchmarks: dict[str, str] = field(default_factory=dict)
    batch_size: int = 64
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    max_samples: int | None = None

    def __post_init__(self) -> None:
        require_positive("evaluate", self, "batch_size")
        require_choice("evaluate.precision", self.precision, ("fp32", "bf16", "auto"))
        if self.max_samples is not None:
            require_positive("evaluate", self, "max_samples")


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What a run starts from. path: a checkpoint whose weights student and teacher begin with, anything that
    `load_checkpoint` reads; None begins with random ones, by the seed. weights: which of its models."""

    path: str | None = None
    weights: Literal["teacher", "student"] = "teacher"

    def __post_init__(self) -> None:
        require_choice("init.weights", self.weights, ("teacher", "student"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run. name: of the run folder. seed: of weights, data order and augmentation. deepspeed:
    keys of DeepSpeed's own configuration, over those that are generated; see config.deepspeed."""

    name: str
    objective: Literal["cosmos", "clip"] = "cosmos"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_deepspeed(self.deepspeed)
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", self.name) is not None,
            f"name is {self.name!r}: it names a folder, use letters, digits and . _ + = -",
        )
        require_choice("objective", self.objective, ("cosmos", "clip"))
        require(0 <= self.seed < 2**63, f"seed is {self.seed}: use 0 to 2**63 - 1")
        if self.objective == "cosmos":
            require(self.model.crossmodal, "objective 'cosmos' needs the poolers: set model.crossmodal=true")
        else:
            require(
                not self.model.crossmodal, "objective 'clip' leaves the poolers untrained: set model.crossmodal=false"
            )
        require(
            not (self.compute.cuda_graphs and self.run.accumulate_steps > 1),
            "compute.cuda_graphs replays one forward pass a step: set run.accumulate_steps=1 or "
            "compute.cuda_graphs=false",
        )
        require(
            not (self.compute.linear == "fp8" and self.run.precision == "fp16"),
            "compute.linear=fp8 goes with bf16: set run.precision=bf16 or compute.linear=plain",
        )
        if self.data.views.local_crops:
            patch_size = self.model.vision.patch_size
            local = self.data.views.local_image_size
            require_multiple("data.views.local_image_size", local, "model.vision.patch_size", patch_size)

"""`cosmos-fast launch` and examples/: what is printed is run, with stand-ins for the programs that it starts."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from cosmos_fast.cli import train
from cosmos_fast.cli.launch import read_hostfile
from cosmos_fast.cli.main import command, run
from cosmos_fast.config import TrainConfig
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.ranks import Ranks, place_of_environment

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAIN = ["--recipe", "cc12m_vit_b_16", "--set", "data.train=my shards/{00000..02175}.tar", "--set", "name=it's"]
PAPER = ["--recipe", "cc12m_vit_b_16", "--set", "data.train=shards/{00000..02175}.tar"]
STAGE_0, STAGE_3 = (["--set", f"deepspeed.zero_optimization.stage={stage}"] for stage in (0, 3))
OFFLOADED = ["--set", "deepspeed.zero_optimization.offload_optimizer.device=cpu"]
# examples/<file> is what this prints.
PRINTED = {
    "deepspeed.sh": ["deepspeed", "--hostfile", "hostfile", "--", *PAPER, "--resume"],
    "torchrun.sh": ["torchrun", "--hosts", "gpu-01,gpu-02", "--max-restarts", "3", "--", *PAPER, "--resume"],
    "slurm.sbatch": ["slurm", "--nodes", "16", "--", *PAPER],
}
# Says what it was called with, an argument to a line, and under which variables.
ECHO = """#!/bin/bash
{ printf 'program=%s\\n' "$(basename "$0")"; printf 'argument=%s\\n' "$@"; env | grep -E '^[A-Z_]+='; } > "$SEEN.$RANK"
"""
# Starts its command in turn as every task of every node, as Slurm does.
SRUN = """#!/bin/bash
[ "$1 $2" = "--cpus-per-task=6 --kill-on-bad-exit=1" ] || exit 9
shift 2
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" || exit
done
"""


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(command, ["launch", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with stand-ins for everything that launch lines start."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_ins = {**dict.fromkeys(("torchrun", "deepspeed", "python"), ECHO), "srun": SRUN}
    stand_ins["scontrol"] = '#!/bin/bash\n[ "$*" = "show hostnames gpu-[01-02]" ] && printf "gpu-01\\ngpu-02\\n"\n'
    for name, text in stand_ins.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def execute(text: str, programs: Path, **environ: str) -> list[tuple[list[str], dict[str, str]]]:
    """(arguments, environment) of every program that the text starts, in the order of ranks."""
    seen = programs.parent / "seen"
    found = {"PATH": f"{programs}:{os.environ['PATH']}", "SEEN": str(seen), **environ}
    subprocess.run(["bash", "-c", text], env=found, cwd=programs.parent, check=True)
    calls = []
    for path in sorted(programs.parent.glob("seen.*")):
        pairs = [line.partition("=")[::2] for line in path.read_text().splitlines()]
        arguments = [value for key, value in pairs if key in ("program", "argument")]
        calls.append((arguments, {key: value for key, value in pairs if key.isupper()}))
    return calls


def config_of(arguments: list[str]) -> TrainConfig:
    """What `train` makes of the arguments behind its module's name."""
    given = arguments[arguments.index("cosmos_fast.cli.train") + 1 :]
    params = train.command.make_context("train", list(given)).params
    return train.resolve_config(params["recipe"], params["config_file"], params["overrides"])


@pytest.mark.parametrize("overrides", [["--set", "name=plain"], ["--set", "run.out_dir=it's $HOME; x"]])
def test_torchrun_on_one_server(overrides: list[str], programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["torchrun", "--gpus-per-node", "4", "--", *TRAIN[:4], *overrides], capsys)
    ((arguments, _),) = execute(text, programs)
    start = ["torchrun", "--standalone", "--nproc_per_node", "4", "-m", "cosmos_fast.cli.train"]
    assert arguments == [*start, *TRAIN[:4], *overrides]
    assert config_of(arguments).data.train[0].path == "my shards/{00000..02175}.tar"


@pytest.mark.parametrize(("launcher", "option"), [("torchrun", "--nproc_per_node"), ("deepspeed", "--num_gpus")])
def test_one_server_by_name_is_where_the_line_is_run(
    launcher: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """deepspeed too stays where it is called, with a hostfile of one server."""
    (tmp_path / "hostfile").write_text("gpu-07 slots=4\n")
    text = printed([launcher, "--hostfile", str(tmp_path / "hostfile"), "--", *PAPER], capsys)
    assert text.startswith(f"# On gpu-07\n{launcher} ")
    assert f"{option} 4 " in text


def test_torchrun_on_several(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(
        ["torchrun", "--hosts", "a,b,c", "--port", "1234", "--max-restarts", "2", "--", *PAPER, "--resume"], capsys
    )
    ((arguments, _),) = execute(text, programs)
    expected = "torchrun --nnodes 3 --nproc_per_node 8 --max_restarts 2 --rdzv_backend c10d --rdzv_endpoint a:1234"
    expected += " --rdzv_id cc12m_vit_b_16 -m cosmos_fast.cli.train"
    assert arguments == [*expected.split(), *PAPER, "--resume"]
    assert text.startswith("# The same on each of the 3 servers: a b c\n")


@pytest.mark.parametrize("overrides", [["--set", "name=plain"], ["--set", 'run.out_dir=it\'s $HOME; `x` "y" \\n']])
def test_deepspeed_on_several_reads_arguments_twice(
    overrides: list[str], programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As DeepSpeed does: it gives the shell of each server what it was given, in double quotes if there is a space."""
    for data in ("shards/{00000..02175}.tar", "my shards/{0..1}.tar", "$HOME/*.tar"):
        given = ["--recipe", "cc12m_vit_b_16", "--set", f"data.train={data}", *overrides]
        ((arguments, _),) = execute(printed(["deepspeed", "--hosts", "a,b", "--", *given], capsys), programs)
        start = arguments.index("cosmos_fast.cli.train") + 1
        escaped = [word.replace('"', '\\"') for word in arguments[start:]]
        handed = [f'"{new}"' if " " in old else old for old, new in zip(arguments[start:], escaped, strict=True)]
        read = subprocess.run(["bash", "-c", f"printf '%s\\0' {' '.join(handed)}"], capture_output=True, text=True)
        assert read.stdout.split("\0")[:-1] == given


def test_torchrun_understands_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    """The parser of the installed torch takes every option that is printed."""
    from torch.distributed.run import get_args_parser

    for arguments in (["torchrun", "--", *PAPER], PRINTED["torchrun.sh"]):
        words = shlex.split(printed(arguments, capsys).replace("\\\n", ""), comments=True)
        parsed = get_args_parser().parse_args(words[1:])
        assert parsed.training_script == "cosmos_fast.cli.train"
        assert parsed.module
        assert parsed.training_script_args[:4] == PAPER


@pytest.mark.long  # importing DeepSpeed takes seconds
def test_deepspeed_understands_its_options(capsys: pytest.CaptureFixture[str], programs: Path) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    capsys.readouterr()  # what DeepSpeed says when it is imported
    text = printed(["deepspeed", "--gpus-per-node", "2", "--", *PAPER], capsys)
    parsed = runner.parse_args(shlex.split(text.replace("\\\n", ""))[1:])
    assert (parsed.num_gpus, parsed.module, parsed.no_local_rank) == (2, True, True)
    assert (parsed.user_script, parsed.user_args) == ("cosmos_fast.cli.train", PAPER)
    text = printed(["deepspeed", "--hosts", "a,b", "--", *PAPER], capsys)
    execute(text, programs)  # writes the hostfile
    assert dict(runner.fetch_hostfile(str(programs.parent / "hostfile"))) == {"a": 8, "b": 8}
    assert dict(runner.fetch_hostfile(str(EXAMPLES / "hostfile"))) == {"gpu-01": 8, "gpu-02": 8}


def test_a_slurm_job_tells_every_task_its_rank(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--nodes", "2", "--gpus-per-node", "3", "--cpus-per-rank", "6", "--time", "90"]
    text = printed(["slurm", *asked, "--", *TRAIN[:4]], capsys)
    job = {"SLURM_JOB_NODELIST": "gpu-[01-02]", "SLURM_JOB_ID": "412345"}
    job |= {"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "3", "SLURM_CPUS_PER_TASK": "6"}
    calls = execute(text, programs, **job)
    assert len(calls) == 6
    for rank, (arguments, environ) in enumerate(calls):
        assert arguments == ["python", "-m", "cosmos_fast.cli.train", *TRAIN[:4], "--resume"]
        assert place_of_environment(environ) == Ranks(rank, 6, rank % 3, 3)
        assert environ["MASTER_ADDR"] == "gpu-01"
        assert environ["MASTER_PORT"] == str(20000 + 12345)
    directives = directives_of(text)
    assert directives["nodes"] == "2"
    assert directives["ntasks-per-node"] == directives["gpus-per-node"] == "3"
    assert (directives["cpus-per-task"], directives["time"]) == ("6", "90")
    assert "partition" not in directives
    more = printed(["slurm", "--partition", "gpu", "--account", "vision", "--", *PAPER, "--resume"], capsys)
    assert directives_of(more).items() >= {"partition": "gpu", "account": "vision"}.items()
    assert more.count("--resume") == 1


def directives_of(text: str) -> dict[str, str]:
    """Of a batch script: those that Slurm reads, which stand before the first command."""
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    head = lines[1 : next(i for i, line in enumerate(lines) if line and line[0] != "#")]
    pairs = [line.removeprefix("#SBATCH --").partition("=")[::2] for line in head if line.startswith("#SBATCH --")]
    assert len(pairs) == text.count("#SBATCH"), "a directive after the first command is ignored"
    return dict(pairs)


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_is_what_the_command_prints(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES)
    text = (EXAMPLES / name).read_text()
    subprocess.run(["bash", "-n", name], check=True)
    comments = [
        line for line in text.splitlines() if line.startswith("# ") and line not in printed(PRINTED[name], capsys)
    ]
    assert comments, "an example says what it is and how it was made"
    without = [line for line in text.splitlines() if line not in comments]
    assert without == printed(PRINTED[name], capsys).splitlines()
    made = next(line for line in comments if "cosmos-fast launch" in line)
    assert shlex.split(made.partition("cosmos-fast ")[2])[: len(PRINTED[name]) + 1] == ["launch", *PRINTED[name]]


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == {*PRINTED, "hostfile"}
    assert read_hostfile(EXAMPLES / "hostfile") == (("gpu-01", "gpu-02"), 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torchrun", "--", "--recipe", "cc12"], "did you mean"),
        (["torchrun", "--"], "give one of --recipe"),
        (["torchrun", "--", *PAPER, "--set", "run.batchsize=3"], "unknown configuration key"),
        (["torchrun", "--", *PAPER, "--dry-run"], "leave out --dry-run"),
        (["torchrun", "--nodes", "2", "--", *PAPER], "have to know where to meet"),
        (["deepspeed", "--hosts", "a,b", "--nodes", "3", "--", *PAPER], "2 servers are named"),
        (["deepspeed", "--hosts", "a,a", "--", *PAPER], "names a server twice"),
        (["deepspeed", "--hosts", "a;b", "--", *PAPER], "'a;b' is no host name"),
        (["deepspeed", "--hostfile", "nowhere", "--", *PAPER], "hostfile nowhere cannot be read"),
        (["slurm", "--hosts", "a,b", "--", *PAPER], "Slurm chooses the servers"),
        (["slurm", "--time", "soon", "--", *PAPER], "--time is 'soon'"),
        (["slurm", "--", *PAPER, "--overwrite"], "leave out --overwrite"),
        (["torchrun", "--max-restarts", "2", "--", *PAPER], "only with --resume"),
        (["deepspeed", "--max-restarts", "2", "--", *PAPER, "--resume"], "is torchrun's"),
        (["torchrun", "--max-restarts", "2", "--", *PAPER, "--resume", "step_5"], "would go back to step_5"),
        (["slurm", "--", *PAPER, "--resume=step_5"], "would go back to step_5"),
        (["slurm", "--nodes", "2", "--", *PAPER[:2], "--resume"], "data.train is empty"),
        (["torchrun", "--", *PAPER, "--set", "run.device=cuda:0"], "one GPU for 8 ranks"),
        (["slurm", "--", *PAPER, "--set", "run.engine=plain"], "run.engine=plain trains on one rank"),
        (["torchrun", "--", *PAPER, *STAGE_3, "--set", "compute.cuda_graphs=true"], "and ZeRO stage 3 moves them"),
        (["torchrun", "--", *PAPER, *STAGE_0, "--set", "run.teacher_copy=parts"], "ZeRO stage 0 divides nothing"),
        (["torchrun", "--", *PAPER, *STAGE_0, *OFFLOADED], "ZeRO stage 0 offloads nothing"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, ["launch", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_run_that_nobody_starts_again_may_begin_at_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(["torchrun", "--", *PAPER, "--resume", "step_5"], capsys).endswith("--resume \\\n  step_5\n")
    assert "--max_restarts 2" in printed(["torchrun", "--max-restarts", "2", "--", *PAPER, "--resume=auto"], capsys)


def test_the_examples_of_the_help_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    lines = (command.get_command(click.Context(command), "launch").help or "").splitlines()
    examples = [line.strip() for line in lines if line.strip().startswith("cosmos-fast launch")]
    assert len(examples) == 3
    for example in examples:
        assert printed(shlex.split(example.partition(" > ")[0])[2:], capsys)


def test_an_option_that_train_has_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, ["launch", "torchrun", "--", *PAPER, "--resum"]) == 2
    assert "No such option '--resum'" in capsys.readouterr().err.replace("option:", "option")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no server"),
        ("a slots=8\nb\n", "line 2"),
        ("a slots=8\nb slots=4\n", "same number of slots"),
        ("a slots=8\na slots=8\n", "line 2"),
        ("a slots=0\n", "line 1"),
        ("a slots=99999999999999999999\n", "a server has 1024 GPUs at most"),
        ("$(x) slots=8\n", "line 1"),
    ],
)
def test_wrong_hostfiles_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(tmp_path / "hostfile")


def test_what_is_said_on_the_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, ["launch", "slurm", "--nodes", "4", "--", *PAPER]) == 0
    assert capsys.readouterr().err == "# 32 ranks, 1024 samples a step; the recipe was published with 4096\n"


@pytest.mark.parametrize(
    ("cluster", "batch", "said"),
    [
        (["torchrun", "--hosts", "a,b"], 256, "16 ranks, 4096 samples a step"),
        (["slurm", "--nodes", "16"], 64, "128 ranks, 8192 samples a step; the recipe was published with 4096"),
    ],
)
def test_the_published_batch_is_not_that_of_the_settings(
    cluster: list[str], batch: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, ["launch", *cluster, "--", *PAPER, "--set", f"run.batch_size={batch}"]) == 0
    assert capsys.readouterr().err == f"# {said}\n"

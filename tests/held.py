"""Commands in processes of their own that stop at a chosen point: a kill comes neither too early nor too late."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.lives import is_running

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}

# A file, and no -c: what worker processes start with is the main program, from its file.
SCRIPT = """
import os, time
from pathlib import Path
import {module} as module

function = module.{function}

def stop_or_run(*arguments):
    if {condition}:
        (Path({said!r}) / str(os.getpid())).touch()
        time.sleep(3600)
    return function(*arguments)

module.{function} = stop_or_run
if __name__ == "__main__":
    from cosmos_fast.cli.main import main
    main()
"""


def kill_where_held(
    folder: Path, arguments: list[str], module: str, function: str, condition: str, processes: int = 1
) -> None:
    """Run the command; kill -9 it when `processes` of its processes have stopped, and wait until they have ended too.

    A process stops for good where it calls `function` of `module` and `condition`, of `arguments`, holds. folder: for
    the files of this, empty or not there.
    """
    folder.mkdir(exist_ok=True)
    script, said = folder / "script.py", folder / "said"
    said.mkdir()
    script.write_text(SCRIPT.format(module=module, function=function, condition=condition, said=str(said)))
    process = subprocess.Popen([sys.executable, str(script), *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 600
        while len(held := [int(path.name) for path in said.iterdir()]) < processes:
            assert process.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    while any(map(is_running, held)):
        assert time.monotonic() < deadline, "workers outlive their killed parent"
        time.sleep(0.01)

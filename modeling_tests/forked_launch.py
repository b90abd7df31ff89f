# SPDX-License-Identifier: Apache-2.0
"""Launches a script several times, each time in several processes on the CPU, as `accelerate launch` does on GPUs.

    python -m modeling_tests.forked_launch SCRIPT LAUNCHES.json

LAUNCHES is a list of `{"config": PATH or null, "processes": N, "arguments": [...], "log": PATH}`, perhaps with
`"copy": [FOLDER, TO]` to do before. What costs most, the imports, is done once: the processes are forks of this one. Fails
with the first launch of which a process fails.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


def environment_of(config: str, processes: int) -> dict[str, str]:
    """What `accelerate launch --config_file CONFIG` sets in the environment of its processes."""
    words = ["--config_file", config, "--num_processes", str(processes), "script.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    arguments.num_machines = arguments.num_machines or 1
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(arguments)[1]
    return prepare_multi_gpu_env(arguments)


def allow_shards_on_cpu() -> None:
    """accelerate has FSDP and DeepSpeed on accelerators only."""

    def prepare_backend(self: PartialState, *_: Any, **__: Any) -> tuple[str, DistributedType]:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare_backend


def run(script: ModuleType, launch: dict[str, Any], rank: int, port: int) -> None:
    """In a fork: the script's `main`."""
    with open(launch["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if launch["config"] is not None:
        os.environ.update(environment_of(launch["config"], launch["processes"]))
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": launch["processes"]}
        place |= {"LOCAL_WORLD_SIZE": launch["processes"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # or it is cpu:0, onto which older transformers load no optimizer
        if any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")):
            allow_shards_on_cpu()
    sys.argv = [str(script.__file__), *launch["arguments"]]
    script.main()


def forked(script: ModuleType, launch: dict[str, Any], rank: int, port: int) -> int:
    """Starts a process; returns its id."""
    if process := os.fork():
        return process
    code = 1
    try:
        run(script, launch, rank, port)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launched(script: ModuleType, launch: dict[str, Any]) -> bool:
    """Waits for all processes of a launch; one that fails ends the others, which would wait for it."""
    if "copy" in launch:
        shutil.copytree(*launch["copy"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {forked(script, launch, rank, port) for rank in range(launch["processes"])}
    succeeded = True
    while running:
        process, status = os.wait()
        running.discard(process)
        if status:
            succeeded = False
            for other in running:
                os.kill(other, signal.SIGKILL)
    return succeeded


def main() -> None:
    path, launches = sys.argv[1:]
    specification = importlib.util.spec_from_file_location("launched_script", path)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    torch.set_num_threads(1)
    for launch in json.loads(Path(launches).read_text()):
        if not launched(script, launch):
            sys.exit(f"{launch['log']}:\n{Path(launch['log']).read_text()[-5000:]}")


if __name__ == "__main__":
    main()

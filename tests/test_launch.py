"""The launch scripts say what they would run, and quote what they pass on."""

import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
PASSED_ON = ["train", "a config.py", "--set", "data.inputs_template=it's {x}; $HOME"]


def launch(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPTS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def shown(name: str, *arguments: str) -> list[list[str]]:
    done = launch(name, *arguments, "--dry_run", "--", *PASSED_ON)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("+ ") for line in lines)
    return [shlex.split(line[2:]) for line in lines]


@pytest.mark.parametrize("name", ["launch_tpu.sh", "launch_gpu.sh"])
def test_scripts_parse_and_explain_themselves(name: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)
    told = launch(name, "--help").stdout
    assert "--dry_run" in told and "set -e" not in told
    wrong = launch(name, "--tup", "x")
    assert wrong.returncode == 2 and "unknown option --tup" in wrong.stderr
    assert launch(name, "--", "train").returncode == 2


def test_every_host_of_a_tpu_gets_the_command_as_it_was() -> None:
    *_, command = shown("launch_tpu.sh", "--tpu", "t", "--zone", "z", "--folder", "a folder")
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t"]
    assert "--worker=all" in command
    remote = command[-1].removeprefix("--command=")
    assert shlex.split(remote) == [
        *("cd", "a folder", "&&", "exec", ".venv/bin/prompt-tuning"),
        *PASSED_ON,
    ]


def test_every_host_by_ssh_gets_its_number() -> None:
    commands = shown("launch_gpu.sh", "--hosts", "a,b", "--port", "1234")
    assert [command[-2] for command in commands] == ["a", "b"]
    for index, command in enumerate(commands):
        assert shlex.split(command[-1])[4:] == [
            ".venv/bin/prompt-tuning",
            *PASSED_ON,
            *("--coordinator_address", "a:1234", "--process_count", "2"),
            *("--process_index", str(index)),
        ]


def test_slurm_gets_a_task_for_each_gpu() -> None:
    (command,) = shown(
        "launch_gpu.sh", "--slurm", "--nodes", "2", "--srun", "--partition=p --qos=q"
    )
    assert command[0] == "srun" and command[-4:] == PASSED_ON
    assert {"--ntasks-per-node=8", "--nodes=2", "--partition=p", "--qos=q"} <= set(command)

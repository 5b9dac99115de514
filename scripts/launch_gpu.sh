#!/usr/bin/env bash
# Runs one prompt-tuning command on the GPUs of several hosts, all of them as one program.
#
# Under SLURM, one process for each GPU (JAX takes addresses and numbers from SLURM):
#   scripts/launch_gpu.sh --slurm --nodes 2 --gpus 8 [--srun "--partition=a --time=4:00:00"] -- \
#     train configs/paper.py --workdir /shared/run
#
# Plain, by ssh, one process for each host and its GPUs; the first host is the coordinator:
#   scripts/launch_gpu.sh --hosts host1,host2 -- train configs/paper.py --workdir /shared/run
#
#   --slurm           start with srun, inside of an allocation (sbatch, salloc) or without one
#   --nodes N         hosts of the SLURM step (default: the allocation's)
#   --gpus N          GPUs, and so processes, of each host under SLURM (default: 8)
#   --srun OPTIONS    further options of srun, in one argument
#   --hosts A,B       hosts to reach by ssh without a password
#   --port PORT       of the coordinator, open between the hosts (default: 29400)
#   --folder FOLDER   the checkout with its .venv on the hosts (default: this one)
#   --dry_run         prints the commands, and runs none
#
# --workdir and files of your own must be on a file system that all hosts see.  When one process
# fails, all stop; the same command goes on from the last checkpoint.  More: docs/distributed.md.
set -euo pipefail

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

slurm=false nodes='' gpus=8 srun='' hosts='' port=29400 dry_run=false
folder=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
while [ $# -gt 0 ]; do
  case $1 in
    --nodes | --gpus | --srun | --hosts | --port | --folder)
      [ $# -ge 2 ] || die "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --slurm) slurm=true; shift ;;
    --dry_run) dry_run=true; shift ;;
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1; what comes behind -- is for prompt-tuning" ;;
  esac
done
[ $# -gt 0 ] || die "no command; for instance: -- train configs/paper.py --workdir /shared/run"
if $slurm && [ -n "$hosts" ]; then die "give either --slurm or --hosts"; fi
if ! $slurm && [ -z "$hosts" ]; then die "give --slurm, or --hosts A,B"; fi

show() { printf '+ %s\n' "$(printf '%q ' "$@")"; }

if $slurm; then
  read -r -a more <<<"$srun"
  command=(srun --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --kill-on-bad-exit=1)
  if [ -n "$nodes" ]; then command+=(--nodes="$nodes"); fi
  command+=(${more[@]+"${more[@]}"} --chdir="$folder" "$folder/.venv/bin/prompt-tuning" "$@")
  show "${command[@]}"
  if $dry_run; then exit 0; fi
  exec "${command[@]}"
fi

IFS=, read -r -a all <<<"$hosts"
started=()
# What runs there ends with its terminal, and the terminal with ssh.
trap 'for pid in ${started[@]+"${started[@]}"}; do kill "$pid" 2>/dev/null || true; done' EXIT
for index in "${!all[@]}"; do
  flags=(--coordinator_address "${all[0]}:$port" --process_count "${#all[@]}"
    --process_index "$index")
  if [ "${#all[@]}" -eq 1 ]; then flags=(--process_count 1); fi
  remote="cd $(printf '%q' "$folder") && exec .venv/bin/prompt-tuning $(printf '%q ' "$@" "${flags[@]}")"
  command=(ssh -tt -o BatchMode=yes "${all[$index]}" "$remote")
  show "${command[@]}"
  if $dry_run; then continue; fi
  # Nothing to read: several ssh would quarrel over the terminal.
  "${command[@]}" </dev/null &
  started+=("$!")
done
status=0
for pid in ${started[@]+"${started[@]}"}; do
  wait "$pid" || status=$?
done
exit "$status"

#!/usr/bin/env bash
# Runs one prompt-tuning command on the GPUs of several hosts, as one distributed program.
#
# With SLURM, one process per GPU (JAX reads addresses and process numbers from SLURM):
#   scripts/launch_gpu.sh --slurm --nodes 2 --gpus 8 [--srun "--partition=a --time=4:00:00"] -- \
#     train configs/paper.py --workdir /shared/run
#
# With ssh, one process per host for all of its GPUs; the first host is the coordinator:
#   scripts/launch_gpu.sh --hosts host1,host2 -- train configs/paper.py --workdir /shared/run
#
#   --slurm           start with srun, inside an allocation (sbatch, salloc) or outside
#   --nodes N         number of hosts of the SLURM step (default: the allocation's)
#   --gpus N          number of GPUs and processes per host with SLURM (default: 8)
#   --srun OPTIONS    more options for srun, as one argument
#   --hosts A,B       hosts that ssh reaches without a password
#   --port PORT       port of the coordinator, which all hosts can reach (default: 29400)
#   --folder FOLDER   path of the checkout and its .venv on the hosts (default: this one)
#   --dry_run         print the commands without running them
#
# --workdir and your data must be on a file system that all hosts share.  If one process fails, all
# stop; the same command resumes from the last checkpoint.  See docs/distributed.md.
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
    *) die "unknown option $1; put the options of prompt-tuning after --" ;;
  esac
done
[ $# -gt 0 ] || die "no command; add one, such as -- train configs/paper.py --workdir /shared/run"
if $slurm && [ -n "$hosts" ]; then die "both --slurm and --hosts are set; give one of them"; fi
if ! $slurm && [ -z "$hosts" ]; then die "neither --slurm nor --hosts is set; give one of them"; fi

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
# A remote command ends when its terminal closes, which happens when its ssh ends.
trap 'for pid in ${started[@]+"${started[@]}"}; do kill "$pid" 2>/dev/null || true; done' EXIT
for index in "${!all[@]}"; do
  flags=(--coordinator_address "${all[0]}:$port" --process_count "${#all[@]}"
    --process_index "$index")
  if [ "${#all[@]}" -eq 1 ]; then flags=(--process_count 1); fi
  remote="cd $(printf '%q' "$folder") && exec .venv/bin/prompt-tuning $(printf '%q ' "$@" "${flags[@]}")"
  command=(ssh -tt -o BatchMode=yes "${all[$index]}" "$remote")
  show "${command[@]}"
  if $dry_run; then continue; fi
  # No standard input: otherwise all ssh processes would read from this terminal.
  "${command[@]}" </dev/null &
  started+=("$!")
done
status=0
for pid in ${started[@]+"${started[@]}"}; do
  wait "$pid" || status=$?
done
exit "$status"

#!/usr/bin/env bash
# Runs one prompt-tuning command on every host of a Cloud TPU VM, all of them as one program.
#
#   scripts/launch_tpu.sh --tpu NAME --zone ZONE [options] -- train configs/paper.py --workdir ...
#
#   --tpu NAME        the TPU VM, a single host or a pod slice
#   --zone ZONE       where it is, for instance us-central1-a
#   --project NAME    the project (default: gcloud's own)
#   --folder FOLDER   the checkout on the hosts (default: prompt_tuning_jax, below the home folder)
#   --setup           first install: copies this checkout there, and makes .venv with the extra tpu
#   --dry_run         prints the commands, and runs none
#
# The hosts find each other by themselves.  --workdir and files of your own must be on a file system
# that all hosts see (Filestore by NFS, for instance).  When one host fails, all stop; the same
# command goes on from the last checkpoint.  Stop a run with Ctrl-C here, or with
# `gcloud compute tpus tpu-vm ssh NAME --worker=0 --command='pkill -TERM -f "prompt-tuning train"'`,
# which saves first.  More: docs/distributed.md.
set -euo pipefail

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

tpu='' zone='' project='' folder='prompt_tuning_jax' setup=false dry_run=false
while [ $# -gt 0 ]; do
  case $1 in
    --tpu | --zone | --project | --folder)
      [ $# -ge 2 ] || die "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --setup) setup=true; shift ;;
    --dry_run) dry_run=true; shift ;;
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1; what comes behind -- is for prompt-tuning" ;;
  esac
done
[ -n "$tpu" ] || die "--tpu NAME is missing"
[ -n "$zone" ] || die "--zone ZONE is missing"
$setup || [ $# -gt 0 ] || die "no command; for instance: -- train configs/paper.py --workdir /nfs/run"

where=(--zone "$zone")
if [ -n "$project" ]; then where+=(--project "$project"); fi

run() {
  printf '+ %s\n' "$(printf '%q ' "$@")"
  if ! $dry_run; then "$@"; fi
}

on_all() { run gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --worker=all --command="$1"; }

# Below the home folder of the hosts unless it begins with a slash.
there=$(printf '%q' "$folder")
if $setup; then
  here=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  on_all "mkdir -p $there"
  for part in pyproject.toml README.md LICENSE configs scripts prompt_tuning_jax; do
    run gcloud compute tpus tpu-vm scp "$here/$part" "$tpu:$folder/" "${where[@]}" --worker=all \
      --recurse
  done
  on_all "cd $there && bash -c 'source scripts/_setup tpu'"
fi
if [ $# -gt 0 ]; then
  on_all "cd $there && exec .venv/bin/prompt-tuning $(printf '%q ' "$@")"
fi

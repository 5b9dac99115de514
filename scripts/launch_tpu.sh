#!/usr/bin/env bash
# Runs one prompt-tuning command on all hosts of a Cloud TPU VM, as one distributed program.
#
#   scripts/launch_tpu.sh --tpu NAME --zone ZONE [options] -- train configs/paper.py --workdir ...
#
#   --tpu NAME        TPU VM: a single host or a pod slice
#   --zone ZONE       zone of the TPU VM, such as us-central1-a
#   --project NAME    Google Cloud project (default: gcloud's default project)
#   --folder FOLDER   path of the checkout on the hosts (default: prompt_tuning_jax, in the home folder)
#   --setup           first copy this checkout to the hosts and install it with the extra tpu
#   --dry_run         print the commands without running them
#
# The hosts need no addresses of each other.  --workdir and your data must be on a file system that
# all hosts share, such as Filestore over NFS.  If one host fails, all stop; the same command resumes
# from the last checkpoint.  Stop a run with Ctrl-C, or with
# `gcloud compute tpus tpu-vm ssh NAME --worker=0 --command='pkill -TERM -f "prompt-tuning train"'`,
# which saves a checkpoint first.  See docs/distributed.md.
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
    *) die "unknown option $1; put the options of prompt-tuning after --" ;;
  esac
done
[ -n "$tpu" ] || die "--tpu is missing; give the name of the TPU VM"
[ -n "$zone" ] || die "--zone is missing; give the zone of the TPU VM, such as us-central1-a"
$setup || [ $# -gt 0 ] || die "no command; add one, such as -- train configs/paper.py --workdir /nfs/run"

where=(--zone "$zone")
if [ -n "$project" ]; then where+=(--project "$project"); fi

run() {
  printf '+ %s\n' "$(printf '%q ' "$@")"
  if ! $dry_run; then "$@"; fi
}

on_all() { run gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --worker=all --command="$1"; }

# Relative to the home folder of the hosts, unless it begins with a slash.
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

#!/usr/bin/env bash
# Installs what the tests marked `slurm` need, from Debian's (or Ubuntu's) packages: only what is missing, as root.
# Starts nothing: tests/slurm/cluster.py runs its own daemons, in a temporary folder.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

missing=()
need() { command -v "$1" > /dev/null || missing+=("${@:2}"); } # need COMMAND PACKAGE...
need munged munge
need slurmctld slurmctld
need slurmd slurmd
need srun slurm-client
need slurmdbd slurmdbd slurm-wlm-mysql-plugin
need mariadbd mariadb-server
if [ ${#missing[@]} = 0 ]; then exit 0; fi

if ! command -v apt-get > /dev/null; then
    echo "install.sh: no apt-get here; install by hand: ${missing[*]}" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "install.sh: needs root for: apt-get install ${missing[*]}" >&2
    exit 1
fi
echo "installing ${missing[*]}" >&2
# The packages' own services stay off: a policy that denies every start, for the time of this installation only.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod 755 $policy
    trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { timeout 300 apt-get update && timeout 600 apt-get install -y --no-install-recommends "${missing[@]}"; } > "$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "install.sh: could not install ${missing[*]}; the tests marked slurm will be skipped" >&2
    exit 1
fi
rm -f "$log"

#!/usr/bin/env bash
# Installs Debian's SLURM for the tests of this folder, which start daemons of their own: nothing is configured, and no
# service is started or needed. Exit code 1 and a line that says why, where it cannot.
set -euo pipefail
fail() {
    echo "no SLURM here: $1" >&2
    exit 1
}
[ "$(id -u)" -eq 0 ] || fail "only root can install it, and start its daemons"
missing=()
for program in slurmctld slurmd munged sbatch; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || missing+=("$program")
done
[ ${#missing[@]} -gt 0 ] || exit 0
command -v apt-get >/dev/null || fail "${missing[*]} missing, and no apt-get to install them with"
# A machine that starts services as packages come would start these, which have no configuration.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
fi
export DEBIAN_FRONTEND=noninteractive
get() { timeout 300 apt-get -q -o DPkg::Lock::Timeout=60 -o Acquire::Retries=2 "$@"; }
log="$(mktemp)"
{ get update && get install -y --no-install-recommends slurm-wlm munge; } >"$log" 2>&1 ||
    fail "apt-get cannot install slurm-wlm and munge: $(tail -n 3 "$log" | tr '\n' ' ')"
rm -f "$log"

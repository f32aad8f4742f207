#!/usr/bin/env bash
# Run a real one-node SLURM from one directory, without systemd and without changes to /etc.
#   bash tests/slurm/scheduler.sh start DIR      munged, slurmctld, slurmd; then `export SLURM_CONF=DIR/slurm.conf`
#   bash tests/slurm/scheduler.sh stop DIR
# Needs `slurm-wlm` and `munge` of Debian or Ubuntu (apt-get install slurm-wlm munge). Runs as root or as any user. The
# daemons run as the user who starts them and listen on the loopback interface only.
set -euo pipefail

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0"; }
PATH=$PATH:/usr/sbin
case "${1:-}" in start | stop) ;; -h | --help) usage; exit 0 ;; *) usage >&2; exit 2 ;; esac
[ -n "${2:-}" ] || { usage >&2; exit 2; }
mkdir -p "$2"
dir=$(cd "$2" && pwd)

stop() { # cancel all jobs, which would survive the daemons; then end the daemons by their pid files
  local name pid
  if [ -f "$dir/slurmctld.pid" ] && kill -0 "$(cat "$dir/slurmctld.pid")" 2>/dev/null; then
    export SLURM_CONF=$dir/slurm.conf
    timeout 20 scancel --user="$(id -un)" || true
    for _ in $(seq 45); do [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break; sleep 1; done
  fi
  for name in slurmd slurmctld munged; do
    [ -f "$dir/$name.pid" ] || continue
    pid=$(cat "$dir/$name.pid")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    rm -f "$dir/$name.pid"
  done
}
[ "$1" = start ] || { stop; exit 0; }

for program in munged slurmctld slurmd; do
  command -v "$program" >/dev/null || { echo "$program is missing: apt-get install slurm-wlm munge" >&2; exit 2; }
done
stop
rm -rf "$dir/state" "$dir/spool" # do not continue the jobs of an earlier start
mkdir -p "$dir/state" "$dir/spool"
chmod go-w "$dir"

# munged needs a key that only this user can read, and its own socket.
[ -f "$dir/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
# --force allows root, and directories under a world-writable one such as /tmp.
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
  --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"

free_ports='import socket; s = [socket.socket() for _ in range(2)]; [x.bind(("127.0.0.1", 0)) for x in s]
print(*(x.getsockname()[1] for x in s))'
read -r ctld_port d_port < <(python3 -c "$free_ports")
host=$(hostname -s)
cat >"$dir/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ctld_port
SlurmdPort=$d_port
# Lifetime of the credential of a start; a requeued job waits that long (default 120 s).
AuthInfo=socket=$dir/munge.socket,cred_expire=15
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
# No cgroups and no affinity: most containers allow neither.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=30
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$dir/slurm.conf
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
for _ in $(seq 100); do
  [ "$(sinfo -h -o %t 2>/dev/null)" != idle ] || { echo "a SLURM of $(nproc) cores is up: export SLURM_CONF=$SLURM_CONF"; exit 0; }
  sleep 0.2
done
echo "the node did not come up; the ends of $dir/slurmctld.log and slurmd.log:" >&2
tail -n 5 "$dir/slurmctld.log" "$dir/slurmd.log" >&2
stop
exit 1

#!/usr/bin/env bash
# A real Slurm of one node, this machine, to try profiles/slurm on. Debian or Ubuntu, as root:
#
#     apt-get install slurm-wlm munge
#     tests/slurm/one_node.sh up      # starts munged, slurmctld and slurmd; state in /tmp/one_node
#     tests/slurm/one_node.sh down    # ends them, and nothing else
#
# It has no accounting (no slurmdbd), no cgroups (they may not be writable in a container), one
# partition, and a GPU that is only a number: jobs may request it, and find none. Jobs over their
# memory are killed. ONE_NODE changes the folder, ONE_NODE_CPUS the number of CPUs.
set -euo pipefail

folder=${ONE_NODE:-/tmp/one_node}
host=$(hostname -s)

up() {
  # The job steps of the plugin know no SLURM_CONF, so that the default place must lead to it.
  if [ -e /etc/slurm/slurm.conf ] && ! [ -L /etc/slurm/slurm.conf ]; then
    echo "error: /etc/slurm/slurm.conf is there: this machine has a Slurm of its own" >&2
    return 1
  fi
  mkdir -p "$folder"/{munge,state,spool}
  chmod 700 "$folder/munge"
  chmod 755 "$folder"
  [ -f "$folder/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom > "$folder/munge/key")
  local memory
  memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
  cat > "$folder/slurm.conf" << EOF
ClusterName=one_node
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthInfo=socket=$folder/munge/socket
AuthType=auth/munge
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
JobAcctGatherParams=OverMemoryKill,UsePss
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,batch_sched_delay=0
KillWait=3
MinJobAge=${ONE_NODE_MIN_JOB_AGE:-300}
OverTimeLimit=0
ReturnToService=2
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=${ONE_NODE_CPUS:-$(nproc)} RealMemory=$((memory - 1000)) Gres=gpu:toy:1
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOF
  echo "NodeName=$host Name=gpu Type=toy File=/dev/null" > "$folder/gres.conf"
  ln -sfn "$folder/slurm.conf" "$folder/gres.conf" /etc/slurm/
  munged --key-file "$folder/munge/key" --socket "$folder/munge/socket" \
    --pid-file "$folder/munge/pid" --log-file "$folder/munge/log" --seed-file "$folder/munge/seed" \
    --force
  slurmctld -c
  slurmd -c
  for _ in $(seq 60); do
    if sinfo --noheader --format=%t | grep --quiet idle; then
      return
    fi
    sleep 1
  done
  sinfo
  tail -n 20 "$folder"/*.log
  return 1
}

end() {
  local pid
  if [ -f "$1" ] && pid=$(cat "$1") && kill "$pid" 2> /dev/null; then
    for _ in $(seq 50); do
      kill -0 "$pid" 2> /dev/null || return 0
      sleep 0.2
    done
    kill -9 "$pid"
  fi
}

down() {
  if [ -f "$folder/slurmctld.pid" ]; then
    scancel --partition=main --quiet || true
  fi
  end "$folder/slurmd.pid"
  end "$folder/slurmctld.pid"
  end "$folder/munge/pid"
  find /etc/slurm -type l -lname "$folder/*" -delete
  rm -rf "$folder"
}

case ${1:-} in
  up | down) "$1" ;;
  *) sed -n '2,/^set/{/^#/p}' "$0" && exit 2 ;;
esac

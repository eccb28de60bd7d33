#!/usr/bin/env bash
# run.sbatch on a real Slurm: two nodes that share this machine, and a run that survives what happens to them.
#
#   bash bench/slurm.sh      as root, after `apt-get install slurmctld slurmd munge` and `bash run.sh tiny`
#
#     TINY=out/tiny          the model and the scored data
#     OUT=out/slurm          everything that is written, but for /etc/slurm/slurm.conf and a line of /etc/hosts
#
# One run is left alone; in three others a process is killed, the job is requeued, and a node dies. All must end
# with the same bits. The last part takes no Slurm: two torchruns in two network namespaces. About ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
TINY=$(realpath "${TINY:-out/tiny}") PYTHON=$PWD/.venv/bin/python
out=$(realpath -m "${OUT:-out/slurm}")
[ "$(id -u)" = 0 ] || { echo "slurm.sh: must be root, as it starts Slurm's daemons" >&2; exit 2; }
[ -d "$TINY/base/final" ] || { echo "slurm.sh: TINY=$TINY: \`bash run.sh tiny\` makes it" >&2; exit 2; }
[ ! -e "$out" ] || { echo "slurm.sh: OUT=$out: already exists; choose another" >&2; exit 2; }
mkdir -p "$out"
export OMP_NUM_THREADS=1 NPROC=1 PYTHON MODEL=$TINY/base/final DATA=$TINY/train.jsonl
FLAGS="--max_steps 60 --batch_size 64 --learning_rate 5e-4 --checkpoint_every 5 --activation_checkpointing none"

# Slurm, with two nodes by name
grep -q node0 /etc/hosts || echo "127.0.0.1 node0 node1" >> /etc/hosts
pgrep munged > /dev/null || { mkdir -p /run/munge; chown munge: /run/munge; runuser -u munge -- munged; }
cat > /etc/slurm/slurm.conf << END
ClusterName=clha
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
StateSaveLocation=$out/state
SlurmdSpoolDir=$out/spool-%n
SlurmctldPidFile=$out/slurmctld.pid
SlurmdPidFile=$out/%n.pid
SlurmctldLogFile=$out/slurmctld.log
SlurmdLogFile=$out/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=30
NodeName=node0 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17001 CPUs=$(nproc)
NodeName=node1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17002 CPUs=$(nproc)
PartitionName=main Nodes=node0,node1 Default=YES MaxTime=INFINITE State=UP
END
mkdir "$out/state"
trap 'pkill slurmd; pkill slurmctld' EXIT
slurmctld
slurmd -N node0
slurmd -N node1
sleep 5

# submit NAME: starts a run as a job, and waits for its tenth step.
submit() {
    OUT=$out/$1 TRAIN_FLAGS=$FLAGS sbatch --parsable --nodes=2 --gpus-per-node=0 --cpus-per-task=1 \
        --time=60 --output="$out/$1.log" run.sbatch > "$out/$1.job"
    until [ "$(wc -l 2> /dev/null < "$out/$1/metrics.jsonl" || echo 0)" -ge 10 ]; do sleep 0.2; done
}

# on_node1: the processes of the step on node1: torchrun, its children, and Slurm's own.
on_node1() {
    local pid
    for pid in $(pgrep -f "torch.distributed.run --nnodes"); do
        if grep -qz SLURMD_NODENAME=node1 "/proc/$pid/environ" && [ "$(ps -o comm= -p "$pid")" != srun ]; then
            echo "$pid" "$(pgrep -P "$pid")" "$(ps -o ppid= -p "$pid")"
        fi
    done
}

# same NAME WHAT: waits for the end of a run, and compares its weights.
same() {
    until [ -e "$out/$1/final" ]; do sleep 1; done
    cmp "$out/alone/final/model.safetensors" "$out/$1/final/model.safetensors"
    echo "$2: the same bits"
}

# shellcheck disable=SC2086  # the flags are meant to be split
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 clha.py --model "$MODEL" \
    --train_data "$DATA" --output_dir "$out/alone" --replicate 2 $FLAGS &> "$out/alone.log"

submit killed
kill -9 "$(pgrep -f 'clha.py --model' | tail -1)"
same killed "a process killed"

submit requeued
scontrol requeue "$(cat "$out/requeued.job")"  # Slurm starts it again two minutes later
same requeued "the job requeued"

submit node
kill -9 "$(cat "$out/node1.pid")"
# shellcheck disable=SC2046  # these are several numbers
kill -9 $(on_node1)
until squeue -h -t PD | grep -q .; do sleep 1; done  # Slurm gives the node up, and requeues the job
slurmd -N node1
same node "a node dead, and back"

for host in 0 1; do
    ip netns add clha$host
done
trap 'pkill slurmd; pkill slurmctld; ip netns del clha0; ip netns del clha1' EXIT
ip link add clha0 netns clha0 type veth peer name clha1 netns clha1
for host in 0 1; do
    ip -n clha$host addr add 10.9.0.$((host + 1))/24 dev clha$host
    ip -n clha$host link set clha$host up
    ip -n clha$host link set lo up
    # shellcheck disable=SC2086
    GLOO_SOCKET_IFNAME=clha$host ip netns exec clha$host "$PYTHON" -m torch.distributed.run --nnodes 2 \
        --nproc_per_node 1 --node_rank $host --master_addr 10.9.0.1 --master_port 29500 clha.py \
        --model "$MODEL" --train_data "$DATA" --output_dir "$out/network" --replicate 2 $FLAGS \
        &> "$out/network-$host.log" &
done
same network "two network namespaces"

#!/usr/bin/env bash
# Stage 03 on two machines with four GPUs each: two sequences at a time, each within one machine.
# Run this on both, with the same HOST (one of the two, whose port 29500 the other can reach) and a
# RUN_DIR that both see by the same path, in which stage 02 is done:
#
#     HOST=node1 RUN_DIR=/shared/runs/120b examples/several_machines/torchrun.sh
#
# More arguments are passed on, such as training.learning_rate=1e-4. If it is interrupted, the same
# command on both continues from the last whole checkpoint. Machines with several networks may need
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, the name of the interface to use.
set -euo pipefail
: "${HOST:?one of the machines, for example HOST=node1}"
: "${RUN_DIR:?a directory that all machines share, for example RUN_DIR=/shared/runs/120b}"

cd "$(dirname "$0")/../.."
source .venv/bin/activate
exec torchrun \
    --nnodes=2 --nproc_per_node=4 \
    --rdzv_id=sparselong --rdzv_backend=c10d --rdzv_endpoint="$HOST:29500" \
    03_finetune.py --config configs/gpt-oss-120b-4x3090.yaml --run-dir "$RUN_DIR" "$@"

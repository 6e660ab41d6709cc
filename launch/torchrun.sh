#!/usr/bin/env bash
# One node's part of a run on several: start it on every node, with the same arguments.
#
#   launch/torchrun.sh NODES NODE_RANK HOST[:PORT] RANKS_PER_NODE -- STAGE [--config FILE] [key=value ...]
#   launch/torchrun.sh 2 0 node-a:29500 8 -- grpo --config recipes/x.yaml     # on node-a
#   launch/torchrun.sh 2 1 node-a:29500 8 -- grpo --config recipes/x.yaml     # on the other
#
# HOST is the node with NODE_RANK 0, as all nodes reach it; PORT (29500) is free on it and open between the nodes.
# The Python is that of the active environment, or $PYTHON.
#
# The rendezvous is static, torchrun's default: ranks are numbered by NODE_RANK, so that rank 0, which writes the output
# folder, is where you put it. The alternative, c10d, numbers nodes as they arrive, and serves runs whose number of nodes
# changes, which this trainer's does not.
set -euo pipefail

usage() { sed -n '2,/^# HOST/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
(($# > 5)) && [[ $5 == -- ]] || usage
nodes=$1 node_rank=$2 address=$3 ranks=$4
shift 5
port=${address##*:}
[[ $address == *:* ]] || port=29500
[[ "$nodes $node_rank $port $ranks" =~ ^[0-9]+( [0-9]+){3}$ ]] || usage

exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node "$ranks" \
  --master-addr "${address%:*}" --master-port "$port" -m dsm_train "$@"

#!/bin/bash
# A Slurm job through `accelerate launch`, which starts the processes of each node:
#   sbatch --nodes=2 --gpus-per-node=8 deploy/slurm_accelerate.sh recipes/simplecnn.py
# `launcher submit` needs none of this, and comes back after pre-emption; see docs/slurm.md.
#SBATCH --ntasks-per-node=1
#SBATCH --time=1:00:00

# In a batch script, srun runs on the first node of the job: all meet at its address.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c 'exec accelerate launch \
  --config_file accelerate_config/nodes.yaml \
  --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$SLURM_LAUNCH_NODE_IPADDR" \
  --main_process_port "$((12000 + SLURM_JOB_ID % 20000))" \
  -m launcher "$@"' launcher "$@"

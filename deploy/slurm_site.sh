# What every batch job of this site needs; `launcher submit` puts it before the training.
# Lines that begin with #SBATCH are options of sbatch, all others are commands of the script.
# Take away one # to use a line.

##SBATCH --account=my-project
##SBATCH --partition=gpu
##SBATCH --mail-type=FAIL

#module load cuda
#source .venv/bin/activate
#export NCCL_SOCKET_IFNAME=ib0

# In a container (pyxis, for example): options of the srun that starts the training.
#srun_options=(--container-image=/images/torch.sqsh --container-mounts="$PWD:/work")

# Two servers of eight GPUs without a scheduler and without ssh. Made by:
#   cosmos-fast launch torchrun --hosts gpu-01,gpu-02 --max-restarts 3 -- --recipe cc12m_vit_b_16 --set data.train='shards/{00000..02175}.tar' --resume
# The same on each of the 2 servers: gpu-01 gpu-02
torchrun --nnodes 2 --nproc_per_node 8 --max_restarts 3 \
  --rdzv_backend c10d --rdzv_endpoint gpu-01:29500 --rdzv_id cc12m_vit_b_16 \
  -m cosmos_fast.cli.train \
  --recipe cc12m_vit_b_16 \
  --set data.train='shards/{00000..02175}.tar' \
  --resume

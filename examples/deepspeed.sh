# Two servers of eight GPUs from one of them, which reaches the other through pdsh and ssh. Made by:
#   cosmos-fast launch deepspeed --hostfile hostfile -- --recipe cc12m_vit_b_16 --set data.train='shards/{00000..02175}.tar' --resume
deepspeed --hostfile hostfile --master_addr gpu-01 --master_port 29500 --no_local_rank \
  --module cosmos_fast.cli.train \
  --recipe cc12m_vit_b_16 \
  --set data.train='"shards/{00000..02175}.tar"' \
  --resume

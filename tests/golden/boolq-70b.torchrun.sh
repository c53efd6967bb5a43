#!/bin/bash
# boolq-70b for torchrun, rendered by peftscale 0.1.0; settings ffffffffffff.
#   bash FILE, with options of `peftscale train` behind it; HEAD=HOST:PORT bash FILE on each of 2 nodes
set -euo pipefail
: "${HF_TOKEN:?set it before}"
: "${HEAD:?set it before}"
export PEFTSCALE_SECRETS=HF_TOKEN

run_file=$(mktemp -d)/boolq-70b.yaml
trap 'rm -rf "${run_file%/*}"' EXIT
cat >"$run_file" <<'END_OF_RUN_FILE'
name: boolq-70b
seed: 0
base:
  model: meta-llama/Llama-3.1-70B
  quantization: nf4
  compute_dtype: bfloat16
  sharding: auto
  checkpoint_activations: true
adapters:
  boolq:
    kind: prompt
    length: 100
    init: vocabulary
task:
  name: boolq
  max_text_tokens: 512
train:
  steps: 3000
  examples_per_step: 256
  microbatch_tokens: 16384
  optimizer: adafactor
  learning_rate: 0.3
  weight_decay: 1.0e-05
  evaluate_every: 500
  checkpoint_every: 100
cluster:
  workers: 0
  gpus_per_worker: 1
  cpus_per_worker: 8
  storage: /mnt/peftscale/runs
END_OF_RUN_FILE

timeout --foreground --signal=INT --kill-after=60 86400 torchrun --nnodes 2 --rdzv-id boolq-70b --rdzv-backend c10d --rdzv-endpoint "$HEAD" --nproc-per-node 8 --no-python peftscale train "$run_file" "$@"

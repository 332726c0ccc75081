#!/bin/sh
# Train the demo model: ./train.sh WORK_FOLDER first && ./train.sh WORK_FOLDER second && ./train.sh WORK_FOLDER judge
#
# `first` and `second` each fit a command of ten minutes; the second resumes from what the first left in the work
# folder, and in it half of the GPUs train the VAE's decoder while the others train the rest.
# GPUS: how many GPUs (default 1). LIMIT: seconds that a part may take (default 570; with one GPU, the second needs
# DECODER_MINUTES more). PYTHON: the interpreter.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$1 part=$2
model=$here/../../py/diffusionz/models/zimage-demo
python=${PYTHON:-python3} gpus=${GPUS:-1} limit=${LIMIT:-570}
start=$(date +%s)
scratch=${SCRATCH:-/tmp/zimage-demo-training}
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
mkdir -p "$work" "$scratch"

# first GPU, number of GPUs, script, its arguments
train() {
    devices=$(seq -s, "$1" $(($1 + $2 - 1))) count=$2 script=$3
    shift 3
    workers=$(($(nproc) / gpus > 2 ? $(nproc) / gpus - 2 : 1))
    set -- "$here/$script" --work "$work" --workers "$workers" "$@"
    if [ "$count" -gt 1 ]; then
        CUDA_VISIBLE_DEVICES=$devices "$python" -m torch.distributed.run --standalone --nproc-per-node "$count" "$@"
    else
        CUDA_VISIBLE_DEVICES=$devices "$python" "$@"
    fi
}

case $part in
first)
    "$python" "$here/classifier.py" --out "$work/classifier" --minutes 0.5
    train 0 "$gpus" train_vae.py --minutes 3.3
    STOP_AT=$((start + limit - 15)) train 0 "$gpus" train_flow.py --tokenizer "$model/tokenizer" --minutes 10
    ;;
second)
    half=$(((gpus + 1) / 2))
    if [ "$gpus" -gt 1 ]; then
        STOP_AT=$((start + limit - 15)) train "$half" $((gpus - half)) train_decoder.py --minutes 10 &
        train "$half" $((gpus - half)) distill.py --tokenizer "$model/tokenizer" --compile-only &
    else
        train 0 1 train_decoder.py --minutes "${DECODER_MINUTES:-8}"
        start=$(date +%s)
    fi
    STOP_AT=$((start + limit * 58 / 100)) train 0 "$half" train_flow.py --tokenizer "$model/tokenizer" --minutes 10 \
        --seed 7 --end 0.03 --pool 65536
    STOP_AT=$((start + limit - 12)) train 0 "$half" distill.py --tokenizer "$model/tokenizer" --minutes 10
    wait
    ;;
judge)
    "$python" "$here/export.py" --work "$work" --tokenizer "$model/tokenizer" "$model"
    cp -r "$work/classifier" "$model/"
    "$python" "$here/draw.py" "$model" --out "$scratch/pictures" --sheet "$scratch/all.png" --columns 20 --side 96
    "$python" "$here/draw.py" "$model" --prompts "$here/contact_sheet.json" --sheet "$scratch/contact_sheet.png"
    "$python" "$here/evaluate.py" "$scratch/pictures" --out "$scratch/evaluation.json" --wrong
    ;;
*)
    echo "usage: $0 WORK_FOLDER first|second|judge" >&2
    exit 2
    ;;
esac
echo "part $part took $(($(date +%s) - start)) s"

#!/bin/sh
# Train the forecasting demo: ./train.sh WORK first && ./train.sh WORK second && ./train.sh WORK export
#
# `first` and `second` each fit a command of ten minutes; the second goes on from what the first left in the folder WORK.
# GPUS: how many GPUs the second uses (default 1; the first uses one). WINDOWS: real series to watch, an .npz of
# `python -m tests.bench.forecast_quality export`. PYTHON: the interpreter.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$1 part=$2
python=${PYTHON:-python3}
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

case $part in
first)
    "$python" "$here/train.py" --out "$work" --name first --muon --fall 0 --minutes 9.2 \
        ${WINDOWS:+--windows "$WINDOWS"}
    ;;
second)
    "$python" -m torch.distributed.run --standalone --nproc-per-node "${GPUS:-1}" "$here/train.py" \
        --out "$work" --name second --muon --resume "$work/first.safetensors" --warm 200 --fall 0.9 --average 0.998 \
        --share 0.6 --minutes 8.75 ${WINDOWS:+--windows "$WINDOWS"}
    ;;
export)
    "$python" "$here/export.py" "$work/second.safetensors" "$here/../../py/diffusionz/models/chronos2-demo" \
        --widen 1.08 --check
    ;;
*)
    echo "usage: $0 WORK first|second|export" >&2
    exit 2
    ;;
esac

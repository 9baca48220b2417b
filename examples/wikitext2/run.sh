#!/usr/bin/env bash
# Measures the kNN-LM on WikiText-2: base, datastore, index, calibration on valid, test, and where
# search is exact an independent check.
#
#     examples/wikitext2/run.sh TEXT CHECKPOINT OUT [RECIPE]
#
# TEXT holds train.tokens, valid.tokens and test.tokens; CHECKPOINT is an LM trained on them. With
# RECIPE Flat, the default, search is exact: hours on a few cores. `auto` takes minutes.
set -euo pipefail
if (($# < 3)); then
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
fi
readonly TEXT=$1 CHECKPOINT=$2 OUT=$3 RECIPE=${4:-Flat}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here root=${here%/examples/wikitext2}
mkdir -p "$OUT"

if [[ ! -d $OUT/data ]]; then
    fairseq-preprocess --only-source --trainpref "$TEXT/train.tokens" \
        --validpref "$TEXT/valid.tokens" --testpref "$TEXT/test.tokens" \
        --destdir "$OUT/data" --workers 2
fi

evaluate() { # SPLIT FLAGS...
    local split=$1
    shift
    fairseq-eval-lm "$OUT/data" --user-dir "$root/fairseq_knnlm" --task knn_lm \
        --path "$CHECKPOINT" --gen-subset "$split" --max-tokens 2048 --tokens-per-sample 256 \
        --context-window 192 --sample-break-mode none "$@"
}

[[ -d $OUT/dstore ]] || evaluate train --save-knnlm-dstore --dstore-mmap "$OUT/dstore"
[[ -d $OUT/queries ]] ||
    evaluate test --save-knnlm-dstore --dstore-mmap "$OUT/queries" --dstore-fp32
python "$root/examples/build_index.py" --dstore "$OUT/dstore" --recipe "$RECIPE"

neighbours=(--knnlm --dstore-filename "$OUT/dstore" --k 1024)
experts=knn,cache,ngram,suffix
evaluate valid "${neighbours[@]}" --experts "$experts" --mixer none --score-table "$OUT/valid.npz"
fairseq-knnlm tune --dstore "$OUT/dstore" --score-table "$OUT/valid.npz"
evaluate test "${neighbours[@]}" --experts "$experts" --score-table "$OUT/test.npz" \
    --results-json "$OUT/test.json"
fairseq-knnlm report --dstore "$OUT/dstore" --score-table "$OUT/test.npz"
if [[ $RECIPE == Flat ]]; then
    evaluate test "${neighbours[@]}" --experts knn --mixer fixed --score-table "$OUT/knn.npz"
    python "$here/check.py" --dstore "$OUT/dstore" --queries "$OUT/queries" \
        --score-table "$OUT/knn.npz"
fi

#!/usr/bin/env bash
# What a preset knows beside plain transformers: prepares the corpora that people labelled, trains and judges everything over several seeds.
#   bash tests/benchmarks/quality.sh OUT [options of `redheart bench control`]
#
# REDHEART_DATA [default: ../shared/data beside this checkout] holds goemotions/, emobank/, ethics/ and amazon_counterfactual/. OUT gets data/ and
# control/, with the table as control/control-dev.json and .png: metrics with their spread over seeds, seconds, machine, versions.
# Prepared is as launch/recipes/local.yaml says: a fifth of ETHICS' training texts, MiniLM's layers 0, 3 and 6.
# A second call goes on where the first one stopped. --split test scores the test rows: once, when dev has chosen.
# On two cores: under twenty minutes to prepare; 2.4 passes (--steps 3000 --batch 64) 20 to 40 minutes a seed of `local`, 5 to 11 of a plain transformer
# of 0.4M. A first look: SAMPLES=30000 and --steps 340 --batch 64.
set -euo pipefail

case "${1:-}" in
  -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
out=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
corpora=${REDHEART_DATA:-$root/../shared/data}
bash "$root/launch/setup_env.sh"
export PATH="$root/red_heart_env/bin:$PATH"
sources=()
for name in goemotions emobank ethics amazon_counterfactual; do
  [ -d "$corpora/$name" ] || { echo "quality: $corpora/$name is not there: set REDHEART_DATA" >&2; exit 1; }
  sources+=(--source "$name=$corpora/$name")
done
redheart prepare --preset "$root/launch/recipes/local.yaml" "${sources[@]}" ${SAMPLES:+--samples "$SAMPLES"} --skip-invalid --set data.labeler.max_texts=0 --out "$out/data"
redheart bench control --data "$out/data" --out "$out/control" "$@"

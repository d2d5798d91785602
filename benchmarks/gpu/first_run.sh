#!/usr/bin/env bash
# A first run on a GPU that ends by itself: `bash benchmarks/gpu/first_run.sh [SECONDS] [first|second]`, 500 and `first`
# by default. `second` (180 s) goes on in the same folder: what failed, then what a profiler and a checker of memory say.
#
# Each part is a process of its own that is killed at the end of its budget and takes no other along. After every part
# $OUT holds results.tgz (each part's rows, logs), log.txt, profile.txt, verdict.md. DRY=1: tiny shapes on a CPU, kernels
# interpreted. Budgets are of 500 seconds in all (`second`: 180) and scale with SECONDS.
set -uo pipefail
cd "$(dirname "$0")/../.."
LIST=${2:-first}
refuse() { echo "$*" >&2; exit 2; }
case $LIST in first) FULL=500 ;; second) FULL=180 ;; *) refuse "expected first or second, got $LIST" ;; esac
[[ ${1:-$FULL} =~ ^[1-9][0-9]*$ ]] || refuse "SECONDS: expected a whole number, got $1"
END=${1:-$FULL} START=$SECONDS RESERVE=${RESERVE:-12} # seconds for the verdict
if [ -n "${PY:-}" ]; then :; elif [ -x .venv/bin/python ]; then PY=.venv/bin/python; else PY=python3; fi

if [ -n "${DRY:-}" ]; then
  CARD=dry CAPABILITY=90 SHARES=2
  export TRITON_INTERPRET=1
  DEVICE=(--device cpu --dtype fp32 --rounds 1 --workspace 16MiB) TINY=(--shape tiny=4,16,70) HEAD='(bnf|scores) \| full'
  CORRECT=(tests/interpreted/test_doctor.py -k right) LENGTHS=(' 16 ' ' 33 ')
else
  IFS=, read -r CARD CAPABILITY < <(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader | head -1)
  [ -n "$CARD" ] || refuse "nvidia-smi: expected the name of a GPU, got none; DRY=1 runs on a CPU"
  CARD=$(tr 'A-Z ' 'a-z-' <<<"$CARD") CAPABILITY=$(tr -d ' .' <<<"$CAPABILITY") SHARES=8
  DEVICE=(--rounds 7) TINY=() HEAD='\| 8192,'
  CORRECT=(-m gpu tests/test_gpu.py -k 'bf16 or fp32 and not tiled or skipping or memory or twice') LENGTHS=(' 4096 ' ' 16384 ')
fi
OUT=${OUT:-benchmarks/results/$CARD} WORK=$(mktemp -d)
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 KINETO_LOG_LEVEL=99 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$WORK/triton}
mkdir -p "$OUT" "$WORK"/{res,log} "$TRITON_CACHE_DIR"
[ "$LIST" = second ] && [ -f "$OUT/results.tgz" ] && tar xzf "$OUT/results.tgz" -C "$WORK"
FAILED=$(awk -F'\t' '{ last[$1] = $2 } END { for (name in last) if (last[name] != 0) print name }' "$WORK/res/parts.tsv" 2>/dev/null)

left() { echo $((END - SECONDS + START)); }
say() { echo "[$((SECONDS - START)) s] $*" | tee -a "$WORK/log/log.txt"; }
keep() { # what there is so far; safe to be killed in
  local new
  new=$(mktemp "$OUT/.new.XXXXXX") && tar czf "$new" -C "$WORK" res log 2>/dev/null && mv "$new" "$OUT/results.tgz" || rm -f "$new"
  cp "$WORK/log/log.txt" "$OUT/log.txt"
  cp "$WORK/res/profile.txt" "$OUT/profile.txt" 2>/dev/null || echo "nothing was profiled" >"$OUT/profile.txt"
  if [ -f "$WORK/verdict.md" ]; then cp "$WORK/verdict.md" "$OUT/verdict.md"
  else { echo "The run didn't come to its verdict. 'python -m benchmarks.gpu --out res --verdict' makes it from results.tgz, unpacked."; echo
         echo "Parts, exit status, seconds, budget, kernels compiled:"; echo
         sed 's/^/    /' "$WORK/res/parts.tsv" 2>/dev/null; } >"$OUT/verdict.md"; fi
}
compiled() { find "$TRITON_CACHE_DIR" -name '*.cubin' | wc -l; }

# part NAME BUDGET COMMAND…: MINUTES in the command becomes nine tenths of the budget. A name, how it ended, seconds, its
# budget and how many kernels were compiled meanwhile go into parts.tsv
part() {
  local name=$1 most=$(($2 * END / FULL)) room begin=$SECONDS before status
  shift 2
  room=$(($(left) - RESERVE))
  ((most < 1)) && most=1
  ((most > room)) && most=$room
  if ((most < 1)); then say "$name: no time is left"; printf '%s\tno time\t0\t0\t0\n' "$name" >>"$WORK/res/parts.tsv"; return; fi
  say "$name: at most $most s"
  before=$(compiled)
  timeout -k 5 "$most" "${@//MINUTES/$(awk "BEGIN { print $most * 0.9 / 60 }")}" >"$WORK/log/$name.txt" 2>&1 &
  child=$!
  wait $child
  status=$?
  say "$name: exit $status after $((SECONDS - begin)) s"
  printf '%s\t%s\t%s\t%s\t%s\n' "$name" $status $((SECONDS - begin)) "$most" $(($(compiled) - before)) >>"$WORK/res/parts.tsv"
}
# suite PART BUDGET [OPTION…]: one of `python -m benchmarks.gpu --list`
suite() { part "$1" "$2" "$PY" -m benchmarks.gpu "${DEVICE[@]}" "${AGAIN[@]}" --out "$WORK/res" --part "$1" --minutes MINUTES "${@:3}"; }
AGAIN=()
# a broken set of kernels takes the other's times not along
without() { local skip='\| torch \||compiled'; grep -q '"FAILED\|"error' "$WORK/res/tiles.jsonl" 2>/dev/null && skip="$skip|tiled"; echo "$skip"; }
correct() { part "correct-$1" 80 "$PY" -m pytest -q -p no:cacheprovider --share "$1/$SHARES" "${CORRECT[@]}"; }
# run NAME: a part of the first list; where ONLY names some, none but these
run() {
  [ -z "${ONLY+given}" ] || grep -qx -- "$1" <<<"$ONLY" || return 0
  case $1 in
    products | rows | tiles | whole) suite "$1" 75 ;;
    precompile) if [ -n "${DRY:-}" ]; then part precompile 75 env -u TRITON_INTERPRET "$PY" -m benchmarks.gpu.cache --arch "$CAPABILITY" --list
      else part precompile 75 "$PY" -m benchmarks.gpu.cache --arch "$CAPABILITY" --processes 8; fi ;;
    ceilings) suite ceilings 20 ;;
    kernels) suite kernels 70 "${TINY[@]}" --without "$(without)" ;;
    tune) suite tune 40 "${TINY[@]}" ;;
    llama) suite llama 150 "${TINY[@]}" --only "$HEAD" --without "$(without)" ;;
    profile) suite profile 35 "${TINY[@]}" --without "$(without)" ;;
    correct-*) correct "${1#correct-}" ;;
    steps) suite steps 45 --only "${LENGTHS[0]}" ;;
  esac
}
side_by_side() {
  local name pids=()
  for name; do (trap 'kill $child 2>/dev/null; exit 143' TERM; run "$name") & pids+=($!); done
  wait "${pids[@]}"
  keep
}
first_list() {
  side_by_side products rows tiles whole precompile
  for name in ceilings kernels tune llama profile; do run $name; keep; done
  side_by_side $(seq -f 'correct-%g' 0 $((SHARES - 1)))
  run steps
}

touch "$WORK/log/log.txt"
trap 'kill $(jobs -p) 2>/dev/null; keep; rm -rf "$WORK"' EXIT
trap 'exit 143' TERM INT
(while sleep 15 && kill -0 $$ && [ -d "$WORK" ]; do keep; done) >/dev/null 2>&1 & # rows of the part that runs

# environment; what lies in a cache
say "$LIST run of $END s on $CARD (sm_$CAPABILITY), results in $OUT"
{ nvidia-smi; which gcc ncu compute-sanitizer; } >"$WORK/log/environment.txt" 2>&1
"$PY" -c 'import sys, pytest, torch, triton; print(sys.version, torch.__version__, triton.__version__)' >>"$WORK/log/environment.txt" 2>&1 ||
  refuse "PY: expected a Python with pytest, torch and triton, got $PY ($(tail -1 "$WORK/log/environment.txt"))"
"$PY" -c 'import rgpb.kernels' 2>/dev/null || [ -e rgpb/kernels ] || ln -s ../kernels rgpb/kernels # in place of an install
CACHE=build/gpu-cache/sm_$CAPABILITY.tgz
[ -f "$CACHE" ] && say "cache: $(env -u TRITON_INTERPRET timeout 30 "$PY" -m benchmarks.gpu.cache --unpack "$CACHE" 2>&1 | tail -1)"

if [ "$LIST" = first ]; then
  first_list
else
  ONLY=$FAILED AGAIN=(--again)
  first_list
  AGAIN=()
  if [ -n "$(type -P ncu)" ]; then
    part ncu 50 ncu --clock-control none --set basic -k 'regex:tiles_kernel|token_loss_kernel' -c 12 "$PY" -m benchmarks.gpu --out "$WORK/ncu" --part kernels --rounds 1 --only '\| (score|weights|gradients|rows: bnf|rows)$' --minutes MINUTES
  else say "ncu: isn't here"; fi
  if [ -n "$(type -P compute-sanitizer)" ]; then
    part memcheck 50 compute-sanitizer --tool memcheck --error-exitcode 9 "$PY" -m benchmarks.gpu --out "$WORK/memcheck" --part whole --only '^doctor' --minutes MINUTES
  else say "memcheck: compute-sanitizer isn't here"; fi
  suite steps 60 --only "${LENGTHS[1]}"
fi
keep
timeout -k 5 "$(($(left) > 5 ? $(left) : 5))" "$PY" -m benchmarks.gpu --out "$WORK/res" --verdict >"$WORK/verdict.new" 2>"$WORK/log/verdict.txt" && mv "$WORK/verdict.new" "$WORK/verdict.md"
if [ -f "$WORK/verdict.md" ]; then say "end; the verdict is in $OUT/verdict.md"; else say "end; no verdict came: $OUT/verdict.md says how parts ended"; fi

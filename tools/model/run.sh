#!/bin/bash
# Checks the models in the configurations below; needs spin and gcc. A line: what must come out
# ("holds": exhaustive search, no error; "found": the model shows an error), the model, the switches.
# The largest take up to 10 minutes, and 14 GB.
#
#   run.sh [seconds for each] [only lines that match]
set -u
here=$(cd "$(dirname "$0")" && pwd)
limit=${1:-300}
only=${2:-.}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
while read -r expected model switches; do
  [[ -z $expected || $expected == \#* || ! "$expected $model $switches" =~ $only ]] && continue
  cd "$work" && rm -f pan* ./*.trail
  # shellcheck disable=SC2086
  spin -a $switches "$here/$model.pml" >log 2>&1 && gcc -O2 -DSAFETY -DCOLLAPSE -DNOCLAIM \
    -DMEMLIM=14000 -w -o pan pan.c >>log 2>&1 || { cat log; exit 1; }
  timeout "$limit" ./pan -m1000000 >pan.log 2>&1
  code=$?
  states=$(sed -n 's/ *\([0-9.e+]*\) states, stored.*/\1/p' pan.log)
  if [[ $code -eq 124 ]] || grep -q "reached -DMEMLIM\|out of memory\|max search depth too small" pan.log; then
    result="open (not all states seen)"
  elif grep -q "errors: 0" pan.log; then
    result=holds
  else
    result="found ($(sed -n 's/^pan:1: \(.*\) (at depth.*/\1/p' pan.log))"
  fi
  [[ $result == $expected* ]] || status=1
  printf '%-6s %-34s %10s states  %s %s\n' "$expected" "${result:0:60}" "${states:-?}" "$model" "$switches"
done <<'LINES'
# Without failures: nobody waits for ever, nobody reads behind an end.
holds meeting -DN=2 -DNB=2 -DE=2 -DWIRE
holds meeting -DN=3 -DNB=1 -DE=2
holds meeting -DN=2 -DNB=2 -DE=2 -DK1=BLOCKS -DWIRE
holds meeting -DN=3 -DNB=1 -DE=2 -DK1=BLOCKS
holds meeting -DN=2 -DNB=1 -DE=3 -DK1=PUSH -DWIRE
holds meeting -DN=2 -DNB=2 -DE=3 -DK1=PUSH
holds meeting -DN=3 -DNB=1 -DE=3 -DK1=PUSH
holds meeting -DN=2 -DNB=1 -DE=3 -DK1=PART -DK2=BLOCKS -DK3=PUSH -DWIRE
holds meeting -DN=2 -DNB=1 -DE=3 -DK1=BLOCKS -DK2=PUSH -DK3=BLOCKS -DWIRE
holds meeting -DN=3 -DNB=1 -DE=3 -DK1=PUSH -DK2=PART -DK3=PUSH
# Peers of any slowness.
holds meeting -DN=2 -DNB=1 -DE=2 -DTIMEOUTS -DWIRE
holds meeting -DN=2 -DNB=2 -DE=1 -DTIMEOUTS
holds meeting -DN=2 -DNB=2 -DE=2 -DTIMEOUTS
holds meeting -DN=3 -DNB=1 -DE=1 -DTIMEOUTS
holds meeting -DN=3 -DNB=1 -DE=2 -DTIMEOUTS
holds meeting -DN=2 -DNB=1 -DE=2 -DK1=BLOCKS -DTIMEOUTS -DWIRE
holds meeting -DN=2 -DNB=2 -DE=1 -DK1=BLOCKS -DTIMEOUTS
holds meeting -DN=3 -DNB=1 -DE=1 -DK1=BLOCKS -DTIMEOUTS
holds meeting -DN=2 -DNB=1 -DE=3 -DK1=PART -DK2=BLOCKS -DK3=PUSH -DTIMEOUTS
holds meeting -DN=2 -DNB=1 -DE=3 -DK1=PUSH -DTIMEOUTS
# A rank that is killed.
holds meeting -DN=2 -DNB=1 -DE=2 -DDIES
holds meeting -DN=3 -DNB=1 -DE=1 -DDIES
holds meeting -DN=2 -DNB=1 -DE=2 -DK1=BLOCKS -DDIES
holds meeting -DN=3 -DNB=1 -DE=1 -DK1=BLOCKS -DDIES
holds meeting -DN=3 -DNB=1 -DE=1 -DK1=PUSH -DDIES
# CloseBlocks alone, with several blocks of a rank; and without parts of it.
holds part_blocks -DNB=1
holds part_blocks -DONE_GIVES_UP
holds part_blocks -DTWO_GIVE_UP
found part_blocks -DONE_GIVES_UP -DCUT_BY_TOLD
found part_blocks -DTWO_GIVE_UP -DNO_TELLER
# Whether the model finds what it should.
found meeting -DN=2 -DNB=1 -DE=2 -DNO_ACK
found meeting -DN=3 -DNB=1 -DE=1 -DTIMEOUTS -DNO_TOLD
found meeting -DN=3 -DNB=1 -DE=1 -DTIMEOUTS -DABORT_FIRST
found meeting -DN=2 -DNB=1 -DE=3 -DK1=PUSH -DONE_HALF
# Packets without a meeting, among calls of all kinds.
holds packets -DN=2 -DNB=1 -DE=5
holds packets -DN=2 -DNB=1 -DE=4 -DWIRE
holds packets -DN=2 -DNB=2 -DE=3
holds packets -DN=2 -DNB=2 -DE=3 -DWIRE
holds packets -DN=3 -DNB=1 -DE=3
holds packets -DN=2 -DNB=1 -DE=4 -DTIMEOUTS -DWIRE
holds packets -DN=2 -DNB=2 -DE=3 -DKINDS=2 -DTIMEOUTS -DONE_GIVES_UP
holds packets -DN=3 -DNB=1 -DE=2 -DKINDS=2 -DTIMEOUTS -DONE_GIVES_UP -DAT_ONCE
holds packets -DN=3 -DNB=1 -DE=3 -DKINDS=1 -DTIMEOUTS -DONE_GIVES_UP -DAT_ONCE
# A rank that makes another call: all ranks end, though no wait gives up.
holds packets -DN=2 -DNB=1 -DE=3 -DOTHER=2
holds packets -DN=2 -DNB=2 -DE=1 -DOTHER=1
holds packets -DN=2 -DNB=2 -DE=3 -DKINDS=3 -DOTHER=2
holds packets -DN=2 -DNB=2 -DE=1 -DKINDS=3 -DOTHER=1 -DWIRE
holds packets -DN=3 -DNB=1 -DE=1 -DOTHER=1
holds packets -DN=3 -DNB=1 -DE=2 -DKINDS=3 -DOTHER=1
holds packets -DN=2 -DNB=1 -DE=3 -DOTHER=2 -DTIMEOUTS -DWIRE
holds packets -DN=2 -DNB=2 -DE=1 -DOTHER=1 -DTIMEOUTS
holds packets -DN=3 -DNB=1 -DE=1 -DOTHER=1 -DTIMEOUTS
# Without parts of the protocol.
found packets -DN=2 -DNB=1 -DE=3 -DNO_CALLED
found packets -DN=2 -DNB=1 -DE=1 -DOTHER=1 -DKINDS=2 -DTIMEOUTS -DNO_CALLED
found packets -DN=2 -DNB=1 -DE=2 -DONE_HALF
found packets -DN=2 -DNB=1 -DE=1 -DOTHER=1 -DKINDS=2 -DTIMEOUTS -DNO_TAG
found packets -DN=2 -DNB=2 -DE=3 -DKINDS=2 -DBESIDE
# Vectors that are their own signals, in slots that their readers empty.
holds slots -DN=2 -DNB=1 -DE=5
holds slots -DN=2 -DNB=2 -DE=4
holds slots -DN=3 -DNB=1 -DE=4
found slots -DN=2 -DNB=1 -DE=5 -DONE_HALF
found slots -DN=2 -DNB=2 -DE=4 -DSILENT
# Flights, and flights without parts of their protocol.
holds flights -DN=2 -DS=10
holds flights -DN=2 -DS=8 -DWIRE
holds flights -DN=3 -DS=7
holds flights -DN=3 -DS=3 -DWIRE
found flights -DN=2 -DS=6 -DONE_PART
found flights -DN=2 -DS=10 -DNO_SLOTS
found flights -DN=2 -DS=6 -DTHREE
LINES
exit $status

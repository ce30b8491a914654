#!/usr/bin/env bash
# dvc 3.67.1: two `dvc repro` of independent stages in one project, started one beside the other as DVC's documentation
# allows, fail if both stages read the output of one that is up to date: the second locks this output for writing
# before it finds nothing to do, while the running stage holds it for reading. --wait-for-lock does not wait for it.
# With --single-item the second does not look at the other stage and runs.
# Seen: exit code 255, "failed to reproduce 'data': '.../data.txt' is busy, it is being blocked by ...", then 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet dvc==3.67.1
export PATH="$folder/venv/bin:$PATH"
mkdir project && cd project
git init --quiet
dvc init --quiet
dvc config core.analytics false
cat >dvc.yaml <<'YAML'
stages:
  data: {cmd: echo 1 > data.txt, outs: [data.txt]}
  slow: {cmd: touch started && sleep 20 && cp data.txt slow.txt, deps: [data.txt], outs: [slow.txt]}
  quick: {cmd: cp data.txt quick.txt, deps: [data.txt], outs: [quick.txt]}
YAML
dvc repro --quiet data
dvc --wait-for-lock repro --quiet slow &
until [ -e started ]; do sleep 0.2; done
code=0
output=$(dvc --wait-for-lock repro quick 2>&1) || code=$?
printf 'exit code %s: %s\n' "$code" "$(grep -o "'data'.*busy" <<<"$output" || echo "$output")"
[ "$code" -eq 255 ] && grep --quiet 'is busy, it is being blocked by' <<<"$output" &&
    dvc --wait-for-lock repro --quiet --single-item quick && [ ! -e slow.txt ] && [ -e quick.txt ] || {
    echo 'the behaviour has changed' >&2
    exit 1
}
echo 'with --single-item: exit code 0, while the other stage was running'
wait

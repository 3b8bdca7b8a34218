#!/bin/sh
# Write requirements/*.txt anew: exact versions for every supported Python, the same in all files.
set -eu
cd "$(dirname "$0")/.."

pin() { # FILE EXTRA...
    file=$1
    shift
    .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate --custom-compile-command "make pins" \
        $(printf -- '--extra %s ' "$@") "$constraint" pyproject.toml -o "requirements/$file.txt"
}

constraint=--upgrade
pin dev operator trainer dev
constraint=--constraint=requirements/dev.txt
pin operator operator
pin trainer trainer
pin gpu trainer gpu

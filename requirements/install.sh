#!/bin/sh
# Make .venv hold everything that developing, testing and trying mcore-finetune needs, as pinned in requirements/dev.txt.
# Quick when nothing has changed. Called by the Makefile; may be called by hand, from any folder.
set -eu
cd "$(dirname "$0")/.."

say() { echo "set-up: $*"; }

find_python() { # the newest Python that Megatron-core has wheels for, else a newer one, which must compile it; one that can make a .venv before one that cannot
    for modules in 'venv, ensurepip' sys; do
        for name in python3.13 python3.12 python3.11 python3 python3.14; do
            if "$name" -c "import sys, $modules; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then
                command -v "$name"
                return
            fi
        done
    done
}

missing_packages() { # names of the Debian packages that are needed and not there
    debian=${python##*/} # python3, or python3.12: the packages of each are named after it
    debian=${debian:-python3}
    if [ -z "$python" ] || ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then echo "$debian-venv"; fi
    if ! command -v git >/dev/null; then echo git; fi
    if ! command -v make >/dev/null; then echo make; fi
    if ! [ -e /etc/ssl/certs/ca-certificates.crt ]; then echo ca-certificates; fi
    if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 14))'; then
        if ! command -v g++ >/dev/null; then echo g++; fi
        if ! "$python" -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then echo "$debian-dev"; fi
    fi
}

stamp_of() { cat requirements/*.txt requirements/install.sh pyproject.toml | sha256sum | cut -d ' ' -f 1; }

wanted=$(stamp_of)
if [ "$(cat .venv/.installed 2>/dev/null || true)" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null; then exit 0; fi

python=$(find_python)
missing=$(missing_packages | tr '\n' ' ')
if [ -n "$missing" ]; then
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        say "this machine lacks system packages; install them and call make again:" >&2
        echo "    sudo apt-get update && sudo apt-get install -y $missing" >&2
        exit 1
    fi
    say "installing system packages: $missing"
    apt-get update -qq
    # shellcheck disable=SC2086 # one word per package
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
    python=$(find_python)
fi
if [ -z "$python" ]; then
    say "no Python 3.11 or newer was found" >&2
    exit 1
fi

if ! .venv/bin/python -c '' 2>/dev/null; then
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
uv=$(grep '^uv==' requirements/dev.txt)
if [ "$(.venv/bin/uv --version 2>/dev/null | cut -d ' ' -f 2)" != "${uv#uv==}" ]; then
    say "installing $uv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$uv"
fi
say "installing requirements/dev.txt into .venv (torch is large: the first time takes minutes)"
.venv/bin/uv pip install --quiet --python .venv/bin/python -r requirements/dev.txt
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps -e .
echo "$wanted" >.venv/.installed
say "done"

# Sourced by the other scripts: make .venv beside them and install droppex there, when that is needed.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

fail() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

# Print the first Python of at least 3.11 on the path; PYTHON chooses another.
find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "droppex needs Python 3.11 or later; $(python3 --version 2>&1 || echo 'there is no python3') is what is here"
}

# make_environment [EXTRA]: install droppex, with the extra, unless exactly this is installed.
make_environment() {
    local extra=${1:-} python stamp wanted
    stamp=$venv/.droppex-installed$extra
    wanted=$(cat "$root/setup.cfg" "$root/pyproject.toml" && printf '%s\n' "$root" "$extra")
    if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        python=$(find_python)
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "Python cannot make virtual environments here; on Debian and Ubuntu: apt-get install python3-venv"
        "$python" -m venv --clear "$venv" || fail "cannot make $venv"
    fi
    echo "Installing droppex into $venv ..."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
        --editable "$root${extra:+[$extra]}" </dev/null || fail "the installation failed"
    printf '%s\n' "$wanted" >"$stamp"
}

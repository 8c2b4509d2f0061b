# Sourced by the other scripts: finds a Python, makes .venv and installs into it, once.

venv=$root/.venv
python=$venv/bin/python

say() {
    printf '\n== %s\n' "$*" >&2
}

find_python() {
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3.14 python3; do
        if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "found no Python 3.11 or newer with venv; name one with PYTHON=…" >&2
    return 1
}

# set_up WHAT [ENOUGH]: installs cythera for WHAT (serve, or the name of an extra), unless that or
# ENOUGH was installed before from the same pyproject.toml and constraints.txt.
set_up() {
    wanted="$root $(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
    if ! "$python" -c '' 2>/dev/null; then
        base=$(find_python)
        say "making .venv with $base"
        "$base" -m venv --clear "$venv"
    fi
    for stamp in "$@"; do
        if [ "$wanted" = "$(cat "$venv/.installed-$stamp" 2>/dev/null || true)" ]; then
            return
        fi
    done
    case $1 in
        serve) extras= ;;
        *) extras="[$1]" ;;
    esac
    say "installing cythera$extras into .venv: some minutes the first time, mostly torch"
    "$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root$extras"
    printf '%s' "$wanted" >"$venv/.installed-$1"
}

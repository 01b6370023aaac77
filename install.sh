#!/usr/bin/env bash
# Install everything into .venv. There are no prompts, and it is safe to run again at any time.
#
# The exact versions in requirements/requirements.lock are installed, and this package in editable
# mode. Only the torch build differs between machines; this script selects it:
#   no nvidia-smi                     the CPU build if pip's configured find-links offer one for
#                                     this Python; otherwise the default build, which is larger
#   driver 580 or newer (CUDA 13)     the default build, for CUDA 13.0
#   driver 530.30 to 579 (CUDA 12.1+) the CUDA 12.6 build, from PyTorch's own index
#   older drivers                     refused
# torch 2.13.0 has builds for CUDA 12.6, 13.0 and 13.2; CUDA 12.6 runs on any CUDA 12 driver.
#
# uv installs the packages, because they need overrides, which pip does not support. The uv version
# pinned below is installed into .uv and uses pip's index-url, find-links and cert settings.
#
# A run with nothing to do takes a second: .venv/.sparselong-installed, written last, holds a hash
# of everything that determines the result. An interrupted run leaves no such file, and the next run
# rebuilds .venv, because a partly installed package may look complete; downloads come from uv's
# cache. .venv is also rebuilt if the Python version, the torch build or the folder has changed
# (.venv/.sparselong-plan records them); otherwise it is updated in place.
#
# Left out: Python itself, CUDA, drivers, and model weights. The scripts download or ask for them.
set -euo pipefail

readonly UV_VERSION=0.13.8
readonly FLASH_ATTN=(flash-attn==2.8.3.post2 ring-flash-attn==0.1.8)
# flash-attn is compiled against the installed torch; without ninja this takes hours.
readonly FLASH_ATTN_BUILD=(ninja==1.13.2 wheel==0.48.0)
# flash-attn-4 compiles its kernels at run time. Its other requirements come with torch or the lock.
readonly FLASH_ATTN_4=(
    flash-attn-4==4.0.0b36 quack-kernels==0.6.5 apache-tvm-ffi==0.1.15.post2
    torch-c-dlpack-ext==0.1.5 nvidia-cutlass-dsl==4.8.1
    nvidia-cutlass-dsl-libs-{base,core,cu13}==4.8.1
)

usage() {
    cat <<'USAGE'
Usage: [PYTHON=/path/to/python] ./install.sh [OPTION]...

  --with-flash-attn    also compile flash-attn and ring-flash-attn (needs an NVIDIA GPU and nvcc)
  --with-flash-attn-4  also install flash-attn-4 (needs an H100 or H200 and driver 580 or newer)
  --dry-run            print what would be installed; install nothing
  --help               print this help

PYTHON selects the interpreter, 3.11 or 3.12. By default, the first of python3.11, python3.12 and
python3 that runs is used.
USAGE
}

# fail WHAT EXPECTED FOUND FIX: print the four lines of this project's expected failures, and exit.
fail() {
    printf 'error: %s\n  expected: %s\n  found: %s\n  fix: %s\n' "$@" >&2
    exit 1
}

say() { printf '%s\n' "$*" >&2; }

# version_at_least VERSION MINIMUM: true if VERSION is not older, compared number by number.
version_at_least() {
    [[ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" == "$2" ]]
}

# Print the torch build for an NVIDIA driver version; false if the driver is too old for any.
torch_build_for_driver() {
    if version_at_least "$1" 580; then
        echo cu130
    elif version_at_least "$1" 530.30; then
        echo cu126
    else
        return 1
    fi
}

# Print MAJOR.MINOR of an interpreter; false if it does not run (such as a leftover pyenv shim).
python_version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# Print the configured value of a pip setting on one line, empty if there is none. The environment
# overrides pip's [install] section, which overrides [global], as in pip itself.
pip_setting() {
    local section value
    for section in ':env:' install global; do
        value=$(sed -n "s/^$section\.$1='\(.*\)'\$/\1/p" <<<"$pip_config" | head -n 1)
        if [[ -n "$value" ]]; then
            printf '%s' "${value//\\n/ }"
            return
        fi
    done
}

# True if one of pip's find-links (folders or pages) holds torch's CPU build for this Python.
cpu_torch_offered() { # PYTHON_VERSION
    local link page wheel="torch-$torch_version[+]cpu-cp${1/./}-[^\"'/ ]*x86_64[.]whl"
    for link in $find_links; do
        case "$link" in
            http://* | https://*)
                page=$("$python" - "$link" <<'PY'
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=60).read().decode().replace("%2B", "+"))
PY
                ) || fail "a page of pip's find-links cannot be read" "a page listing wheels" \
                    "no answer from $link" "correct find-links: pip config debug shows where it is set"
                ;;
            *)
                link=${link#file://}
                if [[ -d "$link" ]]; then
                    page=$(ls "$link")
                else
                    page=$(cat "$link" 2>/dev/null || true)
                fi
                page=${page//%2B/+}
                ;;
        esac
        grep -qE "$wheel" <<<"$page" && return 0
    done
    return 1
}

# Read pip's settings through the interpreter $1 (an interpreter without pip has none).
read_pip_settings() {
    pip_config=$("$1" -m pip --disable-pip-version-check config list 2>/dev/null || true)
    find_links=$(pip_setting find-links)
}

# Set driver; empty on a machine without NVIDIA's tools.
find_driver() {
    driver=
    command -v nvidia-smi >/dev/null || return 0
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
    [[ "$driver" =~ ^[0-9]+(\.[0-9]+)*$ ]] || fail "the NVIDIA driver does not respond" \
        "a version from nvidia-smi --query-gpu=driver_version" "${driver:-nothing}" \
        "repair the driver, or remove nvidia-smi from PATH to install for the CPU"
}

# Set python, python_version and torch_build. Use the first suitable interpreter, but on a machine
# without a GPU prefer one for which pip's find-links offer a CPU build.
choose_python_and_torch() {
    local candidate version found="" names=(python3.11 python3.12 python3)
    if [[ -n "${PYTHON:-}" ]]; then names=("$PYTHON"); fi
    python= torch_build=
    for candidate in "${names[@]}"; do
        candidate=$(command -v "$candidate") || continue
        version=$(python_version_of "$candidate") || continue
        found+="${found:+, }$candidate is $version"
        [[ "$version" == 3.11 || "$version" == 3.12 ]] || continue
        if [[ -z "$python" ]]; then
            python=$candidate python_version=$version
            read_pip_settings "$python"
        fi
        if [[ -z "$driver" ]] && cpu_torch_offered "$version"; then
            python=$candidate python_version=$version torch_build=cpu
            return
        fi
        [[ -n "$driver" ]] && break
    done
    [[ -n "$python" ]] || fail "no usable Python" "Python 3.11 or 3.12" \
        "${found:-none of ${names[*]} runs}" \
        "install Python 3.11, or point PYTHON at one: PYTHON=/path/to/python3.11 ./install.sh"
    if [[ -z "$driver" ]]; then
        torch_build=default
    else
        torch_build=$(torch_build_for_driver "$driver") || fail "the NVIDIA driver is too old" \
            "530.30 or newer (CUDA 12.1)" "$driver" "update the driver; 580 or newer is best"
    fi
}

# flash-attn is compiled against the installed torch, so torch and nvcc need the same CUDA major.
require_compiler() {
    [[ -n "$driver" ]] || fail "flash-attn cannot be used here" "an NVIDIA GPU and its driver" \
        "no nvidia-smi" "run ./install.sh without --with-flash-attn; nothing requires flash-attn"
    command -v nvcc >/dev/null || fail "flash-attn cannot be compiled" "nvcc on PATH" "no nvcc" \
        "install the CUDA ${torch_build:2:2} toolkit and put its bin folder on PATH"
    local release
    release=$(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
    [[ "${release%%.*}" == "${torch_build:2:2}" ]] || fail "flash-attn cannot be compiled" \
        "nvcc of CUDA ${torch_build:2:2}, like the torch build for driver $driver" \
        "nvcc of CUDA ${release:-unknown}" \
        "put the bin folder of a CUDA ${torch_build:2:2} toolkit first on PATH"
}

# flash-attn-4 is used on sm_90 alone (kernels/attention/flash_attn_4.py), with CUDA 13's libraries.
require_hopper() {
    local without="run ./install.sh without --with-flash-attn-4; nothing requires flash-attn-4"
    [[ -n "$driver" ]] || fail "flash-attn-4 cannot be used here" "an NVIDIA GPU and its driver" \
        "no nvidia-smi" "$without"
    local capabilities
    capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) || true
    grep -qxF 9.0 <<<"$capabilities" || fail "flash-attn-4 cannot be used here" \
        "a GPU of compute capability 9.0 (H100, H200)" "${capabilities//$'\n'/, }" "$without"
    [[ "$torch_build" == cu130 ]] || fail "flash-attn-4 cannot be used here" \
        "driver 580 or newer (CUDA 13)" "$driver" "update the driver"
}

# Set needed_gib and free_gib. The space used by .venv counts as free: it is replaced or kept.
measure_disk() {
    if [[ "$torch_build" == cpu ]]; then needed_gib=6; else needed_gib=12; fi
    local used_kib=0 free_kib
    if [[ -d .venv ]]; then used_kib=$(du -sk .venv | cut -f 1); fi
    free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
    free_gib=$(((free_kib + used_kib) / 1024 / 1024))
    ((free_gib >= needed_gib)) || fail "too little disk space in $root" "$needed_gib GiB free" \
        "$free_gib GiB free" "free some space, or clone the project onto a larger disk"
}

print_plan() {
    printf 'python: %s (%s)\ntorch: %s (%s build)\nextras: %s\ndisk: %s GiB needed, %s GiB free\n' \
        "$python_version" "$python" "$torch_version" "$torch_build" "${extras:-none}" \
        "$needed_gib" "$free_gib"
}

# Install the pinned uv into .uv, unless it is there.
install_uv() {
    [[ "$(.uv/bin/uv --version 2>/dev/null)" == "uv $UV_VERSION"* ]] && return
    say "installing uv $UV_VERSION"
    rm -rf .uv
    if [[ "$(uv --version 2>/dev/null)" == "uv $UV_VERSION"* ]]; then
        mkdir -p .uv/bin
        ln -s "$(command -v uv)" .uv/bin/uv
    else
        { "$python" -m venv .uv && .uv/bin/python -m pip install -q "uv==$UV_VERSION"; } >&2 ||
            fail "uv cannot be installed" "$python -m venv, then pip install uv==$UV_VERSION" \
                "the error above" \
                "install python$python_version-venv, check pip's index, or put uv $UV_VERSION on PATH"
    fi
}

# Pass pip's settings on to uv, unless uv has its own.
configure_uv() {
    local setting link
    setting=$(pip_setting index-url)
    if [[ -n "$setting" ]]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$setting}"; fi
    setting=$(pip_setting cert)
    if [[ -n "$setting" ]]; then export SSL_CERT_FILE="${SSL_CERT_FILE:-$setting}"; fi
    export UV_PYTHON_DOWNLOADS=never
    uv_install=(.uv/bin/uv pip install --python .venv/bin/python)
    for link in $find_links; do uv_install+=(--find-links "$link"); done
}

# Create .venv for this plan, or keep the existing one if it was completed for the same plan.
make_venv() {
    local plan="Python $python_version, torch $torch_build, in $root"
    if [[ -e .venv && ! -e .venv/.sparselong-plan ]]; then
        fail "$root/.venv was not made by install.sh" "no .venv, or one it made" "another one" \
            "move it away and run ./install.sh again"
    fi
    if [[ ! -e .venv/.sparselong-installed || "$(cat .venv/.sparselong-plan)" != "$plan" ]] ||
        ! python_version_of .venv/bin/python >/dev/null; then
        rm -rf .venv
        mkdir .venv
        echo "$plan" >.venv/.sparselong-plan
        .uv/bin/uv venv -q --allow-existing --python "$python" .venv >&2
    fi
    rm -f .venv/.sparselong-installed
}

install_packages() {
    local build=()
    if [[ "$torch_build" == cu126 ]]; then build=(--torch-backend cu126); fi
    # Exclude a CPU build in pip's find-links: its version counts as newer than the default build's.
    if [[ "$torch_build" != cpu ]]; then
        echo "torch!=$torch_version+cpu" >.venv/.sparselong-constraints
        build+=(-c .venv/.sparselong-constraints)
    fi
    "${uv_install[@]}" "${build[@]}" --compile-bytecode \
        -r requirements/requirements.lock --overrides requirements/overrides.txt >&2 &&
        "${uv_install[@]}" -q --no-deps --no-build-isolation -e . >&2 &&
        if $with_flash_attn; then
            "${uv_install[@]}" "${FLASH_ATTN_BUILD[@]}" >&2 &&
                "${uv_install[@]}" --no-deps --no-build-isolation "${FLASH_ATTN[@]}" >&2
        fi &&
        # Reinstalled if present: flash-attn overwrites its folder flash_attn/cute.
        if $with_flash_attn_4 || compgen -G ".venv/lib/*/*/flash_attn_4-*" >/dev/null; then
            "${uv_install[@]}" --no-deps --reinstall-package flash-attn-4 "${FLASH_ATTN_4[@]}" >&2
        fi || fail "the packages cannot be installed" "requirements/requirements.lock in .venv" \
        "the error above" "fix it, then run ./install.sh again: completed downloads are kept"
}

main() {
    local extras="" dry_run=false option
    with_flash_attn=false with_flash_attn_4=false
    for option in "$@"; do
        case "$option" in
            --with-flash-attn) with_flash_attn=true ;;
            --with-flash-attn-4) with_flash_attn_4=true ;;
            --dry-run) dry_run=true ;;
            --help | -h)
                usage
                return
                ;;
            *)
                say "error: unknown option $option"
                usage >&2
                exit 2
                ;;
        esac
    done
    if $with_flash_attn; then extras="${FLASH_ATTN[*]}"; fi
    if $with_flash_attn_4; then extras+="${extras:+ }${FLASH_ATTN_4[*]}"; fi
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    cd "$root"
    [[ "$(uname -sm)" == "Linux x86_64" ]] || fail "this machine is not supported" "Linux x86_64" \
        "$(uname -sm)" "use a Linux x86_64 machine: the pinned packages support no other platform"
    torch_version=$(sed -n 's/^torch==//p' requirements/requirements.lock)

    find_driver
    choose_python_and_torch
    if $with_flash_attn; then require_compiler; fi
    if $with_flash_attn_4; then require_hopper; fi
    if $dry_run; then
        measure_disk
        print_plan
        return
    fi

    # Only one run at a time in this folder; a second run waits, then finds nothing to do.
    exec 9<"$root"
    flock 9

    # Running without --with-flash-attn or --with-flash-attn-4 leaves an installed one in place.
    local inputs base
    inputs=(install.sh pyproject.toml requirements/requirements.lock requirements/overrides.txt)
    base="$(sha256sum "${inputs[@]}" | sha256sum | cut -d ' ' -f 1) $python_version $torch_build $root"
    if grep -qxF "$base${extras:+ $extras}" .venv/.sparselong-installed 2>/dev/null &&
        python_version_of .venv/bin/python >/dev/null; then
        touch .venv/.sparselong-installed
        say "nothing to do: .venv is up to date (Python $python_version, torch $torch_version $torch_build)"
        return
    fi
    measure_disk
    print_plan >&2
    install_uv
    configure_uv
    make_venv
    install_packages
    printf '%s\n' "$base" "$base${extras:+ $extras}" >.venv/.sparselong-installed.part
    mv .venv/.sparselong-installed.part .venv/.sparselong-installed
    say "installed into $root/.venv"
}

main "$@"

#!/usr/bin/env bash
# Installs what tests/browser needs, Chromium and its driver, where apt-get can do so unasked: as
# root, or with a sudo that wants no password. Elsewhere nothing happens, and those tests are skipped.
# It never fails, and says in one line what became of it.
#
#     tools/browser.sh
set -uo pipefail

readonly PACKAGES=(chromium chromium-driver)
readonly SECONDS_TO_FETCH=100

there() {
    command -v chromium >/dev/null && command -v chromedriver >/dev/null
}

as_root() {
    if ((EUID == 0)); then "$@"; else sudo --non-interactive "$@"; fi </dev/null >/dev/null 2>&1
}

# fetch COMMAND...: apt-get over the network, which may take long and is stopped after a while.
fetch() {
    as_root timeout "$((SECONDS < SECONDS_TO_FETCH ? SECONDS_TO_FETCH - SECONDS : 1))" apt-get -qq "$@"
}

# What is installed was fetched before, so that nothing is stopped half-way.
install() {
    local flags=(--yes --no-install-recommends "${PACKAGES[@]}")
    command -v apt-get >/dev/null && as_root true || return
    fetch update
    fetch install --download-only "${flags[@]}" &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-download "${flags[@]}"
}

there || install
if there; then
    echo "The page is tested in $(chromium --version 2>/dev/null)."
else
    echo "There is no Chromium with its driver: the page is not tested in a browser."
fi

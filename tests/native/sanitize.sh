#!/usr/bin/env bash
# Builds rnnkern with a sanitizer, outside the tree, and runs the tests on it:
#
#   sanitize.sh tsan                             ThreadSanitizer: team_test.cpp, exchange_test.cpp
#   sanitize.sh asan|ubsan|asan+ubsan [PYTEST]   these, then `pytest PYTEST`
#
# `python` must have what constraints.txt pins for [test], and g++ must be the compiler. The package
# that is installed there stays as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

case "${1:-}" in
  asan) sanitizers=address ;;
  ubsan) sanitizers=undefined ;;
  asan+ubsan) sanitizers=address,undefined ;;
  tsan) sanitizers=thread ;;
  *)
    echo "usage: $0 asan|ubsan|asan+ubsan|tsan [pytest arguments]" >&2
    exit 2
    ;;
esac
shift

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python -m pip install --quiet --no-deps --target "$work/site" . \
  --config-settings=build-dir="$work/build" \
  --config-settings=cmake.define.RNNKERN_SANITIZE="$sanitizers" \
  --config-settings=cmake.define.RNNKERN_NATIVE_TESTS=ON

export TSAN_OPTIONS=halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
"$work/build/team_test"
"$work/build/exchange_test"
if [[ $sanitizers == thread ]]; then
  for part in wait release barrier slot; do  # a test that notices nothing is none
    if "$work/build/exchange_test" "$part" 2>"$work/report" || ! grep -q "data race" "$work/report"; then
      echo "exchange_test $part: no data race was reported" >&2
      exit 1
    fi
  done
  exit
fi

# Python itself is not instrumented, so the sanitizer's runtime must be there before it starts, and
# libstdc++ with it, whose exceptions the runtime intercepts. Leaks are the interpreter's own.
runtimes=$(ldd "$work"/site/rnnkern/_cpu.*.so |
  awk '/lib(asan|ubsan|stdc\+\+)\.so/ { printf "%s%s", separator, $3; separator = ":" }')
# Failing allocations are tested, so they return null instead of ending the process.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONMALLOC=malloc PYTHONPATH="$work/site"
export RNNKERN_HOST_FLAGS="-fsanitize=$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O0"
LD_PRELOAD=$runtimes python -m pytest "$@"

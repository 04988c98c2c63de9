#!/usr/bin/env bash
# slim VENV: takes out of an environment what a running stepstream never opens: headers, static libraries, CMake files,
# the packages' own tests, and tools that need a compiler.
set -euo pipefail
packages=$(echo "$1"/lib/python3.*/site-packages)

rm -rf "$packages"/torch/include "$packages"/torch/share "$packages"/torch/test "$packages"/torch/bin/protoc* \
    "$packages"/pyarrow/include "$packages"/pyarrow/src
find "$packages" -type d \( -name tests -o -name test \) -path "*/site-packages/*" \
    \( -path "*/numpy/*" -o -path "*/scipy/*" -o -path "*/pandas/*" -o -path "*/pyarrow/*" -o -path "*/numba/*" \
    -o -path "*/llvmlite/*" -o -path "*/matplotlib/*" -o -path "*/h5py/*" -o -path "*/networkx/*" -o -path "*/sympy/*" \
    -o -path "*/fontTools/*" -o -path "*/kafka/*" -o -path "*/mpl_toolkits/*" \) -prune -exec rm -rf {} +
find "$packages" -type f \( -name "*.a" -o -name "*.pyx" -o -name "*.pxd" -o -name "*.cmake" \) -delete

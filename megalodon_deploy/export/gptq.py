"""GPTQ: choose a matrix's codes so that its outputs on calibration inputs stay, not each weight for itself.

Frantar et al., arXiv 2210.17323. Inputs are rounded one after the other; what an input's rounding changes in the
outputs is made good by the weights of the inputs that follow, by the inverse of the inputs' second moments
H = sum x x^T. Letters: K inputs and N outputs of a matrix [K, N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon_deploy.export.codes import QuantizedMatrix, choose_scales, decoded, encoded
from megalodon_deploy.quantization import WeightFormat

_DAMPING = 0.01  # of H's mean diagonal: calibration text is short
_PANEL = 128  # inputs between two updates of all that follow; a multiple of every block size


def quantize_gptq(matrix_KN: Tensor, moments_KK: Tensor, form: WeightFormat, dtype: torch.dtype) -> QuantizedMatrix:
    """Codes for float32 `matrix_KN`, with scales of type `dtype`, given H = `moments_KK` of its inputs."""
    weights_KN = matrix_KN.clone()
    num_in = weights_KN.shape[0]
    upper_KK = _inverse_root(moments_KK)
    # A block's scales are chosen when its turn comes, from its weights as corrected by then; nvfp4's two-level ones and
    # those of whole columns beforehand.
    scales = choose_scales(weights_KN, form, dtype)
    is_late = form.block_size > 0 and scales.scale is None
    full_GN = scales.full_scales().clone()
    codes = []
    for start in range(0, num_in, _PANEL):
        end = min(start + _PANEL, num_in)
        errors = torch.zeros(end - start, weights_KN.shape[1])
        for k in range(start, end):
            if is_late and k % form.block_size == 0:
                block = choose_scales(weights_KN[k : k + form.block_size], form, dtype)
                full_GN[k // form.block_size] = block.full_scales()[0]
            scale_N = full_GN[k // form.block_size if form.block_size else 0]
            row_N = weights_KN[k]
            code_N = encoded(row_N / scale_N, form.kind)
            error_N = (row_N - decoded(code_N, form.kind) * scale_N) / upper_KK[k, k]
            weights_KN[k + 1 : end].addr_(upper_KK[k, k + 1 : end], error_N, alpha=-1)
            errors[k - start] = error_N
            codes.append(code_N)
        weights_KN[end:].addmm_(upper_KK[start:end, end:].t(), errors, alpha=-1)
    stored = full_GN.to(dtype) if is_late else scales.scales
    return QuantizedMatrix(form, torch.stack(codes), stored, scales.scale)


def _inverse_root(moments_KK: Tensor) -> Tensor:
    """Upper triangular U with U^T U = H^-1, of the damped H. An input that was always 0 is left to itself."""
    diagonal = moments_KK.diagonal()
    damping = (_DAMPING * diagonal.mean()).clamp_min(torch.finfo(moments_KK.dtype).tiny)
    damped = moments_KK.double() + torch.diag((damping + (diagonal == 0) * damping).double())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return upper
